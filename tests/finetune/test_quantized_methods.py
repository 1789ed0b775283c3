"""Methods that choose the codes of their base, or train on its groups: run, use, resume and merge."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_lora.checkpoint import load_model
from lit_lora.errors import LitLoraError
from lit_lora.open.decoder import open_model
from lit_lora.peft import load_adapter
from lit_lora.quantize import Groups, QuantizeConfig
from tests.finetune.test_qlora import Call, call, finetuned, task  # noqa: F401 - fixtures
from tests.finetune.tiny_task import write_config
from tests.train.tiny_run import losses, metrics

LOFTQ: dict[str, Any] = {"peft": {"name": "loftq", "rank": 4, "alpha": 2.0}}
QA_LORA: dict[str, Any] = {"peft": {"name": "qa-lora", "rank": 1}, "quantize": {"name": "int4", "block_size": 32}}
NF4 = {"name": "nf4", "block_size": 32}
LQ_LORA: dict[str, Any] = {"peft": {"name": "lq-lora", "rank": 4, "bits": 3.5, "fisher_rows": 3}, "quantize": {}}
CASES = {
    "lq-lora": LQ_LORA,
    "qa-lora": QA_LORA,
    "loftq": LOFTQ,
    "loftq int2": {**LOFTQ, "quantize": {"name": "int2", "block_size": 32}},
}
OWN_BASE = [name for name, sections in CASES.items() if sections["peft"]["name"] != "qa-lora"]
every_case = pytest.mark.parametrize("case", CASES)
every_own_base = pytest.mark.parametrize("case", OWN_BASE)


def configured(task: Path, case: str, **sections: Any) -> Path:  # noqa: F811
    defaults: dict[str, Any] = {"quantize": {"name": "nf4", "block_size": 32}}
    return write_config(task, recipe="qlora", **{**defaults, **CASES[case], **sections})


def logits(run: Path) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = open_model(run, dtype="fp32").model(torch.arange(3, 20)[None])
    return result


@every_case
def test_a_run_learns_and_opens_wherever_it_is_moved(task: Path, case: str) -> None:  # noqa: F811
    run = finetuned(configured(task, case), "train.max_steps=12")
    assert losses(run)[-1] < losses(run)[0]
    first = logits(run)
    shutil.move(run, task / "elsewhere")
    assert torch.equal(logits(task / "elsewhere"), first)


@every_case
def test_resuming_continues_bit_for_bit(task: Path, case: str) -> None:  # noqa: F811
    whole = finetuned(configured(task, case, train={"save_every": 4}))
    weights = whole / "adapter" / "adapter_model.safetensors"
    reference = metrics(whole), weights.read_bytes()
    for later in sorted((whole / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(later)
    weights.unlink()
    finetuned(whole / "config.yaml", resume=True)
    assert (metrics(whole), weights.read_bytes()) == reference


@every_own_base
def test_the_original_base_cannot_stand_in_for_the_codes(task: Path, case: str) -> None:  # noqa: F811
    run = finetuned(configured(task, case))
    with pytest.raises(LitLoraError, match="trained on a base quantized by its method"):
        load_adapter(load_model(task / "base"), run / "adapter")


def test_qa_lora_merges_into_the_zeros_and_the_model_in_int4_computes_the_same(task: Path, call: Call) -> None:  # noqa: F811
    run = finetuned(configured(task, "qa-lora"), "train.max_steps=12")
    code, out, err = call("merge", run)
    assert code == 0, err
    assert "merged into the zeros of int4, blocks of 32: the codes stay" in out
    merged, trained = open_model(run / "merged", dtype="fp32"), open_model(run, dtype="fp32")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected, got = trained.model(ids), merged.model(ids)
        untrained = load_model(task / "base", quantize=QuantizeConfig.model_validate(QA_LORA["quantize"]))(ids)
    assert (got - expected).abs().max() <= 1e-4
    assert (untrained - expected).abs().max() > 1e-2
    before = {
        name.replace(".base_layer", ""): m.codes for name, m in trained.model.named_modules() if isinstance(m, Groups)
    }
    after = {name: m.codes for name, m in merged.model.named_modules() if isinstance(m, Groups)}
    assert before.keys() == after.keys() != set()
    assert all(torch.equal(before[name], codes) for name, codes in after.items())
    assert json.loads((run / "merged" / "config.json").read_text())["quantization_config"]["quant_method"] == "lit_lora"
    assert call("generate", run / "merged", "colour 3?", "--max-new-tokens", 4)[0] == 0


def test_a_merge_into_zeros_of_a_base_in_16_bits_reports_no_loss(task: Path, call: Call) -> None:  # noqa: F811
    """The zeros hold all of the update; what a model in bfloat16 rounds while it computes is not the merge's."""
    assert call("convert", task / "base", "--dtype", "bf16", "--out", task / "half")[0] == 0
    settings = ["train.max_steps=2", "optimizer.lr=1e-4", f"model.path={task / 'half'}", "model.dtype=bf16"]
    code, out, err = call("merge", finetuned(configured(task, "qa-lora"), *settings))
    assert code == 0, err
    assert re.search(r"rounding error 0\.\d+% of the update", out)
    assert "100.0% of its values survive" in out
    assert re.search(r" 0\.\d+% of the adapter's effect is lost", out)


