"""Rotary position embedding and its scalings for longer contexts.

A pair of dimensions ``(i, i + H/2)`` of a head turns by ``position * frequency_i``. Source: RoFormer
(arXiv:2104.09864) eq. 34; the half-split pairing is Hugging Face's layout of the Llama weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_lora.model.config import ModelConfig, Rope
from lit_lora.model.ops import to_device

__all__ = ["inverse_frequencies", "rope_table"]


def rope_table(config: ModelConfig, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's rotations.

    Args:
        config: The model's.
        positions: (T,) int64.
        length: The longest sequence among them; ``dynamic`` and ``longrope`` choose the frequencies by it.

    Returns:
        Two (T, H/2) float32 tensors, with the attention factor of ``yarn`` and ``longrope`` multiplied in.
    """
    frequencies, factor = inverse_frequencies(config, length)
    angles = positions.to(torch.float32)[:, None] * to_device(frequencies, positions.device)[None, :]  # (T, H/2)
    return angles.cos() * factor, angles.sin() * factor


def inverse_frequencies(config: ModelConfig, length: int = 0) -> tuple[Tensor, float]:
    """Rotation per position of each dimension pair, (H/2,) float32, and the factor on cosine and sine."""
    rope = config.rope
    size = config.head_dim
    exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size  # (H/2,)
    plain = 1.0 / rope.rope_theta**exponents
    if rope.rope_type == "linear":
        assert rope.factor is not None
        return plain / rope.factor, 1.0
    if rope.rope_type == "dynamic":
        return _dynamic(config, exponents, length), 1.0
    if rope.rope_type == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.rope_type == "yarn":
        return _yarn(config, plain)
    if rope.rope_type == "longrope":
        return _longrope(config, exponents, length)
    return plain, 1.0


def _context(config: ModelConfig) -> int:
    """Tokens that the model was trained on, before its context was lengthened."""
    return config.rope.original_max_position_embeddings or config.max_position_embeddings


def _factor(config: ModelConfig) -> float:
    """How many times longer the context has become."""
    return config.rope.factor or config.max_position_embeddings / _context(config)


def _dynamic(config: ModelConfig, exponents: Tensor, length: int) -> Tensor:
    """NTK-aware base that grows with the sequence beyond the trained context."""
    factor = _factor(config)
    context = config.max_position_embeddings
    size = config.head_dim
    stretch = factor * max(length, context) / context - (factor - 1)
    base: float = config.rope.rope_theta * stretch ** (size / (size - 2))
    return 1.0 / base**exponents


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    """Long wavelengths divided by the factor, short ones kept, a linear blend between. Source: Llama 3.1."""
    assert rope.factor
    assert rope.low_freq_factor
    assert rope.high_freq_factor
    assert rope.original_max_position_embeddings

    wavelengths = 2 * math.pi / plain
    turns = rope.original_max_position_embeddings / wavelengths  # rotations over the original context
    blend = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - blend) * plain / rope.factor + blend * plain


def _yarn(config: ModelConfig, plain: Tensor) -> tuple[Tensor, float]:
    """Interpolation by parts with an attention temperature. Source: YaRN (arXiv:2309.00071) §3."""
    rope = config.rope
    size = config.head_dim
    factor = _factor(config)
    context = _context(config)

    def dimension(rotations: float) -> float:
        """The dimension pair, as a fraction too, that turns this often over the trained context."""
        return size * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    # Pairs below `low` turn fast and stay as they are; those above `high` are interpolated; a ramp lies between.
    low = dimension(rope.beta_fast or 32)
    high = dimension(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low = max(low, 0)
    high = min(high, size - 1)
    if low == high:
        high += 0.001  # or the ramp would divide by 0
    interpolated = ((torch.arange(size // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies = plain / factor * interpolated + plain * (1 - interpolated)

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.attention_factor is not None:
        return frequencies, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return frequencies, temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return frequencies, temperature(1.0)


def _longrope(config: ModelConfig, exponents: Tensor, length: int) -> tuple[Tensor, float]:
    """A divisor per dimension, one list within the original context and one beyond. Source: arXiv:2402.13753."""
    rope = config.rope
    context = _context(config)
    factor = _factor(config)

    chosen = rope.long_factor if length > context else rope.short_factor
    divisors = torch.tensor(chosen, dtype=torch.float32)
    attention_factor = rope.attention_factor
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))
    return 1.0 / (divisors * rope.rope_theta**exponents), attention_factor
