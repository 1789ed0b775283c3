"""The documents tell the truth: their commands run, their tables are those of the code, their links lead somewhere."""

from __future__ import annotations

import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main

from lit_lora.cli import COMMANDS, build_app, help_texts, main
from lit_lora.data.formats import FORMATS
from lit_lora.peft import METHODS
from lit_lora.recipe import RECIPES, load_recipe
from scripts.docs import pages
from tests.classify.tiny import save_base
from tests.cli.answering import make_base

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
BLOCK = re.compile(
    r"^(?:[^\n]*`(?P<file>[\w-]+\.\w+)`:\n\n)?(?:<!-- not run: (?P<why>[^\n]+) -->\n)?"
    r"```(?P<kind>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
MODEL = "checkpoints/SmolLM2-135M-Instruct"
RUN_ELSEWHERE = {"images.md": "tests/test_images.py"}


class Block(NamedTuple):
    """A fenced block: its kind, its text, why it is not run, and the file that the line before it names."""

    kind: str
    text: str
    why: str | None
    file: str | None


def blocks(page: Path) -> Iterator[Block]:
    """Every fenced block of a page, in order."""
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        yield Block(match["kind"], match["text"], match["why"], match["file"])


def page_id(page: Path) -> str:
    """A page by its path in the repository."""
    return page.relative_to(ROOT).as_posix()


def command_lines(text: str) -> list[str]:
    """The lines of a block of commands, without what follows a #."""
    return [line for line in (re.sub(r"\s+# .*", "", line).strip() for line in text.splitlines()) if line]


@pytest.fixture(scope="module")
def prototypes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models under the names of real ones: a chat model, its base without a chat template, an encoder."""
    folder = tmp_path_factory.mktemp("checkpoints")
    chat = make_base(folder / Path(MODEL).name, endless=True, hidden_size=64)  # a block of nf4 has 64 columns
    shutil.rmtree(folder / f"{chat.name}-tokenizer")
    base = folder / "SmolLM2-135M"
    shutil.copytree(chat, base)
    (base / "chat_template.jinja").unlink()
    save_base("bert", folder / "all-MiniLM-L6-v2")
    return folder


@pytest.fixture
def world(prototypes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the documents take for granted: models, rows, the files of the checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_LORA_CACHE", str(tmp_path / "cache"))
    Path("checkpoints").mkdir()
    for model in prototypes.iterdir():
        (Path("checkpoints") / model.name).symlink_to(model)
    for name in ("finetune", "scripts", "configs", "Makefile"):
        Path(name).symlink_to(ROOT / name)
    for name, count in {"my_data.jsonl": 40, "heldout.jsonl": 4}.items():
        rows = [{"prompt": f"Is order {n} from {name}?", "completion": "no" if n % 3 else "yes"} for n in range(count)]
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run one line of a document as a shell would, in this process: torch is imported once for all of them."""
    before, pipe, command = line.rpartition(" | ")
    words = shlex.split(command)
    given = " ".join(shlex.split(before)[1:]) + "\n" if pipe else ""
    assert not pipe or before.startswith("echo "), line
    monkeypatch.setattr(sys, "stdin", io.StringIO(given))
    if words[0] == "python":
        monkeypatch.setattr(sys, "argv", words[1:])
        runpy.run_path(words[1], run_name="__main__")
        return 0
    assert words[0] == "lit-lora", f"{line}: mark this block <!-- not run: why -->"
    with pytest.raises(SystemExit) as done:
        main(words[1:])
    return int(done.value.code or 0)


@pytest.mark.filterwarnings("ignore::FutureWarning:peft")
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_pain_47_every_command_of_a_page_runs(
    page: Path, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}  # of the page's Python, which is one program
    for kind, text, why, file in blocks(page):
        if kind == "yaml" and (name := re.match(r"# (\w+\.yaml)\n", text)):
            file = name[1]
        if file is not None and kind not in ("bash", "text"):
            Path(file).write_text(text, encoding="utf-8")
        elif kind == "python" and why is None and page.name not in RUN_ELSEWHERE:
            exec(compile(text, page.name, "exec"), namespace)
        for line in command_lines(text) if kind == "bash" and why is None else []:
            code = run(line, monkeypatch)
            assert code == 0, f"{page.name}: {line}: exit code {code}\n{capsys.readouterr().err}"


# What goes wrong, in an order in which each has what it needs; every line gives a message of docs/troubleshooting.md.
BROKEN_FILES = {
    "broken.jsonl": '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "b"\n',
    "empty.jsonl": "\n",
    "no_answers.jsonl": '{"prompt": "a", "completion": ""}\n' * 4,
    "repeated.jsonl": '{"prompt": "a", "completion": "b"}\n' * 8,
    "reviews.csv": "review,label\nA charming film,1\n",
    "tab.yaml": "model:\n\tpath: checkpoints\n",
}
PREPARE = f"lit-lora prepare --model {MODEL}"
FINETUNE = "lit-lora finetune --config lora data.validation=4"
BROKEN = [
    f"{FINETUNE} peft.rnk=8",
    "lit-lora finetune --config tab.yaml",
    "lit-lora finetune --config loar",
    f"{FINETUNE} train.epochs=1 train.max_steps=2",
    f"{FINETUNE} peft.name=prefix",
    f"{FINETUNE} peft.target_modules=[q_prj]",
    f"{FINETUNE} peft.rank=1000",
    "lit-lora finetune --config compare",
    f"{FINETUNE} model.path=checkpoints/nothing",
    f"{FINETUNE} model.device=cuda",
    f"{PREPARE}/../SmolLM2-135M my_data.jsonl",
    f"{FINETUNE} model.chat_template=chatlm",
    f"{FINETUNE} model.chat_template=llama-3",
    "lit-lora estimate --config lora data.validation=4 --memory 100MB",
    f"{PREPARE} my_dta.jsonl",
    f"{PREPARE} broken.jsonl",
    f"{PREPARE} reviews.csv",
    f"{PREPARE} reviews.csv --columns prompt=revew --columns completion=label",
    f"{PREPARE} my_data.jsonl --max-seq-length 8",
    f"{PREPARE} no_answers.jsonl",
    f"{PREPARE} empty.jsonl",
    f"{PREPARE} repeated.jsonl --validation 2",
    "lit-lora finetune --config lora data.validation=null --dry-run",
    f"{FINETUNE} train.max_steps=1 optimizer.lr=1e-9 out=out/mine",
    f"{FINETUNE} train.max_steps=1 optimizer.lr=1e-9 out=out/mine",
    f"{FINETUNE} train.max_steps=1 optimizer.lr=1e-9 out=out/mine peft.rank=4 --resume",
    f"{FINETUNE} train.max_steps=2 optimizer.lr=1e30 out=out/nan",
    "lit-lora chat out/mine/merged",
    "lit-lora merge out/mine --dtype bf16",
    "lit-lora merge out/mine --base checkpoints/other",
    "lit-lora evaluate checkpoints/other",
    "lit-lora evaluate out/mine --data heldout.jsonl --task acuracy",
]
BROKEN_RESULTS = {
    "lit-lora finetune --config prefix data.validation=4 train.max_steps=1 out=out/prefix": "lit-lora merge out/prefix",
    "lit-lora finetune --config full data.validation=4 train.max_steps=1 out=out/full": "lit-lora merge out/full",
}


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_commands(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `(.+?)` \|", page, flags=re.MULTILINE)
    assert len(messages) > 15
    patterns = {message: re.compile(".*".join(map(re.escape, message.split("…")))) for message in messages}
    for name, text in BROKEN_FILES.items():
        Path(name).write_text(text, encoding="utf-8")
    make_base(Path("checkpoints/other"), hidden_size=64)
    for before in BROKEN_RESULTS:
        assert run(before, monkeypatch) == 0
    capsys.readouterr()
    said: dict[str, str] = {}
    for line in (*BROKEN, *BROKEN_RESULTS.values()):
        run(line, monkeypatch)
        said[line] = said.get(line, "") + capsys.readouterr().err
    assert [m for m, pattern in patterns.items() if not any(map(pattern.search, said.values()))] == []
    assert [line for line, err in said.items() if not any(p.search(err) for p in patterns.values())] == []


def parse(line: str) -> None:
    """Check the words of a command line as the command itself would, without running it."""
    words = shlex.split(line[line.index("lit-lora ") :])
    command: Any = typer.main.get_command(build_app(words[1])).commands[words[1]]  # type: ignore[attr-defined]
    command.make_context(words[1], words[2:])


NOT_RUN = [
    line
    for page in PAGES
    for kind, text, why, _ in blocks(page)
    if (kind == "bash" and why) or page.name == "commands.md"
    for line in command_lines(text)
]


@pytest.mark.parametrize("line", NOT_RUN)
def test_pain_47_commands_that_are_not_run_exist_at_least(line: str) -> None:
    first, *rest = shlex.split(line)
    if "lit-lora " in line:
        parse(line)
    elif first == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert rest[0] in targets
    elif first == ".ci/run":
        assert (ROOT / first).stat().st_mode & 0o111
    else:
        assert line == "pip install -c constraints.txt ."
        assert (ROOT / "constraints.txt").is_file()


@pytest.mark.parametrize("line", ["lit-lora merge --onto x", "lit-lora prepare", "lit-lora chat a b"])
def test_a_command_that_does_not_exist_would_be_found(line: str) -> None:
    with pytest.raises(Exception, match=r"No such option|Missing|unexpected extra argument"):
        parse(line)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_of_itself(name: str) -> None:
    _, examples = help_texts(__import__(COMMANDS[name][0], fromlist=["command"]).command)
    assert examples
    assert all(f"lit-lora {name}" in example for example in examples)


@pytest.mark.parametrize(("page", "text"), pages().items(), ids=lambda value: getattr(value, "name", ""))
def test_a_reference_page_says_what_the_code_says(page: Path, text: str) -> None:
    assert page.read_text(encoding="utf-8") == text, "run: make docs"


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 260


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "data" / "README.md"], ids=lambda page: page.name
)
def test_links_within_the_project_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_index_of_the_documents_has_one_line_for_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- \[[^\]]+\]\(([\w-]+\.md)\): .", index, flags=re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md")


