"""The paper's tables: each a short declaration over records, with the reported numbers beside ours.

reported.csv holds every number that arXiv 2506.12542 v3 reports, in long form. A row of it belongs
to the cells of an experiment with its teacher, student, method and settings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import render, statistics
from analysis.statistics import Scores
from pld_ray.experiment import experiments_folder
from pld_ray.losses import REGISTRY
from pld_ray.spec import Trial

# ---------------------------------------------------------------- declarations


@dataclass(frozen=True)
class PaperTable:
    """One table: which experiment, what its rows and columns are, which metrics.

    rows, columns: pair, method, epochs, optimizer or metric. gains: over which methods PLD's
    advantage is shown, in the first metric.
    """

    numbers: str  # in the paper
    title: str
    experiment: str
    rows: str
    columns: str
    metrics: tuple[str, ...] = ("top1",)
    gains: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For files: table-2, table-5-8."""
        return f"table-{self.numbers.replace(' and ', '-')}"

    @property
    def reported(self) -> int:
        """Its number in reported.csv; Table 5 is part of Table 8."""
        return int(self.numbers.split()[-1])


BOTH = ("dist", "kd")
TABLES = (
    PaperTable(
        "1", "Methods on CIFAR-100", "cifar100_methods", rows="method", columns="pair", gains=BOTH
    ),
    PaperTable(
        "2", "Homogeneous pairs", "homogeneous_pairs", rows="pair", columns="method", gains=BOTH
    ),
    PaperTable(
        "3",
        "Heterogeneous teachers",
        "heterogeneous_teachers",
        rows="pair",
        columns="method",
        gains=BOTH,
    ),
    PaperTable(
        "4", "Longer training", "longer_training", rows="method", columns="epochs", gains=BOTH
    ),
    PaperTable(
        "5 and 8",
        "The weight of cross-entropy",
        "ce_weight",
        rows="method",
        columns="metric",
        metrics=("top1", "top5"),
    ),
    PaperTable(
        "6",
        "The weights of the ranking",
        "pld_weights",
        rows="method",
        columns="metric",
        metrics=("top1", "top5"),
    ),
    PaperTable("9", "Optimizers", "optimizers", rows="optimizer", columns="method", gains=BOTH),
    PaperTable(
        "10", "Logit standardization", "logit_standardization", rows="method", columns="metric"
    ),
    PaperTable("11", "Divergences under KD", "divergences", rows="method", columns="metric"),
    PaperTable(
        "12",
        "Alignment with the teacher",
        "teacher_alignment",
        rows="pair",
        columns="method",
        metrics=("kl_teacher_student",),
    ),
    PaperTable(
        "13",
        "Training time",
        "runtime",
        rows="method",
        columns="pair",
        metrics=("train_minutes",),
    ),
)
METRICS = {
    "top1": "top-1 %",
    "top5": "top-5 %",
    "kl_teacher_student": "KL(T‖S), nats",
    "train_minutes": "minutes",
}
TEACHER = "Teacher"

# ---------------------------------------------------------------- what is reported

ALIASES = {  # Table 12's names for what Table 2 calls
    "mobilenetv4_large": "mobilenetv4_conv_large",
    "mobilenetv4_medium": "mobilenetv4_conv_medium",
    "mobilenetv4_small": "mobilenetv4_conv_small",
}
FIELDS = {"alpha": "ce_weight", "tau": "temperature", "label_smoothing": "smoothing"}


@cache
def reported() -> list[dict[str, Any]]:
    """All reported numbers, one a row: the columns of reported.csv."""
    text = {"params": str, "optimizer": str}
    found = pd.read_csv(Path(__file__).parent / "reported.csv", dtype=text)
    rows: list[Any] = found.fillna({"params": "", "optimizer": ""}).to_dict("records")
    return rows


