"""Files as people have them: read without options, or refused with a remedy that works when followed to the letter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_lora.data import DataConfig, Rows
from lit_lora.errors import InputError
from lit_lora.tokenizer import Tokenizer
from tests.data.conftest import Prepare
from tests.data.shapes import SHAPES, Shape

_KEYS = "|".join(DataConfig.model_fields)


def _turns(rows: Rows, tokenizer: Tokenizer) -> list[list[str]]:
    """Each row as its turns, ``role: text`` with a star where the text is learned."""
    (turn_start,) = tokenizer.encode("<|im_start|>", special=True)
    turns: list[list[str]] = []
    for row in rows:
        ids = row.input_ids.tolist()
        if ids[0] != turn_start:
            assert all(row.loss_mask)
            turns.append(["text*: " + tokenizer.decode(ids, skip_special=True)])
            continue
        turns.append([])
        starts = [position for position, token in enumerate(ids) if token == turn_start]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            role, _, text = tokenizer.decode(ids[start:end], skip_special=True).partition("\n")
            star = "*" if any(row.loss_mask[start:end]) else ""
            turns[-1].append(f"{role}{star}: {text.removesuffix(chr(10))}")
    return turns


def _follow(hint: str) -> dict[str, Any]:
    """The settings that a hint tells to write, taken from its very words; of several, the first."""
    for key, start in ((match[1], match.end()) for match in re.finditer(rf"\b({_KEYS}): (?=\{{|\w+$)", hint)):
        # The shortest text that is YAML: a mapping may contain braces of its own.
        for end in range(start + 1, len(hint) + 1):
            if hint[end - 1] not in "}" and end < len(hint):
                continue
            try:
                return {key: yaml.safe_load(hint[start:end])}
            except yaml.YAMLError:
                continue
    return {"bad_rows": "skip"} if "bad_rows: skip" in hint else {}


def _refusal(run: Prepare, path: Path, settings: dict[str, Any]) -> InputError | None:
    try:
        run(path, **settings)
    except InputError as error:
        return error
    return None


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_file_as_people_have_it_teaches_what_is_meant(
    shape: Shape, run: Prepare, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shape.write(tmp_path)
    settings: dict[str, Any] = {}
    error = _refusal(run, path, settings)
    assert (error is None) == (shape.refused is None), error
    if error is not None:
        assert re.search(str(shape.refused), str(error)), str(error)
        assert error.hint
        if not shape.rows:  # nothing that a setting could do about this file
            return
    while error is not None:  # the remedy of one problem may lead to the next
        remedy = _follow(error.hint or "")
        assert remedy, error.hint
        assert any(settings.get(key) != value for key, value in remedy.items()), f"the remedy does not help: {error}"
        settings |= remedy
        error = _refusal(run, path, settings)

    capsys.readouterr()
    prepared = run(path, **settings)
    said = capsys.readouterr().err + "\n".join(prepared.report.lines())
    assert _turns(prepared.train, tokenizer) == shape.rows
    if shape.validation is not None:
        assert prepared.validation is not None
        assert _turns(prepared.validation, tokenizer) == shape.validation
    for pattern in shape.warned:
        assert re.search(pattern, said), said


def test_most_shapes_need_no_option() -> None:
    """The record of what was tried: read as it is, refused with a setting that reads it, refused as no setting can."""
    refused = [shape for shape in SHAPES if shape.refused is not None]
    followed = [shape for shape in refused if shape.rows]
    assert (len(SHAPES), len(refused), len(followed)) == (85, 25, 22)
