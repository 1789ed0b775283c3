"""Length, micro-batches, validation and checkpoints of a run, as the config file gives them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from lit_lora.config import Settings, did_you_mean
from lit_lora.train.objectives import metric_names

__all__ = ["MetricName", "TrainConfig"]


def _measured(name: str) -> str:
    """The name, if some objective measures it; whether that of this run does is checked when it is known.

    Raises:
        ValueError: None does.
    """
    known = metric_names()
    if name not in known:
        raise ValueError(f"unknown metric {name!r}{did_you_mean(name, known)}, known: {', '.join(known)}")
    return name


MetricName = Annotated[
    str, AfterValidator(_measured), Field(json_schema_extra=lambda schema: schema.update(enum=metric_names()))
]
"""``loss``, or a metric of an objective of the table."""


def _steps_or_epoch(value: object) -> object:
    """The value, if it is an interval; a union of types alone would report one problem per type.

    Raises:
        ValueError: It is none.
    """
    is_steps = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if is_steps or value == "epoch" or value is None:
        return value
    raise ValueError(f"expected a number of steps, or epoch, got {value!r}")


Interval = Annotated[Annotated[int, Field(gt=0)] | Literal["epoch"] | None, BeforeValidator(_steps_or_epoch)]
"""Optimizer steps, or the end of every epoch."""


class TrainConfig(Settings):
    """Length, micro-batches, validation and checkpoints of a run."""

    renamed: ClassVar[Mapping[str, str]] = {"best_by": "best_metric"}

    epochs: float | None = Field(None, gt=0, description="Passes over the rows; 1 if max_steps is omitted too.")
    max_steps: int | None = Field(None, gt=0, description="Optimizer steps, instead of epochs.")
    batch_size: int = Field(8, gt=0, description="Rows per optimizer step.")
    micro_batch_tokens: int = Field(
        1024,
        gt=0,
        description="Tokens per micro-batch; the gradients of larger steps are accumulated. Changes memory and, on a "
        "GPU, speed (8192 or more if it fits), not results.",
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="Recompute activations in the backward pass: none, selective (MLPs) or full (whole layers). Less "
        "memory, slower, identical results.",
    )
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="Clip the gradient norm to this value; null for no clipping."
    )
    eval_every: Interval = Field(
        None, description="Steps between validations, or epoch; a tenth of the run if omitted."
    )
    eval_rows: int | None = Field(
        None, gt=0, description="Number of validation rows to measure, drawn with the seed; all if omitted."
    )
    save_every: Interval = Field(None, description="Steps between checkpoints, or epoch; eval_every if omitted.")
    keep_last: int = Field(1, gt=0, description="Number of newest checkpoints to keep, beside the best.")
    patience: int | None = Field(None, gt=0, description="Stop after this many validations without improvement.")
    best_metric: MetricName = Field(
        "loss",
        description="Validation metric that selects the best weights: loss, or one that the recipe measures. classify "
        "has accuracy, f1 and matthews for labels, pearson and spearman for numbers, exact_match for texts.",
    )
    samples: int = Field(1, ge=0, description="Validation prompts to answer at each validation, to watch it learn.")

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("give epochs or max_steps, not both; train.epochs=null removes those of a config")
        return self

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run, at least 1."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, math.ceil((self.epochs or 1) * steps_per_epoch))

    def eval_interval(self, total_steps: int, steps_per_epoch: int) -> int:
        """Steps between validations."""
        if self.eval_every == "epoch":
            return steps_per_epoch
        return self.eval_every or max(1, math.ceil(total_steps / 10))

    def save_interval(self, total_steps: int, steps_per_epoch: int) -> int:
        """Steps between checkpoints."""
        if self.save_every == "epoch":
            return steps_per_epoch
        return self.save_every or self.eval_interval(total_steps, steps_per_epoch)
