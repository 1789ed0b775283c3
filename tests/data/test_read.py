"""Files are read row by row, whatever editor or program wrote them; a broken row is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_lora.data.findings import Findings
from lit_lora.data.read import read_rows
from lit_lora.errors import InputError

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
        ("r.csv", b"a,b\n1\n", r"r\.csv:2: 1 cells, expected 2"),
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
