"""Figures of an experiment: accuracy by method, learning curves, and those of the paper.

One style for all. In the paper's figures ours are filled and what is reported is hollow.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis import paper
from analysis.paper import Entry
from analysis.reported import network
from pld_ray.losses import REGISTRY

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.dpi": 110,
    "savefig.dpi": 200,
    "savefig.bbox": "tight",
    "savefig.facecolor": "white",  # readable on a dark page too
    "pdf.fonttype": 42,
}
PAGE = 11.0  # inches that sections side by side may take
# Okabe and Ito: told apart by the colour-blind, and in grey
PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442", "#000000"]
PALETTE += ["#332288", "#882255", "#999933", "#44AA99", "#AA4499"]  # Tol's muted ones
COLOURS = {"pld": "#D55E00", "ce": "#7f7f7f", "kd": "#0072B2", "dist": "#009E73", "dkd": "#CC79A7"}


def draw(records: pd.DataFrame, curves: pd.DataFrame, folder: Path) -> list[Path]:
    """Write accuracy and curves, each as PNG and PDF; returns the PNGs' paths.

    Nothing is drawn of trials that have not finished; without any, no figure is written.
    """
    finished = records[records["finished"]]
    if finished.empty:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    colours = _colours(records)
    with plt.rc_context(STYLE):
        paths = [save(accuracy(finished, colours), folder / "accuracy")]
        paths.append(save(learning_curves(curves, colours), folder / "curves"))
    return paths


def save(figure: Figure, path: Path) -> Path:
    """Write PATH.png and PATH.pdf, close the figure, return the former."""
    for kind in ("pdf", "png"):
        # no date inside, so that the same numbers give the same bytes
        figure.savefig(
            path.with_suffix(f".{kind}"), metadata={"CreationDate": None} if kind == "pdf" else None
        )
    plt.close(figure)
    return path.with_suffix(".png")


def accuracy(records: pd.DataFrame, colours: dict[str, str]) -> Figure:
    """Bars of mean top-1 with one std, every seed as a dot, the teacher as a line."""
    sections = list(records.groupby(["student", "teacher", "setting"], sort=False))
    methods = max(section["method"].nunique() for _, section in sections)
    longest = max(len(line) for name in records["method"] for line in _wrap(name).split("\n"))
    titles = [_title(key) for key, _ in sections]
    widest = max(len(line) for title in titles for line in title.split("\n"))
    width = 0.6 + max(max(0.75, 0.1 * longest) * methods, 0.075 * widest)  # inches, of a section
    columns = min(len(sections), max(1, int(PAGE // width)))
    rows = -(-len(sections) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(0.8 + width * columns, 3.2 * rows), squeeze=False
    )
    for axis in axes.flat[len(sections) :]:
        axis.remove()
    for axis, title, (_, section) in zip(axes.flat, titles, sections, strict=False):
        groups = section.groupby("method", sort=False)["top1"]
        means, spreads = groups.mean(), groups.std()  # NaN for one seed: no error bar
        x = np.arange(len(means))
        bars = [colours[name] for name in means.index]
        axis.bar(x, means, 0.62, yerr=spreads, color=bars, ecolor="#333333", capsize=3, alpha=0.85)
        for i, (_, values) in enumerate(groups):
            offsets = np.linspace(-0.14, 0.14, len(values)) if len(values) > 1 else [0]
            axis.plot(
                i + np.asarray(offsets), values, "o", ms=3, mfc="white", mec="#333333", mew=0.7
            )
        low = float(min((means - spreads.fillna(0)).min(), section["top1"].min()))
        high = float(max((means + spreads.fillna(0)).max(), section["top1"].max()))
        if "teacher_top1" in section and section["teacher_top1"].notna().any():
            level = float(section["teacher_top1"].mean())
            axis.axhline(level, color="#333333", lw=1, ls="--")
            where = axis.get_yaxis_transform()  # x in the axes' own width, y in percent
            label = {"ha": "right", "va": "bottom", "fontsize": 8, "color": "#333333"}
            axis.text(0.99, level, f"teacher {level:.1f}", transform=where, **label)
            low, high = min(low, level), max(high, level)
        room = max(high - low, 0.5)
        axis.set_ylim(max(0, low - 0.35 * room), high + 0.18 * room)
        axis.set_xticks(x, [_wrap(name) for name in means.index])
        axis.tick_params(axis="x", length=0)
        axis.grid(axis="x", visible=False)
        axis.set_title(title)
    for row in axes:
        cut = "\naxis does not start at 0" if any(axis.get_ylim()[0] > 0 for axis in row) else ""
        row[0].set_ylabel(f"validation top-1 (%){cut}")
    figure.tight_layout()
    return figure


def learning_curves(curves: pd.DataFrame, colours: dict[str, str]) -> Figure:
    """Top-1 and training loss by epoch: mean over seeds, and a band of one std for few methods."""
    sections = list(curves.groupby(["student", "teacher", "setting"], sort=False))
    figure, axes = plt.subplots(
        len(sections), 2, figsize=(7.6, 0.4 + 2.7 * len(sections)), squeeze=False
    )
    for row, (key, section) in zip(axes, sections, strict=True):
        for axis, metric in zip(row, ("top1", "train_loss"), strict=True):
            for method, lines in section.groupby("method", sort=False):
                by_epoch = lines.groupby("epoch")[metric]
                mean, std = by_epoch.mean(), by_epoch.std().fillna(0)
                colour = colours[str(method)]
                axis.plot(mean.index, mean, color=colour, lw=1.4, label=method)
                if metric == "top1" and section["method"].nunique() <= 6:
                    axis.fill_between(
                        mean.index, mean - std, mean + std, color=colour, alpha=0.13, lw=0
                    )
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        row[0].set_ylabel("validation top-1 (%)")
        row[0].set_title(_title(key), loc="left")
        row[1].set_ylabel("training loss (each its own)")
        row[1].set_yscale("log")
        row[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure


def _colours(records: pd.DataFrame) -> dict[str, str]:
    """A colour a method: the loss's own, or the next of the palette for its namesakes."""
    methods = records[["method", "loss"]].drop_duplicates().values.tolist()
    found: dict[str, str] = {}
    for method, loss in methods:
        own = COLOURS.get(loss)
        if own is not None and own not in found.values():
            found[method] = own
    spare = [colour for colour in PALETTE if colour not in found.values()] or PALETTE
    others = [method for method, _ in methods if method not in found]
    return found | {method: spare[i % len(spare)] for i, method in enumerate(others)}