def number(trial: Trial, teacher: str, table: int, metric: str) -> tuple[float, float]:
    """The reported mean and standard deviation of a trial's metric; NaN where there is none.

    By the table itself, or by another that names the settings of the same trial.
    """
    fitting = [row for row in reported() if row["metric"] == metric and _fits(row, trial, teacher)]
    own = [row for row in fitting if row["table"] == table]
    for row in own or [row for row in fitting if row["params"]]:
        return row["mean"], row["std"]
    return math.nan, math.nan


def teacher_top1(student: str, teacher: str, table: int) -> float:
    """The reported top-1 of the teacher of a pair; NaN where there is none."""
    for row in reported():
        if row["table"] == table and row["method"] == "teacher" and _pair(row, student, teacher):
            return row["mean"]
    return math.nan


def _fits(row: dict[str, Any], trial: Trial, teacher: str) -> bool:
    settings: list[list[str]] = [item.split("=") for item in row["params"].split(";") if item]
    loss = trial.loss.model_dump(mode="json")
    return (
        _pair(row, trial.student.name, teacher)
        and row["method"] == trial.loss.name
        and all(_same(value, loss.get(FIELDS.get(name, name))) for name, value in settings)
        and (math.isnan(row["epochs"]) or row["epochs"] == trial.epochs)
        and row["optimizer"] in ("", trial.optimizer.name)
    )


def _pair(row: dict[str, Any], student: str, teacher: str) -> bool:
    named: tuple[str, str] = row["student"], row["teacher"]
    return [ALIASES.get(name, name) for name in named] == [network(student), network(teacher)]


def network(name: str) -> str:
    """A network as the paper calls it: without timm's tag, and without saying it is for CIFAR."""
    return name.split(".")[0].removesuffix("_cifar")


def _same(text: str, value: Any) -> bool:
    return text == value if isinstance(value, str) or value is None else float(text) == value


# ---------------------------------------------------------------- ours beside it


@dataclass(frozen=True)
class Entry:
    """One place of a table: ours, and what the paper reports."""

    row: str
    column: str
    metric: str
    loss: str  # its name in the registry, or teacher
    place: str  # what a gain is measured within: the row or the column that is no method
    scores: dict[int, float]  # by seed
    planned: int
    reported: float
    reported_std: float
    trial: Trial | None = None  # with one of its seeds; None for a teacher
    teacher: str = ""

    @property
    def values(self) -> Scores:
        """[n] float64."""
        return np.array(list(self.scores.values()))

    @property
    def mean(self) -> float:
        """Of ours; NaN if there is none."""
        return float(self.values.mean()) if self.scores else math.nan

    @property
    def std(self) -> float:
        """With n - 1; NaN for fewer than two."""
        return float(self.values.std(ddof=1)) if len(self.scores) > 1 else math.nan


def entries(table: PaperTable, records: pd.DataFrame) -> list[Entry]:
    """The places of a table, in the order of the records (those of its experiment).

    The places of a miniature have the names of what it stands for.
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
            value = teacher_top1(trial.student.name, teacher, table.reported)
            if not math.isnan(value):
                ours = cells.get("teacher_top1", pd.Series(dtype=float)).dropna()
                scores = {0: float(ours.iloc[0])} if len(ours) else {}
                at = labels | {"method": TEACHER, "metric": METRICS["top1"]}
                spot = at[table.rows], at[table.columns]
                found.append(Entry(*spot, "top1", "teacher", place, scores, 1, value, math.nan))
        for metric in table.metrics:
            at = labels | {"metric": METRICS[metric]}
            mean, std = number(trial, teacher, table.reported, metric)
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
    """The finished ones of some records."""
    values = _metric(cells, metric)
    pairs = zip(cells["seed"].tolist(), values.tolist(), strict=True)
    return {seed: value for seed, value in pairs if not math.isnan(value)}


def _metric(cells: pd.DataFrame, metric: str) -> pd.Series:
    if metric == "train_minutes":  # as if each trial's teacher had been at work for it alone
        if "seconds" not in cells:
            return pd.Series(math.nan, index=cells.index)
        return (cells["seconds"] + cells["teacher_avoided_seconds"]) / 60
    return cells[metric] if metric in cells else pd.Series(math.nan, index=cells.index)


@dataclass(frozen=True)
class Gain:
    """PLD's advantage over a method at one place, or on average."""

    place: str
    over: str  # label of the method
    ours: float  # mean over the seeds that both have
    reported: float


