"""What llama.cpp does to a tensor beyond renaming it, each operation with its inverse.

A :class:`TensorOp` turns one Hugging Face tensor into one or more GGUF tensors and back. It moves numbers around; only
``ONE_ADDED`` and ``MINUS_EXP`` compute, on vectors and small matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "GATE_UP_HALVES",
    "GATE_UP_INTERLEAVED",
    "INPUT_FIRST",
    "LATENT_KEY_VALUE",
    "MINUS_EXP",
    "ONE_ADDED",
    "OUTPUT_LAST",
    "SAME",
    "WITHOUT_CHANNEL",
    "TensorOp",
    "fused_by_group",
    "in_pairs",
]

Config = Mapping[str, Any]


@dataclass(frozen=True)
class TensorOp:
    """One operation and its inverse.

    Attributes:
        to_gguf: From a Hugging Face tensor and the model's config, the GGUF tensors that hold it.
        to_hf: The inverse. The dtype stays; the tensors given may be returned as they are.
        computes: Whether values change, so that they must be float32 meanwhile.
    """

    to_gguf: Callable[[Tensor, Config], Sequence[Tensor]]
    to_hf: Callable[[Sequence[Tensor], Config], Tensor]
    computes: bool = False


def _one(to_gguf: Callable[[Tensor], Tensor], to_hf: Callable[[Tensor], Tensor], *, computes: bool = False) -> TensorOp:
    """An operation on one tensor that does not depend on the config."""
    return TensorOp(lambda tensor, _: [to_gguf(tensor)], lambda tensors, _: to_hf(tensors[0]), computes)


def in_pairs(heads: str) -> TensorOp:
    """Rows of a q or k projection, weight or bias: halves of a head side by side.

    Rotary embedding turns pairs of rows. Hugging Face pairs row i with row i + H / 2 of each head; llama.cpp pairs rows
    0 and 1, 2 and 3, … in the architectures that need this.

    Args:
        heads: The config's key with the number of heads.
    """

    def reorder(tensor: Tensor, config: Config, sizes: tuple[int, int]) -> Tensor:
        by_head = tensor.reshape(config[heads], *sizes, *tensor.shape[1:])
        return by_head.transpose(1, 2).reshape(tensor.shape)

    return TensorOp(
        lambda tensor, config: [reorder(tensor, config, (2, -1))],
        lambda tensors, config: reorder(tensors[0], config, (-1, 2)),
    )


def fused_by_group(heads: str, groups: Callable[[Config], int]) -> TensorOp:
    """A fused q, k and v projection, weight or bias, whose rows Hugging Face orders by key-value group.

    Each group has its queries, one key and one value. llama.cpp stores all queries, then all keys, then all values.

    Args:
        heads: The config's key with the number of query heads.
        groups: The number of key-value heads.
    """

    def to_gguf(tensor: Tensor, config: Config) -> list[Tensor]:
        queries = config[heads] // groups(config)  # per group
        by_group = tensor.reshape(groups(config), queries + 2, -1, *tensor.shape[1:])  # (G, queries + 2, H, …)
        parts = (by_group[:, :queries], by_group[:, queries], by_group[:, queries + 1])
        return [torch.cat([part.reshape(-1, *tensor.shape[1:]) for part in parts])]

    def to_hf(tensors: Sequence[Tensor], config: Config) -> Tensor:
        (tensor,) = tensors
        count = groups(config)
        head_size = tensor.shape[0] // (config[heads] + 2 * count)
        parts = torch.split(tensor, [config[heads] * head_size, count * head_size, count * head_size])
        by_group = [part.reshape(count, -1, *tensor.shape[1:]) for part in parts]
        return torch.cat(by_group, dim=1).reshape(tensor.shape)

    return TensorOp(to_gguf, to_hf)


def _interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """Columns of ``gate`` and ``up`` in turn."""
    return torch.stack([gate, up], dim=-1).flatten(-2)


def _latent_to_gguf(tensor: Tensor, config: Config) -> list[Tensor]:
    by_head = tensor.reshape(config["num_attention_heads"], -1, tensor.shape[-1])
    key, value = torch.split(by_head, [config["qk_nope_head_dim"], config["v_head_dim"]], dim=1)
    return [key.transpose(1, 2), value]


def _latent_to_hf(tensors: Sequence[Tensor], config: Config) -> Tensor:
    key, value = tensors
    return torch.cat([key.transpose(1, 2), value], dim=1).flatten(0, 1)


SAME = _one(lambda tensor: tensor, lambda tensor: tensor)
"""The tensor as it is."""

ONE_ADDED = _one(lambda weight: weight + 1, lambda weight: weight - 1, computes=True)
"""A norm that Hugging Face multiplies by ``1 + weight``, and llama.cpp by the sum that it stores."""

MINUS_EXP = _one(lambda log: -torch.exp(log), lambda stored: torch.log(-stored), computes=True)
"""The decay of a state space model, of which Hugging Face keeps the logarithm."""

INPUT_FIRST = _one(lambda weight: weight.T, lambda weight: weight.T)
"""A linear layer that Hugging Face stores as (in, out), as GPT-2 does."""

OUTPUT_LAST = _one(lambda weight: weight.swapaxes(1, 2), lambda weight: weight.swapaxes(1, 2))
"""Experts whose down projection Hugging Face stores as (experts, in, out)."""

WITHOUT_CHANNEL = _one(lambda weight: weight.squeeze(1), lambda weight: weight.unsqueeze(1))
"""A depthwise convolution: (channels, 1, kernel) in Hugging Face."""

GATE_UP_HALVES = TensorOp(
    lambda weight, _: weight.chunk(2, dim=1),
    lambda tensors, _: torch.cat(list(tensors), dim=1),
)
"""Experts' gate and up projections fused as (experts, gate rows then up rows, in)."""

GATE_UP_INTERLEAVED = TensorOp(
    lambda weight, _: [weight[..., ::2].swapaxes(1, -1), weight[..., 1::2].swapaxes(1, -1)],
    lambda tensors, _: _interleaved(*(tensor.swapaxes(1, -1) for tensor in tensors)),
)
"""gpt-oss's experts: gate and up in turn in the last dimension, (experts, in, 2 * out) or biases (experts, 2 * out)."""

LATENT_KEY_VALUE = TensorOp(_latent_to_gguf, _latent_to_hf)
"""DeepSeek's projection out of the latent: per head its key rows, stored transposed, and its value rows."""
