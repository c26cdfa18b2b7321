"""The updates of a trial: one by one, or as a CUDA graph that is captured once and replayed.

    batch, stored logits -> images -> loss -> backward pass -> optimizer -> moving average

A step of a small network is hundreds of short kernels. The host needs longer to launch them than
the device to run them. A graph launches all of them at once. It holds what the kernels were given:
addresses of tensors, and numbers of Python. What differs between steps is therefore copied into
tensors of the graph: the batch, the stored logits of the teacher, and the learning rates. A step
has the same bits in both ways.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_structure, tree_unflatten

from pld_ray import plugins
from pld_ray.config.trial import Trial
from pld_ray.data.mixing import MixedLabels
from pld_ray.data.stream import Batch
from pld_ray.distill.device import Clock
from pld_ray.distill.distiller import Distiller
from pld_ray.distill.optimization import MovingAverage, is_capturable, update
from pld_ray.losses.feature_loss import Features

WARM_UP = 3
"""Steps before a graph is captured. They create what later steps keep: compiled kernels, the state
of the optimizer, constants of the loss. The moving average has its decay from the third step on."""

AHEAD = 8
"""Replays that the host may be ahead of the device. Without a limit, the batches of an epoch could
pile up, and the host would give no sign of life while it waits for the device in the end."""

Given = tuple[Tensor | None, ...]
Step = Callable[..., Tensor]


class CaptureError(RuntimeError):
    """A step cannot be captured. Other trials cannot go on in the process."""


class Target(NamedTuple):
    """What is known of the teacher's outputs for a batch before a step; None for what is not.

    Attributes:
        logits: Logits of the teacher [B, C].
        order: The teacher's order of the classes [B, C].
        features: Features of the teacher.
    """

    logits: Tensor | None = None
    order: Tensor | None = None
    features: Features | None = None

    def tensors(self) -> Given:
        """Return the tensors in one tuple, which `with_tensors` takes."""
        return tuple(tree_leaves(self))

    def with_tensors(self, tensors: Given) -> Target:
        """Return a target of this structure with other tensors."""
        made: Target = tree_unflatten(tensors, tree_structure(self))
        return made

    def copy(self) -> Target:
        """Return a target whose tensors are copies."""
        return self.with_tensors(tuple(None if x is None else x.clone() for x in self.tensors()))


class CudaGraphs:
    """Captures and replays steps.

    Args:
        clock: Measures the parts of the steps.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.stream = torch.cuda.Stream()  # the default stream cannot be captured
        self.running: deque[torch.cuda.Event] = deque()

    def warm_up(self, step: Step, given: Given) -> tuple[Tensor, bool]:
        """Do a step on the stream on which steps are captured.

        Returns:
            The loss, and whether the host waited for the device, which a graph cannot do.
        """
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with torch.cuda.stream(self.stream):
                    loss = step(*given)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        here.wait_stream(self.stream)
        others = [each for each in said if "synchronizing CUDA operation" not in str(each.message)]
        for each in others:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        return loss, len(others) < len(said)

    def capture(self, step: Step, given: Given) -> Callable[[], Tensor]:
        """Capture a step, without doing it, and return a function that does it and gives the loss.

        Args:
            step: The step.
            given: Its arguments; their addresses become part of the graph.
        """
        graph = torch.cuda.CUDAGraph()
        with (
            self.clock.capture(),
            # Threads that read images ahead may do with CUDA what they like meanwhile.
            torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
        ):
            loss = step(*given)

        def replay() -> Tensor:
            graph.replay()
            self.clock.replays += 1
            self.running.append(torch.cuda.Event())
            self.running[-1].record()
            if len(self.running) > AHEAD:
                self.running.popleft().synchronize()
            return loss.clone()

        return replay


def graphs_for(
    trial: Trial, optimizer: torch.optim.Optimizer, clock: Clock, alone: bool
) -> CudaGraphs | None:
    """Return what captures the steps of a trial, or None if they are done one by one.

    A graph does not repeat what the host does in a step. Code of plug-ins is not captured, since it
    may do anything there.

    Args:
        trial: The trial.
        optimizer: Its optimizer.
        clock: Measures the parts of the steps; it knows the device.
        alone: Whether this is the only worker.
    """
    networks = {("network", trial.student.name), ("network", trial.teacher_name or "")}
    own = plugins.used({("loss", trial.loss.name), ("optimizer", trial.optimizer.name), *networks})
    wanted = trial.cuda_graphs and clock.cuda and alone and not own
    return CudaGraphs(clock) if wanted and is_capturable(optimizer) else None


