"""Ray: runs the trials of a plan that have no record yet.

    Plan -> PlanSearcher (a trial as soon as its teacher exists and the cluster has room)
         -> Ray Tune: one actor a trial, reused            -> train(), one worker
                      or, for workers > 1, TorchTrainer    -> train(), in every worker
         -> store; the Ledger sees to it that no two of them compute the same teacher logits

Tune restarts a trial whose process died, the Watch sees to it that one which hangs dies; the trial
itself goes on from its last checkpoint.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.callback import Callback

from pld_ray.config.planning import Plan
from pld_ray.config.trial import Resources, Trial
from pld_ray.data.datasets import sharing_key
from pld_ray.data.images import Images
from pld_ray.distill import bank_format, bank_plan
from pld_ray.errors import InputError
from pld_ray.store.claims import Claims
from pld_ray.store.store import Store
from pld_ray.sweep.cluster import connected
from pld_ray.sweep.early_stopping import EarlyStopping
from pld_ray.sweep.ledger import open_ledger
from pld_ray.sweep.liveness import start_monitor
from pld_ray.sweep.progress import ProgressView
from pld_ray.sweep.resources import ResourceRequest, need, nodes, resolved
from pld_ray.sweep.scheduling import RETRIES, PlanSearcher
from pld_ray.sweep.search import SearchProgress
from pld_ray.sweep.signals import signals_deferred
from pld_ray.sweep.worker import fill_bank, run_trial

HEAD = "node:__internal_head__"  # a resource every head node has


def run(
    plan: Plan,
    images: dict[str, Images],
    store: Store,
    view: ProgressView,
    address: str | None = None,
    progress: Sequence[SearchProgress] = (),
    loggers: Sequence[Callback] = (),
) -> dict[str, str]:
    """Run what `view.pending` holds; returns why trials failed, by trial id.

    images: from `check`. address: of a running cluster; without one, join what runs on this
    machine or start Ray here. progress: of the search whose trials these are. loggers: told of
    every epoch. Raises InputError for a trial that the cluster has no room for.
    """
    pending, resources = dict(view.pending), plan.experiment.resources
    stopping = EarlyStopping(progress, store) if progress else None
    with connected(address), Claims(store.files) as claims:
        search = PlanSearcher(pending, resources, store, claims, stopping)
        for key in {needed: key for key, needed in search.needs.items()}.values():
            if why := search.too_large(key):
                raise InputError(why)
        trials = [*pending.values(), *(each.group.cell.trial for each in progress)]
        watch = start_monitor(resources.patience, store)
        scratch = tempfile.mkdtemp(prefix="pld-ray-")
        trainable = tune.with_parameters(
            run_trial,
            images={name: ray.put(value) for name, value in images.items()},
            store_uri=store.uri,
            scratch=scratch,
            ledger=open_ledger() if any(map(bank_format.uses_bank, trials)) else None,
            watch=watch,
        )
        tuner = tune.Tuner(
            tune.with_resources(trainable, _placement),
            tune_config=tune.TuneConfig(
                search_alg=search,
                trial_dirname_creator=lambda trial: trial.trial_id,  # else the whole config
                trial_name_creator=_name,
                scheduler=stopping,
                num_samples=-1,
                # a kept actor holds its CPUs, which a group of workers may be waiting for
                reuse_actors=all(trial.workers == 1 for trial in trials),
            ),
            run_config=tune.RunConfig(
                name=plan.experiment.name,
                storage_path=scratch,
                verbose=0,
                callbacks=[_Follow(view, search), *loggers],
                failure_config=tune.FailureConfig(max_failures=RETRIES),
            ),
        )
        try:
            with signals_deferred() as search.look:
                tuner.fit()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            ray.kill(watch)
        return search.failures


def build_banks(
    planned: list[bank_plan.PlannedBank],
    resources: Resources,
    images: dict[str, Images],
    store: Store,
    address: str | None = None,
) -> None:
    """Compute all banks of `planned`, on every node of the cluster; their teachers are trained.

    Each bank in turn is shared out over as many tasks as the cluster has room for.
    """
    with connected(address):
        alone = planned[0].trial.model_copy(update={"workers": 1})
        one = need(alone, resolved(resources))
        if why := one.too_large("the teacher bank", nodes()):
            raise InputError(why)
        room = sum(one.workers_on(node) for node in nodes())
        references = {name: ray.put(value) for name, value in images.items()}
        ledger = open_ledger()
        task = ray.remote(fill_bank).options(num_cpus=one.cpus, num_gpus=one.gpus)
        tasks = [
            task.remote(
                some.trial, references[sharing_key(some.trial.data)], store.uri, ledger, worker
            )
            for some in planned
            for worker in range(room)
        ]
        try:
            ray.get(tasks)
        except ray.exceptions.RayTaskError as error:
            raise InputError(f"the teacher bank is not complete: {error.cause}") from None


def _name(trial: Any) -> str:
    """A trial's name in loggers."""
    return f"{Trial.model_validate(trial.config['trial']).label} {trial.config['id']}"


def _placement(config: dict[str, Any]) -> tune.PlacementGroupFactory:
    need = ResourceRequest(**config["needs"])
    if need.workers > 1:  # this actor only waits for its workers, which bring their own
        return tune.PlacementGroupFactory([{HEAD: 0.001}])
    return tune.PlacementGroupFactory([need.worker])


class _Follow(Callback):
    """Tells the view what Tune does."""

    def __init__(self, view: ProgressView, search: PlanSearcher) -> None:
        self.view, self.search = view, search
        self.told: set[str] = set()
        self.furthest: dict[str, int] = {}  # epoch of each trial

    def on_step_begin(self, iteration: int, trials: Any, **_: Any) -> None:
        self.search.look()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks to restore an experiment; we never do

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        while self.search.drawn:
            drawn = self.search.drawn.pop()
            self.view.add(drawn.trial, drawn.label)
        self.view.start(trial.config["id"])

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        if "epoch" in result:
            self.view.result(trial.config["id"], result)
            if result["epoch"] > self.furthest.get(trial.config["id"], 0):
                self.furthest[trial.config["id"]] = result["epoch"]
                trial.max_failures = trial.run_metadata.num_failures + RETRIES

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self._end()
        key = trial.config["id"]
        if key not in self.told:
            self.told.add(key)
            self.view.end(key, self.search.failures.get(key), self.search.notes.get(key))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        said = ""
        with suppress(OSError, TypeError):
            said = Path(trial.error_file).read_text(errors="replace")
        if "low on memory" in said:
            self.search.failed(trial.config["id"], "killed as its machine was low on memory")
        self.on_trial_complete(iteration, trials, trial)

    def _end(self) -> None:
        for key in (self.search.notes | self.search.failures).keys() - self.told:
            self.told.add(key)
            self.view.end(key, self.search.failures.get(key), self.search.notes.get(key))

    def on_experiment_end(self, trials: Any, **_: Any) -> None:
        self._end()
