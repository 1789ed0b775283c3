"""Files are read row by row, whatever editor or program wrote them; a broken row is named."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import tracemalloc
import zipfile
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from lit_lora.data.findings import Findings
from lit_lora.data.read import read_rows
from lit_lora.errors import InputError
from tests.data.conftest import Prepare

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "ü 😀", "completion": "line\nbreak, and comma"}]


def _read(path: Path) -> list[dict[str, Any]]:
    """All rows of a file without a bad one."""
    findings = Findings()
    rows = [row for _, row in read_rows(path, findings)]
    findings.check()
    return rows


def _skip_bad(path: Path) -> tuple[list[dict[str, Any]], Findings]:
    """The rows of a file without its bad ones, and what was found."""
    findings = Findings("skip")
    return [row for _, row in read_rows(path, findings)], findings


def _jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


CSV = 'prompt,completion\na,b\nü 😀,"line\nbreak, and comma"\n'


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.jsonl", _jsonl(ROWS).encode()),
        ("rows.ndjson", _jsonl(ROWS).encode()),
        ("no_newline_at_end.jsonl", _jsonl(ROWS).rstrip().encode()),
        ("byte_order_mark.jsonl", b"\xef\xbb\xbf" + _jsonl(ROWS).encode()),
        ("utf_16.jsonl", _jsonl(ROWS).encode("utf-16")),
        ("windows.jsonl", _jsonl(ROWS).replace("\n", "\r\n").encode()),
        ("blank.jsonl", ("\n" + _jsonl(ROWS).replace("\n", "\n  \n\r\n")).encode()),
        ("rows.jsonl.gz", gzip.compress(_jsonl(ROWS).encode(), mtime=0)),
        ("unpacked_in_passing.jsonl.gz", _jsonl(ROWS).encode()),
        ("UPPER.JSONL", _jsonl(ROWS).encode()),
        ("list.json", json.dumps(ROWS).encode()),
        ("pretty.json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).encode()),
        ("wrapped.json", json.dumps({"version": "1.0", "data": ROWS}).encode()),
        ("lines_called.json", _jsonl(ROWS).encode()),
        ("list.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("rows.csv", CSV.encode()),
        ("byte_order_mark.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("utf_16.csv", CSV.encode("utf-16")),
        ("blank.csv", CSV.replace("a,b\n", "\na,b\n\n").encode()),
        ("semicolons.csv", b'prompt;completion\na;b\n\xc3\xbc \xf0\x9f\x98\x80;"line\nbreak, and comma"\n'),
        ("rows.tsv", 'prompt\tcompletion\na\tb\nü 😀\t"line\nbreak, and comma"\n'.encode()),
    ],
)
def test_pain_44_rows_are_the_same_from_every_kind_of_file(tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    assert _read(path) == ROWS


def test_windows_line_ends_of_a_csv_file_end_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"prompt,completion\r\na,b\r\nc,d\r\n")
    assert _read(path) == [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


def test_parquet_gives_nested_values(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi"}], "id": 1}, {"messages": [], "id": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert _read(tmp_path / "rows.parquet") == rows


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes("Chapter 1\r\n\r\nIt was…".encode())
    assert _read(tmp_path / "book.txt") == [{"text": "Chapter 1\n\nIt was…"}]


def test_text_that_is_something_else_by_its_look_is_warned_about(tmp_path: Path) -> None:
    for text, message in (("<html><p>Hi", "that is a web page"), ('{"prompt": "a"}\n', "that looks like JSON")):
        (tmp_path / "rows.txt").write_text(text)
        rows, findings = _skip_bad(tmp_path / "rows.txt")
        assert rows == [{"text": text}]
        assert findings.of_level("warning")[0].message.startswith(message)


def test_numbers_are_lines_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    (tmp_path / "rows.csv").write_text('a,b\n"x\ny",2\n\n3,4\n')
    assert [number for number, _ in read_rows(tmp_path / "rows.jsonl", Findings())] == [1, 3]
    assert [number for number, _ in read_rows(tmp_path / "rows.csv", Findings())] == [2, 5]


def test_unicode_line_separators_inside_a_value_end_no_row(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\u0085c"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0], ensure_ascii=False) + "\n", encoding="utf-8")
    (tmp_path / "rows.csv").write_text("text\na\u2028b\u0085c\n", encoding="utf-8")
    assert _read(tmp_path / "rows.jsonl") == rows
    assert _read(tmp_path / "rows.csv") == rows


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("r.jsonl", b'{"a": 1}\n\n{"a": 2,}\n', r"r\.jsonl:3: not valid JSON: .*column"),
        ("r.jsonl", b'{"a": 1}\n{"a": "cut o', r"r\.jsonl:2: not valid JSON: .*truncated"),
        ("r.jsonl", b'{"a": 1}\n[1, 2]\n', r"r\.jsonl:2: expected an object .*got \[1, 2\]"),
        ("r.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"r\.jsonl:2: not UTF-8"),
        ("r.jsonl", b'{"a": ' + b"[" * 100_000 + b"\n", r"r\.jsonl:1: not valid JSON: nested too deep"),
        ("r.json", b'[\n{"a": 1},\n{"a": 2\n]', r"r\.json:4: not valid JSON"),
        ("r.json", b'{"a": 1}\n{"a": \n', r"r\.json:2: not valid JSON"),
        ("r.json", b"3", r"r\.json: expected a list of objects, got int"),
        ("r.json", b"[3]", r"r\.json:1: expected an object .*got 3"),
        ("r.csv", b'a,b\n1,2\n"open,4\n5,6\n', r"r\.csv:3: not valid CSV: a quote is opened but never closed"),
        ("r.csv", b"a,b\n1,2\n3,4,5\n", r"r\.csv:3: 3 cells, expected 2 \(a, b\)"),
        ("r.csv", b"a,b\n1\n", r"r\.csv:2: 1 cell, expected 2"),
        ("r.csv", b"a,a\n1,2\n", r"r\.csv:1: the header names 'a' more than once"),
        ("r.csv", b"a,b\n\xff,2\n", r"r\.csv:2: not UTF-8 text \(byte 0xff\)"),
        ("r.jsonl.gz", gzip.compress(_jsonl(ROWS).encode(), mtime=0)[:-9], r"r\.jsonl\.gz: damaged or truncated gzip"),
        ("r.parquet", b"PAR1 not really", r"r\.parquet: not a complete Parquet file"),
        ("r.xlsx", b"", r"r\.xlsx: unknown kind of data file"),
        ("r.jsnl", b"", r"r\.jsnl: unknown kind of data file \(did you mean '\.jsonl'\?\)"),
    ],
)
def test_pain_44_a_damaged_file_is_an_error_with_its_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        _read(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        _read(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz"])
def test_a_key_that_stands_twice_is_counted_and_named(tmp_path: Path, name: str) -> None:
    lines = ['{"a": 1, "b": 2}', '{"a": 1, "a": 2}', '{"a": {"b": 1, "c": [{"d": 3, "d": 3}]}}', '{"a": "b: a"}']
    text = "[" + ",\n".join(lines) + "]" if name == "rows.json" else "\n".join(lines)
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    rows, findings = _skip_bad(path)
    assert rows[1] == {"a": 2}
    assert list(map(str, findings.of_level("warning"))) == [
        f"1 row with a repeated key ('a'), of which the last value is used: {path}:2",
        f"1 row with a repeated key ('d'), of which the last value is used: {path}:3",
    ]


def test_rows_without_a_repeated_key_are_read_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": {"a": {"a": "a"}}, "A": [{"b": 1}, {"b": 1}]}\n' * 2)
    rows, findings = _skip_bad(path)
    assert len(rows) == 2
    assert findings.as_dict()["findings"] == []


MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
PAIRS = [{"prompt": "q1", "completion": "cat"}, {"prompt": "q2", "completion": "dog"}]
LINES = [json.dumps(row) for row in PAIRS]
PRETTY = [json.dumps(row, indent=2) for row in PAIRS]
COLUMNS = {"prompt": ["q1", "q2"], "completion": ["cat", "dog"]}


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize(
    "text",
    [
        pytest.param(json.dumps(PAIRS), id="f4-list-in-a-line"),
        pytest.param(json.dumps(PAIRS, indent=2), id="f4-pretty-list"),
        pytest.param("[\n" + ",\n".join(LINES) + "\n]\n", id="f4-list-of-lines"),
        pytest.param("[\n" + ",\n".join(LINES) + ",\n]\n", id="comma-after-the-last"),
        pytest.param("\n".join(LINES), id="lines"),
        pytest.param("\r".join(LINES), id="lines-of-an-old-mac"),
        pytest.param(",\n".join(LINES), id="f5-commas-between-lines"),
        pytest.param(",".join(LINES), id="f5-commas-in-a-line"),
        pytest.param("".join(LINES), id="without-anything-between"),
        pytest.param("\n".join(PRETTY), id="pretty-objects"),
        pytest.param(",\n".join(PRETTY), id="f5-pretty-objects-with-commas"),
        pytest.param(json.dumps(json.dumps(PAIRS)), id="f5-encoded-twice"),
        pytest.param(json.dumps("\n".join(LINES)), id="lines-encoded-twice"),
        pytest.param("\n".join(map(json.dumps, LINES)), id="each-line-encoded-twice"),
        pytest.param(json.dumps(LINES), id="list-of-encoded-rows"),
        pytest.param("\n".join(map(str, PAIRS)), id="python-lines"),
        pytest.param(str(PAIRS), id="python-list"),
        pytest.param(",\n ".join(str(PAIRS).split(", {")).replace("\n ", "\n {"), id="python-list-over-lines"),
        pytest.param("\n".join(f"[{line}]" for line in LINES), id="a-list-per-line"),
        pytest.param(json.dumps(COLUMNS), id="f1-columns"),
        pytest.param(json.dumps(COLUMNS, indent=1), id="f1-pretty-columns"),
        pytest.param('{"prompt": {"0": "q1", "1": "q2"}, "completion": {"0": "cat", "1": "dog"}}', id="pandas-columns"),
        pytest.param(json.dumps({"0": PAIRS[0], "1": PAIRS[1]}), id="pandas-index"),
        pytest.param(json.dumps({"a": PAIRS[0], "b": PAIRS[1]}), id="rows-by-id"),
        pytest.param(
            '{"columns": ["prompt", "completion"], "index": [0, 1], "data": [["q1", "cat"], ["q2", "dog"]]}',
            id="pandas-split",
        ),
        pytest.param(
            json.dumps({"schema": {"primaryKey": ["index"]}, "data": [{"index": 7, **row} for row in PAIRS]}),
            id="pandas-table",
        ),
        pytest.param(json.dumps({"version": 1, "data": PAIRS}), id="wrapper"),
        pytest.param(json.dumps({"description": "ours", "examples": PAIRS}, indent=2), id="pretty-wrapper"),
        pytest.param(json.dumps({"train": PAIRS}), id="train-only"),
        pytest.param(json.dumps({"train_sft": PAIRS}), id="train-with-a-name"),
        pytest.param(json.dumps({"data": COLUMNS}), id="wrapped-columns"),
        pytest.param(json.dumps({"data": {"train": PAIRS}}), id="wrapped-splits"),
    ],
)
def test_json_rows_are_the_same_in_every_arrangement(tmp_path: Path, text: str, name: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert _read(path) == PAIRS


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"messages": MESSAGES}, id="f3-conversation"),
        pytest.param({"id": 1, "conversations": [{"from": "human", "value": "Hi"}]}, id="sharegpt"),
        pytest.param({"conversation": [{"system": "S", "input": "Hi", "output": "Yo"}]}, id="m15-exchanges"),
        pytest.param({"prompt": "a", "completion": "b", "examples": [{"prompt": "c"}]}, id="f2-examples"),
        pytest.param({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, id="p1-messages-in-both"),
        pytest.param({"prompt": {"a": 1}, "completion": {"b": 2}}, id="objects-in-both"),
        pytest.param({"prompt": "f", "test": ["assert f(1)"], "completion": "g"}, id="a-column-called-test"),
        pytest.param({"text": "plain"}, id="text"),
    ],
)
def test_one_object_that_is_a_row_stays_one(tmp_path: Path, row: dict[str, Any]) -> None:
    for name, text in (
        ("a.json", json.dumps(row, indent=2)),
        ("b.json", json.dumps(row)),
        ("c.jsonl", json.dumps(row)),
    ):
        (tmp_path / name).write_text(text)
        assert _read(tmp_path / name) == [row]


def test_a_list_of_messages_is_a_conversation(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for text in (json.dumps(MESSAGES), json.dumps(MESSAGES, indent=2)):
        path.write_text(text)
        assert _read(path) == [{"messages": MESSAGES}]
    for text in (json.dumps([MESSAGES] * 2), json.dumps([MESSAGES] * 2, indent=2), f"{json.dumps(MESSAGES)}\n" * 2):
        path.write_text(text)
        assert _read(path) == [{"messages": MESSAGES}] * 2
    mails = [{"from": "a@b.c", "content": "Buy!", "label": "spam"}, {"from": "c@b.c", "content": "Hi", "label": "ham"}]
    path.write_text(json.dumps(mails))
    assert _read(path) == mails


def test_training_rows_are_read_from_a_file_of_splits_and_the_others_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": 2, "train": PAIRS, "test": PAIRS[:1], "dev": COLUMNS}))
    rows, findings = _skip_bad(path)
    assert rows == PAIRS
    assert [(each.count, each.message) for each in findings.of_level("warning")] == [
        (1, "in the split 'test', which is left out"),
        (2, "in the split 'dev', which is left out"),
    ]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"test": PAIRS}, "no training rows, found the splits test"),
        ({"easy": PAIRS, "hard": PAIRS}, r"several lists of rows \(easy, hard\), expected one"),
        ({"prompt": ["a"], "completion": ["b", "c"]}, "of different lengths: prompt 1, completion 2"),
        ({"columns": ["a", "b"], "data": [[1, 2], [3]]}, "row 2 of data does not have a cell for each"),
        ("a word", "expected a list of objects, got str"),
    ],
)
def test_a_document_without_a_clear_list_of_rows_is_refused(tmp_path: Path, document: Any, message: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=message) as caught:
        _read(path)
    assert caught.value.hint


def test_objects_that_lost_the_line_break_between_them_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}{"a": 3}, {"a": 4}\n{"a": 5} x\n{"a": 6}\n')
    findings = Findings("skip")
    assert [(number, row["a"]) for number, row in read_rows(path, findings)] == [(1, 1), (2, 2), (2, 3), (2, 4), (4, 6)]
    assert [finding.where for finding in findings.of_level("bad")] == [f"{path}:3"]


@pytest.mark.parametrize("indent", [None, 1])
def test_what_is_noticed_belongs_to_its_row(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"a": {"x": float("nan")}}, {"a": 1}, {"a": 2}]
    path.write_text("\n".join(json.dumps(row, indent=indent) for row in rows))
    good, findings = _skip_bad(path)
    assert (good, findings.of_level("bad")[0].where) == (rows[1:], f"{path}:1")
    path.write_text('{"a": 1, "a": 2}\n{"a": 1}\n')
    assert _skip_bad(path)[1].of_level("warning")[0].where == f"{path}:1"


def test_all_of_ten_broken_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{LINES[0]}\n{{"prompt": "{"x" * number}\n' for number in range(10)))  # f13
    rows, findings = _skip_bad(path)
    assert (len(rows), findings.bad_count) == (10, 10)
    with pytest.raises(InputError) as caught:
        _read(path)
    assert f"{path}:2, 4, 6, 8, 10, 12, 14, 16 and 2 more: not valid JSON" in str(caught.value)
    assert "truncated" in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "bad", "good"),
    [
        (['{"a": "cut', '{"a": 2}', '{"a": 3}'], [1], [2, 3]),
        (['{"a": 1,', '{"a": 2}', '{"a": 3}'], [1], [2, 3]),
        (["no JSON", '{"a": 2}'], [1], [2]),
        (["[", '{"a": 1},', '{"a": 2', ",", '{"a": 3},', "4,", '{"a": 5}', "]"], [2, 4], [1, 3, 5]),
        (["[", "  {", '    "a": 1 "b": {}', "  },", "  {", '    "a": 2', "  }", "]"], [1], [2]),
        (["[", '{"a": 1},', '{"a": 2}'], [2], [1, 2]),
    ],
)
def test_reading_goes_on_after_a_broken_value(
    tmp_path: Path, lines: list[str], bad: list[int], good: list[int]
) -> None:
    path = tmp_path / "rows.json"
    path.write_text("\n".join(lines) + "\n")
    findings = Findings("skip")
    assert [number for number, _ in read_rows(path, findings)] == good
    places = [place for finding in findings.of_level("bad") for place in finding.places]
    assert places == [f"{path}:{number}" for number in bad]


def test_where_no_next_value_is_found_the_file_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, {"a" 2}, {"a": 3}]')
    with pytest.raises(InputError, match=r"rows\.json:1: not valid JSON: Expecting ':' delimiter \(column 17\)$"):
        _skip_bad(path)
    path.write_text('[\n{"a": 1},\n{"a": "cut')
    with pytest.raises(InputError, match=r"rows\.json:3: not valid JSON.*the file looks truncated$"):
        _skip_bad(path)


def test_numbers_that_json_has_not_are_bad_rows_that_name_the_key(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    values = ['{"x": NaN}', '{"x": [1, -Infinity]}', '{"x": {"y": 1e400}}', "Infinity", "NaN", '"NaN"', "1e40"]
    path.write_text("".join(f'{{"prompt": "a", "completion": {value}}}\n' for value in values))  # p6
    rows, findings = _skip_bad(path)
    assert [row["completion"] for row in rows] == [None, "NaN", 1e40]  # tables write NaN for a missing value
    keys = [finding.message.partition(":")[0] for finding in findings.of_level("bad")]
    assert keys == ["completion.x", "completion.x.y", "completion"]


def test_text_that_is_not_utf8_is_named_with_its_byte_and_the_remedy_works(tmp_path: Path) -> None:
    for name, text in (("a b.jsonl", '{"a": "x"}\n{"a": "café"}\n'), ("c.csv", "a,b\nx,y\ncafé,y\n")):
        path = tmp_path / name
        path.write_bytes(text.encode("latin-1"))
        rows, findings = _skip_bad(path)
        (bad,) = findings.of_level("bad")
        assert (len(rows), bad.message) == (1, "not UTF-8 text (byte 0xe9)")
        assert bad.hint is not None
        subprocess.run(["sh", "-c", bad.hint.removeprefix("save it as UTF-8: ")], check=True)
        assert len(_read(tmp_path / f"{path.stem}-utf8{path.suffix}")) == 2
    (tmp_path / "t.txt").write_bytes("one\ncafé".encode("latin-1"))
    with pytest.raises(InputError, match=r"t\.txt:2: not UTF-8 text \(byte 0xe9\)"):
        _read(tmp_path / "t.txt")


def test_text_of_another_script_is_not_called_western(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("a,b\n中文数据,y\n".encode("gb18030"))
    _, findings = _skip_bad(path)
    assert "GB18030" in str(findings.of_level("bad")[0].hint)
    path.write_bytes("a,b\ncafé,y\n".encode() + b"caf\xc3\xa9 \xff,y\n")
    _, findings = _skip_bad(path)
    assert findings.of_level("bad")[0].hint == "the rest of the row is UTF-8: correct this byte"


@pytest.mark.parametrize("order", ["le", "be"])
def test_utf_16_without_a_byte_order_mark_is_read(tmp_path: Path, order: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes("\n".join(LINES).encode(f"utf-16-{order}"))
    assert _read(tmp_path / "rows.jsonl") == PAIRS


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "data", "message", "hint"),
    [
        ("r.jsonl", POINTER, "a Git LFS pointer, not the data", "git lfs pull"),
        ("r.parquet", POINTER, "a Git LFS pointer, not the data", "git lfs pull"),
        ("r.jsonl.gz", POINTER, "a Git LFS pointer, not the data", "git lfs pull"),
        ("r.txt", POINTER, "a Git LFS pointer, not the data", "git lfs pull"),
        ("r.json", b"\n<!DOCTYPE html>\n<html>", r"a web page \(HTML\)", "Raw"),
        ("r.csv", b"<html><body>", r"a web page \(HTML\)", "Raw"),
        ("r.json", b"\x80\x04\x95\x10", "a Python pickle", "JSON Lines"),
        ("r.jsonl", b"\x28\xb5\x2f\xfdxyz", "compressed with zstd", "unpack it: zstd -d"),
        ("r.feather", b"FEA1xyz", "an old Feather file", "write_feather"),
        ("r.csv", b'{"a": 1, "b": 2}\n', "JSON, not CSV", "name it .jsonl"),
        ("r.parquet", b'{"a": 1}\n', "not a complete Parquet file", "name it .jsonl"),
        ("r.arrow", b"ARROW1\0\0cut", "not a complete Arrow file", "download it again"),
    ],
)
def test_what_is_no_data_is_called_by_its_name_with_a_remedy(
    tmp_path: Path, name: str, data: bytes, message: str, hint: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        _read(path)
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "member", "message"),
    [
        ("r.csv", "xl/workbook.xml", "an Excel workbook"),
        ("r.xlsx", "xl/workbook.xml", "an Excel workbook"),
        ("r.json", "rows.json", "a zip archive"),
        ("r.zip", "rows.json", "a zip archive"),
    ],
)
def test_an_archive_is_told_from_a_workbook(tmp_path: Path, name: str, member: str, message: str) -> None:
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr(member, "x")
    with pytest.raises(InputError, match=message):
        _read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("f10-sep.csv", "sep=;\nprompt;completion\n1,5;yes, no\n"),
        ("f10-pipe.csv", "prompt|completion\n1,5|yes, no\n"),
        ("tab.csv", "prompt\tcompletion\n1,5\tyes, no\n"),
        ("decimal_commas.csv", "prompt;completion\n1,5;yes, no\n"),
        ("commas_in_tabs.tsv", "prompt\tcompletion\n1,5\tyes, no\n"),
        ("tabs.tsv.gz", "prompt\tcompletion\n1,5\tyes, no\n"),
        ("single.csv", "'prompt','completion'\n'1,5','yes, no'\n"),
        ("single_where_needed.csv", "prompt,completion\n'1,5','yes, no'\n"),
        ("spaces.csv", 'prompt, completion\n"1,5", "yes, no"\n'),
        ("space_in_header.csv", ' prompt ,completion \n"1,5","yes, no"\n'),
        ("old_mac.csv", 'prompt,completion\r"1,5","yes, no"\r'),
        ("more_separators.csv", 'prompt,completion,\n"1,5","yes, no",\n'),
        ("more_cells.csv", 'prompt,completion\n"1,5","yes, no",,\n'),
        ("f12-index.csv", ',prompt,completion\n0,"1,5","yes, no"\n'),
        ("f12-unnamed.csv", 'Unnamed: 0,prompt,completion\n0,"1,5","yes, no"\n'),
        ("f12-twice.csv", 'Unnamed: 0.1,Unnamed: 0,prompt,completion\n0,0,"1,5","yes, no"\n'),
        ("f12-level.jsonl", '{"__index_level_0__": 3, "prompt": "1,5", "completion": "yes, no"}'),
    ],
)
def test_cells_are_the_same_in_every_manner(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    rows, findings = _skip_bad(tmp_path / name)
    assert rows == [{"prompt": "1,5", "completion": "yes, no"}]
    assert findings.as_dict()["findings"] == []


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ('"question, or task";answer\na, b;c\n', {"question, or task": "a, b", "answer": "c"}),
        ('"question; or task";answer\na, b;c\n', {"question; or task": "a, b", "answer": "c"}),
        ('a,b\nHe said "hi" to me,c\n', {"a": 'He said "hi" to me', "b": "c"}),
        ("a,b\n'tis so,it's\n", {"a": "'tis so", "b": "it's"}),
        ('a,b\n"x, ""y""",c\n', {"a": 'x, "y"', "b": "c"}),
        ('a,b\r\n"x\r\ny",c\r\n', {"a": "x\ny", "b": "c"}),
        ('text\n"a, b"\n', {"text": "a, b"}),
        ("text\na, b; c\n", {"text": "a, b; c"}),
    ],
)
def test_separators_and_quotes_are_told_from_text(tmp_path: Path, text: str, row: dict[str, str]) -> None:
    (tmp_path / "rows.csv").write_bytes(text.encode())
    assert _read(tmp_path / "rows.csv") == [row]


