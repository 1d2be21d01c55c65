"""Signals kept while a library is at work that swallows what they raise."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held(kept: list[int]) -> Iterator[None]:
    """Keep signals that Python handles, by number in ``kept``; behind the block the first is handled as ever."""
    if threading.current_thread() is not threading.main_thread():  # signals never come here
        yield
        return
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    earlier = {number: signal.getsignal(number) for number in map(signal.Signals.__getitem__, names)}
    ours = {number: handler for number, handler in earlier.items() if callable(handler)}

    def keep(number: int, frame: FrameType | None) -> None:
        del frame
        kept.append(number)

    for number in ours:
        signal.signal(number, keep)
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
        if kept:
            first = signal.Signals(kept[0])
            ours[first](first, None)
