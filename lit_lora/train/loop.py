"""The one training loop. It asks only what requires a gradient; it knows no method, no dataset and no model.

What the loss is, and what a validation measures, is the objective's: see ``objective``.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lit_lora import log
from lit_lora.config import Settings
from lit_lora.errors import InputError, Interrupted, NumericalError, UsageError
from lit_lora.train.device import peak_memory_bytes, report_lack_of_memory, reuse_memory
from lit_lora.train.objectives.next_token import Batch, Batches, NextToken, Objective
from lit_lora.train.optim.build import OptimizerConfig, Trainables, build_optimizer
from lit_lora.train.run_log import Metrics, plot_losses, read_metrics
from lit_lora.train.schedule import ScheduleConfig
from lit_lora.train.state import CheckpointStore

__all__ = ["Figure", "FitResult", "TrainConfig", "check_figures", "fit", "validate", "validation_loss"]


Figure = Literal["loss", "accuracy", "f1", "matthews", "pearson", "spearman", "exact_match"]


class TrainConfig(Settings):
    """How long and in what portions to train."""

    epochs: float | None = Field(None, gt=0, description="Passes over the rows; 1 when max_steps is not given either.")
    max_steps: int | None = Field(None, gt=0, description="Optimizer steps, instead of epochs.")
    batch_size: int = Field(8, gt=0, description="Rows per optimizer step.")
    micro_batch_tokens: int = Field(
        1024,
        gt=0,
        description="Tokens computed at once; larger steps are accumulated. Changes memory only; on a GPU also speed: "
        "8192 or more if it fits.",
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="Activations computed again in the backward instead of kept: none, the MLPs', whole layers'. "
        "Less memory, slower, the same results.",
    )
    max_grad_norm: float = Field(1.0, gt=0, description="The gradient is scaled down to this norm.")
    eval_every: int | None = Field(None, gt=0, description="Steps between validations; a tenth of the run by default.")
    save_every: int | None = Field(None, gt=0, description="Steps between checkpoints; as eval_every when omitted.")
    keep_last: int = Field(1, gt=0, description="Newest checkpoints kept, beside the best one.")
    patience: int | None = Field(None, gt=0, description="Stop after this many validations without a better one.")
    best_by: Figure = Field(
        "loss",
        description="Which figure of the validation picks the best weights: loss, or one that the recipe measures: "
        "classify has accuracy, f1 and matthews of labels, pearson and spearman of numbers, exact_match of texts.",
    )
    samples: int = Field(1, ge=0, description="Validation prompts answered at each validation, to watch it learn.")

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("give epochs or max_steps, not both; train.epochs=null takes the epochs of a config out")
        return self

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run, at least 1."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, math.ceil((self.epochs or 1) * steps_per_epoch))

    def eval_interval(self, total_steps: int) -> int:
        """Steps between validations."""
        return self.eval_every or max(1, math.ceil(total_steps / 10))


@dataclass
class FitResult:
    """What a run came to."""

    steps: int
    best_step: int
    loss: float | None
    """Training loss of the last step."""
    validation_loss: float | None
    """Of the weights that the model now has; ``None`` without validation rows."""
    untrained_validation_loss: float | None
    """Before the first step."""
    figures: dict[str, float]
    """What else the validation measured of these weights."""
    tokens: int
    """Tokens trained on in the whole run, prompts included."""
    seconds: float
    """Spent in training steps in the whole run."""
    peak_memory_bytes: int
    trainable: int
    """Numbers that train."""

    @property
    def tokens_per_second(self) -> float:
        """Training speed, without validation and saving."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class _Progress:
    """What changes while training and must survive a stop."""

    step: int = 0
    best_step: int | None = None
    best_figures: dict[str, float] = field(default_factory=dict)
    waited: int = 0
    loss_scale: float = 1.0
    good_steps: int = 0
    bad_steps: int = 0
    """In a row, left out because a loss or gradient was not finite."""

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "step"}


_FIRST_LOSS_SCALE = 2.0**14
_GROW_AFTER = 200
_MOST_BAD_STEPS = 3


