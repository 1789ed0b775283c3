"""Where a dataset's files are: a file, a folder, a Hub repository, or the name of a well-known one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from lit_lora import log
from lit_lora.config import did_you_mean
from lit_lora.data.read import READERS, is_data_file
from lit_lora.errors import InputError, UsageError
from lit_lora.files import atomic_folder, require_safe_names

__all__ = ["NAMES", "Source", "locate"]

NAMES = {"alpaca": "hub:tatsu-lab/alpaca", "dolly": "hub:databricks/databricks-dolly-15k"}
"""Well-known datasets that can be asked for by name."""

_BY_HAND = {
    "tatsu-lab/alpaca": "alpaca_data.json from github.com/tatsu-lab/stanford_alpaca",
    "databricks/databricks-dolly-15k": "databricks-dolly-15k.jsonl from that dataset's page on huggingface.co",
}
_HUB = re.compile(r"hub:(?P<repo>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<name>[\w.-]+))?(@(?P<revision>[\w./-]+))?\Z")
_VALIDATION = ("validation", "valid", "val", "dev", "heldout")


@dataclass(frozen=True)
class Source:
    """The files of a dataset."""

    train: Sequence[Path]
    validation: Sequence[Path]


def locate(path: str, cache: Path) -> Source:
    """The files that ``path`` stands for; a Hub dataset is fetched once and kept below ``cache``.

    Args:
        path: A file, a folder, ``hub:OWNER/NAME[:CONFIG][@REVISION]``, a name in ``NAMES``, or a bundled
            sample such as ``tickets_train``.
        cache: Where Hub datasets are kept, as Parquet files.

    Raises:
        UsageError: It is neither.
        InputError: The folder holds no data, or the Hub does not answer.
    """
    given = Path(path).expanduser()
    if given.is_dir():
        return _folder(given)
    if given.exists():
        return Source([given], [])
    bundled = Path(str(resources.files("lit_lora.samples"))) / f"{path}.jsonl"
    if bundled.is_file():
        return Source([bundled], [])
    hub = _HUB.match(NAMES.get(path, path))
    if hub:
        return _folder(_fetch(hub["repo"], hub["name"], hub["revision"], cache))
    if path.startswith("hub:"):
        raise UsageError(f"{path}: expected hub:OWNER/NAME, hub:OWNER/NAME:CONFIG or hub:OWNER/NAME@REVISION")
    beside = [file.name for file in given.parent.iterdir() if is_data_file(file)] if given.parent.is_dir() else []
    raise InputError(
        f"{path}: no such file or folder{did_you_mean(given.name, [*beside, *NAMES])}",
        hint=f"give a file ({', '.join(READERS)}), a folder, hub:OWNER/NAME, or one of {', '.join(NAMES)}",
    )


def _folder(folder: Path) -> Source:
    """Files named ``train…`` and ``validation…`` (or valid, val, dev); without such names all are for training."""
    files = sorted(file for file in folder.iterdir() if is_data_file(file))
    if not files:
        raise InputError(f"{folder}: no data file in this folder", hint=f"known: {', '.join(READERS)}, also with .gz")
    train = [file for file in files if _named(file, ("train",))]
    validation = [file for file in files if _named(file, _VALIDATION)]
    others = [file for file in files if file not in train and file not in validation]
    if not train:
        train, others = [file for file in others if not _named(file, ("test",))], []
    if not train:
        raise InputError(f"{folder}: no training file, found {', '.join(file.name for file in files)}")
    if others:
        log.note(f"{folder}: not used: {', '.join(file.name for file in others)}")
    return Source(train, validation)


def _named(file: Path, names: Sequence[str]) -> bool:
    """Whether one of ``names`` is a word of the file's name: ``snips_train.jsonl.gz``, ``validation-00000.parquet``."""
    return bool(set(re.split(r"[^a-z]+", file.name.lower())) & set(names))


def _fetch(repo: str, name: str | None, revision: str | None, cache: Path) -> Path:
    folder = cache / "hub" / "--".join(re.sub(r"[^\w.-]", "-", part) for part in (repo, name, revision) if part)
    if folder.is_dir():
        return folder
    try:
        # seconds to import, and most runs read local files
        import datasets  # noqa: PLC0415
        import huggingface_hub  # noqa: PLC0415

        huggingface_hub.HfApi().dataset_info(repo, revision=revision, timeout=20)  # fails at once; datasets retries
        found = datasets.load_dataset(repo, name, revision=revision)
    except Exception as error:  # its own errors, huggingface_hub's, httpx's and the operating system's
        file = _BY_HAND.get(repo, f"the data files from huggingface.co/datasets/{repo}")
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"hub:{repo}: cannot be fetched: {reason[:160]}",
            hint=f"get {file} and give its path instead (a gated dataset needs HF_TOKEN in the environment)",
        ) from error
    files = {f"{split}.parquet": rows for split, rows in found.items()}
    require_safe_names(files, f"hub:{repo}")
    with atomic_folder(folder) as temporary:
        for file, rows in files.items():
            rows.to_parquet(str(temporary / file))
    return folder