def test_a_file_that_quotes_nothing_keeps_its_quotes(tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text('a\tb\n"Hi" he said\t1\n"Yo" x\t2\n"Z" t\t3\n')
    assert [row["a"] for row in _read(tmp_path / "rows.tsv")] == ['"Hi" he said', '"Yo" x', '"Z" t']


def test_a_badly_quoted_row_is_named_and_reading_goes_on_in_the_next_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('a,b\n1,2\n"He said "hi"",3\n4,5\n"open,6\n7,8\n"x\ny",9\n"open,10\n11,12\n')  # f11
    rows, findings = _skip_bad(path)
    assert [row["b"] for row in rows] == ["2", "5", "8", "9", "12"]
    assert [(finding.where, finding.message) for finding in findings.of_level("bad")] == [
        (f"{path}:3, 5", "not valid CSV: text after a closing quote"),
        (f"{path}:9", "not valid CSV: a quote is opened but never closed"),
    ]
    # After a quote that is wrong, a line may be the rest of a cell.
    assert [finding.where for finding in findings.of_level("warning")] == [f"{path}:4, 6, 10"]


def test_text_without_a_column_and_a_header_like_data_are_warned_about(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,\na,b,\nc,d,a remark\n")
    _, findings = _skip_bad(path)
    assert list(map(str, findings.of_level("warning"))) == [
        f"1 row with text in a column without a name, which is not used: {path}:3"
    ]
    path.write_text("Which purrs?,The cat.\nWhich barks?,The dog.\n")
    _, findings = _skip_bad(path)
    assert "is the header missing?" in findings.of_level("warning")[0].message


def _calls(arguments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"calls": [{"name": "f", "arguments": each}], "note": None} for each in arguments]


@pytest.mark.parametrize("name", ["a.parquet", "a.feather", "file.arrow", "stream.arrow", "a.parquet.gz", "named.json"])
def test_tables_keep_their_values_without_the_nulls_that_arrow_adds(tmp_path: Path, name: str) -> None:
    rows = _calls([{"song": "A0"}, {"town": "Oslo", "days": 2}])  # m7
    rows = [{**row, "time": datetime(2024, 5, 1, 12), "price": Decimal("12.50")} for row in rows]
    table = pa.Table.from_pylist(rows)
    table = table.append_column("map", pa.array([[("a", 1)]] * 2, pa.map_(pa.string(), pa.int64())))
    table = table.set_column(2, "time", table["time"].cast(pa.timestamp("ns")))
    path = tmp_path / name
    _write_table(table, path)
    assert _read(path) == [{**row, "map": {"a": 1}} for row in rows]


def _write_table(table: pa.Table, path: Path) -> None:
    if path.suffix == ".feather":
        feather.write_feather(table, path)
    elif path.suffix == ".arrow":
        new = pa.ipc.new_stream if path.stem == "stream" else pa.ipc.new_file
        with new(path, table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, path)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes(), mtime=0))


