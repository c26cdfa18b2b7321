"""Tables of one experiment's trials: all methods and metrics, and PLD against each other method.

`comparison` and `against` compute the numbers. `text` and `write` format them as Markdown, CSV and
LaTeX (booktabs).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.records.frames import summary
from analysis.statistics import paired
from analysis.tables import rendering
from analysis.tables.rendering import MISSING, signed
from pld_ray.config.experiment import Experiment
from pld_ray.losses import REGISTRY

METRICS = ["top1", "top5", "kl_teacher_student", "agreement", "ece", "seconds"]
LEGEND = (
    "Last epoch: mean ± standard deviation over n seeds. PLD gain: top-1 of PLD minus top-1 of the",
    "method, paired by seed. Seconds: time for training, validation and the teacher on one worker.",
)


def comparison(records: pd.DataFrame) -> pd.DataFrame:
    """Return one row per method of each (student, teacher, setting), after a row for the teacher.

    Args:
        records: Records as returned by `records.frames.frame`.

    Returns:
        The columns of `records.frames.summary`, and `gain`: the mean over seeds of PLD's top-1
        minus the method's, paired by seed (the paper's tables print it as a difference of means).
        Values are NaN where no trial has finished; gains are also NaN unless there is exactly one
        PLD row to compare with.
    """
    metrics = [*METRICS, "teacher_top1"]
    table = summary(records, metrics)
    rows: list[dict[Any, Any]] = []
    for _, section in table.groupby(["student", "teacher", "setting"], sort=False):
        first = section.iloc[0]
        if first["teacher"] and any(REGISTRY[loss].needs_teacher for loss in section["loss"]):
            teacher = {name: first[name] for name in ("student", "teacher", "setting")}
            top1 = section["teacher_top1"].mean()
            rows.append(teacher | {"method": "Teacher", "loss": "teacher", "top1": top1})
        pld = section[section["loss"] == "pld"]
        for _, row in section.iterrows():
            gain = _gain(records, pld.iloc[0], row) if len(pld) == 1 else math.nan
            rows.append({**row.to_dict(), "gain": gain})
    return pd.DataFrame(rows).drop(columns=["teacher_top1", "teacher_top1_std"])


def _gain(records: pd.DataFrame, pld: pd.Series, row: pd.Series) -> float:
    """Return the mean top-1 of PLD minus the method's, over the seeds that both have."""
    if row["method"] == pld["method"]:
        return math.nan

    def by_seed(group: pd.Series) -> pd.Series:
        keys = ["student", "teacher", "setting", "method"]
        return records[(records[keys] == group[keys]).all(axis=1)].set_index("seed")["top1"]

    return float((by_seed(pld) - by_seed(row)).mean())


