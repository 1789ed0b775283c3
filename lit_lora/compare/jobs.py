"""The runs of a comparison: each an ordinary run folder, which a repeated command finds again.

Every run has a process of its own. So its peak memory is its own, and a run that fails becomes a line of the table
instead of ending the comparison.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_lora.compare.settings import EvaluateSection, Variant, slug
from lit_lora.config import dump_yaml, load_config
from lit_lora.errors import Interrupted, UsageError
from lit_lora.files import disk_errors, read_json, write_text
from lit_lora.recipe import FinetuneConfig

__all__ = ["Job", "Outcome", "Runner", "locked"]

_PROMPT = "$ lit-lora "
"""The beginning of the line above a command's output in the log of a run."""


@dataclass(frozen=True)
class Job:
    """One run: a variant at one learning rate and one seed."""

    variant: Variant
    rate: float
    seed: int
    folder: Path
    """The run folder."""

    @classmethod
    def of(cls, variant: Variant, rate: float, seed: int, out: Path) -> Job:
        """The run of a variant, in its folder below ``out``."""
        return cls(variant, rate, seed, out / "runs" / f"{slug(variant.name)}-lr{rate:g}-seed{seed}")

    def __str__(self) -> str:
        return f"{self.variant.name}, lr {self.rate:g}, seed {self.seed}"

    @property
    def config(self) -> FinetuneConfig:
        """The run's config."""
        shared = self.variant.config
        optimizer = shared.optimizer.model_copy(update={"lr": self.rate})
        return shared.model_copy(update={"optimizer": optimizer, "seed": self.seed, "out": self.folder})

    @property
    def done(self) -> bool:
        """Whether its training is complete."""
        return (self.folder / "result.json").is_file()

    def check(self) -> str | None:
        """What is wrong with a run that is already in its folder; ``None`` if there is none, or it is this one."""
        saved = self.folder / "config.yaml"
        if not saved.is_file():
            return None
        try:  # by value, not as text: another version may write more defaults
            same = load_config(saved, type(self.config)) == self.config
        except UsageError:
            same = False
        return None if same else f"{self.folder}: already contains a run with other settings"


@dataclass
class Outcome:
    """The outcome of a run."""

    job: Job
    result: dict[str, Any] = field(default_factory=dict)
    """``result.json``; empty if the run failed."""
    scores: dict[str, Any] = field(default_factory=dict)
    """Scores by name: the validation's metrics other than the loss, and those of ``evaluate``."""
    base_scores: dict[str, Any] = field(default_factory=dict)
    """Those of the base model, if it was measured together with this run."""
    error: str = ""
    """Why it failed."""
    reused: bool = False
    """Whether it was already complete."""

    @property
    def loss(self) -> float:
        """The validation loss; infinite if there is none."""
        loss = self.result.get("validation_loss")
        return float("inf") if loss is None else float(loss)