def _many(kind: str, count: int) -> str:
    row = {"prompt": "q" * 500, "completion": "a" * 500}
    line = json.dumps(row)
    if kind == "rows.csv":
        return "prompt,completion\n" + f'{row["prompt"]},"{row["completion"]}"\n' * count
    if kind == "one_line.json":
        return "[" + ", ".join([line] * count) + "]"
    if kind == "list.json":
        return "[\n" + ",\n".join([json.dumps(row, indent=1)] * count) + "\n]"
    if kind == "objects.json":
        return "\n".join([json.dumps(row, indent=1)] * count)
    return f"{line}\n" * count


@pytest.mark.parametrize("kind", ["rows.csv", "one_line.json", "list.json", "objects.json", "rows.jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    peaks = []
    for count in (8_000, 24_000):  # 8 and 24 MB
        path.write_text(_many(kind, count))
        tracemalloc.start()
        assert sum(1 for _ in read_rows(path, Findings())) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] < 9 << 20


def test_memory_does_not_grow_with_the_row_group_of_a_table(tmp_path: Path) -> None:
    rng = random.Random(0)
    peaks = []
    for count in (8_000, 24_000):
        texts = [rng.randbytes(500).hex() for _ in range(count)]
        pq.write_table(pa.table({"text": texts}), tmp_path / "rows.parquet", use_dictionary=False, compression=None)
        del texts
        tracemalloc.start()
        assert sum(1 for _ in read_rows(tmp_path / "rows.parquet", Findings())) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] < 9 << 20


