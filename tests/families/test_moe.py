"""Mixtures of experts against transformers, live: same numbers in every form in which the decoder computes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lit_lora.model import CausalLM, KVCache, ModelConfig
from lit_lora.model.moe import ExpertLayer, run_experts
from tests.families.tiny_configs import VOCABULARY, build

FAMILIES = [
    "mixtral",
    "qwen2_moe",
    "qwen2_moe#dense_layers",
    "qwen3_moe",
    "qwen3_moe#dense_layers",
    "granitemoe",
    "flex_olmo",
]
"""Keys of tiny models that the own decoder runs."""


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[CausalLM, nn.Module]:
    """Our model and transformers', with the same values."""
    theirs = build(request.param)
    ours = CausalLM(ModelConfig.from_hf(theirs.config.to_dict()))
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def test_logits_and_all_gradients_are_transformers(pair: tuple[CausalLM, nn.Module]) -> None:
    ours, theirs = pair
    ids = tokens(2, 19)
    weights = torch.randn(2, 19, VOCABULARY, generator=torch.Generator().manual_seed(1))
    our_logits = ours(ids)
    their_logits = theirs(ids).logits
    assert error(our_logits, their_logits) < 1e-5

    (our_logits * weights).sum().backward()
    (their_logits * weights).sum().backward()
    for name, parameter in ours.named_parameters():
        their_gradient = theirs.get_parameter(name).grad
        assert parameter.grad is not None
        assert their_gradient is not None
        assert error(parameter.grad, their_gradient) < 1e-4, name
    ours.zero_grad()
    theirs.zero_grad()


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(pair: tuple[CausalLM, nn.Module]) -> None:
    ours, _ = pair
    documents = [tokens(1, length, seed=length) for length in (11, 1, 7)]
    packed = ours(torch.cat(documents, dim=1), lengths=[11, 1, 7])
    alone = torch.cat([ours(document) for document in documents], dim=1)
    assert error(packed, alone) < 1e-5


@torch.no_grad()
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_row(pair: tuple[CausalLM, nn.Module]) -> None:
    ours, _ = pair
    ids = tokens(2, 13)
    whole = ours(ids)
    cache = KVCache(batch_size=2, max_length=13)
    steps = [ours(ids[:, :8], cache=cache), *(ours(ids[:, [step]], cache=cache) for step in range(8, 13))]
    assert error(torch.cat(steps, dim=1), whole) < 1e-5


def test_recomputed_activations_give_the_same_bits(pair: tuple[CausalLM, nn.Module]) -> None:
    ours, _ = pair
    gradients_of = {}
    for what in ("none", "selective", "full"):
        ours.zero_grad()
        ours.checkpoint_activations(what)
        ours(tokens(1, 30), lengths=[17, 13]).logsumexp(-1).sum().backward()
        gradients_of[what] = [parameter.grad for parameter in ours.parameters()]
    ours.checkpoint_activations("none")
    ours.zero_grad()
    for what in ("selective", "full"):
        assert all(map(torch.equal, gradients_of[what], gradients_of["none"]))


def layer(*shape: int, low_rank: bool = False, seed: int = 0) -> ExpertLayer:
    """A random layer of experts, (E, out, in)."""
    generator = torch.Generator().manual_seed(seed)
    experts, outputs, inputs = shape
    weight = torch.randn(shape, generator=generator).div_(inputs**0.5).requires_grad_()
    if not low_rank:
        return ExpertLayer(weight)
    A = torch.randn(experts, 8, inputs, generator=generator).div_(inputs**0.5).requires_grad_()
    B = torch.randn(experts, outputs, 8, generator=generator).requires_grad_()
    return ExpertLayer(weight, A=A, B=B, scaling=0.5)


def gradients(dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of two layers with low-rank updates, for 40 tokens of which each goes to 2 of 5 experts."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 16, generator=generator, requires_grad=True)
    chosen = torch.rand(40, 5, generator=generator)[:, :4].topk(2).indices  # one expert gets no token
    weights = torch.rand(40, 2, generator=generator, requires_grad=True)
    first, second = layer(5, 48, 16, low_rank=True, seed=1), layer(5, 16, 24, low_rank=True, seed=2)
    half = [ExpertLayer(part.weight.to(dtype), A=part.A, B=part.B, scaling=part.scaling) for part in (first, second)]
    out = run_experts(x.to(dtype), chosen, weights, *half, lambda hidden: hidden[:, :24].tanh() * hidden[:, 24:])
    inputs = [x, weights, first.weight, first.A, first.B, second.weight, second.A, second.B]
    probe = torch.randn(40, 16, generator=generator)
    return [out.detach().float(), *torch.autograd.grad((out * probe).sum(), inputs)]


def test_results_are_the_same_bits_on_every_run() -> None:
    once, again = gradients(torch.float32), gradients(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


def test_bfloat16_loses_no_more_than_its_rounding() -> None:
    for rough, exact in zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True):
        assert float((rough - exact).norm() / exact.norm()) < 0.012  # a product rounds by up to 2^-9


def test_the_grouped_product_of_gpus_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gradients(torch.bfloat16)
    monkeypatch.setattr("lit_lora.model.moe._Groups.fused", lambda *_: True)
    for fused, looped in zip(gradients(torch.bfloat16), expected, strict=True):
        assert float((fused - looped).norm() / looped.norm()) < 0.012
