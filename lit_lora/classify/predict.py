"""Predictions for rows: the most likely label with its probability, a number, or a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lit_lora import log
from lit_lora.classify.task import Task
from lit_lora.data.padded import LabeledBatch
from lit_lora.train.objectives.labeled import logits_of

__all__ = ["Prediction", "predict"]


@dataclass(frozen=True)
class Prediction:
    """The prediction for one row."""

    answer: str
    """The label's name, the number or the text."""
    probabilities: tuple[float, ...] = ()
    """Probability of each label, by id; empty for a number or a text."""

    @property
    def probability(self) -> float | None:
        """Probability of the predicted label."""
        return max(self.probabilities) if self.probabilities else None


@torch.no_grad()
def predict(
    model: Any, tokenizer: Any, task: Task, batches: Sequence[LabeledBatch], *, max_target_length: int = 128
) -> list[Prediction]:
    """The model's prediction for every row, in the order of the rows; texts are generated greedily.

    Args:
        model: In evaluation mode.
        tokenizer: transformers' tokenizer.
        task: What is predicted.
        batches: Together they hold every row once.
        max_target_length: Maximum number of tokens in a text.
    """
    predictions: dict[int, Prediction] = {}
    for batch in log.progress(batches, what="predicting", unit="batch"):
        if task.kind == "seq2seq":
            answers = _generate(model, tokenizer, batch, max_target_length)
        else:
            answers = _classify(model, task, batch)
        predictions.update(zip(batch.rows, answers, strict=True))
    return [predictions[row] for row in range(len(predictions))]


def _classify(model: Any, task: Task, batch: LabeledBatch) -> list[Prediction]:
    """Labels or numbers, from the head."""
    logits = logits_of(model, batch)[0].float().cpu()
    if task.kind == "regression":
        return [Prediction(f"{number:.6g}") for number in logits[:, 0].tolist()]
    predictions = []
    for probabilities in logits.softmax(1).tolist():
        best = probabilities.index(max(probabilities))
        predictions.append(Prediction(task.labels[best], tuple(probabilities)))
    return predictions


def _generate(model: Any, tokenizer: Any, batch: LabeledBatch, max_tokens: int) -> list[Prediction]:
    """Texts, from the decoder."""
    device = next(iter(model.parameters())).device
    # The batch's decoder inputs are the targets of training.
    inputs = {name: value.to(device) for name, value in batch.inputs.items() if not name.startswith("decoder")}
    outputs = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, num_beams=1)
    texts = tokenizer.batch_decode(outputs, skip_special_tokens=True)
    return [Prediction(text.strip()) for text in texts]
