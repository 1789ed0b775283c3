"""Take JSON values one after another from a text of any length."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, TextIO

__all__ = ["JsonStream", "ends_early", "skip_separators"]

_CHUNK = 1 << 20
"""Characters read at once."""

_LONGEST_LITERAL = len("-Infinity")
_BETWEEN = re.compile(r"[\s,]*")
"""What may stand between two values. Commas too many or too few are harmless."""


def skip_separators(text: str, position: int) -> int:
    """The position of the next value or bracket."""
    match = _BETWEEN.match(text, position)
    assert match is not None  # it matches nothing, too
    return match.end()


def ends_early(error: json.JSONDecodeError, text: str) -> bool:
    """Whether a text is wrong only in that it ends too early."""
    return error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")


class JsonStream:
    """A text of which only the value that is being decoded is in memory.

    Args:
        head: The beginning of the text.
        file: The rest of it.
        raw_decode: ``json.JSONDecoder.raw_decode``.
    """

    def __init__(self, head: str, file: TextIO, raw_decode: Callable[[str, int], tuple[Any, int]]) -> None:
        self._text = head
        self._file = file
        self._raw_decode = raw_decode
        self._at = 0
        self.line = 1
        """The line of the next character."""
        self.ended = False
        """Whether all of the file has been read."""
        self._read_on()

    @property
    def rest(self) -> str:
        """What has been read and not yet taken."""
        return self._text[self._at :]

    def peek(self) -> str:
        """The first character of the next value, or a bracket; empty at the end."""
        while True:
            self._advance(skip_separators(self._text, self._at))
            if self._at < len(self._text):
                return self._text[self._at]
            if self.ended:
                return ""
            self._read_on()

    def skip(self, character: str) -> None:
        """Take a bracket that :meth:`peek` has shown."""
        assert self.peek() == character
        self._advance(self._at + 1)

    def take(self) -> tuple[Any, str]:
        """The next value, decoded and as it is written.

        Raises:
            ValueError: It is not JSON.
            RecursionError: It is nested too deeply.
        """
        while True:
            try:
                value, end = self._raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self.ended or not self._may_be_cut(error):
                    raise
            else:
                # At the end of what was read, 12 may be the beginning of 123.
                if end < len(self._text) or self.ended:
                    text = self._text[self._at : end]
                    self._advance(end)
                    return value, text
            self._read_on()

    def line_of(self, error: Exception) -> int:
        """The line of what :meth:`take` raised."""
        position = error.pos if isinstance(error, json.JSONDecodeError) else self._at
        return self.line + self._text.count("\n", self._at, position)

    def is_cut(self, error: Exception) -> bool:
        """Whether what :meth:`take` raised is that the text ends too early."""
        return self.ended and isinstance(error, json.JSONDecodeError) and ends_early(error, self._text)

    def resynchronize(self) -> bool:
        """Go on after a bad value: to the next line that begins an object, indented no more than the bad one.

        Returns:
            Whether there is one.
        """
        indent = self._at - self._text.rfind("\n", 0, self._at) - 1
        next_object = re.compile(rf"\n[ \t]{{0,{indent}}}(?=\{{)")
        while True:
            match = next_object.search(self._text, self._at)
            if match is not None:
                self._advance(match.end())
                return True
            if self.ended:
                return False
            # Only the last line is still of interest.
            self._advance(max(self._at, self._text.rfind("\n")))
            self._read_on()

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the value may be whole once more of the file is read."""
        if error.msg.startswith("Unterminated string"):
            return True
        return error.pos >= len(self._text) - _LONGEST_LITERAL

    def _advance(self, position: int) -> None:
        self.line += self._text.count("\n", self._at, position)
        self._at = position

    def _read_on(self) -> None:
        """Read more, and drop what was taken, but for the beginning of the line."""
        line_start = self._text.rfind("\n", 0, self._at) + 1
        if self._at - line_start > _CHUNK:  # a whole file in one line
            line_start = self._at
        self._text = self._text[line_start:]
        self._at -= line_start
        # Twice as much each time, so that a long value is not decoded over and over.
        chunk = self._file.read(max(_CHUNK, len(self._text)))
        self._text += chunk
        self.ended = not chunk
