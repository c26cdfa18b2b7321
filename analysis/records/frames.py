"""Load the records of trials into DataFrames and summarize them over seeds."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from pld_ray.config.planning import Plan
from pld_ray.config.trial import Trial
from pld_ray.errors import InputError, nearest
from pld_ray.store.documents import parse_epochs
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
        - dataset: its name in YAML; "" if the trial has only a part of it (`holdout`, `limit`), and
          in a miniature, which has other data than it stands for.
        - own_metrics: the names of its metrics from plug-ins.
        - held_out: whether validation images are held-out training images (bool).
        - student, teacher: names of the networks. The teacher is the one that the experiment names,
          also for losses that do not use it.
        - setting: what else the grid varies.
        - method: label of the loss, with the parameters that vary.
        - original, original_teacher: in a miniature, the trial of the paper that this trial
          replaces, and its teacher.
        - looks: the numbers of seeds at which the methods are compared while more seeds are run; ()
          if the seeds are fixed.
        - reference: whether the other methods are compared with this one (bool).
        - finished: whether the trial has finished (bool).
        - notes: messages of the trial to the user.
        - every metric of the record, NaN where there is none; they are those of the last epoch.
        - best_top1: top-1 of the best epoch of those that were validated.
        - seconds: training time of the trial; teacher_seconds: the part of it that the teacher's
          forward passes took; teacher_avoided_seconds: teacher time that the teacher bank saved.
        - parameters: from the record.
        - teacher_top1: top-1 of the teacher, if the teacher is a finished trial of the plan.
        - trial.FIELD: the value of each setting that varies, such as trial.optimizer.lr; NaN for a
          parameter that the loss of the trial does not have.
    """
    records = store.records([*(cell.trial.id for cell in plan.cells), *plan.teacher_ids])
    varied = _varied(plan)
    rows: list[dict[Any, Any]] = []
    named: list[dict[Any, Any]] = places(plan).to_dict("records")
    references = _references(plan, named)
    for cell, original, place, reference, settings in zip(
        plan.cells, plan.originals, named, references, varied, strict=True
    ):
        record = records.get(cell.trial.id)
        whole = not (cell.trial.data.holdout or cell.trial.data.limit)
        row: dict[Any, Any] = {
            "id": cell.trial.id,
            **place,
            "loss": cell.trial.loss.name,
            "epochs": cell.trial.epochs,
            "optimizer": cell.trial.optimizer.name,
            "dataset": cell.trial.data.name if whole and not plan.experiment.miniature_of else "",
            "own_metrics": cell.trial.metrics,
            "held_out": bool(cell.trial.data.holdout),
            "original": original.trial,
            "original_teacher": original.teacher or "",
            "looks": plan.experiment.looks,
            "reference": reference,
            "finished": record is not None,
            "notes": [] if record is None else record.get("notes", []),
            "top1": float("nan"),
            **settings,
        }
        if record is not None:
            row |= record["metrics"] | {"seconds": record["seconds"]["seconds"]}
            row["best_top1"] = record.get("best_top1", float("nan"))
            for part in ("teacher_seconds", "teacher_avoided_seconds"):
                row[part] = record["seconds"].get(part, 0.0)
            row["parameters"] = record.get("parameters")
        if isinstance(cell.trial.teacher, Trial) and cell.trial.teacher.id in records:
            row["teacher_top1"] = records[cell.trial.teacher.id]["metrics"]["top1"]
        rows.append(row)
    empty = ["id", *GROUP, "seed", "loss", "dataset", "own_metrics", "held_out", "looks"]
    empty += ["reference", "finished", "notes", "top1"]
    frame = pd.DataFrame(rows, columns=None if rows else empty)
    frame = frame.astype({"finished": bool, "reference": bool})
    return frame.drop_duplicates(["id", *GROUP], ignore_index=True)


def places(plan: Plan) -> pd.DataFrame:
    """Return one row per cell with its place in tables: student, teacher, setting, method, seed."""
    rows = [
        {"student": cell.trial.student.name, "teacher": cell.teacher or "", "setting": setting}
        | {"method": method, "seed": cell.trial.seed}
        for cell, method, setting in zip(plan.cells, _methods(plan), _settings(plan), strict=True)
    ]
    return pd.DataFrame(rows)


