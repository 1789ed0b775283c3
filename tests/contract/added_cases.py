"""Settings of the methods that add modules, for the tests over the table."""

from __future__ import annotations

ADDED = {
    "houlsby": {"name": "houlsby", "bottleneck": 6, "init_std": 0.02},
    "houlsby zero": {"name": "houlsby", "bottleneck": 6, "init_zero": True, "train_norms": False},
    "houlsby mlp linear": {"name": "houlsby", "target_modules": ["mlp"], "activation": "none"},
    "houlsby drop": {"name": "houlsby", "drop_layers": 1},
    "houlsby random": {"name": "houlsby", "drop_layers": "random", "train_norms": False},
    "lin": {"name": "lin", "bottleneck": 6},
    "lin zero": {"name": "lin", "bottleneck": 6, "init_zero": True, "task_embedding": False},
    "parallel": {"name": "parallel", "bottleneck": 6},
    "prefix": {"name": "prefix", "num_virtual_tokens": 3},
    "prefix text": {"name": "prefix", "num_virtual_tokens": 5, "init_text": [4, 8, 15]},
    "prefix random": {"name": "prefix", "num_virtual_tokens": 3, "init": "random"},
    "prefix zeros": {"name": "prefix", "num_virtual_tokens": 3, "init": "zeros"},
    "prefix projection": {"name": "prefix", "num_virtual_tokens": 3, "prefix_projection": True},
    "prompt": {"name": "prompt", "num_virtual_tokens": 4},
    "prompt text": {"name": "prompt", "num_virtual_tokens": 4, "init_text": [4, 8, 15]},
    "prompt random": {"name": "prompt", "num_virtual_tokens": 4, "init": "random"},
    "p-tuning": {"name": "p-tuning", "num_virtual_tokens": 4},
    "p-tuning template": {"name": "p-tuning", "template": [2, [7, 9], 1, [3]], "encoder": "mlp"},
    "llama-adapter": {"name": "llama-adapter", "adapter_len": 3, "adapter_layers": 2},
    "llama-adapter tanh": {"name": "llama-adapter", "adapter_len": 3, "adapter_layers": 1, "tanh": True},
    "llama-adapter per layer": {"name": "llama-adapter", "adapter_len": 3, "gate": "per-layer"},
    "llama-adapter-v2": {"name": "llama-adapter-v2", "adapter_len": 3, "adapter_layers": 1},
    "composed": {
        "name": "composed",
        "methods": [{"name": "lora", "rank": 2}, {"name": "prefix", "num_virtual_tokens": 3}],
    },
    "composed adapters": {
        "name": "composed",
        "methods": [
            {"name": "lora", "rank": 2, "modules_to_save": ["model.norm", "input_layernorm"]},
            {"name": "parallel", "bottleneck": 4},
            {"name": "llama-adapter", "adapter_len": 3},
        ],
    },
    "composed three": {
        "name": "composed",
        "methods": [
            {"name": "houlsby", "bottleneck": 4, "init_std": 0.02},
            {"name": "lin", "bottleneck": 4},
            {"name": "prompt", "num_virtual_tokens": 3, "init_text": [1, 2]},
        ],
    },
}
EXACT = {
    case
    for case in ADDED
    if case.startswith(("llama-adapter", "parallel", "composed adapters")) or case.endswith("zero")
}
"""These change nothing at first, bit for bit."""
NEAR = {case for case in ADDED if case.startswith(("houlsby", "lin"))} - EXACT
"""These change little at first; the others change at once."""
FOLDED = {"prefix projection", "p-tuning", "p-tuning template"}
"""Their file holds what a network gives, not the network."""
BEFORE = {case for case in ADDED if case.startswith(("prefix", "prompt", "p-tuning"))}
"""These put tokens before every document."""
FEW = BEFORE | {case for case in ADDED if case.startswith("llama-adapter")} - {"llama-adapter-v2"}
"""With so few numbers of a model so small, these learn a little of a batch."""
