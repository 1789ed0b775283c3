"""One call of the loop: its pieces, its progress, and what one optimizer step does."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_lora import log
from lit_lora.errors import InputError, NumericalError
from lit_lora.train.objectives.base import Batch, Objective
from lit_lora.train.optim.build import build_optimizer
from lit_lora.train.optim.master_weights import MasterWeights
from lit_lora.train.run import TrainingData, TrainingRun
from lit_lora.train.run_log import RunLog
from lit_lora.train.state import CheckpointStore
from lit_lora.train.validation import check_best_metric, validate

__all__ = ["Trainer"]


@dataclass
class _Progress:
    """What changes while training and must survive a stop."""

    step: int = 0
    best_step: int | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    waited: int = 0
    loss_scale: float = 1.0
    good_steps: int = 0
    bad_steps: int = 0
    """Consecutive steps that were skipped because a loss or gradient was not finite."""

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "step"}


_FIRST_LOSS_SCALE = 2.0**14
"""Of float16 models: small gradients would be rounded to 0, so the loss is scaled up, and the gradients down again."""

_GROW_AFTER = 200
"""Good steps until a larger loss scale is tried."""

_MOST_BAD_STEPS = 3
"""Consecutive bad steps that end a run."""


class Trainer:
    """One call of :func:`fit`: the pieces and the progress, so that each phase is a short method."""

    def __init__(
        self,
        run: TrainingRun,
        model: Any,
        data: TrainingData,
        objective: Objective,
        lr_factors: Mapping[str, float] | None,
    ) -> None:
        check_best_metric(run.train, objective)
        self.run, self.config = run, run.train
        self.model = model
        self.batches = data.batches
        self.validation = data.validation
        self.objective = objective
        self.master_weights = MasterWeights(model)
        self.optimizer = build_optimizer(run.optimizer, self.master_weights, lr_factors)
        self.store = CheckpointStore(run.folder / "checkpoints", run.train.keep_last)
        self.steps_per_epoch = data.batches.steps_per_epoch
        self.total = run.train.total_steps(self.steps_per_epoch)
        self.device = next(model.parameters()).device
        self.half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
        self.progress = _Progress(loss_scale=_FIRST_LOSS_SCALE if self.half else 1.0)
        self.loss = math.nan
        self.fingerprint = data.batches.rows.fingerprint
        self.validation_fingerprint = data.validation_fingerprint

    @property
    def out_of_patience(self) -> bool:
        """Whether too many consecutive validations brought no improvement."""
        return self.config.patience is not None and self.progress.waited >= self.config.patience

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.progress.step >= self.total or self.out_of_patience

    def resume(self, step: int) -> None:
        """Continue after a checkpoint.

        Raises:
            InputError: The checkpoint is broken or of another run, or the training rows are not the same.
        """
        state = self.store.load(step, self.master_weights, self.optimizer)
        if state.get("rows") != self.fingerprint:
            raise InputError(
                f"{self.run.folder}: the training rows are not those that the run started with: the data or its "
                "tokenizer has changed",
                hint="restore the data, or start a new run in another folder",
            )
        # Older checkpoints do not say what they were measured on.
        if state.get("validation_rows", self.validation_fingerprint) != self.validation_fingerprint:
            raise InputError(
                f"{self.run.folder}: the validation rows are not those that the run started with, so its best step "
                "cannot be compared with those to come",
                hint="restore the validation rows, or start a new run in another folder",
            )
        if "best_figures" in state:  # what metrics were called in older checkpoints
            state["best_metrics"] = state.pop("best_figures")
        self.progress = _Progress(**{key: value for key, value in state.items() if key in vars(self.progress)})

    def train_step(self, run_log: RunLog) -> str:
        """One optimizer step; returns its loss and speed in words.

        Raises:
            NumericalError: The loss or a gradient is not finite in the third consecutive step; it is recorded first.
        """
        started = time.perf_counter()
        step = self.progress.step
        # Dropout of a step draws the same numbers in a resumed run, and whatever validation has drawn before.
        torch.manual_seed(_mixed(self.run.seed, step))
        lr = self.run.optimizer.lr * self.run.schedule.factor(step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]

        # Every micro-batch is divided by the targets of the whole step, so the loss does not depend on how it is split.
        micro_batches = list(self.batches.step(step))
        targets = sum(self.objective.count(batch) for batch in micro_batches)
        scale = self.progress.loss_scale / max(targets, 1)
        sums = [self.objective.backward(self.model, batch, scale) for batch in micro_batches]
        scaled_norm = self._gradient_norm()

        # Reading a number waits for the GPU, so nothing is read before all of its work is queued.
        losses = [float(loss) for loss in sums]
        norm = float(scaled_norm) / self.progress.loss_scale
        self.loss = sum(losses) / max(targets, 1)
        problem = self._update(micro_batches, losses, norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1

        tokens = sum(sum(batch.lengths) for batch in micro_batches)
        speed = tokens / (time.perf_counter() - started)
        values = {"loss": self.loss, "lr": lr, "grad_norm": norm, "tokens": tokens, "targets": targets}
        run_log.record(step + 1, **values, tokens_per_second=speed)
        if problem is not None:
            self._skip(problem)
        return f"loss {self.loss:.3f}, {speed:.0f} tok/s"

    def _update(self, micro_batches: Sequence[Batch], losses: Sequence[float], norm: float) -> str | None:
        """Move the parameters by the gradients, if these and the losses are finite.

        Returns:
            What went wrong, in words; ``None`` if nothing did, or a smaller loss scale may help.
        """
        finite_losses = all(map(math.isfinite, losses))
        if finite_losses and math.isfinite(norm):
            self._clip(norm)
            self.optimizer.step()
            self.master_weights.copy_to_model()
            self._grow_scale()
            self.progress.bad_steps = 0
            return None

        if finite_losses and self.progress.loss_scale > 1:
            # Gradients beyond the range of float16: skip this step, and scale less from now on.
            self.progress.loss_scale /= 2
            self.progress.good_steps = 0
            self.progress.bad_steps += 1
            return None

        return self._not_finite(micro_batches, losses, norm)

    def _gradients(self) -> list[Tensor]:
        return [master.grad for master in self.master_weights.masters.values() if master.grad is not None]

    def _gradient_norm(self) -> Tensor:
        """The norm of the whole gradient, still multiplied by the loss scale."""
        gradients = self._gradients()
        return nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())

    def _clip(self, norm: float) -> None:
        """Divide the gradients by the loss scale and clip them, in place; ``norm`` is theirs without the scale."""
        factor = 1.0 / self.progress.loss_scale
        if self.config.max_grad_norm is not None:
            factor *= min(1.0, self.config.max_grad_norm / (norm + 1e-6))
        gradients = self._gradients()
        if gradients and factor != 1.0:
            torch._foreach_mul_(gradients, factor)

    def _grow_scale(self) -> None:
        self.progress.good_steps += 1
        if self.half and self.progress.good_steps % _GROW_AFTER == 0:
            self.progress.loss_scale *= 2

    def _skip(self, problem: str) -> None:
        """Continue with the weights as they were: one bad row is no reason to lose a night.

        Raises:
            NumericalError: It is the third consecutive bad step, or all steps of a shorter run were bad.
        """
        self.progress.bad_steps += 1
        if self.progress.bad_steps < min(_MOST_BAD_STEPS, self.total):
            log.warn(f"skipped {problem}")
            return
        raise NumericalError(
            problem,
            hint=f"{self.progress.bad_steps} consecutive steps were skipped; inspect their rows, lower optimizer.lr, "
            f"or use model.dtype bf16 or fp32; {self.store.kept()}",
        )

    def _not_finite(self, micro_batches: Sequence[Batch], losses: Sequence[float], norm: float) -> str:
        """What went wrong in words: the numbers, the first parameter, and the rows."""
        where = ""
        for name, master in self.master_weights.masters.items():
            if master.grad is not None and not bool(master.grad.isfinite().all()):
                where = f", first in the gradient of {name}"
                break

        # The rows of the micro-batches with a bad loss; where only the gradient is bad, it may be any.
        with_loss = zip(micro_batches, losses, strict=True)
        bad = [batch for batch, loss in with_loss if not math.isfinite(loss)] or micro_batches
        sources = [self.batches.rows[row].source for batch in bad for row in batch.rows]
        return (
            f"step {self.progress.step + 1}: loss {self.loss:.4f} and gradient norm {norm:.4g} are not finite{where}; "
            f"the step's rows: {_some(sources)}"
        )

    def validate(self, run_log: RunLog) -> None:
        """Validate the current weights, record loss and metrics, and remember the best trained weights.

        Raises:
            NumericalError: The loss is not finite.
        """
        progress = self.progress
        metrics = validate(self.model, self.validation, self.objective)
        run_log.record(progress.step, **{f"validation_{name}": value for name, value in metrics.items()})
        loss = metrics["loss"]
        if not math.isfinite(loss):
            remedy = "use model.dtype bf16 or fp32"
            if progress.step > 0:
                remedy = f"lower optimizer.lr, or {remedy}"
            raise NumericalError(
                f"step {progress.step}: the validation loss {loss} is not finite",
                hint=f"{remedy}; {self.store.kept()}",
            )
        shown = ", ".join(f"validation {name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items())
        if progress.step == 0:
            log.note(f"before training: {shown}")
            return
        log.note(f"step {progress.step} of {self.total}: loss {self.loss:.4f}, {shown}")
        if not progress.best_metrics or self._rank(metrics) > self._rank(progress.best_metrics):
            progress.best_metrics = metrics
            progress.best_step = progress.step
            progress.waited = 0
        else:
            progress.waited += 1

    def _rank(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        """Larger for better weights; between equal metrics the lower loss decides."""
        negative_loss = -metrics["loss"]
        if self.config.best_metric == "loss":
            return (negative_loss,)
        return metrics[self.config.best_metric], negative_loss

    def save(self) -> None:
        """Write a checkpoint of the current step."""
        state = {
            **self.progress.to_json(),
            "rows": self.fingerprint,
            "validation_rows": self.validation_fingerprint,
        }
        self.store.save(self.progress.step, self.master_weights, self.optimizer, state)


def _mixed(seed: int, step: int) -> int:
    """32 random bits of both: the CPU's generator uses no more of a seed."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def _some(names: Iterable[str], most: int = 8) -> str:
    """The first of them, separated by commas, and how many more there are."""
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
