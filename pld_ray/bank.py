"""The teacher bank: a teacher's logits for every view of every image, each computed once.

What the stream shows in epoch e of a seed is the same in every trial, so a grid needs the teacher's
logits for it once. They are kept in the store:

    bank     one teacher on one split of one dataset, under one augmentation and seed; its key is
             the hash of all that the logits depend on (`Spec`)
    view     one augmentation of all images (an epoch, unless `views` says otherwise), in the order
             in which that epoch of the seed takes them: so a trial reads it from front to back
    chunk    some 2,048 consecutive samples of a view, one file: rows, seconds spent, checksum

This file says what a bank is, how large, and who computes what (the Ledger); teacher.py computes
and reads. Nothing here needs torch.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import struct
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pld_ray.data import Ints, Size, order
from pld_ray.errors import InputError
from pld_ray.spec import Data, Part, Trial
from pld_ray.store import Store

ROWS = 2048  # of a chunk, rounded up to whole batches
VAL_BATCH = 512  # validation images in a forward pass, of teacher and student
ORDER_FROM = 4096  # classes from which the teacher's order is kept too; 1000 are sorted in 3 us
SPARE = 0.05  # of the disk's free bytes are left to others

Array = npt.NDArray[Any]
Split = Literal["train", "val"]

# ---------------------------------------------------------------- which bank


class Spec(Part):
    """All that the logits of a bank depend on."""

    model: str
    args: dict[str, Any]
    weights: str  # of the teacher: their sha256
    images: str  # the fingerprint of the dataset
    split: Split
    pad: int
    flip: bool
    seed: int  # 0 where nothing is augmented: all seeds then see the same
    bfloat16: bool  # the precision of the forward pass
    logits: Literal["float16", "float32"]
    rows: int
    random_resized_crop: bool = False

    @property
    def key(self) -> str:
        """16 hex digits; fields with a default, which came later, leave older keys as they were."""
        content = self.model_dump_json(exclude_defaults=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def order(self, view: int, size: int) -> Ints:
        """The samples of a view in the order in which they are kept."""
        return order(self.seed, view, size)


def spec(trial: Trial, split: Split, weights: str, images: str, bfloat16: bool) -> Spec:
    """The bank that a trial reads. Validation logits are few: they are kept in float32."""
    assert trial.teacher is not None and trial.teacher_logits != "live"
    model = trial.teacher.student if isinstance(trial.teacher, Trial) else trial.teacher
    train = split == "train"
    return Spec(
        model=model.name,
        args=model.args,
        weights=weights,
        images=images,
        split=split,
        pad=trial.data.pad if train else 0,
        flip=trial.data.flip and train,
        seed=trial.seed if train and trial.data.augmented else 0,
        bfloat16=bfloat16,
        logits=trial.teacher_logits if train else "float32",
        rows=math.ceil(ROWS / trial.batch_size) * trial.batch_size if train else ROWS,
        random_resized_crop=trial.data.random_resized_crop and train,
    )


def about(spec: Spec, trial: Trial, size: int, classes: int) -> dict[str, Any]:
    """What the store says of a bank, for people and for `planned`."""
    teacher = trial.teacher
    return {
        "teacher": spec.model,
        "trial": teacher.id if isinstance(teacher, Trial) else None,
        "data": trial.data.name,
        "size": size,
        "classes": classes,
        "spec": spec.model_dump(),
        "planned": planned_key(trial, spec.split),
    }


def views(trial: Trial) -> int:
    """How many views of the training images a trial sees."""
    return min(trial.views or trial.epochs, trial.epochs) if trial.data.augmented else 1


def banked(trial: Trial) -> bool:
    """Whether a trial reads a bank."""
    kept = trial.teacher_logits != "live" and not trial.loss.needs_features
    return trial.teacher is not None and kept


# ---------------------------------------------------------------- rows and chunks


def row_type(classes: int, logits: str) -> np.dtype[Any]:
    """What is kept of one sample: float32 logits [C], or float16 ones below their maximum.

    Below the maximum, because a loss sees differences of logits, and float16 is the more exact the
    smaller they are: the difference d to the best class is off by at most 2^-11 d.
    """
    if logits == "float32":
        return np.dtype([("logits", "<f4", (classes,))])
    return np.dtype([("logits", "<f2", (classes,)), ("peak", "<f4")])


def order_type(classes: int) -> np.dtype[Any]:
    """One row of the teacher's order, as `teacher_order` makes it."""
    small = "u1" if classes <= 2**8 else "<i2" if classes <= 2**15 else "<i4"
    return np.dtype([("order", small, (classes,))])


