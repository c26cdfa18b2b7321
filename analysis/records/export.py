"""Export trials for other programs as CSV or Parquet: one row per trial, with dotted columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from pld_ray.config.trial import Trial
from pld_ray.errors import InputError
from pld_ray.store.files import Files
from pld_ray.store.store import Outcome, Store

FORMATS = (".csv", ".parquet")


def frame(trials: dict[str, Trial], store: Store) -> pd.DataFrame:
    """Return a table with one row per trial.

    Args:
        trials: Trials by id.
        store: The store that holds their records.

    Returns:
        The columns id, label, epoch, state (done, failed, stopped, begun, not begun) and why, then
        trial.* (the spec of the trial), metrics.*, seconds.* and environment.* as in the record.
        For a trial that is not done, the metrics are those of its last epoch. Lists are written as
        JSON. docs/results.md names all columns.
    """
    rows = [_row(key, trials[key], outcome) for key, outcome in store.outcomes(trials).items()]
    table = pd.json_normalize(rows)
    for name in table:
        if table[name].dtype == "object":
            table[name] = table[name].map(_plain)
    return table


def _plain(value: Any) -> Any:
    """Convert lists and dictionaries to JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def _row(key: str, trial: Trial, outcome: Outcome) -> dict[str, Any]:
    """Return the row of one trial as a nested dictionary."""
    spec = trial.model_dump(mode="json")
    record, history = outcome.record, outcome.epochs
    row: dict[str, Any] = {"id": key, "label": trial.label, "epoch": len(history)}
    row |= {"state": "begun" if history else "not begun", "why": None, "trial": spec}
    if record is not None:
        kept = ("metrics", "seconds", "environment", "weights_sha256", "finished", "parameters")
        return row | {"state": "done", **{name: record.get(name) for name in kept}}
    if outcome.stopped is not None:
        row |= {"state": "stopped", "why": outcome.stopped["by"]}
    if outcome.failure is not None:
        row |= {"state": "failed", "why": outcome.failure["reason"]}
    spent = {"epoch", "teacher_images"}  # of one epoch; a record has the sums under seconds.*
    last = history[-1] if history else {}
    metrics = {k: v for k, v in last.items() if k not in spent and not k.endswith("seconds")}
    return row | ({"metrics": metrics} if metrics else {})


def check(path: Path) -> None:
    """Check that `write` supports the suffix of the path.

    Raises:
        InputError: If the suffix is neither .csv nor .parquet.
    """
    if path.suffix not in FORMATS:
        raise InputError(f"--to is {str(path)!r}: expected a name that ends in .csv or .parquet")


def write(table: pd.DataFrame, path: Path) -> None:
    """Write the table as CSV or Parquet, depending on the suffix of the path."""
    csv = path.suffix == ".csv"
    content = table.to_csv(index=False).encode() if csv else table.to_parquet(index=False)
    Files(path.parent).write(path.name, content)
