"""Tables of the best settings: one row per cell of a search, or per loss of a grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.records import frames
from analysis.tables import rendering
from pld_ray.config.planning import Plan
from pld_ray.sweep.search import SearchProgress

HEADS = {"top1": "Top-1 %", "top5": "Top-5 %", "agreement": "Agreement %"}


def of_search(progress: Sequence[SearchProgress], metric: str) -> list[dict[str, Any]]:
    """Return one row per cell of a search.

    Args:
        progress: The cells of one experiment.
        metric: Name of the column that holds the best score, such as "top1".

    Returns:
        One dictionary per cell: its place (student, teacher, setting, method), the best point, the
        id of its trial, its score and epoch, and the number of trials by state.
    """
    cells = tuple(each.group.cell for each in progress)
    places = frames.places(Plan(progress[0].group.experiment, cells))
    rows = []
    for place, each in zip(places.to_dict("records"), progress, strict=True):
        best = each.best
        states = [drawn.state for drawn in each.drawn]
        row = {str(name): value for name, value in place.items() if name != "seed"}
        row |= {"best": {} if best is None else best.point, "trial": best and best.trial.id}
        row |= {metric: best and best.score, "epoch": best and best.epoch}
        row |= {"trials": len(states), "to_draw": each.to_draw}
        rows.append(row | {s: states.count(s) for s in ("done", "stopped", "failed", "open")})
    return rows


def drawn(progress: Sequence[SearchProgress]) -> pd.DataFrame:
    """Return one row per drawn trial of a search.

    Args:
        progress: The cells of one experiment.

    Returns:
        The columns student, teacher, setting, method, number (from 1), state, epoch, score, and the
        drawn value of each searched field; None for a field that does not apply to the cell.
    """
    cells = tuple(each.group.cell for each in progress)
    places = frames.places(Plan(progress[0].group.experiment, cells)).drop(columns="seed")
    fields = dict.fromkeys(field for each in progress for field in each.group.space)
    rows = [
        {**place, "number": number, "state": trial.state, "epoch": trial.epoch}
        | {"score": trial.score, **{field: trial.point.get(field) for field in fields}}
        for place, each in zip(places.to_dict("records"), progress, strict=True)
        for number, trial in enumerate(each.drawn, 1)
    ]
    columns = [*places, "number", "state", "epoch", "score", *fields]
    return pd.DataFrame(rows, columns=columns).astype({"score": float})


def of_grid(frame: pd.DataFrame, metric: str = "top1") -> list[dict[str, Any]]:
    """Return the setting with the highest mean over seeds, per loss and (student, teacher) pair.

    Args:
        frame: Records as returned by `records.frames.frame`.
        metric: The metric to compare; higher is better.

    Returns:
        One dictionary per loss and pair, with the mean, standard deviation and number of seeds of
        the best setting, and the number of settings compared. Losses without a finished trial are
        left out.
    """
    rows: list[dict[str, Any]] = []
    table = frames.summary(frame, [metric])
    for _, group in table[table["n"] > 0].groupby(["student", "teacher", "loss"], sort=False):
        best: dict[Any, Any] = group.sort_values(metric, ascending=False).iloc[0].to_dict()
        kept = ["student", "teacher", "setting", "method", metric, f"{metric}_std", "n"]
        rows.append({name: best[name] for name in kept} | {"settings": len(group)})
    return rows


def printed(rows: list[dict[str, Any]], metric: str) -> pd.DataFrame:
    """Format the rows of `of_search` or `of_grid` as strings.

    Args:
        rows: Rows of `of_search` or `of_grid`.
        metric: The metric that the rows hold.

    Returns:
        A table of strings. The first three columns identify the row.
    """
    lines = []
    for row in rows:
        pair = f"{row['teacher']} → {row['student']}" if row["teacher"] else row["student"]
        line = {"Pair": pair, "Method": row["method"]}
        point = ", ".join(f"{field} {value}" for field, value in row.get("best", {}).items())
        setting = "; ".join(part for part in (row["setting"], point) if part)
        line["Best settings"] = setting or rendering.MISSING
        head = HEADS.get(metric, metric)
        line[head] = _number(row[metric], metric)
        if "best" in row:
            for name in ("trials", "done", "stopped", "failed"):
                line[name.capitalize()] = str(row[name])
            if any(other["open"] or other["to_draw"] for other in rows):
                line["To run"] = str(row["open"] + row["to_draw"])
        else:
            line[head] += "" if pd.isna(row[f"{metric}_std"]) else f" ± {row[f'{metric}_std']:.2f}"
            line |= {"n": str(row["n"]), "Of": str(row["settings"])}
        lines.append(line)
    return pd.DataFrame(lines)


def text(rows: list[dict[str, Any]], metric: str) -> str:
    """Format the rows of `of_search` or `of_grid` as a Markdown table."""
    return rendering.markdown(printed(rows, metric), 3)


def _number(value: float | None, metric: str) -> str:
    """Format a number: two decimals for percentages, four for other metrics."""
    return rendering.MISSING if value is None else f"{value:.{2 if metric in HEADS else 4}f}"
