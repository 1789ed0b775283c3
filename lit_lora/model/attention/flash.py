"""Causal attention over packed documents on a GPU in half precision: one FlashAttention kernel for all documents.

PyTorch's public call of it (``torch.nn.attention.varlen``) does not let the backward be repeatable; its operators do.
Source: FlashAttention-2, arXiv:2307.08691.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_lora.model.attention.attend import LayerAttention
from lit_lora.model.attention.documents import Layout

__all__ = ["longest", "usable", "varlen_attention"]


def usable(layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the GPU has the kernel and it takes these tensors."""
    return (
        query.is_cuda
        and layer.fused
        and key.shape == value.shape
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def longest(layout: Layout) -> int:
    """A bound on the tokens of a document; a power of two, so that it stays the same for many layouts."""
    return max(128, 1 << (max(layout.lengths) - 1).bit_length())


def varlen_attention(layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """Attend within each document; the same bits in every run, the gradients too.

    Args:
        layer: Its window and scale.
        query: (T, N, H), rotated.
        key: (T, K, H), likewise.
        value: (T, K, H).
        layout: Of the documents.

    Returns:
        (T, N, H).
    """
    return _VarlenAttention.apply(query, key, value, layout, layer)  # type: ignore[no-untyped-call, no-any-return]


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, layer: LayerAttention) -> Tensor:
        documents, options = _documents(layout, query.device), _options(layer, layout)
        dropout, causal, return_mask = 0.0, True, False
        out, lse, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, *documents, dropout, causal, return_mask, **options
        )
        ctx.save_for_backward(query, key, value, out, lse, rng_state, unused)
        ctx.layout, ctx.layer = layout, layer
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, rng_state, unused = ctx.saved_tensors
        documents, options = _documents(ctx.layout, grad.device), _options(ctx.layer, ctx.layout)
        dropout, causal = 0.0, True
        with _repeatable():
            grads = torch.ops.aten._flash_attention_backward(
                grad, query, key, value, out, lse, *documents, dropout, causal, rng_state, unused, **options
            )
        return *grads, None, None


def _documents(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Where documents begin and how long the longest is, of queries and of keys."""
    starts, most = layout.on(device).starts, longest(layout)
    return starts, starts, most, most


def _options(layer: LayerAttention, layout: Layout) -> dict[str, Any]:
    """The kernel's keyword arguments that depend on the layer."""
    options: dict[str, Any] = {"scale": layer.scale}
    if layer.window is not None and layer.window < longest(layout):
        options |= {"window_size_left": layer.window - 1, "window_size_right": 0}  # tokens beside the one itself
    return options


@contextmanager
def _repeatable() -> Iterator[None]:
    """Inside the block, operators add in a fixed order.

    PyTorch's deterministic mode also fills every new tensor with NaN, which costs a pass over memory: not here.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch._C._get_deterministic_fill_uninitialized_memory()
    # The public setters would import torch.compile's packages, which takes seconds.
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    torch._C._set_deterministic_fill_uninitialized_memory(False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
        torch._C._set_deterministic_fill_uninitialized_memory(filled)
