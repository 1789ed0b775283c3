"""The values that codes stand for, and how codes are packed into bytes.

``NF4``: 16 quantiles of a standard normal distribution, scaled to [-1, 1], one of them 0; ``nf3`` and ``nf2``: 8 and 4
by the same rule. ``FP4``: sign, two exponent bits, one mantissa bit. ``int4``, ``int2``: integers from 0. ``DYNAMIC``:
256 values with an exponent of varying length, used for the scales of blocks. Source: QLoRA, arXiv:2305.14314, section 3
and appendix E; 8-bit approximations, arXiv:1511.04561; NF of other widths: LQ-LoRA, arXiv:2311.12023, appendix A.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

__all__ = ["NF4", "FP4", "DYNAMIC", "TABLES", "Table", "dynamic", "nearest_dynamic", "table"]

# _normal_quantiles(4) gives these to within 1e-7; existing NF4 checkpoints were written with exactly these digits.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_POSITIVE = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
FP4 = (*_FP4_POSITIVE, *(-value for value in _FP4_POSITIVE))


def _normal_quantiles(bits: int) -> tuple[float, ...]:
    """The NF values of ``bits``: equal steps of probability below 1/2, one step more above, scaled to [-1, 1]."""
    # The quantiles of 0 and 1 are infinite, so the outermost ones lie half a step further in: QLoRA takes the mean of
    # half a step of 16 and of 15, and LQ-LoRA keeps it for other widths.
    edge = 1 - (1 / 32 + 1 / 30) / 2
    half = 2 ** (bits - 1)
    below = [1 - edge + (edge - 0.5) * step / (half - 1) for step in range(half - 1)]
    above = [0.5 + (edge - 0.5) * step / half for step in range(1, half + 1)]

    normal = NormalDist()
    largest = normal.inv_cdf(edge)
    return tuple(normal.inv_cdf(probability) / largest for probability in [*below, 0.5, *above])


TABLES: dict[str, tuple[float, ...]] = {
    "nf4": NF4,
    "fp4": FP4,
    "nf3": _normal_quantiles(3),
    "nf2": _normal_quantiles(2),
    "int4": tuple(map(float, range(16))),
    "int2": tuple(map(float, range(4))),
}
"""The value of each code by type, in units of the block's scale."""


class Table:
    """A quantization type: the values of its codes, rounding to the nearest, and packing.

    Codes are packed one after the other, the first in the highest bits: two of 4 bits or four of 2 bits in a byte,
    eight of 3 bits in three bytes.

    Args:
        values: By code; 4, 8 or 16.
        device: Where the tensors are.
    """

    def __init__(self, values: tuple[float, ...], device: torch.device) -> None:
        self.values = torch.tensor(values, dtype=torch.float32, device=device)
        """(codes,) float32, by code."""
        self.bits = int(math.log2(len(values)))
        """Bits of a code."""
        order = torch.argsort(self.values, stable=True)
        ascending = self.values[order]
        self.midpoints = (ascending[:-1] + ascending[1:]) / 2
        """(codes - 1,) float32, ascending: where the nearest value changes."""
        self.order = order.to(torch.uint8)
        """(codes,) uint8: the code of each value in ascending order."""

        # Unpacking looks whole words up. Codes of 3 bits do not fill a byte: four of them make a word of 12 bits.
        self.word_bits = 12 if self.bits == 3 else 8
        words = torch.arange(2**self.word_bits, device=device)
        shifts = range(self.word_bits - self.bits, -1, -self.bits)
        mask = 2**self.bits - 1
        self.expanded = torch.stack([self.values[words >> shift & mask] for shift in shifts], dim=1)
        """(words, codes per word) float32: the values of the codes in every word."""

    def nearest(self, scaled: Tensor) -> Tensor:
        """Codes of numbers within [-1, 1], in their shape, uint8."""
        return self.order[torch.bucketize(scaled, self.midpoints, out_int32=True)]

    def pack(self, codes: Tensor) -> Tensor:
        """(n,) uint8 codes to (n * bits / 8, 1) uint8; n is a multiple of 8."""
        count = self.word_bits // self.bits
        groups = codes.view(-1, count).int()
        words = groups[:, 0].clone()
        for place in range(1, count):
            words = words << self.bits | groups[:, place]
        if self.word_bits == 12:  # two words to three bytes
            first, second = words.view(-1, 2).unbind(1)
            words = torch.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], dim=1)
        return words.to(torch.uint8).view(-1, 1)

    def unpack(self, packed: Tensor) -> Tensor:
        """The values of packed codes, (n * bits / 8,) uint8 to (n,) float32."""
        words = packed.int()
        if self.word_bits == 12:  # three bytes to two words
            first, second, third = words.view(-1, 3).unbind(1)
            words = torch.stack([first << 4 | second >> 4, (second & 15) << 8 | third], dim=1).view(-1)
        return self.expanded.index_select(0, words).view(-1)


@lru_cache(maxsize=8)
def table(name: str, device: torch.device) -> Table:
    """The table of a type in ``TABLES``."""
    return Table(TABLES[name], device)


def _dynamic() -> Tensor:
    """0, 1, and for i from 0 to 6 the midpoints of 2^i equal cells of [0.1, 1], times 10^(i - 6), with both signs."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        midpoints = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += midpoints.tolist()
        values += (-midpoints).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


DYNAMIC = _dynamic()


@lru_cache(maxsize=4)
def dynamic(device: torch.device) -> Tensor:
    """``DYNAMIC`` on a device."""
    return DYNAMIC.to(device)


@lru_cache(maxsize=4)
def _dynamic_grid(device: torch.device) -> Tensor:
    """(65536,) uint8: the code nearest to each point of an even grid over [-1, 1]."""
    points = torch.arange(65536, dtype=torch.float32) / 32767.5 - 1
    midpoints = (DYNAMIC[:-1] + DYNAMIC[1:]) / 2
    return torch.bucketize(points, midpoints).to(torch.uint8).to(device)


def nearest_dynamic(x: Tensor) -> Tensor:
    """Codes into ``DYNAMIC`` of numbers within [-1, 1], in their shape, uint8.

    Numbers are first rounded to 16 bits, as in bitsandbytes' CPU kernel, so that the codes are the same bit for bit.
    """
    points = ((x + 1) * 32767.5 + 0.5).to(torch.int32).clamp_(0, 65535)
    return _dynamic_grid(x.device)[points]
