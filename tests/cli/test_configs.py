"""``lit-lora configs`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lit_lora.cli import main
from lit_lora.compare import load_comparison
from lit_lora.config import load_config, read_yaml, shipped_configs
from lit_lora.recipe import RECIPES, load_recipe
from lit_lora.train.optim import OPTIMIZERS


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def configs(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(["configs", *arguments])
    return int(done.value.code or 0)


def test_every_shipped_config_is_listed_with_what_it_is_for(capsys: Any) -> None:
    assert configs() == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [name for name, _ in rows] == list(shipped_configs())
    assert all(len(about) > 20 for _, about in rows)


FOR_FINETUNE = [name for name in shipped_configs() if name != "compare"]


@pytest.mark.parametrize("name", FOR_FINETUNE)
def test_a_config_is_printed_and_copied_as_it_is_and_can_be_read(name: str, capsys: Any) -> None:
    assert configs(name) == 0
    text = capsys.readouterr().out
    assert configs(name, "--copy", "mine.yaml") == 0
    assert capsys.readouterr().out == "wrote mine.yaml\nnext: lit-lora finetune --config mine.yaml\n"
    assert Path("mine.yaml").read_text() == text
    _, config = load_recipe("mine.yaml", [])
    assert config == load_recipe(name, [])[1]
    assert load_config(shipped_configs()[name], type(config)) == config


def test_the_comparison_is_copied_and_can_be_read(capsys: Any) -> None:
    assert configs("compare", "--copy", "mine.yaml") == 0
    assert capsys.readouterr().out == "wrote mine.yaml\nnext: lit-lora compare --config mine.yaml\n"
    assert load_comparison("mine.yaml") == load_comparison("compare")


def test_a_file_that_is_there_is_kept(capsys: Any) -> None:
    Path("mine.yaml").write_text("mine")
    assert configs("lora", "--copy", "mine.yaml") == 4  # as every command that does not overwrite
    assert "mine.yaml: already exists" in capsys.readouterr().err
    assert Path("mine.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lora", "--copy", "there.yaml/mine.yaml"], "part of this path is a file, expected a folder"),
        (["lora", "--copy", "there.yaml/deep/mine.yaml"], "part of this path is a file, expected a folder"),
        (["lora", "--copy", "x" * 300], "the name is too long"),
        (["--schema", "folder"], "folder: is a folder, expected a file"),
        (["--schema", "there.yaml/schema.json"], "part of this path is a file, expected a folder"),
    ],
    ids=str,
)
def test_pain_44_what_cannot_be_written_is_one_clear_line(arguments: list[str], message: str, capsys: Any) -> None:
    Path("there.yaml").write_text("mine")
    Path("folder").mkdir()
    assert configs(*arguments) == 4
    err = capsys.readouterr().err
    assert (err.count("error: "), message in err) == (1, True), err
    assert [path.name for path in sorted(Path().rglob("*"))] == ["folder", "there.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["lorra"], "(did you mean 'lora'?)"), (["--copy", "x.yaml"], "--copy needs the name of a config")],
)
def test_what_makes_no_sense_is_told(arguments: list[str], message: str, capsys: Any) -> None:
    assert configs(*arguments) == 2
    assert message in capsys.readouterr().err


def test_the_schema_knows_every_key_of_every_shipped_config(capsys: Any) -> None:
    assert configs("--schema", "schema.json") == 0
    assert capsys.readouterr().out.endswith("# yaml-language-server: $schema=schema.json\n")
    schema = json.loads(Path("schema.json").read_text())
    cases = {case["if"]["properties"]["recipe"]["const"]: case for case in schema["allOf"]}
    assert cases.keys() == RECIPES.keys() == set(schema["properties"]["recipe"]["enum"])
    assert [name for name, case in cases.items() if "required" not in case["if"]] == ["lora"]

    # Without a name a section is of the first model only: `oneOf` refuses what fits several.
    optimizers = cases["lora"]["then"]
    optimizers = schema["$defs"][optimizers["$ref"].rpartition("/")[2]]["properties"]["optimizer"]["oneOf"]
    assert [part.get("required") for part in optimizers] == [None] + [["name"]] * (len(OPTIMIZERS) - 1)

    def section(reference: dict[str, Any], name: str = "") -> dict[str, Any]:
        choices = [schema["$defs"][choice["$ref"].rpartition("/")[2]] for choice in reference.get("oneOf", [reference])]
        named = {choice["properties"]["name"]["const"]: choice for choice in choices if len(choices) > 1}
        found: dict[str, Any] = named[name] if name and named else choices[0]
        assert found["additionalProperties"] is False
        properties: dict[str, Any] = found["properties"]
        return properties

    for shipped in FOR_FINETUNE:
        data = read_yaml(shipped_configs()[shipped])
        known = section(cases[data["recipe"]]["then"])
        assert data.keys() <= known.keys()
        for name, value in data.items():
            if isinstance(value, dict):
                assert value.keys() <= section(known[name], value.get("name", "")).keys()
