"""Measure what the teacher bank saves when one teacher has N students.

    .venv/bin/python benchmarks/grid.py                          # half an hour on 2 cores
    .venv/bin/python benchmarks/grid.py --pairs demo --images 256 --epochs 1  # quick run

The script measures the pairs of the paper's Table 1 (networks with random weights, random 32x32
images, 100 classes) and the pair of the demo. Each pair is run in three ways, one after another on
the same cluster:

    live   N students; each trial computes its own teacher forward passes
    bank   the same N students; the bank is empty at the start
    warm   CE and distilled students in turn with a full bank. This gives the cost of a distilled
           trial relative to a CE trial (the ratio of their seconds in the same round, median over
           the rounds), and the part of a training step that is not the student's forward pass,
           backward pass and optimizer step

The table is printed and written to --out as grid.csv.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from pld_ray.config.experiment import Experiment, load_experiment
from pld_ray.config.parts import Model, Resources
from pld_ray.config.planning import Plan, plan
from pld_ray.data import datasets, images
from pld_ray.models.factory import create_model
from pld_ray.store.store import Store
from pld_ray.sweep import runner
from pld_ray.sweep.progress import ProgressView, redirect_prints

import ray  # isort: skip  # after pld_ray.sweep, which sets Ray's environment variables

PAIRS = {
    "wrn": ("wrn_40_2", "wrn_40_1"),
    "resnet": ("resnet56", "resnet20"),
    "resnetx4": ("resnet32x4", "resnet8x4"),
    "mobilenet": ("resnet50_cifar", "mobilenetv2_cifar"),
    "demo": ("resnet20", "resnet8"),
}
WARM = ["ce", "kd", "dist", "pld"]


def random_images(size: int) -> images.Images:
    """Return noise images with the shape of CIFAR-100.

    The cost of a step does not depend on the content of the images.

    Args:
        size: Number of training images. There are 256 validation images.
    """
    rng = np.random.default_rng(0)
    splits = [
        (rng.integers(0, 256, (count, 32, 32, 3), np.uint8), rng.integers(0, 100, count))
        for count in (size, 256)
    ]
    (train, train_labels), (val, val_labels) = splits
    return images.Images(train, train_labels, val, val_labels, 100, (0.5,) * 3, (0.3,) * 3)


def grid(base: dict[str, Any], losses: list[Any], rates: list[float], logits: str) -> Plan:
    """Return a plan of students of one teacher, ordered by learning rate and then by loss.

    Args:
        base: Base settings of the trials.
        losses: Settings of the losses.
        rates: Learning rates.
        logits: How teacher logits are stored: "live", "float16" or "float32".
    """
    changed = base | {"teacher": base["teacher"] | {"logits": logits}}
    fields = {"loss": losses, "optimizer.lr": rates}
    alone = Resources(gang=1)  # a gang would share the live teacher
    made = plan(Experiment(name="grid", base=changed, grid=fields, resources=alone))
    cells = sorted(made.cells, key=lambda cell: cell.trial.optimizer.lr)
    return Plan(made.experiment, tuple(cells))


def run(made: Plan, images: images.Images, store: Store) -> tuple[float, list[dict[str, Any]]]:
    """Run a grid.

    Args:
        made: The plan of the grid.
        images: The images that all trials use.
        store: The store for records, weights and the bank.

    Returns:
        The wall time in seconds, and the records of the cells.
    """
    done = store.finished(made.trials)
    pending = {key: trial for key, trial in made.trials.items() if key not in done}
    held = {datasets.sharing_key(trial.data): images for trial in pending.values()}
    console = Console(quiet=True)
    started = time.perf_counter()
    failures = runner.run(made, held, store, ProgressView(made, pending, console))
    wall = time.perf_counter() - started
    if failures:
        sys.exit(f"grid.py: a trial failed: {next(iter(failures.values()))}")
    records = [store.record(cell.trial.id) for cell in made.cells]
    return wall, [record for record in records if record is not None]


def not_student(record: dict[str, Any]) -> float:
    """Return the percentage of the training time that is not spent in the student's own steps."""
    seconds = record["seconds"]
    steps = seconds["seconds"] - seconds["validation_seconds"]
    return 100 * (1 - seconds["student_seconds"] / steps)


