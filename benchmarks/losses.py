"""Measure the cost of each loss: time of forward and backward pass relative to KD, and peak memory.

    .venv/bin/python benchmarks/losses.py              # two minutes on 2 cores; also CUDA, if any
    .venv/bin/python benchmarks/losses.py --rounds 5   # quick run

In each round, every loss is timed once, in a new random order, and its time is divided by the time
of KD in the same round. The table shows the median of these ratios. The script writes losses.csv
and losses.png to --out. For comparison, it also times two simple implementations of PLD: a loop
over the batch, and autograd through logcumsumexp.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from analysis.figures.style import STYLE, save
from pld_ray import losses

SIZES = [(128, 10), (128, 100), (256, 1000), (64, 21841), (16, 100000)]
BLOCK = 0.02  # seconds for which a loss is repeated in one measurement
Inputs = tuple[Tensor, Tensor, Tensor]


def loop(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Compute PLD directly from its formula, sample by sample.

    Args:
        student: Student logits [B, C].
        teacher: Teacher logits [B, C].
        labels: Labels [B].

    Returns:
        The mean loss over the batch, a scalar.
    """
    total = torch.zeros((), device=student.device)
    for s, t, y in zip(student, teacher, labels, strict=True):
        order = t.argsort(descending=True)
        ranking = torch.cat([y[None], order[order != y]])
        alpha, ranked = F.softmax(t, 0)[ranking], s[ranking]
        tails = ranked.flip(0).logcumsumexp(0).flip(0)
        total = total + (alpha * (tails - ranked)).sum()
    return total / len(student)


