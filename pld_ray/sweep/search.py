"""Read the state of a search: the trials drawn for each grid cell, and their scores.

    experiment -> groups (a cell of the grid, with those fields of the space that apply to it)
               -> drawn trials (points of the space: known beforehand, or read from the store)
               -> the best of each group, when the search is over -> its cells on fresh seeds (Plan)

All state is read from the store, so an interrupted search continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pld_ray.config.experiment import Experiment
from pld_ray.config.parts import ON_THE_FLY
from pld_ray.config.planning import Cell, Plan, Settings, build, check_rules, combinations
from pld_ray.config.search_space import METRICS, Point, Range, Search, Tried, points, suggest
from pld_ray.config.trial import Trial
from pld_ray.errors import InputError, nearest
from pld_ray.losses import REGISTRY
from pld_ray.store.outcomes import Outcome
from pld_ray.store.store import Store


@dataclass(frozen=True)
class DrawnTrial:
    """A trial of a search, with its progress.

    Attributes:
        point: The drawn value of each field.
        trial: The trial with these values.
        state: "done", "stopped" (by the scheduler), "paused" (the time budget was spent),
            "failed" (another attempt would fail too) or "open" (still to run).
        epoch: Number of finished epochs.
        score: The metric of the search in the last epoch that has one; None if there is none yet.
        scored: The number of this epoch; 0 without a score.
        seconds: Training time in seconds.
    """

    point: Point
    trial: Trial
    state: str
    epoch: int
    score: float | None
    scored: int
    seconds: float

    @property
    def label(self) -> str:
        """The label of the trial, followed by the drawn values."""
        drawn = (f" {field} {value}" for field, value in self.point.items() if "loss." not in field)
        return self.trial.label + "".join(drawn)


@dataclass(frozen=True)
class SearchCell:
    """A cell of the grid, from which a search makes its trials.

    Attributes:
        experiment: The experiment with the search.
        settings: Fields and values of the cell.
        space: Range of each searched field that applies to the cell.
    """

    experiment: Experiment
    settings: Settings
    space: dict[str, Range]

    @property
    def search(self) -> Search:
        """The search settings of the experiment."""
        assert self.experiment.search is not None
        return self.experiment.search

    @cached_property
    def cell(self) -> Cell:
        """The cell of the grid, without drawn values."""
        return self.cells({}, [self.search.seed], self.search.base)[0]

    def cells(self, point: Point, seeds: list[int], base: Mapping[str, Any] = {}) -> list[Cell]:
        """Build the cell with the values of a point, once per seed.

        Args:
            point: Drawn value of each field.
            seeds: Seeds of the trials.
            base: Settings merged over the base settings of the experiment.
        """
        return build(self.experiment, [*self.settings, *point.items()], seeds, base)

    @cached_property
    def key(self) -> str:
        """The id of the search: 16 hex digits of a hash.

        It depends on the cell, the space and the algorithm, metric, mode and seed. If one of them
        changes, a new search begins.
        """
        said = self.search.model_dump(mode="json", include={"algorithm", "metric", "seed"})
        said["mode"] = self.search.better
        space = {k: v.model_dump(by_alias=True, exclude_unset=True) for k, v in self.space.items()}
        text = json.dumps([self.cell.trial.id, space, said], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def trial(self, point: Point) -> Trial:
        """Return the search trial at a point."""
        return self.cells(point, [self.search.seed], self.search.base)[0].trial

    def look(self, store: Store) -> SearchProgress:
        """Return the progress of the search of this cell, read from the store."""
        if self.search.algorithm == "optuna":
            rows = store.points(self.key)
            known = [dict(zip(self.space, row, strict=True)) for row in rows if row is not None]
        else:  # these points are computed, so the store does not hold them
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
        """Combine a trial with what the store holds of it."""
        if (record := outcome.record) is not None:
            score, seconds = record["metrics"].get(self.search.metric), record["seconds"]["seconds"]
            return DrawnTrial(point, trial, "done", trial.epochs, score, trial.epochs, seconds)
        history = outcome.epochs
        seconds = sum(epoch.get("seconds", 0.0) for epoch in history)
        last = next((e for e in reversed(history) if self.search.metric in e), {"epoch": 0})
        score, scored = last.get(self.search.metric), last["epoch"]
        by = (outcome.stopped or {}).get("by")
        state = "open"
        if (outcome.failure or {}).get("final"):
            state = "failed"
        elif by == self.search.scheduler:  # another scheduler may let it continue
            state = "stopped"
        elif by == "time_budget":
            state = "paused"
        return DrawnTrial(point, trial, state, len(history), score, scored, seconds)

    def draw(self, store: Store) -> DrawnTrial | None:
        """Draw Optuna's next point and keep it in the store.

        Several drivers can draw for the same search, because each point is stored under a number
        that only one driver can take.

        Returns:
            The new trial, or None if the search needs no more points.
        """
        while (progress := self.look(store)).to_draw:
            tried: list[Tried] = [
                (d.point, None if d.state == "failed" else d.score, d.state == "open")
                for d in progress.drawn
            ]
            point = suggest(self.search, self.space, self.key, tried)
            if store.add_point(self.key, progress.rows, [point[field] for field in self.space]):
                return DrawnTrial(point, self.trial(point), "open", 0, None, 0, 0.0)
        return None


@dataclass(frozen=True)
class SearchProgress:
    """The progress of the search of one grid cell.

    Attributes:
        group: The cell and its space.
        drawn: Trials drawn so far.
        rows: Number of points drawn so far, including damaged ones in the store.
    """

    group: SearchCell
    drawn: list[DrawnTrial]
    rows: int

    @property
    def out_of_budget(self) -> bool:
        """Whether the time budget of the cell is spent."""
        budget = self.group.search.time_budget
        return budget is not None and sum(drawn.seconds for drawn in self.drawn) >= budget

    @property
    def to_draw(self) -> int:
        """The number of points that Optuna has still to draw."""
        search = self.group.search
        if search.algorithm != "optuna" or self.out_of_budget:
            return 0
        assert search.num_trials is not None
        return max(0, (search.num_trials if self.group.space else 1) - self.rows)

    @property
    def open(self) -> list[DrawnTrial]:
        """The drawn trials that are still to run or to continue."""
        if self.out_of_budget:
            return []
        return [drawn for drawn in self.drawn if drawn.state in ("open", "paused")]

    @property
    def over(self) -> bool:
        """Whether the search of this cell is over."""
        return not self.open and not self.to_draw

    @property
    def best(self) -> DrawnTrial | None:
        """The best trial among those with a score that did not fail; None if there is none.

        Finished trials come first, by their score. Of the others, those with a score of a later
        epoch come first, then those with better scores.
        """
        scored = [d for d in self.drawn if d.state != "failed" and d.score is not None]
        sign = 1 if self.group.search.better == "max" else -1
        if finished := [d for d in scored if d.state == "done"]:
            return max(finished, key=lambda d: sign * (d.score or 0.0))
        return max(scored, key=lambda d: (d.scored, sign * (d.score or 0.0)), default=None)


def groups(experiment: Experiment) -> list[SearchCell]:
    """Return the search cell of each point of the grid.

    Cells with the same `key` share one search.

    Raises:
        InputError: A field of the space cannot be searched, the trials do not have the metric, it
            needs a teacher and a loss has none, or the scheduler could not stop any trial.
    """
    search = experiment.search
    assert search is not None
    for field in search.space:
        _check_field(field, search, f"{experiment.name}: search.space.{field}")
    found: list[SearchCell] = []
    for settings in combinations(experiment):
        trial = build(experiment, settings, [search.seed], search.base)[0].trial
        loss, metrics = trial.loss, [*METRICS, *trial.metrics]
        if search.metric not in metrics:
            raise InputError(
                f"{experiment.name}: search.metric is {search.metric!r}: expected a metric of all "
                f"trials, or of a plug-in that `metrics` names; {nearest(search.metric, metrics)}"
            )
        if search.metric in ("kl_teacher_student", "agreement") and not loss.needs_teacher:
            raise InputError(
                f"{experiment.name}: search.metric is {search.metric!r}: {loss.name} has no "
                "teacher to compare with"
            )
        _check_scheduler(experiment, trial)
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
    check_rules(experiment, [each.cell for each in found])
    return found


def _check_scheduler(experiment: Experiment, trial: Trial) -> None:
    """Raise InputError if `validate_every` leaves no epoch after which a trial can be stopped.

    A miniature has few epochs. It shows how a search runs and may do without the scheduler.
    """
    search = experiment.search
    assert search is not None
    if search.scheduler == "none" or search.metric == "train_loss" or experiment.miniature_of:
        return
    if not search.space.keys().isdisjoint(("epochs", "validate_every")):
        return
    stops = range(search.grace_epochs, trial.epochs)  # a trial is not stopped after its last epoch
    if stops and not any(map(trial.validates, stops)):
        raise InputError(
            f"{experiment.name}: validate_every is {trial.validate_every}: {search.scheduler} "
            f"could not stop any trial, because {search.metric} is not known in epochs "
            f"{stops[0]} to {stops[-1]} of {trial.epochs}: expected a smaller validate_every, or "
            "search.scheduler none"
        )


def _check_field(field: str, search: Search, where: str) -> None:
    """Raise InputError if a field of the space cannot be searched."""
    first, _, rest = field.partition(".")
    of_loss = {first} & REGISTRY.keys() or (REGISTRY.keys() if first == "loss" else set())
    names = {name for loss in of_loss for name in REGISTRY[loss].model_fields} - {"name"}
    if of_loss and rest not in names:
        raise InputError(f"{where}: no such parameter; {nearest(rest, names)}")
    shared = first in ("teacher", "student", "workers") or (
        first == "data" and rest not in ON_THE_FLY
    )
    if search.algorithm == "optuna" and shared:
        raise InputError(
            f"{where}: optuna draws values while trials run, but this field must be known before "
            "they start: use algorithm random or grid"
        )


def look(experiment: Experiment, store: Store) -> list[SearchProgress]:
    """Return the progress of the search of each grid cell, read from the store."""
    return [group.look(store) for group in groups(experiment)]


def plan(experiment: Experiment, store: Store) -> Plan:
    """Build the plan of a search: its trials, and when it is over, the cells of its best settings.

    The best settings of each grid cell run on the `seeds` of the experiment.
    """
    progress = look(experiment, store)
    searched = tuple(drawn.trial for each in progress for drawn in each.drawn)
    cells: list[Cell] = []
    points: list[Trial] = []
    for each in progress if all(each.over for each in progress) else ():
        if each.best is not None:
            cells += each.group.cells(each.best.point, experiment.all_seeds)
            points += [cell.shown for cell in each.group.cells({}, experiment.all_seeds)]
    return Plan(experiment, tuple(cells), searched, tuple(points))