class _Run:
    """One call of :func:`fit`: the pieces and the progress, so that each phase is a short method."""

    def __init__(
        self,
        model: Any,
        batches: Batches,
        validation: Sequence[Batch],
        config: TrainConfig,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        folder: Path,
        seed: int,
        lr_factors: Mapping[str, float] | None,
        objective: Objective,
    ) -> None:
        check_figures(config, objective)
        self.model, self.batches, self.config, self.objective = model, batches, config, objective
        self.schedule, self.seed, self.folder, self.lr = schedule, seed, folder, optimizer.lr
        self.trainables = Trainables(model)
        self.optimizer = build_optimizer(optimizer, self.trainables, lr_factors)
        self.store = CheckpointStore(folder / "checkpoints", config.keep_last)
        self.total = config.total_steps(batches.steps_per_epoch)
        self.device = next(model.parameters()).device
        self.validation = validation
        half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
        self.progress = _Progress(loss_scale=_FIRST_LOSS_SCALE if half else 1.0)
        self.half = half
        self.loss = math.nan
        self.fingerprint = batches.rows.fingerprint

    @property
    def out_of_patience(self) -> bool:
        """Whether too many validations in a row were no better."""
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
        state = self.store.load(step, self.trainables, self.optimizer)
        if state.get("rows") != self.fingerprint:
            raise InputError(
                f"{self.folder}: the training rows are not those that the run began with: the data or its tokenizer "
                "has changed",
                hint="put the data back as it was, or start a new run in another folder",
            )
        self.progress = _Progress(**{key: value for key, value in state.items() if key in vars(self.progress)})

    def train_step(self, metrics: Metrics) -> str:
        """One optimizer step; returns its loss and speed in words.

        Raises:
            NumericalError: The loss or a gradient is not finite for the third time in a row; it is recorded before.
        """
        started, step = time.perf_counter(), self.progress.step
        # Dropout of step n draws the same numbers in a resumed run and whatever validation drew before.
        torch.manual_seed(_mixed(self.seed, step))
        lr = self.lr * self.schedule.factor(step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        micro_batches = list(self.batches.step(step))
        targets = sum(self.objective.count(batch) for batch in micro_batches)
        scale = self.progress.loss_scale / max(targets, 1)
        sums = [self.objective.backward(self.model, batch, scale) for batch in micro_batches]
        norm_found = self._gradient_norm()
        losses = [float(loss) for loss in sums]  # only now: until here a GPU is never waited for
        norm, problem = float(norm_found) / self.progress.loss_scale, None
        if math.isfinite(norm):
            self._clip(norm)
        if math.isfinite(norm) and all(map(math.isfinite, losses)):
            self.optimizer.step()
            self.trainables.publish()
            self._grow_scale()
            self.progress.bad_steps = 0
        elif self.progress.loss_scale > 1 and all(map(math.isfinite, losses)):
            # float16 gradients beyond their range: leave this step out and scale less from now on.
            self.progress.loss_scale /= 2
            self.progress.good_steps = 0
            self.progress.bad_steps += 1
        else:
            problem = self._not_finite(micro_batches, losses, norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        tokens = sum(sum(batch.lengths) for batch in micro_batches)
        seconds = time.perf_counter() - started
        self.loss, speed = sum(losses) / max(targets, 1), tokens / seconds
        values = {"loss": self.loss, "lr": lr, "grad_norm": norm, "tokens": tokens, "targets": targets}
        metrics.record(step + 1, **values, tokens_per_second=speed)
        if problem is not None:
            self._leave_out(problem)
        return f"loss {self.loss:.3f}, {speed:.0f} tok/s"

    def _gradients(self) -> list[Tensor]:
        return [master.grad for master in self.trainables.masters.values() if master.grad is not None]

    def _gradient_norm(self) -> Tensor:
        """Of the whole gradient, with the loss scale in it."""
        gradients = self._gradients()
        return nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())

    def _clip(self, norm: float) -> None:
        """Undo the loss scale, and scale the gradient, whose norm then is ``norm``, down to ``max_grad_norm``."""
        factor = min(1.0, self.config.max_grad_norm / (norm + 1e-6)) / self.progress.loss_scale
        gradients = self._gradients()
        if gradients and factor != 1.0:
            torch._foreach_mul_(gradients, factor)

    def _grow_scale(self) -> None:
        self.progress.good_steps += 1
        if self.half and self.progress.good_steps % _GROW_AFTER == 0:
            self.progress.loss_scale *= 2

    def _leave_out(self, problem: str) -> None:
        """Go on with the weights as they were: one bad row is no reason to lose a night.

        Raises:
            NumericalError: It was the third time in a row, or there are no more steps than that.
        """
        self.progress.bad_steps += 1
        if self.progress.bad_steps < min(_MOST_BAD_STEPS, self.total):
            log.warn(f"left out {problem}")
            return
        raise NumericalError(
            problem,
            hint=f"left out in a row: {self.progress.bad_steps}; look at their rows, lower optimizer.lr, or use "
            "model.dtype bf16 or fp32; the last checkpoint is kept",
        )

    def _not_finite(self, micro_batches: Sequence[Batch], losses: Sequence[float], norm: float) -> str:
        """Which rows and which parameter went wrong."""
        bad = [batch.rows for batch, loss in zip(micro_batches, losses, strict=True) if not math.isfinite(loss)]
        rows = [row for rows in bad or [batch.rows for batch in micro_batches] for row in rows]
        names = [
            name
            for name, master in self.trainables.masters.items()
            if master.grad is not None and not bool(master.grad.isfinite().all())
        ]
        where = f", first in the gradient of {names[0]}" if names else ""
        return (
            f"step {self.progress.step + 1}: loss {sum(losses)} and gradient norm {norm} are not finite{where}; "
            f"the step's rows: {_some(self.batches.rows[row].source for row in rows)}"
        )

    def validate(self, metrics: Metrics) -> None:
        """Record loss and figures of the validation of the current weights, and remember the best trained ones.

        Raises:
            NumericalError: The loss is not finite.
        """
        figures, progress = validate(self.model, self.validation, self.objective), self.progress
        metrics.record(progress.step, **{f"validation_{name}": value for name, value in figures.items()})
        loss = figures["loss"]
        if not math.isfinite(loss):
            raise NumericalError(
                f"step {progress.step}: the validation loss {loss} is not finite",
                hint="lower optimizer.lr, or use model.dtype bf16 or fp32; the last checkpoint is kept",
            )
        shown = ", ".join(f"validation {name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())
        if progress.step == 0:
            log.note(f"before training: {shown}")
            return
        log.note(f"step {progress.step} of {self.total}: loss {self.loss:.4f}, {shown}")
        if not progress.best_figures or self._rank(figures) > self._rank(progress.best_figures):
            progress.best_figures, progress.best_step, progress.waited = figures, progress.step, 0
        else:
            progress.waited += 1

    def _rank(self, figures: Mapping[str, float]) -> tuple[float, ...]:
        """Larger for better weights; of equal figures the lower loss decides."""
        by, loss = self.config.best_by, -figures["loss"]
        return (loss,) if by == "loss" else (figures[by], loss)

    def save(self) -> None:
        """Write a checkpoint of the current step."""
        state = {**self.progress.to_json(), "rows": self.fingerprint}
        self.store.save(self.progress.step, self.trainables, self.optimizer, state)


def fit(
    model: Any,
    batches: Batches,
    config: TrainConfig,
    *,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    folder: Path,
    seed: int = 0,
    validation: Sequence[Batch] = (),
    sample: Callable[[int], None] = lambda _: None,
    resume: bool = False,
    lr_factors: Mapping[str, float] | None = None,
    objective: Objective | None = None,
) -> FitResult:
    """Train whatever of ``model`` requires a gradient, in place; at the end the model has the best weights.

    The loss is the mean over all units of a step, however it is split into micro-batches. Checkpoints,
    ``metrics.jsonl`` and ``loss.png`` are written into ``folder``.

    Args:
        model: What the objective can compute with, with all parameters on one device.
        batches: The training rows.
        config: Length and portions.
        optimizer: Its settings.
        schedule: The learning rate's.
        folder: The run folder.
        seed: Of dropout.
        validation: Micro-batches of the validation rows.
        sample: Called with the step before training and after each validation, to show answers.
        resume: Continue after the newest checkpoint in ``folder``.
        lr_factors: Parameter name: factor of its learning rate, where that is not 1.
        objective: The loss and the validation's figures; next-token prediction when omitted.

    Raises:
        UsageError: ``folder`` holds checkpoints, and ``resume`` is false; or ``best_by`` is not measured.
        InputError: The checkpoint to resume from is broken or of another run, or the training rows have changed.
        NumericalError: A loss or gradient is not finite.
        Interrupted: SIGINT or SIGTERM; a checkpoint was saved first.
        DiskError: A checkpoint could not be written; older ones are still there.
        OutOfMemoryError: A step needs more memory than there is.
    """
    reuse_memory()
    objective = objective or NextToken()
    run = _Run(model, batches, validation, config, optimizer, schedule, Path(folder), seed, lr_factors, objective)
    saved = run.store.steps()
    if saved and not resume:
        raise UsageError(
            f"{run.store.folder}: holds checkpoints of another run", hint="resume it, or take another folder"
        )
    if saved:
        run.resume(saved[-1])
        left = "nothing is left to train" if run.finished else f"{run.total - saved[-1]} are left"
        log.note(f"resumed after step {saved[-1]} of {run.total}: {left}")
    metrics = Metrics(run.folder, first_step=run.progress.step)
    model.train()
    try:
        with _stop_signals() as stop, report_lack_of_memory(f"train.micro_batch_tokens is {config.micro_batch_tokens}"):
            _steps(run, metrics, sample, stop)
    finally:
        model.eval()
        run.trainables.release()
        metrics.close()
        plot_losses(metrics.path, run.folder / "loss.png", unit=objective.unit)
    best = run.progress.best_step or run.progress.step
    if best != run.progress.step:
        run.store.load(best, run.trainables)
    records = read_metrics(metrics.path)
    steps = [record for record in records if "tokens" in record]
    return FitResult(
        steps=run.progress.step,
        best_step=best,
        loss=steps[-1]["loss"] if steps else None,
        validation_loss=run.progress.best_figures.get("loss"),
        untrained_validation_loss=next((r["validation_loss"] for r in records if r["step"] == 0), None),
        figures={name: value for name, value in run.progress.best_figures.items() if name != "loss"},
        tokens=sum(record["tokens"] for record in steps),
        seconds=sum(record["tokens"] / record["tokens_per_second"] for record in steps),
        peak_memory_bytes=peak_memory_bytes(run.device),
        trainable=sum(master.numel() for master in run.trainables.masters.values()),
    )


def _steps(run: _Run, metrics: Metrics, sample: Callable[[int], None], stop: list[int]) -> None:
    """All steps that are left, with validation, checkpoints and samples between them.

    Raises:
        NumericalError: A loss or gradient is not finite.
        Interrupted: A signal came; a checkpoint was saved.
    """
    eval_interval = run.config.eval_interval(run.total)
    save_interval = run.config.save_every or eval_interval
    if run.validation and run.progress.step == 0:
        run.validate(metrics)
        sample(0)
    with log.progress(total=run.total, what="training", unit="step", initial=run.progress.step) as bar:
        while not run.finished:
            bar.set_postfix_str(run.train_step(metrics), refresh=False)
            bar.update()
            step, last = run.progress.step, run.progress.step == run.total
            validated = bool(run.validation) and (last or step % eval_interval == 0)
            if validated:
                run.validate(metrics)
            if last or stop or step % save_interval == 0 or run.progress.best_step == step:
                run.save()
            if stop:
                raise Interrupted(stop[0], f"stopped after step {step} of {run.total}, checkpoint saved")
            if validated:
                sample(step)
    if run.out_of_patience:
        log.note(f"no better validation loss in {run.progress.waited} validations: stopped at step {run.progress.step}")


def check_figures(config: TrainConfig, objective: Objective) -> None:
    """Make sure that the figure which picks the best weights is measured.

    Raises:
        UsageError: It is not.
    """
    if config.best_by not in ("loss", *objective.figures):
        known = ", ".join(("loss", *objective.figures))
        raise UsageError(f"train.best_by: {config.best_by!r} is not measured in this run, expected: {known}")


def validate(model: Any, batches: Sequence[Batch], objective: Objective) -> dict[str, float]:
    """The mean ``loss`` and the objective's figures over all ``batches``; leaves the model's mode as it was."""
    training = model.training
    model.eval()
    figures = objective.validate(model, log.progress(batches, what="validating", unit="batch"))
    model.train(training)
    return figures


def validation_loss(model: Any, batches: Sequence[Batch]) -> float:
    """Mean loss per learned token over all ``batches``, however they are split; leaves the model's mode as it was."""
    return validate(model, batches, NextToken())["loss"]


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying; a second one of either dies at once."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def remember(number: int, frame: Any) -> None:
        if received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.append(number)
        # Not through sys.stderr: the signal may have come while the progress bar was being written to it.
        os.write(2, b"\nstopping after this step; again stops at once\n")

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        try:
            previous[number] = signal.signal(number, remember)
        except ValueError:  # not in the main thread: leave signals to whoever runs us
            break
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _mixed(seed: int, step: int) -> int:
    """32 random bits: all that the CPU's generator takes of a seed."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def _some(names: Iterable[str], most: int = 8) -> str:
    """The first of them, separated by commas."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
