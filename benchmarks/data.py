"""Compare how fast images are read: pld-ray beside torchvision and timm, on the same files.

    .venv/bin/python benchmarks/data.py                    # three minutes on 2 cores
    .venv/bin/python benchmarks/data.py --files 1281167    # also open as many files as ImageNet has

The images are JPEG files of 500x375 pixels and ImageNet's average size. Every reader gives batches
of random resized crops of 224 pixels (bicubic), mirrored at random and normalised, on two workers:
threads for pld-ray, processes for torchvision's ImageFolder with torch's DataLoader and for timm's
create_loader. In each round, every reader runs once, in a new random order. The table shows the
median images per second of CPU time of all processes, which is what a core gives, and the median
ratio to timm's loader of the same round.

Then the script opens a folder with many small files twice, and trains a student to see which part
of a step waits for images.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# the number of threads that decode, and of processes of the other readers
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "2")

import numpy as np
import timm.data
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from pld_ray.config.parts import Data
from pld_ray.config.trial import Trial
from pld_ray.data import augmentation, datasets, packing
from pld_ray.data.sampling import batches, order
from pld_ray.data.stream import Stream
from pld_ray.distill.loop import train
from pld_ray.store.store import Store

WORKERS = int(os.environ["OMP_NUM_THREADS"])
SIZE, BATCH, QUALITY = 224, 64, 93
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROPPED = {"image_size": SIZE, "random_resized_crop": True, "flip": True, "mean": MEAN, "std": STD}


def picture(number: int) -> bytes:
    """Return a JPEG file of 500x375 pixels and about 110 kB."""
    rng = np.random.default_rng(number)
    rough = Image.fromarray(rng.integers(0, 256, (94, 125, 3), np.uint8))
    buffer = io.BytesIO()
    rough.resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def make_folder(root: Path, images: int) -> None:
    """Write a folder of images in 10 classes; a tenth of them is the validation split."""
    contents = [picture(number) for number in range(50)]
    for number in range(images):
        split = "val" if number % 10 == 9 else "train"
        folder = root / split / f"class{number // 10 % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        # a comment at the end makes each file another one
        (folder / f"{number}.jpg").write_bytes(contents[number % 50] + str(number).encode())


# ---------------------------------------------------------------- readers


def of_pld_ray(name: str) -> Callable[[], Iterator[Any]]:
    """Return a function that reads one epoch of a dataset as a trial does."""
    data = Data.model_validate({"name": name, **CROPPED})
    stream = Stream(datasets.load(data), data, 0, torch.device("cpu"))

    def epoch() -> Iterator[Any]:
        shares = batches(order(0, 0, len(stream.pixels["train"])), BATCH, drop_last=True)
        return stream.train(list(shares), 0)

    return epoch


def of_pillow(folder: Path) -> Callable[[], Iterator[Any]]:
    """Return the same crops with Pillow alone, on one thread."""
    files = sorted((folder / "train").rglob("*.jpg"))

    def epoch() -> Iterator[Any]:
        draws = augmentation.crop_draws(0, 0, np.arange(len(files)))
        for share in batches(order(0, 0, len(files)), BATCH, drop_last=True):
            crops = []
            for i in share.tolist():
                with Image.open(files[i]) as image:
                    cut = augmentation.crop(*image.size, draws[i].tolist())
                    part = image.convert("RGB").resize(
                        (SIZE, SIZE), Image.Resampling.BICUBIC, box=cut
                    )
                crops.append(np.asarray(part))
            x = torch.from_numpy(np.stack(crops)) / 255
            yield (x - torch.tensor(MEAN)) / torch.tensor(STD)

    return epoch


def of_torchvision(folder: Path) -> Callable[[], Iterator[Any]]:
    """Return ImageFolder with the usual transform and torch's DataLoader."""
    bicubic = transforms.InterpolationMode.BICUBIC
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    found = ImageFolder(str(folder / "train"), transform)
    loader = DataLoader(found, BATCH, shuffle=True, num_workers=WORKERS, drop_last=True)
    return lambda: iter(loader)


def of_timm(folder: Path) -> Callable[[], Iterator[Any]]:
    """Return timm's loader with its default training transform, without colour jitter."""
    loader = timm.data.create_loader(
        timm.data.create_dataset("", str(folder), split="train", is_training=True),
        input_size=(3, SIZE, SIZE),
        batch_size=BATCH,
        is_training=True,
        color_jitter=0.0,
        interpolation="bicubic",
        mean=MEAN,
        std=STD,
        num_workers=WORKERS,
        persistent_workers=False,
        use_prefetcher=False,
        device=torch.device("cpu"),
    )
    return lambda: iter(loader)


