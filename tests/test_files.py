"""Folders that are replaced: the old one or the new one, whole, whatever fails or kills the process in between."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_lora import files
from lit_lora.errors import DiskError

# Replaces a folder in one child after another, each killed one system call later than the one before, until one lives.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from lit_lora import files

root, exchange = Path(sys.argv[1]), sys.argv[2] == "exchange"
if not exchange:
    files._exchange = lambda one, other: False

def write(target, text):
    with files.atomic_folder(target, replace=True) as folder:
        for name in ("a", "b"):
            (folder / name).write_text(text)

def whole(target):
    return {(target / name).read_text() for name in ("a", "b")} in ({"old"}, {"new"})

def die_at(number):
    calls = []
    def hooked(call):
        def wrapper(*args, **kwargs):
            for run in (lambda: None, lambda: call(*args, **kwargs)):  # before the call, and after it
                result = run()
                calls.append(1)
                if len(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            return result
        return wrapper
    for name in ("rename", "fsync", "unlink", "rmdir"):
        setattr(os, name, hooked(getattr(os, name)))
    files._exchange = hooked(files._exchange)

missing = number = 0
while True:
    number += 1
    target = root / str(number) / "adapter"
    write(target, "old")
    child = os.fork()
    if not child:
        die_at(number)
        write(target, "new")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    missing += not target.exists()
    try:
        with files.atomic_folder(target, replace=True):
            raise KeyError
    except KeyError:
        pass
    assert whole(target), number
    write(target, "new")
    assert whole(target), number
    assert [path.name for path in target.parent.iterdir()] == ["adapter"], number
print(number, missing)
"""


@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_a_process_killed_at_any_moment_of_a_replacement_leaves_a_whole_folder(tmp_path: Path, way: str) -> None:
    if way == "exchange" and not exchanges(tmp_path):
        pytest.skip("this system or disk cannot exchange two folders")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), way], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    moments, missing = map(int, done.stdout.split())
    assert moments > 15
    assert (missing == 0) == (way == "exchange")  # between the two renames the next write puts it back


def exchanges(folder: Path) -> bool:
    (folder / "one").mkdir()
    (folder / "other").mkdir()
    return files._exchange(folder / "one", folder / "other")


def write(target: Path, text: str) -> None:
    with files.atomic_folder(target, replace=True) as folder:
        (folder / "a").write_text(text)


def fail(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """No exchange, and the rename of this number fails."""
    calls: list[object] = []
    rename = os.rename

    def failing(*args: object, **kwargs: object) -> None:
        calls.append(args)
        if len(calls) == number:
            raise OSError(5, "Input/output error")
        rename(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", failing)


@pytest.mark.parametrize("number", [1, 2])
def test_a_rename_that_fails_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    write(tmp_path / "adapter", "old")
    fail(monkeypatch, number)
    with pytest.raises(DiskError, match="existing files are unchanged"):
        write(tmp_path / "adapter", "new")
    assert (tmp_path / "adapter" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_was_moved_aside_counts_as_there(tmp_path: Path) -> None:
    write(tmp_path / ".old-adapter", "old")
    with pytest.raises(DiskError, match="already exists"), files.atomic_folder(tmp_path / "adapter"):
        pass
    assert (tmp_path / "adapter" / "a").read_text() == "old"


def test_a_neighbour_with_a_longer_name_is_not_taken_for_it(tmp_path: Path) -> None:
    write(tmp_path / ".old-adapter-2", "old")
    write(tmp_path / "adapter", "new")
    assert (tmp_path / ".old-adapter-2" / "a").read_text() == "old"


def test_a_folder_that_cannot_be_removed_whole_has_lost_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "adapter", "old")
    monkeypatch.setattr(files.shutil, "rmtree", lambda *_, **__: None)
    files.remove_folder(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_replaced_folder_is_removed_where_the_new_one_came(tmp_path: Path) -> None:
    write(tmp_path / ".old-adapter", "old")
    write(tmp_path / "adapter", "new")
    files.restore_replaced(tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (tmp_path / "adapter" / "a").read_text() == "new"
