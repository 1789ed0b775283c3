"""The one training loop. It asks only what requires a gradient; it knows no method, no dataset and no model.

What the loss is, and what a validation measures, is the objective's: see ``objective``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lit_lora import log
from lit_lora.errors import Interrupted, UsageError
from lit_lora.train.device import peak_memory_bytes, report_lack_of_memory, reuse_memory
from lit_lora.train.objectives.base import Objective
from lit_lora.train.progress import ProgressLines
from lit_lora.train.run import TrainingData, TrainingRun
from lit_lora.train.run_log import RunLog, plot_losses, read_metrics
from lit_lora.train.signals import stop_signals
from lit_lora.train.step import Trainer

__all__ = ["FitResult", "fit"]


@dataclass
class FitResult:
    """The outcome of a run."""

    steps: int
    best_step: int
    loss: float | None
    """Training loss of the last step."""
    validation_loss: float | None
    """Of the weights that the model now has; ``None`` without validation rows."""
    untrained_validation_loss: float | None
    """Before the first step."""
    metrics: dict[str, float]
    """The other validation metrics of these weights."""
    tokens: int
    """Tokens trained on in the whole run, prompts included."""
    seconds: float
    """Spent in training steps in the whole run."""
    peak_memory_bytes: int
    trainable: int
    """Trainable parameters."""

    @property
    def tokens_per_second(self) -> float:
        """Training speed, without validation and saving."""
        return self.tokens / self.seconds if self.seconds else 0.0


def fit(
    run: TrainingRun,
    model: Any,
    data: TrainingData,
    objective: Objective,
    *,
    lr_factors: Mapping[str, float] | None = None,
    sample: Callable[[int], None] = lambda _: None,
) -> FitResult:
    """Train whatever of ``model`` requires a gradient, in place; at the end the model has the best weights.

    The loss is the mean over all units of a step, however it is split into micro-batches.

    Args:
        run: The settings, and the folder that is written.
        model: What the objective can compute with, with all parameters on one device.
        data: The training and validation rows.
        objective: The loss and the validation metrics.
        lr_factors: Parameter name: factor of its learning rate, where that is not 1.
        sample: Called with the step before training and after each validation, to show answers.

    Raises:
        UsageError: The folder contains checkpoints, and ``resume`` is false; or ``best_metric`` is not measured.
        InputError: The checkpoint to resume from is broken or of another run, or the training rows have changed.
        NumericalError: A loss or gradient is not finite.
        Interrupted: SIGINT or SIGTERM; a checkpoint was saved first.
        DiskError: A checkpoint could not be written; older ones are still there.
        OutOfMemoryError: A step needs more memory than there is.
    """
    reuse_memory()
    trainer = Trainer(run, model, data, objective, lr_factors)
    saved = trainer.store.steps()
    if saved and not run.resume:
        raise UsageError(
            f"{trainer.store.folder}: contains checkpoints of another run", hint="resume it, or use another folder"
        )
    if saved:
        trainer.resume(saved[-1])
        left = "nothing is left to train" if trainer.finished else f"{trainer.total - saved[-1]} steps remain"
        log.note(f"resumed after step {saved[-1]} of {trainer.total}: {left}")
    run_log = RunLog(run.folder, first_step=trainer.progress.step)
    model.train()
    try:
        setting = f"train.micro_batch_tokens is {run.train.micro_batch_tokens}"
        with stop_signals() as stop, report_lack_of_memory(setting, trainer.store.kept):
            _steps(trainer, run_log, sample, stop)
    finally:
        model.eval()
        trainer.master_weights.release()
        run_log.close()
        plot_losses(run_log.path, run.folder / "loss.png", unit=objective.unit, best_step=trainer.progress.best_step)
    best = trainer.progress.best_step or trainer.progress.step
    if best != trainer.progress.step:
        trainer.store.load(best, trainer.master_weights)
    return _result(trainer, best, read_metrics(run_log.path))


def _result(trainer: Trainer, best: int, records: list[dict[str, Any]]) -> FitResult:
    """The outcome of the run, from its log and from the step whose weights the model now has."""
    steps = [record for record in records if "tokens" in record]
    untrained = next((record for record in records if record["step"] == 0), None)
    best_metrics = dict(trainer.progress.best_metrics)
    best_loss = best_metrics.pop("loss", None)  # there are none without validation rows
    return FitResult(
        steps=trainer.progress.step,
        best_step=best,
        loss=steps[-1]["loss"] if steps else None,
        validation_loss=best_loss,
        untrained_validation_loss=untrained["validation_loss"] if untrained else None,
        metrics=best_metrics,
        tokens=sum(record["tokens"] for record in steps),
        seconds=sum(record["tokens"] / record["tokens_per_second"] for record in steps),
        peak_memory_bytes=peak_memory_bytes(trainer.device),
        trainable=sum(master.numel() for master in trainer.master_weights.masters.values()),
    )


def _steps(trainer: Trainer, run_log: RunLog, sample: Callable[[int], None], stop: list[int]) -> None:
    """All steps that are left, with validation, checkpoints and samples between them.

    Raises:
        NumericalError: A loss or gradient is not finite.
        Interrupted: A signal came; a checkpoint was saved.
    """
    eval_interval = trainer.config.eval_interval(trainer.total, trainer.steps_per_epoch)
    save_interval = trainer.config.save_interval(trainer.total, trainer.steps_per_epoch)
    if trainer.validation and trainer.progress.step == 0:
        trainer.validate(run_log)
        sample(0)
    with log.progress(total=trainer.total, what="training", unit="step", initial=trainer.progress.step) as bar:
        lines = ProgressLines(trainer.total, trainer.progress.step)
        while not trainer.finished:
            outcome = trainer.train_step(run_log)
            bar.set_postfix_str(outcome, refresh=False)
            bar.update()

            step = trainer.progress.step
            last = step == trainer.total
            validated = bool(trainer.validation) and (last or step % eval_interval == 0)
            if validated:
                trainer.validate(run_log)
            if bar.disable:
                lines.after(step, outcome, already_reported=validated)
            # After validation, which decides whether this step is the best; a stop asks for a checkpoint too.
            if last or stop or step % save_interval == 0 or trainer.progress.best_step == step:
                trainer.save()
            if stop:
                raise Interrupted(stop[0], f"stopped after step {step} of {trainer.total}, checkpoint saved")
            if validated:
                sample(step)
    if trainer.out_of_patience:
        waited, step = trainer.progress.waited, trainer.progress.step
        log.note(f"no improvement in {waited} validations; stopped at step {step}")
