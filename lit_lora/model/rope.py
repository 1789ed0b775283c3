"""Rotary position embedding and its scalings for longer contexts.

A pair of dimensions ``(i, i + H/2)`` of a head turns by ``position * frequency_i``. Source: RoFormer
(arXiv:2104.09864) eq. 34; the half-split pairing is Hugging Face's layout of the Llama weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lit_lora.model.config import ModelConfig, Rope
from lit_lora.model.ops import to_device

__all__ = ["UNROTATED", "RopeTable", "inverse_frequencies", "rope_tables"]


class RopeTable(NamedTuple):
    """How one rotation turns the heads of some rows: the arguments of :func:`lit_lora.model.ops.rotate`."""

    cosine: Tensor
    """(T, R/2) float32, of R rotated dimensions; with the attention factor of ``yarn`` and ``longrope``."""
    sine: Tensor
    """Likewise."""

    def map(self, change: Callable[[Tensor], Tensor]) -> RopeTable:
        """The same with both tensors changed."""
        return self._replace(cosine=change(self.cosine), sine=change(self.sine))

    def without(self, rows: Tensor) -> RopeTable:
        """The same, but ``rows``, (T,) bool, stay as they are: cosine 1 and sine 0 turn nothing."""
        still = rows[:, None]
        return self._replace(cosine=self.cosine.masked_fill(still, 1.0), sine=self.sine.masked_fill(still, 0.0))


UNROTATED = RopeTable(torch.empty(0, 0), torch.empty(0, 0))
"""The table that turns no dimension of any row."""


def rope_tables(config: ModelConfig, positions: Tensor, length: int) -> list[RopeTable]:
    """The table of each of a model's rotations, in the order of the config's ``ropes``.

    Args:
        config: The model's.
        positions: (T,) int64.
        length: The longest sequence among them; ``dynamic`` and ``longrope`` choose the frequencies by it.
    """
    tables = []
    for rope in config.ropes:
        frequencies, factor = inverse_frequencies(config, rope, length)
        angles = positions.to(torch.float32)[:, None] * to_device(frequencies, positions.device)[None, :]  # (T, R/2)
        tables.append(RopeTable(angles.cos() * factor, angles.sin() * factor))
    return tables


def inverse_frequencies(config: ModelConfig, rope: Rope, length: int = 0) -> tuple[Tensor, float]:
    """Rotation per position of each dimension pair, (R/2,) float32, and the factor on cosine and sine."""
    size = config.head_dim
    exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size  # (H/2,)
    plain = 1.0 / rope.rope_theta**exponents
    if rope.rope_type == "linear":
        assert rope.factor is not None
        return plain / rope.factor, 1.0
    if rope.rope_type == "dynamic":
        return _dynamic(config, rope, exponents, length), 1.0
    if rope.rope_type == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.rope_type == "yarn":
        return _yarn(config, rope, plain)
    if rope.rope_type == "longrope":
        return _longrope(config, rope, exponents, length)
    return plain, 1.0


def _context(config: ModelConfig, rope: Rope) -> int:
    """Tokens that the model was trained on, before its context was lengthened."""
    return rope.original_max_position_embeddings or config.max_position_embeddings


def _factor(config: ModelConfig, rope: Rope) -> float:
    """How many times longer the context has become."""
    return rope.factor or config.max_position_embeddings / _context(config, rope)


def _dynamic(config: ModelConfig, rope: Rope, exponents: Tensor, length: int) -> Tensor:
    """NTK-aware base that grows with the sequence beyond the trained context."""
    factor = _factor(config, rope)
    context = config.max_position_embeddings
    size = config.head_dim
    stretch = factor * max(length, context) / context - (factor - 1)
    base: float = rope.rope_theta * stretch ** (size / (size - 2))
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


def _yarn(config: ModelConfig, rope: Rope, plain: Tensor) -> tuple[Tensor, float]:
    """Interpolation by parts with an attention temperature. Source: YaRN (arXiv:2309.00071) §3."""
    size = config.head_dim
    factor = _factor(config, rope)
    context = _context(config, rope)

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


def _longrope(config: ModelConfig, rope: Rope, exponents: Tensor, length: int) -> tuple[Tensor, float]:
    """A divisor per dimension, one list within the original context and one beyond. Source: arXiv:2402.13753."""
    context = _context(config, rope)
    factor = _factor(config, rope)

    chosen = rope.long_factor if length > context else rope.short_factor
    divisors = torch.tensor(chosen, dtype=torch.float32)
    attention_factor = rope.attention_factor
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))
    return 1.0 / (divisors * rope.rope_theta**exponents), attention_factor
