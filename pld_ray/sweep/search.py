"""A search as far as it has come: what was drawn for each cell of the grid, and what it reached.

    experiment -> groups (a cell of the grid, and what of the space it has)
               -> drawn (points of its space as trials: known beforehand, or kept in the store)
               -> best of each group, once it is over -> its cells on fresh seeds (a Plan)

All of it is read from the store, so a search goes on wherever it was left.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pld_ray.config.experiment import Experiment
from pld_ray.config.planning import Cell, Plan, Settings, build, combinations
from pld_ray.config.search_space import Point, Range, Search, Tried, points, suggest
from pld_ray.config.trial import Trial
from pld_ray.errors import InputError, nearest
from pld_ray.losses import REGISTRY
from pld_ray.store.store import Outcome, Store

FREE = ("pad", "flip")  # of data: they change no dataset


@dataclass(frozen=True)
class DrawnTrial:
    """A trial of a search and how far it is.

    state: done, stopped (by the scheduler), paused (as the budget was spent), failed (it would
    fail again), or open. score: of the last epoch, None before there is one.
    """

    point: Point
    trial: Trial
    state: str
    epoch: int
    score: float | None
    seconds: float

    @property
    def label(self) -> str:
        """The trial for people, with what was drawn."""
        drawn = (f" {field} {value}" for field, value in self.point.items() if "loss." not in field)
        return self.trial.label + "".join(drawn)


@dataclass(frozen=True)
class SearchCell:
    """A cell of the grid, and how trials of a search are made from it."""

    experiment: Experiment
    settings: Settings
    space: dict[str, Range]

    @property
    def search(self) -> Search:
        """The experiment's."""
        assert self.experiment.search is not None
        return self.experiment.search

    @cached_property
    def cell(self) -> Cell:
        """As the grid has it, with nothing drawn."""
        return self.cells({}, [self.search.seed], self.search.base)[0]

    def cells(self, point: Point, seeds: list[int], base: Mapping[str, Any] = {}) -> list[Cell]:
        """The cell with the values of a point, for some seeds."""
        return build(self.experiment, [*self.settings, *point.items()], seeds, base)

    @cached_property
    def key(self) -> str:
        """Of the cell, the space and what is sought there: another one begins another search."""
        said = self.search.model_dump(
            mode="json", by_alias=True, include={"algorithm", "metric", "mode", "seed"}
        )
        space = {k: v.model_dump(by_alias=True, exclude_unset=True) for k, v in self.space.items()}
        text = json.dumps([self.cell.trial.id, space, said], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def trial(self, point: Point) -> Trial:
        """Of the search."""
        return self.cells(point, [self.search.seed], self.search.base)[0].trial

    # ---- what was drawn

    def look(self, store: Store) -> SearchProgress:
        """How far the search of this cell is."""
        if self.search.algorithm == "optuna":
            rows = store.points(self.key)
            known = [dict(zip(self.space, row, strict=True)) for row in rows if row is not None]
        else:  # they need not be kept
            known = points(self.search, self.space, self.key)
            rows = [[]] * len(known)
        trials = [self.trial(point) for point in known]
        outcomes = store.outcomes(trial.id for trial in trials)
        drawn = [
            self._drawn(point, trial, outcomes[trial.id])
            for point, trial in zip(known, trials, strict=True)
        ]
        return SearchProgress(self, drawn, len(rows))

    def _drawn(self, point: Point, trial: Trial, outcome: Outcome) -> DrawnTrial:
        if (record := outcome.record) is not None:
            score, seconds = record["metrics"].get(self.search.metric), record["seconds"]["seconds"]
            return DrawnTrial(point, trial, "done", trial.epochs, score, seconds)
        history = outcome.epochs
        seconds = sum(epoch.get("seconds", 0.0) for epoch in history)
        score = history[-1].get(self.search.metric) if history else None
        by = (outcome.stopped or {}).get("by")
        state = "open"
        if (outcome.failure or {}).get("final"):
            state = "failed"
        elif by == self.search.scheduler:  # another one may let it go on
            state = "stopped"
        elif by == "time_budget":
            state = "paused"
        return DrawnTrial(point, trial, state, len(history), score, seconds)

    def draw(self, store: Store) -> DrawnTrial | None:
        """Optuna's next point, None if there are enough; each of several drivers gets its own."""
        while (progress := self.look(store)).to_draw:
            tried: list[Tried] = [
                (d.point, None if d.state == "failed" else d.score, d.state == "open")
                for d in progress.drawn
            ]
            point = suggest(self.search, self.space, self.key, tried)
            if store.add_point(self.key, progress.rows, [point[field] for field in self.space]):
                return DrawnTrial(point, self.trial(point), "open", 0, None, 0.0)
        return None


@dataclass(frozen=True)
class SearchProgress:
    """A group and what was drawn for it; rows: how many points are kept, readable or not."""

    group: SearchCell
    drawn: list[DrawnTrial]
    rows: int

    @property
    def out_of_budget(self) -> bool:
        """Whether the time budget is spent."""
        budget = self.group.search.time_budget
        return budget is not None and sum(drawn.seconds for drawn in self.drawn) >= budget

    @property
    def to_draw(self) -> int:
        """How many points optuna has still to find."""
        search = self.group.search
        if search.algorithm != "optuna" or self.out_of_budget:
            return 0
        assert search.num_trials is not None
        return max(0, (search.num_trials if self.group.space else 1) - self.rows)

    @property
    def open(self) -> list[DrawnTrial]:
        """Those that are still to run, or to go on."""
        if self.out_of_budget:
            return []
        return [drawn for drawn in self.drawn if drawn.state in ("open", "paused")]

    @property
    def over(self) -> bool:
        """Whether the search of this cell has come to its end."""
        return not self.open and not self.to_draw

    @property
    def best(self) -> DrawnTrial | None:
        """The best that finished; if none did, of those that have come furthest."""
        scored = [d for d in self.drawn if d.state != "failed" and d.score is not None]
        sign = 1 if self.group.search.mode == "max" else -1
        return max(
            scored,
            key=lambda d: (d.state == "done", d.epoch, sign * (d.score or 0.0)),
            default=None,
        )


def groups(experiment: Experiment) -> list[SearchCell]:
    """One for each point of the grid; those that come to the same search have one key."""
    search = experiment.search
    assert search is not None
    for field in search.space:
        _check_field(field, search, f"{experiment.name}: search.space.{field}")
    found: list[SearchCell] = []
    for settings in combinations(experiment):
        loss = build(experiment, settings, [search.seed], search.base)[0].trial.loss
        if search.metric in ("kl_teacher_student", "agreement") and not loss.needs_teacher:
            raise InputError(
                f"{experiment.name}: search.metric is {search.metric!r}: {loss.name} has no "
                "teacher to compare with"
            )
        space = {}
        for field, values in search.space.items():
            first, _, parameter = field.partition(".")
            if first in ("loss", loss.name) and parameter in type(loss).model_fields:
                field = f"loss.{parameter}"
            elif first == "loss" or first in REGISTRY:
                continue
            if field not in experiment.overrides:
                space[field] = values
        found.append(SearchCell(experiment, settings, space))
    return found


def _check_field(field: str, search: Search, where: str) -> None:
    first, _, rest = field.partition(".")
    of_loss = {first} & REGISTRY.keys() or (REGISTRY.keys() if first == "loss" else set())
    names = {name for loss in of_loss for name in REGISTRY[loss].model_fields} - {"name"}
    if of_loss and rest not in names:
        raise InputError(f"{where}: no such parameter; {nearest(rest, names)}")
    shared = first in ("teacher", "student", "workers") or (first == "data" and rest not in FREE)
    if search.algorithm == "optuna" and shared:
        raise InputError(
            f"{where}: optuna draws while trials run, and what they share has to be known before: "
            "use algorithm random or grid"
        )


def look(experiment: Experiment, store: Store) -> list[SearchProgress]:
    """How far the search of each cell of the grid is."""
    return [group.look(store) for group in groups(experiment)]


def plan(experiment: Experiment, store: Store) -> Plan:
    """The trials of the search, and the cells of its best settings once it is over."""
    progress = look(experiment, store)
    searched = tuple(drawn.trial for each in progress for drawn in each.drawn)
    cells: list[Cell] = []
    points: list[Trial] = []
    for each in progress if all(each.over for each in progress) else ():
        if each.best is not None:
            cells += each.group.cells(each.best.point, experiment.seeds)
            points += [cell.trial for cell in each.group.cells({}, experiment.seeds)]
    return Plan(experiment, tuple(cells), searched, tuple(points))
