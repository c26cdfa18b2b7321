"""When a trial whose process died is tried again: twice per epoch; progress resets the count."""

from __future__ import annotations

from typing import Any

from ray.tune.callback import Callback

RETRIES = 2  # per epoch


class RetryOnProgress(Callback):
    """Tune callback that allows RETRIES more failures whenever a trial gets further than before."""

    def __init__(self) -> None:
        self.furthest: dict[str, int] = {}  # trial id -> its last epoch in any attempt

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks to restore an experiment, which is never done here

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        """Count the failures of a trial anew when it has finished another epoch."""
        key, epoch = trial.config["id"], result.get("epoch", 0)
        if epoch > self.furthest.get(key, 0):
            self.furthest[key] = epoch
            trial.max_failures = trial.run_metadata.num_failures + RETRIES


def give_up_reason(reason: str, epoch: int) -> str:
    """Return the reason why a trial is not tried again.

    Args:
        reason: Why its last attempt ended.
        epoch: The epoch that the trial did not finish, counted from 1.
    """
    return f"{reason} ({RETRIES + 1} times in epoch {epoch})"
