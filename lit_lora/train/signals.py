"""SIGINT and SIGTERM while training: stop after the step instead of dying in it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["stop_signals"]


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying; a second one of either dies at once."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def remember(number: int, frame: Any) -> None:
        if received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.append(number)
        # Not through sys.stderr: the signal may have come while the progress bar was being written to it.
        os.write(2, b"\nstopping after this step; again stops at once\n")

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        try:
            previous[number] = signal.signal(number, remember)
        except ValueError:  # not in the main thread: leave signals to whoever runs us
            break
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