def test_bad_rows_of_a_file_stop_its_preparation_unless_they_are_skipped(
    run: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(',prompt,completion\n0,a,b\n1,"c" d,e\n2,f\n3,g,h\n')
    with pytest.raises(InputError) as caught:
        run(path)
    assert str(caught.value).splitlines() == [
        f"{path}:3: not valid CSV: text after a closing quote",
        f"{path}:4: 2 cells, expected 3 (without a name, prompt, completion)",
    ]
    assert "bad_rows: skip" in str(caught.value.hint)
    assert len(run(path, bad_rows="skip").train) == 2
    assert f"{path}:4: left out: 2 cells, expected 3" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(5))
def test_where_the_file_is_cut_into_pieces_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    values = [
        'a "quoted" ü\n',
        "\\u00e9\\",
        "[{,}]",
        -12.5e-3,
        1234567,
        True,
        None,
        [[], {}],
        {"k": ["v", {"é": "😀"}]},
    ]
    rows = [{rng.choice("abc"): rng.choice(values), "z": rng.choice(values)} for _ in range(40)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=rng.choice([None, 1, 3]), ensure_ascii=rng.random() < 0.5))
    monkeypatch.setattr("lit_lora.data.read.json_files._HEAD", 3)
    monkeypatch.setattr("lit_lora.data.read.json_stream._CHUNK", rng.choice([1, 2, 7, 50]))
    assert _read(path) == rows
    path.write_text("\n".join(json.dumps(row, indent=1) for row in rows))
    assert _read(path) == rows
