from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.answering import Terminal, make_base, make_run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", base)


@pytest.fixture
def type_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.chdir(tmp_path)
    return Terminal(monkeypatch, capsys)


def saved(name: str) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = json.loads(Path(name).read_text(encoding="utf-8"))["messages"]
    return messages


def test_in_a_pipe_only_answers_reach_stdout(type_in: Terminal, base: Path) -> None:
    code, out, err = type_in("chat", base, stdin="hello\r\n\nand you? 😀\n/save chat.jsonl")
    assert code == 0
    answers = [message["content"] for message in saved("chat.jsonl") if message["role"] == "assistant"]
    assert len(answers) == 2
    assert out == "".join(answer + "\n" for answer in answers)
    assert "you>" not in out + err
    assert "\x1b" not in out + err


def test_pain_03_chat_answers_what_generate_answers(type_in: Terminal, base: Path, run: Path) -> None:
    for model in (base, run):
        assert type_in("chat", model, stdin="hello\n")[1] == type_in("generate", model, "hello")[1]


def test_pain_54_the_second_answer_is_that_of_the_whole_history_rendered_once(type_in: Terminal, base: Path) -> None:
    _, out, _ = type_in("chat", base, "--system", "Be kind.", stdin="hello\nand?\n/save chat.jsonl\n")
    history = saved("chat.jsonl")
    assert [message["role"] for message in history] == ["system", "user", "assistant", "user", "assistant"]
    Path("row.jsonl").write_text(json.dumps({"messages": history[:-1]}))
    row = json.loads(type_in("generate", base, "--file", "row.jsonl")[1])
    assert out.endswith(row["answer"] + "\n")


def test_the_commands_do_what_help_says(type_in: Terminal, base: Path, run: Path) -> None:
    lines = [
        "hello",
        "more",
        "/undo",
        "/save one.jsonl",
        "/system Be brief.",
        "hello",
        "/save two.jsonl",
        "//no command",
    ]
    lines += ["/reset", "/save three.jsonl", "/system", "/save four.jsonl", "/save four.jsonl", "/exit", "never said"]
    code, _, err = type_in("chat", base, stdin="\n".join(lines))
    assert (code, err) == (0, "") or "cut off" in err
    assert [message["content"] for message in saved("one.jsonl")][::2] == ["hello"]
    assert saved("two.jsonl")[0] == {"role": "system", "content": "Be brief."}
    assert saved("three.jsonl") == [{"role": "system", "content": "Be brief."}]
    assert saved("four.jsonl") == []


def test_a_message_that_begins_with_two_slashes_is_said_with_one(type_in: Terminal, base: Path) -> None:
    type_in("chat", base, stdin="//etc is what?\n/save chat.jsonl\n")
    assert saved("chat.jsonl")[0]["content"] == "/etc is what?"


def test_an_adapter_is_put_on_and_taken_off_while_talking(type_in: Terminal, base: Path, run: Path) -> None:
    def answers(model: Path, *before: str) -> str:
        return type_in("chat", model, stdin="\n".join([*before, "hello"]))[1]

    assert answers(base, f"/adapter {run}") == answers(run) != answers(base) == answers(run, "/adapter off")


@pytest.mark.parametrize(
    ("line", "code", "problem"),
    [
        ("/rest", 2, "unknown command /rest (did you mean 'reset'?)"),
        ("/save", 2, "/save needs a FILE"),
        ("/save there", 4, "there: already exists"),
        ("/save there/talk.json", 4, "part of this path is a file, expected a folder"),
        ("/adapter", 2, "/adapter needs a folder, or off"),
        ("/adapter nowhere", 3, "nowhere: no such folder"),
        ("word " * 300, 3, "the conversation has"),
    ],
)
def test_mistakes_are_one_clear_line(type_in: Terminal, base: Path, line: str, code: int, problem: str) -> None:
    Path("there").write_text("precious")
    found, out, err = type_in("chat", base, stdin=line)
    assert (found, out) == (code, "")
    assert problem in next(line for line in err.splitlines() if line.startswith("error: "))
    assert Path("there").read_text() == "precious"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_in_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_the_session(tmp_path: Path) -> None:
    endless = make_base(tmp_path / "endless", endless=True)
    terminal, inside = os.openpty()
    command = [sys.executable, "-c", "from lit_lora.cli import main; main()", "chat", str(endless), "--dtype", "fp32"]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "90000"],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        cwd=tmp_path,
        env={**os.environ, "TERM": "dumb"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a script's background job ignores it
    )
    os.close(inside)
    shown, seen = "", 0

    def wait_for(text: str) -> None:
        nonlocal shown, seen
        end = time.monotonic() + 60
        while text not in shown[seen:]:
            assert time.monotonic() < end, f"no {text!r} in {shown!r}"
            if select.select([terminal], [], [], 0.1)[0]:
                shown += os.read(terminal, 4096).decode(errors="replace")
        seen = shown.index(text, seen) + len(text)

    try:
        wait_for("you>")
        os.write(terminal, b"hello\n")
        wait_for("hello\r\n")
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        wait_for("stopped")
        wait_for("you>")
        os.write(terminal, b"/rest\n")
        wait_for("did you mean 'reset'?")
        wait_for("you>")
        os.write(terminal, b"/save chat.jsonl\n")
        wait_for("wrote chat.jsonl")
        wait_for("you>")
        os.write(terminal, b"\x04")
        wait_for("next")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    messages = json.loads((tmp_path / "chat.jsonl").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
