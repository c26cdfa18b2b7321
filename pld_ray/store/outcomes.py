"""What the store holds of one trial: its record, its epochs, and why it failed or was stopped."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pld_ray.store.documents import parse_epochs, parse_sound

OUTCOME = ("record.json", "epochs.jsonl", "failure.json", "stopped.json")


@dataclass(frozen=True)
class Outcome:
    """The stored results of a trial, which are parsed when they are needed.

    Attributes:
        files: The content of those files that the trial has and that are not damaged, by name.
    """

    files: dict[str, bytes]

    @cached_property
    def record(self) -> dict[str, Any] | None:
        """The record of a finished trial, else None."""
        return self._document("record.json")

    @cached_property
    def failure(self) -> dict[str, Any] | None:
        """The reason and traceback of the last attempt if it failed, else None."""
        return self._document("failure.json")

    @cached_property
    def stopped(self) -> dict[str, Any] | None:
        """Where and by which scheduler a search stopped the trial, else None."""
        return self._document("stopped.json")

    @cached_property
    def epochs(self) -> list[dict[str, Any]]:
        """The metrics of each epoch so far."""
        return parse_epochs(self.files.get("epochs.jsonl", b""))

    @property
    def finished(self) -> bool:
        """Whether the trial has a record."""
        return "record.json" in self.files

    def _document(self, name: str) -> dict[str, Any] | None:
        content = self.files.get(name)
        return None if content is None else parse_sound(content)

    def state(self, epochs: int) -> str:
        """Describe the state of the trial for people.

        Args:
            epochs: The number of epochs of the trial.
        """
        if self.finished:
            return "done"
        if self.failure is not None:
            return f"FAILED: {self.failure['reason']}"
        if self.stopped is not None:
            by = self.stopped["by"].replace("_", " ")
            return f"stopped by {by} after {self.stopped['epoch']}/{epochs} epochs"
        return f"{len(self.epochs)}/{epochs} epochs" if self.epochs else "not begun"
