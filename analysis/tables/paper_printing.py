"""Print and write the tables of the paper: our numbers with the reported ones beside them."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from analysis.statistics import paired
from analysis.tables import rendering
from analysis.tables.paper_entries import Entry, gains
from analysis.tables.paper_tables import METRICS, PaperTable, title
from analysis.tables.rendering import MISSING, signed


def _number(value: float, std: float) -> str:
    """Format a number as mean±std."""
    if math.isnan(value):
        return MISSING
    return f"{value:.2f}" + ("" if math.isnan(std) else f"±{std:.2f}")


def _cell(entry: Entry | None, alone: bool, compare: bool) -> str:
    """Format one cell: ours [reported, difference]."""
    if entry is None:
        return ""
    reported = _number(entry.reported, entry.reported_std)
    if alone:
        return reported
    text = _number(entry.mean, entry.std)
    if entry.scores and len(entry.scores) < entry.planned:
        text += f" (n={len(entry.scores)})"
    if entry.best:
        text = f"**{text}**"
    if math.isnan(entry.reported):
        return text
    known = compare and entry.scores
    return f"{text} [{reported}{f', {signed(entry.mean - entry.reported)}' if known else ''}]"


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
            line[column] = _cell(at.get((row, column)), alone, not miniature)
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
    if any(entry.best for entry in found):
        text += (
            " Bold: better than every other method at its place; p is below 0.05 with Holm's "
            "correction over the table."
        )
    if "train_minutes" in table.metrics:
        text += " Minutes include the time of the teacher's forward passes that the bank saved."
    return text


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
                "best": entry.best,
            }
        )
    pd.DataFrame(rows).to_csv(paths[1], index=False)
    tex = [rendering.latex(printed(table, found, miniature), 1)]
    if table.gains:
        tex.append(rendering.latex(printed_gains(table, found, miniature), 1))
    paths[2].write_text("\n".join(tex), encoding="utf-8")
    return paths
