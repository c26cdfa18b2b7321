"""Estimate the cost of the paper's ImageNet grid on 8, 64 and 512 GPUs, for docs/scale.md.

    .venv/bin/python benchmarks/scale.py    # a minute on 2 cores, no GPU, no dataset

Measured by this script: the operations of each network, the random resized crops that a core
decodes from JPEG files of ImageNet's average size, and the rows of the teacher bank that a core
reads and writes. Taken from the paper: 100 epochs take 6 hours on 8 A100s (8 hours for a vision
transformer) with a live teacher. Assumed: these hours are GPU time, in proportion to the
operations, with factor 1 for the teacher's forward pass and 3 for the student's step. Trials are
assigned to groups of 8 GPUs, the longest first. The longest trial that needs a bank computes it.
Gangs are formed as in a run: of trials with one stream, each with its share of the epochs. The
longest are split while other groups of GPUs are free.
"""

from __future__ import annotations

import heapq
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # measure a single core

import data  # the benchmark of readers, beside this file
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from analysis.tables.paper_tables import TABLES
from pld_ray import units
from pld_ray.config.experiment import load_experiment
from pld_ray.config.gangs import stream_key
from pld_ray.config.parts import Data, Model, Weights
from pld_ray.config.planning import plan
from pld_ray.config.trial import Trial
from pld_ray.data import augmentation, datasets, images
from pld_ray.data.encoded import EncodedImages
from pld_ray.distill import bank_format, bank_plan
from pld_ray.models.factory import create_model
from pld_ray.store.store import Store
from pld_ray.sweep.gangs import join

IMAGES = images.Size(1_281_167, 50_000, 1000)
IMAGE_BYTES = 110_000  # average size of an encoded training image
GROUP = 8  # GPUs per trial
KINDS = "float16", "top64"  # how the bank stores logits
ROW_BYTES = {kind: bank_format.row_type(1000, kind).itemsize for kind in KINDS}
HOURS = 48.0, 64.0  # reported GPU-hours per 100 epochs: most students, vision transformers


def measured_operations(models: Iterable[Model]) -> dict[str, tuple[float, int]]:
    """Count the operations and parameters of networks.

    Returns:
        Name of the network -> (floating-point operations of the forward pass of one image with 224
        pixels, number of parameters).
    """
    found = {}
    for model in models:
        with torch.device("meta"):
            network = create_model(model, 1000, 3, 224).eval()
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                network(torch.zeros(1, 3, 224, 224))
        parameters = sum(p.numel() for p in network.parameters())
        found[model.name] = float(counter.get_total_flops()), parameters
    return found


def measured_decoding(count: int = 300) -> float:
    """Return how many random resized crops of 224 pixels one core decodes per second."""
    with tempfile.TemporaryDirectory() as folder:
        data.make_folder(Path(folder), 40)
        sizes = [file.stat().st_size for file in Path(folder).rglob("*.jpg")]
        assert 0.8 < sum(sizes) / len(sizes) / IMAGE_BYTES < 1.2, sizes
        found = datasets.load(Data.model_validate({"name": f"folder:{folder}", **data.CROPPED}))
        assert isinstance(found.train, EncodedImages)
        index = np.arange(count) % len(found.train)
        started = time.perf_counter()
        found.train.decode(index, augmentation.crop_draws(0, 0, np.arange(count)))
        return count / (time.perf_counter() - started)


def measured_bank(kind: str, chunks: int = 20) -> tuple[float, float]:
    """Measure the speed of the teacher bank on one core, with rows of 1000 classes.

    Args:
        kind: How the logits are stored: "float16" or "top64".
        chunks: Number of chunks to write and read.

    Returns:
        Rows written per second, and rows read and unpacked per second.
    """
    logits = np.random.default_rng(0).normal(size=(bank_format.ROWS, 1000)).astype(np.float32)
    row = bank_format.row_type(1000, kind)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        started = time.perf_counter()
        for number in range(chunks):
            packed = [bank_format.pack(batch, row) for batch in np.split(logits, 8)]
            content = bank_format.encode(np.concatenate(packed), 1.0)
            store.write_chunk(f"key/0/{number}.logits", content)
        written = time.perf_counter()
        for number in range(chunks):
            kept = store.read_chunk(f"key/0/{number}.logits")
            assert kept is not None
            found = bank_format.decode(kept, row, bank_format.ROWS)
            assert found is not None
            bank_format.unpack(found[0], 1000)
        ended = time.perf_counter()
    rows = chunks * bank_format.ROWS
    return rows / (written - started), rows / (ended - written)


