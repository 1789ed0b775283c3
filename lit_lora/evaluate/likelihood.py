"""How likely a model finds given tokens: the loss of a dataset, and the log-likelihood of single documents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from lit_lora import IGNORE_INDEX, log
from lit_lora.data import Rows
from lit_lora.data.batches import MicroBatch, validation_batches
from lit_lora.data.padded import CALL
from lit_lora.evaluate.scores import LossScore
from lit_lora.model import LanguageModel
from lit_lora.train.loss import CHUNK

__all__ = ["evaluate_loss", "log_likelihoods"]


def evaluate_loss(model: LanguageModel, rows: Rows, *, micro_batch_tokens: int = 2048) -> LossScore:
    """Mean loss per learned token over all rows, each token weighing the same whatever row it stands in.

    Args:
        model: In any dtype; the losses are computed in float32 and summed in float64.
        rows: Tokenised rows.
        micro_batch_tokens: The most tokens per forward pass: it decides memory and speed, never the result.
    """
    sums = log_likelihoods(model, rows, micro_batch_tokens=micro_batch_tokens)
    tokens = int(rows.target_counts.sum())
    return LossScore(-float(sums.sum()) / max(tokens, 1), tokens, len(rows))


@torch.inference_mode()
def log_likelihoods(
    model: LanguageModel,
    rows: Rows,
    *,
    micro_batch_tokens: int = 2048,
    what: str = "loss",
    groups: Sequence[int] | None = None,
) -> npt.NDArray[np.float64]:
    """Sum of log-probabilities, in nats, of each row's learned tokens.

    Args:
        model: The model.
        rows: Tokenised rows; packed without padding, so that they do not see each other.
        micro_batch_tokens: The most tokens per forward pass; a longer row gets one of its own.
        what: Title of the progress bar.
        groups: How many rows, one after the other, begin alike, such as the options of each question. On a CPU, where
            that is faster, a group gets passes of its own, so that its beginning is computed once.

    Returns:
        (rows,) float64.
    """
    sums = np.zeros(len(rows))
    parts = [rows]
    if groups is not None and next(model.parameters()).device.type == "cpu":
        parts = _apart(rows, groups, micro_batch_tokens)
    start = 0
    with log.progress(total=len(rows), what=what, unit="row") as bar:
        for part in parts:
            for batch in validation_batches(part, micro_batch_tokens):
                sums[start + np.array(batch.rows)] = _document_sums(model, batch)
                bar.update(len(batch.rows))
            start += len(part)
    return sums


def _apart(rows: Rows, groups: Sequence[int], micro_batch_tokens: int) -> list[Rows]:
    """The rows group by group, or all together, whichever computes less."""
    together = [rows]
    apart = [rows.subset(part) for part in np.split(np.arange(len(rows)), np.cumsum(groups)[:-1])]

    def cost(parts: list[Rows]) -> int:
        total = 0
        for part in parts:
            own = int((part.token_counts - part.shared_prefix).sum())
            passes = -(-own // max(micro_batch_tokens - part.shared_prefix, 1))
            total += own + passes * (part.shared_prefix + CALL)
        return total

    return min(together, apart, key=cost)


def _document_sums(model: LanguageModel, batch: MicroBatch) -> npt.NDArray[np.float64]:
    """Sum of target log-probabilities of each document of one packed micro-batch."""
    device = next(model.parameters()).device
    labels = batch.labels[0]  # (T,)
    positions = (labels != IGNORE_INDEX).nonzero()[:, 0]
    hidden = model.hidden_states(batch.input_ids.to(device), lengths=batch.lengths, shared_prefix=batch.shared_prefix)[
        0
    ]  # (T, D)
    targets, states = labels[positions].to(device), hidden[positions.to(device)]
    losses: list[Tensor] = [
        functional.cross_entropy(model.logits(some).float(), label, reduction="none")
        for some, label in zip(torch.split(states, CHUNK), torch.split(targets, CHUNK), strict=True)
    ]
    nats = torch.cat(losses).double().cpu().numpy() if losses else np.zeros(0)
    owners = np.repeat(np.arange(len(batch.lengths)), np.array(batch.lengths) - batch.shared_prefix)
    document = owners[positions.numpy() - batch.shared_prefix]
    sums: npt.NDArray[np.float64] = np.zeros(len(batch.lengths))
    np.subtract.at(sums, document, nats)
    return sums
