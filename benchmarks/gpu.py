"""Measure a GPU: training steps, losses, exact resume, and two processes. No Ray and no data set.

    .venv/bin/python benchmarks/gpu.py           # some minutes on one GPU
    .venv/bin/python benchmarks/gpu.py --quick   # every part once, small; also without a GPU

Five parts, each printed as a table. All numbers go to --out as gpu.json, row by row.

    losses   The forward and backward pass of losses on logits, beside the bytes that they must move
             (both logits once in, the gradient once out) over the bandwidth that a copy reaches
    resume   A trial on the digits that is stopped and resumed, or whose steps are a CUDA graph, has
             the same bits as one that is not, and whose steps are done one by one
    workers  Two processes train one trial (gloo, because NCCL refuses two processes on one GPU)
    steps    The pairs of the paper's Table 1 (batches of 128 random 32x32 images) and two networks
             at 224 pixels, in bfloat16 on a GPU: milliseconds of a step of CE and of KD with a live
             teacher in the training loop of trials, one by one and as a CUDA graph
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
from safetensors.torch import save_file
from torch import Tensor

from pld_ray import losses
from pld_ray.config.parts import Data, Model
from pld_ray.config.trial import Trial
from pld_ray.data import datasets
from pld_ray.data.images import Images
from pld_ray.distill.device import pick_device, use_deterministic
from pld_ray.distill.loop import Gang, train, train_epoch
from pld_ray.distill.running import Shared, set_up
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
PATCHES = {"img_size": 8, "patch_size": 2}  # of a network on the digits
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


def pairs(quick: bool) -> list[tuple[tuple[str, str], int, int, int]]:
    """Return teacher and student, side of the images, batch size, and steps of an epoch."""
    if quick:
        return [(("resnet20", "resnet8"), 32, 16, 4)]
    return [(names, 32, 128, 150) for names in SMALL] + [(names, 224, 64, 20) for names in LARGE]


def random_images(count: int, side: int, classes: int) -> Images:
    """Return random images with random labels."""
    dice = np.random.default_rng(0)
    pixels = dice.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    labels = dice.integers(0, classes, count)
    return Images(pixels, labels, pixels[:1], labels[:1], classes, (0.5,) * 3, (0.25,) * 3)


def weights_file(name: str, images: Images, folder: str) -> Row:
    """Write the first weights of a network, and return the teacher that has them."""
    file = Path(folder, f"{name}.safetensors")
    torch.manual_seed(0)
    save_file(create_model(Model(name=name), *images.shape).state_dict(), file)
    return {"name": name, "weights": str(file)}


def _raise(trial: Trial, error: Exception | None) -> None:
    if error is not None:
        raise error


class Epochs:
    """The epochs of a trial on random images, as the training loop does them.

    Args:
        loss: "ce", or the name of a loss with a live teacher.
        student: The name of the student.
        teacher: The name of the teacher, which has its first weights.
        images: The images.
        batch: The size of a batch.
        device: The device.
        settings: Further settings of the trial.
    """

    def __init__(
        self,
        loss: str,
        student: str,
        teacher: str,
        images: Images,
        batch: int,
        device: torch.device,
        **settings: Any,
    ) -> None:
        self.folder = tempfile.TemporaryDirectory()
        settings |= {
            "data": {"name": "cifar100", "pad": 4, "flip": True},
            "student": student,
            "loss": loss,
            "optimizer": {"name": "sgd", "lr": 0.01},
            "epochs": 1000,
            "batch_size": batch,
        }
        if loss != "ce":
            settings["teacher"] = weights_file(teacher, images, self.folder.name)
            settings["teacher_logits"] = "live"
        trial, store = Trial.model_validate(settings), Store(self.folder.name)
        shared = Shared(trial, images, store, None, lambda: None, device)
        self.gang = Gang(shared, lambda epochs: None, _raise, lambda trial: False)
        self.run, self.device, self.epoch = set_up(trial, shared), device, 0
        self.gang.runs.append(self.run)

    def seconds(self) -> float:
        """Train an epoch and return the seconds that it took."""
        wait(self.device)
        started = time.perf_counter()
        train_epoch(self.gang, [self.run], self.epoch)
        wait(self.device)
        self.epoch += 1
        return time.perf_counter() - started

    def milliseconds(self, least: float) -> float:
        """Return the median time of a step over the epochs that `least` seconds take.

        The first epoch does not count: it compiles, and captures the graph.
        """
        self.seconds()
        found: list[float] = []
        while sum(found) < least or not found:
            found.append(self.seconds())
        return 1000 * median(found) / self.run.shared.steps


def measure_steps(device: torch.device, quick: bool) -> Iterator[Row]:
    """Yield the times of the steps of each pair of networks, one by one and as a CUDA graph."""
    least = 0.1 if quick else 1.0
    for (teacher, student), side, batch, steps in pairs(quick):
        images = random_images(batch * steps, side, 100 if side == 32 else 1000)
        row: Row = {"pair": f"{teacher} → {student}", "batch": batch}
        for loss in ("ce", "kd"):
            for name, graphs in ((loss.upper(), False), (f"{loss.upper()} graph", True)):
                made = Epochs(loss, student, teacher, images, batch, device, cuda_graphs=graphs)
                row[f"{name} (ms)"] = made.milliseconds(least)
        row["captured"] = made.run.update.replay is not None
        row["not student (%)"] = 100 * (1 - row["CE graph (ms)"] / row["KD graph (ms)"])
        row["CE images/s"] = 1000 * batch / row["CE graph (ms)"]
        yield row


def measure_compiled(device: torch.device, quick: bool) -> Iterator[Row]:
    """Yield the times of the steps of each student after `torch.compile`."""
    least = 0.1 if quick else 1.0
    for (_, student), side, batch, steps in pairs(quick):
        images = random_images(batch * steps, side, 100 if side == 32 else 1000)
        row: Row = {"student": student}
        for graphs in (False, True):
            started = time.perf_counter()
            settings = {"compile": True, "cuda_graphs": graphs}
            made = Epochs("ce", student, "", images, batch, device, **settings)
            name = "CE compiled graph" if graphs else "CE compiled"
            row[f"{name} (ms)"] = made.milliseconds(least)
            row.setdefault("seconds", time.perf_counter() - started)
        yield row


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


def small_trial(settings: Row, workers: int, epochs: int) -> Trial:
    """Return a trial on the digits with some settings."""
    data = {"name": "digits", "pad": 1, "flip": True}
    common = {"data": data, "student": "resnet20", "batch_size": 64, "ema": 0.9}
    return Trial.model_validate(common | settings | {"workers": workers, "epochs": epochs})


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
    """Yield whether trials that are resumed or captured end with the same bits as others."""
    images = datasets.load(Data(name="digits"))
    with tempfile.TemporaryDirectory() as folder:
        teacher = weights_file("resnet20", images, folder)
        live = {"teacher": teacher, "teacher_logits": "live"}
        kinds: list[Row] = [{"loss": "ce"}]
        if not quick:
            sgd = {"name": "sgd", "lr": 0.05}
            kinds += [
                {"loss": "ce", "optimizer": sgd, "schedule": {"name": "cosine"}},
                {"loss": "ce", "student": {"name": "vit_tiny_patch16_224", "args": PATCHES}},
                {"loss": "pld", "teacher": teacher},
                {"loss": "kd", **live, "clip_grad": 1.0},
                {"loss": "at", **live},
                {"loss": {"name": "dkd", "warmup_epochs": 2}, "teacher": teacher},
            ]
        for number, settings in enumerate(kinds):
            trial = small_trial(settings, 1, 2 if quick else 3)
            places = [f"{folder}/{number}{name}" for name in ("whole", "parts", "single")]
            whole = run_trial(trial, places[0], device)
            run_trial(trial, places[1], device, last=1)
            resumed = run_trial(trial, places[1], device)
            single = trial.model_copy(update={"cuda_graphs": False})
            yield {
                "student": trial.student.name, "loss": trial.loss.name,
                "optimizer": trial.optimizer.name,
                "teacher": "" if trial.teacher is None else trial.teacher_logits,
                "captured": bool(whole and whole["environment"]["cuda_graph"]),
                "same bits after resume": same(whole, resumed),
                "same bits one by one": same(whole, run_trial(single, places[2], device)),
                "deterministic": bool(whole and whole["environment"]["deterministic"]),
            }  # fmt: skip


def _worker(rank: int, folder: str, spec: str, last: int, device: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous{last}", rank=rank, world_size=2
    )
    run_trial(Trial.model_validate_json(spec), folder, torch.device(device), last)
    torch.distributed.destroy_process_group()


def measure_workers(device: torch.device, quick: bool) -> Iterator[Row]:
    """Yield how two processes train one trial, whole and resumed."""
    trial = small_trial({"loss": "ce"}, 2, 2 if quick else 3)
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
