"""Measure a GPU: training steps, losses, exact resume, and two processes. No Ray and no data set.

    .venv/bin/python benchmarks/gpu.py           # some minutes on one GPU
    .venv/bin/python benchmarks/gpu.py --quick   # every part once, small; also without a GPU

Five parts, each printed as a table. All numbers go to --out as gpu.json, row by row.

    losses   The forward and backward pass of losses on logits, beside the bytes that they must move
             (both logits once in, the gradient once out) over the bandwidth that a copy reaches
    resume   A trial on the digits that is stopped and resumed has the same bits as one that is not
    workers  Two processes train one trial (gloo, because NCCL refuses two processes on one GPU)
    steps    The pairs of the paper's Table 1 (batches of 128 random 32x32 images) and two networks
             at 224 pixels, in bfloat16 on a GPU: milliseconds of a step of CE and of KD with a live
             teacher, of CE as a CUDA graph, and images per second of CE when the stream prepares
             the images, as in a trial
    compiled The same step of CE after torch.compile
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pld_ray import losses
from pld_ray.config.parts import Data, Model
from pld_ray.config.trial import Trial
from pld_ray.data import datasets
from pld_ray.data.images import Images
from pld_ray.data.sampling import batches, order
from pld_ray.data.stream import Stream
from pld_ray.distill.device import pick_device, pick_precision, use_deterministic
from pld_ray.distill.distiller import Distiller
from pld_ray.distill.loop import train
from pld_ray.models.factory import create_model
from pld_ray.store.store import Store

Row = dict[str, Any]
SMALL = [
    ("wrn_40_2", "wrn_40_1"),
    ("resnet56", "resnet20"),
    ("resnet32x4", "resnet8x4"),
    ("resnet50_cifar", "mobilenetv2_cifar"),
]
LARGE = [("resnet101", "resnet50"), ("vit_base_patch16_224", "vit_small_patch16_224")]
SIZES = [(128, 100), (256, 1000), (8192, 32000)]
LOSSES = ("ce", "kd", "dist", "dkd", "pld")


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Return the median time of a call, over blocks of calls that take `seconds` in total."""
    for _ in range(3):
        run()
    wait(device)
    blocks: list[float] = []
    started, calls = time.perf_counter(), 1
    while time.perf_counter() - started < seconds or len(blocks) < 3:
        before = time.perf_counter()
        for _ in range(calls):
            run()
        wait(device)
        blocks.append((time.perf_counter() - before) / calls)
        calls = max(1, min(1000, int(seconds / 10 / blocks[-1])))
    return 1000 * median(blocks)


# ---------------------------------------------------------------- steps


class Step:
    """A training step of a student on one batch that stays on the device.

    Args:
        student: The network to train.
        teacher: The teacher network, or None for cross-entropy.
        images: The batch [B, 3, H, W].
        labels: Its labels [B].
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, images: Tensor, labels: Tensor
    ) -> None:
        precision = pick_precision("auto", images.device)
        loss = losses.create_loss("ce" if teacher is None else "kd", ignore_index=None)
        self.distiller = Distiller(student, teacher, loss, precision=precision).train()
        fused = images.device.type == "cuda"
        self.optimizer = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9, fused=fused)
        self.images, self.labels = images, labels

    def __call__(self) -> None:
        """Do one step."""
        self.optimizer.zero_grad()
        self.distiller(self.images, self.labels).backward()
        self.optimizer.step()

    def captured(self) -> Callable[[], None]:
        """Return a function that replays the step as one CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self()

        def replay(kept: Step = self) -> None:  # the graph uses the tensors of the step
            graph.replay()

        return replay


def streamed(step: Step, side: int, images: int, device: torch.device) -> float:
    """Return images per second of a step to whose batches the stream gives its images."""
    dice = np.random.default_rng(0)
    pixels = dice.integers(0, 256, (images, side, side, 3), dtype=np.uint8)
    labels = dice.integers(0, 100, images)
    made = Images(pixels, labels, pixels[:1], labels[:1], 100, (0.5,) * 3, (0.25,) * 3)
    stream = Stream(made, Data(name="cifar100", pad=4, flip=True), 0, device)
    rates = []
    for epoch in range(3):
        shares = list(batches(order(0, epoch, images), len(step.labels), drop_last=True))
        wait(device)
        started = time.perf_counter()
        for step.images, step.labels in stream.train(shares, epoch):  # type: ignore[assignment]
            step()
        wait(device)
        rates.append(sum(map(len, shares)) / (time.perf_counter() - started))
    return max(rates)