def _title(key: Any) -> str:
    student, teacher, setting = key
    pair = f"{teacher} → {student}" if teacher else student
    return f"{pair}\n{setting}" if setting else pair


def _wrap(label: str) -> str:
    return label.replace(" (", "\n(").replace(", ", ",\n")


# ---------------------------------------------------------------- the paper's

MILLIONS = {  # parameters of the networks of Figure 2, with 1000 classes
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
    """Write the figures that an experiment regenerates, PNG and PDF; returns the PNGs' paths.

    Without records they show what is reported. In a miniature, which compares with nothing that is
    reported, they show ours alone.
    """
    drawn = {
        "ce_weight": ("figure-1a", ce_weight),
        "longer_training": ("figure-1b", longer_training),
        "homogeneous_pairs": ("figure-2a", lambda points: sizes(points, of_teacher=False)),
        "heterogeneous_teachers": ("figure-2b", lambda points: sizes(points, of_teacher=True)),
    }
    paths = []
    for table in paper.of_experiment(experiment):
        name, make = drawn.get(table.experiment, ("", None))
        if make is None:
            continue
        points = [e for e in paper.entries(table, records) if e.metric == "top1" and e.trial]
        if miniature:
            points = [replace(e, reported=float("nan")) for e in points if e.scores]
        if not points:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with plt.rc_context(STYLE):
            paths.append(save(make(points), folder / name))
    return paths


def ce_weight(points: list[Entry]) -> Figure:
    """Figure 1a: top-1 against the weight of cross-entropy in KD and DIST; PLD as a level line."""
    figure, axis = plt.subplots(figsize=(4.6, 3.2))
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
    """Figure 1b: bars of KD, DIST and PLD by the number of epochs."""
    figure, axis = plt.subplots(figsize=(4.6, 3.2))
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
    """Figures 2a and 2b: top-1 against the size of the student, or of its teacher."""
    figure, axis = plt.subplots(figsize=(5.2, 3.4))
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
    assert entry.trial is not None
    return entry.teacher if of_teacher else network(entry.trial.student.name)


def _ce_weight(entry: Entry) -> float:
    assert entry.trial is not None
    return entry.trial.loss.model_dump()["ce_weight"]


def _weights_sum_to_one(entry: Entry) -> bool:
    assert entry.trial is not None
    loss = entry.trial.loss.model_dump()
    return loss["name"] == "kd" or abs(loss["ce_weight"] + loss["beta"] + loss["gamma"] - 1) < 1e-6


def _spread(entry: Entry) -> float | None:
    return None if np.isnan(entry.std) else entry.std


def _line(axis: Axes, x: list[float], line: list[Entry], loss: str) -> None:
    """Ours filled on a whole line, reported hollow on a broken one."""
    colour, mark = COLOURS[loss], {"kd": "s", "dist": "^", "pld": "o"}[loss]
    ours = [e.mean for e in line]
    if not np.isnan(ours).all():
        spread = np.nan_to_num([e.std for e in line])
        axis.errorbar(x, ours, spread, color=colour, marker=mark, ms=5, lw=1.4, capsize=2)
    known = [e.reported for e in line]
    if not np.isnan(known).all():
        axis.plot(x, known, color=colour, marker=mark, ms=5, mfc="white", lw=1, ls="--")


def _finish(figure: Figure, axes: list[Axes], points: list[Entry], more: str = "") -> Figure:
    """A legend of methods by colour, and of ours and reported by filling."""
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
