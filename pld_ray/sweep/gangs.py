"""Gangs as Ray Tune sees them: a Tune trial is a gang, and a gang has one or more trials."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from pld_ray.config.trial import Trial
from pld_ray.sweep.resources import ResourceRequest


@dataclass
class Gang:
    """A gang that runs.

    Attributes:
        trials: Those of its trials that have not ended, by id.
        needs: The resources that it has.
        done: The epochs that each of them has done, by id.
        pace: The seconds of the last epoch of each, by id.
        asked: Ids of trials that were asked to leave, because another process has room for them.
        moved: Those that have left.
    """

    trials: dict[str, Trial]
    needs: ResourceRequest
    done: dict[str, int] = field(default_factory=dict)
    pace: dict[str, float] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    moved: dict[str, Trial] = field(default_factory=dict)

    @property
    def epochs_left(self) -> int:
        """The epochs that its trials have still to do."""
        return sum(map(self._epochs_left, self.trials))

    def _epochs_left(self, key: str) -> int:
        return self.trials[key].epochs - self.done.get(key, 0)

    @property
    def seconds_left(self) -> dict[str, float]:
        """The seconds that each trial still needs, by id; 0 before its first epoch."""
        return {key: self._epochs_left(key) * self.pace.get(key, 0.0) for key in self.trials}

    def half(self) -> set[str]:
        """Return trials that need half of the seconds that are left, or a little less.

        A trial in its last epoch stays.
        """
        seconds, found = self.seconds_left, set[str]()
        room = sum(seconds.values()) / 2
        for key in sorted(seconds, key=lambda key: -seconds[key]):
            if 0 < seconds[key] <= room and self._epochs_left(key) > 1:
                found.add(key)
                room -= seconds[key]
        return found


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


def join(
    first: Trial,
    ready: Iterable[Trial],
    largest: int,
    room: float,
    take: Callable[[Trial], bool],
) -> dict[str, Trial]:
    """Return the trials of a gang, by id: one that starts, and those that join it.

    Args:
        first: The trial that starts.
        ready: Trials that could join it, with the same stream. Those with the teacher of `first`
            come first.
        largest: The largest number of trials.
        room: The epochs that the gang may have; infinity for no limit.
        take: Claims a trial; returns whether it did.
    """
    found, room = {first.id: first}, room - first.epochs
    for trial in sorted(ready, key=lambda trial: trial.teacher != first.teacher):
        if len(found) >= largest or trial.epochs / 2 > room:  # it is nearer to the limit without it
            break
        if take(trial):
            found[trial.id] = trial
            room -= trial.epochs
    return found
