"""Write the reference pages ``docs/commands.md`` and ``docs/config.md`` from code, ``docs/models.md`` from a record.

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
from lit_lora.gguf.families import FAMILIES as GGUF_FAMILIES
from lit_lora.peft import methods
from lit_lora.recipe import config_schema

__all__ = ["commands_page", "config_page", "models_page", "pages"]

_MADE = "<!-- Made by scripts/docs.py from the code: edit that, then run make docs. -->"
_DOCS = Path(__file__).resolve().parents[1] / "docs"


def pages() -> dict[Path, str]:
    """The files and their texts."""
    texts = {"commands.md": commands_page(), "config.md": config_page(), "models.md": models_page()}
    return {_DOCS / name: text for name, text in texts.items()}


def commands_page() -> str:
    """Every command with its arguments, options and examples, as in its ``--help``."""
    lines = [
        "# Commands",
        _MADE,
        "Results go to stdout (tables as tab-separated lines in a pipe); notes, warnings and progress go to stderr. "
        "Exit codes: 0 success, 2 wrong command line or config, 3 wrong input file, 4 disk, 5 numerical failure (NaN "
        "or overflow), 6 out of memory, 128 + signal if interrupted.",
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
    """A default for a table cell; empty if omitting the option has no effect."""
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
        "A config is a YAML file for `lit-lora finetune --config FILE`. An unknown key, a repeated key or a value of "
        "the wrong type is an error that names file and line. Any key can be changed on the command line: "
        "`train.max_steps=20`. `lit-lora configs` lists the shipped files, and `lit-lora configs --schema FILE` writes "
        "a JSON Schema for your editor. The run folder contains the config with all defaults.",
        "## Top level",
        _table({**_plain(first), "recipe": {**first["recipe"], "enum": list(recipes)}}),
    ]
    for section, reference in first.items():
        if not {"$ref", "oneOf"} & reference.keys() or section == "peft":
            continue
        defaults = {name: recipe["properties"][section].get("default", {}) for name, recipe in recipes.items()}
        for model in _choices(schema, reference):
            title = f"## {section}"
            model_defaults = defaults
            if "oneOf" in reference:  # the default of a section is settings of one of its models
                optimizer = model["properties"]["name"]["const"]
                title += f", name: {optimizer}"
                model_defaults = {recipe: values for recipe, values in defaults.items() if values["name"] == optimizer}
            lines += [title, model["description"], _table(model["properties"], model_defaults, model.get("required"))]
    for name, recipe in recipes.items():  # sections that differ between recipes although they share a name
        for section, reference in recipe["properties"].items():
            other = first.get(section, reference)
            if section != "peft" and "$ref" in reference and "$ref" in other and reference["$ref"] != other["$ref"]:
                model = _resolve(schema, reference)
                lines += [f"## {section}, recipe: {name}", model["description"]]
                lines.append(_table(model["properties"], required=model.get("required")))
    # Schemas are dicts, which cannot be keys, so their JSON groups the recipes that share one.
    recipes_by_method: dict[str, list[str]] = {}
    for name, recipe in recipes.items():
        for method in _choices(schema, recipe["properties"]["peft"]):
            recipes_by_method.setdefault(json.dumps(method), []).append(f"`{name}`")
    for text, names in recipes_by_method.items():
        method = json.loads(text)
        method_name = method["properties"]["name"]["const"]
        about = f"For `recipe:` {' or '.join(names)}. " + method["description"].replace("``", "`")
        lr = methods()[method_name].default_lr
        if lr is not None:
            about += f" Default learning rate: {lr:g}."
        lines += [f"## peft, name: {method_name}", about, _table(_with_inner(schema, method["properties"]))]
    return "\n\n".join([*lines, *_comparison()]) + "\n"


def _comparison() -> Iterator[str]:
    """The keys of a file for ``lit-lora compare``."""
    schema = CompareConfig.model_json_schema()
    yield "## A comparison"
    yield (
        "A file for `lit-lora compare --config FILE`; `lit-lora configs compare` prints an example. A `peft` section "
        "with a `name` replaces that of the base; other sections are merged into those of the base. `recipe` follows "
        "from the method."
    )
    yield _table(schema["properties"], required=schema["required"])
    for key, model in (("runs", "RunSection"), ("evaluate", "EvaluateSection")):
        section = schema["$defs"][model]
        yield f"## A comparison, {key}"
        yield section["description"]
        yield _table(section["properties"], required=section["required"])


def models_page() -> str:
    """Every causal type of transformers, and what works on it, from the record."""
    record = json.loads((_DOCS.parent / "benchmarks" / "models.json").read_text())
    gguf = {family.model_type for family in GGUF_FAMILIES}
    methods = record["methods"]
    rows = []
    for name, found in record["models"].items():
        works = f"all but {', '.join(found['without'])}" if found["without"] else "all"
        cells = [f"`{name}`", found["path"], found["packing"], works, "yes" if found["qlora"] else "no"]
        rows.append(_row([*cells, "yes" if name in gguf else "no"]))
    refused = [_row([f"`{name}`", reason]) for name, reason in record["not_opened"].items()]
    lines = [
        "# Models",
        "<!-- Made by scripts/docs.py of benchmarks/models.json: python -m tests.families.record, then make docs. -->",
        f"Every decoder in transformers {record['transformers']}, by the `model_type` in `config.json`. Each was tried "
        "on a tiny random model. `tests/families/test_every_causal_lm.py` compares the same models with transformers: "
        "logits of documents alone, packed, behind a shared prefix and with a cache, the gradients of LoRA, and files "
        "bit for bit. A newer transformers may have more types. Every model is tested when it is opened, and refused "
        "if packing or caching would change its results.",
        "- **path**: `own` is lit-lora's decoder, the fastest; `hosted` is the model of transformers. "
        "Of a checkpoint of text and images or sound, such as `mistral3` or `llava`, the text model is finetuned, on "
        "the path of the `model_type` in its `text_config`.\n"
        "- **packing**: `own attention` computes documents in one row and a shared prefix once; `position ids` packs "
        "as transformers does; `padded rows` is for models that carry a state from token to token.\n"
        f"- **methods**, of those tried: {', '.join(methods)}.\n"
        "- **QLoRA**: LoRA on quantized linear layers.\n"
        "- **GGUF**: `lit-lora convert` reads files of this type.",
        "\n".join(["| type | path | packing | methods | QLoRA | GGUF |", "|---|---|---|---|---|---|", *rows]),
        "## Types that are not opened",
        "\n".join(["| type | why |", "|---|---|", *refused]),
    ]
    return "\n\n".join(lines) + "\n"


def _resolve(schema: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    definition: dict[str, Any] = schema["$defs"][reference["$ref"].rpartition("/")[2]]
    return definition


def _with_inner(schema: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The keys, each followed by those of its subsection, if it has one, as ``key.inner``."""
    all_fields: dict[str, Any] = {}
    for name, field in fields.items():
        all_fields[name] = field
        for part in field.get("anyOf", []):
            if "$ref" in part:
                for key, inner in _resolve(schema, part)["properties"].items():
                    all_fields[f"{name}.{key}"] = inner
    return all_fields


