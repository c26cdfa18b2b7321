"""Whether a process has memory for another trial of its gang.

The first step of a trial creates what it keeps (gradients, the state of the optimizer) and needs
the most at once. So what the first steps of other trials took says what one more needs.
"""

from __future__ import annotations

import math
import resource
from pathlib import Path

import torch

from pld_ray.data.stream import free_memory

SPARE = 2.0  # times the largest first step so far that must be free before another one
CGROUP = Path("/sys/fs/cgroup")


class NoRoom(RuntimeError):
    """The gang has no memory for the trial, which can run in another one."""


class FirstSteps:
    """Measures the first steps of trials in one process.

    Args:
        device: Where the trials run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.largest: float | None = None  # bytes
        self.before = 0.0

    def lacks_room(self) -> bool:
        """Return whether there is too little memory for the first step of another trial."""
        return self.largest is not None and available(self.device) < SPARE * self.largest

    def begin(self) -> None:
        """Note the memory before a first step."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            self.before = _most_used()

    def end(self) -> None:
        """Note the memory that the step has taken."""
        cuda = self.device.type == "cuda"
        most = torch.cuda.max_memory_allocated(self.device) if cuda else _most_used()
        self.largest = max(self.largest or 0.0, most - self.before)


def _most_used() -> float:
    """Return the most memory of the host that this process has used, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def available(device: torch.device) -> float:
    """Return the bytes that this process can still have; infinity if it is not known."""
    if device.type != "cpu":
        return free_memory(device)
    found = [math.inf]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024.0 * int(line.split()[1]) for line in lines if "MemAvailable" in line]
        limit, used = (CGROUP.joinpath(f"memory.{name}").read_text() for name in ("max", "current"))
        found.append(float(limit) - float(used))  # the limit may be "max", which is no number
    except (OSError, ValueError):
        pass
    return min(found)
