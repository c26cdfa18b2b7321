"""Which trials can be a gang: trials that step through one stream of images in one process.

A gang prepares each batch once and runs each teacher once for all of its members. A member has the
same results as alone, so gangs are no part of a trial's settings.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from pld_ray import plugins
from pld_ray.config.parts import Data
from pld_ray.config.trial import Trial

SAME = (
    "data", "views", "seed", "batch_size", "drop_last", "workers", "precision", "channels_last",
)  # fmt: skip


def stream_key(trial: Trial) -> str:
    """Return a text that trials have in common if they can step through one stream.

    They may differ in student, teacher, loss, optimizer, schedule and number of epochs. A trial
    whose student is compiled is alone: torch keeps few compiled networks in a process.
    """
    if trial.compile:
        return trial.id
    settings = trial.settings | {"seed": trial.seed}
    return json.dumps([settings[field] for field in SAME])


def gang_key(trial: Trial, auto: bool) -> tuple[str, str]:
    """Return what the trials of a gang have in common.

    Args:
        trial: A trial.
        auto: Whether they must also share something that costs time: images that take long to
            prepare, or a teacher whose network runs in every step. If they share neither, a gang
            has no use, and single trials keep all cores busy for longer.
    """
    stream = stream_key(trial)
    if not auto or _prepares_long(trial):
        return stream, ""
    if second := trial.each_view[1:]:
        return stream, json.dumps(second[0].data.augment)
    if trial.teacher is not None and trial.runs_teacher:
        return stream, trial.teacher.model_dump_json()
    return stream, trial.id


def _prepares_long(trial: Trial) -> bool:
    """Return whether images take long to read or augment, as far as the settings say it.

    With `image_size`, they may be files that are decoded for each batch.
    """
    data = trial.data
    own = plugins.used({("dataset", data.name.partition(":")[0])})
    return bool(data.augment or data.image_size or own)


@dataclass(frozen=True)
class PlannedGang:
    """Trials that can be one gang, and what that spares.

    Attributes:
        trials: The trials.
        apart: Epochs for which images are prepared if each trial is alone. An epoch of a loss that
            takes two views of each image counts twice, here and in the other numbers.
        together: Epochs for which they are prepared in the gang.
        taught_apart: Epochs for which networks of teachers run in the steps of trials alone.
        taught_together: The same in the gang.
    """

    trials: tuple[Trial, ...]
    apart: int
    together: int
    taught_apart: int
    taught_together: int


def planned(trials: Iterable[Trial], largest: int | None = None) -> list[PlannedGang]:
    """Return the gangs that trials can form; trials that are alone are left out.

    On a cluster, a gang may be cut into several, so that all cores and GPUs have work.

    Args:
        trials: The trials that are to run.
        largest: The largest number of trials in a gang; None for no limit, but only gangs that
            share something that costs time.
    """
    trials = list(trials)
    teachers = {t.teacher.id for t in trials if isinstance(t.teacher, Trial)}
    alike: dict[tuple[tuple[str, str], bool], list[Trial]] = defaultdict(list)
    for trial in trials:
        alike[gang_key(trial, largest is None), trial.id in teachers].append(trial)
    found = []
    for group in alike.values():
        size = largest or len(group)
        for first in range(0, len(group), size):
            gang = group[first : first + size]
            if len(gang) > 1:
                found.append(_planned(gang))
    return found


def _planned(gang: list[Trial]) -> PlannedGang:
    """Return what it spares that some trials step together."""
    shown: dict[Data, list[int]] = defaultdict(list)  # epochs of trials by the view of images
    taught: dict[tuple[str, Data], list[int]] = defaultdict(list)  # also by the teacher that runs
    for trial in gang:
        for each in trial.each_view:
            shown[each.data].append(trial.epochs)
            if trial.teacher is not None and trial.runs_teacher:
                taught[trial.teacher.model_dump_json(), each.data].append(trial.epochs)
    return PlannedGang(
        trials=tuple(gang),
        apart=sum(map(sum, shown.values())),
        together=sum(map(max, shown.values())),
        taught_apart=sum(map(sum, taught.values())),
        taught_together=sum(map(max, taught.values())),
    )