def pairs(quick: bool) -> list[tuple[tuple[str, str], int, int, int]]:
    """Return teacher and student, side of the images, batch size, and images of an epoch."""
    if quick:
        return [(("resnet20", "resnet8"), 32, 16, 64)]
    large = [(names, 224, 64, 2_048) for names in LARGE]
    return [(names, 32, 128, 50_000) for names in SMALL] + large


def network(name: str, side: int, device: torch.device) -> nn.Module:
    """Return a network with its first weights, for images of this side."""
    made = create_model(Model(name=name), 100 if side == 32 else 1000, 3, side).to(device)
    return made.to(memory_format=torch.channels_last)


def batch_of(batch: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return random images [B, 3, H, W] and labels [B]."""
    images = torch.randn(batch, 3, side, side, device=device)
    labels = torch.randint(100, (batch,), device=device)
    return images.to(memory_format=torch.channels_last), labels


def measure_steps(device: torch.device, quick: bool) -> Iterator[Row]:
    """Yield the times of the steps of each pair of networks."""
    seconds = 0.1 if quick else 2.0
    for (teacher_name, student_name), side, batch, images in pairs(quick):
        x, y = batch_of(batch, side, device)
        alone = Step(network(student_name, side, device), None, x, y)
        teacher = network(teacher_name, side, device)
        taught = Step(network(student_name, side, device), teacher, x, y)
        row: Row = {"pair": f"{teacher_name} → {student_name}", "batch": batch}
        row["CE (ms)"] = milliseconds(alone, device, seconds)
        row["KD, live teacher (ms)"] = milliseconds(taught, device, seconds)
        row["not student (%)"] = 100 * (1 - row["CE (ms)"] / row["KD, live teacher (ms)"])
        row["CE images/s"] = streamed(alone, side, images, device)
        row["of resident (%)"] = row["CE images/s"] * row["CE (ms)"] / batch / 10
        if device.type == "cuda":
            step = Step(network(student_name, side, device), None, x, y)
            row["CE graph (ms)"] = milliseconds(step.captured(), device, seconds)
        yield row


def measure_compiled(device: torch.device, quick: bool) -> Iterator[Row]:
    """Yield the times of the steps of each student after `torch.compile`."""
    for (_, name), side, batch, _ in pairs(quick):
        torch._dynamo.reset()
        step = Step(network(name, side, device), None, *batch_of(batch, side, device))
        step.distiller.compile_student()
        started = time.perf_counter()
        step()
        wait(device)
        took = time.perf_counter() - started
        best = milliseconds(step, device, 0.1 if quick else 2.0)
        yield {"student": name, "CE compiled (ms)": best, "first step (s)": took}


# ---------------------------------------------------------------- losses


def bandwidth(device: torch.device, quick: bool) -> float:
    """Return the bytes per second that a copy within the device reads and writes."""
    source = torch.empty(2**22 if quick else 2**28, device=device)  # 1 GiB
    target = torch.empty_like(source)
    took = milliseconds(lambda: target.copy_(source), device, 0.1 if quick else 1.0)
    return 2 * source.nbytes / took * 1000


def _time_loss(
    name: str,
    given: tuple[Tensor, Tensor, Tensor],
    more: dict[str, Tensor],
    device: torch.device,
    quick: bool,
) -> float:
    """Return the milliseconds of a forward and backward pass of a loss."""
    loss = losses.create_loss(name, ignore_index=None)

    def run() -> None:
        given[0].grad = None
        loss(*given, **more).backward()

    return milliseconds(run, device, 0.1 if quick else 1.0)


def measure_losses(device: torch.device, quick: bool) -> Iterator[Row]:
    """Yield the times of losses and the least time that their bytes take."""
    rate = bandwidth(device, quick)
    yield {"loss": "copy", "GB/s": rate / 1e9}
    for batch, classes in SIZES[:1] if quick else SIZES:
        generator = torch.Generator(device).manual_seed(classes)
        student, teacher = (
            3 * torch.randn(batch, classes, generator=generator, device=device) for _ in range(2)
        )
        labels = torch.randint(classes, (batch,), generator=generator, device=device)
        given = student.requires_grad_(), teacher, labels
        found = {name: _time_loss(name, given, {}, device, quick) for name in LOSSES}
        more = {"order": losses.teacher_order(teacher, labels)}
        found["pld, order given"] = _time_loss("pld", given, more, device, quick)
        bound = 1000 * 3 * teacher.nbytes / rate
        for name, took in found.items():
            yield {
                "size": f"{batch} x {classes}", "loss": name, "ms": took,
                "times KD": took / found["kd"], "times the bytes": took / bound,
            }  # fmt: skip


# ---------------------------------------------------------------- resume and workers


def small_trial(loss: str, workers: int, epochs: int) -> Trial:
    """Return a trial of the digits without a teacher to train."""
    settings = {
        "data": {"name": "digits", "pad": 1, "flip": True},
        "student": "resnet20",
        "loss": loss,
        "epochs": epochs,
        "batch_size": 64,
        "workers": workers,
        "ema": 0.9,
    }
    return Trial.model_validate(settings)


def run_trial(trial: Trial, folder: str, device: torch.device, last: int = 0) -> Row | None:
    """Train a trial, up to an epoch if `last` is given, and return its record."""

    def report(metrics: Row) -> None:
        if metrics["epoch"] == last:
            raise SystemExit

    store = Store(folder)
    try:
        train(trial, datasets.load(trial.data), store, report, device=device)
    except SystemExit:
        return None
    return store.record(trial.id)


def same(one: Row | None, other: Row | None) -> bool:
    """Return whether two records have the same weights and metrics."""
    assert one is not None and other is not None
    metrics = [
        {k: v for k, v in r["metrics"].items() if "per_second" not in k} for r in (one, other)
    ]
    return one["weights_sha256"] == other["weights_sha256"] and metrics[0] == metrics[1]


def measure_resume(device: torch.device, quick: bool) -> Iterator[Row]:
    """Yield whether a trial that is stopped after an epoch ends with the same bits."""
    for loss in ("ce",) if quick else ("ce", "ls"):
        trial = small_trial(loss, 1, 2 if quick else 4)
        with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as parts:
            expected = run_trial(trial, whole, device)
            run_trial(trial, parts, device, last=1)
            resumed = run_trial(trial, parts, device)
        yield {"loss": loss, "same bits after resume": same(expected, resumed)}


def _worker(rank: int, folder: str, spec: str, last: int, device: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous{last}", rank=rank, world_size=2
    )
    run_trial(Trial.model_validate_json(spec), folder, torch.device(device), last)
    torch.distributed.destroy_process_group()


def measure_workers(device: torch.device, quick: bool) -> Iterator[Row]:
    """Yield how two processes train one trial, whole and resumed."""
    trial = small_trial("ce", 2, 2 if quick else 3)
    records = []
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as parts:
        started = time.perf_counter()
        for folder, last in ((whole, 0), (parts, 1), (parts, 0)):
            arguments = folder, trial.model_dump_json(), last, str(device)
            spawn: Any = torch.multiprocessing.spawn  # type: ignore[attr-defined]
            spawn(_worker, arguments, 2)
            records.append(Store(folder).record(trial.id) or {})
        took = time.perf_counter() - started
    yield {
        "workers": 2, "top-1": records[0]["metrics"]["top1"], "seconds of three runs": took,
        "same bits after resume": same(records[0], records[2]),
    }  # fmt: skip


# ---------------------------------------------------------------- output


PARTS = {
    "losses": measure_losses,
    "resume": measure_resume,
    "workers": measure_workers,
    "steps": measure_steps,
    "compiled": measure_compiled,
}


def table(title: str, rows: list[Row]) -> Table:
    """Return a table with one column per name of the rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    found = Table(box=box.SIMPLE, title=title)
    for name in names:
        number = any(isinstance(row.get(name), float) for row in rows)
        found.add_column(name, justify="right" if number else "left")
    for row in rows:
        cells = (row.get(name, "") for name in names)
        found.add_row(*(f"{cell:,.3g}" if isinstance(cell, float) else str(cell) for cell in cells))
    return found


def main() -> None:
    """Measure the chosen parts, print their tables and write gpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    arguments = parser.parse_args()
    device = pick_device()
    use_deterministic(device)  # as a trial does
    card = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu"
    found: Row = {"device": card, "torch": str(torch.__version__), "quick": arguments.quick}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for part in arguments.parts:
        started = time.perf_counter()
        found[part] = []
        for row in PARTS[part](device, arguments.quick):
            found[part].append(row)
            (arguments.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        title = f"{part} ({card}, torch {torch.__version__}, {time.perf_counter() - started:.0f} s)"
        Console().print(table(title, found[part]))


if __name__ == "__main__":
    main()
