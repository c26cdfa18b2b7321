"""Stop trials of a search early, with one Tune scheduler per grid cell and a time budget.

A scheduler compares only the trials of its own cell, so a method that learns slowly is not stopped
because another method learns fast. Each scheduler first receives the results of earlier runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from pld_ray.config.search_space import Search
from pld_ray.config.trial import Trial
from pld_ray.store.store import Store
from pld_ray.sweep.search import SearchProgress


@dataclass(frozen=True)
class _Past:
    """A stand-in for the Tune trial of an earlier run."""

    trial_id: str


class EarlyStopping(FIFOScheduler):
    """Tune scheduler that passes each trial of a search to the scheduler of its cell.

    Trials outside the search are never stopped.

    Args:
        progress: The search of each grid cell, with the trials of earlier runs.
        store: Store that holds the epochs of these trials.
    """

    def __init__(self, progress: Sequence[SearchProgress], store: Store) -> None:
        super().__init__()
        self.store = store
        self.groups = {each.group.key: each.group for each in progress}
        self.schedulers: dict[str, TrialScheduler] = {}
        self.spent: dict[str, float] = {}  # key -> seconds of training
        self.group_of: dict[str, str] = {}  # trial id -> key
        self.stopped: dict[str, str] = {}  # trial id -> scheduler or time_budget
        for each in {each.group.key: each for each in progress}.values():
            key = each.group.key
            trials = [each.group.cell.trial, *(drawn.trial for drawn in each.drawn)]
            most = max(trial.epochs for trial in trials)
            self.schedulers[key] = _scheduler(each.group.search, most)
            self.spent[key] = sum(drawn.seconds for drawn in each.drawn)
            for drawn in each.drawn:
                self.add(drawn.trial, key)
                if drawn.state in ("done", "stopped"):
                    past = _Past(drawn.trial.id)
                    self.schedulers[key].on_trial_add(None, past)
                    self._tell(self.schedulers[key], past, drawn.trial.id)

    def add(self, trial: Trial, key: str) -> None:
        """Assign a trial to the search with this key."""
        self.group_of[trial.id] = key

    def out_of_budget(self, trial_id: str) -> bool:
        """Return whether the cell of a trial has spent its time budget."""
        key = self.group_of.get(trial_id)
        budget = None if key is None else self.groups[key].search.time_budget
        return budget is not None and self.spent[self.group_of[trial_id]] >= budget

    def _tell(self, scheduler: TrialScheduler, trial: Any, trial_id: str) -> None:
        """Report all epochs in the store to a scheduler."""
        for epoch in self.store.epochs(trial_id):
            scheduler.on_trial_result(None, trial, epoch)

    def _of(self, trial: Any) -> TrialScheduler | None:
        """Return the scheduler of a trial's cell, or None for a trial outside the search."""
        return self.schedulers.get(self.group_of.get(trial.config["id"], ""))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Add a trial to its scheduler, and report the epochs that it has in the store."""
        if scheduler := self._of(trial):
            scheduler.on_trial_add(tune_controller, trial)
            self._tell(scheduler, trial, trial.config["id"])

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return CONTINUE or STOP after an epoch; after its last epoch a trial is not stopped."""
        scheduler, key = self._of(trial), trial.config["id"]
        if scheduler is None or "epoch" not in result:
            return TrialScheduler.CONTINUE
        self.spent[self.group_of[key]] += result["seconds"]
        decision = scheduler.on_trial_result(tune_controller, trial, result)
        if result["epoch"] >= result["epochs"]:
            return TrialScheduler.CONTINUE
        if self.out_of_budget(key):
            self.stopped[key] = "time_budget"
            return TrialScheduler.STOP
        if decision == TrialScheduler.STOP:
            self.stopped[key] = self.groups[self.group_of[key]].search.scheduler
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Report a completed trial to its scheduler."""
        scheduler = self._of(trial)
        if scheduler and "epoch" in result:
            scheduler.on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Remove a trial from its scheduler."""
        if scheduler := self._of(trial):
            scheduler.on_trial_remove(tune_controller, trial)


def _scheduler(search: Search, epochs: int) -> TrialScheduler:
    """Create the scheduler that a search asks for; `epochs` is the length of the longest trial."""
    what: dict[str, Any] = {"time_attr": "epoch", "metric": search.metric, "mode": search.better}
    if search.scheduler == "none":
        return FIFOScheduler()
    grace = min(search.grace_epochs, epochs)
    if search.scheduler == "median":
        return MedianStoppingRule(**what, grace_period=grace, min_time_slice=float("inf"))
    brackets = 3 if search.scheduler == "hyperband" else 1
    return AsyncHyperBandScheduler(
        **what, max_t=epochs, grace_period=grace, brackets=brackets, stop_last_trials=False
    )
