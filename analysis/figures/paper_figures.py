"""The figures of the paper. Our results have filled markers, reported results hollow ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures.style import COLOURS, STYLE, Picture, save
from analysis.tables import paper_entries, paper_tables
from analysis.tables.paper_entries import Entry
from analysis.tables.reported import network
from pld_ray.losses import REGISTRY

MILLIONS = {  # million parameters of the networks in Figure 2, with 1000 classes
    "resnet50": 25.56,
    "resnet152": 60.19,
    "mobilenetv4_conv_small": 3.77,
    "mobilenetv4_conv_medium": 9.72,
    "mobilenetv4_conv_large": 32.59,
    "mobilenetv4_hybrid_medium": 11.07,
    "vit_small_patch16_224": 22.05,
    "vit_base_patch16_224": 86.57,
    "vit_large_patch16_224": 304.33,
}
METHODS = ("kd", "dist", "pld")


def draw_paper(records: pd.DataFrame, experiment: str, miniature: bool, folder: Path) -> list[Path]:
    """Write the figures that an experiment regenerates, as PNG and PDF.

    Without finished trials, the figures show the reported numbers alone. In a miniature, they show
    our numbers alone, because these are not comparable with the reported ones.

    Args:
        records: Records as returned by `records.frames.frame`.
        experiment: Name of the experiment.
        miniature: Whether the experiment is a miniature.
        folder: Where to write; it is created if needed.

    Returns:
        The paths of the PNG files; empty if there is nothing to draw.
    """
    drawn = {
        "ce_weight": ("figure-1a", ce_weight),
        "longer_training": ("figure-1b", longer_training),
        "homogeneous_pairs": ("figure-2a", lambda points: sizes(points, of_teacher=False)),
        "heterogeneous_teachers": ("figure-2b", lambda points: sizes(points, of_teacher=True)),
    }
    paths = []
    for table in paper_tables.of_experiment(experiment):
        name, make = drawn.get(table.experiment, ("", None))
        if make is None:
            continue
        points = [
            e for e in paper_entries.of_table(table, records) if e.metric == "top1" and e.trial
        ]
        if miniature:
            points = [replace(e, reported=float("nan")) for e in points if e.scores]
        if not points:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE):
            paths.append(save(make(points), folder / name))
    return paths


def ce_weight(points: list[Entry]) -> Figure:
    """Draw Figure 1a: top-1 by weight of cross-entropy in KD and DIST; PLD is a horizontal line."""
    figure = Picture(figsize=(4.6, 3.2))
    axis = figure.subplots()
    for loss in ("kd", "dist"):
        line = [e for e in points if e.loss == loss and _weights_sum_to_one(e)]
        line.sort(key=_ce_weight)
        _line(axis, [_ce_weight(e) for e in line], line, loss)
    for entry in (e for e in points if e.loss == "pld"):
        for value, style in ((entry.mean, "-"), (entry.reported, "--")):
            if not np.isnan(value):
                axis.axhline(value, color=COLOURS["pld"], lw=1.4, ls=style)
    axis.set_xlabel("weight of cross-entropy")
    return _finish(figure, [axis], points)


def longer_training(points: list[Entry]) -> Figure:
    """Draw Figure 1b: bars of KD, DIST and PLD by number of epochs."""
    figure = Picture(figsize=(4.6, 3.2))
    axis = figure.subplots()
    shown = [e for e in points if e.loss in METHODS]
    places = list(dict.fromkeys(e.place for e in shown))
    both = any(e.scores for e in shown) and any(not np.isnan(e.reported) for e in shown)
    width = 0.8 / (len(METHODS) * (2 if both else 1))
    values = []
    for entry in shown:
        x = places.index(entry.place) - 0.4 + 0.8 * METHODS.index(entry.loss) / len(METHODS)
        colour, at = COLOURS[entry.loss], x + width / 2
        if entry.scores:
            axis.bar(at, entry.mean, width * 0.9, color=colour, yerr=_spread(entry), capsize=2)
            at += width
        if not np.isnan(entry.reported):
            axis.bar(at, entry.reported, width * 0.9, fc="none", ec=colour, lw=1.3)
        values += [entry.mean, entry.reported]
    low, high = np.nanmin(values), np.nanmax(values)
    room = max(high - low, 0.5)
    axis.set_ylim(max(0, low - 0.4 * room), high + 0.15 * room)
    axis.set_xticks(range(len(places)), places)
    axis.grid(axis="x", visible=False)
    axis.tick_params(axis="x", length=0)
    return _finish(figure, [axis], points, "\naxis does not start at 0")


def sizes(points: list[Entry], of_teacher: bool) -> Figure:
    """Draw Figure 2a or 2b: top-1 by number of parameters of a network.

    Args:
        points: The cells of the table.
        of_teacher: Whether the x-axis is the size of the teacher (2b) or of the student (2a).
    """
    figure = Picture(figsize=(5.2, 3.4))
    axis = figure.subplots()
    named: dict[float, str] = {}
    for loss in METHODS:
        line = [e for e in points if e.loss == loss and _network(e, of_teacher) in MILLIONS]
        line.sort(key=lambda e: MILLIONS[_network(e, of_teacher)])
        x = [MILLIONS[_network(e, of_teacher)] for e in line]
        named |= {size: _network(e, of_teacher) for size, e in zip(x, line, strict=True)}
        _line(axis, x, line, loss)
    axis.set_xscale("log")
    axis.set_xticks(list(named), [f"{size:.0f}" for size in named])
    axis.minorticks_off()
    for size, name in named.items():
        short = name.replace("mobilenetv4_", "mnv4 ").replace("_patch16_224", "").replace("_", " ")
        axis.annotate(
            short, (size, 1), xycoords=axis.get_xaxis_transform(), xytext=(-2, 2),
            textcoords="offset points", rotation=40, fontsize=7.5, color="#555555", va="bottom",
        )  # fmt: skip
    axis.set_xlabel(f"parameters of the {'teacher' if of_teacher else 'student'} (millions)")
    return _finish(figure, [axis], points)


def _network(entry: Entry, of_teacher: bool) -> str:
    """Return the paper's name of the teacher or of the student."""
    assert entry.trial is not None
    return entry.teacher if of_teacher else network(entry.trial.student.name)