@every_case
def test_a_dry_run_writes_nothing(task: Path, case: str) -> None:  # noqa: F811
    finetuned(configured(task, case), dry_run=True)
    assert not (task / "run").exists()


def test_evaluate_says_that_codes_chosen_by_a_method_are_not_the_base(task: Path, call: Call) -> None:  # noqa: F811
    run = finetuned(configured(task, "loftq"))
    assert call("evaluate", run, "--data", task / "rows.jsonl", "--task", "loss", "--out", task / "x.json")[0] == 0
    models = json.loads((task / "x.json").read_text())["models"]
    assert [model["label"] for model in models] == ["run/base, the codes without their update", "run/adapter"]


_INT4 = ["peft.name=qa-lora", "quantize.name=int4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe=lora", "peft.name=loftq"], r"'loftq' is not for this recipe \(did you mean recipe: qlora\?\)"),
        (
            ["peft.name=loftq", "peft.rank=17"],
            r"peft.rank: 17 is too large for .*k_proj \(16×32\), expected at most 16",
        ),
        (["peft.name=loftq", "peft.init=gaussian"], "has no effect: A and B start from"),
        (["peft.name=qa-lora"], r"qa-lora needs a base in int4 or int2, got nf4-dq, blocks of 32"),
        (["recipe=lora", "peft.name=qa-lora"], r"'qa-lora' is not for this recipe \(did you mean recipe: qlora\?\)"),
        ([*_INT4, "peft.group_size=24"], "peft.group_size: 24 does not divide the 32 columns of .*q_proj"),
        (
            [*_INT4, "peft.rank=2"],
            r"peft.rank: 2 is too large for .*q_proj \(32×32 in groups of 32\), expected at most 1",
        ),
        (["quantize.name=int4", "quantize.block_size=64"], "quantize.block_size: 64 does not divide the 32 columns"),
        (["quantize.name=int4", "quantize.double_quant=false"], "double_quant has no effect"),
        (["peft.name=loftq", "peft.iterations=0"], "iterations: .* 1"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_one_line(task: Path, call: Call, arguments: list[str], message: str) -> None:  # noqa: F811
    quantized = {} if "recipe=lora" in arguments else {"recipe": "qlora", "quantize": {"name": "nf4", "block_size": 32}}
    config = write_config(task, **quantized)
    code, out, err = call("finetune", "--config", config, *arguments)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, len(errors)) == (2, 1), err
    assert re.search(message, errors[0]), errors
    assert "Traceback" not in err + out
    assert not (task / "run").exists()