class Runner:
    """Runs one process after the other; a signal is passed on to the one that is running.

    Args:
        lock: The handle from :func:`locked`, which every process inherits: the folder stays locked while one lives.
    """

    def __init__(self, lock: int | None = None) -> None:
        self._lock = lock
        self._signals: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None

    def train(self, job: Job) -> Outcome:
        """Do a run, or the rest of it; a run that is complete is only read.

        Raises:
            Interrupted: A signal arrived; the run has saved a checkpoint.
            DiskError: The disk is full or read-only.
        """
        reused = job.done
        if not reused:
            config = job.folder.with_name(f"{job.folder.name}.yaml")
            write_text(config, dump_yaml(job.config))
            command = ["finetune", "--config", str(config)]
            if (job.folder / "config.yaml").is_file():  # begun before
                command.append("--resume")
            error = self._call(command, job)
            if error:
                return Outcome(job, error=error)
            shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)  # large, and only needed to resume

        result = read_json(job.folder / "result.json")
        metrics = result.pop("metrics", None) or result.pop("figures", {})  # "figures" in older runs
        scores = {f"validation {name}": value for name, value in metrics.items()}
        return Outcome(job, result, scores, reused=reused)

    def measure(self, outcome: Outcome, section: EvaluateSection, *, with_base: bool) -> None:
        """Evaluate a run and add its scores to ``outcome``; a run that has already been evaluated is only read.

        Args:
            outcome: A run that succeeded.
            section: What to evaluate it on.
            with_base: Evaluate the base model too.

        Raises:
            Interrupted: A signal arrived.
        """
        job = outcome.job
        digest = hashlib.sha256(section.model_dump_json().encode()).hexdigest()[:8]
        file = job.folder / f"evaluation-{digest}.json"
        scores = _read_evaluation(file)
        if len(scores) < 1 + with_base:
            file.unlink(missing_ok=True)
            outcome.error = self._call(_evaluation(job, section, file, with_base=with_base), job)
            scores = _read_evaluation(file)
        if scores:  # the base first, if it was measured
            outcome.scores |= scores[-1]
            outcome.base_scores = scores[0] if len(scores) > 1 else {}

    def _call(self, arguments: list[str], job: Job) -> str:
        """Run one lit-lora command; returns why it failed, or an empty string.

        Raises:
            Interrupted: A signal arrived.
        """
        self._check_stopped()
        log = job.folder.with_name(f"{job.folder.name}.log")
        with disk_errors(log), log.open("ab") as file:
            file.write(f"{_PROMPT}{shlex.join(arguments)}\n".encode())
            file.flush()
            # In a session of its own, so that Ctrl-C reaches only this process, which then passes on one signal.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lit_lora", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=() if self._lock is None else (self._lock,),
            )
        code = self._process.wait()
        self._process = None
        self._check_stopped()
        return "" if code == 0 else _why(log, code)

    def _check_stopped(self) -> None:
        if self._signals:
            raise Interrupted(
                self._signals[0], "stopped; finished runs are kept", hint="run the same command again: it resumes"
            )

    @contextmanager
    def signals(self) -> Iterator[None]:
        """While the block runs, the first SIGINT or SIGTERM lets the run save a checkpoint, a second one kills it."""

        def stop(number: int, frame: Any) -> None:
            self._signals.append(number)
            if self._process is not None:
                self._process.send_signal(signal.SIGTERM if len(self._signals) == 1 else signal.SIGKILL)

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextmanager
def locked(out: Path) -> Iterator[int | None]:
    """Lock a folder for as long as this process, or a run that it started, lives.

    Yields:
        The handle that holds the lock; ``None`` on Windows, which has no such locks.

    Raises:
        UsageError: Another process has locked it.
    """
    try:
        import fcntl  # noqa: PLC0415 - not on Windows
    except ImportError:
        yield None
        return
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{out}: this comparison is already running in another process",
                hint="wait until it ends, stop it, or choose another out",
            ) from None
        yield handle
    finally:
        os.close(handle)


def _evaluation(job: Job, section: EvaluateSection, file: Path, *, with_base: bool) -> list[str]:
    """The command that evaluates a run, and with it the base model, into ``file``."""
    command = ["evaluate"]
    if with_base:
        command.append(str(job.config.model.path))
    command += [str(job.folder), "--data", section.data, "--out", str(file)]
    options = {
        "--task": ",".join(section.tasks),
        "--limit": section.limit,
        "--max-new-tokens": section.max_new_tokens,
    }
    for option, value in options.items():
        if value:
            command += [option, str(value)]
    command += ["--samples", "0"]
    if not with_base:
        command.append("--skip-base")
    return command


def _read_evaluation(file: Path) -> list[dict[str, Any]]:
    """The scores of each model in a file written by ``evaluate``; empty if there is no file."""
    if not file.is_file():
        return []
    scores = []
    for model in read_json(file)["models"]:
        scores.append({name: score["value"] for name, score in model["scores"].items()})
    return scores


def _why(log: Path, code: int) -> str:
    """Why a command failed: its last error message, or the signal that killed it."""
    if code < 0:
        name = signal.Signals(-code).name
        return "killed by SIGKILL, perhaps for lack of memory" if name == "SIGKILL" else f"killed by {name}"
    _, _, output = log.read_text(encoding="utf-8", errors="replace").rpartition(_PROMPT)
    lines = output.splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1]
    return f"exit code {code}: {lines[-1] if lines else 'no output'}"
