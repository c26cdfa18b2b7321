"""Export trials for other programs as CSV or Parquet: one row per trial, with dotted columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from pld_ray.config.trial import Trial
from pld_ray.errors import InputError
from pld_ray.store.files import Files
from pld_ray.store.outcomes import Outcome
from pld_ray.store.store import Store

FORMATS = (".csv", ".parquet")


def frame(trials: dict[str, Trial], store: Store) -> pd.DataFrame:
    """Return a table with one row per trial.

    Args:
        trials: Trials by id.
        store: The store that holds their records.

    Returns:
        The columns id, label, epoch, state (done, failed, stopped, begun, not begun) and why, then
        trial.* (the spec of the trial), metrics.*, seconds.* and environment.* as in the record.
        For a trial that is not done, each metric is that of the last epoch that has it. Lists are
        written as JSON. docs/results.md names all columns.
    """
    specs: dict[int, dict[str, Any]] = {}  # trials that differ only in the seed share theirs
    rows = []
    for key, outcome in store.outcomes(trials).items():
        trial = trials[key]
        if (shared := id(trial.settings)) not in specs:
            specs[shared] = _flat({"trial": trial.settings})
        row: dict[str, Any] = {"id": key, "label": trial.label}
        row |= _outcome(trial, outcome) | specs[shared] | {"trial.seed": trial.seed}
        rows.append(row)
    table = pd.DataFrame(rows)
    first = ["id", "label", "epoch", "state", "why"]
    spec = [name for name in table if str(name).startswith("trial.")]
    return table[[*first, *spec, *(name for name in table if name not in {*first, *spec})]]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings with dotted names; lists become JSON."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = json.dumps(value) if isinstance(value, list) else value
    return found


def _outcome(trial: Trial, outcome: Outcome) -> dict[str, Any]:
    """Return how far a trial is, why, and its metrics."""
    if outcome.finished:
        record = outcome.record or {}
        kept = ("metrics", "seconds", "environment", "weights_sha256", "finished", "parameters")
        row = {"epoch": trial.epochs, "state": "done", "why": None}
        return row | _flat({name: record.get(name) for name in kept})
    history = outcome.epochs
    row = {"epoch": len(history), "state": "begun" if history else "not begun", "why": None}
    if outcome.stopped is not None:
        row |= {"state": "stopped", "why": outcome.stopped["by"]}
    if outcome.failure is not None:
        row |= {"state": "failed", "why": outcome.failure["reason"]}
    spent = {"epoch", "teacher_images"}  # of one epoch; a record has the sums under seconds.*
    last = {name: value for epoch in history for name, value in epoch.items()}
    metrics = {k: v for k, v in last.items() if k not in spent and not k.endswith("seconds")}
    return row | _flat({"metrics": metrics})


def check(path: Path) -> None:
    """Check that `write` supports the suffix of the path.

    Raises:
        InputError: If the suffix is neither .csv nor .parquet.
    """
    if path.suffix not in FORMATS:
        raise InputError(f"--to is {str(path)!r}: expected a name that ends in .csv or .parquet")


def write(table: pd.DataFrame, path: Path) -> None:
    """Write the table as CSV or Parquet, depending on the suffix of the path."""
    content = _csv(table) if path.suffix == ".csv" else table.to_parquet(index=False)
    Files(path.parent).write(path.name, content)


def _csv(table: pd.DataFrame) -> bytes:
    """Return the table as CSV, by Arrow where it can, which takes a tenth of pandas' time."""
    import pyarrow as pa
    from pyarrow import csv

    try:
        columns = pa.Table.from_pandas(table, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # such as numbers and texts in one column
        return table.to_csv(index=False).encode()
    content = pa.BufferOutputStream()
    csv.write_csv(columns, content)
    return content.getvalue().to_pybytes()