def check_reference(plan: Plan) -> None:
    """Check that the plan has the method that its experiment names as the reference.

    Raises:
        InputError: None of the methods and losses of the plan has this name.
    """
    wanted = plan.experiment.reference
    if wanted and plan.cells and not any(_references(plan, places(plan).to_dict("records"))):
        losses = [cell.trial.loss for cell in plan.cells]
        known = {name for loss in losses for name in (loss.name, loss.label)} | {*_methods(plan)}
        raise InputError(
            f"{plan.experiment.name}: reference is {wanted!r}: expected a loss or a method of the "
            f"experiment; {nearest(wanted, known)}"
        )


def _references(plan: Plan, named: list[dict[Any, Any]]) -> list[bool]:
    """Return for each cell whether it belongs to the reference of its student and setting.

    Args:
        plan: The plan of an experiment.
        named: The rows of `places`.
    """
    losses = [cell.trial.loss for cell in plan.cells]
    original = plan.experiment.miniature_of
    methods = [place["method"] for place in named]
    wanted = plan.experiment.reference
    if not wanted and named:
        wanted = "pld" if any(loss.name == "pld" for loss in losses) else methods[0]
    if original is not None and wanted not in methods and original.search is None:
        methods = _methods(Plan(original, plan.originals))  # the miniature has other parameters
    if wanted not in methods and (found := wanted.partition(" (")[0]) in methods:
        wanted = found  # --set has left one setting of the loss, which has no parameters then
    exact = wanted in methods
    chosen: dict[Any, str] = {}
    sections = [tuple(place[name] for name in GROUP[:-1]) for place in named]
    for section, place, method, loss in zip(sections, named, methods, losses, strict=True):
        if wanted in ([method] if exact else [loss.name, loss.label]):
            chosen.setdefault(section, place["method"])
    return [
        chosen.get(section) == place["method"]
        for section, place in zip(sections, named, strict=True)
    ]


def curves(records: pd.DataFrame, store: Store) -> pd.DataFrame:
    """Return one row per epoch of each cell, also of cells that have not finished.

    Args:
        records: Records as returned by `frame`.
        store: The store that holds the epochs.

    Returns:
        A DataFrame with the columns of GROUP, seed, id and the metrics of the epoch.
    """
    labels = records[[*GROUP, "seed", "id"]]
    return labels.merge(epochs(labels["id"], store), on="id")


def epochs(trial_ids: Iterable[str], store: Store) -> pd.DataFrame:
    """Return one row per epoch of each trial, with the columns id, epoch and the metrics.

    A metric is NaN in an epoch that does not have it (see `validate_every`).
    """
    found = store.epoch_lines(trial_ids)
    tables = [_parsed(batch) for batch in _batches(found)]
    if not tables:
        return pd.DataFrame(columns=["id", "epoch"])
    table = pd.concat(tables, ignore_index=True)
    return table if "top1" in table else table.assign(top1=np.nan)  # nothing is validated yet


def _batches(lines: dict[str, bytes], most: int = 2**28) -> Iterator[dict[str, bytes]]:
    """Yield the epochs of trials in parts of about `most` bytes; Arrow reads up to 2 GiB."""
    batch: dict[str, bytes] = {}
    size = 0
    for key, content in lines.items():
        batch[key] = content
        size += len(content)
        if size > most:
            yield batch
            batch, size = {}, 0
    if batch:
        yield batch


def _parsed(lines: dict[str, bytes]) -> pd.DataFrame:
    """Return the epochs of trials, which are lines of JSON, as a table."""
    from pyarrow import ArrowInvalid, json

    parts = {key: content.strip().splitlines() for key, content in lines.items()}
    ids = np.repeat(list(parts), [len(part) for part in parts.values()])
    content = b"\n".join(line for part in parts.values() for line in part)
    whole = json.ReadOptions(use_threads=False, block_size=len(content) + 1)
    try:
        table = json.read_json(io.BytesIO(content), whole).to_pandas()
    except ArrowInvalid:  # such as a metric that is a number in one trial and a text in another
        rows = [epoch for part in lines.values() for epoch in parse_epochs(part)]
        table = pd.DataFrame(rows)
    table.insert(0, "id", ids)
    return table