@dataclass
class Job:
    """The cost of one trial of the grid.

    Attributes:
        trial: The trial.
        hours: GPU-hours with a live teacher.
        share: Fraction of these hours that the teacher takes.
    """

    trial: Trial
    hours: float
    share: float

    @property
    def student(self) -> float:
        """The GPU-hours without the teacher."""
        return self.hours * (1 - self.share)


def imagenet() -> list[Trial]:
    """Return the trials of the paper's ImageNet tables; shared trials appear more than once."""
    names = dict.fromkeys(table.experiment for table in TABLES)
    made = [plan(load_experiment(name)) for name in names]
    trials = [trial for each in made for trial in each.trials.values()]
    return [trial for trial in trials if trial.data.name == "imagenet"]


def jobs(trials: Iterable[Trial], operations: dict[str, tuple[float, int]]) -> list[Job]:
    """Return the cost of each trial.

    Args:
        trials: The trials.
        operations: The result of `measured_operations`.
    """
    found = []
    for trial in trials:
        hours = HOURS["vit" in trial.student.name] * trial.epochs / 100
        step = 3 * operations[trial.student.name][0]
        teacher = 0.0
        if isinstance(trial.teacher, Weights):
            teacher = operations[trial.teacher.name][0]
        found.append(Job(trial, hours, teacher / (teacher + step)))
    return found


def with_bank(found: list[Job]) -> list[float]:
    """Return the GPU-hours of each trial if a bank is used.

    The longest trial that reads a bank computes the bank; the other trials only read it.
    """
    first: dict[str, Job] = {}
    for job in found:
        if bank_format.uses_bank(job.trial):
            key = bank_plan.planned_key(job.trial, "train")
            if key not in first or job.hours > first[key].hours:
                first[key] = job
    return [
        job.hours if job in first.values() or not bank_format.uses_bank(job.trial) else job.student
        for job in found
    ]


def gangs(found: list[Job], groups: int) -> list[list[Job]]:
    """Return the trials in gangs, each with its share of the epochs, as a run forms them."""
    room = sum(job.trial.epochs for job in found) / groups
    left = {job.trial.id: job for job in found}
    made = []
    while left:
        first = left.pop(next(iter(left)))
        key = stream_key(first.trial)
        ready = [job.trial for job in left.values() if stream_key(job.trial) == key]
        joined = join(first.trial, ready, len(found), room, lambda trial: True)
        made.append([first, *(left.pop(name) for name in joined if name in left)])
    return made


def spread(made: list[list[Job]], gpus: int) -> list[list[Job]]:
    """Return the gangs after halves have moved to groups of GPUs that were free, while it helps."""
    while len(longest := max(made, key=gang_hours)) > 1:
        longest.sort(key=lambda job: job.student)
        moved = [*(gang for gang in made if gang is not longest), longest[::2], longest[1::2]]
        before, after = (days(list(map(gang_hours, some)), gpus) for some in (made, moved))
        if after >= before:
            break
        made = moved
    return made


def gang_hours(gang: list[Job]) -> float:
    """Return the GPU-hours of a gang, in which each teacher runs once in an epoch."""
    teachers: dict[str, float] = {}
    for job in gang:
        name = str(job.trial.teacher)
        teachers[name] = max(teachers.get(name, 0.0), job.hours - job.student)
    return sum(job.student for job in gang) + sum(teachers.values())


def stored(trials: Iterable[Trial], kind: str) -> list[bank_plan.PlannedBank]:
    """Return the banks of trials, empty, if the teachers' logits are stored as `kind`."""
    kept = [
        trial.model_copy(update={"teacher_logits": kind})
        for trial in trials
        if bank_format.uses_bank(trial)
    ]
    return list(bank_plan.planned(kept, lambda _: IMAGES, Store(".")).values())


