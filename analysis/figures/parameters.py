"""What a grid varies: its parameters, how they are named and placed, and how much they matter."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.figures.style import escaped
from analysis.records.frames import SYMBOLS
from pld_ray.losses import REGISTRY

NONE = "none"  # a setting that is None
PREFIX = "trial."
PAIR = ["student", "teacher"]
Scale = Literal["linear", "log", "ordinal"]


@dataclass(frozen=True)
class Parameter:
    """A setting that varies.

    Attributes:
        column: Its column in the records, such as "trial.optimizer.lr".
        values: Its values: numbers in ascending order, or categories in the order of the grid.
        scale: How numbers are placed on an axis; None for categories.
        label: The field, if the column has another name.
    """

    column: str
    values: tuple[Any, ...]
    scale: Scale | None
    label: str = ""

    @property
    def name(self) -> str:
        """The name for people: the field, with the symbol of a parameter of a loss."""
        field = self.label or self.column.removeprefix(PREFIX)
        short = field.removeprefix("loss.")
        return f"{short} ({SYMBOLS[short]})" if len(SYMBOLS.get(short, "")) == 1 else short

    def at(self, value: Any) -> float:
        """Return the place of a value on an axis."""
        return float(value) if self.scale in ("linear", "log") else self.values.index(value)

    def dress(self, axis: Axes) -> None:
        """Set the scale, the ticks and the label of the x-axis."""
        if self.scale == "log":
            axis.set_xscale("log")
        if self.scale in ("linear", "log") and len(self.values) > 8:
            chosen = self.values[:: math.ceil(len(self.values) / 8)]
        else:
            chosen = self.values
        shown = texts(chosen)
        axis.set_xticks([self.at(value) for value in chosen], shown)
        axis.minorticks_off()
        axis.tick_params(axis="x", rotation=30 if sum(map(len, shown)) > 36 else 0)
        axis.set_xlabel(self.name)


def parameters(records: pd.DataFrame) -> list[Parameter]:
    """Return the settings that vary within a loss and a pair of networks.

    A setting that others determine is left out, such as the second of two that the grid varies
    together.

    Args:
        records: Records as returned by `records.frames.frame`.
    """
    records = prepared(records)
    columns = [str(name) for name in records if str(name).startswith(PREFIX)]
    columns.sort(key=lambda name: not name.startswith("trial.loss."))
    found: list[Parameter] = []
    for column in columns:
        groups = [records[name] for name in [*PAIR, "loss", *(each.column for each in found)]]
        if (records[column].groupby(groups, dropna=False).nunique() > 1).any():
            found.append(parameter(records, column))
    return found


def prepared(records: pd.DataFrame) -> pd.DataFrame:
    """Return the records with settings that can be grouped.

    A setting that is None is "none", lists become text, and a parameter that the loss does not have
    is NaN.
    """
    columns = [str(name) for name in records if str(name).startswith(PREFIX)]
    return records.assign(**{column: _cleaned(records, column) for column in columns})


def _cleaned(records: pd.DataFrame, column: str) -> pd.Series:
    """Return one column as `prepared` does."""
    field = column.removeprefix("trial.loss.")
    losses = records["loss"].unique()
    have = {loss for loss in losses if field == column or field in REGISTRY[loss].model_fields}
    values = [
        (NONE if _missing(value) else str(value) if isinstance(value, list | dict) else value)
        if loss in have
        else math.nan
        for loss, value in zip(records["loss"].tolist(), records[column].tolist(), strict=True)
    ]
    return pd.Series(values, index=records.index, dtype=object)


def parameter(records: pd.DataFrame, column: str) -> Parameter:
    """Return a column of prepared records as a parameter."""
    known = [value for value in records[column].unique() if not _missing(value)]
    numeric = all(isinstance(v, numbers.Real) and not isinstance(v, bool | np.bool_) for v in known)
    if not numeric or len(known) < 3:
        return Parameter(column, tuple(known), None)
    ordered = tuple(sorted(known))
    return Parameter(column, ordered, scale_of(np.array(ordered, dtype=float)))


def scale_of(values: np.ndarray[Any, Any]) -> Scale:
    """Return the scale on which sorted values have the most even distances."""
    positive = values[values > 0]
    if len(positive) < 3 or positive[-1] < 8 * positive[0]:
        return "linear"
    steps, ratios = np.diff(positive), np.diff(np.log(positive))
    if ratios.std() / ratios.mean() >= steps.std() / steps.mean():
        return "linear"
    return "log" if values[0] > 0 else "ordinal"


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def texts(values: Iterable[Any]) -> list[str]:
    """Format values of a parameter, with as many digits as it takes to tell them apart."""
    values = list(values)
    found: list[str] = []
    for digits in (4, 6, 9, 17):
        found = [_text(value, digits) for value in values]
        if len(set(found)) == len(set(values)):
            break
    return found


def _text(value: Any, digits: int) -> str:
    if isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_):
        number = float(value)
        whole = number.is_integer() and abs(number) < 1e6
        return str(int(number)) if whole else f"{number:.{digits}g}"
    return escaped(str(value))


def importance(records: pd.DataFrame, parameter: Parameter, metric: str = "top1") -> float:
    """Return the share of the variance between settings that one parameter explains by itself.

    It is the eta squared of the main effect, over the means of settings, averaged over the losses
    and pairs of networks; a loss without the parameter counts as 0.
    """
    records = records.assign(**{parameter.column: _cleaned(records, parameter.column)})
    shares = []
    for _, group in records.groupby([*PAIR, "loss"], sort=False):
        cells = group.groupby(["setting", "method"])[metric].mean().dropna()
        value = group.drop_duplicates(["setting", "method"]).set_index(["setting", "method"])
        means = cells.groupby(value[parameter.column].reindex(cells.index), dropna=False)
        between = ((means.transform("mean") - cells.mean()) ** 2).sum()
        total = ((cells - cells.mean()) ** 2).sum()
        shares.append(between / total if total > 1e-12 else 0.0)
    return float(np.mean(shares)) if shares else 0.0
