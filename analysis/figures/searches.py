"""Figures of a search: its history, the drawn values beside their scores, and what matters.

    the drawn trials (`tables.best.drawn`) -> history, parallel, importance

Each cell of the grid is a panel, at most `PANELS` of them.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from typing import Any

import matplotlib
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from analysis.figures.style import STYLE, Picture
from pld_ray.config.search_space import Range

PANELS = 12
FEWEST = 8  # finished trials from which an importance says something
PLACE = ["student", "teacher", "setting", "method"]


@matplotlib.rc_context(STYLE)
def draw(
    drawn: pd.DataFrame, space: Mapping[str, Range], metric: str, better: str
) -> tuple[dict[str, Picture], list[str]]:
    """Draw the figures of a search.

    Args:
        drawn: Its trials, as returned by `tables.best.drawn`.
        space: The range of each searched field.
        metric: The metric of the search.
        better: "max" or "min".

    Returns:
        The figures by name, and what is left out, in sentences.
    """
    scored = drawn[drawn["score"].notna()]
    if scored.empty:
        return {}, []
    cells = list(scored.groupby(PLACE, sort=False))
    told = []
    if len(cells) > PANELS:
        told.append(f"the figures of the search show {PANELS} of its {len(cells)} cells")
        cells = cells[:PANELS]
    pictures = {"search-history": history(cells, metric, better)}
    fields = [field for field in space if scored[field].notna().any()]
    pictures["search-parallel"] = parallel(cells, {f: space[f] for f in fields}, metric)
    if importlib.util.find_spec("optuna") is None:
        told.append("the importance of each field needs pip install 'pld-ray[optuna]'")
        return pictures, told
    found = [(key, importances(cell, space)) for key, cell in cells]
    if known := [(key, shares) for key, shares in found if shares]:
        pictures["search-importance"] = importance(known)
    else:
        told.append(
            f"the importance of each field needs {FEWEST} finished trials and two fields in a cell"
        )
    return pictures, told


def history(cells: list[tuple[Any, pd.DataFrame]], metric: str, better: str) -> Picture:
    """Draw the score of each trial in the order in which they were drawn, and the best so far.

    Args:
        cells: The place and the trials of each cell.
        metric: The metric of the search.
        better: "max" or "min".
    """
    picture, axes = _panels(len(cells), 2.2)
    for axis, (key, cell) in zip(axes, cells, strict=False):
        done = cell[cell["state"] == "done"]
        others = cell[cell["state"] != "done"]
        axis.plot(done["number"], done["score"], "o", ms=3.5, color="#0072B2", label="finished")
        axis.plot(others["number"], others["score"], "x", ms=3.5, color="#999999", label="stopped")
        best = done["score"].cummax() if better == "max" else done["score"].cummin()
        axis.step(done["number"], best, where="post", color="#D55E00", lw=1.4, label="best so far")
        axis.set_title(_title(key))
        axis.set_xlabel("trial of the search")
        axis.set_ylabel(metric)
    axes[0].legend(fontsize=7.5)
    picture.tight_layout()
    return picture


def parallel(
    cells: list[tuple[Any, pd.DataFrame]], space: Mapping[str, Range], metric: str
) -> Picture:
    """Draw parallel coordinates: a line for each trial through its values, coloured by its score.

    Trials that did not finish are grey: their score is that of another epoch.

    Args:
        cells: The place and the trials of each cell.
        space: The range of each searched field.
        metric: The metric of the search.
    """
    picture, axes = _panels(len(cells), 2.6, min(2, len(cells)))
    for axis, (key, cell) in zip(axes, cells, strict=False):
        fields = [field for field in space if cell[field].notna().any()]
        done = cell[cell["state"] == "done"]
        for _, row in cell[cell["state"] != "done"].iterrows():
            places = [_place(space[field], row[field]) for field in fields]
            axis.plot(range(len(fields)), places, color="#cccccc", lw=0.6)
        norm = Normalize(done["score"].min(), done["score"].max()) if len(done) else Normalize(0, 1)
        for _, row in done.sort_values("score").iterrows():
            places = [_place(space[field], row[field]) for field in fields]
            axis.plot(range(len(fields)), places, color=colormaps["viridis"](norm(row["score"])))
        for at, field in enumerate(fields):
            axis.axvline(at, color="#333333", lw=0.8)
            low, high = _ends(space[field])
            for text, y, side in ((low, 0, "top"), (high, 1, "bottom")):
                axis.text(at, y + (0.02 if y else -0.02), text, ha="center", va=side, fontsize=7)
        axis.set_xticks(range(len(fields)), fields, rotation=20, ha="right", fontsize=8)
        axis.tick_params(axis="x", pad=10)
        axis.set_yticks([])
        axis.set_ylim(-0.02, 1.02)
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        axis.set_title(_title(key), pad=14)
        if len(done):
            bar = picture.colorbar(ScalarMappable(norm, "viridis"), ax=axis, pad=0.02)
            bar.set_label(metric)
    picture.tight_layout()
    return picture


def importances(cell: pd.DataFrame, space: Mapping[str, Range]) -> dict[str, float]:
    """Return the importance of each searched field of a cell: fANOVA (Hutter et al. 2014).

    Args:
        cell: The trials of the cell.
        space: The range of each searched field.

    Returns:
        The share of the variance of the score that a field explains; they add up to 1. It is empty
        with fewer than `FEWEST` finished trials, with one field, or if all scores are equal.
    """
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    done = cell[cell["state"] == "done"]
    fields = [field for field in space if done[field].notna().all()]
    if len(done) < FEWEST or len(fields) < 2 or done["score"].nunique() < 2:
        return {}
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        kinds = {field: _distribution(space[field]) for field in fields}
        study = optuna.create_study()
        for _, row in done.iterrows():
            params = {f: _choice(space[f], row[f]) for f in fields}
            study.add_trial(
                optuna.trial.create_trial(
                    params=params, distributions=kinds, value=float(row["score"])
                )
            )
        return dict(
            get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0), params=fields)
        )
    finally:
        optuna.logging.set_verbosity(level)


def importance(found: list[tuple[Any, dict[str, float]]]) -> Picture:
    """Draw the importance of each field as bars, a panel for each cell.

    Args:
        found: The place of each cell, and the result of `importances`.
    """
    most = max(len(shares) for _, shares in found)
    picture, axes = _panels(len(found), 0.9 + 0.26 * most)
    for axis, (key, shares) in zip(axes, found, strict=False):
        ranked = sorted(shares.items(), key=lambda item: item[1])
        axis.barh(
            [name for name, _ in ranked], [share for _, share in ranked], 0.6, color="#0072B2"
        )
        axis.set_xlim(0, 1)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("share of the variance (fANOVA)")
        axis.set_title(_title(key))
    picture.tight_layout()
    return picture


def _panels(count: int, height: float, columns: int = 0) -> tuple[Picture, list[Axes]]:
    """Return a page with a panel for each cell."""
    columns = columns or min(count, 3)
    rows = -(-count // columns)
    picture = Picture(figsize=(11.0 / 3 * max(columns, 1.5), height * rows + 0.3))
    axes = picture.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axis in axes[count:]:
        axis.remove()
    return picture, axes[:count]


def _title(key: Any) -> str:
    student, teacher, setting, method = key
    pair = f"{teacher} → {student}" if teacher else student
    return "\n".join(part for part in (f"{method}, {pair}", setting) if part)


def _place(values: Range, value: Any) -> float:
    """Return where a value lies between the ends of its range, from 0 to 1."""
    if values.choice is not None:
        return values.choice.index(_choice(values, value)) / max(1, len(values.choice) - 1)
    low, high = values.bounds if values.integer is None else values.integer
    if values.loguniform:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return float((value - low) / (high - low))


def _choice(values: Range, value: Any) -> Any:
    """Return a drawn value as the range has it: a table may turn 1 into 1.0."""
    if values.choice is not None:
        return next((each for each in values.choice if each == value), value)
    return int(value) if values.integer else float(value)


def _ends(values: Range) -> tuple[str, str]:
    """Return the lowest and the highest value of a range, as text."""
    if values.choice is not None:
        return str(values.choice[0]), str(values.choice[-1])
    low, high = values.bounds if values.integer is None else values.integer
    return f"{low:g}", f"{high:g}"


def _distribution(values: Range) -> Any:
    """Return Optuna's distribution of a range."""
    from optuna import distributions

    if values.choice is not None:
        return distributions.CategoricalDistribution(values.choice)
    if values.integer:
        return distributions.IntDistribution(*values.integer)
    low, high = values.bounds
    return distributions.FloatDistribution(low, high, log=values.loguniform is not None)
