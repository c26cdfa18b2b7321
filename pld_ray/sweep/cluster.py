"""Join a Ray cluster, or start one on this machine."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray

from pld_ray.errors import InputError

START_SECONDS = 180  # Ray's own limit of 30 is too short for a busy machine or a slow disk
# A raylet ends if its agents do not start within 15 seconds. Ray has no setting for this either.
START_ATTEMPTS = 4


class RayletEnded(Exception):
    """The raylet of a Ray that starts here has ended."""


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Connect to Ray for the `with` block, and disconnect at its end.

    An existing connection of this process is used as it is and stays open.

    Args:
        address: Address of the cluster to join. By default, join the cluster that runs on this
            machine, or start a local one.

    Raises:
        InputError: The cluster does not answer or refuses the connection, or a local one does not
            start.
    """
    owned = not ray.is_initialized()
    if owned:
        before = signal.getsignal(signal.SIGTERM)
        # the workers of a joined cluster run this code, not the version installed there
        code = {"py_modules": [_package("pld_ray"), _package("analysis")]} if address else None
        where = "local" if address is None and not _runs_here() else address
        try:
            init(address=where, runtime_env=code, log_to_driver=False)
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
            raise InputError(
                f"Ray cluster {address or 'on this machine'}: cannot connect: {_reason(error)}"
            ) from None
        except SystemExit:  # raised by the SIGTERM handler that Ray installs during init
            if callable(before):
                before(signal.SIGTERM, None)
            raise
        except Exception as error:
            if not isinstance(error, RayletEnded) and "timed out during startup" not in str(error):
                raise
            raise InputError(
                "Ray did not start on this machine; expected one with less other work, or see its "
                "logs, by default in /tmp/ray/session_latest/logs"
            ) from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's handler exits at once
    try:
        yield
    finally:
        if owned:
            ray.shutdown()


def init(**options: Any) -> None:
    """Call `ray.init`. A Ray that starts here gets more time and attempts than Ray gives it.

    Raises:
        RayletEnded: It did not start.
    """
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            with patient_start():
                ray.init(**options)
            return
        except RayletEnded as error:
            _end_processes(error)
            if attempt == START_ATTEMPTS:
                raise


@contextmanager
def patient_start() -> Iterator[None]:
    """Let a Ray that starts here take up to `START_SECONDS`; Ray has no setting for it.

    Raises:
        RayletEnded: In the `with` block, while Ray starts: its raylet has ended.
    """
    services = ray._private.services
    ask, start = services.get_node, services.start_raylet
    raylets = []

    def start_raylet(*args: Any, **kwargs: Any) -> Any:
        raylets.append(start(*args, **kwargs))
        return raylets[-1]

    def get_node(*node: str) -> object:
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                return ask(*node)
            except RuntimeError:  # not registered yet
                if any(raylet.process.poll() is not None for raylet in raylets):
                    raise RayletEnded from None
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    services.get_node, services.start_raylet = get_node, start_raylet
    try:
        yield
    finally:
        services.get_node, services.start_raylet = ask, start


def _end_processes(error: BaseException) -> None:
    """End the processes of a Ray that did not start; Ray itself leaves them."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        node = frame.f_locals.get("self")
        if isinstance(node, ray._private.node.Node):
            node.kill_all_processes(check_alive=False, allow_graceful=False)


def _runs_here() -> bool:
    """Return whether a Ray cluster runs here, without Ray's long wait for a dead one."""
    if os.environ.get("RAY_ADDRESS"):
        return True
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    try:
        reach(note.read_text())
    except (OSError, InputError):
        return False
    return True


def _package(name: str) -> str:
    """Return the folder of an installed package."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent)


def _reason(error: BaseException) -> str:
    """Return the first sentence of the root cause; some Ray errors contain a whole traceback."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = re.split(r"\nray\.exceptions\.\w+: ", str(error) or type(error).__name__)[-1]
    return said.splitlines()[0].partition(". ")[0]


def reach(address: str) -> None:
    """Check that something listens at an address, because Ray itself would retry for minutes.

    Args:
        address: HOST:PORT, or a URL with host and port.

    Raises:
        InputError: The address is malformed, or nothing answers there within 10 seconds.
    """
    try:
        place = urlsplit(address if "//" in address else f"//{address}")
        if not place.hostname or not place.port:
            raise ValueError("expected HOST:PORT")
        socket.create_connection((place.hostname, place.port), timeout=10).close()
    except (OSError, ValueError) as error:
        raise InputError(
            f"--address is {address!r}: no Ray cluster answers there: {error}"
        ) from None
