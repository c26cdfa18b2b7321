"""Format tables of strings as Markdown, LaTeX (booktabs) and HTML.

The Markdown also lines up as plain text. A cell in **two stars** is bold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import pandas as pd

MISSING = "–"

SIGNS = {  # characters that are commands in LaTeX
    "±": r"$\pm$",
    "τ": r"$\tau$",
    "α": r"$\alpha$",
    "β": r"$\beta$",
    "γ": r"$\gamma$",
    "→": r"$\rightarrow$",
    "‖": r"$\Vert$",
    "−": "$-$",
    "–": "--",
}


def signed(value: float) -> str:
    """Format a difference with its sign and two decimals; NaN becomes a dash."""
    return MISSING if math.isnan(value) else f"{round(value, 2) + 0.0:+.2f}".replace("-", "−")


def _heads(cells: pd.DataFrame) -> list[list[str]]:
    """Return the lines of a table's header: one, or one for each level of its columns."""
    levels = range(cells.columns.nlevels)
    return [[str(name) for name in cells.columns.get_level_values(level)] for level in levels]


def markdown(cells: pd.DataFrame, labels: int) -> str:
    """Format a table of strings as Markdown.

    Args:
        cells: The table. Further levels of its columns are the first rows, because Markdown has
            headers of one line.
        labels: The number of leading columns to align left; the others are aligned right.
    """
    texts = cells.astype(str).replace({r"\s*[\r\n]+\s*": " ", r"\|": r"\\|"}, regex=True)
    lines = [*_heads(cells), *texts.values.tolist()]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(lines[0]))]

    def row(line: list[str]) -> str:
        padded = [
            value.ljust(width) if i < labels else value.rjust(width)
            for i, (value, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = [
        "-" * width if i < labels else "-" * (width - 1) + ":" for i, width in enumerate(widths)
    ]
    return "\n".join([row(lines[0]), row(rule), *map(row, lines[1:])])


def latex(cells: pd.DataFrame, labels: int) -> str:
    """Format a table of strings as a LaTeX tabular with booktabs rules.

    Args:
        cells: The table. Each level of its columns is a line of the header.
        labels: The number of leading columns to align left; the others are aligned right.
    """
    styled = (
        cells.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    )
    aligned = "l" * labels + "r" * (len(cells.columns) - labels)
    tex = styled.to_latex(hrules=True, column_format=aligned, multicol_align="r")
    tex = re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", tex)
    for sign, command in SIGNS.items():
        tex = tex.replace(sign, command)
    return tex


def html(cells: pd.DataFrame, labels: int, trials: Sequence[str] = ()) -> str:
    """Format a table of strings as an HTML table.

    Args:
        cells: The table. Levels of its columns are joined.
        labels: The number of leading columns that are text; the others have the class n.
        trials: For each row the id of a trial whose settings it stands for, or "".
    """

    def row(values: list[str], tag: str, trial: str = "") -> str:
        parts = [
            f"<{tag}{'' if i < labels else ' class=n'}>{_escape(value)}</{tag}>"
            for i, value in enumerate(values)
        ]
        return f"<tr{trial and f' data-trial={trial}'}>{''.join(parts)}</tr>"

    names = [" ".join(parts).strip() for parts in zip(*_heads(cells), strict=True)]
    head, values = row(names, "th"), cells.astype(str).values.tolist()
    named = trials or [""] * len(values)
    body = "\n".join(row(each, "td", trial) for each, trial in zip(values, named, strict=True))
    return f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _escape(text: str) -> str:
    """Escape a text for HTML and make **starred** parts bold."""
    from html import escape

    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(text))
