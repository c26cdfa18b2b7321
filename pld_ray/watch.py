"""Signs of life: a trial that hangs is tried again, one that dies again and again is given up.

Each process that trains tells the Watch, a Ray actor, that it has done another step. From who says
nothing for `patience` seconds the Watch takes the process, with SIGKILL, as it may be stuck in C or
stopped: Ray and Tune then do what they do when a process dies.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pld_ray.claims import born

ATTEMPTS = 3  # to get beyond the epoch in which a trial's process died
EVERY = 1.0  # seconds between two signs of life


class Process(NamedTuple):
    """One process of a cluster."""

    node: str
    pid: int
    born: int | None


class Watch:
    """The Ray actor; of one driver."""

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.seen: dict[Process, tuple[str, float]] = {}  # its trial, and when
        self.begun: dict[str, tuple[int, int]] = {}  # trial -> epochs done then, how many times
        self.hung: set[str] = set()
        self.task: asyncio.Task[None] | None = None

    async def begin(self, trial_id: str, epochs: int) -> str | None:
        """An attempt begins with so many epochs done; why it should not, if so."""
        before, times = self.begun.get(trial_id, (epochs, 0))
        times = times + 1 if epochs <= before else 1
        self.begun[trial_id] = epochs, times
        if times <= ATTEMPTS:
            return None
        how = f"hung for {self.patience:g} s" if trial_id in self.hung else "died"
        return f"its process {how} {ATTEMPTS} times in epoch {epochs + 1}"

    async def alive(self, trial_id: str, process: Process) -> None:
        """The process has done something since it last said so."""
        self.seen[process] = trial_id, time.monotonic()
        if self.task is None:
            self.task = asyncio.create_task(self._look())

    async def ended(self, process: Process) -> None:
        """The process does something else now."""
        self.seen.pop(process, None)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self.patience / 4))
            for process, (trial_id, when) in list(self.seen.items()):
                if time.monotonic() - when > self.patience:
                    del self.seen[process]
                    self.hung.add(trial_id)
                    there = NodeAffinitySchedulingStrategy(process.node, soft=False)
                    ray.remote(_kill).options(num_cpus=0, scheduling_strategy=there).remote(process)


def _kill(process: Process) -> None:
    if born(process.pid) == process.born:  # else the number is another process's by now
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def open_watch(patience: float) -> Any:
    """A Watch for this driver, on its own node, which is the one that lives as long."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "scheduling_strategy": here, "max_restarts": -1}
    return ray.remote(Watch).options(**options, max_task_retries=-1).remote(patience)


@contextmanager
def watched(watch: Any, trial_id: str) -> Iterator[Callable[[], None]]:
    """For the `with` block this process is watched; call what it gives after every step."""
    if watch is None:
        yield lambda: None
        return
    process = Process(ray.get_runtime_context().get_node_id(), os.getpid(), born(os.getpid()))
    steps, over = [0], threading.Event()

    def step() -> None:
        steps[0] += 1

    def tell() -> None:
        told = -1
        while not over.is_set():
            if steps[0] != told:
                told = steps[0]
                watch.alive.remote(trial_id, process)
            over.wait(EVERY)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield step
    finally:
        over.set()
        thread.join()
        watch.ended.remote(process)
