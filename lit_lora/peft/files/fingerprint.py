"""Telling one base model from another by values at a few places of a few matrices."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from lit_lora.peft.core.base_tensors import Base

__all__ = ["differing", "fingerprint"]


def fingerprint(base: Base, left_out: Collection[str] = ()) -> dict[str, Any]:
    """Values at eight places of up to eight matrices: told apart from another base, whatever its dtype."""
    matrices = sorted(name for name in base if len(base.shape(name)) == 2 and name not in left_out)
    chosen = [matrices[index * (len(matrices) - 1) // 7] for index in range(8)] if matrices else []
    return {name: _sample(base, name) for name in dict.fromkeys(chosen)}


def differing(expected: Mapping[str, Any], base: Base) -> list[str]:
    """Names of the tensors of ``base`` that are not there or differ from the fingerprint ``expected``.

    Of a tensor that was quantized there and is not here, or the other way round, only the shape is compared.
    """
    return [name for name, sample in expected.items() if name not in base or not _agree(sample, base, name)]


def _sample(base: Base, name: str) -> dict[str, Any]:
    tensor = base[name].detach()
    flat = tensor.reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, 8, dtype=torch.float64).long()
    sample = {"shape": list(tensor.shape), "values": flat[places.to(flat.device)].tolist()}
    return {**sample, "quantized": True} if base.quantized(name) else sample


def _agree(there: Mapping[str, Any], base: Base, name: str) -> bool:
    """Equal but for the rounding of another dtype (bfloat16: 1 in 256)."""
    if tuple(there["shape"]) != base.shape(name):
        return False
    if there.get("quantized", False) != base.quantized(name):
        return True
    here = _sample(base, name)
    return all(abs(a - b) <= 1e-2 * abs(b) + 1e-6 for a, b in zip(here["values"], there["values"], strict=True))