def measure(pair: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one pair of networks.

    Args:
        pair: Key of `PAIRS`.
        folder: Folder for stores and weights.
        arguments: The command-line arguments.

    Returns:
        One row of the table.
    """
    teacher, student = PAIRS[pair]
    if pair == "demo":
        base = load_experiment("demo").base
        images = datasets.load(plan(load_experiment("demo")).cells[0].trial.data)
        base = base | {"epochs": 10 * arguments.epochs}
    else:
        images = random_images(arguments.images)
        base = {
            "data": {"name": "parquet:random", "pad": 4, "flip": True},
            "student": student,
            "epochs": arguments.epochs,
            "batch_size": 128,
        }
    weights = folder / f"{teacher}.safetensors"
    torch.manual_seed(0)
    network = create_model(Model(name=teacher), *images.shape)
    save_file(network.state_dict(), weights)
    base = base | {"teacher": {"name": teacher, "weights": str(weights)}}
    losses = [
        {"name": WARM[1 + i % 3], "temperature": 1 + i / 4} for i in range(arguments.students)
    ]
    wall, count = {}, {}
    for way, logits in (("live", "live"), ("bank", "float16")):
        store = Store(folder / pair / way)
        made = grid(base, losses, [1e-3], logits)
        wall[way], records = run(made, images, store)
        count[way] = sum(record["teacher_images"] for record in records)
    rates = [2e-3 + i * 1e-6 for i in range(arguments.rounds)]
    made = grid(base, WARM, rates, "float16")
    _, records = run(made, images, store)
    assert not any(record["teacher_images"] for record in records)
    rounds = [records[i : i + len(WARM)] for i in range(0, len(records), len(WARM))]
    costs = {
        loss: median(r[i]["seconds"]["seconds"] / r[0]["seconds"]["seconds"] for r in rounds)
        for i, loss in enumerate(WARM)
        if i
    }
    rest = {loss: median(not_student(r[i]) for r in rounds) for i, loss in enumerate(WARM)}
    return {
        "pair": pair,
        "teacher": teacher,
        "student": student,
        "students": arguments.students,
        "live_seconds": wall["live"],
        "bank_seconds": wall["bank"],
        "faster": wall["live"] / wall["bank"],
        "live_images": count["live"],
        "bank_images": count["bank"],
        **{f"{loss}_over_ce": cost for loss, cost in costs.items()},
        **{f"{loss}_not_student_percent": share for loss, share in rest.items()},
    }


def show(results: pd.DataFrame, console: Console) -> None:
    """Print the rows of `measure` as a table."""
    table = Table(box=box.MARKDOWN)
    heads = ["Teacher → student", "Live s", "Bank s", "Faster", "Teacher images"]
    heads += [*(f"{loss} / CE" for loss in ("KD", "DIST", "PLD")), "Not student %"]
    for head in heads:
        table.add_column(head, justify="left" if head == heads[0] else "right")
    for row in results.to_dict("records"):
        table.add_row(
            f"{row['teacher']} → {row['student']}",
            f"{row['live_seconds']:.1f}",
            f"{row['bank_seconds']:.1f}",
            f"{row['faster']:.2f}",
            f"{row['live_images']:,} → {row['bank_images']:,}",
            *(f"{row[f'{loss}_over_ce']:.3f}" for loss in WARM[1:]),
            f"{row['pld_not_student_percent']:.1f}",
        )
    console.print(table)


def main() -> None:
    """Measure all pairs, and print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--pairs", nargs="+", choices=PAIRS, default=list(PAIRS), help="pairs to run"
    )
    parser.add_argument("--students", type=int, default=8, help="number of students per teacher")
    parser.add_argument("--images", type=int, default=1024, help="number of training images")
    parser.add_argument("--epochs", type=int, default=2, help="epochs (the demo: 10 times as many)")
    parser.add_argument("--rounds", type=int, default=4, help="rounds with a full bank")
    parser.add_argument(
        "--out", type=Path, default=Path("results/benchmarks"), help="output folder"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    log = arguments.out / "ray.log"
    with tempfile.TemporaryDirectory() as folder, redirect_prints(log) as console:
        ray.init(log_to_driver=False)
        for pair in arguments.pairs:
            rows.append(measure(pair, Path(folder), arguments))
            console.print(f"{pair}: {rows[-1]['faster']:.2f} times faster")
        cores = ray.cluster_resources().get("CPU", 0)
        ray.shutdown()
    results = pd.DataFrame(rows)
    results.round(4).to_csv(arguments.out / "grid.csv", index=False)
    console = Console(width=120)
    show(results, console)
    console.print(
        f"{arguments.students} students, {arguments.images} images, {arguments.epochs} epochs, "
        f"{cores:g} trials at once; torch {torch.__version__}; written: {arguments.out}/grid.csv"
    )


if __name__ == "__main__":
    main()
