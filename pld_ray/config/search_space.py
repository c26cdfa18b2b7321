"""The settings of a search: the ranges of its fields, and the points that it draws from them.

A random or grid search is a pure function of (seed, cell, number), so its trials are known before
any of them runs. Optuna's next point depends only on the search and on the results so far.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any, Literal

from pydantic import Field, model_validator

from pld_ray.config.validation import Part
from pld_ray.errors import InputError, nearest

DIGITS = 4  # significant digits of a drawn number: enough to tell trials apart, and readable

# Whether higher or lower values are better; the names are those in the history of a trial.
METRICS: dict[str, Literal["max", "min"]] = {
    "top1": "max",
    "top5": "max",
    "agreement": "max",
    "val_loss": "min",
    "ece": "min",
    "kl_teacher_student": "min",
    "train_loss": "min",
}


class Range(Part):
    """The values of one field in a search: a mapping with exactly one of these keys.

    Attributes:
        uniform: The bounds of a uniform distribution.
        loguniform: The bounds of a distribution that is uniform in the logarithm.
        integer: The lowest and highest integer, both included; the key in YAML is `int`.
        choice: A list of values.
    """

    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    integer: tuple[int, int] | None = Field(None, alias="int")
    choice: list[Any] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _one(self) -> Range:
        if len(self.model_fields_set) != 1:
            raise ValueError(
                "expected one of uniform, loguniform, int and choice, such as int: [1, 8]"
            )
        bounds = self.uniform or self.loguniform or self.integer
        if bounds and bounds[0] >= bounds[1]:
            raise ValueError(f"{list(bounds)}: expected the lower bound first, then a higher one")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform {list(self.loguniform)}: expected bounds above 0")
        return self

    def values(self) -> list[Any] | None:
        """Return all values of `int` or `choice`, or None for a continuous range."""
        if self.integer:
            return list(range(self.integer[0], self.integer[1] + 1))
        return self.choice

    def draw(self, dice: random.Random) -> Any:
        """Draw one value with the random generator `dice`."""
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
        """The lower and upper bound of a `uniform` or `loguniform` range."""
        bounds = self.uniform or self.loguniform
        assert bounds is not None
        return bounds

    def rounded(self, value: float) -> float:
        """Round a value to DIGITS significant digits, and clip it to the bounds."""
        low, high = self.bounds
        return min(max(float(f"{value:.{DIGITS}g}"), low), high)


class Search(Part):
    """The search for the best settings of each cell of an experiment's grid.

    After the search, the best settings of each cell are trained and compared on the experiment's
    `seeds`, which the search does not use.

    Attributes:
        space: The fields of a trial that are searched, and their ranges. A field `loss.PARAMETER`
            does not apply to losses without this parameter; `LOSS.PARAMETER` applies to that loss
            only.
        algorithm: "random", "grid" (all combinations) or "optuna" (TPE).
        num_trials: The number of trials per cell. "grid" does not require it.
        scheduler: The rule that stops a trial that does worse than the others of its cell after
            the same number of epochs: "asha", "hyperband" (asynchronous, with several brackets),
            "median" (the median stopping rule) or "none". It acts after epochs that have the
            metric (see the setting `validate_every` of a trial).
        grace_epochs: The number of epochs before which no trial is stopped.
        time_budget: The seconds of training per cell.
        metric: The metric that is compared, taken from the last epoch that has it: "top1", "top5",
            "val_loss", "ece", "agreement", "kl_teacher_student", "train_loss", or one of the
            experiment's own `metrics`.
        mode: Whether a higher ("max") or lower ("min") value of the metric is better; by default
            known. A metric of a plug-in needs it.
        seed: The seed of the drawn points, and of all trials of the search.
        base: Settings of the trials of the search only, such as `data.holdout`.
    """

    space: dict[str, Range] = Field(min_length=1)
    algorithm: Literal["random", "grid", "optuna"] = "random"
    num_trials: int | None = Field(None, ge=1)
    scheduler: Literal["none", "asha", "hyperband", "median"] = "none"
    grace_epochs: int = Field(1, ge=1)
    time_budget: float | None = Field(None, gt=0)
    metric: str = "top1"
    mode: Literal["max", "min"] | None = None
    seed: int = Field(0, ge=0, lt=2**31)
    base: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Search:
        if self.algorithm == "grid":
            for field, values in self.space.items():
                if values.values() is None:
                    raise ValueError(f"space.{field}: algorithm grid needs choice or int")
        elif self.num_trials is None:
            raise ValueError(f"num_trials: algorithm {self.algorithm} needs a number of trials")
        better = METRICS.get(self.metric, self.mode)
        if self.mode not in (None, better):
            raise ValueError(
                f"mode is {self.mode!r}: expected {better!r} for {self.metric}, or no mode"
            )
        if self.mode is None and self.metric not in METRICS:
            raise ValueError(
                f"metric is {self.metric!r}: {nearest(self.metric, METRICS)}; a metric of a "
                "plug-in needs mode, max or min"
            )
        return self

    @property
    def better(self) -> Literal["max", "min"]:
        """Whether a higher ("max") or a lower ("min") value of the metric is better."""
        return self.mode or METRICS[self.metric]


Point = dict[str, Any]  # one value per field


def points(search: Search, space: dict[str, Range], cell: str) -> list[Point]:
    """Return all points of a random or grid search of one cell, without duplicates.

    Args:
        search: The settings of the search.
        space: The fields that apply to this cell, and their ranges.
        cell: The key of the cell; it is part of the random seed.

    Returns:
        At most `search.num_trials` points.
    """
    if search.algorithm == "grid":
        columns = [values.values() or [] for values in space.values()]
        rows = itertools.product(*columns)
        found = [dict(zip(space, row, strict=True)) for row in rows]
        return found[: search.num_trials]
    assert search.num_trials is not None
    found = []
    for number in range(search.num_trials if space else 1):
        for again in range(100):  # a small space may have no further points
            dice = random.Random(f"{search.seed} {cell} {number} {again}")
            point = {field: values.draw(dice) for field, values in space.items()}
            if point not in found:
                found.append(point)
                break
    return found


# a point, its score (None if it is unknown or the trial failed), and whether the trial still runs
Tried = tuple[Point, float | None, bool]


def suggest(search: Search, space: dict[str, Range], cell: str, tried: list[Tried]) -> Point:
    """Suggest the next point with Optuna's TPE sampler.

    Args:
        search: The settings of the search.
        space: The fields that apply to this cell, and their ranges.
        cell: The key of the cell; it is part of the random seed.
        tried: The points so far with their scores, including those of running trials.

    Returns:
        The next point; the same arguments give the same point.

    Raises:
        InputError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise InputError(
            "search.algorithm is 'optuna', which is not installed: pip install 'pld-ray[optuna]'"
        ) from None
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
            return CategoricalDistribution(range(len(values.choice)))  # no lists allowed
        return FloatDistribution(*values.bounds, log=values.loguniform is not None)

    def inside(field: str, value: Any) -> Any:
        choice = space[field].choice
        return value if choice is None else choice.index(value)

    distributions = {field: distribution(values) for field, values in space.items()}
    seed = random.Random(f"{search.seed} {cell} {len(tried)}").getrandbits(32)
    study = optuna.create_study(
        direction="maximize" if search.better == "max" else "minimize",
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
