"""Errors that a user can act on, each with the exit code that the command line returns for it.

A message is one line: where, what is wrong, what was expected. The hint says how to fix it.
"""

from __future__ import annotations

import sys

__all__ = [
    "DiskError",
    "InputError",
    "Interrupted",
    "LitLoraError",
    "NumericalError",
    "OutOfMemoryError",
    "UsageError",
    "disk_error",
    "first_line",
]


class LitLoraError(Exception):
    """A problem that the user can act on; the command line prints it without a traceback.

    Args:
        message: One line per problem.
        hint: How to fix it, one line.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    def report(self) -> int:
        """Print the message and the hint to stderr, and return the exit code."""
        for line in str(self).splitlines():
            print(f"error: {line}", file=sys.stderr)
        if self.hint:
            print(f"hint: {self.hint}", file=sys.stderr)
        return self.exit_code


class UsageError(LitLoraError):
    """Wrong command line or config: an unknown key, a value out of range, an option that does not apply."""

    exit_code = 2


class InputError(LitLoraError):
    """Wrong input file: a dataset row, a checkpoint, an adapter that does not fit the model."""

    exit_code = 3


class DiskError(LitLoraError):
    """The disk is full, read-only or failing. Existing files keep their contents."""

    exit_code = 4


class NumericalError(LitLoraError):
    """Numerical failure: NaN or infinite loss or gradients, or a lossy merge."""

    exit_code = 5


class OutOfMemoryError(LitLoraError):
    """The machine does not have enough memory."""

    exit_code = 6


def disk_error(error: OSError) -> DiskError:
    """An operating system's error that nothing closer to its cause explained: an unreadable file, a long name.

    Raises:
        OSError: ``error`` itself, if it names no file: then it is a bug, not the user's.
    """
    if error.filename is None or error.strerror is None:
        raise error
    return DiskError(f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}")


class Interrupted(LitLoraError):
    """A signal stopped the command; the exit code follows the shell's convention, 128 + signal."""

    def __init__(self, number: int, message: str, hint: str = "the same command with --resume continues") -> None:
        super().__init__(message, hint=hint)
        self.exit_code = 128 + number


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
