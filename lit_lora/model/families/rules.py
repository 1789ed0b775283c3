"""How families that differ by more than data fill in fields of ``ModelConfig``: see ``Family.complete``.

Source: the config classes of transformers, by the name of the family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "every",
    "exaone4",
    "experts",
    "gemma",
    "gemma2",
    "gemma3",
    "hunyuan",
    "phi3",
    "qwen",
    "qwen2_moe",
    "qwen3_moe",
    "smollm3",
]

Fields = Mapping[str, Any]

SLIDING, FULL = "sliding_attention", "full_attention"


def every(step: int, fields: Fields) -> Fields:
    """Full attention in every ``step``-th layer and a window in the others, if ``config.json`` does not list them."""
    listed = fields.get("layer_types")
    return {"layer_types": listed or [FULL if (i + 1) % step == 0 else SLIDING for i in _layers(fields)]}


def _window(fields: Fields) -> Any:
    """The window, in families where a key of its own switches it on."""
    return fields.get("sliding_window") if fields.get("use_sliding_window") else None


def qwen(fields: Fields) -> Fields:
    """A window only if ``use_sliding_window`` says so, in layers from ``max_window_layers`` on."""
    window = _window(fields)
    first = fields.get("max_window_layers", 28)
    types = fields.get("layer_types") or [SLIDING if window and i >= first else FULL for i in _layers(fields)]
    return {"sliding_window": window, "layer_types": types}


def experts(fields: Fields) -> Fields:
    """Two names of the number of experts are in use."""
    return {"num_experts": fields.get("num_local_experts", fields.get("num_experts"))}


def qwen2_moe(fields: Fields) -> Fields:
    """A window in every other one of the first layers; biases of queries, keys and values by a key of its own."""
    window = _window(fields)
    last = fields.get("max_window_layers", 28)
    listed = fields.get("layer_types")
    types = listed or [SLIDING if window and i % 2 == 0 and i < last else FULL for i in _layers(fields)]
    bias = fields.get("qkv_bias", True)
    return {**experts(fields), "sliding_window": window, "layer_types": types, "attention_bias": bias}


def qwen3_moe(fields: Fields) -> Fields:
    """A window in all layers, if ``use_sliding_window`` says so."""
    window = _window(fields)
    return {**experts(fields), "sliding_window": window}


def gemma(fields: Fields) -> Fields:
    """Early files write ``gelu`` and mean its approximation by tanh."""
    return {"hidden_act": "gelu_pytorch_tanh"} if fields.get("hidden_act") == "gelu" else {}


def gemma2(fields: Fields) -> Fields:
    """A window in every other layer; its own name of the activation."""
    return {**every(2, fields), "hidden_act": fields.get("hidden_activation")}


def gemma3(fields: Fields) -> Fields:
    """A window in most layers; its own name of the activation."""
    step = fields.get("sliding_window_pattern", fields.get("_sliding_window_pattern", 6))
    return {**every(step, fields), "hidden_act": fields.get("hidden_activation")}


def phi3(fields: Fields) -> Fields:
    """Early files call ``longrope`` by other names."""
    key = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    scaling = fields.get(key)
    if not isinstance(scaling, Mapping) or scaling.get("rope_type", scaling.get("type")) not in ("su", "yarn"):
        return {}
    return {key: {**scaling, "rope_type": "longrope"}}


def hunyuan(fields: Fields) -> Fields:
    """``alpha`` makes its ``dynamic`` rotation a static one of a larger base."""
    key = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    scaling = fields.get(key) or {}
    if scaling.get("rope_type", scaling.get("type")) != "dynamic" or not scaling.get("alpha"):
        return {}
    size = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    theta = scaling.get("rope_theta", fields.get("rope_theta", 10000.0)) * scaling["alpha"] ** (size / (size - 2))
    return {key: {"rope_type": "default", "rope_theta": theta}}


def smollm3(fields: Fields) -> Fields:
    """Every fourth layer, or those listed, has no rotation, and is the one that may have a window."""
    step = fields.get("no_rope_layer_interval", 4)
    rotated = fields.get("no_rope_layers") or [int((i + 1) % step != 0) for i in _layers(fields)]
    window = _window(fields)
    types = fields.get("layer_types") or [FULL if turned or not window else SLIDING for turned in rotated]
    return {"no_rope_layers": rotated, "sliding_window": window, "layer_types": types}


def exaone4(fields: Fields) -> Fields:
    """Layers with full attention have no rotation, unless all are such."""
    window = fields.get("sliding_window")
    types = fields.get("layer_types")
    if not types:
        types = [FULL] * len(_layers(fields))
        if window:
            types = every(fields.get("sliding_window_pattern", 4), fields)["layer_types"]
    return {"layer_types": types, "no_rope_layers": [int(not window or kind == SLIDING) for kind in types]}


def _layers(fields: Fields) -> range:
    """The indices of the layers; none where their number is missing, which validation will report."""
    count = fields.get("num_hidden_layers")
    return range(count if isinstance(count, int) else 0)
