"""Predictions for rows: the likeliest label with its probability, a number, a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lit_lora import log
from lit_lora.classify.task import Task
from lit_lora.data.padded import LabelledBatch
from lit_lora.train.objectives.labelled import logits_of

__all__ = ["Prediction", "predict"]


@dataclass(frozen=True)
class Prediction:
    """What a model says of one row."""

    answer: str
    """The label's name, the number or the text."""
    probabilities: tuple[float, ...] = ()
    """Of each label, by id."""

    @property
    def probability(self) -> float | None:
        """Of the label that is named."""
        return max(self.probabilities) if self.probabilities else None


@torch.no_grad()
def predict(
    model: Any, tokenizer: Any, task: Task, batches: Sequence[LabelledBatch], *, max_target_length: int = 128
) -> list[Prediction]:
    """The model's prediction for every row, in the order of the rows; texts are written greedily.

    Args:
        model: In evaluation mode.
        tokenizer: transformers' tokenizer.
        task: What is predicted.
        batches: That hold each row from 0 on once.
        max_target_length: The most tokens of a text.
    """
    found: dict[int, Prediction] = {}
    for batch in log.progress(batches, what="predicting", unit="batch"):
        if task.kind == "seq2seq":
            answers = _written(model, tokenizer, batch, max_target_length)
        else:
            answers = _labelled(model, task, batch)
        found.update(zip(batch.rows, answers, strict=True))
    return [found[row] for row in range(len(found))]


def _labelled(model: Any, task: Task, batch: LabelledBatch) -> list[Prediction]:
    logits = logits_of(model, batch)[0].float().cpu()
    if task.kind == "regression":
        return [Prediction(f"{number:.6g}") for number in logits[:, 0].tolist()]
    rows = logits.softmax(1).tolist()
    return [Prediction(task.labels[row.index(max(row))], tuple(row)) for row in rows]


def _written(model: Any, tokenizer: Any, batch: LabelledBatch, most: int) -> list[Prediction]:
    device = next(iter(model.parameters())).device
    inputs = {name: value.to(device) for name, value in batch.inputs.items() if not name.startswith("decoder")}
    written = model.generate(**inputs, max_new_tokens=most, do_sample=False, num_beams=1)
    return [Prediction(text.strip()) for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
