"""Evaluation on a user's data: loss, exact match, JSON fields and multiple choice, for any model."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable

from lit_lora.config import did_you_mean
from lit_lora.errors import UsageError
from lit_lora.evaluate.answers import Answer, Scores
from lit_lora.evaluate.generation import evaluate_generation
from lit_lora.evaluate.likelihood import evaluate_loss
from lit_lora.evaluate.options import OptionRow, OptionScores, evaluate_options
from lit_lora.evaluate.scores import LossScore, Metric, Share
from lit_lora.evaluate.tasks import Subject

__all__ = [
    "TASKS",
    "Answer",
    "LossScore",
    "Metric",
    "OptionRow",
    "OptionScores",
    "Scores",
    "Share",
    "Subject",
    "check_tasks",
    "evaluate_generation",
    "evaluate_loss",
    "evaluate_options",
    "load_task",
]

# name -> module:function that measures a Subject
TASKS: dict[str, str] = {
    "loss": "lit_lora.evaluate.tasks:loss",
    "exact_match": "lit_lora.evaluate.tasks:exact_match",
    "json_fields": "lit_lora.evaluate.tasks:json_fields",
    "options": "lit_lora.evaluate.tasks:options",
}


def check_tasks(names: Iterable[str], *, option: str = "") -> list[str]:
    """Names of tasks, each once.

    Raises:
        UsageError: There is no such task; the message begins with ``option``.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        if name not in TASKS:
            raise UsageError(
                f"{option}{name}: unknown task{did_you_mean(name, TASKS)}", hint=f"known: {', '.join(TASKS)}"
            )
    return names


def load_task(name: str) -> Callable[[Subject], list[Metric]]:
    """The task with this name in ``TASKS``."""
    module, _, attribute = TASKS[name].partition(":")
    task: Callable[[Subject], list[Metric]] = getattr(importlib.import_module(module), attribute)
    return task
