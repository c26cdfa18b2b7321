"""Claims: several drivers can work on one store, and each trial is run by one of them.

    ROOT/drivers/NAME.json           the heartbeat of a driver: valid for LEASE seconds
    ROOT/trials/ID/claim-NAME.json   the driver wants the trial, or has it

A driver has a trial if it has written its claim and then sees no claim of another live driver. Of
two drivers, the one that writes last sees the claim of the other. So both may give way and try
again, but they never both have the trial. This needs one property of the storage: a file that was
written can be read by every driver. If a driver is considered dead because its machine was
suspended, a trial can run twice. Both runs compute the same bits, and each file stays whole.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from pld_ray.store.files import Files


class Claims:
    """The claims of this driver. As a context manager, it renews the heartbeat of the driver.

    Args:
        files: The files of the store.
    """

    LEASE = 30.0  # seconds; the clocks of machines that share a store must differ by less

    def __init__(self, files: Files) -> None:
        self.files = files
        self.name = uuid4().hex[:12]
        self.held: set[str] = set()  # trial ids
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> Claims:
        drivers = [name.removesuffix(".json") for name in self.files.listed("drivers")]
        if dead := [driver for driver in drivers if not self._alive(driver)]:
            self._remove(dead)
        self._sign()
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stopped.set()
        self.thread.join()
        with suppress(OSError):  # claims that are not released expire with the heartbeat
            for trial_id in list(self.held):
                self.release(trial_id)
            self.files.delete(f"drivers/{self.name}.json")

    def take(self, trial_id: str) -> bool:
        """Claim a trial.

        Args:
            trial_id: The id of the trial.

        Returns:
            True if this driver has the trial. False if another live driver has it, or if this
            driver gives way to another one that wants it too; the caller may try again later.
        """
        mine = self._path(trial_id, self.name)
        if trial_id in self.held:
            return True
        if self._others(trial_id):
            return False
        self.files.write(mine, b"{}")
        for _ in range(5):
            others = self._others(trial_id)
            if not others:
                self.held.add(trial_id)
                return True
            if min(others) < self.name:  # the smallest name wins; the other drivers give way
                break
            time.sleep(0.1)
        self.files.delete(mine)
        return False

    def release(self, trial_id: str) -> None:
        """Release the claim on a trial, whatever its outcome."""
        self.held.discard(trial_id)
        self.files.delete(self._path(trial_id, self.name))

    def drivers(self) -> int:
        """Return the number of live drivers of the store, with this one."""
        names = {name.removesuffix(".json") for name in self.files.listed("drivers")}
        return sum(map(self._alive, names | {self.name}))

    def _remove(self, dead: list[str]) -> None:
        """Delete what dead drivers left: first their claims, then their heartbeats."""
        claims = {f"claim-{driver}.json" for driver in dead}
        for path in self.files.listed("trials"):
            if path.rpartition("/")[2] in claims:
                self.files.delete(f"trials/{path}")
        for driver in dead:
            self.files.delete(f"drivers/{driver}.json")

    def _path(self, trial_id: str, driver: str) -> str:
        return f"trials/{trial_id}/claim-{driver}.json"

    def _others(self, trial_id: str) -> list[str]:
        """Return the other live drivers that claim a trial, and delete the claims of dead ones."""
        found = []
        for name in self.files.listed(f"trials/{trial_id}"):
            driver = name.removeprefix("claim-").removesuffix(".json")
            if name != f"claim-{driver}.json" or driver == self.name:
                continue
            if self._alive(driver):
                found.append(driver)
            else:
                self.files.delete(self._path(trial_id, driver))
        return found

    def _alive(self, driver: str) -> bool:
        """Return whether the heartbeat of a driver is valid and its process still runs."""
        sign = self._read(f"drivers/{driver}.json")
        if sign.get("machine") == _machine() and not _runs(sign):
            return False
        until = sign.get("until")
        return isinstance(until, (int, float)) and time.time() < until

    def _read(self, path: str) -> dict[str, Any]:
        """Read a JSON mapping; a missing or damaged file is an empty mapping."""
        try:
            value = json.loads(self.files.read(path) or b"{}")
        except ValueError:
            value = {}
        return value if isinstance(value, dict) else {}

    def _sign(self) -> None:
        """Write the heartbeat of this driver."""
        pid = os.getpid()
        sign = {
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": pid,
            "born": born(pid),
            "until": time.time() + self.LEASE,
        }
        self.files.write(f"drivers/{self.name}.json", json.dumps(sign).encode())

    def _renew(self) -> None:
        """Renew the heartbeat until the driver stops."""
        while not self.stopped.wait(self.LEASE / 6):
            with suppress(OSError):  # the disk is full or the network is down: try again
                self._sign()


def _machine() -> str | None:
    """Identify this boot and process namespace of this machine; None if they are unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def born(pid: int) -> int | None:
    """Return the start time of a process on this machine.

    Args:
        pid: The id of the process.

    Returns:
        The start time in clock ticks since boot, or None if the process has ended.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else int(rest[18])


def _runs(sign: dict[str, Any]) -> bool:
    """Return whether the process of a heartbeat still runs on this machine."""
    pid = sign.get("pid")
    return sign.get("born") is None or (isinstance(pid, int) and born(pid) == sign["born"])
