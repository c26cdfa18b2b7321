"""The tables of literature.py as Markdown that lines up as text, as CSV and as LaTeX (booktabs)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.tables import rendering
from analysis.tables.literature import ALL, MEASURES, PAIR, TEACHER, Literature
from analysis.tables.rendering import MISSING, signed
from analysis.tables.reported import network
from pld_ray.config.experiment import Experiment

LABELS = 2  # leading columns of `printed` that identify the row
KINDS = {
    "homogeneous": "Homogeneous pairs",
    "heterogeneous": "Heterogeneous pairs",
    "all": "All pairs",
}


def kinds(found: Literature) -> list[str]:
    """Return the kinds of pairs of an experiment, which have a table each."""
    return [kind for kind in KINDS if (found.cells["kind"] == kind).any()]


def printed(found: Literature, kind: str, repeat: bool = False) -> pd.DataFrame:
    """Format the results on one kind of pairs as strings.

    Args:
        found: The numbers.
        kind: "homogeneous" or "heterogeneous".
        repeat: Whether each line names its method, and not only the first of a method.

    Returns:
        Up to three lines for each method: our last epoch, our best epoch, and what is reported;
        lines without a number are left out if the method has another one. The columns have two
        levels: teacher and student.
    """
    cells = found.cells[found.cells["kind"] == kind]
    several = cells["dataset"].nunique() > 1
    columns: dict[tuple[str, str], dict[Any, Any]] = {}
    pairs: Any = cells.groupby(PAIR, sort=False)
    for (dataset, teacher, student), group in pairs:
        head = network(teacher), network(student) + (f" ({dataset})" if several else "")
        columns[head] = {row["method"]: row for row in group.to_dict("records")}
    lines = []
    for method in dict.fromkeys(cells["method"]):
        rows = [column.get(method) for column in columns.values()]
        texts = {measure: [_ours(row, measure) for row in rows] for measure in MEASURES}
        texts["reported"] = [_reported(row) for row in rows]
        told = [name for name, line in texts.items() if {*line} - {"", MISSING}] or ["last"]
        for name in told:
            shown = method if repeat or name == told[0] else ""
            lines.append([shown, name, *texts[name]])
    heads = [("Teacher →", "Student"), ("Top-1 %", ""), *columns]
    return pd.DataFrame(lines, columns=pd.MultiIndex.from_tuples(heads))


def _ours(row: dict[Any, Any] | None, measure: str) -> str:
    """Format our mean ± std of an epoch, and n if some trials have not finished."""
    if row is None or not row["planned"]:
        return ""
    if not (n := row[f"{measure}_n"]):
        return MISSING
    text = number(row[measure], row[f"{measure}_std"])
    return text if n == row["planned"] else f"{text} (n={n})"


def _reported(row: dict[Any, Any] | None) -> str:
    """Format the range of the reported results, with the number of sources if there are several."""
    if row is None or not row["sources"]:
        return ""
    low, high = f"{row['low']:.2f}", f"{row['high']:.2f}"
    text = low if low == high else f"{low}–{high}"
    return text if row["sources"] == 1 else f"{text} ({row['sources']})"


def number(mean: float, std: float) -> str:
    """Format a number as mean ± std; NaN becomes a dash."""
    if math.isnan(mean):
        return MISSING
    return f"{mean:.2f}" + ("" if math.isnan(std) else f" ± {std:.2f}")


def printed_methods(found: Literature, kind: str) -> pd.DataFrame:
    """Format the ranks and gains of the methods on one kind of pairs as strings.

    Args:
        found: The numbers.
        kind: "homogeneous", "heterogeneous" or "all".

    Returns:
        One line per method, without columns of which nothing is known. It is empty if nothing is.
    """
    table = found.methods[found.methods["kind"] == kind]
    lines = []
    for row in table.to_dict("records"):
        pairs, ranks = row["pairs"], [row[f"rank_{measure}"] for measure in MEASURES]
        line = [row["method"], *("" if math.isnan(rank) else f"{rank:.2f}" for rank in ranks)]
        for base in ("ce", "kd"):
            for name in ("last", "reported"):
                value, count = row[f"over_{base}_{name}"], row[f"over_{base}_{name}_pairs"]
                line.append(_gain(value, count, pairs))
        n = row["best_minus_last_n"]
        line.append(f"{signed(row['best_minus_last'])} ({n})" if n else "")
        if any(line[1:]):
            lines.append(line)
    heads = [("Method", ""), *(("Rank", _ranked(table, measure)) for measure in MEASURES)]
    heads += [("over CE", "last"), ("over CE", "reported"), ("over KD", "last")]
    heads += [("over KD", "reported"), ("best −", "last (n)")]
    cells = pd.DataFrame(lines, columns=pd.MultiIndex.from_tuples(heads))
    return cells.loc[:, (cells != "").any()]


def _ranked(table: pd.DataFrame, measure: str) -> str:
    """Return the name of an epoch, and over how many pairs methods are ranked if not over all."""
    pairs, count = table["pairs"].max(), table[f"ranked_{measure}"].max()
    return f"{measure} ({count:.0f}/{pairs})" if 0 < count < pairs else measure


def _gain(value: float, count: float, pairs: int) -> str:
    """Format a mean gain over pairs, and over how many if these are not all."""
    if math.isnan(value):
        return ""
    return signed(value) if count == pairs else f"{signed(value)} ({count:.0f}/{pairs})"


def printed_sources(found: Literature) -> Iterator[tuple[str, pd.DataFrame, list[str]]]:
    """Yield for each pair its title, one line per reported result as strings, and the notes."""
    pairs: Any = found.sources.groupby(PAIR, sort=False)
    for (_, teacher, student), group in pairs:
        rows: list[dict[str, str]] = []
        notes: dict[str, int] = {}
        for row in group.to_dict("records"):
            parts = [f"apart: {row['apart']}" if row["apart"] else "", row["note"]]
            note = "; ".join(part for part in parts if part)
            at = notes.setdefault(note, len(notes) + 1) if note else ""
            rows.append(
                {
                    "Method": row["method"],
                    "Source": row["source"].rpartition("/")[2],
                    "Epoch": row["epoch"] or "?",
                    "Reported": number(row["reported"], row["reported_std"])
                    + ("" if math.isnan(row["reported_n"]) else f" (n={row['reported_n']:.0f})"),
                    "Ours": number(row["ours"], math.nan),
                    "Difference": signed(row["difference"]),
                    "Note": f"{at}{'*' if row['apart'] else ''}",
                }
            )
        if not group["ours"].notna().any():
            for row in rows:
                del row["Ours"], row["Difference"]
        said = [f"{at}: {note}" for note, at in notes.items()]
        yield f"{network(teacher)} → {network(student)}", pd.DataFrame(rows), said


SOURCES = (
    "Epoch: which one the source prints, ? if it does not say. Ours is the best epoch beside a "
    "best one, and the last epoch otherwise. *: stands apart, and is left out of ranges and gains."
)


def legend(found: Literature) -> list[str]:
    """Return the sentences that explain the tables."""
    cells = found.cells[found.cells["method"] != TEACHER]
    done = cells[cells["last_n"] > 0]
    said = []
    if len(done):
        few, most = done["planned"].min(), done["planned"].max()
        n = f"{most}" if few == most else f"{few} to {most}"
        said.append(
            f"last, best: our last epoch and our best epoch, chosen on the images that measure it; "
            f"mean ± standard deviation over n = {n} seeds, n= where trials are missing."
        )
    if len(found.sources):
        said.append(
            "reported: the only value, or lowest–highest (number of sources that print one; later "
            "tables often repeat an earlier one). RepDistiller prints the last epoch; mdistiller "
            "and logit-standardization-KD print the best one on the test images; the others do not "
            "say. Recipes differ between sources and from ours."
        )
        apart = int(found.cells["apart"].sum())
        if apart:
            said.append(
                f"{apart} reported results are left out because they stand apart (own teachers, "
                "other losses, misprints); the table of sources has them with the reason."
            )
    else:
        said.append("No source reports a result on these pairs and this dataset.")
    if found.unshown:
        said.append(f"{found.unshown} other methods are reported on these pairs: --all-methods.")
    if found.miniature:
        said.append(
            "Ours are those of a miniature, which has other data: they are not comparable with the "
            "reported ones."
        )
    return said


def legend_methods(found: Literature) -> list[str]:
    """Return the sentences that explain the tables of `printed_methods`."""
    said = [
        "Rank: mean over the pairs on which all methods are complete, 1 is best. over CE, over KD: "
        "mean gain over the pairs on which both methods are complete, in points; reported: of two "
        "results of one source. (k/m): over k of m pairs. Homogeneous: the names of teacher and "
        "student begin with the same letters."
    ]
    total = found.methods[found.methods["method"] == ALL].iloc[-1]
    if total["best_minus_last_n"]:
        said.append(
            f"To print the best epoch instead of the last one is worth "
            f"{signed(total['best_minus_last'])} points here, as the mean over "
            f"{total['best_minus_last_n']} trials."
        )
    return said


def _filled(sentences: list[str], width: int | None, indent: str = "") -> str:
    """Return sentences as lines of up to 100 characters, or `width` if that is less."""
    most = min(width or 100, 100)
    told = " ".join(sentences)
    return textwrap.fill(told, most, break_on_hyphens=False, subsequent_indent=indent)


def text(
    found: Literature, experiment: Experiment, width: int | None = None, sources: bool = False
) -> str:
    """Format the tables as Markdown whose columns also line up as plain text.

    Args:
        found: The numbers.
        experiment: The experiment, for its title.
        width: The width to which tables of many pairs are cut, in characters; None: not at all.
        sources: Whether to add one line per reported result.
    """
    parts = [f"{experiment.title or experiment.name}, beside the literature"]
    for kind in kinds(found):
        parts.append(f"{KINDS[kind]}:")
        parts += [
            rendering.markdown(part, LABELS) for part in _cut(printed(found, kind), LABELS, width)
        ]
    parts.append(_filled(legend(found), width))
    shown = [(kind, printed_methods(found, kind)) for kind in KINDS]
    for kind, table in shown:
        if len(table):
            pairs = found.methods.loc[found.methods["kind"] == kind, "pairs"].iloc[0]
            parts.append(f"{KINDS[kind]} ({pairs}), by method:")
            parts += [rendering.markdown(part, 1) for part in _cut(table, 1, width)]
    if any(len(table) for _, table in shown):
        parts.append(_filled(legend_methods(found), width))
    if sources:
        parts.append(text_sources(found, width))
    return "\n\n".join(parts)


def text_sources(found: Literature, width: int | None = None) -> str:
    """Format one line per reported result as Markdown, a table for each pair."""
    parts = []
    for title, table, notes in printed_sources(found):
        parts += [f"{title}, every source:", rendering.markdown(table, 3)]
        if notes:
            parts.append("\n".join(_filled([f"- {note}"], width, "  ") for note in notes))
    return "\n\n".join([*parts, _filled([SOURCES], width)])


def _cut(cells: pd.DataFrame, labels: int, width: int | None) -> list[pd.DataFrame]:
    """Return a table in parts that are not wider than `width`, each with the leading labels."""
    columns = list(cells.columns)
    if width is None:
        return [cells]
    lengths = [
        3 + max(*map(len, column), *(len(str(value)) for value in cells[column]), 3)
        for column in columns
    ]
    first = sum(lengths[:labels]) + 1
    parts: list[list[Any]] = [[]]
    used = first
    for column, length in zip(columns[labels:], lengths[labels:], strict=True):
        if parts[-1] and used + length > width:
            parts.append([])
            used = first
        parts[-1].append(column)
        used += length
    return [cells[[*columns[:labels], *part]] for part in parts]


def write(found: Literature, folder: Path, experiment: Experiment) -> list[Path]:
    """Write the tables as Markdown, CSV (long form, full precision) and LaTeX.

    Args:
        found: The numbers.
        folder: Where to write; it is created if needed.
        experiment: The experiment, for its title.

    Returns:
        The paths: literature.md, .csv and .tex; literature-methods.csv with ranks and gains; and,
        if anything is reported, literature-sources.md and .csv with one row per reported result.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"literature.{kind}" for kind in ("md", "csv", "tex")]
    paths.append(folder / "literature-methods.csv")
    paths[0].write_text(text(found, experiment) + "\n", encoding="utf-8")
    found.cells.to_csv(paths[1], index=False)
    tables = [rendering.latex(printed(found, kind), LABELS) for kind in kinds(found)]
    methods = [printed_methods(found, kind) for kind in KINDS]
    tables += [rendering.latex(table, 1) for table in methods if len(table)]
    paths[2].write_text("\n".join(tables), encoding="utf-8")
    found.methods.to_csv(paths[3], index=False)
    more = [folder / f"literature-sources.{kind}" for kind in ("md", "csv")]
    for path in more:
        path.unlink(missing_ok=True)  # of an earlier call
    if len(found.sources):
        paths += more
        more[0].write_text(text_sources(found) + "\n", encoding="utf-8")
        found.sources.to_csv(more[1], index=False)
    return paths
