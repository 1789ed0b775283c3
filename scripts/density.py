"""Measure how dense the code is, beside projects that read well.

python scripts/density.py
python scripts/density.py lit_lora/peft --rev HEAD~20 --densest 10
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import math
import re
import statistics
import subprocess
import sys
import tarfile
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Function", "Source", "densest", "main", "measure", "read_revision", "read_tree", "summarize"]

DEFAULT_PATHS = ["lit_lora", "finetune", "scripts"]

ANCHORS = {
    "nanochat": {"comments": 166.0},
    "torchtitan": {"comments": 58.0},
    "httpx": {"comments": 48.0, "comprehensions": 6.0, "tuple_assignments": 0.5},
    "gpt-fast": {"ternaries": 3.0, "blank_share": 0.10},
}
"""Values of other projects, counted in 2026; values that were not counted are missing."""

ROWS = {
    "comments": ("comments per 1,000 lines", ".0f"),
    "comprehensions": ("comprehensions per 1,000 lines", ".1f"),
    "ternaries": ("ternaries per 1,000 lines", ".1f"),
    "tuple_assignments": ("tuple assignments per 1,000 lines", ".1f"),
    "any_annotations": ("Any in annotations per 1,000 lines", ".1f"),
    "blank_share": ("blank lines in functions", ".1%"),
    "blank_share_of_code": ("the same outside docstrings", ".1%"),
    "function_median": ("function length, median", ".0f"),
    "function_p95": ("function length, p95", ".0f"),
    "function_max": ("function length, longest", ".0f"),
    "file_median": ("file length, median", ".0f"),
    "file_p90": ("file length, p90", ".0f"),
    "file_max": ("file length, longest", ".0f"),
    "functions": ("functions", ",.0f"),
    "files": ("files", ",.0f"),
    "lines": ("lines", ",.0f"),
    "code_lines": ("lines of code", ",.0f"),
}
"""The rows of the table: their titles, and the format of their numbers."""

WEIGHTS = {"comprehensions": 3, "ternaries": 2, "tuple_assignments": 2, "boolean_operators": 1, "nested_calls": 1}
"""How much each construct adds to a function's density."""

SHORTEST_RANKED = 5
"""Lines of code from which a function is ranked: a property with one expression is dense, but easy to read."""

_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

# Comments for tools, which explain nothing to the reader.
_DIRECTIVE = re.compile(r"#\s*(noqa|type:|fmt:|isort:|ruff:|mypy:|pylint:|pragma:)|#!|#.*coding[:=]", re.IGNORECASE)

# Tokens that stand on lines without being code.
_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


@dataclass(frozen=True)
class Function:
    """One function or method; functions inside it are a part of it."""

    path: str
    line: int
    name: str
    """With the classes around it."""
    length: int
    """Lines from ``def`` to the end, docstring included."""
    code_lines: int
    blank_lines: int
    """Docstring included."""
    blank_code_lines: int
    """Outside the docstring."""
    density: float
    """Weighted constructs per line of code."""

    @property
    def place(self) -> str:
        """``file:line``."""
        return f"{self.path}:{self.line}"


@dataclass(frozen=True)
class Source:
    """The counts of one file."""

    path: str
    lines: int
    code_lines: int
    """Lines that are neither blank nor only a comment or docstring."""
    comments: int
    """Lines with a comment, alone or after code; directives such as ``noqa`` do not count."""
    constructs: Mapping[str, int]
    """Comprehensions, ternaries and so on; and ``any_annotations``."""
    functions: Sequence[Function]


def read_tree(paths: Iterable[str]) -> dict[str, str]:
    """The Python files below ``paths`` and their text; hidden folders are skipped.

    Raises:
        ValueError: A path does not exist.
    """
    sources = {}
    for path in paths:
        root = Path(path)
        if not root.exists():
            raise ValueError(f"{path}: no such file or folder")
        files = [root] if root.is_file() else sorted(root.rglob("*.py"))
        for file in files:
            hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
            if not hidden:
                sources[file.as_posix()] = file.read_text(encoding="utf-8")
    return sources


