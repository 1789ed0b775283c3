"""A tiny model as lit-lora opens it from its checkpoint, beside the model of transformers that wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_lora import IGNORE_INDEX
from lit_lora.checkpoint.load import load_model
from lit_lora.data.batches import MicroBatch
from lit_lora.model import CausalLM
from tests.families import tiny_configs

__all__ = ["LENGTHS", "SHARED", "Opened", "documents", "error", "micro_batch", "open_tiny", "row"]

LENGTHS = [11, 7, 14]  # past every window, which are of 5
SHARED = 3
"""Tokens that all documents begin with."""

# transformers itself differs by 4 % between its eager function and the one it uses by default.
_SDPA = {"falcon#alibi"}


@dataclass(frozen=True)
class Opened:
    """Two implementations of one checkpoint."""

    ours: Any
    """A :class:`lit_lora.model.LanguageModel`."""
    theirs: Any
    """The model of transformers, with the same weights."""
    folder: Path

    @property
    def path(self) -> str:
        """Which of lit-lora's two ways it runs on."""
        return "own" if isinstance(self.ours, CausalLM) else "hosted"

    @property
    def packing(self) -> str:
        """How it computes packed documents."""
        return "own attention" if isinstance(self.ours, CausalLM) else str(self.ours.way)

    @torch.no_grad()
    def logits_alone(self) -> list[Tensor]:
        """(T, V) of each of :func:`documents`, from transformers."""
        return [self.theirs(input_ids=ids[None], use_cache=False).logits[0] for ids in documents()]


def open_tiny(key: str, folder: Path) -> Opened:
    """Save the model of ``key`` in ``folder``, and open it.

    Raises:
        InputError: lit-lora refuses it.
    """
    theirs = tiny_configs.save(key, folder)
    if key in _SDPA:
        theirs = tiny_configs.build(key, attn="sdpa")
    return Opened(load_model(folder), theirs, folder)


def documents() -> list[Tensor]:
    """Token ids of documents of ``LENGTHS`` that begin with the same ``SHARED`` tokens."""
    generator = torch.Generator().manual_seed(1)
    first, *others = (torch.randint(10, tiny_configs.VOCABULARY, (n,), generator=generator) for n in LENGTHS)
    return [first, *(torch.cat([first[:SHARED], other[SHARED:]]) for other in others)]


def row(parts: list[Tensor], shared: int) -> Tensor:
    """The documents' tokens, or values for them, end to end, with those of a shared prefix once."""
    return torch.cat([parts[0], *(part[shared:] for part in parts[1:])])


def micro_batch(shared: int) -> MicroBatch:
    """The documents, with targets behind what they share."""
    labels = []
    for ids in documents():
        following = torch.cat([ids[1:], ids.new_full((1,), IGNORE_INDEX)])
        following[:SHARED] = IGNORE_INDEX
        labels.append(following)
    rows = list(range(len(LENGTHS)))
    return MicroBatch(row(documents(), shared)[None], row(labels, shared)[None], LENGTHS, rows, shared)


def error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())
