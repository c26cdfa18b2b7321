"""Figures of an experiment: accuracy by method, gains of the reference, and learning curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from analysis.figures.style import PAGE, STYLE, Picture, escaped, method_colours, save_all
from analysis.tables import comparison

MANY = 24  # settings, above which figures show the best ones
MOST_REPORTED = 6  # methods without a bar in one section of a figure


def draw(
    records: pd.DataFrame,
    curves: pd.DataFrame,
    folder: Path,
    reported: pd.DataFrame | None = None,
) -> list[Path]:
    """Write the figures of an experiment, each as PNG and PDF.

    These are "accuracy" and "curves", "gains" if there is a method to compare with, "terms" if the
    losses of some have two terms, and "ranks" and "profiles" of three methods or more. If no trial
    has finished, nothing is written.

    Args:
        records: Records as returned by `records.frames.frame`.
        curves: Epochs of the trials of `best_settings(records)`, as returned by
            `records.frames.curves`.
        folder: Where to write; it is created if needed.
        reported: Results from elsewhere, as returned by `records.imported.beside`.

    Returns:
        The paths of the PNG files.
    """
    finished = records[records["finished"]]
    if finished.empty:
        return []
    shown = best_settings(records)
    colours = method_colours(shown)
    with matplotlib.rc_context(STYLE):
        pictures = {"accuracy": accuracy(shown[shown["finished"]], colours, reported)}
        if len(compared := shown_gains(records)):
            pictures["gains"] = gains(compared, method_colours(records))
        if len(curves):  # else the files of epochs are lost
            pictures["curves"] = learning_curves(curves, colours)
        if "loss_ce" in curves:
            pictures["terms"] = term_curves(curves, colours)
        if len(ranking := comparison.ranking(shown)):
            pictures["ranks"] = ranks(ranking, colours)
            pictures["profiles"] = profiles(shown[shown["finished"]], colours)
        return save_all(pictures, folder)


def best_settings(records: pd.DataFrame) -> pd.DataFrame:
    """Return the records of the best setting of each loss and pair, if there are many settings.

    With up to `MANY` settings, all records are returned as they are. The method of the others is
    named with its setting, because all losses of a pair stand in one section.
    """
    keys = ["student", "teacher", "loss", "setting", "method"]
    if len(records[keys].drop_duplicates()) <= MANY:
        return records
    means = records[records["finished"]].groupby(keys, sort=False)["top1"].mean()
    best = means.groupby(["student", "teacher", "loss"], sort=False).idxmax()
    found = records[pd.MultiIndex.from_frame(records[keys]).isin(best.tolist())]
    named = found["method"] + found["setting"].map(lambda said: said and f" ({said})")
    return found.assign(method=named, setting="the best setting of each loss")


def shown_gains(records: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `comparison.against`, of many methods only those that are best."""
    compared = comparison.against(records)
    if len(compared) <= MANY:
        return compared
    best = best_settings(records)
    methods = records.loc[records["id"].isin(best["id"]), "method"]
    return compared[compared["against"].isin(methods)]


