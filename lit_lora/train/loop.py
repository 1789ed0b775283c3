"""The one training loop. It asks only what requires a gradient; it knows no method, no dataset and no model.

What the loss is, and what a validation measures, is the objective's: see ``objective``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_lora import log
from lit_lora.errors import Interrupted, UsageError
from lit_lora.train.config import TrainConfig
from lit_lora.train.device import peak_memory_bytes, report_lack_of_memory, reuse_memory
from lit_lora.train.objectives.base import Batch, Batches, Objective
from lit_lora.train.objectives.next_token import NextToken
from lit_lora.train.optim.base import OptimizerConfig
from lit_lora.train.run_log import RunLog, plot_losses, read_metrics
from lit_lora.train.schedule import ScheduleConfig
from lit_lora.train.signals import stop_signals
from lit_lora.train.step import TrainingRun

__all__ = ["FitResult", "fit"]


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
    metrics: dict[str, float]
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
    ``run_log.jsonl`` and ``loss.png`` are written into ``folder``.

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
        UsageError: ``folder`` holds checkpoints, and ``resume`` is false; or ``best_metric`` is not measured.
        InputError: The checkpoint to resume from is broken or of another run, or the training rows have changed.
        NumericalError: A loss or gradient is not finite.
        Interrupted: SIGINT or SIGTERM; a checkpoint was saved first.
        DiskError: A checkpoint could not be written; older ones are still there.
        OutOfMemoryError: A step needs more memory than there is.
    """
    reuse_memory()
    objective = objective or NextToken()
    run = TrainingRun(
        model, batches, validation, config, optimizer, schedule, Path(folder), seed, lr_factors, objective
    )
    saved = run.store.steps()
    if saved and not resume:
        raise UsageError(
            f"{run.store.folder}: holds checkpoints of another run", hint="resume it, or take another folder"
        )
    if saved:
        run.resume(saved[-1])
        left = "nothing is left to train" if run.finished else f"{run.total - saved[-1]} are left"
        log.note(f"resumed after step {saved[-1]} of {run.total}: {left}")
    run_log = RunLog(run.folder, first_step=run.progress.step)
    model.train()
    try:
        with stop_signals() as stop, report_lack_of_memory(f"train.micro_batch_tokens is {config.micro_batch_tokens}"):
            _steps(run, run_log, sample, stop)
    finally:
        model.eval()
        run.master_weights.release()
        run_log.close()
        plot_losses(run_log.path, run.folder / "loss.png", unit=objective.unit, best_step=run.progress.best_step)
    best = run.progress.best_step or run.progress.step
    if best != run.progress.step:
        run.store.load(best, run.master_weights)
    records = read_metrics(run_log.path)
    steps = [record for record in records if "tokens" in record]
    return FitResult(
        steps=run.progress.step,
        best_step=best,
        loss=steps[-1]["loss"] if steps else None,
        validation_loss=run.progress.best_metrics.get("loss"),
        untrained_validation_loss=next((r["validation_loss"] for r in records if r["step"] == 0), None),
        metrics={name: value for name, value in run.progress.best_metrics.items() if name != "loss"},
        tokens=sum(record["tokens"] for record in steps),
        seconds=sum(record["tokens"] / record["tokens_per_second"] for record in steps),
        peak_memory_bytes=peak_memory_bytes(run.device),
        trainable=sum(master.numel() for master in run.master_weights.masters.values()),
    )


def _steps(run: TrainingRun, run_log: RunLog, sample: Callable[[int], None], stop: list[int]) -> None:
    """All steps that are left, with validation, checkpoints and samples between them.

    Raises:
        NumericalError: A loss or gradient is not finite.
        Interrupted: A signal came; a checkpoint was saved.
    """
    eval_interval = run.config.eval_interval(run.total)
    save_interval = run.config.save_every or eval_interval
    if run.validation and run.progress.step == 0:
        run.validate(run_log)
        sample(0)
    with log.progress(total=run.total, what="training", unit="step", initial=run.progress.step) as bar:
        while not run.finished:
            bar.set_postfix_str(run.train_step(run_log), refresh=False)
            bar.update()
            step, last = run.progress.step, run.progress.step == run.total
            validated = bool(run.validation) and (last or step % eval_interval == 0)
            if validated:
                run.validate(run_log)
            if last or stop or step % save_interval == 0 or run.progress.best_step == step:
                run.save()
            if stop:
                raise Interrupted(stop[0], f"stopped after step {step} of {run.total}, checkpoint saved")
            if validated:
                sample(step)
    if run.out_of_patience:
        log.note(f"no better validation loss in {run.progress.waited} validations: stopped at step {run.progress.step}")
