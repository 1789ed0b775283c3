"""Python code that a checkpoint brings along is never run, whatever stdin would answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.classify.tiny import save_base, write_config, write_rows

MODULE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast
class Evil(BertConfig): pass
class EvilModel(BertModel): pass
class EvilTokenizer(PreTrainedTokenizerFast): pass
def generate(model, *args, **kwargs): return args
"""
MODELS = ("AutoModel", "AutoModelForSequenceClassification", "AutoModelForSeq2SeqLM")
AUTO_MAP = {"AutoConfig": "evil.Evil", **dict.fromkeys(MODELS, "evil.EvilModel")}
NEVER = "needs Python code from the checkpoint (auto_map), which lit-lora never runs"


def change(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def make(folder: Path, family: str, **config: Any) -> Path:
    """A task whose base asks for its own code wherever it can."""
    base = save_base(family, folder / "base")
    change(base / "config.json", auto_map=AUTO_MAP, **config)
    change(
        base / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "evil.EvilTokenizer"]},
        tokenizer_class="EvilTokenizer",
    )
    code = MODULE.format(marker=str(folder / "marker"))
    (base / "evil.py").write_text(code)
    (base / "custom_generate").mkdir()
    (base / "custom_generate" / "generate.py").write_text(code)
    write_rows(folder / "rows.jsonl", 24)
    labels = {"values": {"label": {"0": "negative", "1": "positive"}}}
    return write_config(folder, data=labels, train={"max_steps": 1, "eval_every": 1}, peft={"name": "lora", "rank": 2})


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command with a pipe on stdin that says yes to everything; none of the checkpoint's code may have run."""
    done = subprocess.run(
        [sys.executable, "-m", "lit_lora", *map(str, arguments)],
        input="y\n" * 9,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "LIT_LORA_CACHE": str(folder / "cache"),
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        check=False,
    )
    assert not (folder / "marker").exists()
    assert "custom code" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_built_in_type_is_used_without_a_question(tmp_path: Path, family: str) -> None:
    done = run(tmp_path, "finetune", "--config", make(tmp_path, family))
    assert done.returncode == 0, done.stderr
    assert "auto_map" not in done.stdout + done.stderr


def test_a_type_that_needs_the_code_is_refused_in_one_line(tmp_path: Path) -> None:
    config = make(tmp_path, "bert", model_type="evil")
    done = run(tmp_path, "finetune", "--config", config)
    assert (done.returncode, errors(done)) == (3, [f"error: {tmp_path / 'base'}: model_type 'evil' {NEVER}"])
    assert not (tmp_path / "run").exists()


def test_download_refuses_it_too(tmp_path: Path) -> None:
    make(tmp_path, "bert", model_type="evil")
    done = run(tmp_path, "download", tmp_path / "base")
    assert done.returncode == 3
    assert len(errors(done)) == 1
    assert (
        "model_type 'evil' exists only as Python code in the checkpoint (auto_map), which lit-lora never runs"
        in (errors(done)[0])
    )
    assert "hint: " in done.stderr


def test_a_tokenizer_that_needs_the_code_is_refused_in_one_line(tmp_path: Path) -> None:
    config = make(tmp_path, "t5", model_type="longt5")  # which has no tokenizer of its own
    done = run(tmp_path, "finetune", "--config", config)
    assert (done.returncode, errors(done)) == (3, [f"error: {tmp_path / 'base'}: its tokenizer {NEVER}"])


def test_code_of_a_part_of_a_model_is_not_run_either(tmp_path: Path) -> None:
    config = make(tmp_path, "t5")
    base = tmp_path / "base"
    decoder = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2).to_dict()
    parts = {
        "encoder": {"model_type": "align_text_model", "name_or_path": str(base), "auto_map": AUTO_MAP},
        "decoder": {**decoder, "auto_map": AUTO_MAP},
    }
    ids = {"is_encoder_decoder": True, "pad_token_id": 0, "decoder_start_token_id": 0}
    (base / "config.json").write_text(json.dumps({"model_type": "encoder-decoder", **ids, **parts}))
    change(base / "tokenizer_config.json", auto_map={}, tokenizer_class="PreTrainedTokenizerFast")
    done = run(tmp_path, "finetune", "--config", config)
    assert done.returncode == 3
    (line,) = errors(done)
    assert "its weights cannot be read: Unrecognized configuration class" in line  # AutoModel was asked for the part
