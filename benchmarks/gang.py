"""Measure what gangs save: trials that step through one stream against the same trials alone.

    .venv/bin/python benchmarks/gang.py            # 25 minutes on 2 cores
    .venv/bin/python benchmarks/gang.py --quick    # a check that it runs

Four parts. In each, the trials run alone and as gangs in one run, and their weights are compared:

    features  six losses on features of each CIFAR pair of the paper, as one gang (networks with
              random weights, random 32x32 images). The limit is what the ratio would be if a gang
              cost nothing but the students' own steps and one pass of the teacher
    files     8 ResNet-8 students on a folder of 500x375 JPEG files, random resized crops to 32
    demo      the command `pld-ray run demo`, with resources.gang 1 and auto
    tiny      the same with a grid of 40 trials of an epoch of 200 images

The first two run in this process on one core, as a trial has one if all cores are busy. The other
two are whole commands on all cores, with the start of Ray.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # as in the actor of a trial with one core

import numpy as np
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from pld_ray.config.parts import Model
from pld_ray.config.trial import Trial
from pld_ray.data import datasets
from pld_ray.data.images import Images
from pld_ray.distill.loop import train_gang
from pld_ray.models.factory import create_model
from pld_ray.store.store import Store

PAIRS = (
    ("resnet56", "resnet20"),
    ("wrn_40_2", "wrn_40_1"),
    ("resnet32x4", "resnet8x4"),
    ("resnet50_cifar", "mobilenetv2_cifar"),
)
FEATURES = ("at", "fitnet", "pkt", "rkd", "sp", "vid")
TINY = """
base: {data: {name: digits, limit: 200}, student: resnet8, epochs: 1, batch_size: 50}
grid: {loss: [ce], optimizer.lr: [RATES]}
"""
Row = dict[str, Any]


def random_images(size: int) -> Images:
    """Return noise images with the shape of CIFAR-100, and 64 of them to validate on."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (size, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 100, size)
    return Images(pixels, labels, pixels[:64], labels[:64], 100, (0.5,) * 3, (0.3,) * 3)


def trained(trials: list[Trial], images: Images, store: Store) -> list[Row]:
    """Train trials as one gang and return their records."""

    def ended(trial: Trial, error: Exception | None) -> None:
        if error is not None:
            raise error

    train_gang(trials, images, store, lambda epochs: None, ended, device=torch.device("cpu"))
    records = [store.record(trial.id) for trial in trials]
    return [record for record in records if record is not None]


def compared(trials: list[Trial], images: Images, folder: Path) -> tuple[list[Row], Row]:
    """Train trials alone and as a gang.

    Returns:
        The records of the trials alone, and the seconds of both and whether the weights are equal.
        The seconds are those of the epochs, without the making of networks.
    """
    alone = [record for trial in trials for record in trained([trial], images, Store(folder / "1"))]
    gang = trained(trials, images, Store(folder / "gang"))
    seconds = [sum(r["seconds"]["seconds"] for r in records) for records in (alone, gang)]
    same = all(a["weights_sha256"] == b["weights_sha256"] for a, b in zip(alone, gang, strict=True))
    return alone, {"alone": seconds[0], "gang": seconds[1], "same": same}


def features(folder: Path, quick: bool) -> Iterator[Row]:
    """Yield the seconds of six losses on features for each pair of networks."""
    for teacher, student in PAIRS[:1] if quick else PAIRS:
        images, weights = random_images(64 if quick else 768), folder / f"{teacher}.safetensors"
        torch.manual_seed(0)
        save_file(create_model(Model(name=teacher), *images.shape).state_dict(), weights)
        settings = {
            "data": {"name": "parquet:random", "pad": 4, "flip": True},
            "student": {"name": student},
            "teacher": {"name": teacher, "weights": str(weights)},
            "optimizer": {"name": "sgd", "lr": 0.001},
            "clip_grad": 1,
            "epochs": 1,
            "batch_size": 64,
        }
        trials = [Trial.model_validate(settings | {"loss": {"name": n}}) for n in FEATURES]
        alone, row = compared(trials, images, folder / student)
        spent = row["alone"], sum(record["seconds"]["teacher_seconds"] for record in alone)
        limit = spent[0] / (spent[0] - spent[1] * (1 - 1 / len(trials)))
        yield {"what": f"6 losses on features, {teacher} → {student}", **row, "limit": limit}


