"""Tokenized once: the second start reads the cache, and anything that would change a token misses it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lit_lora.data.cache
from lit_lora import files
from lit_lora.data import DataConfig, Rows, prepare
from lit_lora.data.cache import cached_table
from lit_lora.data.findings import Findings
from lit_lora.data.rows import EncodedRow, Status
from lit_lora.errors import DiskError
from lit_lora.tokenizer import Tokenizer
from tests.data.conftest import Prepare, WriteRows, question
from tests.tiny import CHATML, tiny_tokenizer


def _ids(rows: Rows) -> list[list[int]]:
    return [row.input_ids.tolist() for row in rows]


def test_pain_30_the_second_start_reads_the_cache_and_says_so(run: Prepare, write_rows: WriteRows) -> None:
    path = write_rows([question(n) for n in range(30)])
    first, second = run(path), run(path)
    assert [first.report.files[0].from_cache, second.report.files[0].from_cache] == [False, True]
    assert _ids(first.train) == _ids(second.train)
    assert [row.loss_mask.tolist() for row in first.train] == [row.loss_mask.tolist() for row in second.train]
    assert first.train.fingerprint == second.train.fingerprint
    assert "tokens from the cache" in second.report.lines()[0]
    assert first.report.as_dict()["train"] == second.report.as_dict()["train"]


def test_pain_31_moving_the_file_or_splitting_it_otherwise_still_hits(run: Prepare, write_rows: WriteRows) -> None:
    run(write_rows([question(n) for n in range(9)]))
    moved = write_rows([question(n) for n in range(9)], name="elsewhere/rows.jsonl")
    assert run(moved, validation=0.5, seed=3, deduplicate=True).report.files[0].from_cache


@pytest.mark.parametrize(
    "settings",
    [
        {"format": "prompt_completion"},
        {"columns": {"prompt": "Q: {prompt}", "completion": "completion"}},
        {"values": {"completion": {f"yes {n}": "no" for n in range(9)}}},
        {"system": "Be brief."},
        {"max_seq_length": 1000},
        {"too_long": "truncate_prompt"},
        {"learn": "all"},
        {"limit": 3},
    ],
)
def test_pain_31_every_setting_that_decides_on_tokens_is_in_the_key(
    run: Prepare, write_rows: WriteRows, settings: dict[str, Any]
) -> None:
    path = write_rows([question(n) for n in range(9)])
    run(path)
    assert not run(path, **settings).report.files[0].from_cache


def test_pain_31_content_tokenizer_template_and_code_version_are_in_the_key(
    run: Prepare, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows([question(n) for n in range(9)])
    run(path)
    assert run(path).report.files[0].from_cache

    others: dict[str, dict[str, Any]] = {
        "vocabulary": {"vocab_size": 320},
        "template": {"template": CHATML.replace("'\\n'", "' '")},
        "eos": {"eos": "<|endoftext|>"},
    }
    for name, other in others.items():
        tokenizer = Tokenizer.load(tiny_tokenizer(tmp_path / name, **other))
        prepared = prepare(DataConfig(path=str(path)), tokenizer, cache=tmp_path / "cache", seed=0)
        assert not prepared.report.files[0].from_cache, name

    write_rows([question(n, answer="no") for n in range(9)])
    changed = run(path)
    assert not changed.report.files[0].from_cache

    monkeypatch.setattr(lit_lora.data.cache, "CODE_VERSION", -1)
    assert not run(path).report.files[0].from_cache


def _encode(samples: Sequence[int], findings: Findings) -> list[EncodedRow]:
    return [EncodedRow([n, n + 1], [True, True], Status.KEPT, 2, "f", n) for n in samples]


def test_pain_30_a_run_that_is_killed_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lit_lora.data.cache, "_SAMPLES_PER_FILE", 10)
    encoded: list[int] = []

    def encode(samples: Sequence[int], findings: Findings) -> list[EncodedRow]:
        if samples[0] == 20 and len(encoded) == 20:
            raise KeyboardInterrupt
        encoded.extend(samples)
        return _encode(samples, findings)

    with pytest.raises(KeyboardInterrupt):
        cached_table(tmp_path / "entry", lambda: iter(range(35)), encode, Findings())
    assert not list((tmp_path / "entry").glob("*.tmp"))
    encoded.append(-1)
    table, hit = cached_table(tmp_path / "entry", lambda: iter(range(35)), encode, Findings())
    assert not hit
    assert encoded == [*range(20), -1, *range(20, 35)]
    assert [table.row(n).input_ids.tolist() for n in range(35)] == [[n, n + 1] for n in range(35)]
    assert cached_table(tmp_path / "entry", lambda: iter(()), encode, Findings())[1]


@pytest.mark.parametrize("damage", ["truncate", "remove", "bad_json"])
def test_a_damaged_cache_is_made_anew(run: Prepare, write_rows: WriteRows, tmp_path: Path, damage: str) -> None:
    path = write_rows([question(n) for n in range(9)])
    before = _ids(run(path).train)
    (arrow,) = (tmp_path / "cache").rglob("*.arrow")
    if damage == "truncate":
        arrow.write_bytes(arrow.read_bytes()[:-50])
    elif damage == "remove":
        arrow.unlink()
    else:
        (arrow.parent / "complete.json").write_text('{"files": ')
    again = run(path)
    assert not again.report.files[0].from_cache
    assert _ids(again.train) == before
    assert run(path).report.files[0].from_cache


def test_a_cache_that_cannot_be_written_is_a_disk_error(write_rows: WriteRows, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    tokenizer = Tokenizer.load(tiny_tokenizer(tmp_path / "tokenizer"))
    path = write_rows([question(1)])
    with pytest.raises(DiskError, match="part of this path is a file"):
        prepare(DataConfig(path=str(path)), tokenizer, cache=tmp_path / "file" / "cache", seed=0)


def test_rows_of_many_files_are_read_in_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lit_lora.data.cache, "_SAMPLES_PER_FILE", 3)
    table, _ = cached_table(tmp_path / "entry", lambda: iter(range(11)), _encode, Findings())
    rows = table.kept().subset(np.array([10, 0, 3, 2]))
    assert [row.input_ids.tolist() for row in rows] == [[10, 11], [0, 1], [3, 4], [2, 3]]
    assert [row.source for row in rows] == ["f:10", "f:0", "f:3", "f:2"]


def test_complete_json_is_readable(run: Prepare, write_rows: WriteRows, tmp_path: Path) -> None:
    run(write_rows([{**question(1), "id": 7}]))
    (done,) = (tmp_path / "cache").rglob("complete.json")
    findings = {"formats": {"prompt_completion": 1}, "unused_columns": {"id": 1}, "findings": []}
    assert json.loads(done.read_text()) == {"files": 1, "findings": findings}


def test_the_hash_of_a_large_file_is_remembered_until_it_changes(
    run: Prepare, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []

    def sha256_file(path: Path) -> str:
        hashed.append(path)
        return files.sha256_file(path)

    monkeypatch.setattr(lit_lora.data.cache, "sha256_file", sha256_file)
    monkeypatch.setattr(lit_lora.data.cache, "_LARGE_FILE", 1)
    path = write_rows([question(n) for n in range(9)])
    run(path)
    run(path)
    assert len(hashed) == 2  # just written: it may change once more at the same time

    os.utime(path, (1e9, 1e9))
    run(path)
    assert run(path).report.files[0].from_cache
    assert len(hashed) == 3
    write_rows([question(n, answer="no") for n in range(9)])
    assert not run(path).report.files[0].from_cache
