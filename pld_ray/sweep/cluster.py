"""A Ray cluster: joined, or started on this machine."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import ray

from pld_ray.errors import InputError


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Join a cluster or start Ray for the `with` block; what was started is shut down after."""
    owned = not ray.is_initialized()
    if owned:
        before = signal.getsignal(signal.SIGTERM)
        # the workers of a cluster run this code, whatever version is installed there
        code = {"py_modules": [_package("pld_ray"), _package("analysis")]} if address else None
        where = "local" if address is None and not _runs_here() else address
        try:
            ray.init(address=where, runtime_env=code, log_to_driver=False)
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
            raise InputError(f"Ray cluster {address or 'here'}: {_reason(error)}") from None
        except SystemExit:  # by the SIGTERM handler that Ray sets meanwhile
            if callable(before):
                before(signal.SIGTERM, None)
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray would end the process on the spot
    try:
        yield
    finally:
        if owned:
            ray.shutdown()


def _runs_here() -> bool:
    """Whether a cluster runs on this machine; Ray itself would wait for one that has died."""
    if os.environ.get("RAY_ADDRESS"):
        return True
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    try:
        reach(note.read_text())
    except (OSError, InputError):
        return False
    return True


def _package(name: str) -> str:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent)


def _reason(error: BaseException) -> str:
    """The first sentence of what Ray raised first; some errors of its hold a traceback as text."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = re.split(r"\nray\.exceptions\.\w+: ", str(error) or type(error).__name__)[-1]
    return said.splitlines()[0].partition(". ")[0]


def reach(address: str) -> None:
    """Raise InputError if nothing listens there; Ray itself would try for minutes."""
    try:
        place = urlsplit(address if "//" in address else f"//{address}")
        if not place.hostname or not place.port:
            raise ValueError("expected HOST:PORT")
        socket.create_connection((place.hostname, place.port), timeout=10).close()
    except (OSError, ValueError) as error:
        raise InputError(
            f"--address is {address!r}: no Ray cluster answers there: {error}"
        ) from None
