"""What is printed: to which stream, in a pipe and in a terminal."""

from __future__ import annotations

import contextlib
import os
import re
import struct
import sys

import pytest

from lit_lora import log

fcntl = pytest.importorskip("fcntl")
termios = pytest.importorskip("termios")


def in_terminal(monkeypatch: pytest.MonkeyPatch, work) -> str:
    """What ``work`` writes to stderr where that is a terminal of 24 lines of 80 columns."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(theirs, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        work()
    written = b""
    with contextlib.suppress(OSError):  # how a terminal ends that nobody writes to any more
        while piece := os.read(ours, 1 << 16):  # which may come in parts
            written += piece
    os.close(ours)
    return written.decode()


def screen(written: str) -> list[str]:
    """The lines as a terminal shows them: a carriage return starts the line over."""
    lines = []
    for line in written.replace("\r\n", "\n").split("\n"):
        shown = ""
        for piece in line.split("\r"):
            shown = piece + shown[len(piece) :]
        lines.append(shown.rstrip())
    return lines


def test_notes_stand_on_lines_of_their_own_above_the_progress_bar(monkeypatch):
    def work() -> None:
        monkeypatch.setenv("NO_COLOR", "1")
        with log.progress(total=3, what="training", unit="step") as bar:
            bar.update()
            log.note("step 1 of 3: validation loss 1.2")
            bar.update()
            bar.refresh()
            log.warn("something")

    lines = [re.sub(r"\x1b\[[0-9;]*[mA-K]", "", line) for line in screen(in_terminal(monkeypatch, work))]
    assert "step 1 of 3: validation loss 1.2" in lines
    assert "warning: something" in lines


def test_a_progress_bar_is_silent_in_a_pipe(capsys):
    assert list(log.progress([1, 2, 3], what="reading")) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")


def test_results_go_to_stdout_and_notes_to_stderr(capsys):
    log.say("a result [bold]not markup[/bold]")
    log.table("Title", ["a", "b"], [[1, "x y"], [2, None]])
    log.note("a note")
    log.warn("a warning")
    captured = capsys.readouterr()
    assert captured.out == "a result [bold]not markup[/bold]\n# Title\na\tb\n1\tx y\n2\tNone\n"
    assert captured.err == "a note\nwarning: a warning\n"
