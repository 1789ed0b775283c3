"""Telling one base model from another by values at a few places of a few matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["differing", "fingerprint"]


def fingerprint(base: Mapping[str, Tensor]) -> dict[str, Any]:
    """Values at eight places of up to eight matrices: told apart from another base, whatever its dtype."""
    matrices = sorted(name for name, tensor in base.items() if tensor.ndim == 2)
    chosen = [matrices[index * (len(matrices) - 1) // 7] for index in range(8)] if matrices else []
    return {name: _sample(base[name]) for name in dict.fromkeys(chosen)}


def differing(expected: Mapping[str, Any], base: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors of ``base`` that are not there or differ from the fingerprint ``expected``."""
    return [name for name, sample in expected.items() if name not in base or not _agree(sample, _sample(base[name]))]


def _sample(tensor: Tensor) -> dict[str, Any]:
    flat = tensor.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, 8, dtype=torch.float64).long()
    return {"shape": list(tensor.shape), "values": flat[places.to(flat.device)].tolist()}


def _agree(there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Equal but for the rounding of another dtype (bfloat16: 1 in 256)."""
    if list(there["shape"]) != here["shape"]:
        return False
    return all(abs(a - b) <= 1e-2 * abs(b) + 1e-6 for a, b in zip(here["values"], there["values"], strict=True))
