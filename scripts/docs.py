"""Write the reference pages ``docs/commands.md`` and ``docs/config.md`` from the code they describe.

python scripts/docs.py
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from lit_lora.cli import COMMANDS, build_app, help_texts
from lit_lora.compare import CompareConfig
from lit_lora.files import write_text
from lit_lora.peft import methods
from lit_lora.recipe import config_schema

__all__ = ["commands_page", "config_page", "pages"]

_MADE = "<!-- Made by scripts/docs.py from the code: edit that, then run make docs. -->"
_DOCS = Path(__file__).resolve().parents[1] / "docs"


def pages() -> dict[Path, str]:
    """The pages and what they should say."""
    return {_DOCS / "commands.md": commands_page(), _DOCS / "config.md": config_page()}


def commands_page() -> str:
    """Every command with its arguments, options and examples, as its ``--help`` has them."""
    lines = [
        "# Commands",
        _MADE,
        "Results go to stdout (tables as tab-separated lines in a pipe), notes, warnings and progress to stderr. Exit "
        "codes: 0 done, 2 wrong command line or config, 3 wrong input file, 4 disk, 5 numbers went wrong, 6 out of "
        "memory, 128 + signal when stopped.",
        "\n".join(["| command | what it does |", "|---|---|", *(_index(name) for name in COMMANDS)]),
    ]
    for name in COMMANDS:
        lines += _command(name)
    return "\n\n".join(lines) + "\n"


def _index(name: str) -> str:
    return f"| [{name}](#lit-lora-{name}) | {COMMANDS[name][1]} |"


def _command(name: str) -> Iterator[str]:
    prose, examples = help_texts(importlib.import_module(COMMANDS[name][0]).command)
    yield f"## lit-lora {name}"
    yield prose
    rows = []
    for parameter in typer.main.get_command(build_app(name)).commands[name].params:  # type: ignore[attr-defined]
        if parameter.hidden:
            continue
        names = [parameter.metavar or parameter.name] if parameter.param_type_name == "argument" else parameter.opts
        default = "required" if parameter.required else _default(parameter.default)
        words = ", ".join(f"`{word}`" for word in names)
        rows.append(_row([words, default, parameter.help or ""]))
    yield "\n".join(["| argument | default | what it does |", "|---|---|---|", *rows])
    yield "\n".join(["```text", *examples, "```"])


def _default(value: Any) -> str:
    """A default for a table cell; nothing where leaving it out means nothing."""
    if value is None or value is False or value == ():
        return ""
    return f"`{value}`"


def config_page() -> str:
    """Every key of a config, by section, from the settings models."""
    schema = config_schema()
    recipes = {case["if"]["properties"]["recipe"]["const"]: _resolve(schema, case["then"]) for case in schema["allOf"]}
    first = next(iter(recipes.values()))["properties"]
    lines = [
        "# Config",
        _MADE,
        "A config is a YAML file for `lit-lora finetune --config FILE`. A key that is not listed here, a key given "
        "twice or a value of another kind is an error that names file and line. Any key can be changed on the command "
        "line, `train.max_steps=20`. `lit-lora configs` lists the shipped files, and `lit-lora configs --schema FILE` "
        "writes a JSON Schema for your editor. The run folder keeps the config with every default written out.",
        "## Top level",
        _table({**_plain(first), "recipe": {**first["recipe"], "enum": list(recipes)}}),
    ]
    for section, reference in first.items():
        if not {"$ref", "oneOf"} & reference.keys() or section == "peft":
            continue
        defaults = {name: recipe["properties"][section].get("default", {}) for name, recipe in recipes.items()}
        for model in _choices(schema, reference):
            title, its_defaults = f"## {section}", defaults
            if "oneOf" in reference:  # the default of the section is settings of one of its models
                chosen = model["properties"]["name"]["const"]
                title += f", name: {chosen}"
                its_defaults = {recipe: values for recipe, values in defaults.items() if values["name"] == chosen}
            lines += [title, model["description"], _table(model["properties"], its_defaults, model.get("required"))]
    for name, recipe in recipes.items():  # a section of one recipe that is another's under the same name
        for section, reference in recipe["properties"].items():
            other = first.get(section, reference)
            if section != "peft" and "$ref" in reference and "$ref" in other and reference["$ref"] != other["$ref"]:
                model = _resolve(schema, reference)
                lines += [f"## {section}, recipe: {name}", model["description"]]
                lines.append(_table(model["properties"], required=model.get("required")))
    of: dict[str, list[str]] = {}
    for name, recipe in recipes.items():
        for method in _choices(schema, recipe["properties"]["peft"]):
            of.setdefault(json.dumps(method), []).append(f"`{name}`")
    for text, names in of.items():
        method = json.loads(text)
        chosen = method["properties"]["name"]["const"]
        about = f"For `recipe:` {' or '.join(names)}. " + method["description"].replace("``", "`")
        lr = methods()[chosen].default_lr
        own = "" if lr is None else f" Learns at {lr:g} where `optimizer.lr` is not given."
        lines += [f"## peft, name: {chosen}", about + own, _table(_with_inner(schema, method["properties"]))]
    return "\n\n".join([*lines, *_comparison()]) + "\n"


def _comparison() -> Iterator[str]:
    """The keys of a file for ``lit-lora compare``."""
    schema = CompareConfig.model_json_schema()
    yield "## A comparison"
    yield (
        "A file for `lit-lora compare --config FILE`; `lit-lora configs compare` shows one. A `peft` that names a "
        "method takes the place of the base's; other sections are mixed into the base's. `recipe` follows from it."
    )
    yield _table(schema["properties"], required=schema["required"])
    for key, model in (("runs", "RunSection"), ("evaluate", "EvaluateSection")):
        found = schema["$defs"][model]
        yield f"## A comparison, {key}"
        yield found["description"]
        yield _table(found["properties"], required=found["required"])


def _resolve(schema: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = schema["$defs"][reference["$ref"].rpartition("/")[2]]
    return found


def _with_inner(schema: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The keys, and behind one that is a section of its own the keys of that, as ``key.inner``."""
    found: dict[str, Any] = {}
    for name, field in fields.items():
        found[name] = field
        for part in field.get("anyOf", []):
            inner = _resolve(schema, part)["properties"] if "$ref" in part else {}
            found |= {f"{name}.{key}": value for key, value in inner.items()}
    return found


