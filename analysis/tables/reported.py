"""Look up the numbers that the paper reports for a trial.

reported.csv holds every number of arXiv 2506.12542 v3 in long form. A row matches a trial when the
teacher, student, method and settings are the same.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from pld_ray.config.trial import Trial

ALIASES = {  # names in Table 12 mapped to the names in Table 2
    "mobilenetv4_large": "mobilenetv4_conv_large",
    "mobilenetv4_medium": "mobilenetv4_conv_medium",
    "mobilenetv4_small": "mobilenetv4_conv_small",
}
# Parameter names in reported.csv mapped to fields of the losses
FIELDS = {"alpha": "ce_weight", "tau": "temperature", "label_smoothing": "smoothing"}


@cache
def rows() -> list[dict[str, Any]]:
    """Return all rows of reported.csv as dictionaries, one reported number per row."""
    text = {"params": str, "optimizer": str}
    found = pd.read_csv(Path(__file__).parent / "reported.csv", dtype=text)
    values: list[Any] = found.fillna({"params": "", "optimizer": ""}).to_dict("records")
    return values


def number(trial: Trial, teacher: str, table: int, metric: str) -> tuple[float, float]:
    """Return the reported mean and standard deviation of a metric of a trial.

    The given table is used first. If it has no matching row, the number comes from another table
    that states its settings and matches the trial.

    Args:
        trial: The trial to look up.
        teacher: Name of the teacher.
        table: Number of the table in the paper.
        metric: Metric, such as "top1".

    Returns:
        (mean, standard deviation); a number that the paper does not report is NaN.
    """
    fitting = [row for row in rows() if row["metric"] == metric and _fits(row, trial, teacher)]
    own = [row for row in fitting if row["table"] == table]
    for row in own or [row for row in fitting if row["params"]]:
        return row["mean"], row["std"]
    return math.nan, math.nan


def teacher_top1(student: str, teacher: str, table: int) -> float:
    """Return the reported top-1 of the teacher of a pair, or NaN if the table has none.

    Args:
        student: Name of the student.
        teacher: Name of the teacher.
        table: Number of the table in the paper.
    """
    for row in rows():
        if row["table"] == table and row["method"] == "teacher" and _pair(row, student, teacher):
            return row["mean"]
    return math.nan


def _fits(row: dict[str, Any], trial: Trial, teacher: str) -> bool:
    """Whether a reported row is about this trial with this teacher."""
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
    """Whether a reported row is about this pair of networks."""
    named: tuple[str, str] = row["student"], row["teacher"]
    return [ALIASES.get(name, name) for name in named] == [network(student), network(teacher)]


def network(name: str) -> str:
    """Return the paper's name of a network: without timm's tag and without the suffix "_cifar"."""
    return name.split(".")[0].removesuffix("_cifar")


def _same(text: str, value: Any) -> bool:
    """Whether a value in reported.csv equals the value of a setting."""
    return text == value if isinstance(value, str) or value is None else float(text) == value
