"""Which trials can be a gang: trials that step through one stream of images in one process.

A gang prepares each batch once and runs each teacher once for all of its members. A member has the
same results as alone, so gangs are no part of a trial's settings.
"""

from __future__ import annotations

import json

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
