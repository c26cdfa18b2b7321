"""One style for all figures: fonts, colours, and how a figure is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.dpi": 110,
    "savefig.dpi": 200,
    "savefig.bbox": "tight",
    "savefig.facecolor": "white",  # readable on a dark page too
    "pdf.fonttype": 42,
}
PAGE = 11.0  # inches that sections side by side may take
# Okabe and Ito: told apart by the colour-blind, and in grey
PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442", "#000000"]
PALETTE += ["#332288", "#882255", "#999933", "#44AA99", "#AA4499"]  # Tol's muted ones
COLOURS = {"pld": "#D55E00", "ce": "#7f7f7f", "kd": "#0072B2", "dist": "#009E73", "dkd": "#CC79A7"}


def save(figure: Figure, path: Path) -> Path:
    """Write PATH.png and PATH.pdf, close the figure, return the former."""
    for kind in ("pdf", "png"):
        # no date inside, so that the same numbers give the same bytes
        figure.savefig(
            path.with_suffix(f".{kind}"), metadata={"CreationDate": None} if kind == "pdf" else None
        )
    plt.close(figure)
    return path.with_suffix(".png")


def method_colours(records: pd.DataFrame) -> dict[str, str]:
    """A colour a method: the loss's own, or the next of the palette for its namesakes."""
    methods = records[["method", "loss"]].drop_duplicates().values.tolist()
    found: dict[str, str] = {}
    for method, loss in methods:
        own = COLOURS.get(loss)
        if own is not None and own not in found.values():
            found[method] = own
    spare = [colour for colour in PALETTE if colour not in found.values()] or PALETTE
    others = [method for method, _ in methods if method not in found]
    return found | {method: spare[i % len(spare)] for i, method in enumerate(others)}
