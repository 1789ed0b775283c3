from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_lora.checkpoint import open_tensors
from lit_lora.cli import main
from tests.checkpoint.makers import state_dict, write_hf_folder, write_tiny_gguf
from tests.tiny import tiny_tokenizer


def run(*arguments: object) -> int:
    """The exit code of ``lit-lora``."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny GGUF file in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_tiny_gguf(tmp_path / "tiny.Q8_0.gguf", tiny_tokenizer(tmp_path / "tokenizer"))
    return Path("tiny.Q8_0.gguf")


def test_convert_writes_a_checkpoint_and_says_the_next_command(gguf: Path, capsys: Any) -> None:
    assert run("convert", gguf) == 0
    out = capsys.readouterr().out
    assert "wrote checkpoints/tiny: " in out
    assert 'next: lit-lora generate checkpoints/tiny "' in out
    assert open_tensors(Path("checkpoints/tiny")).dtype("model.norm.weight") == torch.bfloat16


def test_convert_takes_out_and_dtype(gguf: Path) -> None:
    assert run("convert", gguf, "--out", "mine", "--dtype", "fp32") == 0
    assert json.loads(Path("mine/config.json").read_text())["torch_dtype"] == "float32"


def test_a_dry_run_reports_and_writes_nothing(gguf: Path, capsys: Any) -> None:
    before = sorted(Path().rglob("*"))
    assert run("convert", gguf, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "nothing was written" in out
    assert "GGUF" in out
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere.gguf"], 3, "nowhere.gguf: no such file or folder"),
        (["tiny.Q8_0.gguf", "--dtype", "int8"], 2, "--dtype int8: expected one of bf16, fp16, fp32"),
        (["tiny.Q8_0.gguf", "--out", "tokenizer"], 4, "tokenizer: already exists"),
        (["tokenizer"], 3, "tokenizer: no weights in it"),
        (["tiny.Q8_0.gguf", "--tokenizer", "."], 3, "no tokenizer.json in it"),
        (["cut.gguf"], 3, "cut.gguf: truncated"),
    ],
)
def test_accidents_are_one_line_with_their_exit_code(
    gguf: Path, capsys: Any, arguments: list[str], code: int, words: str
) -> None:
    Path("cut.gguf").write_bytes(gguf.read_bytes()[:-5000])
    before = sorted(Path().iterdir())
    assert run("convert", *arguments) == code
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert sorted(Path().iterdir()) == before


def test_pain_45_convert_opens_no_socket(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert run("convert", gguf, "--out", "first") == 0
    assert run("convert", "first", "--out", "second", "--dtype", "fp16") == 0
    assert run("download", "second") == 0
    assert run("download", gguf, "--convert", "--out", "third") == 0


def test_pain_48_convert_never_runs_what_a_pickle_asks_for(gguf: Path, capsys: Any) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (Path("fired"),)

    folder = write_hf_folder(Path("evil"), Path("tokenizer"))
    torch.save(state_dict() | {"bomb": Bomb()}, folder / "pytorch_model.bin")
    assert run("convert", "evil", "--out", "out") == 3
    assert "refused" in capsys.readouterr().err
    assert not Path("fired").exists()
    assert not Path("out").exists()
