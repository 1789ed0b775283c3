"""The errors a user can cause, each with the exit code that the command line returns for it.

Every message is one line: where, what is wrong, what was expected. ``hint`` is how to mend it.
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
]


class LitLoraError(Exception):
    """A problem that the user can act on; the command line prints it without a traceback.

    Args:
        message: One line, or several lines when several problems are reported at once.
        hint: How to mend it, one line.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    def report(self) -> int:
        """Print the problems and the hint to stderr; returns the exit code."""
        for line in str(self).splitlines():
            print(f"error: {line}", file=sys.stderr)
        if self.hint:
            print(f"hint: {self.hint}", file=sys.stderr)
        return self.exit_code


class UsageError(LitLoraError):
    """Wrong command line or config: an unknown key, a value out of range, an option that does not apply."""

    exit_code = 2


class InputError(LitLoraError):
    """Wrong input file: a dataset row, a checkpoint, an adapter that does not belong to this model."""

    exit_code = 3


class DiskError(LitLoraError):
    """The disk is full, read-only or failing. What was there before is still there."""

    exit_code = 4


class NumericalError(LitLoraError):
    """Training stopped because the numbers went wrong: NaN or infinite loss or gradients, a lossy merge."""

    exit_code = 5


class OutOfMemoryError(LitLoraError):
    """The machine's memory is not enough for what was asked."""

    exit_code = 6


def disk_error(error: OSError) -> DiskError:
    """What the operating system refused and nothing nearer the cause told: an unreadable file, a name too long.

    Raises:
        OSError: ``error``, if it is about no file: a fault of ours.
    """
    if error.filename is None or error.strerror is None:
        raise error
    return DiskError(f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}")


class Interrupted(LitLoraError):
    """A signal stopped the work; the exit code is the shell's convention, 128 + signal."""

    def __init__(self, number: int, message: str, hint: str = "the same command with --resume continues") -> None:
        super().__init__(message, hint=hint)
        self.exit_code = 128 + number