def _choices(schema: dict[str, Any], node: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings models that a section can be: one, or the members of a union."""
    return [_resolve(schema, part) for part in ([node] if "$ref" in node else node["oneOf"])]


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """The keys that are no sections."""
    return {name: field for name, field in fields.items() if not {"$ref", "oneOf"} & field.keys()}


def _table(
    fields: dict[str, Any], defaults: dict[str, dict[str, Any]] | None = None, required: list[str] | None = None
) -> str:
    """Rows of key, values, default and description.

    Args:
        fields: Key: its JSON Schema.
        defaults: Recipe: key: default, where recipes may differ.
        required: Keys without a default.
    """
    rows = []
    for name, field in fields.items():
        default = "required" if name in (required or []) else _config_default(name, field, defaults or {})
        rows.append(_row([f"`{name}`", _values(field), default, field["description"]]))
    return "\n".join(["| key | value | default | what it does |", "|---|---|---|---|", *rows])


def _config_default(name: str, field: dict[str, Any], recipes: dict[str, dict[str, Any]]) -> str:
    given = {recipe: defaults[name] for recipe, defaults in recipes.items() if name in defaults}
    if len({json.dumps(value) for value in given.values()}) > 1:
        return ", ".join(f"{_yaml(value)} ({recipe})" for recipe, value in given.items())
    return _yaml(field["default"]) if "default" in field else ""


def _yaml(value: Any) -> str:
    if value is None or value in ([], {}):
        return ""
    return f"`{value:g}`" if isinstance(value, float) else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _values(field: dict[str, Any]) -> str:
    """What a key can be, in words."""
    if "$ref" in field:
        return "mapping"
    if "anyOf" in field:
        return " or ".join(_values(part) for part in field["anyOf"] if part.get("type") != "null")
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    kind: str = field.get("type", "object")
    if kind == "array":
        inner = field.get("items") or field["prefixItems"][0]
        each = _values(inner)
        return f"list, each {each}" if set(each) & set("≥>≤<") else f"list of {each}s"
    if kind == "object":
        return "mapping"
    words = {"integer": "whole number", "boolean": "`true`, `false`", "string": field.get("format", "text")}
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[key]}" for key, sign in bounds.items() if key in field]
    return " ".join([words.get(kind, kind), ", ".join(limits)]).strip()


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    for path, text in pages().items():
        write_text(path, text)
        print(f"wrote {path}")
