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

from torch import Tensor, nn

from lit_lora.model.attention.attend import Attend, LayerAttention

__all__ = ["ATTENTION", "attending", "current", "register"]

ATTENTION = "lit_lora"
"""The name of our attention function in transformers."""

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


def register() -> None:
    """Make our attention function known to transformers; doing it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)


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
