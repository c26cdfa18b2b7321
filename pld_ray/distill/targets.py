"""The teachers' outputs for the batches of an epoch: read or computed once for all trials.

banks      -> stored logits and order     for each trial that reads them
live teachers, if at least two trials need the same one
           -> logits, features            in one forward pass where that gives the same bits
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pld_ray import plugins
from pld_ray.data.sampling import Ints
from pld_ray.data.stream import Stream, upload
from pld_ray.distill.bank import Bank
from pld_ray.distill.running import Run
from pld_ray.distill.steps import Target
from pld_ray.distill.teacher import Teacher
from pld_ray.losses.feature_loss import FeatureLoss, Features

ON_DEVICE = 2**28
"""Bytes of the teacher's logits of a view that are copied to the device at once."""

LIVE = "live"  # the part of an epoch in which teachers run for several trials

Stored = tuple[Tensor, Tensor | None]


class Targets:
    """What trials that step together know of their teachers' outputs, batch by batch.

    Args:
        runs: The trials.
        shares: The indices of samples of each batch, [B]: this worker's share of the batch.
        views: The view of the images of each stream.
    """

    def __init__(self, runs: list[Run], shares: list[Ints], views: dict[Stream, int]) -> None:
        self.runs = runs
        self.stored: dict[int, Stored] = {}  # of the batch, by the bank
        self.live: dict[tuple[int, Stream], Target] = {}  # of the batch, by teacher and stream
        self.readers: dict[int, _Reader] = {}
        streams = {
            id(bank): stream
            for run in runs
            for bank, stream in zip(run.banks, run.streams, strict=False)
        }
        for bank in {id(bank): bank for run in runs for bank in run.banks}.values():
            readers = [run for run in runs if id(bank) in map(id, run.banks)]
            bank.readers, ordered = len(readers), any(map(_needs_order, readers))
            stream = streams[id(bank)]
            self.readers[id(bank)] = _Reader(bank, ordered, shares, views[stream], stream)

    def read(self) -> bool:
        """Read the stored logits of the next batch; return whether `compute` is needed."""
        self.stored = {}
        for key, reader in self.readers.items():
            if (found := next(reader.batches)) is not None:
                self.stored[key] = found
        return len(self.runs) > 1 or len(self.stored) < len(self.readers)

    def close(self) -> None:
        """Release what was begun: no batch follows."""
        for reader in self.readers.values():
            reader.bank.end()

    def compute(self, images: dict[Stream, Tensor]) -> None:
        """Compute missing logits of banks, and outputs of teachers that at least two trials need.

        Args:
            images: The images of the batch [B, channels, H, W] in each stream.
        """
        for key, reader in self.readers.items():
            if key not in self.stored:
                given = _for(reader.bank.teacher, images[reader.stream])
                self.stored[key] = reader.add(given)
        users = Counter(id(run.live_teacher) for run in self.runs if run.live_teacher is not None)
        self.live = {}
        for key in (key for key, count in users.items() if count > 1):
            runs = [run for run in self.runs if id(run.live_teacher) == key]
            teacher = runs[0].live_teacher
            assert teacher is not None
            for stream in dict.fromkeys(stream for run in runs for stream in run.streams):
                losses = [run.distiller.loss for run in runs if stream in run.streams]
                further = [loss.teacher_further for loss in losses if isinstance(loss, FeatureLoss)]
                with runs[0].shared.clock(LIVE):
                    given = _for(teacher, images[stream])
                    logits, union = len(further) < len(losses), frozenset().union(*further)
                    found = _outputs(teacher, given, logits, union if further else None)
                self.live[key, stream] = found

    def of(self, run: Run) -> Target:
        """Return what is known for a trial."""
        if run.banks:
            logits, order = _joined([self.stored[id(bank)] for bank in run.banks])
            return Target(logits, order if _needs_order(run) else None)
        teacher = id(run.live_teacher)
        found = [self.live.get((teacher, stream), Target()) for stream in run.streams]
        if run.distiller.compares_features:
            if found[0].features is None:
                return Target()
            stages, pooled, further = found[0].features
            own = {name: further[name] for name in run.distiller.loss.teacher_further}
            return Target(features=Features(stages, pooled, own))
        known = [(each.logits, None) for each in found if each.logits is not None]
        return Target(logits=_joined(known)[0]) if known else Target()