def against(records: pd.DataFrame) -> pd.DataFrame:
    """Compare PLD with every other method, over all seeds and pairs where both have finished.

    Args:
        records: Records as returned by `records.frames.frame`.

    Returns:
        One row per method with the columns method, those of `paired.Comparison`, corrected (the
        p-value corrected over all rows) and decided. The table is empty unless the records have
        exactly one PLD method.
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
        found = paired.compare(ours, theirs)
        if found is not None:
            rows.append({"method": method, **found._asdict(), "decided": found.decided})
    table = pd.DataFrame(rows)
    if rows:
        table["corrected"] = paired.corrected(table["p"].tolist())
        table["decided"] &= table["corrected"] < 0.05
    return table


def printed(table: pd.DataFrame) -> pd.DataFrame:
    """Format the table of `comparison` as strings: mean ± std, or a dash for a missing number."""

    def pair(row: pd.Series, metric: str, digits: int, scale: float = 1) -> str:
        mean, std = row.get(metric), row.get(f"{metric}_std")
        if mean is None or pd.isna(mean):
            return MISSING
        spread = "" if std is None or pd.isna(std) else f" ± {scale * std:.{digits}f}"
        return f"{scale * mean:.{digits}f}{spread}"

    rows = []
    several = len(table[["student", "teacher", "setting"]].drop_duplicates()) > 1
    for _, row in table.iterrows():
        teacher = row["loss"] == "teacher"
        cells = {}
        if several:
            cells["Pair"] = _pair(row)
            if (table["setting"] != "").any():
                cells["Setting"] = row["setting"]
        cells["Method"] = row["method"]
        cells["Top-1 %"] = pair(row, "top1", 2)
        gain = row.get("gain")
        cells["PLD gain"] = "" if gain is None or pd.isna(gain) else signed(gain)
        cells["KL(T‖S)"] = "" if teacher else pair(row, "kl_teacher_student", 2)
        cells["Agreement %"] = "" if teacher else pair(row, "agreement", 1)
        cells["ECE %"] = "" if teacher else pair(row, "ece", 1, scale=100)
        cells["Seconds"] = "" if teacher else pair(row, "seconds", 1)
        done, planned = row.get("n"), row.get("planned")
        whole = "" if teacher else f"{done:.0f}"
        cells["n"] = whole if teacher or done == planned else f"{whole} of {planned:.0f}"
        rows.append(cells)
    return pd.DataFrame(rows)


def _pair(row: pd.Series) -> str:
    """Return "teacher → student", or the student alone for a row without a teacher."""
    return f"{row['teacher']} → {row['student']}" if row["teacher"] else str(row["student"])


def printed_against(table: pd.DataFrame) -> pd.DataFrame:
    """Format the table of `against` as strings. Decided gains are bold."""
    lines = []
    for row in table.to_dict("records"):
        gain = signed(row["mean"])
        if not math.isnan(row["low"]):
            gain += f" [{signed(row['low'])}, {signed(row['high'])}]"
        lines.append(
            {
                "PLD against": row["method"],
                "Gain [95 %]": f"**{gain}**" if row["decided"] else gain,
                "Effect d": signed(row["effect"]),
                "p": MISSING if math.isnan(row["corrected"]) else f"{row['corrected']:.3f}",
                "P(better)": f"{row['probability']:.2f}",
                "n": f"{row['n']:.0f}",
            }
        )
    return pd.DataFrame(lines)


AGAINST = (
    "Gain: top-1 of PLD minus top-1 of the method, paired by seed; mean over pairs and seeds, with "
    "the 95 % bootstrap interval. Effect: Cohen's d of the differences. p: sign-flip permutation "
    "test with Benjamini-Hochberg correction. P(better): the probability that a run of PLD beats a "
    "run of the method. Bold: the interval excludes 0, p is below 0.05 and n is at least "
    f"{paired.ENOUGH}."
)


def text(table: pd.DataFrame, others: pd.DataFrame, experiment: Experiment) -> str:
    """Format both tables as Markdown whose columns also line up as plain text.

    Args:
        table: The table of `comparison`.
        others: The table of `against`; it may be empty.
        experiment: The experiment, for its title and note.
    """
    cells = printed(table)
    title, only = experiment.title or experiment.name, table.iloc[0]
    head = [title if "Pair" in cells else f"{title}: {_pair(only)}", ""]
    tail = ["", *_legend(table, experiment)]
    if len(others):
        tail += ["", rendering.markdown(printed_against(others), 1), "", AGAINST]
    return "\n".join([*head, rendering.markdown(cells, labels(cells)), *tail])


def labels(cells: pd.DataFrame) -> int:
    """Return the number of leading columns that identify the row."""
    return list(cells.columns).index("Top-1 %")


def _legend(table: pd.DataFrame, experiment: Experiment) -> list[str]:
    """Return the lines of text below the table."""
    lines = list(LEGEND)
    done = table[table["loss"] != "teacher"]
    if done["n"].sum() < done["planned"].sum():
        lines.append(f"{MISSING} and 'n of m' mark trials that have not finished.")
    return [*lines, *([experiment.note] if experiment.note else [])]


def write(
    table: pd.DataFrame, others: pd.DataFrame, folder: Path, experiment: Experiment
) -> list[Path]:
    """Write table.md, table.csv (full precision), table.tex and, if not empty, against.csv.

    Args:
        table: The table of `comparison`.
        others: The table of `against`; it may be empty.
        folder: Where to write; it is created if needed.
        experiment: The experiment, for its title and note.

    Returns:
        The paths of the written files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"table.{kind}" for kind in ("md", "csv", "tex")]
    paths[0].write_text(text(table, others, experiment) + "\n", encoding="utf-8")
    table.to_csv(paths[1], index=False)
    cells = printed(table)
    paths[2].write_text(rendering.latex(cells, labels(cells)), encoding="utf-8")
    if len(others):
        paths.append(folder / "against.csv")
        others.to_csv(paths[-1], index=False)
    return paths
