"""``lit-lora configs``: list, print or copy the shipped configs; write the JSON Schema for editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lit_lora import log
from lit_lora.config import find_config, read_yaml, shipped_configs
from lit_lora.errors import UsageError
from lit_lora.files import require_new, write_text

__all__ = ["command"]


def command(
    name: Annotated[str | None, typer.Argument(help="Shipped config to print.")] = None,
    copy: Annotated[Path | None, typer.Option("--copy", metavar="FILE", help="Copy it to this file.")] = None,
    schema: Annotated[
        Path | None, typer.Option("--schema", metavar="FILE", help="Write a JSON Schema of configs, for your editor.")
    ] = None,
) -> None:
    """List the shipped configs, print one, or copy one to edit.

    Examples:
        lit-lora configs

        lit-lora configs lora --copy my.yaml

        lit-lora configs --schema lit-lora.schema.json
    """
    if schema is not None:
        from lit_lora.recipe import config_schema

        write_text(schema, json.dumps(config_schema(), indent=1) + "\n")
        log.say(f"wrote {schema}")
        log.say("next: begin a config with this line, and your editor completes and checks it:")
        log.say(f"# yaml-language-server: $schema={schema}")
        return
    if name is None:
        if copy is not None:
            raise UsageError("--copy needs the name of a config", hint="lit-lora configs lists them")
        rows = [[config, _about(path)] for config, path in shipped_configs().items()]
        log.table("Shipped configs", ["name", "description"], rows)
        return
    text = find_config(name).read_text(encoding="utf-8")
    if copy is None:
        log.say(text.rstrip("\n"))
        return
    require_new(copy, hint="choose another name, or remove it first")
    write_text(copy, text)
    reader = "compare" if "runs" in read_yaml(copy) else "finetune"
    log.say(f"wrote {copy}")
    log.say(f"next: lit-lora {reader} --config {copy}")


def _about(path: Path) -> str:
    """The first comment line of a config."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
