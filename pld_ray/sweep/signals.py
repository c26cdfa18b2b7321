"""SIGINT and SIGTERM while Ray runs: handled at a safe point."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def signals_deferred() -> Iterator[Callable[[], None]]:
    """SIGINT and SIGTERM do what they did before, but when what this gives is called.

    Raised in the midst of Ray's own code, an exception can come out as another one. A second
    signal is not deferred.
    """
    came: list[int] = []
    before: dict[int, Any] = {}

    def look() -> None:
        for number in came:
            if not callable(before[number]):
                raise KeyboardInterrupt
            before[number](number, None)

    def note(number: int, frame: Any) -> None:
        came.append(number)
        if len(came) > 1:
            look()

    if threading.current_thread() is threading.main_thread():
        before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield look
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
