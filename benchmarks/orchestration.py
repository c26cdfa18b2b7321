"""Measure the overhead of running a trial, and the time to plan a large grid.

    .venv/bin/python benchmarks/orchestration.py    # two minutes on 2 cores

The script runs 20 tiny students (ResNet-8, 200 digits, CE and PLD in turn) one after another on one
CPU, each alone: with 1 epoch, and with 60 epochs as in the demo. The own time of a trial is the
time for training and validation in its record. The overhead is the rest of the time between the end
of the first trial and the end of the last, divided by 19: Ray, creation of the network and
optimizer, checkpoints, reports and records. Then the script times `pld-ray plan` for a grid of
10,000 trials.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pld_ray.config.experiment import load_experiment
from pld_ray.config.planning import plan
from pld_ray.store.store import Store
from pld_ray.sweep import checks, runner
from pld_ray.sweep.progress import ProgressView, redirect_prints

import ray  # isort: skip  # after pld_ray.sweep, which sets Ray's environment variables

LARGE = """
base: {data: {name: digits, pad: 1}, student: resnet8, teacher: resnet20, epochs: 60}
grid:
  loss: [{name: kd, temperature: [1, 2, 3, 4, 5]}, {name: pld, temperature: [1, 2, 3, 4, 5]}]
  optimizer.lr: [1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3, 7e-3, 8e-3, 9e-3, 1e-2]
  optimizer.weight_decay: [0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09]
seeds: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
"""


class Watch(ProgressView):
    """A progress view that records when trials end."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.ends: dict[str, float] = {}

    def end(self, trial_id: str, failure: str | None, note: str | None = None) -> None:
        """Record the time, then do the same as `ProgressView.end`."""
        self.ends[trial_id] = time.perf_counter()
        super().end(trial_id, failure, note)


def overhead(epochs: int, folder: Path) -> tuple[float, float]:
    """Measure the overhead of tiny trials.

    Args:
        epochs: Epochs of each trial.
        folder: Folder for the store.

    Returns:
        The mean own time and the mean overhead of a trial, in seconds.
    """
    sets = (
        "grid.loss=[ce,pld]",
        f"seeds={list(range(10))}",
        f"epochs={epochs}",
        "resources.gang=1",
    )
    made = plan(load_experiment("demo", (*sets, "teacher.train.epochs=1")))
    store = Store(folder / str(epochs))
    pending = made.trials
    images = checks.check_trials(pending).images
    view = Watch(made, pending, Console(quiet=True))
    runner.run(made, images, store, view)
    students = [key for key in view.ends if key not in made.teacher_ids]
    own = {key: store.record(key)["seconds"]["seconds"] for key in students}  # type: ignore[index]
    ends = sorted((view.ends[key], key) for key in students)
    span = ends[-1][0] - ends[0][0]
    between = [own[key] for _, key in ends[1:]]
    return mean(between), (span - sum(between)) / len(between)


def planning(folder: Path) -> float:
    """Return the wall seconds of `pld-ray plan` for 10,000 trials."""
    file = folder / "large.yaml"
    file.write_text(LARGE)
    command = [sys.executable, "-m", "pld_ray.cli", "plan", str(file), "--storage", str(folder)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "10000 cells" in done.stdout
    return time.perf_counter() - started


def main() -> None:
    """Measure the overhead and the planning time, and print them."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    ).parse_args()
    table = Table(box=box.MARKDOWN)
    for head in ("20 tiny trials with", "own seconds", "overhead, seconds"):
        table.add_column(head, justify="right")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with redirect_prints(folder / "ray.log"):
            ray.init(num_cpus=1, log_to_driver=False)
            for epochs in (1, 60):
                own, beside = overhead(epochs, folder)
                table.add_row(f"{epochs} epochs", f"{own:.2f}", f"{beside:.2f}")
            ray.shutdown()
        seconds = planning(folder)
    console = Console()
    console.print(table)
    console.print(f"pld-ray plan for 10,000 trials: {seconds:.1f} s")


if __name__ == "__main__":
    main()