def read_revision(revision: str, paths: Iterable[str]) -> dict[str, str]:
    """The same files in a git revision, read without touching the working tree.

    Paths that the revision lacks are skipped.

    Raises:
        ValueError: git does not know the revision, or a path is not in its repository.
    """
    root = Path(_git("rev-parse", "--show-toplevel").decode().strip()).resolve()
    wanted = []
    for path in paths:
        if not Path(path).resolve().is_relative_to(root):
            raise ValueError(f"{path} is outside the repository {root}")
        wanted.append(Path(path).resolve().relative_to(root))
    # Run at the top: below it, git archive packs only the current folder.
    archive = _git("-C", str(root), "archive", "--format=tar", revision)
    sources = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
        for member in packed:
            file = Path(member.name)
            if file.suffix != ".py" or not any(file.is_relative_to(path) for path in wanted):
                continue
            content = packed.extractfile(member)
            if content is not None:
                sources[member.name] = content.read().decode("utf-8")
    return sources


def _git(*arguments: str) -> bytes:
    """The output of a git command.

    Raises:
        ValueError: git fails.
    """
    done = subprocess.run(["git", *arguments], capture_output=True)
    if done.returncode:
        raise ValueError(done.stderr.decode(errors="replace").strip())
    return done.stdout


def measure(path: str, text: str) -> Source:
    """Count one file."""
    tree = ast.parse(text, filename=path)
    docstrings = _docstring_lines(tree)
    comments = 0
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not _DIRECTIVE.match(token.string):
            comments += 1
        if token.type not in _NO_CODE:
            # A string over several lines is one token that covers all of them.
            code.update(range(token.start[0], token.end[0] + 1))
    code -= docstrings
    lines = text.splitlines()
    blank = {number for number, line in enumerate(lines, start=1) if not line.strip()}
    functions = []
    for name, node in _functions(tree):
        span = set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        code_lines = len(span & code)
        weight = sum(WEIGHTS.get(construct, 0) * count for construct, count in _constructs(node).items())
        functions.append(
            Function(
                path=path,
                line=node.lineno,
                name=name,
                length=len(span),
                code_lines=code_lines,
                blank_lines=len(span & blank),
                blank_code_lines=len((span & blank) - docstrings),
                density=weight / code_lines,
            )
        )
    return Source(path, len(lines), len(code), comments, _constructs(tree), functions)


