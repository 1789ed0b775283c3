"""Find the files of a dataset: a file, a folder, a Hub repository, or the name of a well-known one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from lit_lora import log
from lit_lora.config import did_you_mean
from lit_lora.data.folder import Source, find_files, role_of, shown_names
from lit_lora.data.read import READERS, is_data_file
from lit_lora.errors import InputError, UsageError, first_line
from lit_lora.files import atomic_folder, require_safe_names

__all__ = ["NAMES", "Source", "held_out_files", "locate", "warn_of_name"]

NAMES = {"alpaca": "hub:tatsu-lab/alpaca", "dolly": "hub:databricks/databricks-dolly-15k"}
"""Well-known datasets and where they are."""

# What to download by hand if the Hub cannot be reached.
_BY_HAND = {
    "tatsu-lab/alpaca": "alpaca_data.json from github.com/tatsu-lab/stanford_alpaca",
    "databricks/databricks-dolly-15k": "databricks-dolly-15k.jsonl from that dataset's page on huggingface.co",
}
_HUB = re.compile(r"hub:(?P<repo>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<name>[\w.-]+))?(@(?P<revision>[\w./-]+))?\Z")


def locate(path: str, cache: Path) -> Source:
    """The files that ``path`` names, to train on; a Hub dataset is downloaded once and stored in ``cache``.

    Args:
        path: A file, a folder, ``hub:OWNER/NAME[:CONFIG][@REVISION]``, a name in ``NAMES``, or a bundled
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
    """Warn if a file to train on is named as test or validation data."""
    file = Path(path).expanduser()
    role = role_of(file.name)
    if file.is_file() and role in ("validation", "test"):
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
    hub = _HUB.match(NAMES.get(path, path))
    if hub:
        return find_files(_fetch(hub["repo"], hub["name"], hub["revision"], cache))
    if path.startswith("hub:"):
        raise UsageError(f"{path}: expected hub:OWNER/NAME, hub:OWNER/NAME:CONFIG or hub:OWNER/NAME@REVISION")

    names = list(NAMES)
    if local.parent.is_dir():
        names += [file.name for file in local.parent.iterdir() if is_data_file(file)]
    raise InputError(
        f"{path}: no such file or folder{did_you_mean(local.name, names)}",
        hint=f"give a file ({', '.join(READERS)}), a folder, hub:OWNER/NAME, or one of {', '.join(NAMES)}",
    )


def _fetch(repo: str, name: str | None, revision: str | None, cache: Path) -> Path:
    """Download a Hub dataset into the cache, one Parquet file per split, unless it is already there.

    Raises:
        InputError: It cannot be downloaded.
    """
    parts = [re.sub(r"[^\w.-]", "-", part) for part in (repo, name, revision) if part]
    folder = cache / "hub" / "--".join(parts)
    if folder.is_dir():
        return folder
    try:
        # Importing these takes seconds, and most runs read local files.
        import datasets  # noqa: PLC0415
        import huggingface_hub  # noqa: PLC0415

        # Fails within seconds if the Hub cannot be reached; load_dataset alone would retry for minutes.
        huggingface_hub.HfApi().dataset_info(repo, revision=revision, timeout=20)
        splits = datasets.load_dataset(repo, name, revision=revision)
    except Exception as error:  # of datasets, huggingface_hub, httpx or the operating system
        file = _BY_HAND.get(repo, f"the data files from huggingface.co/datasets/{repo}")
        reason = first_line(error)
        raise InputError(
            f"hub:{repo}: cannot be downloaded: {reason[:160]}",
            hint=f"download {file} and give its path instead (a gated dataset needs HF_TOKEN in the environment)",
        ) from error

    files = {f"{split}.parquet": rows for split, rows in splits.items()}
    require_safe_names(files, f"hub:{repo}")
    with atomic_folder(folder) as temporary:
        for file, rows in files.items():
            rows.to_parquet(str(temporary / file))
    return folder
