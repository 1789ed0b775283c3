"""Streaming text: ids go in one at a time, text comes out as soon as no later id can change it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["TextStream"]


class TextStream:
    """Joins ids to text. What :meth:`push` and :meth:`flush` give, joined, is the text of all the ids.

    One character may be spread over several ids (emoji, CJK), so an id is never decoded alone: the ids since the
    last but one certain place are decoded together, and the part before them is subtracted. Their text is held back
    while it ends in U+FFFD, the sign of an unfinished character.

    Args:
        decode: Ids to text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # context whose text is out, then ids whose text is held back
        self._context = 0
        self._shown = ""  # text of the context

    def push(self, token_id: int) -> str:
        """Take the next id; give the text that is certain now, perhaps none."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith("\ufffd") or len(text) <= len(self._shown):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """Give what was held back: the bytes of a character that was never finished, as U+FFFD."""
        return self._advance(self._decode(self._ids)) if self._ids else ""

    def _advance(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._ids = self._ids[self._context :]
        self._context = len(self._ids)
        self._shown = self._decode(self._ids)
        return new
