"""Keys of other tools: each is answered by ours."""

from __future__ import annotations

import re

import pytest
import yaml
from lit_lora.finetune import classify, full, lora

from lit_lora.aliases import ALIASES, ANSWERS
from lit_lora.config import Document, Settings, load_config, validate
from lit_lora.errors import UsageError
from lit_lora.recipe.config import config_schema

REQUIRED = {"model": {"path": "base"}, "data": {"path": "rows.jsonl"}}
ALL_KEYS = [key for keys in [*ALIASES.values(), *ANSWERS] for key in keys]


def keys_of_lora() -> set[str]:
    """All keys of the recipe ``lora``, dotted, read from the schema that an editor gets."""
    definitions = config_schema()["$defs"]
    keys = set()

    def walk(node: dict, path: str) -> None:
        if "$ref" in node:
            walk(definitions[node["$ref"].rpartition("/")[2]], path)
        for part in [*node.get("anyOf", []), *node.get("oneOf", []), *node.get("allOf", [])]:
            walk(part, path)
        for name, child in node.get("properties", {}).items():
            keys.add(f"{path}{name}")
            walk(child, f"{path}{name}.")

    roots = [node for node in definitions.values() if node["properties"].get("recipe", {}).get("const") == "lora"]
    walk(roots[0], "")
    return keys


def problem(config: dict, model: type[Settings] = lora.Config) -> str:
    document = Document(yaml.safe_dump({**REQUIRED, **config}), "config")
    with pytest.raises(UsageError) as caught:
        validate(document.data, model, document.places)
    (line,) = str(caught.value).splitlines()
    return line.partition(": ")[2]


def test_every_key_that_the_table_points_to_exists():
    known = keys_of_lora()
    assert {"optimizer.lr", "peft.rank", "data.path", "out"} <= known
    assert set(ALIASES) <= known
    for answer in ANSWERS.values():
        assert set(re.findall(r"\b(?:model|data|peft|train|optimizer|schedule)\.\w+", answer)) <= known


def test_no_key_is_answered_twice_and_none_is_ours():
    assert sorted(set(ALL_KEYS)) == sorted(ALL_KEYS)
    assert not set(ALL_KEYS) & {key.rpartition(".")[2] for key in keys_of_lora()}


@pytest.mark.parametrize("section", ["", "train", "peft", "data", "model", "optimizer"])
def test_every_key_of_the_table_is_answered_in_every_section(section):
    for target, aliases in ALIASES.items():
        for alias in aliases:
            config = {**REQUIRED, section: {**REQUIRED.get(section, {}), alias: 1}} if section else {alias: 1}
            dotted = f"{section}.{alias}" if section else alias
            assert problem(config) == f"unknown key {dotted!r}: it is called {target} here"
    for aliases, answer in ANSWERS.items():
        for alias in aliases:
            assert problem({alias: 1}) == f"unknown key {alias!r}: {answer}"


@pytest.mark.parametrize(
    ("config", "answer"),
    [
        ({"batch_size": 4}, "unknown key 'batch_size': it belongs in the section train, train.batch_size"),
        ({"rank": 4}, "unknown key 'rank': it belongs in the section peft, peft.rank"),
        ({"train": {"seed": 4}}, "unknown key 'train.seed': it belongs at the top level, seed"),
        ({"train": {"lr": 1}}, "unknown key 'train.lr': it belongs in the section optimizer, optimizer.lr"),
        ({"train": {"epoch": 4}}, "unknown key 'train.epoch' (did you mean 'epochs'?)"),
        ({"name": "x"}, "unknown key 'name', known: recipe, "),
    ],
)
def test_our_own_key_in_another_section_is_sent_there(config, answer):
    assert answer in problem(config)


def test_a_recipe_points_to_no_key_that_it_lacks():
    assert "peft.rank" not in problem({"lora_r": 8}, full.Config)
    assert problem({"learning_rate": 1}, classify.Config).endswith("it is called optimizer.lr here")


def test_an_override_is_answered_too(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: {path: base}\ndata: {path: rows.jsonl}\n")
    with pytest.raises(UsageError, match=r"^'learning_rate=1e-4': unknown key 'learning_rate': it is called optimizer"):
        load_config(path, lora.Config, ["learning_rate=1e-4"])
    with pytest.raises(UsageError, match=r"unknown key 'peft.lora_alpha': it is called peft.alpha here"):
        load_config(path, lora.Config, ["peft.lora_alpha=16"])
