"""The density report, on snippets counted by hand."""

from __future__ import annotations

import json
import subprocess

import pytest
from lit_lora.scripts import density

SNIPPET = '''"""A docstring # is no comment."""

from typing import Any  # noqa: F401

# A comment of its own line.
LIMIT: Any = 3
"""An attribute's docstring."""


def first(rows: list[Any], more: "dict[str, Any]") -> Any:
    """Docstring.

    Its blank line counts in the first share only.
    """
    low, high = 0, len(rows)  # trailing
    low, high = high, low

    return [row for row in rows if row and low and high]


class Thing:
    def method(self, value):
        text = """# no comment
        of two lines"""
        pair = (1, 2) if value else max(min(1, 2), abs(value))  # type: ignore[assignment]
        return text, pair
'''


def test_constructs_and_comments_of_a_snippet():
    source = density.measure("snippet.py", SNIPPET)
    assert source.comments == 2
    assert source.constructs == {
        "comprehensions": 1,
        "ternaries": 1,
        "tuple_assignments": 2,
        "boolean_operators": 2,
        "nested_calls": 2,
        "any_annotations": 4,
    }
    assert (source.lines, source.code_lines) == (26, 12)


def test_functions_of_a_snippet():
    first, method = density.measure("snippet.py", SNIPPET).functions
    assert (first.place, first.name, first.length, first.code_lines) == ("snippet.py:10", "first", 9, 4)
    assert (first.blank_lines, first.blank_code_lines) == (2, 1)
    assert first.density == (3 + 2 * 2 + 2) / 4
    assert (method.place, method.name, method.length, method.code_lines) == ("snippet.py:22", "Thing.method", 5, 5)
    assert method.density == (2 + 2) / 5


@pytest.mark.parametrize(
    ("code", "construct", "count"),
    [
        ("a.b().c()", "nested_calls", 0),
        ("f(g(x), key=h(y))", "nested_calls", 2),
        ("a, b = pair", "tuple_assignments", 0),
        ("both = 1, 2", "tuple_assignments", 0),
        ("(a, b) = (1, 2)", "tuple_assignments", 1),
        ("x = {1: 2 for _ in y}; z = {k for k in x}; any(k for k in z)", "comprehensions", 3),
        ("def f(a: Any, *b: int, c: dict[str, Any]) -> None: ...", "any_annotations", 2),
        ("x: Company = Any", "any_annotations", 0),
    ],
)
def test_what_counts_as_a_construct(code, construct, count):
    assert density.measure("x.py", code).constructs[construct] == count


def test_figures_are_per_thousand_lines_and_lengths_are_quantiles():
    source = density.measure("snippet.py", SNIPPET)
    figures = density.summarize([source, density.measure("empty.py", "")])
    assert figures.keys() == density.ROWS.keys()
    assert figures["comments"] == pytest.approx(2000 / 26)
    assert (figures["function_median"], figures["function_p95"], figures["function_max"]) == (7, 9, 9)
    assert (figures["file_median"], figures["file_p90"], figures["files"]) == (13, 26, 2)
    assert figures["blank_share"] == pytest.approx(2 / 14)
    assert figures["blank_share_of_code"] == pytest.approx(1 / 10)


def test_nothing_to_measure_is_all_zeros():
    assert set(density.summarize([]).values()) == {0}


def test_short_functions_are_not_ranked():
    source = density.measure("snippet.py", SNIPPET)
    assert [function.name for function in density.densest([source], 5)] == ["Thing.method"]


def test_a_revision_stands_beside_the_working_tree(tmp_path, monkeypatch, capsys):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text(SNIPPET)
    (package / "data.txt").write_text("no code")
    (tmp_path / "other.py").write_text("x = 1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    (package / "a.py").write_text(SNIPPET.replace("# A comment of its own line.\n", ""))
    monkeypatch.chdir(tmp_path)
    density.main(["package", "--rev", "HEAD", "--densest", "3", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["figures"]["HEAD"]["comments"] == pytest.approx(2000 / 26)
    assert report["figures"]["now"]["comments"] == pytest.approx(1000 / 25)
    assert report["densest"]["now"][0]["line"] == 21

    density.main(["package", "--rev", "HEAD", "--densest", "3"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["HEAD", "now", *density.ANCHORS]
    assert lines[0].split() == ["comments", "per", "1,000", "lines", "77", "40", "166", "58", "48"]
    assert lines[-1].split() == ["0.80", "5", "package/a.py:21", "Thing.method"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["missing"], "missing: no such file or folder"),
        ([".", "--rev", "unknown"], "unknown"),
        (["/", "--rev", "HEAD"], "/ is outside the repository"),
    ],
)
def test_a_wrong_argument_is_said_in_a_line(arguments, problem, tmp_path, monkeypatch, capsys):
    subprocess.run(["git", "init", str(tmp_path)], check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        density.main(arguments)
    assert problem in capsys.readouterr().err.splitlines()[-1]
