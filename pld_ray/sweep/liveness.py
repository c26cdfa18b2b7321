"""Signs of life: a trial whose process hangs is tried again.

Each process that trains tells the LivenessMonitor, a Ray actor, about every step. A process that
is silent for `patience` seconds is killed with SIGKILL, because it may be stuck in C code or be
stopped. Ray and Tune then react as they do whenever a process dies.
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

from pld_ray.store.claims import born
from pld_ray.store.store import Store

EVERY = 1.0  # seconds between two signs of life


class Process(NamedTuple):
    """One process of a cluster."""

    node: str
    pid: int
    born: int | None


class LivenessMonitor:
    """The Ray actor; of one driver."""

    def __init__(self, patience: float, store_uri: str) -> None:
        self.patience, self.store = patience, Store(store_uri)
        self.seen: dict[Process, tuple[str, float]] = {}  # its trial, and when
        self.task: asyncio.Task[None] | None = None

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
                    with suppress(OSError):
                        self.store.fail(trial_id, f"its process hung for {self.patience:g} s")
                    there = NodeAffinitySchedulingStrategy(process.node, soft=False)
                    ray.remote(_kill).options(num_cpus=0, scheduling_strategy=there).remote(process)


def _kill(process: Process) -> None:
    if born(process.pid) == process.born:  # else the number is another process's by now
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def start_monitor(patience: float, store: Store) -> Any:
    """A LivenessMonitor for this driver, on its own node, which is the one that lives as long."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "scheduling_strategy": here, "max_restarts": -1}
    return (
        ray.remote(LivenessMonitor)
        .options(**options, max_task_retries=-1)
        .remote(patience, store.uri)
    )


@contextmanager
def monitored(watch: Any, trial_id: str) -> Iterator[Callable[[], None]]:
    """For the `with` block this process is monitored; call what it gives after every step."""
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
