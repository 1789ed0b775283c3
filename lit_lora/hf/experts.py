"""Mixtures of experts in transformers' models: all experts in one grouped product, and a form for the meta device.

Quantized experts are computed by our own function, which dequantizes them one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from lit_lora.model.moe import ExpertLayer, Experts, run_experts

__all__ = ["EXPERTS", "ExpertLayers", "expert_layers", "expert_stacks", "register_experts"]

EXPERTS = "lit_lora"
"""The name of our function for experts in transformers."""


def register_experts() -> None:
    """Make our function for experts known to transformers; doing it again changes nothing."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _experts)


def _experts(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Hidden states (T, D), the experts of each token (T, k) and their weights (T, k) -> (T, D)."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    experts = expert_layers(module)
    if experts is not None and experts.are_stacks:
        first, second = experts.layers.values()
        return run_experts(hidden, chosen, weights, first, second, experts.activate)
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


class ExpertLayers(NamedTuple):
    """What experts compute."""

    layers: dict[str, ExpertLayer]
    """First and second layer, by the names of their weights."""
    activate: Callable[[Tensor], Tensor]
    """What comes between."""

    @property
    def are_stacks(self) -> bool:
        """Whether their matrices are made on use."""
        return not all(isinstance(layer.weight, Tensor) for layer in self.layers.values())


def expert_layers(module: Any) -> ExpertLayers | None:
    """What a module's experts compute, if they are of a kind that :func:`run_experts` can compute."""
    if isinstance(module, Experts):
        return ExpertLayers(module.layers(), module.activate)

    # transformers' experts interface, transformers/integrations/moe.py, gives a module these attributes.
    if not hasattr(module, "_is_expert_parallel") or module.has_post_expert_norm:
        return None
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    layers = {
        name: ExpertLayer(
            getattr(module, name),
            module.get_parameter(f"{name}_bias") if module.has_bias else None,
            bool(module.is_transposed),
        )
        for name in names
    }
    return ExpertLayers(layers, module._apply_gate if module.has_gate else module.act_fn)


def expert_stacks(model: nn.Module) -> list[str]:
    """Names of the weights of experts to quantize; experts that transformers computes by itself stay as they are."""
    names = []
    for name, module in model.named_modules():
        # A part of a model may keep its own function.
        is_ours = isinstance(module, Experts) or _implementation(module) == EXPERTS
        experts = expert_layers(module) if is_ours else None
        if experts is not None:
            names += [f"{name}.{layer}" for layer in experts.layers]
    return names


def _implementation(module: nn.Module) -> str | None:
    """Which function a module's experts are computed by, as transformers' config says."""
    return getattr(getattr(module, "config", None), "_experts_implementation", None)
