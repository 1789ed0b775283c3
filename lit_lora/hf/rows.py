"""The three ways in which a hosted model computes packed documents.

========================  =====================================================================================
own attention             one row, with a shared prefix once; attention is ours, all else is the model's
position ids              one row; the model builds a mask from positions that restart, as transformers packs
padded rows               one row per document, padded at the right: always right, and the only way for models
                          whose layers carry a state from token to token
========================  =====================================================================================

Whatever the way, the decoder is called with one flat row of embedded tokens, as our own decoder is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_lora.model.attention.documents import Layout
from lit_lora.model.ops import to_device

__all__ = ["PaddedRows", "PositionIds", "Rows", "Run", "Way"]

Way = Literal["own attention", "position ids", "padded rows"]

Run = Callable[..., Any]
"""The model's own forward pass: embedded tokens (B, T, D), token ids (B, T) and keyword arguments to its output."""


@runtime_checkable
class Rows(Protocol):
    """Tokens among which the model attends by itself."""

    def run(self, run: Run, embedded: Tensor, input_ids: Tensor) -> Tensor:
        """Embedded tokens (T, D) and their ids (T,) -> hidden states (T, D)."""


class PositionIds:
    """Documents in one row, told apart by positions that restart.

    Args:
        lengths: Tokens per document.
        shared_prefix: How many tokens every document begins with; they are copied into each.
    """

    def __init__(self, lengths: Sequence[int], shared_prefix: int) -> None:
        self.layout = Layout(lengths, shared_prefix)

    def run(self, run: Run, embedded: Tensor, input_ids: Tensor) -> Tensor:
        """See :class:`Rows`."""
        spread, ids = self.layout.spread(embedded), self.layout.spread(input_ids)
        positions = to_device(self.layout.positions(), embedded.device)
        # transformers compares positions to build its mask. The meta device has no values, but the same shapes without.
        more = {} if embedded.is_meta else {"position_ids": positions[None]}
        output = run(spread[None], ids[None], use_cache=False, **more)
        return self.layout.gather(output.last_hidden_state[0])


class PaddedRows:
    """Every document in a row of its own, padded at the right; arguments as for :class:`PositionIds`."""

    def __init__(self, lengths: Sequence[int], shared_prefix: int) -> None:
        self.layout = Layout(lengths, shared_prefix)

    def run(self, run: Run, embedded: Tensor, input_ids: Tensor) -> Tensor:
        """See :class:`Rows`."""
        lengths = self.layout.lengths
        spread, ids = (self._padded(self.layout.spread(x)) for x in (embedded, input_ids))
        real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        more: dict[str, Any] = {}
        if not embedded.is_meta and not bool(real.all()):
            more["attention_mask"] = to_device(real.long(), embedded.device)
        hidden = run(spread, ids, use_cache=False, **more).last_hidden_state
        rows = [row[:length] for row, length in zip(hidden, lengths, strict=True)]
        return self.layout.gather(torch.cat(rows))

    def _padded(self, spread: Tensor) -> Tensor:
        return pad_sequence(list(torch.split(spread, self.layout.lengths)), batch_first=True)
