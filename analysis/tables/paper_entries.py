"""The cells of a table of the paper: our scores, the reported numbers, and PLD's gains."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.statistics import paired
from analysis.statistics.paired import Scores
from analysis.statistics.sequential import Looks
from analysis.tables import reported
from analysis.tables.comparison import looks_of
from analysis.tables.paper_tables import METRICS, TEACHER, PaperTable
from analysis.tables.reported import network
from pld_ray.config.trial import Trial
from pld_ray.losses import REGISTRY


@dataclass(frozen=True)
class Entry:
    """One cell of a table: our scores and the number that the paper reports.

    Attributes:
        row: Name of the row.
        column: Name of the column.
        metric: Name of the metric in METRICS.
        loss: Name of the loss in the registry, or "teacher".
        place: The row or column that is not a method. Methods are compared within a place.
        scores: Our scores by seed; empty if no trial has finished.
        planned: Number of planned trials.
        reported: The reported mean, NaN if there is none.
        reported_std: The reported standard deviation, NaN if there is none.
        trial: The trial of one of the seeds; None for a teacher.
        teacher: The paper's name of the teacher.
        best: Whether it is better than every other method at its place (see `best`).
    """

    row: str
    column: str
    metric: str
    loss: str
    place: str
    scores: dict[int, float]
    planned: int
    reported: float
    reported_std: float
    trial: Trial | None = None
    teacher: str = ""
    best: bool = False

    @property
    def values(self) -> Scores:
        """Our scores as an array [n], float64."""
        return np.array(list(self.scores.values()))

    @property
    def mean(self) -> float:
        """Mean of our scores, NaN if there are none."""
        return float(self.values.mean()) if self.scores else math.nan

    @property
    def std(self) -> float:
        """Standard deviation (n - 1) of our scores, NaN for fewer than two."""
        return float(self.values.std(ddof=1)) if len(self.scores) > 1 else math.nan


def of_table(table: PaperTable, records: pd.DataFrame) -> list[Entry]:
    """Return the cells of a table, in the order of the records.

    The cells of a miniature have the names of the original networks and settings.

    Args:
        table: Declaration of the table.
        records: Records of the table's experiment, as returned by `records.frames.frame`.
    """
    found: list[Entry] = []
    taught: set[str] = set()
    groups: dict[tuple[str, ...], list[int]] = {}
    named: tuple[str, ...]
    for i, (trial, teacher, method) in enumerate(
        zip(records["original"], records["original_teacher"], records["method"], strict=True)
    ):
        pair = f"{network(teacher)} → {network(trial.student.name)}"
        named = pair, method, f"{trial.epochs} epochs", trial.optimizer.name
        groups.setdefault(named, []).append(i)
    for named, rows in groups.items():
        cells = records.iloc[rows]
        first: Any = cells.iloc[0]
        labels = dict(zip(("pair", "method", "epochs", "optimizer"), named, strict=True))
        pair = labels["pair"]
        trial, teacher = first["original"], first["original_teacher"]
        others = [axis for axis in (table.rows, table.columns) if axis not in ("method", "metric")]
        place = labels[others[0]] if others else ""
        if "method" in (table.rows, table.columns) and pair not in taught:
            taught.add(pair)
            value = reported.teacher_top1(trial.student.name, teacher, table.number)
            if not math.isnan(value):
                ours = cells.get("teacher_top1", pd.Series(dtype=float)).dropna()
                scores = {0: float(ours.iloc[0])} if len(ours) else {}
                at = labels | {"method": TEACHER, "metric": METRICS["top1"]}
                spot = at[table.rows], at[table.columns]
                found.append(Entry(*spot, "top1", "teacher", place, scores, 1, value, math.nan))
        for metric in table.metrics:
            at = labels | {"metric": METRICS[metric]}
            mean, std = reported.number(trial, teacher, table.number, metric)
            found.append(
                Entry(
                    row=at[table.rows],
                    column=at[table.columns],
                    metric=metric,
                    loss=first["loss"],
                    place=place,
                    scores=scores_by_seed(cells, metric),
                    planned=len(cells),
                    reported=mean,
                    reported_std=std,
                    trial=trial,
                    teacher=network(teacher),
                )
            )
    marks = best(found, looks_of(records))
    return [replace(entry, best=mark) for entry, mark in zip(found, marks, strict=True)]


def scores_by_seed(cells: pd.DataFrame, metric: str) -> dict[int, float]:
    """Return the values of a metric by seed. Trials without a value are left out."""
    values = _metric(cells, metric)
    pairs = zip(cells["seed"].tolist(), values.tolist(), strict=True)
    return {seed: value for seed, value in pairs if not math.isnan(value)}


def _metric(cells: pd.DataFrame, metric: str) -> pd.Series:
    """Return a metric of every record, NaN where there is none."""
    # The bank saves teacher time, so it is added back: each trial counts its teacher in full.
    if metric == "train_minutes":
        if "seconds" not in cells:
            return pd.Series(math.nan, index=cells.index)
        return (cells["seconds"] + cells["teacher_avoided_seconds"]) / 60
    return cells[metric] if metric in cells else pd.Series(math.nan, index=cells.index)


@dataclass(frozen=True)
class Gain:
    """PLD's advantage over a method at one place, or on average.

    Attributes:
        place: The place, or "average".
        over: Label of the method.
        ours: Our mean over the seeds that both methods have, NaN if there are none.
        reported: The difference of the reported means.
    """

    place: str
    over: str
    ours: float
    reported: float


def gains(table: PaperTable, found: list[Entry]) -> list[Gain]:
    """Return PLD's gains over each method in `table.gains`.

    Args:
        table: Declaration of the table.
        found: The cells of the table.

    Returns:
        For each method: the gain at every place, then their average under the place "average".
    """
    result = []
    for over in table.gains:
        rows = []
        for place in dict.fromkeys(entry.place for entry in found):
            pld, other = (
                next((e for e in found if e.place == place and e.loss == loss), None)
                for loss in ("pld", over)
            )
            if pld is None or other is None:
                continue
            shared = [pld.scores[s] - other.scores[s] for s in pld.scores if s in other.scores]
            ours = float(np.mean(shared)) if shared else math.nan
            rows.append(Gain(place, REGISTRY[over].label, ours, pld.reported - other.reported))
        # The average is NaN if any place is missing: an average of only some places would not be
        # comparable with the reported one.
        # A part of the experiment may have none.
        rows_or_nan = rows or [Gain("average", REGISTRY[over].label, math.nan, math.nan)]
        ours, known = (
            float(np.mean([getattr(gain, field) for gain in rows_or_nan]))
            for field in ("ours", "reported")
        )
        result += [*rows, Gain("average", REGISTRY[over].label, ours, known)]
    return result


def best(found: list[Entry], looks: Looks = ()) -> list[bool]:
    """Return for each entry whether it is better than every other method at its place.

    The p-value of an entry is the largest of its paired comparisons with the others, or 1 if it is
    not better than one of them. It must be below 0.05 after Holm's correction over the whole table:
    the chance that the table has any false winner is then at most 5 %.

    Args:
        found: The cells of the table.
        looks: As in `records.frames.frame`.
    """
    p = [_best_p(entry, found, looks) for entry in found]
    return [value < 0.05 for value in paired.corrected(p)]


def _best_p(entry: Entry, found: list[Entry], looks: Looks) -> float:
    """Return the largest p-value of an entry against the others at its place; NaN without any."""
    others = [
        e
        for e in found
        if e is not entry and (e.place, e.metric) == (entry.place, entry.metric)
        and e.scores and e.loss != "teacher"
    ]  # fmt: skip
    if entry.loss == "teacher" or not entry.scores or not others:
        return math.nan
    sign = -1 if entry.metric in ("kl_teacher_student", "train_minutes") else 1
    p = []
    for other in others:
        seeds = [seed for seed in entry.scores if seed in other.scores]
        gains = np.array([sign * (entry.scores[seed] - other.scores[seed]) for seed in seeds])
        gain = paired.mean_at_looks([gains], looks) if seeds else None
        better = gain is not None and gain.mean > 0 and not math.isnan(gain.p)
        p.append(gain.p if gain is not None and better else 1.0)
    return max(p)
