"""The values that codes stand for.

``NF4``: 16 quantiles of a standard normal distribution, scaled to [-1, 1], one of them 0. ``FP4``: sign, two exponent
bits, one mantissa bit. ``DYNAMIC``: 256 values whose exponent takes a changing number of bits, which scales of blocks
are stored in. Source: QLoRA, arXiv:2305.14314, section 3 and appendix E; 8-bit approximations, arXiv:1511.04561.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["NF4", "FP4", "DYNAMIC", "Table", "nearest_dynamic", "table"]

# The construction from quantiles gives these to 1e-7; the digits are those that every NF4 checkpoint was written with.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_POSITIVE = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
FP4 = (*_FP4_POSITIVE, *(-value for value in _FP4_POSITIVE))


class Table:
    """The 16 values of a code, and how a number finds the nearest.

    Args:
        values: By code.
        device: Where the tensors are.
    """

    def __init__(self, values: tuple[float, ...], device: torch.device) -> None:
        self.values = torch.tensor(values, dtype=torch.float32, device=device)
        """(16,) float32, by code."""
        order = torch.argsort(self.values, stable=True)
        ascending = self.values[order]
        self.midpoints = (ascending[:-1] + ascending[1:]) / 2
        """(15,) float32, ascending: between neighbours."""
        self.order = order.to(torch.uint8)
        """(16,) uint8: the code of each value in ascending order."""
        pairs = torch.arange(256, device=device)
        self.pairs = torch.stack([self.values[pairs >> 4], self.values[pairs & 15]], dim=1)
        """(256, 2) float32: the two values of a byte."""


@lru_cache(maxsize=8)
def table(name: str, device: torch.device) -> Table:
    """The table of ``nf4`` or ``fp4``."""
    return Table({"nf4": NF4, "fp4": FP4}[name], device)


def _dynamic() -> Tensor:
    """For i of 0 to 6: the middles of 2^i equal cells of [0.1, 1], times 10^(i - 6), of both signs; 0 and 1."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)


DYNAMIC = _dynamic()


@lru_cache(maxsize=4)
def _dynamic_grid(device: torch.device) -> Tensor:
    """(65536,) uint8: the nearest code of each place of an equal grid over [-1, 1]."""
    places = torch.arange(65536, dtype=torch.float32) / 32767.5 - 1
    return torch.bucketize(places, (DYNAMIC[:-1] + DYNAMIC[1:]) / 2).to(torch.uint8).to(device)


def nearest_dynamic(x: Tensor) -> Tensor:
    """Codes into ``DYNAMIC`` of numbers within [-1, 1], of the same shape, uint8.

    They are first rounded to 16 bits, as bitsandbytes' kernel for CPUs does, so that codes are equal bit for bit.
    """
    places = ((x + 1) * 32767.5 + 0.5).to(torch.int32).clamp_(0, 65535)
    return _dynamic_grid(x.device)[places]
