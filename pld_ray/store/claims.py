"""Which driver runs which trial: several may work on one store, and none does another's work.

    ROOT/drivers/NAME.json           a driver's sign of life: valid for LEASE seconds, then renewed
    ROOT/trials/ID/claim-NAME.json   it wants the trial, or has it

A driver has a trial when, after its claim was written, it has seen none of another one that is
alive. Of two, the later to write sees the earlier: so both may give way, and try again, but never
do both have it; nothing is asked of the storage but that what is written can be read. Should a
driver be taken for dead because its machine slept, a trial runs twice: to the same bits, and each
file of it stays whole.
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
    """The claims of this driver; as a context manager it gives signs of life."""

    LEASE = 30.0  # seconds; clocks of machines that share a store should differ by less

    def __init__(self, files: Files) -> None:
        self.files = files
        self.name = uuid4().hex[:12]
        self.held: set[str] = set()  # ids of trials
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> Claims:
        for name in self.files.listed("drivers"):
            if not self._alive(name.removesuffix(".json")):
                self.files.delete(f"drivers/{name}")
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
        with suppress(OSError):  # what is not released runs out
            for trial_id in list(self.held):
                self.release(trial_id)
            self.files.delete(f"drivers/{self.name}.json")

    def take(self, trial_id: str) -> bool:
        """Claim a trial; False if another driver that is alive has it, or wants it as well."""
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
            if min(others) < self.name:  # else it is the others that give way at once
                break
            time.sleep(0.1)
        self.files.delete(mine)
        return False

    def release(self, trial_id: str) -> None:
        """The trial has ended here, in whatever way."""
        self.held.discard(trial_id)
        self.files.delete(self._path(trial_id, self.name))

    # ----

    def _path(self, trial_id: str, driver: str) -> str:
        return f"trials/{trial_id}/claim-{driver}.json"

    def _others(self, trial_id: str) -> list[str]:
        """Drivers that are alive and claim the trial; claims of dead ones are cleared away."""
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
        sign = self._read(f"drivers/{driver}.json")
        if sign.get("machine") == _machine() and not _runs(sign):
            return False
        until = sign.get("until")
        return isinstance(until, (int, float)) and time.time() < until

    def _read(self, path: str) -> dict[str, Any]:
        try:
            value = json.loads(self.files.read(path) or b"{}")
        except ValueError:
            value = {}
        return value if isinstance(value, dict) else {}

    def _sign(self) -> None:
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
        while not self.stopped.wait(self.LEASE / 6):
            with suppress(OSError):  # a full disk, a network that is away: try again
                self._sign()


def _machine() -> str | None:
    """Stands for this boot of this machine, as far as this process sees it; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def born(pid: int) -> int | None:
    """When a process of this machine began, in ticks since boot; None if it has ended."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else int(rest[18])


def _runs(sign: dict[str, Any]) -> bool:
    pid = sign.get("pid")
    return sign.get("born") is None or (isinstance(pid, int) and born(pid) == sign["born"])
