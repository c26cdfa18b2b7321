"""The tables of the paper, with the reported numbers beside ours.

Each table is a short declaration in TABLES over the records of one experiment:

TABLES -> entries (ours and reported, cell by cell) -> gains -> Markdown, CSV, LaTeX
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.statistics import paired
from analysis.statistics.paired import Scores
from analysis.tables import rendering, reported
from analysis.tables.rendering import MISSING, signed
from analysis.tables.reported import network
from pld_ray.config.experiment import experiments_folder
from pld_ray.config.trial import Trial
from pld_ray.losses import REGISTRY

METRICS = {
    "top1": "top-1 %",
    "top5": "top-5 %",
    "kl_teacher_student": "KL(T‖S), nats",
    "train_minutes": "minutes",
}
TEACHER = "Teacher"

# ---------------------------------------------------------------- declarations


@dataclass(frozen=True)
class PaperTable:
    """Declaration of one table of the paper.

    Attributes:
        numbers: Number of the table in the paper, or "5 and 8" for two tables in one.
        title: Title of the table.
        experiment: Name of the experiment that regenerates the table.
        rows: What the rows are: pair, method, epochs, optimizer or metric.
        columns: What the columns are: pair, method, epochs, optimizer or metric.
        metrics: Names of the metrics in METRICS.
        gains: Losses over which PLD's advantage is shown, in the first metric.
    """

    numbers: str
    title: str
    experiment: str
    rows: str
    columns: str
    metrics: tuple[str, ...] = ("top1",)
    gains: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the table's files, such as table-2 or table-5-8."""
        return f"table-{self.numbers.replace(' and ', '-')}"

    @property
    def number(self) -> int:
        """Number of the table in reported.csv. Table 5 is part of Table 8."""
        return int(self.numbers.split()[-1])


BOTH = ("dist", "kd")
TABLES = (
    PaperTable("1", "Methods on CIFAR-100", "cifar100_methods", "method", "pair", gains=BOTH),
    PaperTable("2", "Homogeneous pairs", "homogeneous_pairs", "pair", "method", gains=BOTH),
    PaperTable(
        "3", "Heterogeneous teachers", "heterogeneous_teachers", "pair", "method", gains=BOTH
    ),
    PaperTable("4", "Longer training", "longer_training", "method", "epochs", gains=BOTH),
    PaperTable(
        "5 and 8", "The weight of cross-entropy", "ce_weight", "method", "metric", ("top1", "top5")
    ),
    PaperTable(
        "6", "The weights of the ranking", "pld_weights", "method", "metric", ("top1", "top5")
    ),
    PaperTable("9", "Optimizers", "optimizers", "optimizer", "method", gains=BOTH),
    PaperTable("10", "Logit standardization", "logit_standardization", "method", "metric"),
    PaperTable("11", "Divergences under KD", "divergences", "method", "metric"),
    PaperTable(
        "12",
        "Alignment with the teacher",
        "teacher_alignment",
        "pair",
        "method",
        ("kl_teacher_student",),
    ),
    PaperTable("13", "Training time", "runtime", "method", "pair", ("train_minutes",)),
)

# ---------------------------------------------------------------- our numbers and the reported ones


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


def entries(table: PaperTable, records: pd.DataFrame) -> list[Entry]:
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
    return found


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
        ours, known = (float(np.mean([getattr(g, f) for g in rows])) for f in ("ours", "reported"))
        result += [*rows, Gain("average", REGISTRY[over].label, ours, known)]
    return result


# ---------------------------------------------------------------- formatting


def _number(value: float, std: float) -> str:
    """Format a number as mean±std."""
    if math.isnan(value):
        return MISSING
    return f"{value:.2f}" + ("" if math.isnan(std) else f"±{std:.2f}")


def _cell(entry: Entry | None, alone: bool, compare: bool, best: bool) -> str:
    """Format one cell: ours [reported, difference]."""
    if entry is None:
        return ""
    reported = _number(entry.reported, entry.reported_std)
    if alone:
        return reported
    text = _number(entry.mean, entry.std)
    if entry.scores and len(entry.scores) < entry.planned:
        text += f" (n={len(entry.scores)})"
    if best:
        text = f"**{text}**"
    if math.isnan(entry.reported):
        return text
    known = compare and entry.scores
    return f"{text} [{reported}{f', {signed(entry.mean - entry.reported)}' if known else ''}]"


def best(found: list[Entry], entry: Entry) -> bool:
    """Return whether the entry is better than every other method at its place.

    For each other method, the 95 % interval of the paired differences must exclude 0, and there
    must be at least `paired.ENOUGH` paired runs.

    Args:
        found: The cells of the table.
        entry: One of them.
    """
    if len(entry.scores) < paired.ENOUGH or entry.loss == "teacher":
        return False
    others = [
        e
        for e in found
        if e is not entry and (e.place, e.metric) == (entry.place, entry.metric)
        and e.scores and e.loss != "teacher"
    ]  # fmt: skip
    sign = -1 if entry.metric in ("kl_teacher_student", "train_minutes") else 1
    for other in others:
        seeds = [seed for seed in entry.scores if seed in other.scores]
        one, two = (np.array([sign * e.scores[seed] for seed in seeds]) for e in (entry, other))
        found_ = paired.compare({"": one}, {"": two})
        if found_ is None or not found_.decided or found_.mean < 0:
            return False
    return bool(others)


