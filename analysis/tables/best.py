"""The best settings: of each cell that a search went through, or of each loss of a plain grid."""

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
    """One row a cell: its best point, what that reached and where, and the state of its trials."""
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


def of_grid(frame: pd.DataFrame, metric: str = "top1") -> list[dict[str, Any]]:
    """One row a loss of each pair: the setting with the highest mean over seeds."""
    rows: list[dict[str, Any]] = []
    table = frames.summary(frame, [metric])
    for _, group in table[table["n"] > 0].groupby(["student", "teacher", "loss"], sort=False):
        best: dict[Any, Any] = group.sort_values(metric, ascending=False).iloc[0].to_dict()
        kept = ["student", "teacher", "setting", "method", metric, f"{metric}_std", "n"]
        rows.append({name: best[name] for name in kept} | {"settings": len(group)})
    return rows


def printed(rows: list[dict[str, Any]], metric: str) -> pd.DataFrame:
    """The rows as strings; three columns name them."""
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
    """The same as Markdown."""
    return rendering.markdown(printed(rows, metric), 3)


def _number(value: float | None, metric: str) -> str:
    return rendering.MISSING if value is None else f"{value:.{2 if metric in HEADS else 4}f}"
