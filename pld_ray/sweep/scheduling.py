"""Which trial next: when its teacher is there, the cluster has room, and no other driver runs it.

Tune does not know what a nested TorchTrainer takes, so the room is counted here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from typing import Any

from ray.tune.search import Searcher

from pld_ray.config.trial import Resources, Trial
from pld_ray.store.claims import Claims
from pld_ray.store.store import Store
from pld_ray.sweep.early_stopping import EarlyStopping
from pld_ray.sweep.resources import ResourceRequest, need, nodes, resolved
from pld_ray.sweep.search import DrawnTrial

RETRIES = 2  # of a trial whose process died, to get beyond that epoch
LOOK = 1.0  # seconds between two looks at the cluster, or at a trial that another driver has
NODES_BACK = 600.0  # seconds to wait for nodes that went away to come back


class PlanSearcher(Searcher):
    """Hands out the trials of a plan to Tune."""

    def __init__(
        self,
        pending: dict[str, Trial],
        resources: Resources,
        store: Store,
        claims: Claims,
        stopping: EarlyStopping | None = None,
    ) -> None:
        super().__init__()
        self.stopping = stopping  # of the search whose trials these are
        self.to_draw = dict(stopping.groups) if stopping else {}
        self.drawn: list[DrawnTrial] = []  # trials that were not pending at first
        self.waiting = dict(pending)
        self.resources, self.store, self.claims = resolved(resources), store, claims
        self.needs = {key: need(trial, self.resources) for key, trial in pending.items()}
        self.running: dict[str, Trial] = {}  # by Tune's own id
        self.failures: dict[str, str] = {}
        self.notes: dict[str, str] = {}  # how trials ended that did not finish here
        self.asked: dict[str, float] = {}  # when another driver had it
        self.look: Callable[[], None] = lambda: None  # raises if a signal came
        self.nodes = nodes()
        self.looked = time.monotonic()
        self.moved = time.monotonic()  # when something last ran, or could have

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles what it is given to restore an experiment; we never do

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial as a Tune config, None to wait, or FINISHED."""
        self.look()
        now = time.monotonic()
        if now - self.looked >= LOOK:
            self.nodes, self.looked = nodes(), now
        fits = cache(self._fits_beside)  # thousands wait, and few needs differ
        taught = {trial.id for trial in self.running.values()} | self.waiting.keys()
        for key, trial in list(self.waiting.items()):
            teacher = trial.teacher.id if isinstance(trial.teacher, Trial) else None
            if teacher in self.failures:
                self._fail(key, f"its teacher, trial {teacher}, failed")
            elif self.stopping and self.stopping.out_of_budget(key):
                del self.waiting[key]
            elif teacher not in taught and fits(self.needs[key]) and self._take(key, now):
                self.running[trial_id] = self.waiting.pop(key)
                needs = asdict(self.needs[key])
                spec = trial.model_dump(mode="json")  # as loggers show it
                return {"id": key, "trial": spec, "needs": needs}
        if self._draw():
            return self.suggest(trial_id)
        if self.running or self.asked:
            self.moved = now
        elif self.waiting and now - self.moved > NODES_BACK:
            for key in list(self.waiting):
                self._fail(key, self.too_large(key) or "no node had room for it")
        return None if self.waiting or self.to_draw else self.FINISHED

    def too_large(self, key: str) -> str | None:
        """Why a trial does not fit the cluster, even if nothing else ran; None if it does."""
        if self.resources.concurrent:
            return None
        what = f"trial {key} ({self.waiting[key].label})"
        return self.needs[key].too_large(what, self.nodes)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Give its room and its claim back, and note why it has no record if it has none."""
        trial = self.running.pop(trial_id)
        by = self.stopping.stopped.pop(trial.id, None) if self.stopping else None
        try:
            if self.store.record(trial.id) is None:
                failure = self.store.failure(trial.id) or {}
                if error:
                    self.failed(trial.id, failure.get("reason", "its process died"))
                elif by is not None:
                    self.store.stop(trial, by)
                    self.notes[trial.id] = f"stopped by {by.replace('_', ' ')}"
                else:
                    reason = failure.get("reason") or (result or {}).get("failed")
                    self.failures[trial.id] = reason or "it ended without a record"
            self.claims.release(trial.id)
        except OSError as problem:
            self.failures.setdefault(trial.id, f"the storage fails: {problem}")

    def failed(self, key: str, reason: str) -> None:
        """Attempt after attempt of a trial has ended so."""
        reason = f"{reason} ({RETRIES + 1} times in epoch {len(self.store.epochs(key)) + 1})"
        self.failures[key] = reason
        self.store.fail(key, reason)

    def _draw(self) -> bool:
        """Let a search draw another trial if there is room for one; False if none does."""
        for key, group in list(self.to_draw.items()):
            if not self._fits_beside(need(group.cell.trial, self.resources)):
                continue
            try:
                drawn = group.draw(self.store)
            except OSError:  # the storage fails, as what runs will say
                drawn = None
            if drawn is None:
                del self.to_draw[key]
            elif drawn.trial.id not in self.needs:  # else it is one of before
                self.to_draw[key] = self.to_draw.pop(key)  # the next one is another cell's
                self.needs[drawn.trial.id] = need(drawn.trial, self.resources)
                self.waiting[drawn.trial.id] = drawn.trial
                self.drawn.append(drawn)
                assert self.stopping is not None
                self.stopping.add(drawn.trial, key)
                return True
        return False

    def _fits_beside(self, more: ResourceRequest) -> bool:
        """Whether the cluster has room for it beside what runs."""
        if self.resources.concurrent:  # the cluster may grow when asked for more
            return len(self.running) < self.resources.concurrent
        for kind, amount in more.worker.items():
            taken = sum(need.worker[kind] * need.workers for need in self._taken())
            left = sum(node.get(kind, 0.0) for node in self.nodes) - taken
            if amount * more.workers > left + 1e-6:
                return False
        return more.fits(self.nodes)

    def _taken(self) -> list[ResourceRequest]:
        return [self.needs[trial.id] for trial in self.running.values()]

    def _take(self, key: str, now: float) -> bool:
        """Claim a trial for this driver; False if another has it, or has finished it."""
        if now - self.asked.get(key, -LOOK) < LOOK:
            return False
        try:
            if not self.claims.take(key):
                self.asked[key] = now
                return False
            self.asked.pop(key, None)
            if self.store.record(key) is None:
                return True
            self.claims.release(key)
        except OSError as problem:
            self._fail(key, f"the storage fails: {problem}")
            return False
        del self.waiting[key]
        self.notes[key] = "done by another run"
        return False

    def _fail(self, key: str, reason: str) -> None:
        del self.waiting[key]
        self.failures[key] = reason

    def save(self, checkpoint_path: str) -> None:
        """Nothing to keep: what is finished stands in the store."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing was kept."""
