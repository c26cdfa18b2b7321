"""Trials as one table for other programs: CSV or Parquet, one row a trial, dotted columns."""

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
    """One row a trial.

    Columns: id, label, state (done, failed, stopped, begun, not begun), why, epoch, then trial.*
    (its spec), metrics.*, seconds.* and environment.* as the record has them; of a trial that is
    not done the metrics are those of its last epoch. Lists are JSON.
    """
    rows = [_row(key, trials[key], outcome) for key, outcome in store.outcomes(trials).items()]
    table = pd.json_normalize(rows)
    for name in table:
        if table[name].dtype == "object":
            table[name] = table[name].map(_plain)
    return table


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _row(key: str, trial: Trial, outcome: Outcome) -> dict[str, Any]:
    spec = trial.model_dump(mode="json")
    record, history = outcome.record, outcome.epochs
    row: dict[str, Any] = {"id": key, "label": trial.label, "epoch": len(history), "trial": spec}
    if record is not None:
        kept = ("metrics", "seconds", "environment", "weights_sha256", "finished", "parameters")
        return row | {"state": "done", **{name: record.get(name) for name in kept}}
    row |= {"state": "begun" if history else "not begun"}
    if outcome.stopped is not None:
        row |= {"state": "stopped", "why": outcome.stopped["by"]}
    if outcome.failure is not None:
        row |= {"state": "failed", "why": outcome.failure["reason"]}
    return row | ({"metrics": history[-1]} if history else {})


def check(path: Path) -> None:
    """InputError for an ending that `write` does not know."""
    if path.suffix not in FORMATS:
        raise InputError(f"--to is {str(path)!r}: expected a name that ends in .csv or .parquet")


def write(table: pd.DataFrame, path: Path) -> None:
    """Write the table as the ending of its path says."""
    csv = path.suffix == ".csv"
    content = table.to_csv(index=False).encode() if csv else table.to_parquet(index=False)
    Files(path.parent).write(path.name, content)
