"""Show the progress of a sweep: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pld_ray.config.planning import Plan
from pld_ray.config.trial import Trial
from pld_ray.units import duration


class ProgressView:
    """Progress display for the trials of a plan. It is a context manager around the sweep.

    Args:
        plan: Plan whose trials run.
        pending: Trials of the plan that have no record yet, by trial id.
        console: Console to print to.
        to_draw: Number of further trials that a search has still to draw.
    """

    def __init__(
        self, plan: Plan, pending: dict[str, Trial], console: Console, to_draw: int = 0
    ) -> None:
        self.total, self.pending = len(plan.trials) + to_draw, dict(pending)
        self.to_draw = to_draw  # trials that a search has not drawn yet
        self.labels, self.teacher_ids = dict(plan.labels), plan.teacher_ids
        self.console = console
        self.already = len(plan.trials) - len(pending)
        self.running: dict[str, dict[str, Any]] = {}  # trial id -> the last value of each metric
        self.done = 0
        self.failed = 0
        self.epochs_left = sum(trial.epochs for trial in pending.values())
        self.epochs_seen = 0
        self.teacher = {"spent": 0.0, "avoided": 0.0}  # seconds
        self.started = time.monotonic()
        self.live = _live(self, console) if _can_redraw(console) else None

    def __enter__(self) -> ProgressView:
        if self.live:
            self.live.start()
        elif self.pending or self.to_draw:
            to_run = len(self.pending) + self.to_draw
            self.console.print(f"{to_run} trials to run, {self.already} done before")
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()
        elif self._teacher():
            self.console.print(self._teacher(), highlight=False)

    def start(self, trial_id: str) -> None:
        """Mark a trial as running."""
        if not self.running and not self.epochs_seen:
            self.started = time.monotonic()  # the start of Ray does not count for the rate
        self.running.setdefault(trial_id, {})

    def result(self, trial_id: str, metrics: dict[str, Any]) -> None:
        """Update the display with the metrics of a finished epoch."""
        before = self.running.get(trial_id, {}).get("epoch", 0)
        self.epochs_left -= metrics["epoch"] - before
        self.epochs_seen += 1
        self.running[trial_id] = self.running.get(trial_id, {}) | metrics
        self.teacher["spent"] += metrics.get("teacher_seconds", 0.0)
        self.teacher["avoided"] += metrics.get("teacher_avoided_seconds", 0.0)

    def add(self, trial: Trial, label: str) -> None:
        """Add a trial that a search has drawn."""
        self.pending[trial.id], self.labels[trial.id] = trial, label
        self.epochs_left += trial.epochs

    def end(self, trial_id: str, failure: str | None, note: str | None = None) -> None:
        """Mark a trial as ended, and print a line if there is no live table.

        Args:
            trial_id: Id of the trial.
            failure: Why it failed, or None.
            note: How it ended without a failure and without finishing here, or None.
        """
        metrics = self.running.pop(trial_id, {})
        self.epochs_left -= self.pending[trial_id].epochs - metrics.get("epoch", 0)
        if failure is None:
            self.done += 1
            outcome = f"top-1 {metrics['top1']:.2f}" if "top1" in metrics else "done"
            outcome = f"{outcome}, {note}" if note and "top1" in metrics else note or outcome
        else:
            self.failed += 1
            outcome = f"FAILED: {failure}"
        place = f"{self.already + self.done + self.failed}/{self.total}"
        if not self.live:
            label = self.labels[trial_id]
            self.console.print(
                f"[{place}] {label}: {outcome}{self._left()}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def _left(self) -> str:
        """Return the estimated time left as the end of a sentence, or an empty string."""
        if not self.epochs_seen or not self.epochs_left:
            return ""
        elapsed = time.monotonic() - self.started
        return f", about {duration(elapsed / self.epochs_seen * self.epochs_left)} left"

    def _teacher(self) -> str:
        """Return the time spent and avoided in teacher forward passes, or an empty string."""
        if not any(self.teacher.values()):
            return ""
        spent, avoided = (duration(self.teacher[name]) for name in ("spent", "avoided"))
        return f"teacher forward passes: {spent} spent, {avoided} avoided"

    def __rich__(self) -> Group:
        table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
        for name in ("trial", "epoch", "", "top-1", "images/s"):
            table.add_column(name, style=None if name else "cyan", header_style="dim")
        shown = list(self.running.items())[:12]
        for trial_id, metrics in shown:
            trial, epoch = self.pending[trial_id], metrics.get("epoch", 0)
            role = " (teacher)" if trial_id in self.teacher_ids else ""
            table.add_row(
                self.labels[trial_id] + role,
                f"{epoch}/{trial.epochs}",
                ProgressBar(total=trial.epochs, completed=epoch, width=20),
                f"{metrics['top1']:.2f}" if "top1" in metrics else "",
                f"{metrics['images_per_second']:,.0f}" if "images_per_second" in metrics else "",
            )
        queued = self.total - self.already - self.done - self.failed - len(self.running)
        line = Text(f"{self.already + self.done} done", style="bold green")
        line.append(f"  {len(self.running)} running  {queued} queued", style="default")
        if self.failed:
            line.append(f"  {self.failed} failed", style="bold red")
        line.append(self._left().replace(", ", "  "), style="dim")
        return Group(table, line, *([self._teacher()] if self._teacher() else []))


def _can_redraw(console: Console) -> bool:
    """Return whether a console can show a table that changes: a terminal, or a notebook."""
    widgets = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal or widgets


def _live(view: ProgressView, console: Console) -> Live:
    """Create the live table."""
    # with its own redirection, rich would show the output of other code on the screen
    return Live(
        view, console=console, refresh_per_second=4, redirect_stdout=False, redirect_stderr=False
    )


@contextmanager
def redirect_prints(log: Path) -> Iterator[Console]:
    """Redirect standard output and standard error to a file during the `with` block.

    The file descriptors are redirected, because Ray also prints from its own processes and from
    C++.

    Args:
        log: File to append the output to. Its folder is created.

    Yields:
        A console that prints to the original standard output, or to the notebook.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    screen, errors = os.dup(1), os.dup(2)
    with open(log, "ab", buffering=0) as file, os.fdopen(os.dup(1), "w") as out:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            if Console().is_jupyter:
                with _ray_logs_to(log):
                    yield Console()
            else:
                yield Console(file=out)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(screen, 1)
            os.dup2(errors, 2)
            os.close(screen)
            os.close(errors)


@contextmanager
def _ray_logs_to(log: Path) -> Iterator[None]:
    """Write the messages of Ray's loggers to a file: in a notebook they use no file descriptor."""
    logger, file = logging.getLogger("ray"), logging.FileHandler(log)
    before, logger.handlers = logger.handlers, [file]
    try:
        yield
    finally:
        logger.handlers = before
        file.close()