class Steps:
    """Does the updates of one worker of a trial.

    Args:
        trial: The trial.
        distiller: Student, teacher and loss.
        module: The distiller, in DistributedDataParallel if there are other workers.
        optimizer: The optimizer of the student and of what the loss learns.
        ema: The exponential moving average of the student, if there is one.
        clock: Measures the parts of a step.

    Attributes:
        graphs: Captures steps; None if they are done one by one.
        replay: Replays the captured step, if there is one.
        note: A sentence for the record if steps are not captured although they seemed to allow it.
    """

    def __init__(
        self,
        trial: Trial,
        distiller: Distiller,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: MovingAverage | None,
        clock: Clock,
    ) -> None:
        self.rows = trial.batch_size * len(trial.each_view)  # of a whole batch
        self.clip_grad = trial.clip_grad
        self.distiller, self.module, self.optimizer, self.ema = distiller, module, optimizer, ema
        self.clock = clock
        self.graphs = graphs_for(trial, optimizer, clock, alone=module is distiller)
        self.note = ""
        device = next(distiller.student.parameters()).device
        groups = optimizer.param_groups if clock.cuda and is_capturable(optimizer) else []
        # All steps use these tensors, so that they have the same bits with a graph and without it.
        self.rates = [torch.empty((), device=device) for _ in groups]
        self.form: Any = None  # what must be the same in all replays of a graph
        self.warm = 0
        self.replay: Callable[[], Tensor] | None = None
        self.static: Given = ()
        self.teacher_images = 0

    def __call__(
        self,
        batch: Batch,
        target: Target,
        weight: float,
        number: int,
    ) -> Tensor:
        """Do one update.

        Args:
            batch: The batch of this worker.
            target: What is known of the teacher's outputs; its network computes the rest.
            weight: The factor of the loss.
            number: The number of the update, from 0.

        Returns:
            The loss before the update, and its term of cross-entropy if it has one, on the device
            (see `Distiller.with_terms`).
        """
        parts = batch.labels if isinstance(batch.labels, MixedLabels) else (batch.labels,)
        given = *batch.given, *parts, batch.index, *target.tensors()
        first, last = len(batch.given), len(batch.given) + len(parts)

        def step(*given: Any) -> Tensor:
            tensors, parts = given[:first], given[first:last]
            index, *known = given[last:]
            logits, order, features = target.with_tensors(tuple(known))
            labels = MixedLabels(*parts) if len(parts) > 1 else parts[0]
            with self.clock("data"):
                images = batch.make(*tensors)
            loss: Tensor = self.module(images, labels, logits, order, features, index)
            told = self.distiller.with_terms(loss)
            if weight != 1:
                loss, told = loss * weight, told * weight
            with self.clock("student"), self._rates_of_device():
                update(loss, self.distiller, self.optimizer, number, self.clip_grad, self.ema)
            return told

        for rate, group in zip(self.rates, self._groups(), strict=True):
            rate.fill_(group["lr"])
        if self.graphs is None or len(parts[0]) < self.rows:
            return step(*given)
        loss_numbers = [(k, x) for k, x in vars(self.distiller.loss).items() if _is_number(x)]
        form = batch.make, loss_numbers, [None if x is None else (x.shape, x.dtype) for x in given]
        if form != self.form:
            self.form, self.warm, self.replay = form, 0, None
        if self.replay is None:
            self.warm += 1
            if self.warm <= WARM_UP:
                loss, waited = self.graphs.warm_up(step, given)
                if waited and self.warm == WARM_UP:  # earlier steps may wait for what they create
                    self.graphs = None
                    self.note = "no CUDA graph of the steps: the host waits for the GPU in them"
                return loss
            self.replay = self._capture(step, given)
        for kept, x in zip(self.static, given, strict=True):
            if kept is not None and x is not None:
                kept.copy_(x)
        if self.distiller.teacher is not None:
            self.distiller.teacher.images_seen += self.teacher_images
        return self.replay()

    def _capture(self, step: Step, given: Given) -> Callable[[], Tensor]:
        """Capture a step, and return what replays it.

        Raises:
            CaptureError: It cannot be captured. The process must end: torch may leave its random
                numbers and its memory in the state of a capture.
        """
        assert self.graphs is not None
        teacher = self.distiller.teacher
        before = teacher.images_seen if teacher is not None else 0
        self.static = tuple(None if x is None else x.clone() for x in given)
        try:
            replay = self.graphs.capture(step, self.static)
        except RuntimeError as error:
            cause = error.__context__ or error  # the first error ends the capture with a second one
            raise CaptureError(
                f"a step cannot be captured as a CUDA graph ({cause}): expected cuda_graphs: false"
            ) from error
        if teacher is not None:
            self.teacher_images, teacher.images_seen = teacher.images_seen - before, before
        return replay

    def _groups(self) -> list[dict[str, Any]]:
        """Return the groups of the optimizer whose learning rates are in tensors."""
        return self.optimizer.param_groups[: len(self.rates)]

    @contextmanager
    def _rates_of_device(self) -> Iterator[None]:
        """Let the optimizer read its learning rates from tensors inside the `with` block."""
        groups = self._groups()
        numbers = [group["lr"] for group in groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate
        try:
            yield
        finally:
            for group, number in zip(groups, numbers, strict=True):
                group["lr"] = number


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float)
