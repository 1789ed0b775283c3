"""How likely a text is under a model: the loss over a dataset, and the log-likelihood of single documents."""

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
    """Mean loss per target token over all rows; every token weighs the same, however long its row.

    Args:
        model: In any dtype; the losses are computed in float32 and summed in float64.
        rows: Tokenized rows.
        micro_batch_tokens: Maximum number of tokens per forward pass: affects memory and speed, not the result.
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
    """Sum of the log-probabilities, in nats, of each row's target tokens.

    Args:
        model: The model.
        rows: Tokenized rows; several are packed into a forward pass, where they do not see each other.
        micro_batch_tokens: Maximum number of tokens per forward pass; a longer row gets a pass of its own.
        what: Title of the progress bar.
        groups: Sizes of runs of rows that share a prefix, such as the options of each question. On a CPU a group gets
            passes of its own if that is faster, because its prefix is then computed only once.

    Returns:
        (rows,) float64.
    """
    sums = np.zeros(len(rows))
    parts = [rows]
    if groups is not None and next(model.parameters()).device.type == "cpu":
        parts = _split_if_cheaper(rows, groups, micro_batch_tokens)

    start = 0  # the row of `rows` at which the present part begins
    with log.progress(total=len(rows), what=what, unit="row") as bar:
        for part in parts:
            for batch in validation_batches(part, micro_batch_tokens):
                sums[start + np.array(batch.rows)] = _document_sums(model, batch)
                bar.update(len(batch.rows))
            start += len(part)
    return sums


def _split_if_cheaper(rows: Rows, groups: Sequence[int], micro_batch_tokens: int) -> list[Rows]:
    """The rows group by group, or all together, whichever computes fewer tokens."""
    together = [rows]
    ends = np.cumsum(groups)
    apart = [rows.subset(part) for part in np.split(np.arange(len(rows)), ends[:-1])]

    def cost(parts: list[Rows]) -> int:
        """Tokens to compute, with each pass's fixed cost counted as ``CALL`` more."""
        total = 0
        for part in parts:
            after_prefix = int((part.token_counts - part.shared_prefix).sum())
            passes = -(-after_prefix // max(micro_batch_tokens - part.shared_prefix, 1))
            total += after_prefix + passes * (part.shared_prefix + CALL)
        return total

    return min(together, apart, key=cost)


def _document_sums(model: LanguageModel, batch: MicroBatch) -> npt.NDArray[np.float64]:
    """Sum of target log-probabilities of each document of one packed micro-batch."""
    device = next(model.parameters()).device
    labels = batch.labels[0]  # (T,)
    positions = (labels != IGNORE_INDEX).nonzero()[:, 0]
    hidden = model.hidden_states(batch.input_ids.to(device), lengths=batch.lengths, shared_prefix=batch.shared_prefix)
    states = hidden[0, positions.to(device)]  # (targets, D)
    targets = labels[positions].to(device)

    # In chunks, because logits of a whole micro-batch over the vocabulary would take more memory than the model.
    losses: list[Tensor] = [
        functional.cross_entropy(model.logits(some).float(), label, reduction="none")
        for some, label in zip(torch.split(states, CHUNK), torch.split(targets, CHUNK), strict=True)
    ]
    nats = torch.cat(losses).double().cpu().numpy() if losses else np.zeros(0)

    # A micro-batch is the shared prefix once, which holds no targets, and then the rest of each document.
    document_of_token = np.repeat(np.arange(len(batch.lengths)), np.array(batch.lengths) - batch.shared_prefix)
    document = document_of_token[positions.numpy() - batch.shared_prefix]
    sums: npt.NDArray[np.float64] = np.zeros(len(batch.lengths))
    np.subtract.at(sums, document, nats)  # unlike `sums[document] -= nats`, this adds up repeated indices
    return sums
