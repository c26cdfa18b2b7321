"""Measure a step of MLKD, which takes two views of each image, against a step of KD.

    .venv/bin/python benchmarks/views.py                 # a minute on one core
    .venv/bin/python benchmarks/views.py --rounds 1      # quick run

Steps of ResNet-56 → ResNet-20 with batches of 64 images of 32x32 pixels are done in turn, on one
thread: KD and MLKD, with the teacher's logits given, as a bank gives them, and with a live teacher.
The table has the median CPU time of a step and of preparing its images, which is the work of other
processes in a trial, and the median of the ratios of steps to KD in the same round. CPU time hardly
depends on what else the machine does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pld_ray.config.parts import Data, Model, Optimizer
from pld_ray.data.images import Images
from pld_ray.data.stream import Stream
from pld_ray.data.workers import _Batches
from pld_ray.distill.distiller import Distiller
from pld_ray.distill.optimization import create_optimizer, update
from pld_ray.losses import create_loss
from pld_ray.models.factory import create_model

BATCH, CPU = 64, torch.device("cpu")


def milliseconds(run: Callable[[], object]) -> float:
    """Return the milliseconds of CPU time that a call takes."""
    started = time.process_time()
    run()
    return 1e3 * (time.process_time() - started)


def preparing() -> dict[str, Callable[[], object]]:
    """Return what makes the images of a batch of each loss."""
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (BATCH, 32, 32, 3), np.uint8), np.arange(BATCH)
    images = Images(pixels, labels, pixels, labels, 100, (0.5,) * 3, (0.3,) * 3)
    stream, index = Stream(images, Data(name="noise", pad=4, flip=True), 0, CPU), np.arange(BATCH)
    changed = _Batches(
        lambda index: torch.from_numpy(pixels[index]), ("randaugment", "cutout"), 0, 0
    )

    def first() -> None:
        next(iter(stream.train([index], 0)))

    def both() -> None:
        first()
        changed[index]

    return {"kd": first, "mlkd": both}


def step(name: str, live: bool) -> Callable[[], object]:
    """Return a function that does a step of a loss."""
    torch.manual_seed(0)
    student, teacher = (create_model(Model(name=n), 100, 3, 32) for n in ("resnet20", "resnet56"))
    distiller = Distiller(student, teacher, create_loss(name, ignore_index=None)).train()
    distiller.to(memory_format=torch.channels_last)
    optimizer = create_optimizer(Optimizer(name="sgd", lr=0.01, momentum=0.9), distiller)
    rows = BATCH * (2 if distiller.paired else 1)
    images = torch.randn(rows, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels, logits = torch.arange(BATCH).repeat(rows // BATCH), torch.randn(rows, 100)
    given: Tensor | None = None if live else logits

    def run() -> None:
        update(distiller(images, labels, given), distiller, optimizer, 0, None, None)

    return run


def measure(rounds: int) -> pd.DataFrame:
    """Time all steps.

    Args:
        rounds: How often each step is timed.

    Returns:
        One row per loss and kind of logits: median milliseconds of a step and of preparing its
        images, and the median ratio of the step to that of KD.
    """
    prepare, rows = preparing(), []
    steps = {(logits, name): step(name, logits == "live")
             for logits in ("given", "live") for name in ("kd", "mlkd")}  # fmt: skip
    for number in range(-1, rounds):  # the first round is not counted
        taken = {key: milliseconds(run) for key, run in steps.items()}
        for (logits, name), found in taken.items() if number >= 0 else ():
            images = milliseconds(prepare[name])
            ratio = found / taken[logits, "kd"]
            rows.append((logits, name, found, images, ratio))
    frame = pd.DataFrame(rows, columns=["logits", "loss", "step", "images", "ratio"])
    return frame.groupby(["logits", "loss"]).median().reset_index()


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description="Time of a step with two views of each image.")
    parser.add_argument("--rounds", type=int, default=15, help="how often each step is timed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| Logits | Loss | Step ms | Images ms | To KD |")
    print("| ------ | ---- | ------: | --------: | ----: |")
    for row in measure(arguments.rounds).to_dict("records"):
        times = f"{row['step']:.0f} | {row['images']:.1f} | {row['ratio']:.2f}"
        print(f"| {row['logits']} | {row['loss']} | {times} |")


if __name__ == "__main__":
    main()
