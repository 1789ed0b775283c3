"""Everything that memory and time of a run depend on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lit_lora.data.mixing import Mixture
from lit_lora.data.rows import Integers
from lit_lora.model import ModelConfig
from lit_lora.peft import Method
from lit_lora.quantize import QuantizeConfig
from lit_lora.train.config import TrainConfig
from lit_lora.train.optim.base import OptimizerConfig

__all__ = ["RowLengths", "Setup"]


@dataclass(frozen=True, eq=False)
class RowLengths:
    """The lengths of the training rows, which are all that memory and time depend on."""

    token_counts: Integers
    target_counts: Integers
    """Target tokens of each row."""
    shared_prefix: int = 0
    """Length of the prefix that all rows share; 0 if a micro-batch does not compute it only once."""
    mixture: Mixture | None = None
    """How the rows are drawn, if their data sets have weights."""

    def __len__(self) -> int:
        return len(self.token_counts)

    @classmethod
    def alike(cls, rows: int, tokens: int) -> RowLengths:
        """Rows of one length in which every token is a target, to estimate without the data."""
        counts = np.full(rows, tokens, dtype=np.int64)
        return cls(counts, counts)

    def cut(self, longest: int) -> RowLengths:
        """The rows cut to at most ``longest`` tokens."""
        counts = self.token_counts.clip(max=longest)
        targets = self.target_counts.clip(max=longest)
        return RowLengths(counts, targets, min(self.shared_prefix, longest - 1), self.mixture)


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
