"""Figures of what a grid varies: lines, heat maps and dots, chosen by the parameters themselves.

    records -> parameters (parameters.py): settings that vary within a loss, numbers or categories
            -> ablation: the figures that show them
               no number: dots by category; one: a line for each loss; two: a heat map for each
               loss; more: a heat map of the two most important, and the effect of each parameter
            -> chosen: one figure with axes that the user names

A page has at most PANELS panels and COLOURS lines a panel. Every value is a mean: first over the
settings that the figure does not show, for each seed, and then over the seeds. Bands and error bars
are 95 % intervals of that mean over the seeds (`statistics.paired`); with two seeds there are none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from analysis.figures.parameters import (
    PAIR,
    PREFIX,
    Parameter,
    importance,
    parameter,
    parameters,
    prepared,
    texts,
)
from analysis.figures.style import COLOURS, PAGE, PALETTE, STYLE, Picture, escaped
from analysis.statistics import paired
from pld_ray.config.search_space import METRICS as DIRECTIONS
from pld_ray.errors import InputError, nearest
from pld_ray.losses import REGISTRY

PANELS = 12  # on a page
LINES = 12  # in a panel: as many as there are colours that can be told apart
WRITTEN = 64  # cells of a heat map that are also written as numbers


@matplotlib.rc_context(STYLE)
def ablation(records: pd.DataFrame) -> tuple[dict[str, Picture], list[str]]:
    """Draw what the grid varies.

    Args:
        records: Records as returned by `records.frames.frame`.

    Returns:
        The figures by name, none if nothing varies within a loss; and what they leave out, in
        sentences.
    """
    records, unfinished = _finished(records, "top1")
    varied = parameters(records)
    number = [each for each in varied if each.scale is not None]
    category = [each for each in varied if each.scale is None]
    if not varied:
        return {}, []
    records, told = _fewer_losses(records)
    told = [*unfinished, *told]
    if len(number) > 2 or (number and len(category) > 1):
        ranked = sorted(number, key=lambda each: -importance(records, each))
        drawn = {"ablation-effects": effects(records, varied)}
        if len(ranked) > 1:
            drawn |= _pages(heat_maps(records, ranked[0], ranked[1]))
        return drawn, told
    if not number and len(category) > 1:
        return {"ablation-effects": effects(records, category)}, told
    if len(number) == 2:
        return _pages(heat_maps(records, number[0], number[1], category)), told
    x, facet = (number[0], category) if number else (category[0], [])
    return _pages(by_facet(records, x, facet)), told


def _finished(records: pd.DataFrame, metric: str) -> tuple[pd.DataFrame, list[str]]:
    """Return the trials with a value of the metric, prepared, and a sentence if some have none."""
    done = records[records["finished"] & records[metric].notna()]
    if len(done) == len(records):
        return prepared(done), []
    said = (
        f"{len(records) - len(done)} of {len(records)} trials have no {metric} yet: figures of "
        "settings compare means over different settings or seeds until all have finished"
    )
    return prepared(done), [said]


def _pages(pictures: Iterable[Picture]) -> dict[str, Picture]:
    pages = list(pictures)
    return {f"ablation-{n}" if len(pages) > 1 else "ablation": p for n, p in enumerate(pages, 1)}


def _fewer_losses(records: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Leave out the losses for which there is no colour: those with the lowest best mean."""
    best = records.groupby(["loss", "method", "setting"])["top1"].mean().groupby("loss").max()
    if len(best) <= LINES:
        return records, []
    kept = best.sort_values(ascending=False).index[:LINES]
    said = f"the figures of parameters show the best {LINES} of {len(best)} losses"
    return records[records["loss"].isin(kept)], [said]


