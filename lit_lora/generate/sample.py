"""From logits to the next token: a pure function from logits to probabilities, and a draw from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from lit_lora.config import Settings
from lit_lora.errors import NumericalError

__all__ = ["Sampling", "choose", "draw", "probabilities"]


class Sampling(Settings):
    """How an answer is drawn. The defaults take the most likely token each time: the same answer every time."""

    max_new_tokens: int = Field(256, ge=1, description="Longest answer, in tokens.")
    temperature: float = Field(0.0, ge=0, description="0: the most likely token; higher: more variety.")
    top_k: int | None = Field(None, ge=1, description="Draw among the k most likely tokens.")
    top_p: float | None = Field(None, ge=0, le=1, description="Draw among the likeliest tokens that sum to this.")
    min_p: float | None = Field(None, ge=0, le=1, description="Draw among tokens this likely, relative to the best.")
    repetition_penalty: float = Field(1.0, gt=0, description="Above 1: tokens that already occur become less likely.")
    seed: int | None = Field(None, ge=0, lt=2**63, description="For the same draws again; another each time if absent.")


def choose(
    logits: Tensor, sampling: Sampling, seen: Tensor | None = None, generators: Sequence[torch.Generator] = ()
) -> list[int]:
    """The next token of each row: the most likely one at temperature 0, else a draw.

    Args:
        logits: (B, V), any floating dtype.
        sampling: The settings.
        seen: As in :func:`probabilities`.
        generators: As in :func:`draw`; not used at temperature 0.

    Raises:
        NumericalError: A logit is NaN, or a whole row is infinite.
    """
    if sampling.temperature == 0:  # one pass over the vocabulary, and no probabilities
        tokens: list[int] = _scores(logits, sampling, seen)[2].tolist()
        return tokens
    return draw(probabilities(logits, sampling, seen), generators)


def _scores(logits: Tensor, sampling: Sampling, seen: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Penalised logits (B, V) float32, the best of each row, (B, 1), and its token, (B,).

    Raises:
        NumericalError: A logit is NaN, or a whole row is infinite.
    """
    scores = logits.float()
    if seen is not None and sampling.repetition_penalty != 1.0:
        penalised = torch.where(scores > 0, scores / sampling.repetition_penalty, scores * sampling.repetition_penalty)
        scores = torch.where(seen, penalised, scores)
    best, tokens = scores.max(dim=-1)
    if not torch.isfinite(best).all():  # NaN anywhere in a row makes its maximum NaN
        raise NumericalError("the model's output is not a number", hint="check the adapter, or use dtype float32")
    return scores, best[:, None], tokens


def probabilities(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Probabilities of the next token under ``sampling``.

    The order of the filters is transformers': repetition penalty, temperature, top-k, top-p, min-p. The most likely
    token always stays. At temperature 0 it has all the probability.

    Args:
        logits: (B, V), any floating dtype.
        sampling: The settings.
        seen: (B, V) bool, tokens of the prompt and the answer so far; needed for the repetition penalty only.

    Returns:
        (B, V) float32, rows sum to 1.

    Raises:
        NumericalError: A logit is NaN, or a whole row is infinite.
    """
    scores, best, tokens = _scores(logits, sampling, seen)
    if sampling.temperature == 0:
        return torch.zeros_like(scores).scatter_(-1, tokens[:, None], 1.0)
    scores = (scores - best) / sampling.temperature  # the maximum is 0, so no temperature overflows
    count = min(sampling.top_k or scores.shape[-1], scores.shape[-1])
    if count == scores.shape[-1] and sampling.top_p is None and not sampling.min_p:
        return torch.softmax(scores, dim=-1)
    ranked, tokens = scores.topk(count, dim=-1)  # (B, k), best first
    chances = torch.softmax(ranked, dim=-1)
    keep = torch.ones_like(chances, dtype=torch.bool)
    if sampling.top_p is not None and sampling.top_p < 1:
        keep &= chances.cumsum(dim=-1) - chances < sampling.top_p
    if sampling.min_p is not None:
        keep &= chances >= sampling.min_p * chances[:, :1]
    keep[:, 0] = True
    chances = torch.where(keep, chances, 0.0)
    return torch.zeros_like(scores).scatter_(-1, tokens, chances / chances.sum(dim=-1, keepdim=True))


def draw(chances: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
    """Draw one token a row; each row has its own generator, so that its draws do not depend on the other rows.

    Args:
        chances: (B, V) float32.
        generators: One a row, on the device of ``chances``.
    """
    return [
        int(torch.multinomial(row, 1, generator=generator)) for row, generator in zip(chances, generators, strict=True)
    ]