def pack(logits: Array, row: np.dtype[Any]) -> Array:
    """Logits float32 [N, C] to rows [N]."""
    rows = np.empty(len(logits), row)
    if "peak" in (row.fields or ()):
        rows["peak"] = logits.max(1)
        with np.errstate(over="ignore", invalid="ignore"):  # -inf stays -inf
            rows["logits"] = logits - rows["peak"][:, None]
    else:
        rows["logits"] = logits
    return rows


def unpack(rows: Array) -> Array:
    """Rows [N] to logits float32 [N, C]."""
    if "peak" not in (rows.dtype.fields or ()):
        return np.ascontiguousarray(rows["logits"])
    return rows["logits"].astype(np.float32) + rows["peak"][:, None]


def encode(rows: Array, seconds: float) -> bytes:
    """The file of a chunk: rows, the seconds they took (float64), a checksum of both (CRC-32)."""
    content = rows.tobytes() + struct.pack("<d", seconds)
    return content + struct.pack("<I", zlib.crc32(content))


def decode(content: Array, row: np.dtype[Any], count: int) -> tuple[Array, float] | None:
    """Rows [count], without a copy, and their seconds; None where the file is damaged."""
    end = count * row.itemsize
    if len(content) != end + 12:
        return None
    if zlib.crc32(content[: end + 8].data) != struct.unpack("<I", content[end + 8 :].tobytes())[0]:
        return None
    return content[:end].view(row), struct.unpack("<d", content[end : end + 8].tobytes())[0]


# ---------------------------------------------------------------- how large


@dataclass
class Planned:
    """A bank that trials of a plan need."""

    trial: Trial  # one of them
    split: Split
    views: int
    view_bytes: int
    order_bytes: int  # of a view, too; 0: none is kept
    ranked_views: int = 0  # views that a loss ranks
    kept: int = 0  # bytes that are there already

    @property
    def bytes(self) -> int:
        """Of all its views."""
        return self.takes(self.views)

    def takes(self, most: int) -> int:
        """Bytes, of so many views at most."""
        ordered = min(self.ranked_views, most) * self.order_bytes
        return min(self.views, most) * self.view_bytes + ordered


def planned_key(trial: Trial, split: Split) -> str:
    """Stands for a bank before its teacher's weights and the images are known."""
    assert trial.teacher is not None
    images = trial.data.model_dump_json(exclude={"root", "pad", "flip"})
    weights = trial.teacher.model_dump_json()
    return spec(trial, split, weights, images, trial.precision == "bfloat16").key


def planned(
    trials: Iterable[Trial], size: Callable[[Data], Size], store: Store
) -> dict[str, Planned]:
    """The banks that trials need, by `planned_key`."""
    size = cache(size)
    found: dict[str, Planned] = {}
    for trial in trials:
        if not banked(trial):
            continue
        for split in ("train", "val"):
            key = planned_key(trial, split)
            count = views(trial) if split == "train" else 1
            if key not in found:
                samples = size(trial.data)
                logits = trial.teacher_logits if split == "train" else "float32"
                row = row_type(samples.classes, logits).itemsize
                images = samples.train if split == "train" else samples.val
                ordered = split == "train" and samples.classes >= ORDER_FROM
                order = order_type(samples.classes).itemsize * images if ordered else 0
                found[key] = Planned(trial, split, count, row * images, order)
            if count > found[key].views:
                found[key].trial, found[key].views = trial, count
            if trial.loss.needs_order:
                found[key].ranked_views = max(count, found[key].ranked_views)
    for key, files in store.banks().items() if found else ():
        about = store.bank(key)
        if about and about["planned"] in found:
            found[about["planned"]].kept += sum(files.values())
    return found


