"""LoRA and IA3 on models of many families against PEFT on transformers' model of the same weights, live."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_lora import peft as ours
from lit_lora.checkpoint.load import load_model
from tests.families.opened import Opened, documents, error, open_tiny
from tests.peft.tiny import shake

if importlib.util.find_spec("peft") is None:
    pytest.skip("peft is not installed", allow_module_level=True)

FAMILIES = [
    "llama", "qwen3", "gemma3_text", "phi3", "olmo2", "qwen3_moe", "gpt2", "gpt_neox", "falcon", "mpt", "qwen3_5_text",
    "gpt_oss",
]  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {"lora": {"rank": 1, "alpha": 2.0}, "ia3": {}}
NO_IA3 = {"qwen3_moe", "gpt_oss"}  # their MLPs' last layers are experts, 3-D weights
CASES = [(family, name) for name in METHODS for family in FAMILIES if name == "lora" or family not in NO_IA3]


def open_in_peft(opened: Opened, folder: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of GPT-2's Conv1D, and of tied weights
        return PeftModel.from_pretrained(opened.theirs, folder, is_trainable=True).eval()


def loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:-1], ids[1:])


def logits_of(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model.logits(model.hidden_states(ids[None]))[0]
    return logits


@pytest.mark.parametrize(("family", "name"), CASES, ids=[f"{family}-{name}" for family, name in CASES])
def test_outputs_gradients_and_files_are_pefts(family: str, name: str, tmp_path: Path) -> None:
    opened = open_tiny(family, tmp_path / "base")
    model, ids = opened.ours, documents()[2]
    ours.freeze(model)
    method = ours.methods()[name].model_validate({"name": name, **METHODS[name]})
    method.apply(model)
    shake(model, 0.1)
    ours.save_adapter(model, method, tmp_path / "ours", base=tmp_path / "base")

    theirs = open_in_peft(opened, tmp_path / "ours")
    logits, expected = logits_of(model, ids), theirs(input_ids=ids[None], use_cache=False).logits[0]
    assert error(logits, expected) < 1e-4

    loss(logits, ids).backward()
    loss(expected, ids).backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    found = method.file_tensors(model)
    trained = {key: value for key, value in theirs.named_parameters() if value.requires_grad}
    their_names = {key.replace("base_model.model.", "").replace(".default", ""): key for key in trained}
    assert found.keys() == their_names.keys()
    for key, their_name in their_names.items():
        gradient = trained[their_name].grad
        assert gradient is not None
        assert float((found[key] - gradient).norm()) < 1e-4 * max(float(gradient.norm()), 1e-3), key

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "base")
    ours.load_adapter(again, tmp_path / "theirs")
    with torch.no_grad():
        assert error(logits_of(again, ids), expected) < 1e-4
