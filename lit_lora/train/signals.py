"""SIGINT and SIGTERM while training: stop after the current step, with a checkpoint, instead of within it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["stop_signals"]


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the list; a second signal ends the process at once."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def remember(number: int, frame: Any) -> None:
        if received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.append(number)
        # Not through sys.stderr: the signal may have come while the progress bar was being written to it.
        os.write(2, b"\nstopping after this step; repeat to stop at once\n")

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        try:
            previous[number] = signal.signal(number, remember)
        except ValueError:  # outside the main thread: whoever runs this handles signals
            break
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