def gains(table: PaperTable, found: list[Entry]) -> list[Gain]:
    """At every place of a table, then their averages ("average"), for each method in its gains."""
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
        # of all places or not at all: an average of what happens to be there is another number
        ours, known = (float(np.mean([getattr(g, f) for g in rows])) for f in ("ours", "reported"))
        result += [*rows, Gain("average", REGISTRY[over].label, ours, known)]
    return result


# ---------------------------------------------------------------- PLD against each other method


def comparisons(records: pd.DataFrame) -> pd.DataFrame:
    """PLD against every other method, over all seeds and pairs where both have finished.

    Columns: method, those of statistics.Comparison, corrected (p, for all rows together), decided.
    Empty unless the records have just one PLD method.
    """
    places = ["teacher", "student", "setting"]
    done = records[records["finished"]]
    methods = list(dict.fromkeys(done.loc[done["loss"] == "pld", "method"]))
    rows = []
    for method in dict.fromkeys(done["method"]) if len(methods) == 1 else ():
        if method == methods[0]:
            continue
        ours, theirs = {}, {}
        for key, cells in done.groupby(places, sort=False):
            pld, other = (
                cells[cells["method"] == name].set_index("seed")["top1"]
                for name in (methods[0], method)
            )
            seeds = [seed for seed in pld.index if seed in other.index]
            ours[key], theirs[key] = pld[seeds].to_numpy(), other[seeds].to_numpy()
        found = statistics.compare(ours, theirs)
        if found is not None:
            rows.append({"method": method, **found._asdict(), "decided": found.decided})
    table = pd.DataFrame(rows)
    if rows:
        table["corrected"] = statistics.corrected(table["p"].tolist())
        table["decided"] &= table["corrected"] < 0.05
    return table


# ---------------------------------------------------------------- printed

MISSING = "–"


def _number(value: float, std: float) -> str:
    if math.isnan(value):
        return MISSING
    return f"{value:.2f}" + ("" if math.isnan(std) else f"±{std:.2f}")


def _signed(value: float) -> str:
    return MISSING if math.isnan(value) else f"{round(value, 2) + 0.0:+.2f}".replace("-", "−")


def _cell(entry: Entry | None, alone: bool, compare: bool, best: bool) -> str:
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
    return f"{text} [{reported}{f', {_signed(entry.mean - entry.reported)}' if known else ''}]"


def best(found: list[Entry], entry: Entry) -> bool:
    """Whether the entry beats every other method at its place, and its interval says so.

    The 95 % interval of the paired differences must leave out 0, with as many runs as that takes.
    """
    if len(entry.scores) < statistics.ENOUGH or entry.loss == "teacher":
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
        found_ = statistics.compare({"": one}, {"": two})
        if found_ is None or not found_.decided or found_.mean < 0:
            return False
    return bool(others)


def printed(table: PaperTable, found: list[Entry], miniature: bool) -> pd.DataFrame:
    """The table as strings: ours, and in brackets what is reported and our difference from it.

    Where nothing has been run: the reported table. In a miniature there is nothing to subtract.
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
    """PLD's gains as strings, in the same form."""
    alone = not any(entry.scores for entry in found)
    lines: dict[str, dict[str, str]] = {}
    for gain in gains(table, found):
        line = lines.setdefault(gain.place, {"PLD's gain": gain.place})
        text = _signed(gain.reported)
        if not alone:
            text = f"{_signed(gain.ours)} [{text}]"
        line[f"over {gain.over}"] = text
    return pd.DataFrame(list(lines.values()))


