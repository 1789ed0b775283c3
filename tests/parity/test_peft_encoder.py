"""Adapters with a head against PEFT's: the same logits, read there and here, and the same steps of training."""

from __future__ import annotations

import copy
import json
import runpy
from pathlib import Path

import peft as their
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional as F

from lit_lora import peft
from lit_lora.classify import Task, head_of, open_classifier
from tests.classify.tiny import ENCODERS, inputs, make_model, save_base, write_rows
from tests.peft.tiny import shake

TASK = Task("classification", ("no", "yes"))
CASES = {
    "lora": ({"name": "lora", "rank": 4}, {}),
    "lora bias": ({"name": "lora", "rank": 4, "target_modules": "q,v", "bias": "lora_only"}, {}),
    "dora": ({"name": "dora", "rank": 4}, {}),
    "ia3": ({"name": "ia3"}, {}),
    "vera": ({"name": "vera", "rank": 24, "target_modules": "q,v"}, {}),
}


def ours(family: str, settings: dict) -> tuple[torch.nn.Module, peft.Method]:
    model = make_model(family)
    peft.freeze(model)
    method = peft.methods()[settings["name"]].model_validate(settings)
    method = peft.with_modules_to_save(method, head_of(model, [], TASK))
    method.apply(model)
    return model, method


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ENCODERS)
def test_our_adapter_with_its_head_opens_in_peft(family, case, tmp_path):
    model, method = ours(family, CASES[case][0])
    shake(model, 0.1)
    adapter = peft.save_adapter(model, method, tmp_path / "a", base="some/base", task_type=TASK.peft_type)
    fresh = make_model(family)
    torch.nn.init.normal_(fresh.classifier.weight if family != "roberta" else fresh.classifier.dense.weight)
    there = their.PeftModel.from_pretrained(fresh, adapter).eval()
    assert type(there) is their.PeftModelForSequenceClassification
    with torch.no_grad():
        expected, got = model.eval()(**inputs(family)).logits, there(**inputs(family)).logits
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ENCODERS)
def test_an_adapter_of_peft_with_its_head_opens_here(family, tmp_path):
    base = save_base(family, tmp_path / "base")
    torch.manual_seed(7)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    names = ["query_proj", "value_proj"] if family == "deberta-v2" else ["query", "value"]
    head = ["classifier", "pooler"] if family != "roberta" else ["classifier"]
    config = their.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=names, modules_to_save=head)
    wrapped = their.get_peft_model(model, config)
    shake(wrapped, 0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    opened = open_classifier(tmp_path / "adapter", dtype="fp32")
    assert opened.task == Task("classification", ("LABEL_0", "LABEL_1", "LABEL_2"))
    with torch.no_grad():
        expected, got = wrapped.eval()(**inputs(family)).logits, opened.model(**inputs(family)).logits
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.filterwarnings("ignore")
def test_ten_steps_of_training_are_those_of_peft(tmp_path):
    model, method = ours("bert", {"name": "lora", "rank": 4})
    adapter = peft.save_adapter(model, method, tmp_path / "a", base="some/base", task_type=TASK.peft_type)
    there = their.PeftModel.from_pretrained(copy.deepcopy(make_model("bert")), adapter, is_trainable=True)
    for each in (model, there):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        each.train()
        for _ in range(10):
            F.cross_entropy(each(**inputs("bert")).logits, torch.tensor([0, 1])).backward()
            optimizer.step()
            optimizer.zero_grad()
    peft.save_adapter(model, method, tmp_path / "ours", base="some/base")
    there.save_pretrained(tmp_path / "theirs")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=2e-4, rtol=2e-3, msg=name)


@pytest.mark.filterwarnings("ignore")
def test_the_peer_of_the_benchmark_runs(tmp_path, monkeypatch, capsys):
    script = Path(__file__).resolve().parents[2] / "scripts" / "benchmark_peers" / "peft_classify.py"
    rows = str(write_rows(tmp_path / "rows.jsonl"))
    files = ["--model", str(save_base("bert", tmp_path / "base")), "--train", rows, "--validation", rows]
    monkeypatch.setattr("sys.argv", [str(script), *files, "--limit", "32", "--batch-size", "16", "--eval-every", "1"])
    runpy.run_path(str(script), run_name="__main__")
    figures = json.loads(capsys.readouterr().out)
    assert [step for step, _ in figures["curve"]] == [1, 2]
    assert 0 <= figures["best_accuracy"] <= 1
