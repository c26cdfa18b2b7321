"""The training loop of the trials of a gang, on one worker or many.

    set up -> resume -> [train an epoch -> evaluate -> keep -> report] ... -> record

Trials of a gang step through one stream: a batch is prepared once, a teacher that several of them
need runs once, and then each trial does its own step. A trial alone is a gang of one.

A trial is a pure function of its spec: the first weights are drawn from its seed, and the random
numbers of an epoch from (seed, epoch, worker). It ends with the same bits alone and in any gang,
and when it was killed and continues from its last checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pld_ray.config.trial import Trial
from pld_ray.data.images import Images
from pld_ray.data.sampling import Ints, batches, order
from pld_ray.data.stream import Batch, joined
from pld_ray.distill.bank import Ledger
from pld_ray.distill.device import (
    lacks_deterministic,
    pick_device,
    release_memory,
    use_deterministic,
)
from pld_ray.distill.evaluation import evaluate_batch, evaluate_teacher, scores, val_batches
from pld_ray.distill.keeping import keep_checkpoint, keep_epoch, keep_record, resume
from pld_ray.distill.memory import FirstSteps, NoRoom
from pld_ray.distill.metrics import loss_means
from pld_ray.distill.running import Run, Shared, TrainingError, set_up, sum_over_workers
from pld_ray.distill.targets import LIVE, Targets
from pld_ray.store.store import Store

OF_TEACHER = ("teacher", "teacher_avoided", "bank", "waiting")
"""Parts of an epoch that only trials with a teacher need."""
REST = "rest"  # what is in no part

Report = Callable[[list[dict[str, Any]]], None]
Ended = Callable[[Trial, Exception | None], None]


def train(
    trial: Trial,
    images: Images,
    store: Store,
    report: Callable[[dict[str, Any]], None],
    ledger: Ledger | None = None,
    alive: Callable[[], None] = lambda: None,
    device: torch.device | None = None,
) -> None:
    """Run one trial to its end; see `train_gang`.

    Args:
        trial: The trial, fully specified.
        images: Its dataset.
        store: Receives checkpoints, the epoch log, the weights and the record.
        report: Called after every epoch with its metrics, by all workers.
        ledger: Keeps processes from computing the same teacher logits twice.
        alive: Called after every piece of work: a batch, or a forward pass of the teacher.
        device: Default: the CUDA device if there is one, else the CPU.

    Raises:
        TrainingError: The loss, a weight or a logit of the teacher is not finite.
    """

    def ended(trial: Trial, error: Exception | None) -> None:
        if error is not None:
            raise error

    def each(epochs: list[dict[str, Any]]) -> None:
        report(*epochs)

    train_gang([trial], images, store, each, ended, ledger, alive, device)


def train_gang(
    trials: Sequence[Trial],
    images: Images,
    store: Store,
    report: Report,
    ended: Ended,
    ledger: Ledger | None = None,
    alive: Callable[[], None] = lambda: None,
    device: torch.device | None = None,
    stopped: Callable[[Trial], bool] = lambda trial: False,
) -> None:
    """Run trials to their ends, each from its last checkpoint if there is one.

    With several workers, each of them calls this with torch.distributed initialised. The first one
    writes to the store.

    Args:
        trials: The trials, fully specified, with one stream (see `config.gangs.stream_key`).
        images: Their dataset.
        store: Receives checkpoints, the epoch logs, the weights and the records.
        report: Called after every epoch with the metrics of each trial, by all workers.
        ended: Called when a trial is in the store or was stopped, or with the error that ended it,
            such as `NoRoom`. The others go on, unless this raises an exception.
        ledger: Keeps processes from computing the same teacher logits twice.
        alive: Called after every piece of work: a batch, or a forward pass of the teacher.
        device: Default: the CUDA device if there is one, else the CPU.
        stopped: Called after every epoch of a trial but the last: whether it stops there. It can
            continue later.
    """
    device = device or pick_device()
    use_deterministic(device)
    lacking: dict[str, str] = {}

    def left(trial: Trial, error: Exception | None) -> None:
        if error is not None and (lack := lacks_deterministic(error)):
            lacking[trial.id] = lack
        else:
            ended(trial, error)

    def go(trials: Sequence[Trial], ended: Ended, note: str = "") -> None:
        shared = Shared(trials[0], images, store, ledger, alive, device)
        Gang(shared, report, ended, stopped).train(trials, note)

    go(trials, left)
    for trial in trials:
        if trial.id in lacking:
            release_memory()  # of the first attempt
            use_deterministic(device, strict=False)
            note = f"another run may differ in its last bits: {lacking[trial.id]}"
            go([trial], ended, note)


class Gang:
    """Trials that step together in one worker.

    Args:
        shared: What they share.
        report: Called after every epoch with the metrics of each trial.
        ended: Called when a trial has ended.
        stopped: Whether a trial stops after an epoch.

    Attributes:
        runs: The trials that have not ended.
    """

    def __init__(
        self, shared: Shared, report: Report, ended: Ended, stopped: Callable[[Trial], bool]
    ) -> None:
        self.shared, self.report, self.ended, self.stopped = shared, report, ended, stopped
        self.runs: list[Run] = []
        self.first_steps = FirstSteps(shared.device)
        self.final: Exception | None = None  # what `ended` raised, which ends the gang

    def train(self, trials: Sequence[Trial], note: str = "") -> None:
        """Run trials to their ends.

        Args:
            trials: The trials.
            note: A sentence for their records.
        """
        for trial in trials:
            with self.member(trial):
                run = set_up(trial, self.shared)
                run.note = note
                resume(run)
                evaluate_teacher(run)
                self.runs.append(run)
        while self.runs:
            for run in list(self.runs):
                if len(run.history) == run.trial.epochs:
                    with self.member(run.trial):
                        keep_record(run)
                    if run in self.runs:
                        self.leave(run.trial)
                        self.ended(run.trial, None)
            if self.runs:
                try:
                    self.one_epoch()
                except Exception as error:
                    if error is self.final:
                        raise
                    for run in list(self.runs):  # it is an error in what is done once for all
                        with self.member(run.trial):
                            raise error

    def one_epoch(self) -> None:
        """Do an epoch of the trials that are furthest behind; the others wait for them."""
        epoch = min(len(run.history) for run in self.runs)
        runs = [run for run in self.runs if len(run.history) == epoch]
        started, alone = time.perf_counter(), len(runs) == 1
        train_epoch(self, runs, epoch)
        runs = self.still(runs)
        trained = self._shares(runs, started)
        losses: dict[Run, tuple[dict[str, float], int]] = {}
        for run in runs:
            with self.member(run.trial):
                losses[run] = mean_losses(run)
                share_buffers(run)
        started = time.perf_counter()
        due = [run for run in self.still(runs) if run.trial.validates(epoch + 1)]
        found = self.validate(due, alone) if due else {}
        validated = self._shares(self.still(due), started)
        for run in self.still(runs):
            parts = _added(trained[run], validated.get(run, {}))
            means, seen = losses[run]
            run.history.append(
                {
                    "epoch": epoch + 1,
                    **means,
                    **run.distiller.learnt_numbers(),
                    **found.get(run, {}),
                    "lr": run.optimizer.param_groups[0]["lr"],
                    "images_per_second": seen / _seconds(trained[run]),
                    "seconds": _seconds(parts),
                    "teacher_images": run.teacher.take_images_seen() if run.teacher else 0,
                    **{f"{name}_seconds": value for name, value in parts.items() if name != REST},
                }
            )
        self.keep_and_report(self.still(runs))

    def validate(self, runs: list[Run], alone: bool) -> dict[Run, dict[str, float]]:
        """Return the metrics of trials on the validation images; each batch is prepared once.

        Args:
            runs: The trials.
            alone: Whether only one trial was trained in the epoch.
        """
        found: dict[Run, dict[str, float]] = {}
        for run in runs:
            run.best_student.eval()
        for number, (images, labels) in enumerate(val_batches(self.shared)):
            for run in self.still(runs):
                with self.member(run.trial), nullcontext() if alone else run.own_random():
                    given = images.clone() if not alone and run.own_code else images
                    evaluate_batch(run, number, given, labels)
        for run in self.still(runs):
            with self.member(run.trial), nullcontext() if alone else run.own_random():
                found[run] = scores(run)
        return found

    def _shares(self, runs: list[Run], started: float) -> dict[Run, dict[str, float]]:
        """Return the seconds of the parts of what some trials did since a time.

        What is done once counts in equal shares for the trials that need it.
        """
        own, common = {run: run.clock.read() for run in runs}, self.shared.clock.read()
        if live := common.pop(LIVE, 0.0):
            users = [run.live_teacher for run in runs if run.live_teacher is not None]
            avoided = live * (len(users) / max(1, len(set(users))) - 1)
            common = _added(common, {"teacher": live, "teacher_avoided": avoided})
        spent = _seconds(common) + sum(map(_seconds, own.values()))
        common[REST] = max(0.0, time.perf_counter() - started - spent)
        taught = sum(run.teacher is not None for run in runs)
        found = {}
        for run in runs:
            shares = {
                name: value / (taught if name in OF_TEACHER else len(runs))
                for name, value in common.items()
                if run.teacher is not None or name not in OF_TEACHER
            }
            found[run] = _added(shares, own[run])
        return found

    def keep_and_report(self, runs: list[Run]) -> None:
        """Keep and report an epoch of some trials; those that are stopped leave."""
        for run in runs:
            with self.member(run.trial):
                keep_epoch(run)
        runs = self.still(runs)
        if not runs:
            return
        try:
            self.report(
                [run.history[-1] | {"id": run.trial.id, "epochs": run.trial.epochs} for run in runs]
            )
        except SystemExit:  # Tune stops the process; the trials may continue later
            for run in runs:
                keep_checkpoint(run)
            raise
        runs = [run for run in runs if len(run.history) < run.trial.epochs]
        stops = [self.shared.rank == 0 and self.stopped(run.trial) for run in runs]
        for run, stop in zip(runs, self.agreed(stops), strict=True):
            if stop:
                with self.member(run.trial):
                    keep_checkpoint(run)
                    self.leave(run.trial)
                    self.ended(run.trial, None)

    def agreed(self, found: list[bool]) -> list[bool]:
        """Return for each question whether any worker says yes."""
        if self.shared.world == 1:
            return found
        asked = torch.tensor(found, dtype=torch.float32, device=self.shared.device)
        return [bool(each) for each in sum_over_workers(asked).tolist()]

    @contextmanager
    def room_for(self, run: Run) -> Iterator[None]:
        """Measure the first step of a trial.

        Raises:
            NoRoom: The process has too little memory for it.
        """
        if run.stepped:
            yield
            return
        if self.agreed([self.first_steps.lacks_room()])[0]:
            raise NoRoom
        self.first_steps.begin()
        yield
        self.first_steps.end()
        run.stepped = True

    def still(self, runs: list[Run]) -> list[Run]:
        """Return those of some trials that have not ended."""
        return [run for run in runs if run in self.runs]

    def leave(self, trial: Trial) -> None:
        """Forget a trial; the others go on."""
        self.runs = [run for run in self.runs if run.trial.id != trial.id]

    @contextmanager
    def member(self, trial: Trial) -> Iterator[None]:
        """Let a trial leave if there is an error in the `with` block.

        Workers that train together can only go on together: an error that not all of them have
        ends all of their trials.
        """
        gradients = torch.is_grad_enabled()
        try:
            yield
        except Exception as error:
            common = isinstance(error, (TrainingError, NoRoom)) or lacks_deterministic(error)
            if self.shared.world > 1 and not common:
                raise
            self.leave(trial)
            try:
                self.ended(trial, error)
            except Exception as final:
                self.final = final
                raise
        finally:
            torch.set_grad_enabled(gradients)


def train_epoch(gang: Gang, runs: list[Run], epoch: int) -> None:
    """Train trials on every batch of an epoch (from 0); `runs` are at its begin."""
    shared, trial = gang.shared, runs[0].trial
    alone = len(runs) == 1
    for run in runs:
        run.begin(epoch)
    views = {
        stream: each.view(epoch)
        for run in runs
        for stream, each in zip(run.streams, run.trial.each_view, strict=True)
    }
    samples = order(trial.seed, epoch, len(shared.images.train))
    global_batches = list(batches(samples, trial.batch_size, trial.drop_last))
    shares = [batch[shared.rank :: shared.world] for batch in global_batches]
    prepared = {stream: stream.batches(shares, view) for stream, view in views.items()}
    if any(run.distiller.takes_samples for run in runs):
        prepared[shared.stream] = _with_indices(
            prepared[shared.stream], global_batches, shares, shared
        )
    with closing(Targets(runs, shares, views)) as targets:
        for number, (batch, share) in enumerate(zip(global_batches, shares, strict=True)):
            graphs = any(run.update.graphs is not None for run in runs)
            for clock in (shared.clock, *(run.clock for run in runs)):
                clock.step(number, shared.steps, graphs)
            with shared.clock("data"):
                ours = {stream: next(batches) for stream, batches in prepared.items()}
            if targets.read():
                with shared.clock("data"):
                    for stream, each in ours.items():
                        ours[stream] = replace(each, given=(each.images,), make=_as_they_are)
                targets.compute({stream: each.images for stream, each in ours.items()})
            step = epoch * shared.steps + number
            # The shares of a ragged batch differ by one sample. With these weights the mean of the
            # workers' gradients is the gradient of the mean over the batch.
            weight = len(share) * shared.world / len(batch)
            for run in runs:
                with gang.member(run.trial), nullcontext() if alone else run.own_random():
                    run.schedule.step_update(step)
                    seen = joined([ours[stream] for stream in run.streams])
                    given = seen, targets.of(run)
                    if not alone and run.own_code:
                        given = given[0].copy(), given[1].copy()
                    with gang.room_for(run):
                        run.losses.append(run.update(*given, weight, step))
            runs[:] = gang.still(runs)
            if not runs:
                return


def _as_they_are(images: Tensor) -> Tensor:
    """Return images that are made already."""
    return images


def _with_indices(
    prepared: Iterator[Batch], whole: list[Ints], shares: list[Ints], shared: Shared
) -> Iterator[Batch]:
    """Yield the batches of a worker with the indices of their samples.

    All workers have as many: one that has a sample less than others has its last index twice.
    """
    longest = (-(-len(batch) // shared.world) for batch in whole)
    padded = [
        np.pad(i, (0, size - len(i)), "edge") for i, size in zip(shares, longest, strict=True)
    ]
    for batch, index in zip(prepared, shared.stream.indices(padded), strict=True):
        yield replace(batch, index=index)


def _seconds(parts: dict[str, float]) -> float:
    """Return the seconds of parts that were really spent."""
    return sum(seconds for name, seconds in parts.items() if name != "teacher_avoided")


def _added(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    """Add numbers by name."""
    names = dict.fromkeys([*first, *second])
    return {name: first.get(name, 0.0) + second.get(name, 0.0) for name in names}


def mean_losses(run: Run) -> tuple[dict[str, float], int]:
    """Return the means of the loss and its terms over the samples of an epoch, and their number.

    Raises:
        TrainingError: The loss of a step, or a weight, is not finite.
    """
    trial, count = run.trial, len(run.shared.images.train)
    every = batches(order(0, 0, count), trial.batch_size, trial.drop_last)
    sizes = torch.tensor([len(batch) for batch in every], dtype=torch.float64)
    steps = torch.stack(run.losses).double().view(len(sizes), -1)  # the loss, and its terms
    means = sum_over_workers(steps).cpu() / run.shared.world
    check_finite(run, means[:, 0])
    return loss_means((sizes @ means / sizes.sum()).tolist()), int(sizes.sum())


def share_buffers(run: Run) -> None:
    """Give all workers the buffers of the first one, such as the running means of batch norm.

    Each worker updates them with its own share of the batches. The first one's are kept, so that
    they must be those that are evaluated, and those with which all workers go on.
    """
    if run.shared.world > 1:
        for network in (run.distiller.student, run.distiller.loss, run.ema):
            for buffer in network.buffers() if network is not None else ():
                dist.broadcast(buffer, 0)


def check_finite(run: Run, losses: Tensor) -> None:
    """Raise TrainingError if a loss [steps] of an epoch, or a weight after it, is not finite."""
    epoch, wrong = len(run.history) + 1, losses.isfinite().logical_not().nonzero()
    if len(wrong):
        step = int(wrong[0])
        raise TrainingError(
            f"the training loss is {losses[step]:g} in step {step + 1} of epoch {epoch}: a "
            "lower optimizer.lr or clip_grad may help"
        )
    finite = torch.stack([p.isfinite().all() for p in run.best_student.parameters()])
    if not finite.all():
        raise TrainingError(
            f"the student's weights are not finite after step {len(losses)}, the last of epoch "
            f"{epoch}: a lower optimizer.lr or clip_grad may help"
        )
