"""The examples of data/README.md are what they claim to be."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lit_lora.config import load_config
from lit_lora.data import DataConfig
from lit_lora.data.findings import Findings
from lit_lora.data.formats import FORMATS
from lit_lora.data.prepare import read_samples
from lit_lora.data.sample import Conversation
from tests.data.conftest import Prepare

TEXT = (Path(__file__).resolve().parents[2] / "data" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(json|yaml) (\w+)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
ROWS = [(name, text) for kind, name, text in BLOCKS if kind == "json" and name != "rows"]
CONFIGS = [text for kind, name, text in BLOCKS if kind == "yaml" and name == "data"]


@pytest.mark.parametrize(("name", "text"), ROWS)
def test_an_example_of_a_format_is_found_to_be_of_that_format(
    name: str, text: str, tmp_path: Path, run: Prepare
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    prepared = run(path)
    assert prepared.report.files[0].format == name
    assert len(prepared.train) == len(text.splitlines())


@pytest.mark.parametrize("text", CONFIGS)
def test_an_example_of_a_data_section_reads_the_rows_above_it(
    text: str, tmp_path: Path, run: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (row,) = [json.loads(rows) for kind, name, rows in BLOCKS if name == "rows"]
    if "columns" not in text:
        row = {"prompt": row["sentence"], "completion": "positive"}
    rows = [json.dumps({**row, "sentence": f"{number} times charming"}) for number in range(20)]
    Path("rows.jsonl").write_text("\n".join(rows))
    Path("data.yaml").write_text(text)
    config = load_config("data.yaml", DataConfig)
    sample, _ = next(read_samples(config, [Path("rows.jsonl")], Findings()))
    assert isinstance(sample, Conversation)
    assert sample.messages[-1]["content"] == "positive"
    assert run(**{key: value for key, value in config.model_dump().items() if value is not None}).train


def test_every_format_has_its_example() -> None:
    assert {name for name, _ in ROWS} == set(FORMATS)
    assert len(CONFIGS) == 2
