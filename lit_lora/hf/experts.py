"""Mixtures of experts in transformers' models: all experts in one grouped product, and a form for the meta device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["EXPERTS", "register_experts"]

EXPERTS = "lit_lora"
"""The name of our function for experts in transformers."""


def register_experts() -> None:
    """Make our function for experts known to transformers; doing it again changes nothing."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _experts)


def _experts(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Hidden states (T, D), the experts of each token (T, k) and their weights (T, k) -> (T, D)."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    if hidden.is_meta:
        return _on_paper(module, hidden, chosen, weights)
    out: Tensor = grouped_mm_experts_forward(module, hidden, chosen, weights)
    return out


def _on_paper(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The same shapes and work without values, as if one expert had all tokens."""
    # A grouped product, which takes only bfloat16 there, would do the same work.
    experts_per_token = chosen.shape[-1]

    def product(rows: Tensor, name: str) -> Tensor:
        weight: Tensor = getattr(module, name)[0]
        out = rows @ (weight if module.is_transposed else weight.T)
        return out + getattr(module, f"{name}_bias")[0] if module.has_bias else out

    rows = hidden.repeat_interleave(experts_per_token, 0)  # (T · k, D)
    if module.has_gate:
        inner = module._apply_gate(product(rows, "gate_up_proj"))
    else:
        inner = module.act_fn(product(rows, "up_proj"))
    out = product(inner, "down_proj") * weights.reshape(-1, 1).to(hidden.dtype)
    total: Tensor = out.view(len(hidden), experts_per_token, -1).sum(1)
    return total
