"""Several models on the same rows, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_lora import log
from lit_lora.evaluate import load_task
from lit_lora.evaluate.answers import Answer
from lit_lora.evaluate.scores import Metric, Share
from lit_lora.evaluate.shots import draw_shots
from lit_lora.evaluate.tasks import Dataset, EvaluateSettings, Subject
from lit_lora.files import sha256_file
from lit_lora.model import LanguageModel
from lit_lora.quantize import QuantizeConfig
from lit_lora.tokenizer import Tokenizer

__all__ = ["Candidate", "Result", "compare", "comparison_table", "report", "same_scores", "unlike_losses"]


@dataclass(frozen=True)
class Candidate:
    """One column of the comparison: a model, with or without an adapter, with or without examples in the prompt."""

    label: str
    model: Path
    adapter: Path | None = None
    shots: int = 0
    quantize: QuantizeConfig | None = None
    """How a base without an adapter is quantized: as in the training of the adapter it is compared with."""


@dataclass(frozen=True)
class Result:
    """The measurements of one candidate."""

    candidate: Candidate
    description: str
    """One line on the model that was opened."""
    adapter_sha256: str | None
    metrics: list[Metric]
    seconds: float
    answers: list[Answer] = field(default_factory=list)


def compare(
    candidates: Sequence[Candidate],
    open_candidate: Callable[[Candidate], tuple[LanguageModel, Tokenizer, str]],
    dataset: Dataset,
    tasks: Sequence[str],
    *,
    examples: Dataset | None = None,
    seed: int = 0,
    settings: EvaluateSettings | None = None,
) -> list[Result]:
    """Run every task on every candidate, with one model in memory at a time.

    Args:
        candidates: The models.
        open_candidate: Returns a candidate's model, tokenizer and description.
        dataset: The rows.
        tasks: Names in ``TASKS``.
        examples: The rows that shots are drawn from.
        seed: Seeds that draw.
        settings: How the models are asked.

    Raises:
        UsageError: A task does not suit the rows, or there are too few examples.
    """
    results = []
    for candidate in candidates:
        start = time.perf_counter()
        shots = _draw(examples or Dataset(), candidate.shots, seed)
        model, tokenizer, description = open_candidate(candidate)
        log.note(f"{candidate.label}: {description}")
        subject = Subject(model, tokenizer, dataset, shots, settings or EvaluateSettings())
        metrics: list[Metric] = []
        for task in tasks:
            metrics += load_task(task)(subject)

        # Answers that a task generated are in the subject's __dict__; reading the property would generate them.
        answers = subject.answers.answers if "answers" in vars(subject) else []
        digest = sha256_file(candidate.adapter / "adapter_model.safetensors") if candidate.adapter else None
        results.append(Result(candidate, description, digest, metrics, time.perf_counter() - start, answers))
        del model, subject  # before the next model is opened: two may not fit into memory
    return results


def _draw(examples: Dataset, count: int, seed: int) -> Dataset:
    if not count:
        return Dataset()
    if examples.options:
        return Dataset(options=draw_shots(examples.options, count, seed=seed))
    return Dataset(conversations=draw_shots(examples.answered, count, seed=seed))


def same_scores(results: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Pairs of an earlier and a later model with the same scores and answers, which means that something is wrong."""
    pairs = []
    for index, result in enumerate(results):
        for earlier in results[:index]:
            if _measured(earlier) == _measured(result):
                pairs.append((earlier, result))
                break
    return pairs


def unlike_losses(results: Sequence[Result]) -> list[str]:
    """What each model's loss is over, if it is not the same for all: then the losses cannot be compared.

    Models with other tokenizers or templates have other tokens, and a shorter context leaves out more rows.
    """
    over = {}
    for result in results:
        for metric in result.metrics:
            if metric.name == "loss":
                over[result.candidate.label] = metric.why
    if len(set(over.values())) < 2:
        return []
    return [f"{label}: {why}" for label, why in over.items()]


def _measured(result: Result) -> tuple[list[str], list[Share | float]]:
    """Everything that a candidate answered and scored."""
    return [answer.answer for answer in result.answers], [metric.value for metric in result.metrics]


def comparison_table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: one line per metric, one column per candidate."""
    header = ["", *(result.candidate.label for result in results)]
    lines = []
    for index, metric in enumerate(results[0].metrics):
        lines.append([metric.name, *(str(result.metrics[index]) for result in results)])
    lines.append(["seconds", *(f"{result.seconds:.0f}" for result in results)])
    return header, lines


def report(results: Sequence[Result], about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything as plain data for a JSON file.

    Args:
        results: The measurements.
        about: Further entries, such as the data and the settings.
    """
    models = [
        {
            "label": result.candidate.label,
            "model": str(result.candidate.model),
            "adapter": str(result.candidate.adapter) if result.candidate.adapter else None,
            "adapter_sha256": result.adapter_sha256,
            "opened": result.description,
            "shots": result.candidate.shots,
            "seconds": round(result.seconds, 3),
            "scores": {metric.name: metric.to_json() for metric in result.metrics},
            "answers": [
                {"reference": answer.reference, "answer": answer.answer, "right": answer.right}
                for answer in result.answers
            ],
        }
        for result in results
    ]
    return {**about, "models": models}
