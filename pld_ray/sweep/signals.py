"""Defer SIGINT and SIGTERM to a safe point while Ray runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def signals_deferred() -> Iterator[Callable[[], None]]:
    """Defer SIGINT and SIGTERM during the `with` block.

    An exception that a signal handler raises inside Ray's own code may surface as another
    exception. So the first signal is only noted. A second signal is handled at once.

    Yields:
        A function to call at safe points. It runs the previous handler of each noted signal.
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
