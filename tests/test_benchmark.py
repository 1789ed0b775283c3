"""The benchmark against peers: the rows it gives out, the table it draws, and our own runner end to end."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch
from lit_lora.scripts import benchmark, benchmark_rows
from safetensors.torch import save_file

from lit_lora.errors import UsageError
from lit_lora.model import CausalLM, ModelConfig
from lit_lora.tokenizer import Tokenizer
from tests.tiny import tiny_tokenizer


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl.gz"
    samples = [{"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(20)]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(sample) for sample in samples))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tiny_tokenizer(tmp_path / "tiny")
    config = ModelConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        eos_token_id=2,
    )
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    torch.manual_seed(0)
    tensors = {name: parameter.detach().mul(0.1).bfloat16() for name, parameter in CausalLM(config).named_parameters()}
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}, folder / "model.safetensors"
    )
    return folder


def run(contender: str, tokens: list[int], seconds: list[float], variant: str = "v") -> benchmark.Result:
    return benchmark.Result(
        contender, variant, 2_000_000, 1_000_000, [1.0] * len(tokens), seconds, seconds, tokens, 0.0
    )


def test_rows_learn_the_answer_and_the_end_token(data: Path, model: Path, tmp_path: Path) -> None:
    benchmark_rows.write_rows(data, model, batch=4, steps=3, seed=0, target=tmp_path / "rows.json", validation=5)
    rows = json.loads((tmp_path / "rows.json").read_text())
    steps = rows["steps"]
    assert len(rows["validation"]) == 5
    assert not any(row in step for row in rows["validation"] for step in steps)
    tokenizer = Tokenizer.load(model)
    assert [len(step) for step in steps] == [4, 4, 4]
    for row in steps[0]:
        learned = row["ids"][row["prompt"] :]
        assert "####" in tokenizer.decode(learned)
        assert learned[-1] == tokenizer.end_of_turn_id
        assert "What is" in tokenizer.decode(row["ids"][: row["prompt"]])


def test_speed_is_the_median_over_runs_against_the_fastest_peer() -> None:
    peer = [run("peft", [100], [seconds]) for seconds in (1.0, 2.0, 4.0)]
    rows = benchmark.summarize([*peer, run("ours", [100], [0.5]), run("limit", [100], [0.25])])
    assert [row[0] for row in rows] == ["PEFT + transformers", "lit-lora", "the machine's limit"]
    assert rows[0][2:6] == ["50", "25–100", "1.00", "12%"]
    assert rows[1][2:6] == ["200", "200–200", "4.00", "50%"]


def test_on_a_gpu_its_memory_counts_and_not_the_process() -> None:
    result = run("ours", [100], [1.0])
    assert result.peaks == (2_000_000, 1_000_000)
    result.extra = {"gpu_reserved_bytes": 9_000_000_000, "gpu_allocated_bytes": 7_000_000_000}
    assert benchmark.summarize([result])[0][-2:] == ["9.0 GB", "7.0 GB"]
    assert benchmark.columns("cuda")[-2:] == ("peak reserved", "peak allocated")


def test_of_several_variants_given_each_is_known() -> None:
    given = ["--shape", "x", "--variant", "peft=bf16/8", "--variant", "peft=bf16, autocast/32"]
    assert benchmark.parse(given).variant == {"peft": ["bf16/8", "bf16, autocast/32"]}
    with pytest.raises(UsageError, match="no variant 'bf16/9'"):
        benchmark.parse([*given, "--variant", "peft=bf16/9"])


def test_warm_up_steps_are_not_timed() -> None:
    result = run("ours", [100, 100, 100], [9.0, 1.0, 1.0])
    result.warmup = 1
    assert result.tokens_per_second == 100.0


def test_losses_are_shown_only_of_runs_on_the_same_steps() -> None:
    grouped = run("peft", [30, 10], [1.0, 1.0], "bf16/8/length")
    header, rows = benchmark.loss_rows([run("ours", [20, 20], [1.0, 1.0]), grouped], warmup=1)
    assert header == ["step", "lit-lora v"]
    assert [row[0] for row in rows] == ["1 (warm-up)", "2", "mean"]


def test_an_unknown_contender_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--model", "x", "--data", "y", "--only", "pefft"]) == 2
    assert "pefft: no such contender (did you mean 'peft'?)" in capsys.readouterr().err


@pytest.mark.slow
def test_our_runner_and_the_limit_measure_a_tiny_model(data: Path, model: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(model), "--data", str(data), "--only", "ours", "limit", "--out", str(tmp_path / "out")]
    arguments += ["--variant", "ours=bf16/512 tokens", "--threads", "1", "--batch", "4", "--warmup", "1"]
    assert benchmark.main([*arguments, "--steps", "1", "--rounds", "1"]) == 0
    record = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    ours = next(one for one in record["final"] if one["contender"] == "ours")
    assert len(ours["losses"]) == len(ours["tokens"]) == 2
    assert all(5 < loss < 7 for loss in ours["losses"]), "a random model is near log(384)"
    assert ours["peak_anonymous_bytes"] > 0 or sys.platform != "linux"
    assert record["final"][1]["extra"]["gflops"]["head"] > 0


@pytest.mark.slow
def test_our_qlora_runner_reports_the_loss_of_the_ordered_steps(data: Path, model: Path, tmp_path: Path) -> None:
    arguments = ["--method", "qlora", "--model", str(model), "--data", str(data), "--only", "ours-qlora"]
    arguments += ["--variant", "ours-qlora=bf16/512 tokens", "--threads", "1", "--batch", "4", "--warmup", "1"]
    losses = []
    for steps in ("1", "2"):
        folder = tmp_path / steps
        out = ["--out", str(folder), "--steps", steps, "--rounds", "1", "--validation", "4"]
        assert benchmark.main([*arguments, *out]) == 0
        record = json.loads(next(folder.glob("cpu_qlora_*.json")).read_text())
        losses.append(record["final"][0]["extra"]["validation_loss"])
        assert "| validation |" in next(folder.glob("cpu_qlora_*.md")).read_text()
    assert all(5 < loss < 7 for loss in losses)


@pytest.mark.slow
def test_a_shape_is_measured_on_random_weights_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ModelConfig(
        vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
    )  # fmt: skip
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(tiny.to_hf()))
    monkeypatch.chdir(tmp_path)
    arguments = ["--method", "qlora", "--shape", "tiny", "--length", "48", "--batch", "2", "--only", "ours-qlora"]
    arguments += ["--variant", "ours-qlora=bf16/256 tokens/checkpointing", "--threads", "1", "--warmup", "1"]
    assert benchmark.main([*arguments, "--steps", "2", "--rounds", "1", "--out", "out"]) == 0
    record = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert record["final"][0]["tokens"] == [96, 96, 96]
    assert all(5 < loss < 7 for loss in record["final"][0]["losses"])
