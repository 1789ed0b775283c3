"""What the settings of every optimizer have: a learning rate, and what a run asks of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lit_lora import log
from lit_lora.config import Settings

__all__ = ["OptimizerConfig"]

_FORMER_DEFAULTS: dict[str, Any] = {"betas": [0.9, 0.999], "eps": 1e-8, "momentum": 0.0}


class OptimizerConfig(Settings):
    """Settings of one optimizer, from which it is built."""

    name: str = Field("", description="The optimizer.")
    lr: float = Field(
        2e-4,
        gt=0,
        description="Peak learning rate; a method may bring its own. 1e-4…1e-3 where few weights train, 1e-5…5e-5 "
        "where all do.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay, on matrices only.")

    smaller_state: ClassVar[str | None] = None
    """The optimizer that gives nearly the same results with less state, and takes the same settings."""
    cpu_time_of: ClassVar[str | None] = None
    """The optimizer whose step takes as long on a CPU; ``None`` where that is little beside a micro-batch."""

    @model_validator(mode="before")
    @classmethod
    def _drop_former_defaults(cls, data: Any) -> Any:
        """Without options of other optimizers at their defaults, which the config in an older run folder lists."""
        if not isinstance(data, dict):
            return data
        foreign = {key: value for key, value in _FORMER_DEFAULTS.items() if key not in cls.model_fields}
        idle = [key for key, value in foreign.items() if data.get(key) == value]
        for key in idle:
            log.note(f"config: optimizer.{key} is not an option of {cls.model_fields['name'].default}, ignored")
        return {key: value for key, value in data.items() if key not in idle}

    @abstractmethod
    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over ``groups`` of float32 tensors.

        Args:
            groups: Each with ``params``, and its own ``lr`` and ``weight_decay``.

        Raises:
            UsageError: This machine lacks what the optimizer needs.
        """

    @abstractmethod
    def state_bytes(self, masters: Iterable[Tensor]) -> int:
        """Bytes of state that the optimizer keeps for ``masters`` from its first step on."""