def first_cells(heading: str) -> list[str]:
    """The first column of the table after a heading or line of the README, without its backquotes."""
    table = README.partition(heading)[2].partition("\n|---")[2]
    rows = table.partition("\n\n")[0].splitlines()[1:]
    return [row.split("|")[1].strip().strip("`") for row in rows]


def test_the_tables_of_the_readme_are_those_of_the_code() -> None:
    assert sorted(first_cells("| format |")) == sorted(FORMATS)
    assert list(dict.fromkeys(first_cells("## Methods"))) == list(RECIPES)
    names = re.findall(r"^\| `\w+` \| `([\w-]+)` \|", README.partition("## Methods")[2], flags=re.MULTILINE)
    assert names == list(METHODS)


def test_the_example_config_of_the_readme_is_valid(tmp_path: Path) -> None:
    (text,) = [text for kind, text, *_ in blocks(ROOT / "README.md") if kind == "yaml"]
    path = tmp_path / "example.yaml"
    path.write_text(text)
    _, config = load_recipe(path, [])
    assert (config.recipe, config.train.epochs, str(config.out)) == ("lora", 2, "out/example")


def test_the_tree_of_the_readme_is_the_tree() -> None:
    (tree,) = [text for kind, text, *_ in blocks(ROOT / "README.md") if kind == "text" and "lit_lora/" in text]
    top = [line.split()[0] for line in tree.splitlines() if not line.startswith(" ")]
    inside = [line.split()[0] for line in tree.splitlines() if line.startswith("  ") and not line.startswith("   ")]
    assert [name for name in top if not (ROOT / name).exists()] == []
    assert [name for name in inside if not (ROOT / "lit_lora" / name).exists()] == []
    packages = {path.parent.name + "/" for path in (ROOT / "lit_lora").glob("*/__init__.py")}
    assert packages - set(inside) == set()
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    tracked = {name.partition("/")[0] for name in listed.splitlines() if not name.startswith(".")}
    documents = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"}
    assert {name for name in tracked - documents if name not in top and f"{name}/" not in top} == set()
