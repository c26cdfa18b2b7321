"""Measure the commands that read results, on a grid of ten thousand finished trials.

    .venv/bin/python benchmarks/results.py         # five minutes on 2 cores
    .venv/bin/python benchmarks/results.py --s3    # the same with the trials on an S3 server (moto)

The script writes the trials of a grid as a run would leave them, with made-up scores: 2 losses with
10 temperatures and CE, 5 learning rates, 4 weight decays and 24 seeds, 10 epochs each. Then it
times each command twice: without the index of the store, and with it. The time is that of the whole
process, with the imports; `plan`, which reads no results, is shown beside it.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from pld_ray.config.experiment import load_experiment
from pld_ray.config.planning import plan
from pld_ray.config.trial import Trial
from pld_ray.store.store import Store

TEMPERATURES = [0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12]
GRID: dict[str, Any] = {
    "title": "Ten thousand trials",
    "base": {"data": "digits", "student": "resnet8", "teacher": "resnet20", "epochs": 10},
    "grid": {
        "loss": [
            "ce",
            {"name": "kd", "temperature": TEMPERATURES},
            {"name": "pld", "temperature": TEMPERATURES},
        ],
        "optimizer.lr": [0.0003, 0.001, 0.003, 0.01, 0.03],
        "optimizer.weight_decay": [0.0, 0.001, 0.01, 0.1],
    },
    "seeds": list(range(24)),
}
COMMANDS = ("plan", "status", "tables", "export", "figures")
ENVIRONMENT = {"device": "cpu", "cores": 2, "threads": 1, "host": "node-1", "python": "3.12.3"}


def finish(trial: Trial, store: Store) -> None:
    """Write what a finished trial leaves, with scores that depend on its settings and its seed."""
    dice = random.Random(trial.id)
    temperature = float(getattr(trial.loss, "temperature", 4.0))
    best = {"ce": -1.0, "kd": 0.0, "pld": 0.6}.get(trial.loss.name, 0.0)
    top1 = 90 + best - math.log2(temperature / 2) ** 2 / 4
    top1 -= 1.5 * math.log10(trial.optimizer.lr / 0.003) ** 2
    top1 += random.Random(trial.seed).gauss(0, 0.5) + dice.gauss(0, 0.5)
    history = []
    for epoch in range(1, trial.epochs + 1):
        score = top1 - 30 * math.exp(-epoch / 2) + dice.gauss(0, 0.2) * (epoch < trial.epochs)
        history.append(
            {
                "epoch": epoch, "top1": score, "top5": 99.0, "val_loss": 3 / epoch, "ece": 0.03,
                "agreement": score - 1, "kl_teacher_student": 1 / epoch, "teacher_top1": 97.0,
                "train_loss": 2 / epoch * dice.uniform(0.9, 1.1), "lr": trial.optimizer.lr,
                "seconds": 1.1, "images_per_second": 1300.0, "teacher_images": 0,
            }
        )  # fmt: skip
    left_out = ("epoch", "seconds", "teacher_images")
    metrics = {name: value for name, value in history[-1].items() if name not in left_out}
    record = {
        "id": trial.id, "metrics": metrics, "seconds": {"seconds": 11.0, "teacher_seconds": 1.0},
        "parameters": 78042, "notes": [], "environment": ENVIRONMENT,
        "finished": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    store.start(trial)
    store.log(trial, history)
    store.finish(trial, record, {"w": torch.zeros(1)})


@contextmanager
def storage(s3: bool, folder: Path) -> Iterator[str]:
    """Provide a place for the trials: a folder, or a bucket of an S3 server in this process."""
    if not s3:
        yield str(folder / "results")
        return
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it prints a line for each request
    server = ThreadedMotoServer(port=0)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    os.environ |= {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "a"}
    os.environ |= {"AWS_SECRET_ACCESS_KEY": "a", "AWS_DEFAULT_REGION": "us-east-1"}
    boto3.client("s3").create_bucket(Bucket="trials")
    yield "s3://trials/results"
    server.stop()


def seconds(command: str, experiment: Path, place: str, folder: Path) -> float:
    """Return the wall time of a command in a process of its own."""
    arguments = ["pld_ray.cli", command]
    if command != "export":
        arguments += [str(experiment)]
    if command in ("tables", "figures"):
        arguments += ["--out", str(folder / "out")]
    if command == "export":
        arguments += ["--to", str(folder / "trials.csv")]
    arguments += ["--storage", place]
    before = time.perf_counter()
    subprocess.run([sys.executable, "-m", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - before


def measure(experiment: Path, place: str, folder: Path) -> Table:
    """Time each command without the index of the store, and then with it."""
    table = Table(box=box.SIMPLE)
    for head in ("command", "no index (s)", "with index (s)"):
        table.add_column(head, justify="left" if head == "command" else "right")
    for command in COMMANDS:
        Store(place).files.delete_folder("index")
        first = seconds(command, experiment, place, folder)
        again = min(seconds(command, experiment, place, folder) for _ in range(2))
        table.add_row(command, f"{first:.1f}", f"{again:.1f}")
    return table


def main() -> None:
    """Write the trials, time the commands and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--s3", action="store_true", help="keep the trials on an S3 server")
    parser.add_argument("--seeds", type=int, default=24, help="seeds of each setting")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        experiment = folder / "large.yaml"
        experiment.write_text(yaml.safe_dump(GRID | {"seeds": list(range(arguments.seeds))}))
        with storage(arguments.s3, folder) as place:
            trials, store = plan(load_experiment(experiment)).trials, Store(place)
            with ThreadPoolExecutor(8 if arguments.s3 else 1) as pool:
                list(pool.map(lambda trial: finish(trial, store), trials.values()))
            table = measure(experiment, place, folder)
        Console().print(f"{len(trials):,} finished trials in {place}", table)


if __name__ == "__main__":
    main()
