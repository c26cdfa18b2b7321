"""Where and in which precision a trial computes, and the seconds spent in its parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from pld_ray.config.trial import Trial


def pick_device() -> torch.device:
    """The CUDA device of this process if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if dist.is_initialized():
        from ray.train.torch import get_device

        return get_device()
    return torch.device("cuda")


def uses_bfloat16(trial: Trial, device: torch.device) -> bool:
    """Whether forward passes run in bfloat16 under autocast."""
    return trial.precision == "bfloat16" or (trial.precision == "auto" and device.type == "cuda")


def memory_format(trial: Trial) -> torch.memory_format:
    """The layout of images and convolutions."""
    return torch.channels_last if trial.channels_last else torch.contiguous_format


class Clock:
    """Seconds spent in each named part; on CUDA measured by events, without stopping the device.

    alive: called at the beginning of each part.
    """

    def __init__(self, device: torch.device, alive: Callable[[], None] = lambda: None) -> None:
        self.cuda = device.type == "cuda"
        self.alive = alive
        self.seconds: dict[str, float] = {}
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the time inside the `with` block to `part`."""
        self.alive()
        if self.cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self.events.append((part, begin, end))
        else:
            started = time.perf_counter()
            yield
            self.add(part, time.perf_counter() - started)

    def add(self, part: str, seconds: float) -> None:
        """Count seconds that were measured, or estimated, elsewhere."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def read(self) -> dict[str, float]:
        """Seconds by part since the last reading."""
        if self.cuda:
            torch.cuda.synchronize()
        for part, begin, end in self.events:
            self.add(part, begin.elapsed_time(end) / 1000)
        found, self.seconds, self.events = self.seconds, {}, []
        return found
