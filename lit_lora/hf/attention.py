"""The one attention function that transformers' models call when they are hosted.

transformers lets a program register an attention function by name. As no mask function has this name, it builds no
masks; windows, soft caps, scales and sinks arrive as arguments. What the tokens are, packed documents or new tokens of
a cache, is known to the ``Attend`` of the pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from lit_lora.model.attention.attend import Attend, LayerAttention
from lit_lora.model.ops import attention

__all__ = ["ATTENTION", "ON_PAPER", "attending", "current", "register_attention"]

ATTENTION = "lit_lora"
"""The name of our attention function in transformers."""

ON_PAPER = "lit_lora_on_paper"
"""The name under which transformers builds masks without values, for models that cannot do without a mask."""

_ATTEND: ContextVar[Attend | None] = ContextVar("_ATTEND", default=None)


@contextmanager
def attending(attend: Attend | None) -> Iterator[None]:
    """Inside the block, the layers of hosted models attend by ``attend``."""
    token = _ATTEND.set(attend)
    try:
        yield
    finally:
        _ATTEND.reset(token)


def current() -> Attend | None:
    """How the layers attend now; ``None`` outside a pass with attention of ours."""
    return _ATTEND.get()


def register_attention() -> None:
    """Make our attention function known to transformers; doing it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionMaskInterface.register(ON_PAPER, _mask_on_paper)
    AttentionInterface.register(ATTENTION, _attention)


def _mask_on_paper(
    batch_size: int, q_length: int, kv_length: int, dtype: torch.dtype = torch.float32, **_: Any
) -> Tensor:
    """A mask (B, 1, T, S) on the meta device."""
    return torch.empty(batch_size, 1, q_length, kv_length, dtype=dtype, device="meta")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Queries (1, N, T, H), keys (1, K, T, H) and values (1, K, T, H'), rotated by the model, -> (1, T, N, H')."""
    attend = _ATTEND.get()
    if attend is None and query.is_meta:  # rows of documents without values
        return attention(query, key, value, causal=True).transpose(1, 2), None
    if attend is None or attention_mask is not None or others.get("position_bias") is not None:
        raise NotImplementedError("the model calls attention in a way that is not packed")
    layer = LayerAttention(
        index=int(module.layer_idx),  # type: ignore[arg-type]
        window=sliding_window,
        scale=scaling,
        softcap=softcap,
        rope=None,  # the model has rotated queries and keys
        sinks=s_aux,
    )
    rows = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # (T, heads, H)
    return attend(layer, *rows)[None], None