def measure(epoch: Callable[[], Iterator[Any]]) -> tuple[float, float]:
    """Read one epoch; return images per CPU second of all processes, and per second."""
    cpu, clock = cpu_seconds(), time.perf_counter()
    shown = epoch()
    count = sum(BATCH for _ in shown)
    wall = time.perf_counter() - clock
    del shown  # ends worker processes, whose time then counts
    return count / (cpu_seconds() - cpu), count / wall


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its ended children."""
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in spent)


def decoding(folder: Path, rounds: int) -> tuple[float, float]:
    """Decode and crop on one core; return crops per CPU second, and the median ratio to Pillow."""
    data = Data.model_validate({"name": f"folder:{folder}", **CROPPED})
    pixels: Any = datasets.load(data).train
    index = np.arange(min(256, len(pixels)))
    draws = augmentation.crop_draws(0, 0, index)

    def ours(row: int) -> None:
        pixels._one(row, draws[row].tolist())

    def pillow(row: int) -> None:
        with Image.open(io.BytesIO(pixels.files.read(row))) as image:
            cut = augmentation.crop(*image.size, draws[row].tolist())
            np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=cut))

    found: list[tuple[float, float]] = []
    for _ in range(rounds):
        spent = {}
        for function in random.sample([ours, pillow], 2):
            started = time.process_time()
            for row in index.tolist():
                function(row)
            spent[function] = time.process_time() - started
        found.append((len(index) / spent[ours], spent[pillow] / spent[ours]))
    speeds, ratios = zip(*found, strict=True)
    return statistics.median(speeds), statistics.median(ratios)


# ---------------------------------------------------------------- opening, and the share of a step


OPEN = """
import psutil, sys, time
from pld_ray.config.parts import Data
from pld_ray.data import datasets, fingerprints
before, started = psutil.Process().memory_info().rss, time.perf_counter()
found = datasets.find(Data(name="folder:" + sys.argv[1]))
fingerprints.fingerprint(found)
seconds = time.perf_counter() - started
print(len(found.train[0]), seconds, (psutil.Process().memory_info().rss - before) / 1e6)
"""


def opened(root: Path, files: int, cache: Path) -> list[tuple[float, float]]:
    """Open a folder of many files twice; return the seconds and megabytes of each time."""
    for c in range(1000):
        for split, count in (("train", files // 1000), ("val", 1)):
            folder = root / split / f"n{c:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"n{c:08d}_{i}.JPEG").write_bytes(b"x" * (i % 7))
    found = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", OPEN, str(root)],
            env=os.environ | {"XDG_CACHE_HOME": str(cache)},
            capture_output=True,
            text=True,
            check=True,
        )
        _, seconds, megabytes = done.stdout.split()
        found.append((float(seconds), float(megabytes)))
    return found


def waiting(name: str, student: str, work: Path) -> float:
    """Train a student for one epoch; return the share of the steps that waited for images."""
    trial = Trial.model_validate(
        {
            "data": {"name": name, **CROPPED},
            "student": student,
            "loss": "ce",
            "epochs": 1,
            "batch_size": BATCH,
            "drop_last": True,
        }
    )
    store = Store(work / student)
    train(trial, datasets.load(trial.data), store, lambda metrics: None)
    seconds = store.records([trial.id])[trial.id]["seconds"]
    steps = seconds["seconds"] - seconds["validation_seconds"]
    return float(seconds["data_seconds"] / steps)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1500, help="images of the readers' folder")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all readers")
    parser.add_argument("--files", type=int, default=200_000, help="files of the folder to open")
    parser.add_argument("--student", default="resnet18", help="the student that waits for images")
    arguments = parser.parse_args()
    console = Console(width=100)
    work = Path(tempfile.mkdtemp(prefix="pld-ray-data-"))
    try:
        run(arguments, work, console)
    finally:
        shutil.rmtree(work)


def run(arguments: argparse.Namespace, work: Path, console: Console) -> None:
    """Measure in a folder, and print."""
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    make_folder(work / "images", arguments.images)
    folder = f"folder:{work / 'images'}"
    found = datasets.find(Data(name=folder))
    packing.pack(found, str(work / "packed"), shorter=256, quality=95)
    packing.pack(found, str(work / "hub"), shorter=10_000, quality=95)  # the files as they are
    readers = {
        "pld-ray, folder": of_pld_ray(folder),
        "pld-ray, hf": of_pld_ray(f"hf:{work / 'hub'}"),
        "pld-ray, packed to 256": of_pld_ray(f"hf:{work / 'packed'}"),
        "Pillow alone, one thread": of_pillow(work / "images"),
        "torchvision ImageFolder": of_torchvision(work / "images"),
        "timm create_loader": of_timm(work / "images"),
    }
    rounds: list[dict[str, tuple[float, float]]] = []
    for _ in range(arguments.rounds):
        names = random.sample(list(readers), len(readers))
        rounds.append({name: measure(readers[name]) for name in names})
    table = Table(box=box.MARKDOWN)
    for column in ("Reader", "Images / CPU s", "to timm", "to Pillow", "Images / s"):
        table.add_column(column, justify="left" if column == "Reader" else "right")
    for name in readers:
        cpu, wall = (statistics.median(r[name][i] for r in rounds) for i in (0, 1))
        ratios = (
            statistics.median(r[name][0] / r[other][0] for r in rounds)
            for other in ("timm create_loader", "Pillow alone, one thread")
        )
        table.add_row(name, f"{cpu:.0f}", *(f"{ratio:.2f}" for ratio in ratios), f"{wall:.0f}")
    console.print(table)
    speed, ratio = decoding(work / "images", arguments.rounds)
    console.print(
        f"decoding and cropping alone: {speed:.0f} crops per CPU second, {ratio:.2f} times Pillow"
    )
    for number, (seconds, megabytes) in enumerate(
        opened(work / "many", arguments.files, work / "other-cache"), 1
    ):
        console.print(
            f"opening {arguments.files:,} files, time {number}: {seconds:.1f} s, {megabytes:.0f} MB"
        )
    share = waiting(folder, arguments.student, work)
    console.print(f"share of {arguments.student}'s steps that waits for images: {share:.1%}")


if __name__ == "__main__":
    main()