def summary(records: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """Return the mean and standard deviation (n - 1) over seeds of each metric.

    Args:
        records: Records as returned by `frame`.
        metrics: Names of the metrics.

    Returns:
        One row per group, in the order of the records, with the columns of GROUP, planned (number
        of cells), n (number of finished cells), loss, reference, and METRIC and METRIC_std for each
        metric.
    """
    groups = records.groupby(GROUP, sort=False)
    table = groups.agg(
        planned=("seed", "size"),
        n=("finished", "sum"),
        loss=("loss", "first"),
        reference=("reference", "first"),
    )
    known = [metric for metric in metrics if metric in records]
    means, spreads = groups[known].mean(), groups[known].std()
    for metric in metrics:
        table[metric] = means[metric] if metric in records else np.nan
        table[f"{metric}_std"] = spreads[metric] if metric in records else np.nan
    return table.reset_index()


def _listed(value: Any) -> str:
    """Return a value as tables show it; the parts of a list follow each other."""
    parts = value if isinstance(value, tuple) else (value,)
    return " ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in parts)


def _methods(plan: Plan) -> list[str]:
    """Return the label of each cell's loss, with the parameters that vary for the same loss.

    A parameter with string values, such as standardize, is shown for all losses that have it once
    it varies for one of them.
    """
    losses = {id(trial.loss): trial.loss for trial in plan.shown}  # the seeds of a cell share it
    values: dict[tuple[str, str], set[Any]] = {}
    for loss in losses.values():
        for field, value in loss:
            values.setdefault((loss.name, field), set()).add(value)
    varied = {field for (_, field), found in values.items() if len(found) > 1}
    labels = {}
    for key, loss in losses.items():
        differ = [
            f"{SYMBOLS.get(field, field)} = {_number(value, values[loss.name, field])}"
            if isinstance(value, float)
            else f"{field} = {_listed(value)}"
            for field, value in loss
            if len(values[loss.name, field]) > 1
            or (field in varied and isinstance(value, str) and field != "name")
        ]
        labels[key] = loss.label + (f" ({', '.join(differ)})" if differ else "")
    return [labels[id(trial.loss)] for trial in plan.shown]


def _number(value: float, values: set[Any]) -> str:
    """Format one of several values with as many digits as it takes to tell them apart."""
    numbers = [each for each in values if isinstance(each, float)]
    for digits in (6, 9):
        if len({f"{each:.{digits}g}" for each in numbers}) == len(numbers):
            return f"{value:.{digits}g}"
    return repr(value)


def _settings(plan: Plan) -> list[str]:
    """Return the other fields that vary between cells of a pair, such as "optimizer.name lamb"."""
    keys = [
        (cell.teacher, cell.trial.student.name, id(trial.flat))  # the seeds of a cell share `flat`
        for cell, trial in zip(plan.cells, plan.shown, strict=True)
    ]
    flat = dict(zip(keys, (trial.flat for trial in plan.shown), strict=True))
    values: dict[Any, set[str]] = {}
    for (*pair, _), settings in flat.items():
        for field, value in settings.items():
            values.setdefault((*pair, field), set()).add(str(value))
    labels = {
        key: ", ".join(f"{f} {v}" for f, v in settings.items() if len(values[(*key[:2], f)]) > 1)
        for key, settings in flat.items()
    }
    return [labels[key] for key in keys]


def _varied(plan: Plan) -> list[dict[str, Any]]:
    """Return for each cell those settings of its trial that vary, as the columns of `frame`."""
    trials = [cell.trial for cell in plan.cells]
    keys = [(id(trial.loss), id(trial.flat)) for trial in trials]
    rows = {
        key: {f"trial.loss.{name}": value for name, value in trial.loss if name != "name"}
        | {f"trial.{name}": value for name, value in trial.flat.items()}
        for key, trial in zip(keys, trials, strict=True)
    }
    values: dict[str, set[str]] = {}
    for row in rows.values():
        for name, value in row.items():
            values.setdefault(name, set()).add(str(value))
    shown = [name for name, found in values.items() if len(found) > 1]
    rows = {key: {name: row[name] for name in shown if name in row} for key, row in rows.items()}
    return [rows[key] for key in keys]
