"""Compute the size of the teacher bank that a plan needs, and check that it fits on the disk."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from pld_ray.config.parts import Data
from pld_ray.config.trial import Trial
from pld_ray.data.images import Size
from pld_ray.distill.bank_format import (
    Split,
    keeps_order,
    order_type,
    planned_key,
    row_type,
    uses_bank,
    views,
)
from pld_ray.errors import InputError
from pld_ray.store.store import Store
from pld_ray.units import in_bytes

SPARE = 0.05  # fraction of the free disk space that is left to other programs


@dataclass
class PlannedBank:
    """A bank that trials of a plan need.

    Attributes:
        trial: One of the trials that need the bank; none of them has more views. Its data settings
            are those of the images of the bank (see `Trial.each_view`).
        split: "train" or "val".
        classes: Number of classes.
        views: Number of views that the bank has when it is complete.
        view_bytes: Size of the logits of one view, in bytes.
        order_bytes: Size of the teacher's order of one view, in bytes; 0 if it is not stored.
        ranked_views: Number of views for which a loss needs the teacher's order.
        kept: Bytes that the store already has.
    """

    trial: Trial
    split: Split
    classes: int
    views: int
    view_bytes: int
    order_bytes: int
    ranked_views: int = 0
    kept: int = 0

    @property
    def bytes(self) -> int:
        """The size of all views, in bytes."""
        return self.takes(self.views)

    def takes(self, most: int) -> int:
        """Return the size in bytes if the bank has at most `most` views."""
        ordered = min(self.ranked_views, most) * self.order_bytes
        return min(self.views, most) * self.view_bytes + ordered


def planned(
    trials: Iterable[Trial], size: Callable[[Data], Size], store: Store
) -> dict[str, PlannedBank]:
    """Return the banks that trials need.

    Args:
        trials: The trials of one or more plans.
        size: Returns the number of images and classes of a dataset.
        store: The store that may already have parts of the banks.

    Returns:
        The banks by their `planned_key`.
    """
    size = cache(size)
    found: dict[str, PlannedBank] = {}
    keys: dict[tuple[int, int, str, int], str] = {}
    trials = list(trials)
    for trial in trials:
        if not uses_bank(trial):
            continue
        parts: list[tuple[Split, int, Trial]]
        parts = [("train", number, each) for number, each in enumerate(trial.each_view)]
        for split, number, seen in [*parts, ("val", 0, trial)]:
            # trials that differ in the seed only share their settings, and often their banks
            seed = trial.seed if split == "train" and seen.data.augmented else 0
            same = id(trial.settings), seed, split, number
            if same not in keys:
                keys[same] = planned_key(seen, split)
            key = keys[same]
            count = views(seen) if split == "train" else 1
            if key not in found:
                samples = size(trial.data)
                logits = trial.teacher_logits if split == "train" else "float32"
                row = row_type(samples.classes, logits).itemsize
                images = samples.train if split == "train" else samples.val
                ordered = split == "train" and keeps_order(samples.classes, logits)
                order = order_type(samples.classes).itemsize * images if ordered else 0
                found[key] = PlannedBank(seen, split, samples.classes, count, row * images, order)
            if count > found[key].views:
                found[key].trial, found[key].views = seen, count
            if trial.loss.needs_order:
                found[key].ranked_views = max(count, found[key].ranked_views)
    for key, files in store.banks().items() if found else ():
        about = store.bank(key)
        if about and about["planned"] in found:
            found[about["planned"]].kept += sum(files.values())
    return found


def check_top64(banks: Iterable[PlannedBank]) -> None:
    """Check that `teacher.logits: top64` makes the rows of banks smaller.

    Raises:
        InputError: A dataset has so few classes (up to 98) that a row in float16 is not larger.
    """
    for bank in banks:
        if bank.split == "val" or bank.trial.teacher_logits != "top64":
            continue
        best, whole = (row_type(bank.classes, kind).itemsize for kind in ("top64", "float16"))
        if best >= whole:
            raise InputError(
                f"teacher.logits is 'top64' and data {bank.trial.data.name!r} has {bank.classes} "
                f"classes: it would store {best} bytes per image, and float16 stores {whole}: "
                "expected float16, float32 or live"
            )


def check_disk_space(banks: Iterable[PlannedBank], store: Store) -> None:
    """Check that the banks fit on the disk of a local store.

    Args:
        banks: The banks that a plan needs.
        store: The store in which they are kept.

    Raises:
        InputError: If the banks are larger than the free space. The message says how many views
            would fit.
    """
    banks, free = list(banks), store.files.free_bytes()
    if free is None:
        return
    room = int(free * (1 - SPARE)) + sum(bank.kept for bank in banks)
    total = sum(bank.bytes for bank in banks)
    if total <= room:
        return

    def takes(most: int) -> int:
        return sum(bank.takes(most) for bank in banks)

    most = max(bank.views for bank in banks)
    fitting = bisect_right(range(1, most + 1), room, key=takes)
    advice = (
        f"set teacher.views to at most {fitting}"
        if fitting
        else "not even one view fits: set teacher.logits to live, or give another --storage"
    )
    raise InputError(
        f"the teacher bank needs {in_bytes(total)} and there is room for {in_bytes(room)} in "
        f"{store.uri}: {advice}"
    )
