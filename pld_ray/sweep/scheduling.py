"""Choose the next gang: trials whose teacher exists, that fit on the cluster and are unclaimed.

Free resources are counted here, because Tune does not see those of a nested TorchTrainer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from typing import Any

from ray.tune.search import Searcher

from pld_ray.config.gangs import gang_key
from pld_ray.config.parts import Resources
from pld_ray.config.trial import Trial
from pld_ray.store.claims import Claims
from pld_ray.store.store import Store
from pld_ray.sweep.early_stopping import EarlyStopping
from pld_ray.sweep.gangs import Gang, join
from pld_ray.sweep.resources import ResourceRequest, need, nodes, resolved
from pld_ray.sweep.retries import give_up_reason
from pld_ray.sweep.search import DrawnTrial

LOOK = 1.0  # seconds between two queries of the nodes, or two attempts to claim a trial
BRIEF = 1.0
"""Seconds of a trial that is not worth a start of its own: a start takes 0.15 s."""
MOVE = 20.0  # seconds of work that trials must have left to be worth moving to another process
NODES_BACK = 600.0  # seconds to wait for lost nodes to come back


class PlanSearcher(Searcher):
    """Tune searcher that suggests the trials of a plan, a gang at a time.

    Args:
        pending: Trials to run, by trial id.
        resources: Resources of the trials, as the experiment sets them.
        store: Store of the trials.
        claims: Claims of this driver on trials.
        stopping: Early stopping of the search that the trials belong to; None without a search.

    Attributes:
        drawn: Trials that a search has drawn and that the view does not know yet.
        failures: Reason of failure by trial id.
        notes: How trials ended that neither failed nor finished here, by trial id.
        ended: Ids of trials that ended, of which the view does not know yet.
        look: Function that handles signals; see signals.py.
        move: Function that asks trials to leave their gang; see liveness.py.
    """

    def __init__(
        self,
        pending: dict[str, Trial],
        resources: Resources,
        store: Store,
        claims: Claims,
        stopping: EarlyStopping | None = None,
    ) -> None:
        super().__init__()
        self.stopping = stopping
        self.to_draw = dict(stopping.groups) if stopping else {}
        self.drawn: list[DrawnTrial] = []
        self.waiting = dict(pending)
        self.resources, self.store, self.claims = resolved(resources), store, claims
        self.needs = {key: need(trial, self.resources) for key, trial in pending.items()}
        self.running: dict[str, Gang] = {}  # by Tune's trial id
        self.alone: set[str] = set()  # trials that ran out of memory and get a GPU of their own
        self.keys: dict[str, tuple[str, str]] = {}  # trial id -> its `gang_key`
        self.brief: set[str] = set()  # streams of which the last trial that ended was brief
        self.largest: dict[str, int] = {}  # trial id -> the largest gang that it may be in
        self.failures: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self.ended: list[str] = []
        self.asked: dict[str, float] = {}  # trial id -> when another driver was seen to run it
        self.look: Callable[[], None] = lambda: None
        self.move: Callable[[set[str]], None] = lambda keys: None
        self.nodes = nodes()
        self.looked = time.monotonic()
        self.moved = time.monotonic()  # when a trial last ran, here or on another driver

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles searchers to restore an experiment, which is never done here

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next gang as a Tune config, None to wait, or FINISHED."""
        self.look()
        now = time.monotonic()
        if now - self.looked >= LOOK:
            self.nodes, self.looked = nodes(), now
        fits = cache(self._fits_beside)  # thousands of trials may share a few distinct needs
        taught = self._to_be_trained()
        for key, trial in list(self.waiting.items()):
            teacher = _teacher(trial)
            if teacher in self.failures:
                self._fail(key, f"its teacher, trial {teacher}, failed")
            elif self.stopping and self.stopping.out_of_budget(key):
                del self.waiting[key]
                if key in self.claims.held:  # it has run before
                    self.stopping.stop(key, "time_budget")
                    self.notes[key] = "stopped by time budget"
                    self.ended.append(key)
                    self.claims.release(key)
            elif teacher not in taught and fits(self.needs[key]) and self._take(key, now):
                return self._start(trial_id, self.waiting.pop(key), taught, now)
        if any([self._draw() for _ in range(self._draws)]):
            return self.suggest(trial_id)
        self._spread()
        if self.running or self.asked:
            self.moved = now
        elif self.waiting and now - self.moved > NODES_BACK:
            for key in list(self.waiting):
                self._fail(key, self.too_large(key) or "no node had room for it")
        more = self.waiting or self.to_draw or any(map(self._may_return, self.running.values()))
        return None if more else self.FINISHED

    def _start(self, trial_id: str, first: Trial, taught: set[str], now: float) -> dict[str, Any]:
        """Start a gang of a trial and others, and return it as a Tune config.

        Args:
            trial_id: Tune's id.
            first: A trial that this driver has claimed.
            taught: Ids of the trials that are not trained yet.
            now: The time.
        """
        needs, key = self.needs[first.id], self._key(first)
        taught_by = {_teacher(trial) for trial in self.waiting.values()}
        blocked = taught | self.failures.keys()
        ready = [t for t in self.waiting.values() if _teacher(t) not in blocked]

        def joins(trial: Trial) -> bool:
            # A teacher for which others wait is not slowed down by trials for which none does.
            return (
                self._key(trial) == key
                and self.needs[trial.id] == needs
                and self._most(trial.id) > 1
                and not (self.stopping and self.stopping.out_of_budget(trial.id))
                and (trial.id in taught_by) == (first.id in taught_by)
            )

        def take(trial: Trial) -> bool:
            return self._take(trial.id, now) and self.waiting.pop(trial.id) is trial

        largest, room = self._most(first.id), math.inf
        companions = list(filter(joins, ready)) if largest > 1 else []
        if isinstance(self.resources.gang, int):
            largest = min(largest, self.resources.gang)
        elif companions:
            left = first.epochs + sum(trial.epochs for trial in ready)
            left += sum(gang.epochs_left for gang in self.running.values())
            groups = self.resources.concurrent or needs.groups_on(self.nodes)
            room = left / max(1, groups) / max(1, self.claims.drivers())
        trials = join(first, companions, largest, room, take)
        self.running[trial_id] = Gang(trials, needs)
        return {
            "trials": [
                {"id": key, "trial": trial.model_dump(mode="json")} for key, trial in trials.items()
            ],
            "needs": asdict(needs),
            "search": self.stopping is not None,
        }

    def _spread(self) -> None:
        """Ask half a gang to leave if there is room for another one and no trial that could start.

        Those trials continue in a gang of their own.
        """
        if self.resources.gang != "auto" or any(gang.asked for gang in self.running.values()):
            return
        gangs = [gang for gang in self.running.values() if self._fits_beside(gang.needs)]
        most = max(gangs, key=lambda gang: sum(gang.seconds_left.values()), default=None)
        if most is None or not (half := most.half()):
            return
        if sum(most.seconds_left[key] for key in half) >= MOVE:
            most.asked = half
            self.move(half)

    def _key(self, trial: Trial) -> tuple[str, str]:
        """Return what a trial has in common with those that can join it."""
        if trial.id not in self.keys:
            self.keys[trial.id] = gang_key(trial, self.resources.gang == "auto")
        stream, shared = self.keys[trial.id]
        return stream, "" if stream in self.brief else shared

    def _most(self, key: str) -> int:
        """Return the largest gang that a trial may be in."""
        return 1 if key in self.alone else self.largest.get(key, len(self.needs))

    @property
    def _draws(self) -> int:
        """The number of trials that a search draws at once: a later draw knows more results."""
        return self.resources.gang if isinstance(self.resources.gang, int) else 1

    def _to_be_trained(self) -> set[str]:
        """Return the ids of the trials that run or wait."""
        return {key for gang in self.running.values() for key in gang.trials} | self.waiting.keys()

    def too_large(self, key: str) -> str | None:
        """Explain why a trial does not fit on the idle cluster; return None if it fits."""
        if self.resources.concurrent:
            return None
        what = f"trial {key} ({self.waiting[key].label})"
        return self.needs[key].too_large(what, self.nodes)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Note the epochs of the trials of a gang, and how they end."""
        gang = self.running[trial_id]
        for epoch in result.get("epochs", ()):
            gang.done[epoch["id"]], gang.pace[epoch["id"]] = epoch["epoch"], epoch["seconds"]
        if result.get("ended") not in gang.trials:
            return
        trial = gang.trials.pop(result["ended"])
        gang.asked.discard(trial.id)
        self._note_length(trial, gang.pace.get(trial.id))
        if result.get("back") == "moved":
            gang.moved[trial.id] = trial
        elif result.get("back"):  # it waits for another gang, no larger than this one has room for
            self.largest[trial.id] = max(1, len(gang.trials))
            self.waiting[trial.id] = trial
        else:
            self._end(trial, result)
        if not gang.asked:  # all that were asked have left or ended: they go on together
            self.waiting |= gang.moved
            gang.moved = {}

    def _note_length(self, trial: Trial, pace: float | None) -> None:
        """Note whether trials with the stream of one that ended are brief, by its last epoch."""
        if pace is not None:
            stream, _ = self._key(trial)
            if pace * trial.epochs < BRIEF:
                self.brief.add(stream)
            else:
                self.brief.discard(stream)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Release the resources of a gang.

        If its process died too often, it is tried again in two halves, and so on. A trial alone
        has then failed.
        """
        gang = self.running.pop(trial_id)
        self.waiting |= gang.moved
        left = gang.trials
        if error and len(left) > 1:
            stopped = self.stopping.stopped if self.stopping else {}
            back = {key: trial for key, trial in left.items() if key not in stopped}
            self.largest |= dict.fromkeys(back, (len(back) + 1) // 2)
            self.waiting = back | self.waiting
            left = {key: left[key] for key in left.keys() & stopped.keys()}
            error = False
        for trial in left.values():
            self._end(trial, {}, error)

    def _end(self, trial: Trial, facts: dict[str, Any], error: bool = False) -> None:
        """Release the claim of a trial that ended; if it has no record, note why.

        A trial that ran out of GPU memory waits once more, for a GPU of its own.

        Args:
            trial: The trial.
            facts: What its process reported.
            error: Whether its process died too often.
        """
        lacking = facts.get("out_of_memory")
        if lacking and self._may_have_more(trial):
            self.alone.add(trial.id)
            self.needs[trial.id] = self.needs[trial.id].with_whole_gpus
            self.waiting[trial.id] = trial
            return
        by = self.stopping.stopped.pop(trial.id, None) if self.stopping else None
        try:
            if self.store.record(trial.id) is None:
                failure = self.store.failure(trial.id) or {}
                if error:
                    self.failed(trial.id, failure.get("reason", "its process died"))
                elif by is not None and "failed" not in facts:
                    self.notes[trial.id] = f"stopped by {by.replace('_', ' ')}"
                elif lacking:
                    self.failures[trial.id] = f"{lacking} (also alone on its GPU)"
                    self.store.fail(trial.id, self.failures[trial.id])
                else:
                    reason = failure.get("reason") or facts.get("failed")
                    self.failures[trial.id] = reason or "it ended without a record"
            self.claims.release(trial.id)
        except OSError as problem:
            self.failures.setdefault(trial.id, f"the storage failed: {problem}")
        self.ended.append(trial.id)

    def _may_have_more(self, trial: Trial) -> bool:
        """Return whether a trial that runs out of GPU memory is tried again, alone on its GPU."""
        return trial.id not in self.alone and self.needs[trial.id].gpus > 0

    def _may_return(self, gang: Gang) -> bool:
        """Return whether trials of a gang may have to be tried again."""
        return len(gang.trials) > 1 or any(map(self._may_have_more, gang.trials.values()))

    def failed(self, key: str, reason: str) -> None:
        """Note that all attempts of a trial have failed for this reason."""
        reason = give_up_reason(reason, len(self.store.epochs(key)) + 1)
        self.failures[key] = reason
        self.store.fail(key, reason)

    def _draw(self) -> bool:
        """Draw another trial of a search if the cluster has room; return False if none is drawn."""
        for key, group in list(self.to_draw.items()):
            if not self._fits_beside(need(group.cell.trial, self.resources)):
                continue
            try:
                drawn = group.draw(self.store)
            except OSError:  # the trials that run report the storage error
                drawn = None
            if drawn is None:
                del self.to_draw[key]
            elif drawn.trial.id not in self.needs:  # otherwise an earlier trial is drawn again
                self.to_draw[key] = self.to_draw.pop(key)  # the next draw is for another cell
                self.needs[drawn.trial.id] = need(drawn.trial, self.resources)
                self.waiting[drawn.trial.id] = drawn.trial
                self.drawn.append(drawn)
                assert self.stopping is not None
                self.stopping.add(drawn.trial, key)
                return True
        return False

    def _fits_beside(self, more: ResourceRequest) -> bool:
        """Return whether the request fits on the cluster beside the running gangs."""
        if self.resources.concurrent:  # a cluster that grows on demand reports too little
            return len(self.running) < self.resources.concurrent
        for kind, amount in more.worker.items():
            taken = sum(n.worker[kind] * n.workers for n in self._taken())
            left = sum(node.get(kind, 0.0) for node in self.nodes) - taken
            if amount * more.workers > left + 1e-6:
                return False
        return more.fits(self.nodes)

    def _taken(self) -> list[ResourceRequest]:
        """Return the resource requests of the running gangs."""
        return [gang.needs for gang in self.running.values()]

    def _take(self, key: str, now: float) -> bool:
        """Claim a trial; return False if another driver runs it or has finished it."""
        if now - self.asked.get(key, -LOOK) < LOOK:
            return False
        try:
            if not self.claims.take(key):
                self.asked[key] = now
                return False
            self.asked.pop(key, None)
            if self.store.record(key) is None:
                if self.stopping:
                    self.store.forget_stop(self.waiting[key])
                return True
            self.claims.release(key)
        except OSError as problem:
            self._fail(key, f"the storage failed: {problem}")
            return False
        del self.waiting[key]
        self.notes[key] = "done by another run"
        self.ended.append(key)
        return False

    def _fail(self, key: str, reason: str) -> None:
        """Note that a waiting trial fails without running."""
        del self.waiting[key]
        self.asked.pop(key, None)
        self.failures[key] = reason
        self.ended.append(key)
        if key in self.claims.held:  # it has run before
            self.claims.release(key)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing, because the store holds all finished trials."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing, because `save` keeps no state."""


def _teacher(trial: Trial) -> str | None:
    """Return the id of the trial that is the teacher of a trial."""
    return trial.teacher.id if isinstance(trial.teacher, Trial) else None
