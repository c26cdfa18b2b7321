"""Measure a step of MLKD, which takes two views of each image, against a step of KD.

    .venv/bin/python benchmarks/views.py                 # five minutes on 2 cores
    .venv/bin/python benchmarks/views.py --rounds 1 --images 128      # quick run

Trials of ResNet-56 → ResNet-20 with batches of 64 train on noise of 32x32 pixels in this process,
in turn: KD and MLKD, with a full bank and with a live teacher. The table has the median
milliseconds of a step in their second epoch, and the median of the ratios to KD in the same round.
"Data ms" is the time for which a step waits for its images; one process per core augments them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from grid import random_images
from safetensors.torch import save_file

from pld_ray.config.parts import Model
from pld_ray.config.trial import Trial
from pld_ray.data.images import Images
from pld_ray.distill.loop import train
from pld_ray.models.factory import create_model
from pld_ray.store.store import Store

BATCH = 64


def step(
    loss: str, logits: str, rate: float, weights: Path, images: Images, store: Store
) -> dict[str, Any]:
    """Train a trial of two epochs, and return the milliseconds of a step of the second one.

    Args:
        loss: The name of the loss.
        logits: How the teacher's logits are stored, or "live".
        rate: The learning rate. Trials with different rates share their banks.
        weights: The teacher's weights.
        images: The images.
        store: The store of the trial and its banks.
    """
    settings = {
        "data": {"name": "parquet:random", "pad": 4, "flip": True},
        "student": {"name": "resnet20"},
        "teacher": {"name": "resnet56", "weights": str(weights)},
        "teacher_logits": logits,
        "loss": loss,
        "optimizer": {"name": "sgd", "lr": rate, "momentum": 0.9},
        "batch_size": BATCH,
        "epochs": 2,
    }
    trial = Trial.model_validate(settings)
    train(trial, images, store, lambda metrics: None)
    epoch = store.epochs(trial.id)[-1]
    waited = epoch["data_seconds"] / (len(images.train) / BATCH)
    return {
        "loss": loss,
        "logits": logits,
        "step_ms": 1e3 * BATCH / epoch["images_per_second"],
        "data_ms": 1e3 * waited,
    }


def measure(rounds: int, count: int) -> pd.DataFrame:
    """Time all trials.

    Args:
        rounds: How often each trial is timed.
        count: Number of training images.

    Returns:
        One row per loss and kind of logits: median milliseconds of a step and of what it waits for
        images, and the median ratio to KD.
    """
    images, rows = random_images(count), []
    with tempfile.TemporaryDirectory() as folder:
        weights, store = Path(folder, "teacher.safetensors"), Store(folder)
        save_file(create_model(Model(name="resnet56"), *images.shape).state_dict(), weights)
        for number in range(-1, rounds):  # the first round fills the banks
            for logits in ("float16", "live"):
                found = [
                    step(loss, logits, 0.01 + 1e-6 * number, weights, images, store)
                    for loss in ("kd", "mlkd")
                ]
                for row in found if number >= 0 else ():
                    rows.append(row | {"ratio": row["step_ms"] / found[0]["step_ms"]})
    return pd.DataFrame(rows).groupby(["logits", "loss"]).median().reset_index()


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description="Time of a step with two views of each image.")
    parser.add_argument("--rounds", type=int, default=5, help="how often each trial is timed")
    parser.add_argument("--images", type=int, default=2048, help="number of training images")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| Logits | Loss | Step ms | Data ms | To KD |")
    print("| ------ | ---- | ------: | ------: | ----: |")
    for row in measure(arguments.rounds, arguments.images).to_dict("records"):
        times = f"{row['step_ms']:.0f} | {row['data_ms']:.1f} | {row['ratio']:.2f}"
        print(f"| {row['logits']} | {row['loss']} | {times} |")


if __name__ == "__main__":
    main()
