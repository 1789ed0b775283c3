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
    """How tokens are drawn. By default the most likely one each time, so the same prompt gets the same answer."""

    max_new_tokens: int = Field(256, ge=1, description="Maximum length of the answer in tokens.")
    temperature: float = Field(0.0, ge=0, description="Randomness of the draw; 0 takes the most likely token.")
    top_k: int | None = Field(None, ge=1, description="Draw only among the k most likely tokens.")
    top_p: float | None = Field(
        None, ge=0, le=1, description="Draw only among the most likely tokens whose probabilities add up to this."
    )
    min_p: float | None = Field(
        None, ge=0, le=1, description="Draw only among tokens with at least this share of the best one's probability."
    )
    repetition_penalty: float = Field(
        1.0, gt=0, description="Penalty on tokens that already occur; above 1 makes them less likely."
    )
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="Seed for reproducible draws; a different one each time when omitted."
    )


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
    if sampling.temperature == 0:  # no probabilities needed: one pass over the vocabulary
        _, _, best_tokens = _scores(logits, sampling, seen)
        tokens: list[int] = best_tokens.tolist()
        return tokens
    return draw(probabilities(logits, sampling, seen), generators)


def _scores(logits: Tensor, sampling: Sampling, seen: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Penalised logits (B, V) float32, the best of each row, (B, 1), and its token, (B,).

    Raises:
        NumericalError: A logit is NaN, or a whole row is infinite.
    """
    scores = logits.float()
    penalty = sampling.repetition_penalty
    if seen is not None and penalty != 1.0:
        # Dividing a negative logit would make its token more likely.
        penalized = torch.where(scores > 0, scores / penalty, scores * penalty)
        scores = torch.where(seen, penalized, scores)
    best, tokens = scores.max(dim=-1)
    if not torch.isfinite(best).all():  # NaN anywhere in a row makes its maximum NaN
        raise NumericalError(
            "the model produced NaN or infinite logits", hint="check the adapter, or use dtype float32"
        )
    return scores, best[:, None], tokens


def probabilities(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Probabilities of the next token under ``sampling``.

    The order of the filters is transformers': repetition penalty, temperature, top-k, top-p, min-p. The most likely
    token always stays. At temperature 0 it has probability 1.

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
    vocabulary = scores.shape[-1]
    count = min(sampling.top_k or vocabulary, vocabulary)
    if count == vocabulary and sampling.top_p is None and not sampling.min_p:
        return torch.softmax(scores, dim=-1)

    ranked, tokens = scores.topk(count, dim=-1)  # (B, k), best first
    chances = torch.softmax(ranked, dim=-1)
    keep = torch.ones_like(chances, dtype=torch.bool)
    if sampling.top_p is not None and sampling.top_p < 1:
        better = chances.cumsum(dim=-1) - chances  # the sum before each token: the one that reaches top_p stays
        keep &= better < sampling.top_p
    if sampling.min_p is not None:
        keep &= chances >= sampling.min_p * chances[:, :1]
    keep[:, 0] = True
    chances = torch.where(keep, chances, 0.0)
    return torch.zeros_like(scores).scatter_(-1, tokens, chances / chances.sum(dim=-1, keepdim=True))


def draw(chances: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
    """Draw one token per row; each row has its own generator, so its draws do not depend on the other rows.

    Args:
        chances: (B, V) float32.
        generators: One per row, on the device of ``chances``.
    """
    return [
        int(torch.multinomial(row, 1, generator=generator)) for row, generator in zip(chances, generators, strict=True)
    ]
