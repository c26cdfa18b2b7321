"""Detect and kill training processes that hang, so that their trials are retried.

Every training process reports its progress to the LivenessMonitor, a Ray actor. A process that
reports no step for `patience` seconds is killed with SIGKILL, because it may be stuck in C code or
be stopped. Ray and Tune then handle it like any other process that dies. The answer to a report
tells a process which of its trials shall leave, because another process has room for them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pld_ray.store.claims import born
from pld_ray.store.store import Store

EVERY = 1.0  # seconds between two reports of a process


class Process(NamedTuple):
    """One process of a cluster.

    Attributes:
        node: Ray's id of its node.
        pid: Process id on that node.
        born: Start time in ticks since boot, or None if it is not known.
    """

    node: str
    pid: int
    born: int | None


class LivenessMonitor:
    """A Ray actor, one per driver, that kills processes that hang.

    Args:
        patience: Seconds without a step after which a process is killed.
        store_uri: Store in which the failure is noted.
    """

    def __init__(self, patience: float, store_uri: str) -> None:
        self.patience, self.store = patience, Store(store_uri)
        self.seen: dict[Process, tuple[list[str], float]] = {}  # trial ids, last report
        self.leaving: set[str] = set()
        self.task: asyncio.Task[None] | None = None

    async def alive(self, trial_ids: list[str], process: Process) -> set[str]:
        """Note the progress of a process; the first report starts its monitoring.

        Returns:
            The ids of those trials that shall leave the process; each is told once.
        """
        self.seen[process] = trial_ids, time.monotonic()
        if self.task is None:
            self.task = asyncio.create_task(self._look())
        told = self.leaving & set(trial_ids)
        self.leaving -= told
        return told

    async def move(self, trial_ids: set[str]) -> None:
        """Ask trials to leave their process after an epoch."""
        self.leaving |= trial_ids

    async def ended(self, process: Process) -> None:
        """Stop monitoring a process."""
        self.seen.pop(process, None)

    async def _look(self) -> None:
        """Loop forever and kill processes that are silent for too long."""
        while True:
            await asyncio.sleep(min(1.0, self.patience / 4))
            for process, (trial_ids, when) in list(self.seen.items()):
                if time.monotonic() - when > self.patience:
                    del self.seen[process]
                    with suppress(OSError):
                        for trial_id in trial_ids:
                            self.store.fail(trial_id, f"its process hung for {self.patience:g} s")
                    there = NodeAffinitySchedulingStrategy(process.node, soft=False)
                    ray.remote(_kill).options(num_cpus=0, scheduling_strategy=there).remote(process)


def _kill(process: Process) -> None:
    """Kill a process of this node."""
    if born(process.pid) == process.born:  # otherwise a new process has this pid
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def start_monitor(patience: float, store: Store) -> Any:
    """Start a LivenessMonitor on the driver's node, the node that lives as long as the driver.

    Args:
        patience: Seconds without a step after which a process is killed.
        store: Store in which failures are noted.

    Returns:
        The handle of the actor.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "scheduling_strategy": here, "max_restarts": -1}
    return (
        ray.remote(LivenessMonitor)
        .options(**options, max_task_retries=-1)
        .remote(patience, store.uri)
    )


@contextmanager
def monitored(
    watch: Any, trial_ids: Collection[str], leaving: set[str]
) -> Iterator[Callable[[], None]]:
    """Monitor this process during the `with` block.

    Args:
        watch: Handle of the LivenessMonitor. None turns monitoring off.
        trial_ids: Ids of the trials that this process trains; they may change.
        leaving: Receives the ids of trials that shall leave the process.

    Yields:
        A function to call after every training step.
    """
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
                with suppress(ray.exceptions.RayError):  # the monitor is restarted
                    leaving.update(ray.get(watch.alive.remote(sorted(trial_ids), process)))
            over.wait(EVERY)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield step
    finally:
        over.set()
        thread.join()
        watch.ended.remote(process)
