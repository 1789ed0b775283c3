"""Activation checkpointing: less is kept for the backward, and every number stays the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lit_lora import peft
from lit_lora.model import CausalLM, ModelConfig
from tests.tiny import gradients_of

SIZES = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4}


def make_model(dtype: torch.dtype, settings: dict[str, object]) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(
        ModelConfig.from_hf({"model_type": "llama", **SIZES, "num_attention_heads": 2, "num_key_value_heads": 1})
    ).to(dtype)
    peft.freeze(model)
    peft.methods()[str(settings["name"])].model_validate(settings).apply(model)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


class Storages(TorchDispatchMode):
    """Notes the memory of every tensor that is made, and tells how much of it is still held."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made.append((StorageWeakRef(storage), storage.nbytes()))
        return result

    def held(self, model: CausalLM) -> int:
        """Bytes beside the model's own, each storage once."""
        own = {StorageWeakRef(parameter.untyped_storage()).cdata for parameter in model.parameters()}
        held = {ref.cdata: size for ref, size in self.made if not ref.expired() and ref.cdata not in own}
        return sum(held.values())


def run(model: CausalLM, what: str) -> tuple[float, dict[str, torch.Tensor], int]:
    """The loss, the gradients, and the bytes that are held for the backward."""
    model.checkpoint_activations(what)  # type: ignore[arg-type]
    ids = torch.arange(50)[None] % 61
    torch.manual_seed(3)  # of dropout
    with Storages() as storages:
        loss = model(ids, lengths=[20, 30]).float().logsumexp(-1).mean()
    held = storages.held(model)
    for parameter in model.parameters():
        parameter.grad = None
    loss.backward()
    grads = gradients_of(model)
    return loss.item(), grads, held


@pytest.mark.parametrize("settings", [{"name": "lora", "dropout": 0.2}, {"name": "full"}], ids=["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("what", ["selective", "full"])
def test_loss_and_gradients_are_the_same_bits(what: str, dtype: torch.dtype, settings: dict[str, object]) -> None:
    model = make_model(dtype, settings)
    loss, grads, _ = run(model, "none")
    again, same, _ = run(model, what)
    assert again == loss
    assert same.keys() == grads.keys()
    assert len(grads) > 10
    assert all(torch.equal(same[name], grads[name]) for name in grads)


def test_pain_08_gradients_flow_with_a_frozen_embedding() -> None:
    model = make_model(torch.float32, {"name": "lora", "layers": [0]})
    _, grads, _ = run(model, "full")
    assert len(grads) == 14
    assert all(grad.abs().sum() > 0 for grad in grads.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_less_is_held_for_the_backward(dtype: torch.dtype) -> None:
    model = make_model(dtype, {"name": "lora"})
    held = {what: run(model, what)[2] for what in ("none", "selective", "full")}
    assert held["selective"] < 0.75 * held["none"]
    assert held["full"] < 0.25 * held["none"]