def days(hours: list[float], gpus: int) -> float:
    """Return the wall days until all trials are done, if the longest trials start first.

    Args:
        hours: GPU-hours of each trial.
        gpus: Total number of GPUs.
    """
    groups = [0.0] * (gpus // GROUP)
    for each in sorted(hours, reverse=True):
        heapq.heappush(groups, heapq.heappop(groups) + each / GROUP)
    return max(groups) / 24


def table(*heads: str) -> Table:
    """Return an empty table with left-aligned names and right-aligned numbers."""
    made = Table(box=box.MARKDOWN)
    for i, head in enumerate(heads):
        made.add_column(head, justify="right" if i else "left", no_wrap=True)
    return made


def show(console: Console) -> None:
    """Measure, compute the estimates and print them."""
    every = imagenet()
    trials = {trial.id: trial for trial in every}
    models = {t.student.name: t.student for t in trials.values()}
    models |= {
        t.teacher.name: Model(name=t.teacher.name)
        for t in trials.values()
        if isinstance(t.teacher, Weights)
    }
    operations = measured_operations(models.values())
    found = jobs(trials.values(), operations)
    decoded, speeds = measured_decoding(), {kind: measured_bank(kind) for kind in KINDS}
    epochs = sum(job.trial.epochs for job in found)
    rows = (
        f"{kind}: {written:,.0f} rows written per second, {read:,.0f} read"
        for kind, (written, read) in speeds.items()
    )
    console.print(
        f"{len(found)} unique trials, {epochs:,} epochs, {len(models)} networks\n"
        f"a core decodes {decoded:.0f} crops per second\nthe bank on a core: {'; '.join(rows)}\n",
        highlight=False,
    )
    pairs = table("Teacher → student", "Trials", "Teacher GFLOP", "Student x3", "Teacher %")
    by_pair: dict[tuple[str, str], list[Job]] = {}
    for job in found:
        teacher = job.trial.teacher
        name = teacher.name.split(".")[0] if isinstance(teacher, Weights) else "–"
        by_pair.setdefault((name, job.trial.student.name), []).append(job)
    for (teacher, student), some in sorted(by_pair.items()):
        step = 3 * operations[student][0]
        forward = step * some[0].share / (1 - some[0].share)
        pairs.add_row(
            f"{teacher} → {student}",
            str(len(some)),
            f"{forward / 1e9:.1f}",
            f"{step / 1e9:.1f}",
            f"{100 * some[0].share:.0f}",
        )
    console.print(pairs)

    banks = {kind: stored(trials.values(), kind) for kind in KINDS}
    views = table("Views", "Teachers", *(f"Bank, {kind}" for kind in KINDS))
    for most in (1, 8, 32, 100, 300):
        teachers = sum(b.split == "train" for b in banks["float16"])
        sizes = (sum(b.takes(most) for b in banks[kind]) for kind in KINDS)
        views.add_row(str(most), str(teachers), *map(units.in_bytes, sizes))
    console.print(views)

    apart = sum(job.hours for job in jobs(every, operations))
    live, kept = [job.hours for job in found], with_bank(found)
    sizes = table(
        "GPUs", "Groups", "Days, live", "Days, bank", "Days, gangs", "Gangs", "Longest trial, days",
        "Cores, live", "Cores, bank", "Cores, gangs",
    )  # fmt: skip
    for gpus in (8, 64, 512):
        made = spread(gangs(found, gpus // GROUP), gpus)
        took = [days(live, gpus), days(kept, gpus), days([gang_hours(gang) for gang in made], gpus)]
        shown = [epochs, epochs, sum(max(job.trial.epochs for job in gang) for gang in made)]
        shown[1] += sum(bank.views for bank in banks["float16"] if bank.split == "train")
        cores = (
            count * IMAGES.train / (day * 86400 * decoded)
            for count, day in zip(shown, took, strict=True)
        )
        sizes.add_row(
            str(gpus),
            str(gpus // GROUP),
            *(f"{day:.1f}" for day in took),
            str(len(made)),
            f"{max(live) / GROUP / 24:.1f}",
            *(f"{count:,.0f}" for count in cores),
        )
    console.print(
        f"\nGPU-hours: {apart:,.0f} if every experiment runs its own trials, {sum(live):,.0f} with "
        f"each trial once, {sum(kept):,.0f} with each teacher once",
        highlight=False,
    )
    console.print(sizes)

    rate = IMAGES.train * 100 / (6 * 3600)  # images per second of a trial, as reported
    fast = rate / (1 - max(job.share for job in found))
    state = max(operations[job.trial.student.name][1] for job in found) * 3 * 4
    traffic = table("One trial, per second", "As reported", "With the bank, at most")
    for what, of in (
        ("images", lambda r: f"{r:,.0f}"),
        ("cores that decode", lambda r: f"{r / decoded:,.0f}"),
        ("encoded images read", lambda r: units.in_bytes(r * IMAGE_BYTES)),
        ("bank read, float16", lambda r: units.in_bytes(r * ROW_BYTES["float16"])),
        ("bank read, top64", lambda r: units.in_bytes(r * ROW_BYTES["top64"])),
        ("checkpoints written", lambda r: units.in_bytes(state * r / IMAGES.train)),
    ):
        traffic.add_row(what, of(rate), of(fast))
    console.print(traffic)


if __name__ == "__main__":
    show(Console(width=130))
