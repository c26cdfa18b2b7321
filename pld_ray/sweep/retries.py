"""When a gang whose process died is tried again.

A trial alone is tried again twice per epoch, a gang once; progress resets the count. A gang that
died twice goes on in two halves (see `scheduling.py`).
"""

from __future__ import annotations

from typing import Any

from ray.tune.callback import Callback

RETRIES = 2  # per epoch of a trial alone


class RetryOnProgress(Callback):
    """Tune callback that allows further failures whenever a trial gets further than before."""

    def __init__(self) -> None:
        self.furthest: dict[str, int] = {}  # trial id -> its last epoch in any attempt

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks to restore an experiment, which is never done here

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Allow the failures of a new gang."""
        if not trial.run_metadata.num_failures:
            self._allow(trial)

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        """Count the failures of a gang anew when a trial gets further, or has ended."""
        for epoch in result.get("epochs", ()):
            if epoch["epoch"] > self.furthest.get(epoch["id"], 0):
                self.furthest[epoch["id"]] = epoch["epoch"]
                self._allow(trial)
        if "ended" in result:
            self._allow(trial)

    def _allow(self, trial: Any) -> None:
        retries = RETRIES if len(trial.config["trials"]) == 1 else 1
        trial.max_failures = trial.run_metadata.num_failures + retries


def give_up_reason(reason: str, epoch: int) -> str:
    """Return the reason why a trial is not tried again.

    Args:
        reason: Why its last attempt ended.
        epoch: The epoch that the trial did not finish, counted from 1.
    """
    return f"{reason} ({RETRIES + 1} times in epoch {epoch})"