def printed_comparisons(table: pd.DataFrame) -> pd.DataFrame:
    """`comparisons` as strings; bold what is decided."""
    lines = []
    for row in table.to_dict("records"):
        gain = _signed(row["mean"])
        if not math.isnan(row["low"]):
            gain += f" [{_signed(row['low'])}, {_signed(row['high'])}]"
        lines.append(
            {
                "PLD against": row["method"],
                "Gain [95 %]": f"**{gain}**" if row["decided"] else gain,
                "Effect d": _signed(row["effect"]),
                "p": MISSING if math.isnan(row["corrected"]) else f"{row['corrected']:.3f}",
                "P(better)": f"{row['probability']:.2f}",
                "n": f"{row['n']:.0f}",
            }
        )
    return pd.DataFrame(lines)


COMPARED = (
    "Top-1 of PLD minus the method's, paired by seed: the mean over pairs and seeds and its 95 % "
    "bootstrap interval; effect: Cohen's d of the differences; p: sign-flip permutation test, "
    "Benjamini-Hochberg corrected; P(better): that a run of PLD beats one of the method. Bold: the "
    f"interval leaves out 0, p is below 0.05 and n is {statistics.ENOUGH} or more."
)


def legend(table: PaperTable, found: list[Entry], miniature: bool) -> str:
    """What the numbers are, in a sentence or two."""
    metrics = ", ".join(METRICS[metric] for metric in table.metrics)
    if not any(entry.scores for entry in found):
        return f"{metrics}, as reported; no trial of {table.experiment} has finished here."
    if miniature:
        text = (
            f"{metrics}: ours ± std [reported]. A miniature: small data, few epochs and, where "
            "they would be too large, smaller networks than those named. It shows that the way to "
            "the table works; its numbers do not compare with the reported ones."
        )
    else:
        text = f"{metrics}: ours ± std [reported, difference]; {MISSING}: not finished."
    if "train_minutes" in table.metrics:
        text += " Minutes count the teacher's forward passes that the bank spared."
    return text


def title(table: PaperTable, miniature: bool) -> str:
    """As a heading."""
    plural = "Tables" if "and" in table.numbers else "Table"
    return f"{plural} {table.numbers}: {table.title}" + (" (miniature)" if miniature else "")


def text(table: PaperTable, found: list[Entry], miniature: bool) -> str:
    """The table, its gains and what they are, as Markdown."""
    cells, advantage = printed(table, found, miniature), printed_gains(table, found, miniature)
    parts = [title(table, miniature), render.markdown(cells, 1)]
    if len(advantage):
        parts.append(render.markdown(advantage, 1))
    return "\n\n".join([*parts, legend(table, found, miniature)])


def write(table: PaperTable, found: list[Entry], miniature: bool, folder: Path) -> list[Path]:
    """Write the table as Markdown, CSV (long form, full precision) and LaTeX; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{table.name}.{kind}" for kind in ("md", "csv", "tex")]
    paths[0].write_text(text(table, found, miniature) + "\n", encoding="utf-8")
    rows = []
    for entry in found:
        low, high = statistics.interval(entry.values)
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
    tex = [render.latex(printed(table, found, miniature), 1)]
    if table.gains:
        tex.append(render.latex(printed_gains(table, found, miniature), 1))
    paths[2].write_text("\n".join(tex), encoding="utf-8")
    return paths


def experiments() -> list[str]:
    """All shipped experiments: those of the paper's tables in its order, then the others."""
    shipped = sorted(path.stem for path in experiments_folder().glob("*.yaml"))
    return list(dict.fromkeys([*(table.experiment for table in TABLES), *shipped]))


def of_experiment(name: str) -> list[PaperTable]:
    """The tables that an experiment (or its miniature) regenerates."""
    return [table for table in TABLES if table.experiment == name.removesuffix("-smoke")]