def _docstring_lines(tree: ast.AST) -> set[int]:
    """Lines of docstrings, attributes' included: all strings that are statements of their own."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
            continue
        if isinstance(node.value.value, str):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def _functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Functions and methods with their qualified names, without those inside other functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        else:
            yield from _functions(child, prefix)


def _constructs(tree: ast.AST) -> dict[str, int]:
    """How often each construct occurs in a piece of code."""
    counts = {**dict.fromkeys(WEIGHTS, 0), "any_annotations": 0}
    for node in ast.walk(tree):
        if isinstance(node, _COMPREHENSIONS):
            counts["comprehensions"] += 1
        elif isinstance(node, ast.IfExp):
            counts["ternaries"] += 1
        elif isinstance(node, ast.BoolOp):
            # a and b and c is one node with two operators.
            counts["boolean_operators"] += len(node.values) - 1
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            counts["tuple_assignments"] += isinstance(node.targets[0], ast.Tuple)
        elif isinstance(node, ast.Call):
            # Calls in the arguments of a call; a chain such as a.b().c() reads from left to right.
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            counts["nested_calls"] += sum(isinstance(argument, ast.Call) for argument in arguments)
        for annotation in _annotations(node):
            # The text, so that quoted annotations count too.
            counts["any_annotations"] += len(re.findall(r"\bAny\b", ast.unparse(annotation)))
    return counts


def _annotations(node: ast.AST) -> Iterator[ast.expr]:
    """The annotation that a node carries itself, if it has one."""
    annotation = None
    if isinstance(node, (ast.arg, ast.AnnAssign)):
        annotation = node.annotation
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        annotation = node.returns
    if annotation is not None:
        yield annotation


def summarize(sources: Sequence[Source]) -> dict[str, float]:
    """One number for each of ``ROWS``."""
    functions = [function for source in sources for function in source.functions]
    lengths = [function.length for function in functions]
    files = [source.lines for source in sources]
    # All lines, as for the anchors: blank lines, comments and docstrings are part of how code reads.
    thousands = sum(files) / 1000 or 1.0
    blank = sum(function.blank_lines for function in functions)
    blank_code = sum(function.blank_code_lines for function in functions)
    code = sum(function.code_lines for function in functions)
    per_thousand = {"comments": sum(source.comments for source in sources) / thousands}
    for name in ("comprehensions", "ternaries", "tuple_assignments", "any_annotations"):
        per_thousand[name] = sum(source.constructs[name] for source in sources) / thousands
    return {
        **per_thousand,
        "blank_share": blank / (sum(lengths) or 1),
        "blank_share_of_code": blank_code / (code + blank_code or 1),
        "function_median": _quantile(lengths, 0.5),
        "function_p95": _quantile(lengths, 0.95),
        "function_max": max(lengths, default=0),
        "file_median": _quantile(files, 0.5),
        "file_p90": _quantile(files, 0.9),
        "file_max": max(files, default=0),
        "functions": len(functions),
        "files": len(sources),
        "lines": sum(files),
        "code_lines": sum(source.code_lines for source in sources),
    }


def _quantile(numbers: Sequence[int], share: float) -> float:
    """The smallest number that at least this share of them does not exceed; the median for a half."""
    if not numbers:
        return 0.0
    if share == 0.5:
        return statistics.median(numbers)
    return sorted(numbers)[math.ceil(share * len(numbers)) - 1]


def densest(sources: Sequence[Source], count: int) -> list[Function]:
    """The functions with the most constructs per line, densest first."""
    ranked = []
    for source in sources:
        for function in source.functions:
            if function.code_lines >= SHORTEST_RANKED:
                ranked.append(function)
    ranked.sort(key=lambda function: (-function.density, function.path, function.line))
    return ranked[:count]


def table(measured: Mapping[str, Mapping[str, float]]) -> str:
    """The measurements side by side, one column per tree, and the anchors on the right."""
    columns = {**measured, **ANCHORS}
    lines = [f"{'':36}" + "".join(f"{title:>14}" for title in columns)]
    for key, (label, style) in ROWS.items():
        cells = ""
        for values in columns.values():
            cell = format(values[key], style) if key in values else ""
            cells += f"{cell:>14}"
        lines.append(f"{label:36}{cells}".rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("paths", nargs="*", default=DEFAULT_PATHS, help=f"files or folders ({' '.join(DEFAULT_PATHS)})")
    parser.add_argument("--rev", metavar="REV", help="a git revision to show beside the working tree")
    parser.add_argument("--densest", type=int, default=0, metavar="N", help="list the N densest functions")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args(arguments)
    trees = {}
    try:
        if args.rev:
            trees[args.rev] = read_revision(args.rev, args.paths)
        trees["now"] = read_tree(args.paths)
    except ValueError as error:
        parser.error(str(error))
    measured = {}
    for title, files in trees.items():
        measured[title] = [measure(path, text) for path, text in files.items()]
    summaries = {title: summarize(sources) for title, sources in measured.items()}
    ranked = {title: densest(sources, args.densest) for title, sources in measured.items()}
    if args.json:
        functions = {title: [asdict(function) for function in selected] for title, selected in ranked.items()}
        print(json.dumps({"figures": summaries, "anchors": ANCHORS, "densest": functions}, indent=1))
        return
    print(table(summaries))
    if args.densest:
        print(f"\n{'density':>7}  {'lines':>5}  function")
    for function in ranked["now"]:
        print(f"{function.density:7.2f}  {function.code_lines:5}  {function.place} {function.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
