"""A step on paper holds what a real one holds."""

from __future__ import annotations

import pytest
import torch

from lit_lora import peft
from lit_lora.estimate.rehearsal import MicroBatchShape, Peak, on_paper, rehearse
from lit_lora.model import CausalLM, ModelConfig
from lit_lora.train.loss import padded
from lit_lora.train.optim.master_weights import MasterWeights

CONFIG = ModelConfig(
    vocab_size=515,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
PORTION = MicroBatchShape([70, 300, 33], 211)


def model_of(method: str, dtype: torch.dtype, **settings: object) -> CausalLM:
    model = CausalLM(CONFIG).to(dtype)
    peft.freeze(model)
    peft.methods()[method].model_validate(settings).apply(model)
    return model.train()


@pytest.mark.parametrize("level", ["selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_checkpointing_is_seen_without_being_known(dtype, level):
    real = model_of("lora", dtype)
    plain = peak_of(on_paper(real))
    real.checkpoint_activations(level)
    expected, got = peak_of(real), peak_of(on_paper(real))
    assert got == expected
    assert got.activations < 0.8 * plain.activations
    assert got.operations > plain.operations


def peak_of(
    model: CausalLM, *, fused: str | None = "cpu", several: bool = False, micro_batch: MicroBatchShape = PORTION
) -> Peak:
    masters = MasterWeights(model).masters.values()
    return rehearse(model, micro_batch, fused=fused, masters=masters if several else ())


CASES = {
    "lora": {},
    "lora with dropout": {"dropout": 0.1},
    "lora of some layers": {"layers": [1], "target_modules": ["q_proj", "down_proj"]},
    "lora and whole modules": {"modules_to_save": ["lm_head", "layers.0.mlp"]},
    "lora and tokens": {"trainable_tokens": [3, 515]},
    "full": {},
    "full, in part": {"train": ["layers.2.mlp"]},
}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_on_paper_allocates_what_a_real_one_does_byte_for_byte(case, dtype, several):
    method = "full" if case.startswith("full") else "lora"
    real = model_of(method, dtype, **CASES[case])
    paper = on_paper(real)
    assert all(parameter.is_meta for parameter in paper.parameters())
    expected, got = peak_of(real, several=several), peak_of(paper, several=several)
    assert got == expected
    assert min(got.activations, got.operations) > 0


def test_a_model_on_paper_shares_what_the_model_shares_and_leaves_it_alone():
    model = CausalLM(CONFIG.model_copy(update={"tie_word_embeddings": True}))
    model.lm_head.weight.requires_grad_(False)
    paper = on_paper(model)
    assert paper.lm_head.weight is paper.model.embed_tokens.weight
    assert not paper.lm_head.weight.requires_grad
    assert paper.model.norm.weight.requires_grad
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_gradients_of_earlier_micro_batches_are_there_at_the_peak():
    numbers = peft.count_parameters(model_of("lora", torch.bfloat16, rank=32)).trainable
    later = peak_of(model_of("lora", torch.bfloat16, rank=32), several=True)
    assert later.backward >= 4 * numbers


def test_operations_are_those_of_the_matrix_products():
    """LoRA in fp32: a weight is in 2 products, as it needs no gradient, A and B are in 3; the head is in 2."""
    model = model_of("lora", torch.float32)
    base = sum(p.numel() for name, p in model.named_parameters() if "layers" in name and p.ndim == 2)
    own = peft.count_parameters(model).trainable
    head = CONFIG.vocab_size * CONFIG.hidden_size
    tokens, targets = padded(sum(PORTION.lengths)), 256  # rounded up
    expected = 2 * (tokens * (2 * (base - own) + 3 * own) + 2 * targets * head)
    # Attention comes on top; the first layer gives no gradient to its input.
    assert 0.95 * expected < peak_of(model, fused=None).operations < 1.2 * expected


def test_longer_micro_batches_keep_more():
    short, long = (
        peak_of(on_paper(model_of("lora", torch.bfloat16)), micro_batch=MicroBatchShape([n], n)) for n in (256, 512)
    )
    assert long.activations == pytest.approx(2 * short.activations, rel=0.02)
    assert 1.99 * short.operations < long.operations < 3 * short.operations


def test_a_gpu_keeps_less_with_its_kernels_than_without():
    model = on_paper(model_of("lora", torch.bfloat16))
    fused, plain = peak_of(model, fused="cuda"), peak_of(model, fused=None)
    assert fused.activations < 0.8 * plain.activations