def printed(table: PaperTable, found: list[Entry], miniature: bool) -> pd.DataFrame:
    """Format the table as strings: our number [reported number, difference].

    If no trial has finished, the cells hold the reported numbers alone.

    Args:
        table: Declaration of the table.
        found: The cells of the table.
        miniature: Whether the trials are those of a miniature. If so, differences are left out.
    """
    alone = not any(entry.scores for entry in found)
    rows = list(dict.fromkeys(entry.row for entry in found))
    columns = list(dict.fromkeys(entry.column for entry in found))
    at = {(entry.row, entry.column): entry for entry in found}
    lines = []
    for row in rows:
        line = {table.rows.capitalize(): row}
        for column in columns:
            entry = at.get((row, column))
            marked = entry is not None and best(found, entry)
            line[column] = _cell(entry, alone, not miniature, marked)
        lines.append(line)
    return pd.DataFrame(lines)


def printed_gains(table: PaperTable, found: list[Entry], miniature: bool) -> pd.DataFrame:
    """Format PLD's gains as strings: our gain [reported gain].

    Args:
        table: Declaration of the table.
        found: The cells of the table.
        miniature: Whether the trials are those of a miniature. The gains do not depend on it.
    """
    alone = not any(entry.scores for entry in found)
    lines: dict[str, dict[str, str]] = {}
    for gain in gains(table, found):
        line = lines.setdefault(gain.place, {"PLD's gain": gain.place})
        text = signed(gain.reported)
        if not alone:
            text = f"{signed(gain.ours)} [{text}]"
        line[f"over {gain.over}"] = text
    return pd.DataFrame(list(lines.values()))


def legend(table: PaperTable, found: list[Entry], miniature: bool) -> str:
    """Return the text below the table that explains the numbers.

    Args:
        table: Declaration of the table.
        found: The cells of the table.
        miniature: Whether the trials are those of a miniature.
    """
    metrics = ", ".join(METRICS[metric] for metric in table.metrics)
    if not any(entry.scores for entry in found):
        return f"{metrics}, as reported; no trial of {table.experiment} has finished."
    if miniature:
        text = (
            f"{metrics}: ours ± std [reported]. This is a miniature: it has little data and few "
            "epochs, and smaller networks where the named ones are too large. It shows that the "
            "whole pipeline works. Its numbers are not comparable with the reported ones."
        )
    else:
        text = f"{metrics}: ours ± std [reported, difference]; {MISSING}: no finished trial."
    if "train_minutes" in table.metrics:
        text += " Minutes include the time of the teacher's forward passes that the bank saved."
    return text


def title(table: PaperTable, miniature: bool) -> str:
    """Return the heading of the table, such as "Table 2: Homogeneous pairs"."""
    plural = "Tables" if "and" in table.numbers else "Table"
    return f"{plural} {table.numbers}: {table.title}" + (" (miniature)" if miniature else "")


def text(table: PaperTable, found: list[Entry], miniature: bool) -> str:
    """Format the table, PLD's gains and the legend as Markdown.

    Args:
        table: Declaration of the table.
        found: The cells of the table.
        miniature: Whether the trials are those of a miniature.
    """
    cells, advantage = printed(table, found, miniature), printed_gains(table, found, miniature)
    parts = [title(table, miniature), rendering.markdown(cells, 1)]
    if len(advantage):
        parts.append(rendering.markdown(advantage, 1))
    return "\n\n".join([*parts, legend(table, found, miniature)])


def write(table: PaperTable, found: list[Entry], miniature: bool, folder: Path) -> list[Path]:
    """Write the table as Markdown, CSV (long form, full precision) and LaTeX.

    Args:
        table: Declaration of the table.
        found: The cells of the table.
        miniature: Whether the trials are those of a miniature.
        folder: Where to write; it is created if needed.

    Returns:
        The paths of the written files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{table.name}.{kind}" for kind in ("md", "csv", "tex")]
    paths[0].write_text(text(table, found, miniature) + "\n", encoding="utf-8")
    rows = []
    for entry in found:
        low, high = paired.interval(entry.values)
        rows.append(
            {
                "row": entry.row,
                "column": entry.column,
                "metric": entry.metric,
                "mean": entry.mean,
                "std": entry.std,
                "n": len(entry.scores),
                "planned": entry.planned,
                "low": low,
                "high": high,
                "reported": entry.reported,
                "reported_std": entry.reported_std,
                "difference": math.nan if miniature else entry.mean - entry.reported,
                "best": best(found, entry),
            }
        )
    pd.DataFrame(rows).to_csv(paths[1], index=False)
    tex = [rendering.latex(printed(table, found, miniature), 1)]
    if table.gains:
        tex.append(rendering.latex(printed_gains(table, found, miniature), 1))
    paths[2].write_text("\n".join(tex), encoding="utf-8")
    return paths


def experiments() -> list[str]:
    """Return the names of all shipped experiments: the paper's tables in order, then the others."""
    shipped = sorted(path.stem for path in experiments_folder().glob("*.yaml"))
    return list(dict.fromkeys([*(table.experiment for table in TABLES), *shipped]))


def of_experiment(name: str) -> list[PaperTable]:
    """Return the tables that an experiment or its miniature regenerates."""
    return [table for table in TABLES if table.experiment == name.removesuffix("-smoke")]