def logcumsumexp(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Compute PLD for the whole batch at once, with the gradient from autograd.

    Args:
        student: Student logits [B, C].
        teacher: Teacher logits [B, C].
        labels: Labels [B].

    Returns:
        The mean loss over the batch, a scalar.
    """
    first = teacher.scatter(1, labels[:, None], float("inf"))
    ranking = first.argsort(dim=1, descending=True)
    alpha, ranked = F.softmax(teacher, 1).gather(1, ranking), student.gather(1, ranking)
    tails = ranked.flip(1).logcumsumexp(1).flip(1)
    return (alpha * (tails - ranked)).sum(1).mean()


def inputs(batch: int, classes: int, device: str) -> Inputs:
    """Return random inputs of a loss; the teacher's probabilities fall as rank^-3.

    Args:
        batch: Batch size B.
        classes: Number of classes C.
        device: "cpu" or "cuda".

    Returns:
        Student logits [B, C], teacher logits [B, C] and labels [B].
    """
    generator = torch.Generator().manual_seed(classes)
    student = 3 * torch.randn(batch, classes, generator=generator)
    rank = 1 + torch.rand(batch, classes, generator=generator).argsort(1)
    teacher = torch.randn(batch, classes, generator=generator) - 3 * rank.log()
    # each twice: some losses take two views of an image
    labels = torch.randint(classes, (batch // 2,), generator=generator).repeat(2)
    return student.to(device), teacher.to(device), labels.to(device)


def methods(given: Inputs) -> dict[str, Callable[[], None]]:
    """Return the losses to time: name -> function that runs one forward and backward pass."""
    student, teacher, labels = given

    def step(loss: Callable[..., Tensor], scale: float = 1.0, **more: Tensor) -> Callable[[], None]:
        scaled = (scale * student).requires_grad_()  # a leaf tensor, so that it has a gradient

        def run() -> None:
            scaled.grad = None
            loss(scaled, teacher, labels, **more).backward()

        return run

    def ours(name: str, **params: Any) -> losses.DistillationLoss:
        return losses.create_loss(losses.REGISTRY[name](name=name, **params), ignore_index=None)

    found = {
        params.label: step(ours(name))
        for name, params in losses.REGISTRY.items()
        if name != "pld" and not params.needs_features
    }
    found["PLD"] = step(ours("pld"))
    found["PLD, order given"] = step(ours("pld"), order=losses.teacher_order(teacher, labels))
    if student.shape[1] > 256:
        found["PLD, top_k: 64"] = step(ours("pld", top_k=64))
        found["PLD, top_k: auto"] = step(ours("pld", top_k="auto"))
    found["PLD, logits to 300"] = step(ours("pld"), scale=10)
    found["PLD, logits to 30,000"] = step(ours("pld"), scale=1000)
    found["PLD by logcumsumexp"] = step(logcumsumexp)
    found["PLD by a loop"] = step(loop)
    return found


def seconds(
    run: Callable[[], None], device: str, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the mean seconds per call, over calls that take BLOCK seconds in total."""
    calls, elapsed = 0, 0.0
    if device == "cuda":
        torch.cuda.synchronize()
    started = clock()
    while elapsed < BLOCK:
        run()
        calls += 1
        if device == "cuda":
            torch.cuda.synchronize()
        elapsed = clock() - started
    return elapsed / calls


def peak_mib(run: Callable[[], None], device: str) -> float:
    """Return the peak of the additional memory during a call, in MiB.

    The value is NaN on a CPU without Linux.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if sys.platform != "linux":
        return float("nan")
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory, so that its reuse is counted
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak (VmHWM)
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """Return a field of /proc/self/status, in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(
    batch: int,
    classes: int,
    device: str,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> pd.DataFrame:
    """Measure all losses at one size.

    Args:
        batch: Batch size.
        classes: Number of classes.
        device: "cpu" or "cuda".
        rounds: How often each loss is timed.
        clock: Returns the seconds since some time.

    Returns:
        One row per loss: median milliseconds, median and quartiles of the ratio to KD, peak MiB.
    """
    gc.freeze()  # what is there stays: the collections below need not look at it
    runs = methods(inputs(batch, classes, device))
    for run in runs.values():
        run()
    peaks = {name: peak_mib(run, device) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in random.sample(list(runs), len(runs)):
            times[name].append(seconds(runs[name], device, clock))
    frame = pd.DataFrame(times)
    ratios = frame.div(frame["KD"], axis=0)
    columns = {
        "milliseconds": frame.median() * 1e3,
        "ratio_to_kd": ratios.median(),
        "ratio_low": ratios.quantile(0.25),
        "ratio_high": ratios.quantile(0.75),
        "peak_mib": pd.Series(peaks),
    }
    rows = pd.DataFrame(columns).rename_axis("loss").reset_index()
    return rows.assign(device=device, batch=batch, classes=classes)


def show(results: pd.DataFrame, console: Console) -> None:
    """Print two tables per device: time relative to KD, and peak memory."""
    for device, part in results.groupby("device"):
        for value, title in (
            ("ratio_to_kd", "time of forward + backward pass, relative to KD"),
            ("peak_mib", "peak memory in MiB, including the gradient"),
        ):
            table = Table("batch x classes", title=f"{device}: {title}", box=box.SIMPLE)
            wide = part.pivot(index="loss", columns=["batch", "classes"], values=value)
            for batch, classes in wide.columns:
                table.add_column(f"{batch}x{classes}", justify="right")
            for loss in part["loss"].unique():
                cells = [cell(x) for x in wide.loc[loss]]
                table.add_row(loss, *cells)
            if value == "ratio_to_kd":
                times = part[part["loss"] == "KD"]["milliseconds"]
                table.add_section()
                table.add_row("KD in milliseconds", *(cell(x) for x in times))
            console.print(table)


def cell(x: float) -> str:
    """Format a number with three digits; values below 0.05 and NaN give an empty cell."""
    return "" if not x >= 0.05 else f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:.0f}"


def draw(results: pd.DataFrame, path: Path) -> None:
    """Plot the ratios to KD over the number of classes.

    Args:
        results: The rows of `measure`.
        path: Path of the figure without suffix.
    """
    drawn = {
        "PLD by a loop": "#999999",
        "PLD by logcumsumexp": "#666666",
        "DIST": "#009E73",
        "PLD": "#D55E00",
        "PLD, order given": "#E69F00",
        "PLD, top_k: 64": "#CC79A7",
        "CE": "#0072B2",
    }
    devices = results["device"].unique()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1,
            len(devices),
            figsize=(5 * len(devices) + 2.2, 4),
            squeeze=False,
            layout="constrained",
        )
        for axis, device in zip(axes[0], devices, strict=True):
            part = results[results["device"] == device]
            for loss, colour in drawn.items():
                line = part[part["loss"] == loss]
                spread = [
                    line["ratio_to_kd"] - line["ratio_low"],
                    line["ratio_high"] - line["ratio_to_kd"],
                ]
                axis.errorbar(
                    line["classes"],
                    line["ratio_to_kd"],
                    yerr=spread,
                    color=colour,
                    marker="o",
                    ms=4,
                    label=loss,
                )
            axis.axhline(1, color="black", lw=1, ls=":")
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.set_xlabel("classes")
            axis.set_ylabel("time relative to KD")
            axis.set_title(f"One forward and backward pass of the loss ({device})")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside center right")
        save(figure, path)


def main() -> None:
    """Measure all sizes on all devices, and print, write and plot the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=25, help="how often each loss is timed")
    parser.add_argument(
        "--out", type=Path, default=Path("results/benchmarks"), help="output folder"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure the CPU time of one thread, on a machine that does other work",
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    if arguments.cpu_time:
        torch.set_num_threads(1)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    console, parts = Console(), []
    for device in devices:
        for batch, classes in SIZES:
            with console.status(f"{device}: {batch} x {classes}"):
                parts.append(measure(batch, classes, device, arguments.rounds, clock))
    results = pd.concat(parts)
    show(results, console)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results.round(4).to_csv(arguments.out / "losses.csv", index=False)
    draw(results, arguments.out / "losses")
    console.print(
        f"written: {arguments.out}/losses.csv, losses.png; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
