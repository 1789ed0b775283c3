"""What is saved beside a model of how its training read rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_lora.data import DataConfig
from lit_lora.data.config import READING
from lit_lora.data.trained import TRAINED_FILE, read_reading, save_reading
from lit_lora.errors import InputError


def test_every_key_of_the_section_is_known_to_say_how_rows_are_read_or_which_they_are() -> None:
    which = {"path", "mix", "validation", "limit", "bad_rows", "deduplicate", "max_seq_length", "too_long"}
    assert set(DataConfig.model_fields) == READING | which


def test_settings_are_read_again_and_each_can_be_replaced_alone(tmp_path: Path) -> None:
    config = DataConfig(
        path="rows.jsonl", system="Be brief.", columns={"prompt": "Good? {text}", "completion": "label"}
    )
    save_reading(config, tmp_path)
    reading = read_reading(tmp_path, given={"system": ""})
    assert reading.config.columns == config.columns
    assert not reading.config.system
    assert reading.from_training == {"columns"}
    assert reading.fill("Fine") == "Good? Fine"
    assert "system" not in str(reading.about)
    assert read_reading(tmp_path).conversation("Fine")[0] == {"role": "system", "content": "Be brief."}
    assert "rows.jsonl" not in (tmp_path / TRAINED_FILE).read_text()


def test_of_several_data_sets_what_they_share_is_used_and_the_rest_is_said(tmp_path: Path) -> None:
    mix = [{"path": "a.jsonl", "system": "A"}, {"path": "b.jsonl", "system": "B"}]
    save_reading(DataConfig.model_validate({"mix": mix, "learn": "last"}), tmp_path)
    reading = read_reading(tmp_path)
    assert reading.config.system is None
    assert reading.config.learn == "last"
    assert "system, which differed between the data sets" in str(reading.about)


def test_an_adapter_without_the_file_is_read_by_the_config_of_its_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("recipe: lora\ndata: {path: rows.jsonl, system: Be brief.}\n")
    (tmp_path / "adapter").mkdir()
    assert read_reading(tmp_path / "base", tmp_path / "adapter").config.system == "Be brief."
    assert not read_reading(tmp_path / "base").is_trained


@pytest.mark.parametrize("text", ["[]", '{"system": 7}', "{", '{"unknown": 1}'])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / TRAINED_FILE).write_text(text)
    with pytest.raises(InputError, match=TRAINED_FILE):
        read_reading(tmp_path)


def test_a_prompt_of_several_columns_is_not_filled_by_one_text(tmp_path: Path) -> None:
    columns = {"prompt": "{title}: {text}", "completion": "label"}
    (tmp_path / TRAINED_FILE).write_text(json.dumps({"columns": columns}))
    assert read_reading(tmp_path).fill("Fine") == "Fine"
    assert "a typed prompt as it is" in str(read_reading(tmp_path).about)
