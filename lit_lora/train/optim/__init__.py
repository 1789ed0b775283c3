"""The optimizers, one file for each, and float32 masters of what trains.

``OPTIMIZERS`` is the table to read: one line for each name, and nothing is imported to read it.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_lora.train.optim.base import OptimizerConfig

__all__ = ["OPTIMIZERS", "optimizers"]

# `optimizer.name` -> "module:settings class"; the first is the default
OPTIMIZERS: dict[str, str] = {
    "adamw": "lit_lora.train.optim.adamw:AdamWConfig",
    "adamw8bit": "lit_lora.train.optim.adamw8bit:AdamW8bitConfig",
    "paged_adamw": "lit_lora.train.optim.paged:PagedAdamWConfig",
    "paged_adamw8bit": "lit_lora.train.optim.paged:PagedAdamW8bitConfig",
    "sgd": "lit_lora.train.optim.sgd:SGDConfig",
}


def optimizers() -> dict[str, type[OptimizerConfig]]:
    """The settings class of each optimizer, by name."""
    return {name: resolve_name(place) for name, place in OPTIMIZERS.items()}