def accuracy(
    records: pd.DataFrame, colours: dict[str, str], reported: pd.DataFrame | None = None
) -> Figure:
    """Draw the mean top-1 of each method as a bar, with one standard deviation as the error bar.

    Every seed is a dot, and the teacher is a dashed line. Results from elsewhere are hollow
    diamonds beside the bar of their method, with their standard deviation. Methods without a bar
    are drawn if a section has at most `MOST_REPORTED` of them.

    Args:
        records: Records of finished trials.
        colours: The colour of each method.
        reported: Results from elsewhere, as returned by `records.imported.beside`.
    """
    if reported is None:
        reported = pd.DataFrame(columns=["student", "teacher", "setting", "method"])
    reported = reported[reported["method"] != "Teacher"]
    sections = list(records.groupby(["student", "teacher", "setting"], sort=False))
    elsewhere = [_elsewhere(section, key, reported) for key, section in sections]
    names = [
        list(dict.fromkeys([*section["method"], *found["method"]]))
        for (_, section), found in zip(sections, elsewhere, strict=True)
    ]
    methods = max(len(shown) for shown in names)
    longest = max(
        len(line) for shown in names for name in shown for line in _wrap(name).split("\n")
    )
    titles = [_title(key) for key, _ in sections]
    widest = max(len(line) for title in titles for line in title.split("\n"))
    width = 0.6 + max(max(0.75, 0.1 * longest) * methods, 0.075 * widest)  # of a section, in inches
    columns = min(len(sections), max(1, int(PAGE // width)))
    rows = -(-len(sections) // columns)
    figure = Picture(figsize=(0.8 + width * columns, 3.2 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(sections) :]:
        axis.remove()
    for axis, title, (_, section), shown, others in zip(
        axes.flat, titles, sections, names, elsewhere, strict=False
    ):
        _draw_section(axis, section, shown, others, colours)
        axis.set_title(title)
    for row in axes:
        cut = "\naxis does not start at 0" if any(axis.get_ylim()[0] > 0 for axis in row) else ""
        marks = "\ndiamonds: reported elsewhere" if any(map(len, elsewhere)) else ""
        row[0].set_ylabel(f"validation top-1 (%){cut}{marks}")
    figure.tight_layout()
    return figure


def _draw_section(
    axis: Axes,
    section: pd.DataFrame,
    names: list[str],
    elsewhere: pd.DataFrame,
    colours: dict[str, str],
) -> None:
    """Draw the bars, dots, diamonds and the teacher's line of one pair and setting.

    Args:
        axis: The axes to draw on.
        section: Records of finished trials.
        names: The methods, from left to right: first those of the records.
        elsewhere: Results from elsewhere.
        colours: The colour of each method.
    """
    groups = section.groupby("method", sort=False)["top1"]
    means, spreads = groups.mean(), groups.std()  # a single seed has no error bar (NaN)
    x = np.arange(len(means))
    bars = [colours[name] for name in means.index]
    axis.bar(x, means, 0.62, yerr=spreads, color=bars, ecolor="#333333", capsize=3, alpha=0.85)
    for i, (_, values) in enumerate(groups):
        offsets = np.linspace(-0.14, 0.14, len(values)) if len(values) > 1 else [0]
        axis.plot(i + np.asarray(offsets), values, "o", ms=3, mfc="white", mec="#333333", mew=0.7)
    low = float(min((means - spreads.fillna(0)).min(), section["top1"].min()))
    high = float(max((means + spreads.fillna(0)).max(), section["top1"].max()))
    for row in elsewhere.to_dict("records"):
        beside_a_bar = 0.22 if row["method"] in means.index else 0
        spread = 0.0 if np.isnan(row["reported_std"]) else row["reported_std"]
        at, value = names.index(row["method"]) + beside_a_bar, row["reported"]
        mark: Any = {"fmt": "D", "ms": 5, "mfc": "white", "color": "#333333", "capsize": 2, "lw": 1}
        axis.errorbar(at, value, spread or None, **mark)
        low, high = min(low, value - spread), max(high, value + spread)
    if "teacher_top1" in section and section["teacher_top1"].notna().any():
        level = float(section["teacher_top1"].mean())
        axis.axhline(level, color="#333333", lw=1, ls="--")
        where = axis.get_yaxis_transform()  # x as a fraction of the axis width, y in percent
        label: Any = {"ha": "right", "va": "bottom", "fontsize": 8, "color": "#333333"}
        axis.text(0.99, level, f"teacher {level:.1f}", transform=where, **label)
        low, high = min(low, level), max(high, level)
    room = max(high - low, 0.5)
    axis.set_ylim(max(0, low - 0.35 * room), high + 0.18 * room)
    axis.set_xticks(range(len(names)), [_wrap(name) for name in names])
    if len(elsewhere):
        axis.set_xlim(-0.5, len(names) - 0.5)
    axis.tick_params(axis="x", length=0)
    axis.grid(axis="x", visible=False)


def _elsewhere(section: pd.DataFrame, key: Any, reported: pd.DataFrame) -> pd.DataFrame:
    """Return the results from elsewhere that are drawn in a section."""
    places = ["student", "teacher", "setting"]
    found = reported[(reported[places] == list(key)).all(axis=1)]
    own = found["method"].isin(section["method"])
    return found if found.loc[~own, "method"].nunique() <= MOST_REPORTED else found[own]


def gains(compared: pd.DataFrame, colours: dict[str, str]) -> Figure:
    """Draw the gain of the reference over each method, with its 95 % interval.

    A filled mark is a decided gain (see `statistics.paired`).

    Args:
        compared: The table of `tables.comparison.against`; not empty.
        colours: The colour of each method.
    """
    reference = str(compared["method"].iloc[0])
    longest = max(map(len, compared["against"]))
    size = (4.6 + 0.07 * longest, 0.9 + 0.32 * len(compared))
    figure = Picture(figsize=size)
    axis = figure.subplots()
    for y, row in enumerate(compared.to_dict("records")):
        colour = colours[row["against"]]
        axis.plot([row["low"], row["high"]], [y, y], color=colour, lw=1.6)  # NaN draws nothing
        face = colour if row["decided"] else "white"
        axis.plot(row["mean"], y, "o", ms=6, mfc=face, mec=colour, mew=1.4)
    axis.axvline(0, color="#333333", lw=1, ls="--")
    axis.set_yticks(range(len(compared)), compared["against"])
    axis.set_ylim(len(compared) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(f"top-1 of {reference} minus that of the method (points)\nfilled: decided")
    figure.tight_layout()
    return figure


def ranks(ranking: pd.DataFrame, colours: dict[str, str]) -> Figure:
    """Draw the critical-difference diagram of Demšar 2006: mean ranks, best at the left.

    Bars join methods that are not different; the scale of the critical difference is above them.

    Args:
        ranking: The table of `tables.comparison.ranking`; not empty.
        colours: The colour of each method.
    """
    from analysis.statistics.ranks import Ranking  # scipy.stats takes a second to import

    names, values = ranking["method"].tolist(), ranking["rank"].to_numpy()
    said = ranking.attrs
    groups = Ranking(said["blocks"], values, said["p"], said["distance"]).groups()
    half = -(-len(names) // 2)
    height = 0.55 + 0.22 * half + 0.1 * len(groups)
    margin = 0.35 + 0.075 * max(map(len, names))
    figure = Picture(figsize=(3.6 + 2 * margin, height + 0.25))
    axis = figure.add_axes((margin / (3.6 + 2 * margin), 0, 3.6 / (3.6 + 2 * margin), 1))
    axis.set_xlim(1, len(names))
    axis.set_ylim(height, -0.25)  # inches below the axis of ranks, which is at 0.3
    axis.axis("off")
    axis.plot([1, len(names)], [0.3, 0.3], color="#333333", lw=1)
    for tick in range(1, len(names) + 1):
        axis.plot([tick, tick], [0.24, 0.3], color="#333333", lw=1)
        axis.text(tick, 0.2, str(tick), ha="center", va="bottom", fontsize=8)
    width = min(said["distance"], len(names) - 1)
    axis.plot([1, 1 + width], [-0.02, -0.02], color="#333333", lw=2, solid_capstyle="butt")
    note = f"critical difference {said['distance']:.2f}"
    axis.text(1, -0.07, note, ha="left", va="bottom", fontsize=8)
    for level, (first, last) in enumerate(groups):
        y = 0.42 + 0.1 * level
        ends = [values[first] - 0.03, values[last] + 0.03]
        axis.plot(ends, [y, y], color="#333333", lw=3, solid_capstyle="butt")
    below = 0.5 + 0.1 * len(groups)
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        left = place < half
        y = below + 0.22 * (place if left else len(names) - 1 - place)
        end = 1.0 if left else float(len(names))
        line: Any = {"color": colours[name], "lw": 1.2, "clip_on": False}
        axis.plot([value, value, end], [0.3, y, y], **line)
        at: Any = {"ha": "right" if left else "left", "va": "center", "fontsize": 8.5}
        gap = -0.05 if left else 0.05
        axis.text(end + gap * len(names) / 5, y, f"{escaped(name)}  {value:.2f}", **at)
    return figure


def profiles(records: pd.DataFrame, colours: dict[str, str]) -> Figure:
    """Draw performance profiles: the share of runs whose top-1 is above each value.

    The distributions of the pairs of networks have the same weight (Agarwal et al. 2021, section
    4.2). Up to six methods have a band of one standard error.

    Args:
        records: Records of finished trials.
        colours: The colour of each method.
    """
    lines, columns = _lines(colours), _legend_columns(records)
    figure = Picture(figsize=(5.4 + 1.1 * (columns - 1), 3.2))
    axis = figure.subplots()
    sections = ["student", "teacher", "setting"]
    levels = np.unique(records["top1"].to_numpy(dtype=float))
    for method, rows in records.groupby("method", sort=False):
        scores = [group["top1"].to_numpy(dtype=float) for _, group in rows.groupby(sections)]
        shares = np.array([(score[:, None] > levels).mean(axis=0) for score in scores])
        counts = np.array([[len(score)] for score in scores])
        mean = shares.mean(axis=0)
        error = np.sqrt((shares * (1 - shares) / counts).sum(axis=0)) / len(scores)
        colour = colours[str(method)]
        line = {"label": escaped(str(method)), **lines[str(method)]}
        axis.step(levels, mean, where="post", **line)
        if records["method"].nunique() <= 6:
            band: Any = {"step": "post", "color": colour, "alpha": 0.1, "lw": 0}
            axis.fill_between(levels, mean - error, mean + error, **band)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("validation top-1 (%)")
    axis.set_ylabel("share of runs above it")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), ncols=columns)
    figure.tight_layout()
    return figure


def learning_curves(curves: pd.DataFrame, colours: dict[str, str]) -> Figure:
    """Draw top-1 and training loss by epoch, as the mean over seeds.

    Top-1 has a band of one standard deviation if there are at most six methods. Lines join the
    epochs that have a value.

    Args:
        curves: Epochs as returned by `records.frames.curves`.
        colours: The colour of each method.
    """
    labels = {
        "top1": "validation top-1 (%)",
        "train_loss": "each method's own training loss",
    }
    return _by_epoch(curves, colours, labels)


def term_curves(curves: pd.DataFrame, colours: dict[str, str]) -> Figure:
    """Draw the two terms of the training loss by epoch, for the methods that report them.

    Args:
        curves: Epochs as returned by `records.frames.curves`, with the column loss_ce.
        colours: The colour of each method.
    """
    labels = {
        "loss_ce": "training loss: cross-entropy with labels",
        "loss_kd": "training loss: distillation",
    }
    return _by_epoch(curves.dropna(subset="loss_ce"), colours, labels)


def _by_epoch(curves: pd.DataFrame, colours: dict[str, str], labels: dict[str, str]) -> Figure:
    """Draw metrics by epoch. labels: metric -> label of its axis; losses have logarithmic axes."""
    sections = list(curves.groupby(["student", "teacher", "setting"], sort=False))
    styles, columns = _lines(colours), _legend_columns(curves)
    figure = Picture(figsize=(7.6 + 1.1 * (columns - 1), 0.4 + 2.7 * len(sections)))
    axes = figure.subplots(len(sections), len(labels), squeeze=False)
    for row, (key, section) in zip(axes, sections, strict=True):
        for axis, (metric, label) in zip(row, labels.items(), strict=True):
            for method, lines in section.groupby("method", sort=False):
                by_epoch = lines.dropna(subset=metric).groupby("epoch")[metric]
                mean, std = by_epoch.mean(), by_epoch.std().fillna(0)
                point = "o" if len(mean) == 1 else ""
                line = {"marker": point, "label": escaped(str(method)), **styles[str(method)]}
                axis.plot(mean.index, mean, **line)
                if metric == "top1" and section["method"].nunique() <= 6:
                    band: Any = {"color": colours[str(method)], "alpha": 0.13, "lw": 0}
                    axis.fill_between(mean.index, mean - std, mean + std, **band)
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axis.set_ylabel(label)
            if metric != "top1":
                axis.set_yscale("log")
                for each in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                    each(_PlainNumbers(minor_thresholds=(1, 0.4)))
        row[0].set_title(_title(key), loc="left")
        row[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), ncols=columns)
    figure.tight_layout()
    return figure


def _lines(colours: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return how the line of each method looks: those of one colour have different dashes."""
    drawn: dict[str, int] = {}
    found = {}
    for method, colour in colours.items():
        number = drawn[colour] = drawn.get(colour, -1) + 1
        found[method] = {"color": colour, "lw": 1.4, "ls": ("-", "--", ":", "-.")[number % 4]}
    return found


def _legend_columns(rows: pd.DataFrame) -> int:
    """Return the number of columns of a legend of all methods beside one row of axes."""
    return -(-rows["method"].nunique() // 12)


class _PlainNumbers(LogFormatter):
    """Labels a logarithmic axis with 0.2 instead of 2e-01, at the same ticks."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:.3g}" if super().__call__(x, pos) else ""


def _title(key: Any) -> str:
    """Return the title of a section: the pair of networks, and the setting below it."""
    student, teacher, setting = key
    pair = f"{teacher} → {student}" if teacher else student
    return f"{pair}\n{setting}" if setting else pair


def _wrap(label: str) -> str:
    """Break a label into lines at its parameters; a dollar sign begins no formula."""
    return escaped(label).replace(" (", "\n(").replace(", ", ",\n")
