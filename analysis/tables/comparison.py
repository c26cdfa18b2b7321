"""Tables of one experiment's trials: all methods and metrics, and paired comparisons of methods.

`tables` computes the numbers, by `comparison`, `against` and `all_pairs`. `text` and `write`
format them as Markdown, CSV and LaTeX (booktabs). The reference is the method with which the others
are compared (`Experiment.reference`).
"""

from __future__ import annotations

import itertools
import math
import textwrap
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Tables:
    """The numbers of all tables of an experiment.

    Attributes:
        numbers: The table of `comparison`.
        against: The table of `against`; empty if there is nothing to compare.
        pairs: The table of `all_pairs`; empty if it is not wanted.
        reported: Results from elsewhere, as returned by `records.imported.beside`.
    """

    numbers: pd.DataFrame
    against: pd.DataFrame
    pairs: pd.DataFrame
    reported: pd.DataFrame


def tables(
    records: pd.DataFrame, reported: pd.DataFrame | None = None, all_pairs_too: bool = False
) -> Tables:
    """Compare the methods of an experiment.

    Args:
        records: Records as returned by `records.frames.frame`.
        reported: Results from elsewhere, as returned by `records.imported.beside`.
        all_pairs_too: Whether to compare every two methods.
    """
    return Tables(
        comparison(records),
        against(records),
        all_pairs(records) if all_pairs_too else pd.DataFrame(),
        pd.DataFrame() if reported is None else reported,
    )


def comparison(records: pd.DataFrame) -> pd.DataFrame:
    """Return one row per method of each (student, teacher, setting), after a row for the teacher.

    Args:
        records: Records as returned by `records.frames.frame`.

    Returns:
        The columns of `records.frames.summary`, and `gain`: the mean over seeds of the reference's
        top-1 minus the method's, paired by seed (the paper's tables print it as a difference of
        means). Values are NaN where no trial has finished. `attrs["own_metrics"]` holds the names
        of metrics from plug-ins.
    """
    table = summary(records, [*METRICS, *own_metrics(records), "teacher_top1"])
    rows: list[dict[Any, Any]] = []
    for _, section in table.groupby(["student", "teacher", "setting"], sort=False):
        first = section.iloc[0]
        if first["teacher"] and any(REGISTRY[loss].needs_teacher for loss in section["loss"]):
            teacher = {name: first[name] for name in ("student", "teacher", "setting")}
            top1 = section["teacher_top1"].mean()
            named = {"method": "Teacher", "loss": "teacher", "reference": False}
            rows.append(teacher | named | {"top1": top1})
        for _, row in section.iterrows():
            gain = math.nan
            for _, reference in section[section["reference"]].iterrows():
                gain = _gain(records, reference, row)
            rows.append({**row.to_dict(), "gain": gain})
    found = pd.DataFrame(rows).drop(columns=["teacher_top1", "teacher_top1_std"])
    found.attrs["own_metrics"] = own_metrics(records)
    return found


def own_metrics(records: pd.DataFrame) -> list[str]:
    """Return the names of the metrics that plug-ins define, in the order of the experiment."""
    return list(dict.fromkeys(name for names in records["own_metrics"] for name in names))


def _gain(records: pd.DataFrame, reference: pd.Series, row: pd.Series) -> float:
    """Return the mean top-1 of the reference minus the method's, over the seeds that both have."""
    if row["method"] == reference["method"]:
        return math.nan

    def by_seed(group: pd.Series) -> pd.Series:
        keys = ["student", "teacher", "setting", "method"]
        return records[(records[keys] == group[keys]).all(axis=1)].set_index("seed")["top1"]

    return float((by_seed(reference) - by_seed(row)).mean())


def reference_name(table: pd.DataFrame) -> str:
    """Return the name of the reference: of its method, or of its loss if its settings differ.

    Args:
        table: Records of `records.frames.frame`, or the table of `comparison`.

    Returns:
        The name, or "" if there is nothing to compare with it.
    """
    own = table["reference"].astype(bool)
    if own.all() or not own.any() or (table.loc[~own, "loss"] == "teacher").all():
        return ""
    methods = table.loc[own, "method"].unique()
    return str(methods[0]) if len(methods) == 1 else REGISTRY[table.loc[own, "loss"].iloc[0]].label


def against(records: pd.DataFrame) -> pd.DataFrame:
    """Compare the reference with every other method, over all seeds and pairs where both finished.

    Args:
        records: Records as returned by `records.frames.frame`.

    Returns:
        One row per method with the columns method (the reference), against (the method), those of
        `paired.Comparison`, corrected (the p-value corrected over all rows) and decided.
    """
    done = records[records["finished"]]
    own, others = done[done["reference"]], done[~done["reference"]]
    name = reference_name(records)
    return _compared(
        [(name, own, method, rows) for method, rows in others.groupby("method", sort=False)]
    )


def all_pairs(records: pd.DataFrame) -> pd.DataFrame:
    """Compare every two methods, as `against` does, with p-values corrected over all of them."""
    done = records[records["finished"]]
    methods = list(done.groupby("method", sort=False))
    return _compared([(*one, *other) for one, other in itertools.combinations(methods, 2)])


def _compared(pairs: list[tuple[Any, pd.DataFrame, Any, pd.DataFrame]]) -> pd.DataFrame:
    """Compare the finished trials of two methods, for each of several pairs of methods."""
    rows = []
    for first, one, second, other in pairs:
        ours, theirs = _top1(one), _top1(other)
        for key in ours.keys() & theirs.keys():
            seeds = [seed for seed in ours[key].index if seed in theirs[key].index]
            ours[key], theirs[key] = ours[key][seeds], theirs[key][seeds]
        found = paired.compare(
            {key: scores.to_numpy() for key, scores in ours.items()},
            {key: scores.to_numpy() for key, scores in theirs.items()},
        )
        if found is not None:
            rows.append({"method": first, "against": second, **found._asdict()})
    table = pd.DataFrame(rows)
    if rows:
        table["corrected"] = paired.corrected(table["p"].tolist())
        table["decided"] = table["corrected"] < 0.05
    return table


def _top1(trials: pd.DataFrame) -> dict[Any, pd.Series]:
    """Return the top-1 by seed of one method's trials, by (student, teacher, setting)."""
    sections = trials.groupby(["student", "teacher", "setting"], sort=False)
    return {key: rows.set_index("seed")["top1"] for key, rows in sections}


def printed(table: pd.DataFrame) -> pd.DataFrame:
    """Format the table of `comparison` as strings: mean ± std, or a dash for a missing number."""

    def pair(row: pd.Series, metric: str, digits: int, scale: float = 1) -> str:
        mean, std = row.get(metric), row.get(f"{metric}_std")
        if mean is None or pd.isna(mean):
            return MISSING
        spread = "" if std is None or pd.isna(std) else f" ± {scale * std:.{digits}f}"
        return f"{scale * mean:.{digits}f}{spread}"

    rows = []
    reference = reference_name(table)
    for _, row in table.iterrows():
        teacher = row["loss"] == "teacher"
        cells = _place(row, table)
        cells["Method"] = row["method"]
        cells["Top-1 %"] = pair(row, "top1", 2)
        if reference:
            gain = row.get("gain")
            cells[f"{reference} gain"] = "" if gain is None or pd.isna(gain) else signed(gain)
        cells["KL(T‖S)"] = "" if teacher else pair(row, "kl_teacher_student", 2)
        cells["Agreement %"] = "" if teacher else pair(row, "agreement", 1)
        cells["ECE %"] = "" if teacher else pair(row, "ece", 1, scale=100)
        for name in table.attrs.get("own_metrics", ()):
            cells[name] = "" if teacher else pair(row, name, 3)
        cells["Seconds"] = "" if teacher else pair(row, "seconds", 1)
        done, planned = row.get("n"), row.get("planned")
        whole = "" if teacher else f"{done:.0f}"
        cells["n"] = whole if teacher or done == planned else f"{whole} of {planned:.0f}"
        rows.append(cells)
    return pd.DataFrame(rows)


def _place(row: Any, table: pd.DataFrame) -> dict[str, str]:
    """Return the pair and the setting of a row, if the table of `comparison` has several."""
    if len(table[["student", "teacher", "setting"]].drop_duplicates()) == 1:
        return {}
    several = (table["setting"] != "").any()
    return {"Pair": _pair(row)} | ({"Setting": row["setting"]} if several else {})


def _pair(row: Any) -> str:
    """Return "teacher → student", or the student alone for a row without a teacher."""
    return f"{row['teacher']} → {row['student']}" if row["teacher"] else str(row["student"])


def printed_against(table: pd.DataFrame, pairs: bool = False) -> pd.DataFrame:
    """Format the table of `against`, or of `all_pairs`, as strings. Decided gains are bold."""
    lines = []
    for row in table.to_dict("records"):
        gain = signed(row["mean"])
        if not math.isnan(row["low"]):
            gain += f" [{signed(row['low'])}, {signed(row['high'])}]"
        names = {"Method": row["method"], "Against": row["against"]}
        lines.append(
            (names if pairs else {f"{row['method']} against": row["against"]})
            | {
                "Gain [95 %]": f"**{gain}**" if row["decided"] else gain,
                "Effect d": signed(row["effect"]),
                "p": MISSING if math.isnan(row["corrected"]) else f"{row['corrected']:.3f}",
                "P(better)": f"{row['probability']:.2f}",
                "n": f"{row['n']:.0f}",
            }
        )
    return pd.DataFrame(lines)


def explained(reference: str = "the method") -> str:
    """Return the text under a table of `printed_against`."""
    return (
        f"Gain: top-1 of {reference} minus top-1 of the other, paired by seed; mean over pairs and "
        "seeds, with the 95\u00a0% confidence interval of one comparison. Effect: Cohen's d of the "
        "differences. p: t-test, with Holm's correction over the table. P(better): the probability "
        f"that a run of {reference} beats a run of the other. Bold: p is below 0.05. No interval: "
        "the runs say nothing, because they do not differ or because there are too few; it takes "
        f"{paired.ENOUGH} seeds on each pair, or {paired.ENOUGH} pairs."
    )


def printed_reported(reported: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Format the results from elsewhere as strings, beside our own.

    Args:
        reported: Results as returned by `records.imported.beside`.
        table: The table of `comparison`.
    """

    def pair(mean: float, std: float, n: float, planned: float = math.nan) -> str:
        if math.isnan(mean):
            return MISSING
        spread = "" if math.isnan(std) else f" ± {std:.2f}"
        seeds = "" if math.isnan(n) or n == planned else f" (n = {n:.0f})"
        return f"{mean:.2f}{spread}{seeds}"

    lines = []
    for row in reported.to_dict("records"):
        missing = math.isnan(row["difference"])
        lines.append(
            _place(row, table)
            | {
                "Method": row["method"],
                "Source": row["source"] + (f" ({row['note']})" if row["note"] else ""),
                "Reported top-1 %": pair(row["reported"], row["reported_std"], row["reported_n"]),
                "Ours %": pair(row["top1"], row["top1_std"], row["n"], row["planned"]),
                "Difference": MISSING if missing else signed(row["difference"]),
            }
        )
    return pd.DataFrame(lines)


REPORTED = (
    "Reported: results from elsewhere that were imported, with their standard deviation if it is "
    "known. Difference: ours minus reported. Both may come from other recipes, and an average over "
    "seeds here may stand beside a single run there."
)


def text(own: Tables, experiment: Experiment) -> str:
    """Format the tables as Markdown whose columns also line up as plain text.

    Args:
        own: The numbers.
        experiment: The experiment, for its title and note.
    """
    table = own.numbers
    cells = printed(table)
    title, only = experiment.title or experiment.name, table.iloc[0]
    head = [title if "Pair" in cells else f"{title}: {_pair(only)}", ""]
    tail = ["", *_legend(table, experiment)]
    if len(own.reported):
        shown = printed_reported(own.reported, table)
        tail += ["", rendering.markdown(shown, labels(shown)), "", textwrap.fill(REPORTED, 100)]
    if len(own.against):
        tail += ["", rendering.markdown(printed_against(own.against), 1)]
        tail += ["", textwrap.fill(explained(reference_name(table)), 100)]
    if len(own.pairs):
        tail += ["", rendering.markdown(printed_against(own.pairs, True), 2), ""]
        tail.append(textwrap.fill(explained(), 100))
    return "\n".join([*head, rendering.markdown(cells, labels(cells)), *tail])


def labels(cells: pd.DataFrame) -> int:
    """Return the number of leading columns that identify the row."""
    first = "Top-1 %" if "Top-1 %" in cells else "Reported top-1 %"
    return list(cells.columns).index(first)


def legend(table: pd.DataFrame) -> list[str]:
    """Return the lines that explain the columns of `printed`."""
    name = reference_name(table)
    gain = f"{name} gain: top-1 of {name} minus top-1 of the method, paired by seed. "
    return textwrap.wrap(
        "Last epoch: mean ± standard deviation over n seeds. "
        + (gain if name else "")
        + "Seconds: time for training, validation and the teacher on one worker.",
        100,
    )


def _legend(table: pd.DataFrame, experiment: Experiment) -> list[str]:
    """Return the lines of text below the table."""
    lines = legend(table)
    done = table[table["loss"] != "teacher"]
    if done["n"].sum() < done["planned"].sum():
        lines.append(f"{MISSING} and 'n of m' mark trials that have not finished.")
    return [*lines, *([experiment.note] if experiment.note else [])]


def write(own: Tables, folder: Path, experiment: Experiment) -> list[Path]:
    """Write table.md, table.csv (full precision), table.tex and, unless they are empty, the others.

    These are reported.csv, against.csv and pairs.csv.

    Args:
        own: The numbers.
        folder: Where to write; it is created if needed.
        experiment: The experiment, for its title and note.

    Returns:
        The paths of the written files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"table.{kind}" for kind in ("md", "csv", "tex")]
    paths[0].write_text(text(own, experiment) + "\n", encoding="utf-8")
    own.numbers.to_csv(paths[1], index=False)
    cells = printed(own.numbers)
    paths[2].write_text(rendering.latex(cells, labels(cells)), encoding="utf-8")
    for name in ("reported", "against", "pairs"):
        table, path = getattr(own, name), folder / f"{name}.csv"
        path.unlink(missing_ok=True)  # of an earlier call
        if len(table):
            paths.append(path)
            table.to_csv(path, index=False)
    return paths
