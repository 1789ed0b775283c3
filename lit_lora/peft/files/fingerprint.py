"""A fingerprint of a base model: values at a few positions of a few matrices, to recognize it by."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from lit_lora.peft.core.base_tensors import Base

__all__ = ["differing", "fingerprint"]


def fingerprint(base: Base, left_out: Collection[str] = ()) -> dict[str, Any]:
    """Values at eight positions of up to eight matrices, spread evenly over the model and over each matrix.

    Args:
        base: The base's tensors.
        left_out: Tensors not to use.
    """
    matrices = sorted(name for name in base if len(base.shape(name)) == 2 and name not in left_out)
    if not matrices:
        return {}
    last = len(matrices) - 1
    chosen = dict.fromkeys(matrices[index * last // 7] for index in range(8))  # fewer than eight are chosen once each
    return {name: _sample(base, name) for name in chosen}


def differing(expected: Mapping[str, Any], base: Base) -> list[str]:
    """Names of the tensors in a fingerprint that ``base`` lacks or has with other values.

    If a tensor is quantized in only one of the two, only its shape is compared.
    """
    return [name for name, sample in expected.items() if name not in base or not _agree(sample, base, name)]


def _sample(base: Base, name: str) -> dict[str, Any]:
    tensor = base[name].detach()
    flat = tensor.reshape(-1)
    positions = torch.linspace(0, flat.numel() - 1, 8, dtype=torch.float64).long()
    sample: dict[str, Any] = {"shape": list(tensor.shape), "values": flat[positions.to(flat.device)].tolist()}
    if base.quantized(name):
        sample["quantized"] = True
    return sample


def _agree(expected: Mapping[str, Any], base: Base, name: str) -> bool:
    """Whether a tensor has the expected shape and values, up to rounding to another dtype (bfloat16: 1 in 256)."""
    if tuple(expected["shape"]) != base.shape(name):
        return False
    if expected.get("quantized", False) != base.quantized(name):
        return True
    values = _sample(base, name)["values"]
    return all(abs(a - b) <= 1e-2 * abs(b) + 1e-6 for a, b in zip(values, expected["values"], strict=True))
