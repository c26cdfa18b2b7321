"""The teachers' outputs for the batches of an epoch: read or computed once for all trials.

banks      -> stored logits and order     for each trial that reads them
live teachers, if at least two trials need the same one
           -> logits, features            in one forward pass where that gives the same bits
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pld_ray.data.sampling import Ints
from pld_ray.data.stream import upload
from pld_ray.distill.bank import Bank
from pld_ray.distill.running import Run
from pld_ray.distill.steps import Target
from pld_ray.distill.teacher import Teacher

ON_DEVICE = 2**28
"""Bytes of the teacher's logits of a view that are copied to the device at once."""

LIVE = "live"  # the part of an epoch in which teachers run for several trials

Stored = tuple[Tensor, Tensor | None]


class Targets:
    """What trials that step together know of their teachers' outputs, batch by batch.

    Args:
        runs: The trials.
        shares: The indices of samples of each batch, [B]: this worker's share of the batch.
        view: The view of the images.
    """

    def __init__(self, runs: list[Run], shares: list[Ints], view: int) -> None:
        self.runs = runs
        self.stored: dict[int, Stored] = {}  # of the batch, by the bank
        self.live: dict[int, Target] = {}  # of the batch, by the teacher
        device = runs[0].shared.device
        self.readers: dict[int, Iterator[Stored]] = {}
        for bank in {id(run.bank): run.bank for run in runs}.values():
            if bank is not None:
                readers = [run for run in runs if run.bank is bank]
                bank.readers, ordered = len(readers), any(map(_needs_order, readers))
                self.readers[id(bank)] = _stored(bank, ordered, shares, view, device)

    def read(self) -> None:
        """Read the stored logits of the next batch."""
        self.stored = {key: next(reader) for key, reader in self.readers.items()}

    def compute(self, images: Tensor) -> None:
        """Compute the outputs of those teachers that at least two trials need.

        Args:
            images: The images of the batch [B, channels, H, W].
        """
        users = Counter(id(run.live_teacher) for run in self.runs if run.live_teacher is not None)
        self.live = {}
        for key in (key for key, count in users.items() if count > 1):
            runs = [run for run in self.runs if id(run.live_teacher) == key]
            compared = {run.distiller.compares_features for run in runs}
            teacher = runs[0].live_teacher
            assert teacher is not None
            with runs[0].shared.clock(LIVE):
                self.live[key] = _outputs(teacher, images, False in compared, True in compared)

    def of(self, run: Run) -> Target:
        """Return what is known for a trial."""
        if run.bank is not None:
            logits, order = self.stored[id(run.bank)]
            return Target(logits, order if _needs_order(run) else None)
        found = self.live.get(id(run.live_teacher), Target())
        if run.distiller.compares_features:
            return Target(features=found.features)
        return Target(logits=found.logits)


def _needs_order(run: Run) -> bool:
    return run.trial.loss.needs_order


def _outputs(teacher: Teacher, images: Tensor, logits: bool, features: bool) -> Target:
    """Compute the logits of a teacher, its features, or both."""
    if not features:
        return Target(logits=teacher(images))
    if not logits:
        return Target(features=teacher.module.features(images))
    both = teacher.module.logits_and_features(images)
    return Target(logits=both[0], features=both[1])


def _stored(
    bank: Bank, ordered: bool, shares: list[Ints], view: int, device: torch.device
) -> Iterator[Stored]:
    """Yield the stored logits for each batch, and their order where it is kept.

    On an accelerator, those of the whole view are copied at once, so that no step waits for a copy.

    Args:
        bank: The bank.
        ordered: Whether a trial needs the order of the classes.
        shares: The indices of samples of each batch, [B].
        view: The view of the images.
        device: Where the logits are needed.

    Yields:
        Logits, float32 [B, C], and the order [B, C] or None.
    """
    whole = device.type != "cpu" and 4 * len(bank.labels) * bank.classes <= ON_DEVICE
    for part in [shares] if whole else [[share] for share in shares]:
        read = bank.read(np.concatenate(part), view, ordered)
        logits, ranking = (None if x is None else upload(x, device) for x in read)
        lengths = [len(share) for share in part]
        assert logits is not None
        rankings = [None] * len(part) if ranking is None else ranking.split(lengths)
        yield from zip(logits.split(lengths), rankings, strict=True)