def files(folder: Path, quick: bool) -> Iterator[Row]:
    """Yield the seconds of students that are trained on JPEG files."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 16 if quick else 512), ("val", 16)):
        for number in range(count):
            place = folder / "images" / split / f"class{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            small = rng.integers(0, 256, (12, 16, 3), np.uint8)  # a smooth picture with some noise
            picture = np.asarray(
                Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC)
            )
            noisy = np.minimum(picture // 2 + rng.integers(0, 16, picture.shape, np.uint8), 255)
            Image.fromarray(noisy).save(place / f"{number}.jpg", quality=90)
    settings = {
        "data": {
            "name": f"folder:{folder / 'images'}",
            "random_resized_crop": True,
            "image_size": 32,
            "flip": True,
        },
        "student": {"name": "resnet8"},
        "loss": {"name": "ce"},
        "epochs": 1 if quick else 2,
        "batch_size": 64,
    }
    rates = [0.01 * (1 + i) for i in range(8)]
    optimizers = [{"optimizer": {"name": "sgd", "lr": rate}} for rate in rates]
    trials = [Trial.model_validate(settings | optimizer) for optimizer in optimizers]
    _, row = compared(trials, datasets.load(trials[0].data), folder / "files")
    yield {"what": "8 students on 500x375 JPEG files", **row}


def command(what: str, experiment: str, folder: Path, more: tuple[str, ...] = ()) -> Row:
    """Return the seconds of `pld-ray run` with and without gangs."""
    row: Row = {"what": what}
    digests = []
    for name, gang in (("alone", "1"), ("gang", "auto")):
        storage = folder / name
        sets = [part for each in (f"resources.gang={gang}", *more) for part in ("--set", each)]
        called = [sys.executable, "-m", "pld_ray.cli", "run", experiment, "--storage", storage]
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        started = time.perf_counter()
        subprocess.run([*called, *sets], check=True, capture_output=True, env=environment)
        row[name] = time.perf_counter() - started
        store = Store(storage)
        digests.append({k: r["weights_sha256"] for k, r in store.records(store.trials()).items()})
    return row | {"same": digests[0] == digests[1] and len(digests[0]) > 0}


def demo(folder: Path, quick: bool) -> Iterator[Row]:
    """Yield the seconds of the demo."""
    yield command("the demo", "demo", folder / "demo", ("seeds=[0]", "epochs=2") if quick else ())


def tiny(folder: Path, quick: bool) -> Iterator[Row]:
    """Yield the seconds of a grid of tiny trials."""
    count = 4 if quick else 40
    rates = ", ".join(str(round(1e-4 * (i + 1), 4)) for i in range(count))
    (folder / "tiny.yaml").write_text(TINY.replace("RATES", rates))
    yield command(f"{count} tiny trials", str(folder / "tiny.yaml"), folder / "tiny")


PARTS: dict[str, Callable[[Path, bool], Iterator[Row]]] = {
    "features": features,
    "files": files,
    "demo": demo,
    "tiny": tiny,
}


def show(rows: list[Row], console: Console) -> None:
    """Print the rows as a table."""
    table = Table(box=box.MARKDOWN)
    table.add_column("Trials")
    for head in ("Alone s", "Gang s", "Ratio", "Limit", "Same weights"):
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(
            row["what"],
            f"{row['alone']:.1f}",
            f"{row['gang']:.1f}",
            f"{row['alone'] / row['gang']:.2f}",
            f"{row['limit']:.2f}" if "limit" in row else "",
            "yes" if row["same"] else "NO",
        )
    console.print(table)


def main() -> None:
    """Measure the parts and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts")
    parser.add_argument("--quick", action="store_true", help="few images and trials")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows, console, cores = [], Console(width=120), os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as folder:
        for part in arguments.parts:
            if part in ("features", "files"):
                os.sched_setaffinity(0, {min(cores)})
            else:
                os.sched_setaffinity(0, cores)
            for row in PARTS[part](Path(folder), arguments.quick):
                rows.append(row)
                ratio = row["alone"] / row["gang"]
                console.print(f"{row['what']}: {ratio:.2f} times faster", highlight=False)
    show(rows, console)


if __name__ == "__main__":
    main()
