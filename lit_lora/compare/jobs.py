"""The runs of a comparison: each an ordinary run folder, made by a process of its own, so a start again finds it.

One process per run keeps the peak of memory that of this run, and a run that fails is a line of the table, not the end.
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
"""Begins the output of a command in the log of a run."""


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
        """The run of a variant, in its place below ``out``."""
        return cls(variant, rate, seed, out / "runs" / f"{slug(variant.name)}-lr{rate:g}-seed{seed}")

    def __str__(self) -> str:
        return f"{self.variant.name}, lr {self.rate:g}, seed {self.seed}"

    @property
    def config(self) -> FinetuneConfig:
        """The run's own config."""
        own = self.variant.config
        optimizer = own.optimizer.model_copy(update={"lr": self.rate})
        return own.model_copy(update={"optimizer": optimizer, "seed": self.seed, "out": self.folder})

    @property
    def done(self) -> bool:
        """Whether its training is complete."""
        return (self.folder / "result.json").is_file()

    def check(self) -> str | None:
        """How a run that is in its folder already differs from this one, in words."""
        there, config = self.folder / "config.yaml", self.config
        try:  # read, not compared as text: another version may write more defaults
            same = not there.is_file() or load_config(there, type(config)) == config
        except UsageError:
            same = False
        return None if same else f"{self.folder}: holds a run with other settings"


@dataclass
class Outcome:
    """What a run came to."""

    job: Job
    result: dict[str, Any] = field(default_factory=dict)
    """``result.json``; empty where the run failed."""
    scores: dict[str, Any] = field(default_factory=dict)
    """Metric to its value: what validation measured beside the loss, and of ``evaluate``."""
    base_scores: dict[str, Any] = field(default_factory=dict)
    """Of the base model, where this measurement had it too."""
    error: str = ""
    """Why it failed."""
    found: bool = False
    """It was complete before."""

    @property
    def loss(self) -> float:
        """The validation loss; infinite where there is none."""
        loss = self.result.get("validation_loss")
        return float("inf") if loss is None else float(loss)


class Runner:
    """Starts the processes, one at a time, and waits for them; a signal goes on to the one that is running."""

    def __init__(self, lock: int | None = None) -> None:
        self._lock = lock
        self._stopped: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None

    def train(self, job: Job) -> Outcome:
        """Do a run, or what is left of it.

        Raises:
            Interrupted: A signal came; the run has saved a checkpoint.
            DiskError: The disk is full or read-only.
        """
        found = job.done
        if not found:
            config = job.folder.with_name(f"{job.folder.name}.yaml")
            write_text(config, dump_yaml(job.config))
            again = ["--resume"] if (job.folder / "config.yaml").is_file() else []
            error = self._call(["finetune", "--config", str(config), *again], job)
            if error:
                return Outcome(job, error=error)
            shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)  # only for resuming, and large
        result = read_json(job.folder / "result.json")
        measured = result.pop("metrics", None) or result.pop("figures", {})  # called figures before
        scores = {f"validation {name}": value for name, value in measured.items()}
        return Outcome(job, result, scores, found=found)

    def measure(self, outcome: Outcome, section: EvaluateSection, *, with_base: bool) -> None:
        """Give an outcome its scores, from its file where it was measured already.

        Raises:
            Interrupted: A signal came.
        """
        job = outcome.job
        digest = hashlib.sha256(section.model_dump_json().encode()).hexdigest()[:8]
        file = job.folder / f"evaluation-{digest}.json"
        found = _read_evaluation(file)
        if len(found) < 1 + with_base:
            file.unlink(missing_ok=True)
            options = {"--task": ",".join(section.tasks), "--limit": section.limit}
            options["--max-new-tokens"] = section.max_new_tokens
            words = [word for name, value in options.items() if value for word in (name, str(value))]
            models = [str(job.config.model.path)] if with_base else []
            command = ["evaluate", *models, str(job.folder), "--data", section.data, "--out", str(file), *words]
            outcome.error = self._call([*command, "--samples", "0", *([] if with_base else ["--skip-base"])], job)
            found = _read_evaluation(file)
        if found:
            outcome.scores |= found[-1]
            outcome.base_scores = found[0] if len(found) > 1 else {}

    def _call(self, arguments: list[str], job: Job) -> str:
        """Run one command of the command line; returns why it failed, or nothing.

        Raises:
            Interrupted: A signal came.
        """
        self._check_stopped()
        log = job.folder.with_name(f"{job.folder.name}.log")
        with disk_errors(log), log.open("ab") as file:
            file.write(f"{_PROMPT}{shlex.join(arguments)}\n".encode())
            file.flush()
            # A session of its own: Ctrl-C reaches this process, which passes one signal on.
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
        if self._stopped:
            raise Interrupted(self._stopped[0], "stopped, and what is done is kept", hint="the same command continues")

    @contextmanager
    def signals(self) -> Iterator[None]:
        """While the block runs, the first SIGINT or SIGTERM lets the run save itself, a second one kills it."""

        def stop(number: int, frame: Any) -> None:
            self._stopped.append(number)
            if self._process is not None:
                self._process.send_signal(signal.SIGTERM if len(self._stopped) == 1 else signal.SIGKILL)

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextmanager
def locked(out: Path) -> Iterator[int | None]:
    """Keep other starts out of a folder as long as this one, or a run that it started, lives.

    On Windows, which has no such locks, nothing is kept out.

    Raises:
        UsageError: Another one is at work in it.
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
                f"{out}: a run of this comparison is going on, from another start",
                hint="wait for its end, or stop it; or choose another out",
            ) from None
        yield handle
    finally:
        os.close(handle)


def _read_evaluation(file: Path) -> list[dict[str, Any]]:
    """The scores of each model in a file of ``evaluate``."""
    if not file.is_file():
        return []
    models = read_json(file)["models"]
    return [{name: score["value"] for name, score in model["scores"].items()} for model in models]


def _why(log: Path, code: int) -> str:
    """Why a command failed: its last line of error, or the signal that killed it."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (", perhaps for lack of memory" if name == "SIGKILL" else "")
    lines = log.read_text(encoding="utf-8", errors="replace").rpartition(_PROMPT)[2].splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else f"exit code {code}: {lines[-1] if lines else 'no output'}"
