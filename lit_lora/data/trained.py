"""How the rows were read that a model was trained on, so that it is asked and measured in the same way.

The settings are saved beside the weights, in ``lit_lora_data.json``, and go with an adapter, a merged or a copied
model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_lora.config import read_yaml, validate
from lit_lora.data.cells import cell, columns_in
from lit_lora.data.config import READING, DataConfig
from lit_lora.errors import InputError, UsageError
from lit_lora.files import read_json, write_text
from lit_lora.tokenizer import Message, fold_system

__all__ = ["TRAINED_FILE", "TrainedReading", "read_reading", "rename_values", "run_of", "save_reading"]

TRAINED_FILE = "lit_lora_data.json"
_ANY = "-"  # a path, which a config needs, but which has no meaning here
_DIFFERING = "differing"  # key of the file: settings in which the data sets of the training differ
_PROMPTS = ("prompt", "instruction")
"""Columns of formats that hold what is asked."""


@dataclass(frozen=True)
class TrainedReading:
    """How the rows of a training were read, or how the user wants rows to be read instead.

    Args:
        config: The section ``data``; its path has no meaning.
        from_training: The keys that are as in training.
        is_trained: Whether a training's settings were saved with the model.
        differing: Settings in which the data sets of the training differed, none of which is used.
    """

    config: DataConfig
    from_training: frozenset[str]
    is_trained: bool
    differing: Sequence[str] = ()

    @property
    def about(self) -> str | None:
        """One line on what training decides, such as ``as trained: system message 'Be brief.'``; None if nothing."""
        parts = []
        if "system" in self.from_training and self.config.system:
            parts.append(f"system message {self.config.system!r}")
        if "columns" in self.from_training and self.config.columns:
            mapping = ", ".join(f"{column}: {source!r}" for column, source in self.config.columns.items())
            parts.append(f"columns {{{mapping}}}")
        if "values" in self.from_training and self.config.values:
            parts.append(f"values of {', '.join(self.config.values)}")
        if any(len(set(columns_in(source))) > 1 for source in self._prompt_templates):
            parts.append("but a typed prompt as it is, because their prompt has several columns")
        if self.differing:
            parts.append(f"without {', '.join(self.differing)}, which differed between the data sets")
        return f"as trained: {', '.join(parts)}" if parts else None

    def fill(self, text: str) -> str:
        """A typed prompt as the rows have it: in the place of the only column of their prompt's template."""
        for source in self._prompt_templates:
            if len(set(columns_in(source))) == 1:
                return str(cell({columns_in(source)[0]: text}, source))
        return text

    @property
    def _prompt_templates(self) -> list[str]:
        return [self.config.columns[column] for column in _PROMPTS if column in self.config.columns]

    def conversation(self, text: str) -> list[Message]:
        """The conversation that asks a typed prompt."""
        messages: list[Message] = []
        if self.config.system:
            messages.append({"role": "system", "content": self.config.system})
        messages.append({"role": "user", "content": self.fill(text)})
        return fold_system(messages) if self.config.system_role == "fold" else messages


def save_reading(config: DataConfig, folder: Path) -> None:
    """Write how a training's rows were read into the folder of its adapter or model.

    Of several data sets, the settings that they share are kept, and the others named.

    Raises:
        DiskError: The file cannot be written.
    """
    sections = [part.model_dump(mode="json", include=set(READING)) for part in config.data_sets]
    defaults = DataConfig(path=_ANY).model_dump(mode="json")
    settings: dict[str, Any] = {}
    differing = []
    for key in sorted(READING):
        values = [section[key] for section in sections]
        if any(value != values[0] for value in values):
            differing.append(key)
        elif values[0] != defaults[key]:
            settings[key] = values[0]
    if differing:
        settings[_DIFFERING] = differing
    write_text(folder / TRAINED_FILE, json.dumps(settings, ensure_ascii=False, indent=1) + "\n")


def read_reading(base: Path, adapter: Path | None = None, given: Mapping[str, Any] | None = None) -> TrainedReading:
    """How the rows of a model's training were read, with other settings in place of some.

    Args:
        base: The model folder.
        adapter: The adapter folder, whose training then counts instead of the model's.
        given: Keys of the section ``data`` that the user has set; an empty value turns a setting off.

    Raises:
        InputError: What is saved beside the weights cannot be used.
        UsageError: A given setting is wrong.
    """
    folder = adapter or base
    trained = _saved(folder)
    saved = dict(trained or {})
    differing = saved.pop(_DIFFERING, [])
    given = given or {}
    try:
        validate({**saved, "path": _ANY}, DataConfig, name=str(folder / TRAINED_FILE))
    except UsageError as error:
        raise InputError(str(error), hint=error.hint) from error
    settings = {**saved, **given, "path": _ANY}
    if "columns" in given and "values" not in given and "values" in saved:
        settings["values"] = rename_values(saved["values"], saved.get("columns", {}), given["columns"])
    config = validate(settings, DataConfig, name="command line")
    return TrainedReading(config, frozenset(saved) - frozenset(given), trained is not None, differing)


def rename_values(
    values: Mapping[str, Any], columns: Mapping[str, str], new_columns: Mapping[str, str]
) -> dict[str, Any]:
    """Words for the values of columns, under the names that the same columns of the format have in other rows."""
    new_names = {}
    for column, new_name in new_columns.items():
        new_names[columns.get(column, column)] = new_name
    return {new_names.get(name, name): words for name, words in values.items()}


def run_of(folder: Path) -> Path | None:
    """The run folder that an adapter or a model is in; None if it is in none."""
    is_result = folder.name in ("adapter", "model", "merged")
    return folder.parent if is_result and (folder.parent / "config.yaml").is_file() else None


def _saved(folder: Path) -> dict[str, Any] | None:
    """The settings beside the weights, or those in the config of the run that the folder is in; None without both."""
    if (folder / TRAINED_FILE).is_file():
        return read_json(folder / TRAINED_FILE)
    run = run_of(folder)
    if run is None:
        return None
    settings = read_yaml(run / "config.yaml")
    section = settings.get("data") if isinstance(settings, dict) else None
    if not isinstance(section, dict) or settings.get("recipe") == "classify":
        return None
    return {key: value for key, value in section.items() if key in READING and value}
