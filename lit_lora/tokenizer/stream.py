"""Streaming text: ids go in one by one, text comes out once no later id can change it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["TextStream"]


class TextStream:
    """Decodes ids as they come. The joined results of :meth:`push` and :meth:`flush` are the text of all ids.

    A character may take several ids (emoji, CJK), and a tokenizer may treat the start of a text differently, so no id
    is decoded alone: it is decoded together with the ids emitted last, whose text is then removed. Text that ends in
    U+FFFD, the sign of an unfinished character, is kept back until it is complete.

    Args:
        decode: Ids to text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the context (ids emitted last), then ids whose text is not emitted yet
        self._context_length = 0
        self._context_text = ""

    def push(self, token_id: int) -> str:
        """Take the next id and return the text that is certain now, perhaps none."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith("\ufffd") or len(text) <= len(self._context_text):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """Return what was kept back: the bytes of a character that was never completed, as U+FFFD."""
        if not self._ids:
            return ""
        return self._advance(self._decode(self._ids))

    def _advance(self, text: str) -> str:
        """Emit the text after the context; the ids just emitted are the next context."""
        new_text = text[len(self._context_text) :]
        self._ids = self._ids[self._context_length :]
        self._context_length = len(self._ids)
        self._context_text = self._decode(self._ids)
        return new_text
