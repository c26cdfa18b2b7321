"""The teacher bank as a trial reads it: stored logits are read, missing ones are computed.

bank.read(samples, view):  the chunk is in the store?      read it, and the next one meanwhile
                           nobody computes it?             compute it, keep it
                           another process computes it?    compute one of the next, or wait

Where images cost time, such as files that are decoded, a chunk is not computed in advance: the
teacher sees the batches on which the trials train (`begins`, `add`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pld_ray.config.trial import Trial
from pld_ray.data.images import Images
from pld_ray.data.sampling import Ints, batches
from pld_ray.data.stream import Stream
from pld_ray.distill import bank_format
from pld_ray.distill.bank_format import Array, BankSpec, Split
from pld_ray.distill.device import Clock, memory_format
from pld_ray.distill.teacher import Teacher
from pld_ray.losses import teacher_order
from pld_ray.store.store import Store

AHEAD = 16  # chunks that a process may compute before it needs them


class Ledger(Protocol):
    """Gives each chunk to one process at a time to compute; see `pld_ray.sweep.ledger`."""

    def claim(self, store: str, chunks: list[str], holder: str, patience: float) -> str | None:
        """Return the first chunk that no other process computes, or None after a while."""

    def renew(self, store: str, chunk: str, holder: str) -> None:
        """Say that the holder still computes the chunk."""

    def release(self, store: str, chunk: str, holder: str, computed: bool) -> None:
        """Say that the chunk is in the store, or could not be computed."""


@dataclass
class _Begun:
    """A chunk that is computed from the batches on which trials train.

    Attributes:
        name: The name of the chunk.
        left: Number of rows that are missing.
        parts: The rows so far.
        seconds: The time that they took.
    """

    name: str
    left: int
    parts: list[Array] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Bank:
    """The logits of a teacher on one split, as one process reads them.

    The clock receives four kinds of seconds: "teacher" (computing), "waiting" (for a process that
    computes), "bank" (reading), and "teacher_avoided": the time that it took to compute the logits
    that are read here but were computed by another process, or by an earlier run.

    Attributes:
        spec: Everything that the logits depend on.
        about: The description that the store keeps of the bank.
        labels: Labels of the split, int64 [N].
        classes: Number of classes C.
        views: Number of views.
        batch: Samples in a forward pass of the teacher.
        teacher: Computes missing logits.
        images: Maps batches of sample indices and a view to the images that the teacher sees.
        clock: Measures the time.
        ledger: Says which process computes which chunk; None if there is only this process.
        holder: The name of this process in the ledger.
        readers: Number of trials that read the logits in this process.
    """

    spec: BankSpec
    about: dict[str, Any]
    labels: Ints
    classes: int
    views: int
    batch: int
    teacher: Teacher
    images: Callable[[Iterable[Ints], int], Iterator[Tensor]]
    clock: Clock
    ledger: Ledger | None
    holder: str
    readers: int = 1

    def __post_init__(self) -> None:
        self.store, self.key = self.teacher.store, self.spec.key
        self.size = len(self.labels)
        self.chunks = math.ceil(self.size / self.spec.rows)  # of a view
        self.row = bank_format.row_type(self.classes, self.spec.logits)
        self.order_row = bank_format.order_type(self.classes)
        self.view = -1  # the one that is open
        self.order = self.place = self.labels  # its samples, and the place of each
        self.logits: dict[int, tuple[Array, float]] = {}  # its chunks so far, their seconds
        self.orders: dict[int, Array] = {}
        self.unread: dict[tuple[int, int], int] = {}  # rows computed here and not yet read
        self.begun: _Begun | None = None
        self.reader = ThreadPoolExecutor(1)
        self.ahead: dict[str, Future[tuple[Array, float] | None]] = {}  # chunks that it reads

    def read(
        self, samples: Ints, view: int, with_order: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Read the logits of some samples in a view.

        Args:
            samples: Indices of the samples, int64 [B].
            view: The view, from 0.
            with_order: Whether to read the teacher's order of the classes too.

        Returns:
            Logits, float32 [B, C], and the order [B, C] with the label first. The order is None
            if it was not asked for, or if it is not stored.
        """
        with_order = with_order and bank_format.keeps_order(self.classes, self.spec.logits)
        if view != self.view:
            self._open(view)
        chunk, row = np.divmod(self.place[samples], self.spec.rows)
        needed = np.unique(chunk).tolist()
        for number in needed:
            if number not in self.logits:
                self.logits[number] = self._chunk(view, number)
            if with_order and number not in self.orders:
                self.orders[number] = self._order_chunk(view, number)
        if needed[-1] + 1 not in self.logits:
            self._read_ahead(view, needed[-1] + 1, with_order)
        with self.clock.host("bank"):
            rows = _gather({n: self.logits[n][0] for n in needed}, chunk, row)
            logits = torch.from_numpy(bank_format.unpack(rows, self.classes))
            order = None
            if with_order:
                orders = _gather({n: self.orders[n] for n in needed}, chunk, row)
                order = torch.from_numpy(orders["order"])
            self._count(chunk, needed)
        return logits, order

    def begins(self, samples: Ints, view: int) -> bool:
        """Return whether `add` computes the logits of a batch, because its chunk is missing.

        Args:
            samples: Indices of the samples of a batch, int64 [B], in the order of the view.
            view: The view.
        """
        if view != self.view:
            self._open(view)
        chunk, row = divmod(int(self.place[samples[0]]), self.spec.rows)
        if self.begun is not None or row > 0 or chunk in self.logits:
            return self.begun is not None
        name = self._name(view, chunk)
        if not self.store.missing_chunks([name]):
            return False
        if self.ledger is None or self.ledger.claim(self.store.uri, [name], self.holder, 0.0):
            self.begun = _Begun(name, self._count_rows(chunk))
            self.store.start_bank(self.key, self.about)
        return self.begun is not None

    def add(
        self, samples: Ints, images: Tensor, with_order: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the logits of the next batch of the chunk that `begins` has begun.

        Args:
            samples: Indices of the samples, int64 [B].
            images: Their images [B, channels, H, W].
            with_order: Whether to return the teacher's order of the classes too.

        Returns:
            What `read` returns.
        """
        begun = self.begun
        assert begun is not None
        _ = self.teacher.module  # loaded before the clock runs
        started = time.perf_counter()
        with self.clock.host("teacher"):
            rows = bank_format.pack(self.teacher(images).cpu().numpy(), self.row)
        seconds = time.perf_counter() - started
        self.clock.add("teacher_avoided", seconds * (self.readers - 1))
        begun.parts.append(rows)
        begun.left, begun.seconds = begun.left - len(rows), begun.seconds + seconds
        if self.ledger is not None:
            self.ledger.renew(self.store.uri, begun.name, self.holder)
        if not begun.left:
            content = bank_format.encode(np.concatenate(begun.parts), begun.seconds)
            self.store.write_chunk(begun.name, content)
            self.end(computed=True)
        logits = torch.from_numpy(bank_format.unpack(rows, self.classes))
        if not with_order or not bank_format.keeps_order(self.classes, self.spec.logits):
            return logits, None
        return logits, teacher_order(logits, torch.from_numpy(self.labels[samples]))

    def end(self, computed: bool = False) -> None:
        """Release the chunk that `begins` has begun, if there is one."""
        if self.begun is not None and self.ledger is not None:
            self.ledger.release(self.store.uri, self.begun.name, self.holder, computed)
        self.begun = None

    def fill(self) -> None:
        """Compute every chunk that is missing and that no other process computes."""
        names = [self._name(*divmod(i, self.chunks)) for i in range(self.chunks * self.views)]
        for name in self.store.missing_chunks(names):
            self._compute_one([name], patience=0)

    def _open(self, view: int) -> None:
        self.view, self.logits, self.orders, self.ahead = view, {}, {}, {}
        self.order = self.spec.order(view, self.size)
        self.place = np.empty_like(self.order)
        self.place[self.order] = np.arange(self.size)

    def _count(self, chunk: Ints, needed: list[int]) -> None:
        """Add the time that computing these rows would have taken without the bank."""
        for number in needed:
            rows, seconds = self.logits[number]
            read = len(chunk) if len(needed) == 1 else int((chunk == number).sum())
            paid = min(read, self.unread.get((self.view, number), 0))
            if paid:
                self.unread[self.view, number] -= paid
            avoided = (read * self.readers - paid) * seconds / len(rows)
            self.clock.add("teacher_avoided", avoided)

    def _name(self, view: int, chunk: int, kind: str = "logits") -> str:
        return f"{self.key}/{view}/{chunk}.{kind}"

    def _samples(self, view: int, chunk: int) -> Ints:
        order = self.order if view == self.view else self.spec.order(view, self.size)
        return order[chunk * self.spec.rows :][: self.spec.rows]

    def _count_rows(self, number: int) -> int:
        """Return the number of rows in a chunk; the last one of a view may be shorter."""
        return min(self.spec.rows, self.size - number * self.spec.rows)

    def _read_ahead(self, view: int, number: int, with_order: bool) -> None:
        """Begin to read a chunk, if there is such a chunk, while its predecessor is used."""
        kinds = {"logits": self.row, **({"order": self.order_row} if with_order else {})}
        for kind, row in kinds.items() if number < self.chunks else ():
            name = self._name(view, number, kind)
            if name not in self.ahead:
                given = name, row, self._count_rows(number)
                self.ahead[name] = self.reader.submit(self._load_now, *given)

    def _load(self, name: str, row: np.dtype[Any], count: int) -> tuple[Array, float] | None:
        """Return a chunk that was read ahead, or read it."""
        ahead = self.ahead.pop(name, None)  # an error in it is told once, then it is read again
        found = None if ahead is None else ahead.result()
        return self._load_now(name, row, count) if found is None else found

    def _load_now(self, name: str, row: np.dtype[Any], count: int) -> tuple[Array, float] | None:
        """Read a chunk from the store. A damaged chunk is deleted and treated as missing."""
        content = self.store.read_chunk(name)
        if content is None:
            return None
        found = bank_format.decode(content, row, count)
        if found is None:
            self.store.drop_chunk(name)
        return found

    def _chunk(self, view: int, number: int) -> tuple[Array, float]:
        """Return the rows of a chunk and the seconds they took, or compute them."""
        first = view * self.chunks + number
        last = min(first + AHEAD, self.views * self.chunks)
        names = [self._name(*divmod(i, self.chunks)) for i in range(first, last)]
        count = self._count_rows(number)
        while (found := self._load(names[0], self.row, count)) is None:
            missing = self.store.missing_chunks(names)
            if missing and missing[0] == names[0]:
                self._compute_one(missing, patience=1.0)
        return found

    def _compute_one(self, names: list[str], patience: float) -> None:
        """Compute the first chunk that no other process computes; wait if there is none."""
        name = names[0]
        if self.ledger is not None:
            with self.clock.host("waiting"):
                claimed = self.ledger.claim(self.store.uri, names, self.holder, patience)
            if claimed is None:
                return
            name = claimed
        computed = False
        try:
            if self.store.missing_chunks([name]):  # another process may have finished it just now
                self._compute(name)
            computed = True
        finally:
            if self.ledger is not None:
                self.ledger.release(self.store.uri, name, self.holder, computed)

    def _compute(self, name: str) -> None:
        view, number = (int(part.split(".")[0]) for part in name.split("/")[1:])
        samples = self._samples(view, number)
        self.store.start_bank(self.key, self.about)
        _ = self.teacher.module  # loaded before the clock runs: loading is no forward pass
        parts = []
        with self.clock.host("teacher"):
            if self.clock.cuda:
                torch.cuda.synchronize()  # do not count the student's last steps
            started = time.perf_counter()
            for x in self.images(batches(samples, self.batch, drop_last=False), view):
                logits = self.teacher(x).cpu().numpy()  # of a batch: those of a chunk can be large
                parts.append(bank_format.pack(logits, self.row))
                self.clock.alive()
                if self.ledger is not None:
                    self.ledger.renew(self.store.uri, name, self.holder)
            seconds = time.perf_counter() - started
        self.store.write_chunk(name, bank_format.encode(np.concatenate(parts), seconds))
        self.unread[view, number] = len(samples)

    def _order_chunk(self, view: int, number: int) -> Array:
        """Return the teacher's order of a chunk, label first."""
        name, rows = self._name(view, number, "order"), self.logits[number][0]
        found = self._load(name, self.order_row, len(rows))
        if found is None:
            labels = torch.from_numpy(self.labels[self._samples(view, number)])
            order = np.empty(len(rows), self.order_row)
            logits = torch.from_numpy(bank_format.unpack(np.array(rows), self.classes))
            order["order"] = teacher_order(logits, labels).numpy()
            self.store.write_chunk(name, bank_format.encode(order, 0.0))
            return order
        return found[0]


def _gather(chunks: dict[int, Array], chunk: Ints, row: Ints) -> Array:
    """Collect rows, given the chunk of each row and its place in that chunk, [B] each."""
    some, *others = chunks.values()
    if not others:
        return some[row]
    rows = np.empty(len(row), some.dtype)
    for number, kept in chunks.items():
        inside = chunk == number
        rows[inside] = kept[row[inside]]
    return rows


def open_banks(
    teacher: Teacher,
    trial: Trial,
    stream: Stream,
    clock: Clock,
    ledger: Ledger | None,
    holder: str,
) -> tuple[Bank, Bank]:
    """Open the banks of the training and the validation images for one worker of a trial.

    Args:
        teacher: The teacher of the trial.
        trial: The trial, or one that reads the same logits.
        stream: The images that the student sees.
        clock: Measures the time.
        ledger: Says which process computes which chunk; None if there is only this process.
        holder: The name of this process in the ledger.
    """
    images, digest = teacher.images, teacher.digest()

    def bank(split: Split, labels: Ints, views: int, batch: int, shown: Any) -> Bank:
        spec = bank_format.spec(
            trial, split, digest, images.digest, teacher.precision == "bfloat16"
        )
        return Bank(
            spec=spec,
            about=bank_format.about(spec, trial, len(labels), images.classes),
            labels=labels,
            classes=images.classes,
            views=views,
            batch=batch,
            teacher=teacher,
            images=shown,
            clock=clock,
            ledger=ledger,
            holder=holder,
        )

    def train(shares: Iterable[Ints], view: int) -> Iterator[Tensor]:
        return (x for x, _ in stream.train(shares, view))

    def val(shares: Iterable[Ints], view: int) -> Iterator[Tensor]:
        return stream.val(shares)

    return (
        bank("train", images.train_labels, bank_format.views(trial), trial.batch_size, train),
        bank("val", images.val_labels, 1, bank_format.VAL_BATCH, val),
    )


def fill(
    trial: Trial,
    images: Images,
    store: Store,
    ledger: Ledger | None,
    holder: str,
    device: torch.device,
) -> None:
    """Compute all chunks that a trial reads and that no other process computes.

    Args:
        trial: A trial that reads a bank.
        images: Its dataset.
        store: Receives the chunks.
        ledger: Says which process computes which chunk.
        holder: The name of this process in the ledger.
        device: The device of the teacher.
    """
    stream = Stream(images, trial.data, trial.seed, device, memory_format(trial.channels_last))
    teacher = Teacher(trial, images, store, device)
    for bank in open_banks(teacher, trial, stream, Clock(device), ledger, holder):
        bank.fill()
