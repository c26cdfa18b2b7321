"""TensorBoard, MLflow and Weights & Biases, by the loggers of Ray Tune (`pld-ray run --log`).

Loggers are only for watching a run: all tables are made from the store. A logger that fails does
not affect trials. It is not called again, and the run reports the failure at its end.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray.tune.logger import LoggerCallback, TBXLoggerCallback

from pld_ray.errors import InputError
from pld_ray.store.store import Store
from pld_ray.sweep.gangs import Member


def create(names: Iterable[str], experiment: str, store: Store) -> list[Logger]:
    """Create and set up loggers by name.

    Local files of loggers are written to the root of the store, or to ./results if the store is an
    object store.

    Args:
        names: Names among tensorboard, mlflow and wandb. Repeated names count once.
        experiment: Name of the experiment, under which loggers group the trials.
        store: Store of the trials.

    Raises:
        InputError: The package of a logger is missing, or the logger cannot be set up.
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
    """Return the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


class Logger:
    """Passes trials to one of Ray's loggers.

    For a resumed trial, the logger first receives the epochs that are already in the store. After
    its first error, a logger is not called again.

    Args:
        name: Name of the logger for messages.
        inner: Ray's logger.
        store: Store of the trials.

    Attributes:
        problem: The first error of the logger, or None.
    """

    def __init__(self, name: str, inner: LoggerCallback, store: Store) -> None:
        self.name, self.inner, self.store = name, inner, store
        self.begun: set[Member] = set()
        self.problem: str | None = None

    def start(self, member: Member) -> None:
        """Start a trial, and the first time report the epochs that are in the store."""

        def start() -> None:
            self.inner.log_trial_start(member)
            if member not in self.begun:
                self.begun.add(member)
                for epoch in self.store.epochs(member.config["id"]):
                    self._epoch(member, epoch)

        self._tell(start)

    def epoch(self, member: Member, metrics: dict[str, Any]) -> None:
        """Report a finished epoch."""
        self._tell(lambda: self._epoch(member, metrics))

    def end(self, member: Member) -> None:
        """End a trial that finished, was stopped, or failed."""
        failed = self.store.failure(member.config["id"]) is not None
        self._tell(lambda: self.inner.log_trial_end(member, failed=failed))

    def close(self, trials: Any) -> None:
        """Wait until the logger has written everything."""
        self._tell(lambda: self.inner.on_experiment_end(trials))

    def _epoch(self, member: Member, metrics: dict[str, Any]) -> None:
        ours = metrics | {"training_iteration": metrics["epoch"]}
        ours.pop("id", None)
        self.inner.log_trial_result(0, member, ours)

    def _tell(self, what: Callable[[], None]) -> None:
        """Call the inner logger, unless it has failed before, and keep its first error."""
        if self.problem is None:
            try:
                what()
            except Exception as error:
                self.problem = _said(error)


class _TensorBoard(TBXLoggerCallback):
    """Ray's TensorBoard logger, with one folder per trial below `folder`."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def log_trial_start(self, trial: Any) -> None:
        if trial not in self._trial_writer:
            folder = self.folder / re.sub(r"[^\w.-]+", "-", str(trial))
            shutil.rmtree(folder, ignore_errors=True)  # from an earlier run; all is written again
            self._trial_writer[trial] = self._summary_writer_cls(str(folder), flush_secs=30)
            self._trial_result[trial] = {}


def _mlflow(experiment: str, root: Path) -> LoggerCallback:
    """Create Ray's MLflow logger; without MLFLOW_TRACKING_URI it writes to ROOT/mlflow.db."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root}/mlflow.db"
    if uri == f"sqlite:///{root}/mlflow.db":
        root.mkdir(parents=True, exist_ok=True)
    return MLflowLoggerCallback(tracking_uri=uri, experiment_name=experiment)


class _Wandb(LoggerCallback):
    """Weights & Biases: one run per trial, all in this process; local files go below `folder`.

    Ray's own logger runs an actor per trial, and loses the epochs of an actor that fails.
    """

    UPLOAD_SECONDS = 120  # how long the end of the experiment waits for uploads

    def __init__(self, experiment: str, folder: Path) -> None:
        self.experiment, self.folder = experiment, folder
        self.runs: dict[Any, Any] = {}
        self.uploads: list[Future[None]] = []
        self.threads = ThreadPoolExecutor()  # an upload does not hold up the trials

    def setup(self, **_: Any) -> None:
        """Check that W&B knows where to send the runs to, unless it is offline."""
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.api.api_key:
            raise ValueError("no API key: run `wandb login`, or set WANDB_API_KEY or WANDB_MODE")
        self.folder.mkdir(parents=True, exist_ok=True)

    def log_trial_start(self, trial: Any) -> None:
        import wandb

        if trial not in self.runs:
            self.runs[trial] = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or "pld-ray",
                group=self.experiment,
                id=trial.trial_id,
                name=str(trial),
                config=trial.config,
                dir=self.folder,
                reinit="create_new",
                settings=wandb.Settings(console="off", silent=True),
            )

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        self.runs[trial].log(result, step=result["training_iteration"])

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        finish = self.runs.pop(trial).finish
        self.uploads.append(self.threads.submit(finish, exit_code=int(failed)))

    def on_experiment_end(self, trials: Any, **_: Any) -> None:
        for upload in self.uploads:
            upload.result(timeout=self.UPLOAD_SECONDS)


_MAKE: dict[str, Callable[[str, Path], LoggerCallback]] = {
    "tensorboard": lambda experiment, root: _TensorBoard(root / "tensorboard" / experiment),
    "mlflow": _mlflow,
    "wandb": lambda experiment, root: _Wandb(experiment, root),
}