def _joined(views: Sequence[Stored]) -> Stored:
    """Return the logits and the order of all views of the images, one view after the other."""
    if len(views) == 1:
        return views[0]
    return torch.cat([logits for logits, _ in views]), None


def _for(teacher: Teacher, images: Tensor) -> Tensor:
    """Return the images for a teacher; a copy for code of a plug-in, which may change them."""
    name = (teacher.trial.teacher_name or "").partition(".")[0]
    return images.clone() if plugins.used({("network", name)}) else images


def _needs_order(run: Run) -> bool:
    return run.trial.loss.needs_order


def _outputs(
    teacher: Teacher, images: Tensor, logits: bool, further: frozenset[str] | None
) -> Target:
    """Compute the logits of a teacher, its features, or both.

    Args:
        teacher: The teacher.
        images: The images of the batch [B, channels, H, W].
        logits: Whether the logits are needed.
        further: The features beyond `stages` and `pooled`; None if no features are needed.
    """
    if further is None:
        return Target(logits=teacher(images))
    if not logits:
        return Target(features=teacher.module.features(images, further))
    both = teacher.module.logits_and_features(images, further)
    return Target(logits=both[0], features=both[1])


class _Reader:
    """Reads a bank batch by batch.

    Args:
        bank: The bank.
        ordered: Whether a trial needs the order of the classes.
        shares: The indices of samples of each batch, [B].
        view: The view of the images.
        stream: The images.

    Attributes:
        batches: For each batch, the logits, float32 [B, C], and the order [B, C] or None; or None
            if `add` computes them.
    """

    def __init__(
        self, bank: Bank, ordered: bool, shares: list[Ints], view: int, stream: Stream
    ) -> None:
        self.bank, self.ordered, self.shares, self.view = bank, ordered, shares, view
        self.stream, self.number = stream, -1
        # The rows of a chunk are those of some batches, if all are trained on in the same order.
        rows = bank.spec.order(view, len(bank.labels))
        follows = np.array_equal(np.concatenate(shares), rows)
        together = follows and stream.costly
        self.batches = self._with_images() if together else self._in_advance()

    def add(self, images: Tensor) -> Stored:
        """Compute the logits of the present batch, and their order where it is kept."""
        return self._uploaded(*self.bank.add(self.shares[self.number], images, self.ordered))

    def _with_images(self) -> Iterator[Stored | None]:
        for number, share in enumerate(self.shares):
            self.number = number
            if self.bank.begins(share, self.view):
                yield None
            else:
                yield self._uploaded(*self.bank.read(share, self.view, self.ordered))

    def _in_advance(self) -> Iterator[Stored]:
        """Yield the logits of each batch.

        On an accelerator, those of the whole view are copied at once, so that no step waits for a
        copy.
        """
        size = 4 * len(self.bank.labels) * self.bank.classes
        whole = self.stream.device.type != "cpu" and size <= ON_DEVICE
        for part in [self.shares] if whole else [[share] for share in self.shares]:
            read = self.bank.read(np.concatenate(part), self.view, self.ordered)
            logits, order = self._uploaded(*read)
            lengths = [len(share) for share in part]
            orders = [None] * len(part) if order is None else order.split(lengths)
            yield from zip(logits.split(lengths), orders, strict=True)

    def _uploaded(self, logits: Tensor, order: Tensor | None) -> Stored:
        device = self.stream.device
        return upload(logits, device), None if order is None else upload(order, device)
