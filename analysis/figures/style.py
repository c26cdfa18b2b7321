"""The common style of all figures: fonts, colours, and how a figure is saved and shown.

Figures are made without pyplot, whose backend belongs to the user's own plots.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
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
    "savefig.facecolor": "white",  # keeps the figure readable on a dark page
    "pdf.fonttype": 42,
}
PAGE = 11.0  # maximal width of sections side by side, in inches
# Okabe and Ito: distinguishable for colour-blind readers and in greyscale
PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442", "#000000"]
PALETTE += ["#332288", "#882255", "#999933", "#44AA99", "#AA4499"]  # from Tol's muted palette
COLOURS = {"pld": "#D55E00", "ce": "#7f7f7f", "kd": "#0072B2", "dist": "#009E73", "dkd": "#CC79A7"}


class Picture(Figure):
    """A figure that a notebook shows by itself."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.savefig(content, format="png")
        return content.getvalue()


def save(figure: Figure, path: Path) -> Path:
    """Write PATH.png and PATH.pdf, and return the path of the PNG file."""
    with matplotlib.rc_context(STYLE):
        figure.set_dpi(STYLE["savefig.dpi"])  # the width of a text depends on it
        figure.draw_without_rendering()
        figure.set_layout_engine(None)  # all is in its place; do not arrange it for each file again
        box = figure.get_tightbbox().padded(matplotlib.rcParams["savefig.pad_inches"])
        for kind in ("pdf", "png"):
            # Without a creation date, the same numbers give the same bytes.
            metadata = {"CreationDate": None} if kind == "pdf" else None
            figure.savefig(path.with_suffix(f".{kind}"), metadata=metadata, bbox_inches=box)
    return path.with_suffix(".png")


def escaped(text: str) -> str:
    """Return a text in which a dollar sign begins no formula."""
    return text.replace("$", r"\$")


def save_all(pictures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write figures by their names into a folder, which is created if needed; see `save`."""
    folder.mkdir(parents=True, exist_ok=True)
    return [save(picture, folder / name) for name, picture in pictures.items()]


def method_colours(records: pd.DataFrame) -> dict[str, str]:
    """Return a colour for each method.

    The first method of a loss in COLOURS gets that colour; the others get the next colours of
    PALETTE. Of more methods than colours, those of a loss share one.
    """
    methods = records[["method", "loss"]].drop_duplicates().values.tolist()
    found: dict[str, str] = {}
    for method, loss in methods:
        own = COLOURS.get(loss)
        if own is not None and own not in found.values():
            found[method] = own
    spare = [colour for colour in PALETTE if colour not in found.values()] or PALETTE
    others = [method for method, _ in methods if method not in found]
    if len(methods) > len(PALETTE):
        spares = [loss for loss in dict.fromkeys(records["loss"]) if loss not in COLOURS]
        shared = COLOURS | {loss: spare[i % len(spare)] for i, loss in enumerate(spares)}
        return {method: shared[loss] for method, loss in methods}
    return found | {method: spare[i % len(spare)] for i, method in enumerate(others)}
