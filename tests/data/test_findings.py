"""Findings count what is noticed in rows, and name all bad rows at once."""

from __future__ import annotations

import pytest

from lit_lora.data.findings import Findings
from lit_lora.errors import InputError
from tests.data.conftest import Prepare, WriteRows, question


def test_all_bad_rows_are_named_at_once_a_line_per_problem() -> None:
    findings = Findings()
    findings.bad_row("a.jsonl:2", "no answer", hint="write one")
    for line in range(3, 15):
        findings.bad_row(f"a.jsonl:{line}", "no prompt")
    with pytest.raises(InputError) as caught:
        findings.check()
    assert str(caught.value).splitlines() == [
        "a.jsonl:2: no answer",
        "a.jsonl:3, 4, 5, 6, 7, 8, 9, 10 and 4 more: no prompt",
    ]
    assert caught.value.hint == "write one; bad_rows: skip leaves out what cannot be read"


def test_the_first_twenty_problems_are_named_and_the_others_counted() -> None:
    findings = Findings()
    for line in range(23):
        findings.bad_row(f"a.jsonl:{line}", f"problem {line}")
    with pytest.raises(InputError) as caught:
        findings.check()
    assert len(str(caught.value).splitlines()) == 21
    assert str(caught.value).endswith("and 3 more bad rows")


def test_findings_survive_being_saved() -> None:
    findings = Findings("skip")
    findings.warn("with an empty answer", "a.jsonl:1")
    findings.note("with a name", "a.jsonl:2")
    findings.bad_row("a.jsonl:3", "no answer", hint="write one")
    findings.formats["alpaca"] = 2
    twice = Findings("skip")
    twice.add(findings.as_dict())
    twice.add(findings.as_dict())
    assert list(map(str, twice.of_level("warning"))) == ["2 rows with an empty answer: a.jsonl:1, 1"]
    assert (twice.bad_count, twice.formats, twice.format_names) == (2, {"alpaca": 4}, "alpaca")
    twice.check()


def test_bad_rows_are_left_out_if_the_user_says_so(
    run: Prepare, write_rows: WriteRows, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows([question(0), {"verdict": "yes"}, question(2)])
    with pytest.raises(InputError, match=r"rows.jsonl:2: the columns \(verdict\) fit no format"):
        run(path)
    capsys.readouterr()
    for _ in range(2):  # the second time from the cache
        assert len(run(path, bad_rows="skip").train) == 2
        assert "rows.jsonl:2: left out: the columns (verdict) fit no format" in capsys.readouterr().err


def test_rows_of_two_shapes_are_each_read_by_their_own_columns(run: Prepare, write_rows: WriteRows) -> None:
    path = write_rows([{"instruction": "Add", "response": "3"}, {"instruction": "a", "input": "b", "output": "c"}])
    assert len(run(path).train) == 2
