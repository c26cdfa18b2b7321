"""The numbers that the paper reports, and the trials they are of.

reported.csv holds every number of arXiv 2506.12542 v3 in long form. A row of it belongs to the
trials with its teacher, student, method and settings.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from pld_ray.config.trial import Trial

ALIASES = {  # Table 12's names for what Table 2 calls
    "mobilenetv4_large": "mobilenetv4_conv_large",
    "mobilenetv4_medium": "mobilenetv4_conv_medium",
    "mobilenetv4_small": "mobilenetv4_conv_small",
}
FIELDS = {"alpha": "ce_weight", "tau": "temperature", "label_smoothing": "smoothing"}


@cache
def rows() -> list[dict[str, Any]]:
    """All reported numbers, one a row: the columns of reported.csv."""
    text = {"params": str, "optimizer": str}
    found = pd.read_csv(Path(__file__).parent / "reported.csv", dtype=text)
    values: list[Any] = found.fillna({"params": "", "optimizer": ""}).to_dict("records")
    return values


def number(trial: Trial, teacher: str, table: int, metric: str) -> tuple[float, float]:
    """The reported mean and standard deviation of a trial's metric; NaN where there is none.

    By the table itself, or by another that names the settings of the same trial.
    """
    fitting = [row for row in rows() if row["metric"] == metric and _fits(row, trial, teacher)]
    own = [row for row in fitting if row["table"] == table]
    for row in own or [row for row in fitting if row["params"]]:
        return row["mean"], row["std"]
    return math.nan, math.nan


def teacher_top1(student: str, teacher: str, table: int) -> float:
    """The reported top-1 of the teacher of a pair; NaN where there is none."""
    for row in rows():
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
