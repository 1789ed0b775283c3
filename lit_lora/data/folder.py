"""Choose the data files of a folder, and tell training, validation and test files apart by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from lit_lora import log
from lit_lora.data.read import READERS, is_data_file
from lit_lora.errors import InputError

__all__ = ["Role", "Source", "find_files", "role_of", "shown_names"]

Role: TypeAlias = Literal["train", "validation", "test"]

# What may follow in the same word: trainset, testdata, devsplit. An open prefix would take "trainer" for training
# data, "testimony" for a test and "developer" for validation.
_ENDING = r"(?:set|sets|data|dataset|split|file|files|rows|cases|examples|samples)?"
_ROLES: dict[Role, re.Pattern[str]] = {
    "train": re.compile(rf"train(?:ing)?{_ENDING}"),
    "validation": re.compile(
        rf"(?:vals?|valid|validation|evals?|evaluation|dev|devel|development|heldout|holdout){_ENDING}"
    ),
    "test": re.compile(rf"(?:tests?|testing){_ENDING}"),
}

_DOCUMENTS = {".md", ".txt"}
_ABOUT_DATA = re.compile(
    r"(?:readme|licen[cs]es?|copying|changelog|contributing|requirements|citation|checksums?|md5(?:sums?)?"
    r"|sha\d+(?:sums?)?)(?![a-z])"
)
"""How the names of text files begin that describe a dataset."""
_SETTINGS = {
    *("dataset_info", "dataset_infos", "dataset_dict", "state", "metadata", "config", "croissant", "manifest"),
    *("schema", "package", "stats"),
}
"""Names of JSON files that describe a dataset."""

_NAMED_FILES = 5


@dataclass(frozen=True)
class Source:
    """The files of a dataset."""

    train: Sequence[Path]
    validation: Sequence[Path] = ()
    test: Sequence[Path] = ()
    """Files named as test data, which are never trained on."""
    unused: Sequence[Path] = ()
    """Files whose names say nothing, beside files that are named as training data; and text beside rows."""

    @property
    def held_out(self) -> Sequence[Path]:
        """The files to measure on when this dataset is used for validation."""
        return self.validation or self.test or self.train

    def log_use(self, *, validation_given: bool) -> None:
        """Say which files of a folder are not trained on.

        Args:
            validation_given: Whether the config says which rows are held out, so that the folder's files are not.
        """
        if self.validation and validation_given:
            log.note(f"not used, because data.validation is set: {shown_names(self.validation)}")
        elif self.validation:
            log.note(f"validation, by name: {shown_names(self.validation)}")
        if self.test:
            log.note(f"not used, because named as test data: {shown_names(self.test)}")
        if self.unused:
            log.warn(f"not used: {shown_names(self.unused)} (data.mix names several files to train on)")


def role_of(name: str) -> Role | None:
    """What the name of a file or folder says about its rows; ``None`` if nothing. The last such word decides."""
    name = re.sub(r"(held|hold)[-_. ]?out", "heldout", name, flags=re.IGNORECASE)
    role: Role | None = None
    for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name):  # devSet is two words
        for candidate, pattern in _ROLES.items():
            if pattern.fullmatch(word.lower()):
                role = candidate
    return role


def find_files(folder: Path) -> Source:
    """The data files in a folder, in its folder ``data``, or in its folders ``train``, ``validation`` and ``test``.

    Files are told apart by their names (:func:`role_of`). If none is named as training data, all files whose names say
    nothing are training files. Files that describe the dataset, such as ``README.md``, are no data; text files are
    data only in a folder without rows.

    Raises:
        InputError: There is no data file, or several folders each contain a dataset.
    """
    files = _search(folder, _has_rows)
    documents = _files_in(folder, _is_text)
    unused = documents if files else []
    files = files or _search(folder, _is_text)
    if not files:
        raise InputError(f"{folder}: no data file in this folder", hint=f"known: {', '.join(READERS)}, also with .gz")

    by_role: dict[Role | None, list[Path]] = {"train": [], "validation": [], "test": [], None: []}
    for file, role in files.items():
        by_role[role].append(file)
    train = by_role["train"]
    if train:
        unused = [*by_role[None], *unused]
    else:
        train = by_role[None]
    _warn_of_copies(train)
    return Source(train, by_role["validation"], by_role["test"], unused)


def shown_names(files: Sequence[Path]) -> str:
    """The paths in one line, of many files only the first."""
    shown = ", ".join(str(file) for file in files[:_NAMED_FILES])
    others = len(files) - _NAMED_FILES
    return f"{shown} and {others:,} more" if others > 0 else shown


def _search(folder: Path, is_wanted: Callable[[Path], bool], levels: int = 2) -> dict[Path, Role | None]:
    """The wanted files and their roles: of the folder itself, else of the folders in it.

    Raises:
        InputError: Several folders each contain a dataset.
    """
    files = _files_in(folder, is_wanted)
    if files or levels == 0:
        return {file: role_of(file.name) for file in files}

    found: dict[Path, dict[Path, Role | None]] = {}
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.name.startswith((".", "_")):
            below = _search(child, is_wanted, levels - 1)
            if below:
                found[child] = below

    by_role: dict[Path, Role | None] = {}
    for child, below in found.items():
        role = role_of(child.name)
        if role is not None:
            by_role.update(dict.fromkeys(below, role))
    for child, below in found.items():
        if child.name.lower() == "data":
            return below
    if by_role or not found:
        return by_role
    if len(found) > 1:
        names = ", ".join(child.name for child in found)
        raise InputError(
            f"{folder}: several folders with data: {names}",
            hint=f"give one of them, such as {next(iter(found))}, or list them in data.mix",
        )
    return next(iter(found.values()))


def _files_in(folder: Path, is_wanted: Callable[[Path], bool]) -> list[Path]:
    return sorted(file for file in folder.iterdir() if is_data_file(file) and is_wanted(file))


def _stem_and_suffix(file: Path) -> tuple[str, str]:
    """``rows`` and ``.jsonl`` for ``rows.JSONL.gz``."""
    name = Path(file.name.lower().removesuffix(".gz"))
    return name.stem, name.suffix


def _has_rows(file: Path) -> bool:
    """Whether a file contains rows, instead of a text or a description of the dataset."""
    stem, suffix = _stem_and_suffix(file)
    return suffix not in _DOCUMENTS and not (suffix == ".json" and stem in _SETTINGS)


def _is_text(file: Path) -> bool:
    """Whether a file contains a text that is no description of the dataset."""
    stem, suffix = _stem_and_suffix(file)
    return suffix in _DOCUMENTS and not _ABOUT_DATA.match(stem)


def _warn_of_copies(files: Iterable[Path]) -> None:
    """Warn about files such as ``rows.json`` and ``rows.jsonl``, which may contain the same rows."""
    by_stem: dict[tuple[Path, str], list[Path]] = {}
    for file in files:
        by_stem.setdefault((file.parent, _stem_and_suffix(file)[0]), []).append(file)
    for copies in by_stem.values():
        if len(copies) > 1:
            log.warn(f"{shown_names(copies)}: the same name in several formats; the same rows may be read twice")
