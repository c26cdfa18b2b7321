"""Stop trials of a search early, with one Tune scheduler per grid cell and a time budget.

A scheduler compares only the trials of its own cell, so a method that learns slowly is not stopped
because another method learns fast. Each scheduler first receives the results of earlier runs. It
receives only epochs that have the metric: with `validate_every`, not every epoch has one.

Tune knows gangs. The schedulers of Tune are told of the trials in them. That a trial is stopped is
noted in the store, where its process looks after each epoch.
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
class _Member:
    """What stands for a trial in the schedulers of Tune."""

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
        self.trials: dict[str, Trial] = {}
        self.over: set[str] = set()  # trials that ended or are stopped
        self.entered: set[str] = set()  # trials that their scheduler knows
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
                    self._enter(drawn.trial.id)

    def add(self, trial: Trial, key: str) -> None:
        """Assign a trial to the search with this key."""
        self.group_of[trial.id], self.trials[trial.id] = key, trial

    def out_of_budget(self, trial_id: str) -> bool:
        """Return whether the cell of a trial has spent its time budget."""
        key = self.group_of.get(trial_id)
        budget = None if key is None else self.groups[key].search.time_budget
        return budget is not None and self.spent[self.group_of[trial_id]] >= budget

    def _enter(self, trial_id: str) -> None:
        """Add a trial to its scheduler, once, and report the epochs that it has in the store."""
        if trial_id in self.entered:  # it comes from another gang
            return
        self.entered.add(trial_id)
        scheduler, member = self.schedulers[self.group_of[trial_id]], _Member(trial_id)
        scheduler.on_trial_add(None, member)
        for epoch in self.store.epochs(trial_id):
            if self._scored(trial_id, epoch):
                scheduler.on_trial_result(None, member, epoch)

    def _scored(self, trial_id: str, epoch: dict[str, Any]) -> bool:
        """Return whether an epoch of a trial of the search has the metric of the search."""
        return self.groups[self.group_of[trial_id]].search.metric in epoch

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Add the trials of a gang to their schedulers."""
        for settings in trial.config["trials"]:
            if settings["id"] in self.group_of:
                self._enter(settings["id"])

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Note in the store which trials of a gang are stopped after an epoch.

        Returns:
            STOP if all of its trials are stopped, which ends its processes at once.
        """
        for epoch in result.get("epochs", ()):
            if epoch["id"] in self.group_of and not result.get("done"):  # then Tune tells it again
                self._epoch(tune_controller, epoch)
        left = {settings["id"] for settings in trial.config["trials"]}
        over = left and left <= self.stopped.keys()
        return TrialScheduler.STOP if over else TrialScheduler.CONTINUE

    def _epoch(self, controller: Any, epoch: dict[str, Any]) -> None:
        """Ask the scheduler of a trial about an epoch; after its last one it is not stopped."""
        key, member = epoch["id"], _Member(epoch["id"])
        scheduler, group = self.schedulers[self.group_of[key]], self.groups[self.group_of[key]]
        self.spent[self.group_of[key]] += epoch["seconds"]
        if key in self.over:  # several workers learn late that they are to stop
            return
        scored, stops = self._scored(key, epoch), False
        if scored:
            stops = scheduler.on_trial_result(controller, member, epoch) == TrialScheduler.STOP
        last = epoch["epoch"] >= epoch["epochs"]
        if not last and self.out_of_budget(key):
            self.stop(key, "time_budget")
        elif not last and stops:
            self.stop(key, group.search.scheduler)
        if last or key in self.stopped:
            self.over.add(key)
        if scored and key in self.over:
            scheduler.on_trial_complete(controller, member, epoch)

    def stop(self, trial_id: str, by: str) -> None:
        """Note in the store what stops a trial."""
        self.stopped[trial_id] = by
        self.store.stop(self.trials[trial_id], by)


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
