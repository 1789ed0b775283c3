"""Where a checkpoint keeps its chat templates, and which of several is used: as transformers has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_lora import log
from lit_lora.errors import InputError
from lit_lora.files import read_json, read_text

__all__ = ["FOLDER", "choose_default", "read_templates", "template_files"]

FOLDER = "additional_chat_templates"
_FILE = "chat_template.jinja"
_PROCESSOR = "chat_template.json"
_CONFIG = "tokenizer_config.json"


def read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The sources of a checkpoint's chat templates by name; empty if it has none.

    Files go before the entry in ``tokenizer_config.json``, and that before the processor's ``chat_template.json``.

    Args:
        folder: The checkpoint folder.
        config: Contents of its ``tokenizer_config.json``.

    Raises:
        InputError: A file cannot be read, or an entry is neither text nor a list of named templates.
    """
    templates = {path.stem: read_text(path) for path in sorted((folder / FOLDER).glob("*.jinja"))}
    if (folder / _FILE).is_file():
        templates = {"default": read_text(folder / _FILE), **templates}
    if templates:
        return templates
    templates = _from_entry(config.get("chat_template"), f"{folder}/{_CONFIG}")
    if templates or not (folder / _PROCESSOR).is_file():
        return templates
    return _from_entry(read_json(folder / _PROCESSOR).get("chat_template"), f"{folder}/{_PROCESSOR}")


def _from_entry(entry: Any, where: str) -> dict[str, str]:
    """The templates of an entry that is text, a list of ``{name, template}``, or a mapping of names."""
    if entry is None:
        return {}
    if isinstance(entry, str):
        return {"default": entry}
    try:
        if isinstance(entry, dict):
            templates = dict(entry)
        else:
            templates = {template["name"]: template["template"] for template in entry}
    except (TypeError, KeyError):
        templates = {}
    if not templates or not all(isinstance(text, str) for text in [*templates, *templates.values()]):
        raise InputError(f"{where}: chat_template: expected text or a list of {{name, template}}, got something else")
    return templates


def choose_default(templates: Mapping[str, str], where: str) -> tuple[str, str]:
    """Name and source of the template that is used where none is named."""
    name = "default" if "default" in templates else next(iter(templates))
    if name != "default" and len(templates) > 1:
        log.warn(
            f"{where} has several chat templates ({', '.join(templates)}) and no default; using {name!r} "
            "(model.chat_template chooses another)"
        )
    return name, templates[name]


def template_files(templates: Mapping[str, str]) -> dict[str, str]:
    """The files to write for a checkpoint's templates: relative path -> text.

    A name that is no plain file name is left out: it comes from a file of others, and could lead to another folder.
    """
    name, text = choose_default(templates, "")
    files = {_FILE: text}
    for other, source in templates.items():
        if other != name and Path(other).name == other and not other.startswith("."):
            files[f"{FOLDER}/{other}.jinja"] = source
    return files
