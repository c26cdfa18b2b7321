"""What a search draws from: ranges of fields, and the next point of them.

A random or grid search is a pure function of (seed, cell, number): its trials are known before any
of them runs. Optuna's next point depends on what was found so far, and on nothing else.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any, Literal

from pydantic import Field, model_validator

from pld_ray.config.validation import Part
from pld_ray.errors import InputError

DIGITS = 4  # of a number drawn: enough to tell trials apart, few enough to read

# as the history of a trial names them
Metric = Literal["top1", "top5", "val_loss", "ece", "kl_teacher_student", "agreement", "train_loss"]


class Range(Part):
    """The values of one field: a mapping with one of these keys; bounds are part of the range."""

    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    integer: tuple[int, int] | None = Field(None, alias="int")
    choice: list[Any] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _one(self) -> Range:
        if len(self.model_fields_set) != 1:
            raise ValueError("expected one of uniform, loguniform, int and choice: int: [1, 8]")
        bounds = self.uniform or self.loguniform or self.integer
        if bounds and bounds[0] >= bounds[1]:
            raise ValueError(f"{list(bounds)}: expected the lower bound first")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform {list(self.loguniform)}: expected bounds above 0")
        return self

    def values(self) -> list[Any] | None:
        """All values, if they can be told."""
        if self.integer:
            return list(range(self.integer[0], self.integer[1] + 1))
        return self.choice

    def draw(self, dice: random.Random) -> Any:
        """One value."""
        if self.integer:
            return dice.randint(*self.integer)
        if self.choice:
            return dice.choice(self.choice)
        low, high = self.bounds
        at = dice.random()
        if self.loguniform:
            return self.rounded(math.exp(math.log(low) + at * (math.log(high) - math.log(low))))
        return self.rounded(low + at * (high - low))

    @property
    def bounds(self) -> tuple[float, float]:
        """Of a range of numbers."""
        bounds = self.uniform or self.loguniform
        assert bounds is not None
        return bounds

    def rounded(self, value: float) -> float:
        """To DIGITS digits, inside the bounds."""
        low, high = self.bounds
        return min(max(float(f"{value:.{DIGITS}g}"), low), high)


class Search(Part):
    """How an experiment looks for the best settings of each cell of its grid.

    space: fields of a trial, and their ranges; loss.PARAMETER is left out for losses that have none
    such, LOSS.PARAMETER is for that loss alone. algorithm: random, grid (all combinations), or
    optuna (TPE). num_trials: for each cell. scheduler: stops trials that do worse than others of
    their cell after as many epochs; asha, its several brackets (hyperband, asynchronous) or the
    median rule; none of them before grace_epochs. time_budget: seconds of training for each cell.
    metric, mode: of the last epoch. seed: of what is drawn, and of all trials of the search. base:
    settings of these trials alone, such as data.holdout.

    `seeds` of the experiment are then fresh ones, on which the best of each cell are compared.
    """

    space: dict[str, Range] = Field(min_length=1)
    algorithm: Literal["random", "grid", "optuna"] = "random"
    num_trials: int | None = Field(None, ge=1)
    scheduler: Literal["none", "asha", "hyperband", "median"] = "none"
    grace_epochs: int = Field(1, ge=1)
    time_budget: float | None = Field(None, gt=0)
    metric: Metric = "top1"
    mode: Literal["max", "min"] = "max"
    seed: int = Field(0, ge=0, lt=2**31)
    base: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Search:
        if self.algorithm == "grid":
            for field, values in self.space.items():
                if values.values() is None:
                    raise ValueError(f"space.{field}: algorithm grid needs choice or int")
        elif self.num_trials is None:
            raise ValueError(f"num_trials: algorithm {self.algorithm} needs to know how many")
        return self


Point = dict[str, Any]  # a value for each field


def points(search: Search, space: dict[str, Range], cell: str) -> list[Point]:
    """All points of a random or grid search of a cell, without repetitions."""
    if search.algorithm == "grid":
        columns = [values.values() or [] for values in space.values()]
        rows = itertools.product(*columns)
        found = [dict(zip(space, row, strict=True)) for row in rows]
        return found[: search.num_trials]
    assert search.num_trials is not None
    found = []
    for number in range(search.num_trials if space else 1):
        for again in range(100):  # a small space has few points
            dice = random.Random(f"{search.seed} {cell} {number} {again}")
            point = {field: values.draw(dice) for field, values in space.items()}
            if point not in found:
                found.append(point)
                break
    return found


# a point so far, what it reached (None: unknown, or it failed), and whether it still runs
Tried = tuple[Point, float | None, bool]


def suggest(search: Search, space: dict[str, Range], cell: str, tried: list[Tried]) -> Point:
    """Optuna's next point (TPE), given those so far, running ones among them."""
    try:
        import optuna
    except ImportError:
        raise InputError("search.algorithm is 'optuna': pip install 'pld-ray[optuna]'") from None
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def distribution(values: Range) -> BaseDistribution:
        if values.integer:
            return IntDistribution(*values.integer)
        if values.choice:
            return CategoricalDistribution(range(len(values.choice)))  # it takes no lists
        return FloatDistribution(*values.bounds, log=values.loguniform is not None)

    def inside(field: str, value: Any) -> Any:
        choice = space[field].choice
        return value if choice is None else choice.index(value)

    distributions = {field: distribution(values) for field, values in space.items()}
    seed = random.Random(f"{search.seed} {cell} {len(tried)}").getrandbits(32)
    study = optuna.create_study(
        direction="maximize" if search.mode == "max" else "minimize",
        sampler=optuna.samplers.TPESampler(seed=seed, constant_liar=True),
    )
    for point, value, runs in tried:
        state = TrialState.RUNNING if runs else TrialState.COMPLETE
        if not runs and value is None:
            state = TrialState.FAIL
        params = {field: inside(field, at) for field, at in point.items()}
        study.add_trial(
            create_trial(
                state=state,
                value=None if runs else value,
                params=params,
                distributions=distributions,
            )
        )
    asked = study.ask(distributions).params
    found = {}
    for field, values in space.items():
        value = asked[field]
        if values.choice:
            value = values.choice[value]
        found[field] = value if values.integer or values.choice else values.rounded(value)
    return found
