"""Every command on local files, with the network taken away: none asks for it."""

from __future__ import annotations

import io
import json
import socket
import sys
from pathlib import Path

import pytest

from lit_lora.cli import COMMANDS, main
from tests.classify import tiny as encoder
from tests.cli.answering import make_base

# In every child process too, and kept where a command swallows the error: one line a try.
BLOCKED = """\
import socket

def refuse(*arguments, **_):
    with open({tries!r}, "a") as file:
        file.write(repr(arguments) + "\\n")
    raise OSError("the network is taken away")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
"""

PATH = [
    "configs",
    "inspect base",
    "init rows.jsonl --model base",
    "estimate --config config.yaml",
    "prepare rows.jsonl --model base --validation 4 --show 1",
    "download base",
    "convert base --out halved --dtype fp16",
    "finetune --config config.yaml train.max_steps=2 train.epochs=null out=run",
    "finetune --config config.yaml train.max_steps=2 train.epochs=null out=other seed=1",
    "merge run",
    "combine run other --out both",
    "inspect-update run",
    "evaluate run run/merged --data rows.jsonl --limit 2 --shots 1 --examples rows.jsonl --max-new-tokens 4",
    "generate run hello --max-new-tokens 4",
    "chat run --max-new-tokens 4",
    "compare --config compare.yaml",
    "finetune --config encoder/config.yaml",
    "classify encoder/run fine",
    "quickstart --rows 1 model.path=base train.epochs=null train.max_steps=1 data.validation=1 data.limit=4",
]


def test_the_path_has_every_command() -> None:
    assert {line.split()[0] for line in PATH} == set(COMMANDS)


def test_pain_45_no_command_asks_for_the_network_with_local_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    make_base(tmp_path / "base", endless=True)
    rows = [{"prompt": f"is {n} odd?", "completion": "yes" if n % 2 else "no"} for n in range(24)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {"model": {"path": "base"}, "data": {"path": "rows.jsonl", "validation": 4}, "train": {"max_steps": 1}}
    comparison = {"base": run, "runs": [{"name": "lora", "lr": [1e-3]}], "out": "compared"}
    Path("compare.yaml").write_text(json.dumps(comparison))
    encoder.save_base("bert", tmp_path / "encoder" / "base")
    encoder.write_rows(tmp_path / "encoder" / "rows.jsonl", 24)
    encoder.write_config(tmp_path / "encoder", peft={"name": "lora", "rank": 4}, train={"max_steps": 1})

    tries = tmp_path / "tries"
    Path("blocked").mkdir()
    Path("blocked/sitecustomize.py").write_text(BLOCKED.format(tries=str(tries)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "blocked"))
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, getattr(socket.socket, name))
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, getattr(socket, name))
    exec(BLOCKED.format(tries=str(tries)))

    for line in PATH:
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/exit\n"))
        with pytest.raises(SystemExit) as done:
            main(line.split())
        assert not done.value.code, f"{line}: {capsys.readouterr().err}"
        assert not tries.exists(), f"{line}: asked for {tries.read_text()}"
