"""Everything that memory and time of a run depend on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lit_lora.data.rows import Integers
from lit_lora.model import ModelConfig
from lit_lora.peft import Method
from lit_lora.quantize import QuantizeConfig
from lit_lora.train.config import TrainConfig
from lit_lora.train.optim.base import OptimizerConfig

__all__ = ["RowLengths", "Setup"]


@dataclass(frozen=True, eq=False)
class RowLengths:
    """The training rows as far as memory knows them."""

    token_counts: Integers
    target_counts: Integers
    """Learned tokens."""
    shared_prefix: int = 0
    """Tokens that all rows begin with, where a micro-batch computes them once."""

    def __len__(self) -> int:
        return len(self.token_counts)

    @classmethod
    def alike(cls, rows: int, tokens: int) -> RowLengths:
        """Rows of one length, learned whole: what is known without the data."""
        counts = np.full(rows, tokens, dtype=np.int64)
        return cls(counts, counts)

    def cut(self, longest: int) -> RowLengths:
        """The rows when none is longer than that."""
        counts, targets = self.token_counts.clip(max=longest), self.target_counts.clip(max=longest)
        return RowLengths(counts, targets, min(self.shared_prefix, longest - 1))


@dataclass(frozen=True)
class Setup:
    """Everything that memory and time of a run depend on."""

    shape: ModelConfig
    peft: Method
    train: TrainConfig
    optimizer: OptimizerConfig
    rows: RowLengths
    dtype: torch.dtype
    device: torch.device
    seed: int = 0
    quantize: QuantizeConfig | None = None
