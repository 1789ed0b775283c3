"""Every causal type that transformers has, opened from its checkpoint by lit-lora, against transformers itself, live.

By default some types run that differ most from each other; all of them are marked slow.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_lora import peft
from lit_lora.checkpoint.parameters import StoredParameters
from lit_lora.errors import InputError
from lit_lora.peft.lora.config import LoRAConfig
from lit_lora.train.loss import backward
from tests.families.opened import LENGTHS, SHARED, Opened, documents, error, micro_batch, open_tiny, row
from tests.families.tiny_configs import KEYS

DEFAULT = {
    "llama#llama3", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3#longrope", "olmo2", "smollm3", "granite",
    "mixtral", "qwen3_moe", "gpt2", "gpt_neox", "falcon", "mpt", "gpt_oss", "deepseek_v3", "qwen3_5_text", "mamba",
    "gemma4#composite", "mistral3#ministral3#composite",
}  # fmt: skip

REFUSED = {
    "deepseek_v4": "a single document",  # chooses experts by token ids, which it does not take beside embeddings
    "emu3": "is not a decoder",
    "mllama": "is not a decoder",
}
"""Key -> the message, for what lit-lora does not open."""

OPENED = [key for key in KEYS if key not in REFUSED]


def each(keys: list[str]) -> pytest.MarkDecorator:
    marks = {key: [] if key in DEFAULT else [pytest.mark.slow] for key in keys}
    return pytest.mark.parametrize("key", [pytest.param(key, marks=marks[key]) for key in keys])


@pytest.mark.slow
@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_be_trained_is_refused_in_one_line(key: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=REFUSED[key]) as refusal:
        open_tiny(key, tmp_path)
    assert "\n" not in str(refusal.value)


@each(OPENED)
def test_it_computes_what_transformers_does(key: str, tmp_path: Path) -> None:
    opened = open_tiny(key, tmp_path)
    with torch.no_grad():
        check_logits(opened)
    check_files(opened)
    check_gradients(opened)


def check_logits(opened: Opened) -> None:
    """Documents alone, packed, behind a shared prefix, and read in pieces."""
    model, rows = opened.ours, documents()
    alone = opened.logits_alone()
    for ids, expected in zip(rows, alone, strict=True):
        assert error(model.logits(model.hidden_states(ids[None]))[0], expected) < 1e-4

    packed = model.hidden_states(row(rows, 0)[None], lengths=LENGTHS)
    assert error(model.logits(packed)[0], row(alone, 0)) < 1e-4
    shared = model.hidden_states(row(rows, SHARED)[None], lengths=LENGTHS, shared_prefix=SHARED)
    assert error(model.logits(shared)[0], row(alone, SHARED)) < 1e-4

    cache = model.new_cache(1, LENGTHS[2])
    pieces = [model.hidden_states(piece[None], cache=cache) for piece in torch.split(rows[2], [8, 1, 1, 4])]
    assert error(model.logits(torch.cat(pieces, dim=1))[0], alone[2]) < 1e-4


def check_files(opened: Opened) -> None:
    """The files that come from the model's parameters have every bit of those it was opened from."""
    stored = StoredParameters(opened.folder, opened.ours)
    values = opened.ours.state_dict()
    written: dict[str, Tensor] = {}
    for conversion in stored.conversions:
        written |= stored.to_files(conversion, {name: values[name] for name in conversion.parameters})
    assert written.keys() | set(stored.others()) == set(stored.files.names())
    for name, tensor in written.items():
        assert torch.equal(tensor, stored.files.read(name)), name


def check_gradients(opened: Opened) -> None:
    """The loss of packed documents and the gradients of LoRA are those of transformers with the product added."""
    model, rank, alpha = opened.ours, 1, 2.0
    peft.freeze(model)
    LoRAConfig(name="lora", rank=rank, alpha=alpha).apply(model)
    model.train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for number, parameter in enumerate(trained.values()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.data.copy_(0.1 * noise)

    factors = {name: parameter.detach().clone().requires_grad_() for name, parameter in trained.items()}
    theirs = their_loss(opened.theirs, factors, alpha / rank)
    theirs.backward()
    for shared in (0, SHARED):
        model.zero_grad(set_to_none=True)
        ours = backward(model, micro_batch(shared), 1.0)
        assert float(ours) == pytest.approx(float(theirs.detach()), rel=1e-4)
        largest = max(float(factor.grad.norm()) for factor in factors.values() if factor.grad is not None)
        for name, factor in factors.items():
            expected = torch.zeros_like(factor) if factor.grad is None else factor.grad
            found = torch.zeros_like(factor) if trained[name].grad is None else trained[name].grad
            # next to the largest, small gradients are rounding
            scale = max(float(expected.norm()), 1e-3 * largest)
            assert float((found - expected).norm()) / scale < 1e-4, name


def their_loss(net: nn.Module, factors: dict[str, Tensor], scale: float) -> Tensor:
    """The sum of token losses of all documents, computed one by one with ``scale * B A`` added to the weights."""
    weights = {}
    for name in factors:
        layer, _, kind = name.rpartition(".")
        if kind == "lora_A":
            full_name, weight = _weight(net, f"{layer}.weight")
            product = scale * factors[f"{layer}.lora_B"] @ factors[name]
            transposed = type(net.get_submodule(full_name.rpartition(".")[0])).__name__ == "Conv1D"
            weights[full_name] = weight.detach() + (product.T if transposed else product)
    total = torch.zeros(())
    for ids in documents():
        arguments = {"input_ids": ids[None], "use_cache": False}
        logits = torch.func.functional_call(net, weights, (), arguments, tie_weights=False).logits[0]
        total = total + F.cross_entropy(logits[SHARED:-1], ids[SHARED + 1 :], reduction="sum")
    return total


def _weight(net: nn.Module, name: str) -> tuple[str, Tensor]:
    """A parameter of ours in ``net``, where a composite model has it under another prefix."""
    parameters = dict(net.named_parameters(remove_duplicate=False))
    if name not in parameters:
        inner = name.removeprefix("model")
        name = next(other for other in parameters if other.endswith(f"language_model{inner}"))
    return name, parameters[name]