def check_room(banks: Iterable[Planned], store: Store) -> None:
    """Raise InputError if the banks do not fit the disk of a local store."""
    banks, free = list(banks), store.files.free_bytes()
    if free is None:
        return
    room = int(free * (1 - SPARE)) + sum(bank.kept for bank in banks)
    total = sum(bank.bytes for bank in banks)
    if total <= room:
        return

    def takes(most: int) -> int:
        return sum(bank.takes(most) for bank in banks)

    fitting = 0
    while takes(fitting + 1) <= room:
        fitting += 1
    advice = (
        f"set teacher.views to at most {fitting}"
        if fitting
        else "not even one view fits: set teacher.logits to live, or give another --storage"
    )
    raise InputError(
        f"the teacher bank needs {in_bytes(total)} and there is room for {in_bytes(room)} in "
        f"{store.uri}: {advice}"
    )


def in_bytes(count: float) -> str:
    """Bytes as people say them: 512 B, 1.2 MB, 34 GB."""
    unit = "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"


# ---------------------------------------------------------------- who computes what


class Ledger:
    """A Ray actor that gives each chunk to one process at a time to compute.

    A process that dies loses its claim after LEASE seconds without a sign of life; tried again
    under the same name, it has it at once. What is computed rests for as long, so that no node
    computes it again because its network file system does not show it yet. All that is lost when
    the Ledger dies is who is at work: a chunk may then be computed twice, the same both times.
    """

    LEASE = 30.0

    def __init__(self) -> None:
        # (store, chunk) -> holder ("": at rest), until when
        self.claims: dict[tuple[str, str], tuple[str, float]] = {}
        self.released = asyncio.Condition()

    async def claim(
        self, store: str, chunks: list[str], holder: str, patience: float
    ) -> str | None:
        """The first of `chunks` that nobody computes or has just computed, now `holder`'s.

        None if there is none, after a release or `patience` seconds: time to look at the store.
        """
        async with self.released:
            for chunk in chunks:
                owner, until = self.claims.get((store, chunk), (holder, 0.0))
                if owner == holder or until < time.monotonic():
                    self._set(store, chunk, holder)
                    return chunk
                if owner == "" and chunk == chunks[0]:
                    patience = min(patience, 0.02)  # it is there, or about to be seen
            with suppress(TimeoutError):
                await asyncio.wait_for(self.released.wait(), patience)
        return None

    async def renew(self, store: str, chunk: str, holder: str) -> None:
        """A sign of life of who computes the chunk."""
        if self._holds(store, chunk, holder):
            self._set(store, chunk, holder)

    async def release(self, store: str, chunk: str, holder: str, computed: bool) -> None:
        """The chunk is in the store, or could not be computed."""
        async with self.released:
            if self._holds(store, chunk, holder):
                if computed:
                    self._set(store, chunk, "")
                else:
                    del self.claims[store, chunk]
            now = time.monotonic()
            self.claims = {key: claim for key, claim in self.claims.items() if claim[1] > now}
            self.released.notify_all()

    def _holds(self, store: str, chunk: str, holder: str) -> bool:
        return self.claims.get((store, chunk), ("", 0.0))[0] == holder

    def _set(self, store: str, chunk: str, holder: str) -> None:
        self.claims[store, chunk] = holder, time.monotonic() + self.LEASE


def open_ledger() -> Any:
    """The cluster's Ledger, made if there is none; it outlives the driver that made it."""
    import ray

    from pld_ray import __version__

    return (
        ray.remote(Ledger)
        .options(
            name=f"ledger {__version__}",
            namespace="pld-ray",
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
        )
        .remote()
    )