def by_facet(
    records: pd.DataFrame,
    x: Parameter,
    facet: Sequence[Parameter] = (),
    by: str = "loss",
    metric: str = "top1",
    title: str = "",
) -> list[Picture]:
    """Draw a metric by one parameter, one panel for each pair of networks and value of `facet`.

    Args:
        records: Records of finished trials.
        x: The parameter on the x-axis: lines for numbers, dots for categories.
        facet: Parameters of which each combination has a panel of its own.
        by: The column with one line, or one group of dots, for each value.
        metric: The column on the y-axis.
        title: Title of the legend.
    """
    keys = [*PAIR, *(each.column for each in facet)]
    panels = list(_groups(records, keys))
    colours = loss_colours(records[by].unique(), by)
    several = len(records[PAIR].drop_duplicates()) > 1
    pictures = []
    for page in range(0, len(panels), PANELS):
        shown = panels[page : page + PANELS]
        columns = min(len(shown), 3)
        rows = -(-len(shown) // columns)
        picture = Picture(figsize=(1.6 + 3.1 * columns, 0.6 + 2.5 * rows))
        axes = picture.subplots(rows, columns, squeeze=False, sharey=_sharing(shown, metric))
        for axis in axes.flat[len(shown) :]:
            axis.remove()
        for axis, (key, panel) in zip(axes.flat, shown, strict=False):
            draw_panel(axis, panel, x, by, colours, metric)
            axis.set_title(_panel_title(key, facet, several))
        for row in axes:
            row[0].set_ylabel(_metric(metric))
        _legend(picture, axes, colours, by, title)
        pictures.append(picture)
    return pictures


def _sharing(panels: list[tuple[Any, pd.DataFrame]], metric: str) -> bool:
    """Return whether panels are similar enough for one y-axis: none would use under a third."""
    spans = [panel[metric].max() - panel[metric].min() for _, panel in panels]
    whole = max(p[metric].max() for _, p in panels) - min(p[metric].min() for _, p in panels)
    return bool(whole <= 3 * max(spans, default=0.0))


def draw_panel(
    axis: Axes, panel: pd.DataFrame, x: Parameter, by: str, colours: dict[Any, str], metric: str
) -> None:
    """Draw lines (numbers) or grouped dots (categories); a line without x is horizontal.

    Args:
        axis: The axes to draw on.
        panel: Records of finished trials.
        x: The parameter on the x-axis.
        by: The column with one line for each value.
        colours: The colour of each value of `by`.
        metric: The column on the y-axis.
    """
    lines = list(panel.groupby(by, sort=False))
    for place, (name, rows) in enumerate(lines):
        colour = colours[name]
        known = rows[rows[x.column].notna()]
        if known.empty:
            mean, low, high = estimate(rows, metric)
            axis.axhline(mean, color=colour, lw=1.4, ls="--")
            if not math.isnan(low):
                axis.axhspan(low, high, color=colour, alpha=0.1, lw=0)
            continue
        at = [value for value in x.values if (known[x.column] == value).any()]
        cells = [known[known[x.column] == value] for value in at]
        means, lows, highs = np.array([estimate(cell, metric) for cell in cells]).T
        places = np.array([x.at(value) for value in at])
        if x.scale is not None:
            axis.plot(places, means, color=colour, lw=1.4, marker="o", ms=3.5)
            if not np.isnan(lows).all():
                axis.fill_between(places, lows, highs, color=colour, alpha=0.13, lw=0)
            continue
        offset = (place - (len(lines) - 1) / 2) * 0.7 / len(lines)
        for value, cell in zip(places, cells, strict=True):
            seeds = cell.groupby("seed")[metric].mean()
            axis.plot(np.full(len(seeds), value + offset), seeds, "o", ms=3, mfc="none", mec=colour)
        errors = np.nan_to_num(np.abs(np.array([lows, highs]) - means))
        axis.errorbar(places + offset, means, errors, fmt="_", ms=10, mew=2, lw=1.4, color=colour)
    x.dress(axis)
    if x.scale is None:
        axis.set_xlim(-0.6, len(x.values) - 0.4)
        axis.grid(axis="x", visible=False)


def estimate(rows: pd.DataFrame, metric: str) -> tuple[float, float, float]:
    """Return the mean over seeds and its 95 % interval; a seed is its mean over settings."""
    seeds = rows.groupby("seed")[metric].mean().to_numpy(dtype=float)
    low, high = paired.interval(seeds)
    return float(seeds.mean()), low, high


def heat_maps(
    records: pd.DataFrame, one: Parameter, two: Parameter, facet: Sequence[Parameter] = ()
) -> list[Picture]:
    """Draw top-1 by two parameters as a heat map for each loss, pair and value of `facet`.

    The best setting of each map has a frame. All maps, on all pages, have the same colours.

    Args:
        records: Records of finished trials.
        one: The parameter on the x-axis.
        two: The parameter on the y-axis.
        facet: Parameters of which each combination has maps of its own.
    """
    keys = ["loss", *PAIR, *(each.column for each in facet)]
    panels = [(key, _grid(panel, one, two)) for key, panel in _groups(records, keys)]
    several = len(records[PAIR].drop_duplicates()) > 1
    low = min(float(np.nanmin(grid.to_numpy())) for _, grid in panels)
    high = max(float(np.nanmax(grid.to_numpy())) for _, grid in panels)
    colours = Normalize(low, high) if low < high else Normalize(low - 1, high + 1)
    pictures = []
    for page in range(0, len(panels), PANELS):
        shown = panels[page : page + PANELS]
        width = 1.1 + 0.42 * max(4, len(one.values))
        columns = min(len(shown), max(1, int(PAGE // width)))
        rows = -(-len(shown) // columns)
        height = 1.2 + 0.3 * max(4, len(two.values))
        picture = Picture(figsize=(0.9 + width * columns, height * rows), layout="constrained")
        axes = picture.subplots(rows, columns, squeeze=False)
        for axis in axes.flat[len(shown) :]:
            axis.remove()
        for axis, (key, grid) in zip(axes.flat, shown, strict=False):
            _draw_map(axis, grid, colours)
            axis.set_xlabel(one.name)
            axis.set_ylabel(two.name)
            title = _panel_title(key[1:], facet, several)
            axis.set_title("\n".join(part for part in (REGISTRY[key[0]].label, title) if part))
        scale = ScalarMappable(colours, "viridis")
        bar = picture.colorbar(scale, ax=picture.axes, shrink=0.8, pad=0.02)
        bar.set_label("top-1 (%), mean; frame: best")
        pictures.append(picture)
    return pictures


def _grid(panel: pd.DataFrame, one: Parameter, two: Parameter) -> pd.DataFrame:
    """Return the mean top-1 by two parameters: a row for each value of `two`, as text."""
    places, labels = [], []
    for each in (two, one):
        absent = len(each.values)  # the place of trials whose loss lacks the parameter
        at = panel[each.column].map(dict(zip(each.values, range(absent), strict=True)))
        places.append(at.fillna(absent).astype(int))
        there = [*range(absent)] if at.notna().any() else [absent]
        named = [*texts(each.values), "without"]
        labels.append((there, [named[place] for place in there]))
    grid = panel.groupby(places)["top1"].mean().unstack()
    (rows, row_names), (columns, column_names) = labels
    grid = grid.reindex(index=rows, columns=columns)
    return grid.set_axis(row_names, axis="index").set_axis(column_names, axis="columns")


def _draw_map(axis: Axes, grid: pd.DataFrame, colours: Normalize) -> None:
    """Draw one heat map, with its numbers if they fit, and a frame around the best cell."""
    values = grid.to_numpy(dtype=float)
    axis.imshow(values, cmap="viridis", norm=colours, aspect="auto")
    axis.set_xticks(range(len(grid.columns)), grid.columns, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(range(len(grid.index)), grid.index, fontsize=8)
    axis.grid(visible=False)
    if values.size <= WRITTEN:
        for (y, x), value in np.ndenumerate(values):
            if not math.isnan(value):
                ink = "white" if colours(value) < 0.5 else "black"
                axis.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=6.5, color=ink)
    if not np.isnan(values).all():
        y, x = np.unravel_index(np.nanargmax(values), values.shape)
        frame: Any = {"fill": False, "ec": "#D55E00", "lw": 2, "clip_on": False}
        axis.add_patch(Rectangle((float(x) - 0.5, float(y) - 0.5), 1, 1, **frame))


def effects(records: pd.DataFrame, varied: Sequence[Parameter], metric: str = "top1") -> Picture:
    """Draw the effect of each parameter by itself: the mean over all other settings.

    The most important parameters come first; those that do not fit on the page are left out.
    """
    shares = {each: importance(records, each, metric) for each in varied}
    ranked = sorted(varied, key=lambda each: -shares[each])[:PANELS]
    columns = min(len(ranked), 3)
    rows = -(-len(ranked) // columns)
    picture = Picture(figsize=(1.6 + 3.1 * columns, 0.6 + 2.5 * rows))
    axes = picture.subplots(rows, columns, squeeze=False, sharey=True)
    colours = loss_colours(records["loss"].unique(), "loss")
    for axis in axes.flat[len(ranked) :]:
        axis.remove()
    for axis, each in zip(axes.flat, ranked, strict=False):
        draw_panel(axis, records, each, "loss", colours, metric)
        axis.set_title(f"explains {shares[each]:.0%} of the variance")
    for row in axes:
        row[0].set_ylabel(_metric(metric))
    _legend(picture, axes, colours, "loss")
    return picture


@matplotlib.rc_context(STYLE)
def chosen(
    records: pd.DataFrame, x: str, by: str = "loss", facet: str = "", metric: str = "top1"
) -> tuple[dict[str, Picture], list[str]]:
    """Draw a metric by fields of the user's choice.

    Args:
        records: Records as returned by `records.frames.frame`.
        x: The field on the x-axis: a setting that varies, such as "optimizer.lr", or student,
            teacher, loss, method or setting.
        by: The field with one line for each value.
        facet: The field with one panel for each value; "" for the pairs of networks.
        metric: The metric on the y-axis.

    Returns:
        The figures by name, and what they leave out.

    Raises:
        InputError: A field does not vary, or the metric is not known.
    """
    kinds = {str(name): records[name].dtype.kind for name in records}
    settings = ("seed", "epochs")
    metrics = [n for n, kind in kinds.items() if kind in "if" and n not in settings]
    metrics = [name for name in metrics if not name.startswith(PREFIX)]
    if metric not in metrics:
        raise InputError(f"--y is {metric!r}: expected a metric; {nearest(metric, metrics)}")
    columns = [field_column(records, field) for field in (x, by, *([facet] if facet else []))]
    records, told = _finished(records, metric)
    if records.empty:
        raise InputError(f"--y is {metric!r}: no trial has a value of it")
    line = "loss" if columns[1] == "loss" else "_by"
    values = {"_x": columns[0], line: columns[1], "_facet": columns[-1]}
    records = records.assign(**{new: records[old] for new, old in values.items()})
    for new in (line, "_facet"):  # of losses that lack the parameter
        records[new] = records[new].where(records[new].notna(), "without")
    if {*columns} & {*PAIR}:  # a panel for each pair would tear them apart
        records = records.assign(student="", teacher="")
    if (count := records[line].nunique()) > LINES:
        down = DIRECTIONS.get(metric, "min" if metric == "seconds" else "max") == "max"
        best = records.groupby(line)[metric].mean().sort_values(ascending=not down).index[:LINES]
        told.append(f"the figure shows the best {LINES} of {count} values of {by} by {metric}")
        records = records[records[line].isin(best)]
    number = replace(parameter(records, "_x"), label=x.removeprefix("loss."))
    panels = [Parameter("_facet", (), None, facet)] if facet else []
    title = "" if line == "loss" else by
    pictures = by_facet(records, number, panels, line, metric, title)
    name = f"{x}-by-{by}" + (f"-per-{facet}" if facet else "")
    name = re.sub("[^A-Za-z0-9_-]+", "-", name if metric == "top1" else f"{metric}-{name}")
    several = len(pictures) > 1
    return {f"{name}-{n}" if several else name: p for n, p in enumerate(pictures, 1)}, told


def field_column(records: pd.DataFrame, field: str) -> str:
    """Return the column of a field in the records.

    Raises:
        InputError: The field is not known or does not vary.
    """
    named = {"loss.name": "loss", "student.name": "student", "teacher.name": "teacher"}
    columns = {str(name).removeprefix(PREFIX): str(name) for name in records}
    columns = {k: v for k, v in columns.items() if v.startswith(PREFIX)}
    columns |= {name: name for name in ("student", "teacher", "setting", "method", "loss", "seed")}
    columns |= named
    if field not in columns:
        known = ", ".join(name for name in columns if name not in named)
        raise InputError(f"{field!r} does not vary in these trials: expected one of {known}")
    return columns[field]


def _groups(records: pd.DataFrame, keys: list[str]) -> Iterable[tuple[Any, pd.DataFrame]]:
    """Return the groups of prepared records, in the order of the grid."""
    return records.groupby(keys, sort=False, dropna=False)


def _panel_title(key: Any, facet: Sequence[Parameter], several: bool) -> str:
    """Return the title of a panel: the pair, if there are several, and the values of the facet."""
    student, teacher, *values = key
    pair = f"{teacher} → {student}" if teacher else student
    said = [
        REGISTRY[v].label
        if each.label in ("loss", "loss.name") and v in REGISTRY
        else texts([v])[0]
        if each.label in (*PAIR, "method", "setting")
        else f"{each.name} {texts([v])[0]}"
        for each, v in zip(facet, values, strict=True)
    ]
    return "\n".join([*([escaped(pair)] if several and pair else []), *said])


def _metric(metric: str) -> str:
    names = {"top1": "validation top-1 (%)", "top5": "validation top-5 (%)"}
    return escaped(names.get(metric, metric))


def loss_colours(names: Iterable[Any], by: str) -> dict[Any, str]:
    """Return a colour for each value: losses keep the colour that they have in all figures."""
    names = list(names)
    own = {name: COLOURS[name] for name in names if by == "loss" and name in COLOURS}
    spare = [colour for colour in PALETTE if colour not in own.values()]
    others = [name for name in names if name not in own]
    return own | {name: spare[i % len(spare)] for i, name in enumerate(others)}


def _legend(picture: Picture, axes: Any, colours: dict[Any, str], by: str, title: str = "") -> None:
    """Add the legend at the right of the page, and say what dashed lines are."""
    names = [REGISTRY[name].label for name in colours] if by == "loss" else texts(colours)
    label = dict(zip(colours, names, strict=True))
    handles: list[Artist] = [
        Line2D([], [], color=colour, lw=1.4, marker="o", ms=3.5, label=label[name])
        for name, colour in colours.items()
    ]
    if any(line.get_linestyle() == "--" for axis in picture.axes for line in axis.lines):
        handles.append(Line2D([], [], color="#333333", lw=1.4, ls="--", label="without it"))
    if any(axis.collections for axis in picture.axes):
        handles.append(Patch(color="#333333", alpha=0.13, lw=0, label="95 % interval"))
    if len(handles) > 1:
        where: Any = {"loc": "upper left", "bbox_to_anchor": (1.02, 1), "title": title or None}
        axes[0][-1].legend(handles=handles, **where)
    picture.tight_layout()
