"""Rotary position embedding and its scalings for longer contexts.

A pair of dimensions ``(i, i + H/2)`` of a head turns by ``position * frequency_i``. Source: RoFormer
(arXiv:2104.09864) eq. 34; the half-split pairing is Hugging Face's layout of the Llama weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_lora.model.config import ModelConfig, Rope
from lit_lora.model.ops import rotate, to_device, to_halves

__all__ = ["UNROTATED", "RopeTable", "inverse_frequencies", "rope_tables"]


class RopeTable(NamedTuple):
    """How one rotation turns the heads of some rows."""

    cosine: Tensor
    """(T, R/2) float32, of R rotated dimensions; with the attention factor of ``yarn`` and ``longrope``."""
    sine: Tensor
    """Likewise."""
    neighbors: bool = False
    """Dimensions ``2 i`` and ``2 i + 1`` turn together, not ``i`` and ``i + R/2``."""
    query_scale: Tensor | None = None
    """(T, 1, 1) float32, a factor of queries; ``None`` for 1."""

    def rotate(self, x: Tensor) -> Tensor:
        """(T, heads, H), turned."""
        return rotate(x, self.cosine, self.sine, self.neighbors)

    @property
    def tensors(self) -> list[Tensor]:
        """Those it consists of, in one order."""
        tensors = [self.cosine, self.sine, self.query_scale]
        return [tensor for tensor in tensors if tensor is not None]

    def map(self, change: Callable[[Tensor], Tensor]) -> RopeTable:
        """The same with all tensors changed."""
        scale = None if self.query_scale is None else change(self.query_scale)
        return self._replace(cosine=change(self.cosine), sine=change(self.sine), query_scale=scale)

    def halved(self, x: Tensor) -> Tensor:
        """(T, heads, H) queries or keys, with dimensions that turn together moved to ``i`` and ``i + R/2``."""
        return to_halves(x, 2 * self.cosine.shape[1]) if self.neighbors else x

    def without(self, rows: Tensor) -> RopeTable:
        """The same, but ``rows``, (T,) bool, stay as they are: cosine 1 and sine 0 turn nothing."""
        still = rows[:, None]
        return self._replace(cosine=self.cosine.masked_fill(still, 1.0), sine=self.sine.masked_fill(still, 0.0))


UNROTATED = RopeTable(torch.empty(0, 0), torch.empty(0, 0))
"""The table that turns no dimension of any row."""


def rope_tables(config: ModelConfig, positions: Tensor, lengths: Sequence[tuple[int, int]]) -> list[RopeTable]:
    """The table of each of a model's rotations, in the order of the config's ``ropes``.

    Args:
        config: The model's.
        positions: (T,) int64.
        lengths: For every sequence in turn, how many of the positions are its, and how long it is in all. ``dynamic``
            and ``longrope`` choose their frequencies by it.
    """
    tables = []
    for rope in config.ropes:
        frequencies, factor = _frequencies(config, rope, lengths)
        angles = positions.to(torch.float32)[:, None] * to_device(frequencies, positions.device)  # (T, R/2)
        query_scale = None
        if rope.llama_4_scaling_beta is not None:
            contexts = positions // _context(config, rope)
            query_scale = (1 + rope.llama_4_scaling_beta * torch.log1p(contexts.float()))[:, None, None]
        tables.append(
            RopeTable(angles.cos() * factor, angles.sin() * factor, config.block.rope_pairs == "neighbors", query_scale)
        )
    return tables


def _frequencies(config: ModelConfig, rope: Rope, lengths: Sequence[tuple[int, int]]) -> tuple[Tensor, float]:
    """Those of each row, (T or 1, R/2) float32, and the factor on cosine and sine."""
    if rope.rope_type not in ("dynamic", "longrope"):
        frequencies, factor = inverse_frequencies(config, rope)
        return frequencies[None], factor
    rows, factors = [], [1.0]
    for count, length in lengths:
        frequencies, factor = inverse_frequencies(config, rope, length)
        rows.append(frequencies.expand(count, -1))
        factors.append(factor)  # the same for all lengths
    return torch.cat(rows), factors[-1]


def inverse_frequencies(config: ModelConfig, rope: Rope, length: int = 0) -> tuple[Tensor, float]:
    """Rotation per position of each dimension pair, (R/2,) float32, and the factor on cosine and sine."""
    size = config.rotated(rope)
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
    size = config.rotated(rope)
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
    size = config.rotated(rope)
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
