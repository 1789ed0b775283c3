"""Runs on a GPU as a user makes them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_lora.checkpoint import load_model
from lit_lora.cli import main
from lit_lora.data.batches import Batches
from lit_lora.generate import Sampling, generate
from lit_lora.model import CausalLM
from lit_lora.model.kv_cache import KVCache
from lit_lora.train.cuda_graphs import GraphRunner
from lit_lora.train.objectives.next_token import NextToken
from tests.finetune.tiny_task import make_base, write_config, write_rows
from tests.train.tiny_run import adapted, losses, make_rows, same, stored, train, with_beginning

pytestmark = pytest.mark.gpu

Call = Callable[..., str]
FULL = {"recipe": "full", "optimizer": {"lr": 1e-3}}
NF4 = {"recipe": "qlora", "quantize": {"name": "nf4", "block_size": 32}}


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base model, rows and a config that names the GPU."""
    monkeypatch.setenv("LIT_LORA_CACHE", str(tmp_path / "cache"))
    make_base(tmp_path / "base", intermediate_size=64)
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command that works: what it prints."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main([*map(str, arguments)])
        captured = capsys.readouterr()
        assert not done.value.code, captured.err
        return captured.out

    return run


def wide_model(dtype: torch.dtype = torch.bfloat16, **settings: object) -> CausalLM:
    """With heads that the attention kernel takes, and a LoRA with dropout."""
    return adapted(dtype, std=0.1, wide=4, **{"dropout": 0.1, **settings}).cuda()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("sections", [{}, NF4, FULL], ids=["lora", "qlora", "full"])
def test_finetune_merge_and_generate(task: Path, call: Call, sections: dict, dtype: str) -> None:
    config = write_config(task, **{**sections, "model": {"path": str(task / "base"), "dtype": dtype, "device": "cuda"}})
    out = call("finetune", "--config", config, "train.max_steps=20")
    assert "cuda" in out
    assert losses(task / "run")[-1] < losses(task / "run")[0]
    if sections.get("recipe") != "full":
        call("merge", task / "run", "--out", task / "merged")
        merged = load_model(task / "merged", device="cuda")
        assert all(parameter.isfinite().all() for parameter in merged.parameters())
    call("generate", task / "run", "colour 1?", "--device", "cuda", "--dtype", dtype, "--max-new-tokens", 4)


@pytest.mark.parametrize("graph_safe", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_resumes_bit_for_bit(tmp_path: Path, checkpointing: str, graph_safe: bool) -> None:
    settings = {"save_every": 4, "keep_last": 9}
    rows = make_rows(24)

    def run(folder: str, steps: int, **more: object) -> None:
        model = wide_model()
        model.checkpoint_activations(checkpointing)
        train(model, tmp_path / folder, rows=rows, schedule={"name": "constant", "warmup": 0}, max_steps=steps,
              objective=NextToken(graph_safe=graph_safe), micro_batch_tokens=40, **settings, **more)  # fmt: skip

    run("whole", 8)
    run("parts", 4)
    run("parts", 8, resume=True)
    assert same(stored(tmp_path / "whole", 8), stored(tmp_path / "parts", 8))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_checkpointing_changes_no_bit(tmp_path: Path) -> None:
    for what in ("none", "selective", "full"):
        model = wide_model(dropout=0.0)
        model.checkpoint_activations(what)
        train(model, tmp_path / what, rows=make_rows(24), max_steps=4)
    whole = stored(tmp_path / "none", 4)
    assert all(same(whole, stored(tmp_path / what, 4)) for what in ("selective", "full"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_with_a_cache_the_same_logits_as_without(dtype: torch.dtype) -> None:
    model = wide_model(dtype).eval()
    ids = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(0)).cuda()
    cache = KVCache(2, 40, device="cuda")
    with torch.no_grad():
        whole = model(ids).float()
        parts = [model(ids[:, :25], cache=cache), *(model(ids[:, n : n + 1], cache=cache) for n in range(25, 40))]
    tolerance = 1e-4 if dtype == torch.float32 else 0.05 * float(whole.abs().max())
    torch.testing.assert_close(torch.cat(parts, 1).float(), whole, atol=tolerance, rtol=0)


def test_answers_are_those_of_the_cpu() -> None:
    model = wide_model(torch.float32).eval()
    prompts = [[3, 9, 4], [5], [8, 8, 1, 60, 2]]
    there = list(generate(model, prompts, Sampling(max_new_tokens=12)))
    assert there == list(generate(model.cpu(), prompts, Sampling(max_new_tokens=12)))


def train_recorded(folder: Path, model: CausalLM, *, graph_safe: bool = True, **settings: object) -> list[float]:
    objective = NextToken(graph_safe=graph_safe)
    train(model, folder, rows=make_rows(24), objective=objective, max_steps=8, micro_batch_tokens=40, **settings)
    return losses(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_recorded_kernels_compute_what_launched_ones_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    recorded = []
    record = GraphRunner._record
    monkeypatch.setattr(GraphRunner, "_record", lambda *given: recorded.append(1) or record(*given))
    plain = train_recorded(tmp_path / "plain", wide_model(dtype, dropout=0.0), graph_safe=False)
    assert recorded == []
    assert train_recorded(tmp_path / "recorded", wide_model(dtype, dropout=0.0)) == plain
    assert 0 < len(recorded) < 8
    assert same(stored(tmp_path / "plain", 8), stored(tmp_path / "recorded", 8))


def test_what_begins_all_rows_is_recorded_too(tmp_path: Path) -> None:
    rows = with_beginning(make_rows(24), [7, 8, 9])
    assert rows.shared_prefix == 3
    found = []
    for graph_safe in (False, True):
        batches = Batches(rows, batch_size=8, micro_batch_tokens=60, seed=0, shared_prefix=3)
        model = wide_model(dropout=0.0)
        train(
            model, tmp_path / str(graph_safe), batches=batches, objective=NextToken(graph_safe=graph_safe), max_steps=6
        )
        found.append(losses(tmp_path / str(graph_safe)))
    assert found[0] == found[1]


WAITING = """
import sys
from pathlib import Path
from tests.gpu.test_runs import train_recorded, wide_model

model = wide_model(dropout=0.0)
model.model.layers[1].register_forward_hook(lambda module, given, out: float(out[0].detach().sum()) and None)
print(train_recorded(Path(sys.argv[1]), model))
"""


def test_a_model_that_waits_for_the_gpu_is_not_recorded(tmp_path: Path) -> None:
    plain = train_recorded(tmp_path / "plain", wide_model(dropout=0.0), graph_safe=False)
    # In a process of its own: PyTorch's random numbers on the GPU do not recover from a recording that failed.
    command = [sys.executable, "-c", WAITING, str(tmp_path / "tried")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == plain
    assert "CUDA graphs cannot be used here" in done.stderr