def _ce_weight(entry: Entry) -> float:
    """Return the weight of cross-entropy in the loss."""
    assert entry.trial is not None
    return entry.trial.loss.model_dump()["ce_weight"]


def _weights_sum_to_one(entry: Entry) -> bool:
    """Whether the loss is KD, or its weights sum to one."""
    assert entry.trial is not None
    loss = entry.trial.loss.model_dump()
    return loss["name"] == "kd" or abs(loss["ce_weight"] + loss["beta"] + loss["gamma"] - 1) < 1e-6


def _spread(entry: Entry) -> float | None:
    """Return the standard deviation, or None if there is none."""
    return None if np.isnan(entry.std) else entry.std


def _line(axis: Axes, x: list[float], line: list[Entry], loss: str) -> None:
    """Draw our numbers as a solid line with filled markers, reported ones dashed and hollow."""
    colour, mark = COLOURS[loss], {"kd": "s", "dist": "^", "pld": "o"}[loss]
    ours = [e.mean for e in line]
    if not np.isnan(ours).all():
        spread = np.nan_to_num([e.std for e in line])
        axis.errorbar(x, ours, spread, color=colour, marker=mark, ms=5, lw=1.4, capsize=2)
    known = [e.reported for e in line]
    if not np.isnan(known).all():
        axis.plot(x, known, color=colour, marker=mark, ms=5, mfc="white", lw=1, ls="--")


def _finish(figure: Figure, axes: list[Axes], points: list[Entry], more: str = "") -> Figure:
    """Add the y-label and the legend: colours for methods, filling for ours and reported."""
    marks = {"kd": "s", "dist": "^", "pld": "o"}
    handles = [
        Line2D([], [], color=COLOURS[loss], marker=marks[loss], ms=5, label=REGISTRY[loss].label)
        for loss in METHODS
    ]
    if any(e.scores for e in points):
        handles.append(Line2D([], [], color="#333333", marker="o", ms=5, label="ours"))
    if any(not np.isnan(e.reported) for e in points):
        handles.append(
            Line2D(
                [], [], color="#333333", marker="o", ms=5, mfc="white", ls="--", label="reported"
            )
        )
    axes[0].set_ylabel(f"top-1 (%){more}")
    axes[0].legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure
