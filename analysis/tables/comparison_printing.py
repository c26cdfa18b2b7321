"""The tables of comparison.py as Markdown that lines up as text, as CSV and as LaTeX (booktabs)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.statistics import paired
from analysis.statistics.sequential import Looks
from analysis.tables import rendering
from analysis.tables.comparison import GRID, SECTION, Tables, reference_name
from analysis.tables.rendering import MISSING, signed
from pld_ray.config.experiment import Experiment

TOP = 10  # settings of a loss that are printed by default
WIDEST = 12  # methods in a matrix of wins; more do not fit on a line


def printed(table: pd.DataFrame, top: int = 0) -> pd.DataFrame:
    """Format the table of `comparison` as strings: mean ± std, or a dash for a missing number.

    Args:
        table: The table of `comparison`, in the order of `ordered`.
        top: The number of settings of each loss and pair to show; 0 for all.
    """
    rows = []
    reference, place = reference_name(table), _places(table)
    if top:
        table = table[is_shown(table, top)]
    for row in table.to_dict("records"):
        teacher = row["loss"] == "teacher"
        cells = place(row)
        cells["Method"] = row["method"]
        cells["Top-1 %"] = _spread(row, "top1", 2)
        if reference:
            gain = row.get("gain")
            cells[f"{reference} gain"] = "" if gain is None or pd.isna(gain) else signed(gain)
        cells["KL(T‖S)"] = "" if teacher else _spread(row, "kl_teacher_student", 2)
        cells["Agreement %"] = "" if teacher else _spread(row, "agreement", 1)
        cells["ECE %"] = "" if teacher else _spread(row, "ece", 1, scale=100)
        for name in table.attrs.get("own_metrics", ()):
            cells[name] = "" if teacher else _spread(row, name, 3)
        cells["Seconds"] = "" if teacher else _spread(row, "seconds", 1)
        done, planned = row.get("n"), row.get("planned")
        whole = "" if teacher else f"{done:.0f}"
        cells["n"] = whole if teacher or done == planned else f"{whole} of {planned:.0f}"
        rows.append(cells)
    return pd.DataFrame(rows)


def _places(table: pd.DataFrame) -> Callable[[Any], dict[str, str]]:
    """Return a function of a row that gives its pair and its setting, where there are several."""
    several = [len(table[names].drop_duplicates()) > 1 for names in (SECTION[:2], SECTION[2:])]

    def place(row: Any) -> dict[str, str]:
        named = {"Pair": pair(row), "Setting": row["setting"]}
        return {name: named[name] for name, wanted in zip(named, several, strict=True) if wanted}

    return place


def is_shown(table: pd.DataFrame, top: int) -> pd.Series:
    """Return for each row whether it is printed.

    These are the first settings of each loss and pair, the teachers, and the best setting of the
    reference, with which the others are compared.
    """
    pairs = ["student", "teacher"]
    place = table.groupby([*pairs, "loss"], sort=False).cumcount()
    reference = table["reference"].astype(bool)
    own = reference & (table[reference].groupby(pairs).cumcount().reindex(table.index) == 0)
    return (place < top) | own | (table["loss"] == "teacher")


def _spread(row: dict[Any, Any], metric: str, digits: int, scale: float = 1) -> str:
    """Format a metric as mean ± standard deviation, or as a dash without a value."""
    mean, std = row.get(metric), row.get(f"{metric}_std")
    if mean is None or pd.isna(mean):
        return MISSING
    spread = "" if std is None or pd.isna(std) else f" ± {scale * std:.{digits}f}"
    return f"{scale * mean:.{digits}f}{spread}"


def pair(row: Any) -> str:
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
                "p": _p_value(row["corrected"]),
                "P(better) [95 %]": _probability(row),
                "W/T/L": f"{row['wins']:.0f}/{row['ties']:.0f}/{row['losses']:.0f}",
                "n": f"{row['n']:.0f}",
            }
        )
    return pd.DataFrame(lines)


def _p_value(p: float) -> str:
    """Format a p-value with three decimals."""
    return MISSING if math.isnan(p) else "<0.001" if p < 0.0005 else f"{p:.3f}"


def _probability(row: Any) -> str:
    """Format the probability of improvement with its interval."""
    found = f"{row['probability']:.2f}"
    if not math.isnan(row["probability_low"]):
        found += f" [{row['probability_low']:.2f}, {row['probability_high']:.2f}]"
    return found


def printed_wins(pairs: pd.DataFrame) -> pd.DataFrame:
    """Format the wins, ties and losses in the table of `all_pairs` as a matrix of strings.

    It has a row and a numbered column for each method. It is empty with two methods, and with too
    many for a line.
    """
    methods = list(dict.fromkeys([*pairs["method"], *pairs["against"]]))
    if not 2 < len(methods) <= WIDEST:
        return pd.DataFrame()
    cells = {}
    for row in pairs.to_dict("records"):
        wins, ties, losses = (f"{row[name]:.0f}" for name in ("wins", "ties", "losses"))
        cells[row["method"], row["against"]] = f"{wins}/{ties}/{losses}"
        cells[row["against"], row["method"]] = f"{losses}/{ties}/{wins}"
    numbered = list(enumerate(methods, 1))
    return pd.DataFrame(
        {"W/T/L": f"{number} {name}"}
        | {str(column): cells.get((name, other), "") for column, other in numbered}
        for number, name in numbered
    )


EXPLAINED_WINS = (
    "W/T/L: paired runs that the method of the row wins, ties and loses against the method of the "
    "column, which has the number in front of its name."
)


def printed_ranking(table: pd.DataFrame) -> pd.DataFrame:
    """Format the table of `comparison.ranking` as strings."""
    return pd.DataFrame(
        {"Method": table["method"], "Mean rank": table["rank"].map("{:.2f}".format)}
    )


def explained_ranking(table: pd.DataFrame) -> str:
    """Return the text under the table of `printed_ranking`."""
    said = table.attrs
    return (
        f"Mean rank over {said['blocks']} blocks (a seed on a pair and setting, with all methods "
        f"done); 1 is best. p of Friedman's test that all methods are equal: "
        f"{_p_value(said['p'])}. Nemenyi: two methods are different if their mean ranks differ by "
        f"more than {said['distance']:.2f} (5 % over all pairs)."
    )


def explained(comparisons: int, reference: str = "the method", looks: Looks = ()) -> str:
    """Return the text under a table of `printed_against`.

    Args:
        comparisons: The number of comparisons over which p is corrected, also those not shown.
        reference: The name of the method whose gains they are.
        looks: The numbers of seeds at which methods are compared; empty if the seeds are fixed.
    """
    repeated = ""
    if looks:
        repeated = (
            " Seeds are added until decided: n is that of the last of the looks, at "
            f"{', '.join(map(str, looks))} seeds; the interval of the gain and p are corrected for "
            "all looks."
        )
    return (
        f"Gain: top-1 of {reference} minus top-1 of the other, paired by seed; mean over pairs and "
        "seeds, with the 95\u00a0% confidence interval of one comparison. Effect: Cohen's d of the "
        f"differences. p: t-test, with Holm's correction over {comparisons} comparisons. "
        f"P(better): the probability that a run of {reference} beats a run of the other. "
        "W/T/L: paired runs that it wins, ties and loses. Bold: p is below 0.05. No interval: the "
        "runs say nothing, because they do not differ or because there are too few; it takes "
        f"{paired.ENOUGH} seeds on each pair, or {paired.ENOUGH} pairs.{repeated}"
    )


def printed_reported(reported: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Format the results from elsewhere as strings, beside our own.

    Args:
        reported: Results as returned by `records.imported.beside`.
        table: The table of `comparison`.
    """

    def score(mean: float, std: float, n: float, planned: float = math.nan) -> str:
        if math.isnan(mean):
            return MISSING
        spread = "" if math.isnan(std) else f" ± {std:.2f}"
        seeds = "" if math.isnan(n) or n == planned else f" (n = {n:.0f})"
        return f"{mean:.2f}{spread}{seeds}"

    lines, place = [], _places(table)
    for row in reported.to_dict("records"):
        missing = math.isnan(row["difference"])
        lines.append(
            place(row)
            | {
                "Method": row["method"],
                "Source": row["source"] + (f" ({row['note']})" if row["note"] else ""),
                "Reported top-1 %": score(row["reported"], row["reported_std"], row["reported_n"]),
                "Ours %": score(row["top1"], row["top1_std"], row["n"], row["planned"]),
                "Difference": MISSING if missing else signed(row["difference"]),
            }
        )
    return pd.DataFrame(lines)


REPORTED = (
    "Reported: results from elsewhere that were imported, with their standard deviation if it is "
    "known. Difference: ours minus reported. Both may come from other recipes, and an average over "
    "seeds here may stand beside a single run there."
)


def text(own: Tables, experiment: Experiment, top: int = TOP) -> str:
    """Format the tables as Markdown whose columns also line up as plain text.

    Args:
        own: The numbers.
        experiment: The experiment, for its title and note.
        top: The number of settings of each loss and pair to show; 0 for all.
    """
    table = own.numbers
    cells = printed(table, top)
    title, only = experiment.title or experiment.name, table.iloc[0]
    head = [title if "Pair" in cells else f"{title}: {pair(only)}", ""]
    tail = ["", *_legend(own, experiment, top)]
    if len(own.reported):
        shown = printed_reported(own.reported, table)
        tail += ["", rendering.markdown(shown, labels(shown)), "", textwrap.fill(REPORTED, 100)]
    against = shown_methods(own.against, table, top)
    if len(against):
        tail += ["", rendering.markdown(printed_against(against), 1)]
        tail += [
            "",
            textwrap.fill(explained(len(own.against), reference_name(table), own.looks), 100),
        ]
    if len(own.pairs):
        tail += ["", rendering.markdown(printed_against(own.pairs, True), 2), ""]
        tail.append(textwrap.fill(explained(len(own.pairs), looks=own.looks), 100))
        wins = printed_wins(own.pairs)
        if len(wins):
            tail += ["", rendering.markdown(wins, 1), "", textwrap.fill(EXPLAINED_WINS, 100)]
    if len(own.ranking):
        tail += ["", rendering.markdown(printed_ranking(own.ranking), 1), ""]
        tail.append(textwrap.fill(explained_ranking(own.ranking), 100))
    return "\n".join([*head, rendering.markdown(cells, labels(cells)), *tail])


def shown_methods(against: pd.DataFrame, table: pd.DataFrame, top: int) -> pd.DataFrame:
    """Return those comparisons whose method `printed` shows."""
    if not top or against.empty:
        return against
    return against[against["against"].isin(table.loc[is_shown(table, top), "method"])]


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
        + "Seconds: time for training, validation and the teacher on one worker; what a gang does "
        + "once for its trials counts in equal shares.",
        100,
    )


def order_legend(own: Tables, top: int = TOP) -> str:
    """Return a text that says in which order the settings are, and what is not shown.

    It is "" if each loss has one setting.
    """
    table = own.numbers[own.numbers["loss"] != "teacher"]
    settings = table.groupby(["student", "teacher", "loss"]).size()
    if settings.max() <= 1:
        return ""
    first = "setting" if top == 1 else f"{top} settings"
    cut = f"Of each loss, the first {first}; table.csv has all {len(table)}. "
    said = cut if top and settings.max() > top else ""
    if own.sort == GRID:
        return said
    said += f"The settings of a loss are in the order of {own.sort}, the best first. "
    return said + (
        "It is measured on held-out training images. "
        if own.held_out
        else "The images that choose the best setting also measure it, which favours losses with "
        "many settings: choose with data.holdout or a search, and compare on other seeds. "
    )


def _legend(own: Tables, experiment: Experiment, top: int) -> list[str]:
    """Return the lines of text below the table."""
    table = own.numbers
    lines = [*legend(table), *textwrap.wrap(order_legend(own, top), 100)]
    done = table[table["loss"] != "teacher"]
    if done["n"].sum() < done["planned"].sum():
        lines.append(f"{MISSING} and 'n of m' mark trials that have not finished.")
    return [*lines, *([experiment.note] if experiment.note else [])]


def write(own: Tables, folder: Path, experiment: Experiment, top: int = TOP) -> list[Path]:
    """Write table.md, table.csv (full precision), table.tex and, unless they are empty, the others.

    These are reported.csv, against.csv, pairs.csv and ranking.csv. The CSV files have all settings.

    Args:
        own: The numbers.
        folder: Where to write; it is created if needed.
        experiment: The experiment, for its title and note.
        top: The number of settings of each loss and pair in table.md and table.tex; 0 for all.

    Returns:
        The paths of the written files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"table.{kind}" for kind in ("md", "csv", "tex")]
    paths[0].write_text(text(own, experiment, top) + "\n", encoding="utf-8")
    own.numbers.to_csv(paths[1], index=False)
    cells = printed(own.numbers, top)
    paths[2].write_text(rendering.latex(cells, labels(cells)), encoding="utf-8")
    for name in ("reported", "against", "pairs", "ranking"):
        table, path = getattr(own, name), folder / f"{name}.csv"
        path.unlink(missing_ok=True)  # of an earlier call
        if len(table):
            paths.append(path)
            table.to_csv(path, index=False)
    return paths
