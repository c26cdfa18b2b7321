"""TensorBoard, MLflow and Weights & Biases through Ray's own callbacks (`pld-ray run --log`).

They are for looking on. What tables are made of stands in the store, and a trial does not depend
on them: when one fails it is left out from there on, and the run says so at its end.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ray.tune.callback import Callback
from ray.tune.logger import LoggerCallback, TBXLoggerCallback
from ray.tune.result import AUTO_RESULT_KEYS

from pld_ray.errors import InputError
from pld_ray.store.store import Store


def create(names: Iterable[str], experiment: str, store: Store) -> list[Logger]:
    """The loggers of these names, ready; InputError for one that cannot begin.

    What is local of theirs lies in the storage, or in ./results where that is an object store.
    """
    root = Path(store.uri if store.local else "results").resolve()
    loggers = []
    for name in dict.fromkeys(names):
        if name in ("mlflow", "wandb") and importlib.util.find_spec(name) is None:
            raise InputError(f"--log {name} needs another package: pip install 'pld-ray[{name}]'")
        try:
            inner = _MAKE[name](experiment, root)
            inner.setup()
        except Exception as error:
            raise InputError(f"--log {name}: {_said(error)}") from None
        loggers.append(Logger(name, inner, store))
    return loggers


def _said(error: Exception) -> str:
    """Its kind and its first line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


class Logger(Callback):
    """One of Ray's, told of whole trials: of one that goes on, the epochs of before as well."""

    def __init__(self, name: str, inner: LoggerCallback, store: Store) -> None:
        self.name, self.inner, self.store = name, inner, store
        self.begun: set[str] = set()
        self.problem: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks to restore an experiment; we never do

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Begin, once, with the epochs that are in the store."""
        self._tell(lambda: self._start(iteration, trial))

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        """An epoch is over; what a failed trial reports is none."""
        if "epoch" in result:
            self._tell(lambda: self._epoch(iteration, trial, result))

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """The trial has finished, or was stopped, or has failed in its own code."""
        self._tell(lambda: self._end(trial, self.store.failure(trial.config["id"]) is not None))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Its process died, attempt after attempt."""
        self._tell(lambda: self._end(trial, True))

    def on_experiment_end(self, trials: Any, **info: Any) -> None:
        """Wait until all of it has arrived."""
        self._tell(lambda: self.inner.on_experiment_end(trials, **info))

    def _start(self, iteration: int, trial: Any) -> None:
        self.inner.log_trial_start(trial)
        if trial.trial_id not in self.begun:
            self.begun.add(trial.trial_id)
            for epoch in self.store.epochs(trial.config["id"]):
                self._epoch(iteration, trial, epoch)

    def _epoch(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        ours = {name: value for name, value in result.items() if name not in AUTO_RESULT_KEYS}
        self.inner.log_trial_result(iteration, trial, ours | {"training_iteration": ours["epoch"]})

    def _end(self, trial: Any, failed: bool) -> None:
        self.inner.log_trial_end(trial, failed=failed)

    def _tell(self, what: Callable[[], None]) -> None:
        if self.problem is None:
            try:
                what()
            except Exception as error:
                self.problem = _said(error)


class _TensorBoard(TBXLoggerCallback):
    """Ray's, with a folder of our own for each trial."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def log_trial_start(self, trial: Any) -> None:
        if trial not in self._trial_writer:
            folder = self.folder / re.sub(r"[^\w.-]+", "-", str(trial))
            shutil.rmtree(folder, ignore_errors=True)  # of a run before: it is told again
            self._trial_writer[trial] = self._summary_writer_cls(str(folder), flush_secs=30)
            self._trial_result[trial] = {}


def _mlflow(experiment: str, root: Path) -> LoggerCallback:
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root}/mlflow.db"
    if uri == f"sqlite:///{root}/mlflow.db":
        root.mkdir(parents=True, exist_ok=True)
    return MLflowLoggerCallback(tracking_uri=uri, experiment_name=experiment)


def _wandb(experiment: str, root: Path) -> LoggerCallback:
    from ray.air.integrations.wandb import WandbLoggerCallback

    root.mkdir(parents=True, exist_ok=True)
    project = os.environ.get("WANDB_PROJECT") or "pld-ray"
    # Ray's process for it has the environment of the cluster, not of this command
    settings: dict[str, Any] = {
        name: os.environ.get(f"WANDB_{name.upper()}") for name in ("mode", "entity")
    }
    settings |= {"project": project, "group": experiment, "dir": str(root)}
    return WandbLoggerCallback(upload_timeout=120, **settings)


_MAKE: dict[str, Callable[[str, Path], LoggerCallback]] = {
    "tensorboard": lambda experiment, root: _TensorBoard(root / "tensorboard" / experiment),
    "mlflow": _mlflow,
    "wandb": _wandb,
}
