"""Figures of an experiment: accuracy by method, learning curves. One style for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
# Okabe and Ito: told apart by the colour-blind, and in grey
PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442", "#000000"]
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
    width = 1.4 + max(0.75, 0.1 * longest) * methods * len(sections)  # inches
    figure, axes = plt.subplots(1, len(sections), figsize=(width, 3.2), squeeze=False)
    for axis, (key, section) in zip(axes[0], sections, strict=True):
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
            high = max(high, level)
        room = max(high - low, 0.5)
        axis.set_ylim(max(0, low - 0.35 * room), high + 0.18 * room)
        axis.set_xticks(x, [_wrap(name) for name in means.index])
        axis.tick_params(axis="x", length=0)
        axis.grid(axis="x", visible=False)
        axis.set_title(_title(key))
    axes[0][0].set_ylabel("validation top-1 (%)\naxis does not start at 0")
    figure.tight_layout()
    return figure


def learning_curves(curves: pd.DataFrame, colours: dict[str, str]) -> Figure:
    """Validation top-1 and training loss by epoch: mean over seeds, band of one std."""
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
                if metric == "top1":
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
    spare = [colour for colour in PALETTE if colour not in COLOURS.values()] + PALETTE
    found: dict[str, str] = {}
    for method, loss in records[["method", "loss"]].drop_duplicates().values.tolist():
        own = COLOURS.get(loss)
        taken = own is None or own in found.values()
        found[method] = spare[len(found) % len(spare)] if taken or own is None else own
    return found


def _title(key: Any) -> str:
    student, teacher, setting = key
    pair = f"{teacher} → {student}" if teacher else student
    return f"{pair}\n{setting}" if setting else pair


def _wrap(label: str) -> str:
    return label.replace(" (", "\n(").replace(", ", ",\n")
