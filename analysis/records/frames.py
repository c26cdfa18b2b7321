"""Load the records of trials into DataFrames and summarize them over seeds."""

from __future__ import annotations

from typing import Any

import pandas as pd

from pld_ray.config.planning import Plan
from pld_ray.config.trial import Trial
from pld_ray.store.store import Store

GROUP = ["student", "teacher", "setting", "method"]  # seeds are averaged within these columns

SYMBOLS = {"ce_weight": "CE", "temperature": "τ", "alpha": "α", "beta": "β", "gamma": "γ"}


def frame(plan: Plan, store: Store) -> pd.DataFrame:
    """Return one row per cell of a plan, in the plan's order.

    Cells with the same trial, student, teacher, setting and method are merged into one row.

    Args:
        plan: The plan of an experiment.
        store: The store that holds the records.

    Returns:
        A DataFrame with these columns:

        - id, seed, loss, epochs, optimizer: from the trial.
        - student, teacher: names of the networks. The teacher is the one that the experiment names,
          also for losses that do not use it.
        - setting: what else the grid varies.
        - method: label of the loss, with the parameters that vary.
        - original, original_teacher: in a miniature, the trial of the paper that this trial
          replaces, and its teacher.
        - finished: whether the trial has finished (bool).
        - notes: messages of the trial to the user.
        - every metric of the record, NaN where there is none.
        - seconds: training time of the trial; teacher_seconds: the part of it that the teacher's
          forward passes took; teacher_avoided_seconds: teacher time that the teacher bank saved.
        - parameters: from the record.
        - teacher_top1: top-1 of the teacher, if the teacher is a finished trial of the plan.
    """
    records = store.records([*(cell.trial.id for cell in plan.cells), *plan.teacher_ids])
    rows: list[dict[Any, Any]] = []
    named: list[dict[Any, Any]] = places(plan).to_dict("records")
    for cell, original, place in zip(plan.cells, plan.originals, named, strict=True):
        record = records.get(cell.trial.id)
        row: dict[Any, Any] = {
            "id": cell.trial.id,
            **place,
            "loss": cell.trial.loss.name,
            "epochs": cell.trial.epochs,
            "optimizer": cell.trial.optimizer.name,
            "original": original.trial,
            "original_teacher": original.teacher or "",
            "finished": record is not None,
            "notes": [] if record is None else record.get("notes", []),
            "top1": float("nan"),
        }
        if record is not None:
            row |= record["metrics"] | {"seconds": record["seconds"]["seconds"]}
            for part in ("teacher_seconds", "teacher_avoided_seconds"):
                row[part] = record["seconds"].get(part, 0.0)
            row["parameters"] = record.get("parameters")
        if isinstance(cell.trial.teacher, Trial) and cell.trial.teacher.id in records:
            row["teacher_top1"] = records[cell.trial.teacher.id]["metrics"]["top1"]
        rows.append(row)
    empty = ["id", *GROUP, "seed", "loss", "finished", "notes", "top1"] if not rows else None
    frame = pd.DataFrame(rows, columns=empty).astype({"finished": bool})
    return frame.drop_duplicates(["id", *GROUP], ignore_index=True)


def places(plan: Plan) -> pd.DataFrame:
    """Return one row per cell with its place in tables: student, teacher, setting, method, seed."""
    rows = [
        {"student": cell.trial.student.name, "teacher": cell.teacher or "", "setting": setting}
        | {"method": method, "seed": cell.trial.seed}
        for cell, method, setting in zip(plan.cells, _methods(plan), _settings(plan), strict=True)
    ]
    return pd.DataFrame(rows)


def curves(plan: Plan, store: Store) -> pd.DataFrame:
    """Return one row per epoch of each cell, also of cells that have not finished.

    Args:
        plan: The plan of an experiment.
        store: The store that holds the records.

    Returns:
        A DataFrame with the columns of GROUP, seed, id and the metrics of the epoch.
    """
    labels = frame(plan, store)[[*GROUP, "seed", "id"]]
    outcomes = store.outcomes(labels["id"])
    rows = [
        {**cell, **epoch}
        for cell in labels.to_dict("records")
        for epoch in outcomes[cell["id"]].epochs
    ]
    return pd.DataFrame(rows)


def summary(records: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """Return the mean and standard deviation (n - 1) over seeds of each metric.

    Args:
        records: Records as returned by `frame`.
        metrics: Names of the metrics.

    Returns:
        One row per group, in the order of the records, with the columns of GROUP, planned (number
        of cells), n (number of finished cells), loss, and METRIC and METRIC_std for each metric.
    """
    groups = records.groupby(GROUP, sort=False)
    table = groups.agg(planned=("seed", "size"), n=("finished", "sum"), loss=("loss", "first"))
    for metric in metrics:
        values = (
            records[metric] if metric in records else pd.Series(index=records.index, dtype=float)
        )
        by = values.groupby([records[name] for name in GROUP], sort=False)
        table[metric], table[f"{metric}_std"] = by.mean(), by.std()
    return table.reset_index()


def _methods(plan: Plan) -> list[str]:
    """Return the label of each cell's loss, with the parameters that vary for the same loss.

    A parameter with string values, such as standardize, is shown for all losses that have it once
    it varies for one of them.
    """
    losses = [trial.loss for trial in plan.shown]
    values: dict[tuple[str, str], set[Any]] = {}
    for loss in losses:
        for field, value in loss:
            values.setdefault((loss.name, field), set()).add(value)
    varied = {field for (_, field), found in values.items() if len(found) > 1}
    labels = []
    for loss in losses:
        differ = [
            f"{SYMBOLS.get(field, field)} = {value:g}"
            if isinstance(value, float)
            else f"{field} = {value}"
            for field, value in loss
            if len(values[loss.name, field]) > 1
            or (field in varied and isinstance(value, str) and field != "name")
        ]
        labels.append(loss.label + (f" ({', '.join(differ)})" if differ else ""))
    return labels


def _settings(plan: Plan) -> list[str]:
    """Return the other fields that vary between cells of a pair, such as "optimizer.name lamb"."""
    pairs = [(cell.teacher, cell.trial.student.name) for cell in plan.cells]
    flat = [trial.flat for trial in plan.shown]
    values: dict[Any, set[str]] = {}
    for pair, trial in zip(pairs, flat, strict=True):
        for field, value in trial.items():
            values.setdefault((pair, field), set()).add(str(value))
    return [
        ", ".join(f"{f} {value}" for f, value in trial.items() if len(values[pair, f]) > 1)
        for pair, trial in zip(pairs, flat, strict=True)
    ]
