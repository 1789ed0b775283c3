"""Find the files of a dataset: a file, a folder, a Hub repository, or the name of a well-known one."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from lit_lora import log
from lit_lora.config import did_you_mean
from lit_lora.data.folder import Source, find_files, role_of, shown_names
from lit_lora.data.hub_data import fetch_hub_data, parse_hub_data
from lit_lora.data.read import READERS, is_data_file
from lit_lora.errors import InputError

__all__ = ["NAMES", "Source", "held_out_files", "locate", "warn_of_name"]

NAMES = {"alpaca": "hub:tatsu-lab/alpaca", "dolly": "hub:databricks/databricks-dolly-15k"}
"""Well-known datasets and where they are."""


def locate(path: str, cache: Path) -> Source:
    """The files that ``path`` names, to train on; a Hub dataset is downloaded once and stored in ``cache``.

    Args:
        path: A file, a folder, ``hub:OWNER/NAME[:CONFIG][@SPLIT][#REVISION]``, a name in ``NAMES``, or a bundled
            sample such as ``tickets_train``.
        cache: Where Hub datasets are stored, as Parquet files.

    Raises:
        UsageError: A ``hub:`` path is malformed.
        InputError: There is no such file or folder, the folder contains no training data, or the Hub cannot be
            reached.
    """
    source = _find(path, cache)
    if not source.train:
        raise InputError(
            f"{path}: no training file, found {shown_names([*source.validation, *source.test])}",
            hint="to train on one of these files, give its own path",
        )
    return source


def held_out_files(path: str, cache: Path) -> Sequence[Path]:
    """The files that ``path`` names, to measure on: of a folder those named as validation or test data, if any.

    Raises:
        UsageError: A ``hub:`` path is malformed.
        InputError: There is no such file or folder, the folder contains no data, or the Hub cannot be reached.
    """
    return _find(path, cache).held_out


def warn_of_name(path: str) -> None:
    """Warn if a file or a split to train on is named as test or validation data."""
    file = Path(path).expanduser()
    role = None
    if file.is_file():
        role = role_of(file.name)
    elif not file.exists() and (hub_data := parse_hub_data(path)) is not None:
        role = role_of(hub_data.split or "")
    if role in ("validation", "test"):
        log.warn(f"{path}: named as {role} data, but it is trained on")


def _find(path: str, cache: Path) -> Source:
    local = Path(path).expanduser()
    if local.is_dir():
        return find_files(local)
    if local.exists():
        return Source([local])
    bundled = Path(str(resources.files("lit_lora.samples"))) / f"{path}.jsonl"
    if bundled.is_file():
        return Source([bundled])
    hub_data = parse_hub_data(NAMES.get(path, path))
    if hub_data is not None:
        folder = fetch_hub_data(hub_data, cache)
        if hub_data.split is not None:  # asked for by name, whatever it is for
            return Source(sorted(folder.iterdir()))
        return find_files(folder)

    names = list(NAMES)
    if local.parent.is_dir():
        names += [file.name for file in local.parent.iterdir() if is_data_file(file)]
    raise InputError(
        f"{path}: no such file or folder{did_you_mean(local.name, names)}",
        hint=f"give a file ({', '.join(READERS)}), a folder, hub:OWNER/NAME, or one of {', '.join(NAMES)}",
    )
