"""Device, its faults, precision, memory layout, and the seconds that the parts of a step take."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]  # of forward passes; weights are float32
SAMPLE = 16  # steps of which one is measured on CUDA
DEVICE_FAULTS = (
    "CUDA error", "cuDNN error", "CUDNN_STATUS", "CUBLAS_STATUS", "CUSOLVER_STATUS", "NCCL error",
    "HIP error",
)  # fmt: skip
MEMORY_FAULTS = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def pick_device() -> torch.device:
    """Return the CUDA device of this process if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_precision(precision: str, device: torch.device) -> Precision:
    """Return "float32" or "bfloat16"; "auto" means bfloat16 on a CUDA card that has it."""
    if precision == "auto":
        cuda = device.type == "cuda"
        fast = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if fast else "float32"
    return "float32" if precision == "float32" else "bfloat16"


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return a context in which forward passes run in this precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def use_deterministic(device: torch.device, strict: bool = True) -> None:
    """Choose algorithms that give the same bits in each run.

    Args:
        device: Nothing is chosen for the CPU, whose algorithms are deterministic.
        strict: Whether an operation that has none raises an error for which
            `lacks_deterministic` is true. Otherwise it is used with a warning of torch. So are
            backward passes of attention, although torch has deterministic ones of them.
    """
    torch.backends.cudnn.deterministic = True
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
        torch.use_deterministic_algorithms(True, warn_only=not strict)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def lacks_deterministic(error: BaseException) -> str | None:
    """Return what torch says about an operation without a deterministic algorithm, or None."""
    said = str(error) if isinstance(error, RuntimeError) else ""
    known = "does not have a deterministic implementation", "CUBLAS_WORKSPACE_CONFIG"
    return said.partition(", but")[0] if any(text in said for text in known) else None


def release_memory() -> None:
    """Give back the GPU memory that is not used any more, to this process and others."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def memory_format(channels_last: bool) -> torch.memory_format:
    """Return the memory layout of images and convolutions."""
    return torch.channels_last if channels_last else torch.contiguous_format


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or one that caused it, says that the accelerator has no memory."""
    return _is_fault(error, torch.OutOfMemoryError, MEMORY_FAULTS)


def device_failed(error: BaseException) -> bool:
    """Return whether an error, or one that caused it, is a fault of the accelerator.

    After such a fault, CUDA may refuse all further work of the process.
    """
    return _is_fault(error, torch.AcceleratorError, DEVICE_FAULTS)


def _is_fault(error: BaseException | None, kind: type[Exception], said: tuple[str, ...]) -> bool:
    """Return whether an error or one of its causes is of a kind, or contains one of the texts."""
    while error is not None:
        texts = str(error) if isinstance(error, RuntimeError) else ""
        if isinstance(error, kind) or any(text in texts for text in said):
            return True
        error = error.__cause__ or error.__context__
    return False


class Clock:
    """Seconds that each part of a training step takes.

    On CUDA, the parts of a step are measured by events, which do not make the host wait for the
    device. The events take time themselves: only the first step of an epoch and one of 16 later
    ones are measured, and those stand for the steps between them. Those of a CUDA graph are part
    of it, and its last replay stands for all replays.

    Args:
        device: The device that does the work.
        alive: Called at the beginning of each part: a sign that the process does not hang.
    """

    def __init__(self, device: torch.device, alive: Callable[[], None] = lambda: None) -> None:
        self.cuda = device.type == "cuda"
        self.alive = alive
        self.seconds: dict[str, float] = {}
        self.events: list[tuple[str, float, torch.cuda.Event, torch.cuda.Event]] = []
        self.weight = 1.0  # steps for which the present one stands; 0 if it is not measured
        self.capturing = False
        self.graph: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.replays = 0  # of the graph since the last `read`

    def step(self, number: int, steps: int, each: bool = False) -> None:
        """Begin a step.

        Args:
            number: The number of the step in its epoch, from 0.
            steps: The number of steps in the epoch.
            each: Whether to measure each step, because some of them are replays of a graph.
        """
        measured = range(SAMPLE // 2, steps, SAMPLE)
        if each or number == 0 or steps <= SAMPLE:
            self.weight = 1.0
        else:
            self.weight = (steps - 1) / len(measured) if number in measured else 0.0

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time inside the `with` block, a part of a step, to `part`."""
        if not self.cuda:
            with self.host(part):
                yield
            return
        self.alive()
        if not self.weight and not self.capturing:
            yield
            return
        begin, end = (
            torch.cuda.Event(enable_timing=True, external=self.capturing) for _ in range(2)
        )
        begin.record()
        yield
        end.record()
        if self.capturing:
            self.graph.append((part, begin, end))
        else:
            self.events.append((part, self.weight, begin, end))

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Take the parts inside the `with` block for those of a CUDA graph, which is captured."""
        self._count_replays()
        self.graph, self.capturing = [], True
        try:
            yield
        finally:
            self.capturing = False

    def _count_replays(self) -> None:
        """Add the seconds of the replays so far."""
        if self.replays:
            torch.cuda.synchronize()
            for part, begin, end in self.graph:
                self.add(part, self.replays * begin.elapsed_time(end) / 1000)
        self.replays = 0

    @contextmanager
    def host(self, part: str) -> Iterator[None]:
        """Add the time inside the `with` block to `part`: work of the host, or that ends there."""
        self.alive()
        started = time.perf_counter()
        yield
        self.add(part, time.perf_counter() - started)

    def add(self, part: str, seconds: float) -> None:
        """Add seconds that were measured or estimated elsewhere."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def read(self) -> dict[str, float]:
        """Return the seconds of each part since the last call."""
        if self.events:
            torch.cuda.synchronize()
        self._count_replays()
        for part, weight, begin, end in self.events:
            self.add(part, weight * begin.elapsed_time(end) / 1000)
        found, self.seconds, self.events = self.seconds, {}, []
        return found
