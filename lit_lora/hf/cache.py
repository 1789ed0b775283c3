"""A cache for generation by models that do not attend by our function: every row by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Native", "RowCache"]

Native = Literal["always", "single tokens", "never"]

_STATES = ("past_key_values", "cache_params", "state")
"""Names that transformers' models have for their cache, as an argument and in their output."""


class RowCache:
    """Used as :class:`lit_lora.model.KVCache`, but each row has a cache of transformers' own, or none.

    Recurrent models cannot forget their last tokens. Whatever a cache of transformers cannot do, such as forgetting or
    being copied, is done by reading the row again, from its first token, in the next pass.

    Args:
        batch_size: Rows B.
        max_length: Tokens per row, left padding included.
        native: Whether transformers' cache is used for all passes, for passes of a single token, or never; for other
            passes the row is read again.
        padding: (B,) int64, how many tokens at the left of each row are padding; ``None`` for no padding.
    """

    def __init__(self, batch_size: int, max_length: int, *, native: Native, padding: Tensor | None = None) -> None:
        self.native = native
        self.rows = [_Row(int(count)) for count in ([0] * batch_size if padding is None else padding)]
        self.max_length = max_length
        self.length = 0

    def run(self, run: Callable[..., Any], embedded: Tensor, input_ids: Tensor) -> Tensor:
        """Read the next tokens of every row; see :class:`lit_lora.hf.rows.Rows`. Hidden states of padding are 0."""
        tokens = len(input_ids) // len(self.rows)
        hidden = []
        for row, states, ids in zip(
            self.rows, torch.split(embedded, tokens), torch.split(input_ids, tokens), strict=True
        ):
            padding = min(max(row.padding - self.length, 0), tokens)
            hidden.append(states.new_zeros(padding, states.shape[1]))
            if padding < tokens:
                hidden.append(row.read(run, states[padding:], ids[padding:], native=self.native))
        return torch.cat(hidden)

    def copy_row(self, other: RowCache, row: int, tokens: int, start: int = 0) -> None:
        """As of :class:`lit_lora.model.KVCache`; the next pass reads the tokens again."""
        source = other.rows[0]
        self.rows[row] = _Row(start, source.embedded, source.ids)
        self.rows[row].keep(tokens)

    def select(self, rows: Tensor) -> None:
        """Keep only these rows, given as (rows,) int64 or a mask (B,)."""
        chosen = torch.arange(len(self.rows))[rows.cpu()]
        self.rows = [self.rows[index] for index in chosen.tolist()]

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` tokens as stored."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        if length < self.length:
            self.length = length
            for row in self.rows:
                row.keep(max(length - row.padding, 0))


@dataclass
class _Row:
    """What one row has read."""

    padding: int
    embedded: Tensor | None = None
    """(n, D) its tokens, without padding."""
    ids: Tensor | None = None
    """(n,) likewise."""
    state: Any = None
    """transformers' cache after these tokens; ``None`` if they are to be read again."""

    def keep(self, tokens: int) -> None:
        """Forget all but the first ``tokens`` tokens."""
        self.state = None
        if self.embedded is not None and self.ids is not None:
            self.embedded, self.ids = self.embedded[:tokens], self.ids[:tokens]

    def read(self, run: Callable[..., Any], embedded: Tensor, ids: Tensor, *, native: Native) -> Tensor:
        """Hidden states (T, D) of the next tokens."""
        if self.embedded is None or self.ids is None:
            self.embedded, self.ids = embedded, ids
        else:
            self.embedded, self.ids = torch.cat([self.embedded, embedded]), torch.cat([self.ids, ids])

        if self.state is None or (native == "single tokens" and len(ids) > 1):
            output = run(self.embedded[None], self.ids[None], use_cache=native != "never")
        else:
            name, state = self.state
            output = run(embedded[None], ids[None], use_cache=True, **{name: state})
        if native != "never":
            states = {name: getattr(output, name, None) for name in _STATES}
            self.state = next(((name, state) for name, state in states.items() if state is not None), None)
        hidden: Tensor = output.last_hidden_state[0]
        return hidden[-len(ids) :]
