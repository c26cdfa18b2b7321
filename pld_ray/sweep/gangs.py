"""Gangs as Ray Tune sees them: a Tune trial is a gang, and a gang has one or more trials."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from pld_ray.config.parts import Resources
from pld_ray.config.trial import Trial
from pld_ray.sweep.resources import ResourceRequest


@dataclass
class Gang:
    """A gang that runs.

    Attributes:
        trials: Those of its trials that have not ended, by id.
        needs: The resources that it has.
        size: The number of trials with which it started.
        done: The epochs that each of them has done, by id.
    """

    trials: dict[str, Trial]
    needs: ResourceRequest
    size: int
    done: dict[str, int] = field(default_factory=dict)

    @property
    def epochs_left(self) -> int:
        """The epochs that its trials have still to do."""
        return sum(trial.epochs - self.done.get(key, 0) for key, trial in self.trials.items())


@dataclass(frozen=True)
class Member:
    """A trial of a gang, with the attributes of a Tune trial that loggers read.

    Attributes:
        trial_id: An id of this run of the trial.
        config: What loggers show as its settings.
        name: Its name in loggers.
    """

    trial_id: str
    config: dict[str, Any] = field(compare=False)
    name: str = field(compare=False)
    evaluated_params: dict[str, Any] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return self.name


def companions(
    first: Trial,
    ready: Iterable[Trial],
    resources: Resources,
    stream: Callable[[Trial], str],
    share: Callable[[], float],
    most: Callable[[str], int],
) -> list[Trial]:
    """Return the trials that can step with another one, in the order in which they should join.

    Args:
        first: The trial that starts.
        ready: Trials that could start now, without `first`.
        resources: The resources of the trials.
        stream: Returns what trials have in common that can step through one stream.
        share: Returns the epochs that a gang may have, so that the cluster has work everywhere.
        most: Returns the largest gang that a trial with this id may be in.

    Returns:
        Trials with the same stream. Those with the teacher of `first` come first.
    """
    limit = resources.gang if isinstance(resources.gang, int) else None
    largest = min(most(first.id), limit or most(first.id))
    if largest == 1:
        return []
    key = stream(first)
    found = [trial for trial in ready if most(trial.id) > 1 and stream(trial) == key]
    found.sort(key=lambda trial: trial.teacher != first.teacher)
    if limit is None:
        room = share() - first.epochs
        for number, trial in enumerate(found):
            if trial.epochs / 2 > room:  # nearer to the share without it
                found = found[:number]
                break
            room -= trial.epochs
    return found[: largest - 1]