def _choices(schema: dict[str, Any], node: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings models that a section can be: one, or the members of a union."""
    members = [node] if "$ref" in node else node["oneOf"]
    return [_resolve(schema, member) for member in members]


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """The keys that are not sections."""
    return {name: field for name, field in fields.items() if not {"$ref", "oneOf"} & field.keys()}


def _table(
    fields: dict[str, Any], defaults: dict[str, dict[str, Any]] | None = None, required: list[str] | None = None
) -> str:
    """Rows of key, values, default and description.

    Args:
        fields: Key -> its JSON Schema.
        defaults: Recipe -> key -> default, for keys whose default depends on the recipe.
        required: Keys without a default.
    """
    rows = []
    for name, field in fields.items():
        default = "required" if name in (required or []) else _config_default(name, field, defaults or {})
        rows.append(_row([f"`{name}`", _values(field), default, field["description"]]))
    return "\n".join(["| key | value | default | what it does |", "|---|---|---|---|", *rows])


def _config_default(name: str, field: dict[str, Any], recipes: dict[str, dict[str, Any]]) -> str:
    """The default of a key: one for all recipes, or one per recipe if they differ."""
    by_recipe = {recipe: defaults[name] for recipe, defaults in recipes.items() if name in defaults}
    differs = len({json.dumps(value) for value in by_recipe.values()}) > 1
    if differs:
        return ", ".join(f"{_yaml(value)} ({recipe})" for recipe, value in by_recipe.items())
    return _yaml(field["default"]) if "default" in field else ""


def _yaml(value: Any) -> str:
    """A value as in YAML, in code marks; empty for an empty value."""
    if value is None or value in ([], {}):
        return ""
    if isinstance(value, str):
        return f"`{value}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{json.dumps(value)}`"


def _values(field: dict[str, Any]) -> str:
    """The values that a key accepts, in words."""
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
