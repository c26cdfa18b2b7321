"""What each loss costs: forward + backward time and peak memory, as ratios to KD.

    .venv/bin/python benchmarks/losses.py              # two minutes on 2 cores; CUDA too, if there
    .venv/bin/python benchmarks/losses.py --rounds 5   # a quick look

Every loss is timed in turn, round by round in a new order, and divided by KD's time in the same
round; the table shows the median of these ratios. Writes losses.csv and losses.png to --out. Two
straightforward forms of PLD stand beside the library's: a loop over the batch, and autograd
through logcumsumexp.
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
BLOCK = 0.02  # seconds a loss is run for at a time, at least once
Inputs = tuple[Tensor, Tensor, Tensor]


def loop(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """PLD as the formula reads, sample by sample."""
    total = torch.zeros((), device=student.device)
    for s, t, y in zip(student, teacher, labels, strict=True):
        order = t.argsort(descending=True)
        ranking = torch.cat([y[None], order[order != y]])
        alpha, ranked = F.softmax(t, 0)[ranking], s[ranking]
        tails = ranked.flip(0).logcumsumexp(0).flip(0)
        total = total + (alpha * (tails - ranked)).sum()
    return total / len(student)


def logcumsumexp(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """PLD over the batch at once, its gradient left to autograd."""
    first = teacher.scatter(1, labels[:, None], float("inf"))
    ranking = first.argsort(dim=1, descending=True)
    alpha, ranked = F.softmax(teacher, 1).gather(1, ranking), student.gather(1, ranking)
    tails = ranked.flip(1).logcumsumexp(1).flip(1)
    return (alpha * (tails - ranked)).sum(1).mean()


def inputs(batch: int, classes: int, device: str) -> Inputs:
    """Student, teacher [B, C], labels [B]; the teacher's probabilities fall as rank^-3."""
    generator = torch.Generator().manual_seed(classes)
    student = 3 * torch.randn(batch, classes, generator=generator)
    rank = 1 + torch.rand(batch, classes, generator=generator).argsort(1)
    teacher = torch.randn(batch, classes, generator=generator) - 3 * rank.log()
    labels = torch.randint(classes, (batch,), generator=generator)
    return student.to(device), teacher.to(device), labels.to(device)


def methods(given: Inputs) -> dict[str, Callable[[], None]]:
    """Name -> one forward and backward pass."""
    student, teacher, labels = given

    def step(loss: Callable[..., Tensor], scale: float = 1.0, **more: Tensor) -> Callable[[], None]:
        scaled = (scale * student).requires_grad_()  # a leaf of its own

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


def seconds(run: Callable[[], None], device: str) -> float:
    """Mean seconds of a call, over as many as take BLOCK seconds."""
    calls, elapsed = 0, 0.0
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    while elapsed < BLOCK:
        run()
        calls += 1
        if device == "cuda":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - started
    return elapsed / calls


def peak_mib(run: Callable[[], None], device: str) -> float:
    """The most memory that a call holds beyond what was held before it, in MiB; Linux or CUDA."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if sys.platform != "linux":
        return float("nan")
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, and counts again when it is used
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(batch: int, classes: int, device: str, rounds: int) -> pd.DataFrame:
    """One row a loss: milliseconds, ratio to KD, peak MiB."""
    runs = methods(inputs(batch, classes, device))
    for run in runs.values():
        run()
    peaks = {name: peak_mib(run, device) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in random.sample(list(runs), len(runs)):
            times[name].append(seconds(runs[name], device))
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
    """Two tables a device: time as ratios to KD, and peak memory."""
    for device, part in results.groupby("device"):
        for value, title in (
            ("ratio_to_kd", "forward + backward, as a multiple of KD's"),
            ("peak_mib", "peak memory in MiB, the gradient with it"),
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
    """Three digits; nothing for what was not measured, or is too small to be."""
    return "" if not x >= 0.05 else f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:.0f}"


def draw(results: pd.DataFrame, path: Path) -> None:
    """The ratios to KD over the number of classes."""
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
            axis.set_ylabel("time, as a multiple of KD's")
            axis.set_title(f"One forward and backward pass of the loss ({device})")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside center right")
        save(figure, path)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=25, help="times each loss has its turn")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    console, parts = Console(), []
    for device in devices:
        for batch, classes in SIZES:
            with console.status(f"{device}: {batch} x {classes}"):
                parts.append(measure(batch, classes, device, arguments.rounds))
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
