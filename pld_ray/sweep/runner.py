"""Run those trials of a plan that have no record yet, on Ray.

    Plan -> PlanSearcher (a gang starts when its teachers exist and the cluster has room)
         -> Ray Tune: one actor per gang, reused           -> train_gang(), one worker
                      or, for workers > 1, TorchTrainer    -> train_gang(), in every worker
         -> store; the Ledger keeps two processes from computing the same teacher logits

Tune restarts a gang whose process died. The LivenessMonitor kills processes that hang. A restarted
trial resumes from its last checkpoint.
"""

from __future__ import annotations

import pickle
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.callback import Callback

from pld_ray.config.parts import Resources
from pld_ray.config.planning import Plan
from pld_ray.data.datasets import sharing_key
from pld_ray.data.images import Images
from pld_ray.distill import bank_format, bank_plan
from pld_ray.errors import InputError
from pld_ray.store.claims import Claims
from pld_ray.store.store import Store
from pld_ray.sweep.cluster import connected
from pld_ray.sweep.early_stopping import EarlyStopping
from pld_ray.sweep.gangs import Member
from pld_ray.sweep.ledger import open_ledger
from pld_ray.sweep.liveness import start_monitor
from pld_ray.sweep.loggers import Logger
from pld_ray.sweep.progress import ProgressView
from pld_ray.sweep.resources import ResourceRequest, need, nodes, resolved
from pld_ray.sweep.retries import RETRIES, RetryOnProgress
from pld_ray.sweep.scheduling import PlanSearcher
from pld_ray.sweep.search import SearchProgress
from pld_ray.sweep.signals import signals_deferred
from pld_ray.sweep.worker import fill_bank, run_gang

HEAD = "node:__internal_head__"  # a resource that every head node has


def run(
    plan: Plan,
    images: dict[str, Images],
    store: Store,
    view: ProgressView,
    address: str | None = None,
    progress: Sequence[SearchProgress] = (),
    loggers: Sequence[Logger] = (),
) -> dict[str, str]:
    """Run the pending trials of a plan.

    Args:
        plan: Plan whose experiment names the sweep and sets the resources of its trials.
        images: Images of each dataset, from `checks.check_trials`.
        store: Store for records and checkpoints.
        view: Progress view; its `pending` holds the trials to run.
        address: Address of the cluster to join. By default, join the cluster that runs on this
            machine, or start a local one.
        progress: State of the search that the trials belong to; empty without a search.
        loggers: Loggers that receive every epoch.

    Returns:
        The reason of failure of each failed trial, by trial id.

    Raises:
        InputError: The cluster cannot be reached, or a trial does not fit on it.
    """
    pending, resources = dict(view.pending), plan.experiment.resources
    stopping = EarlyStopping(progress, store) if progress else None
    with connected(address), Claims(store.files) as claims:
        search = PlanSearcher(pending, resources, store, claims, stopping)
        for key in {needed: key for key, needed in search.needs.items()}.values():
            if why := search.too_large(key):
                raise InputError(why)
        trials = [*pending.values(), *(each.group.cell.trial for each in progress)]
        monitor = start_monitor(resources.patience, store)
        search.move = monitor.move.remote
        scratch = tempfile.mkdtemp(prefix="pld-ray-")
        trainable = tune.with_parameters(
            run_gang,
            images=_shared(images),
            store_uri=store.uri,
            scratch=scratch,
            ledger=open_ledger() if any(map(bank_format.uses_bank, trials)) else None,
            monitor=monitor,
        )
        tuner = tune.Tuner(
            tune.with_resources(trainable, _placement),
            tune_config=tune.TuneConfig(
                search_alg=search,
                trial_dirname_creator=lambda trial: trial.trial_id,  # the default holds the config
                trial_name_creator=lambda trial: trial.trial_id,
                scheduler=stopping,
                num_samples=-1,
                # a reused actor keeps its CPUs, and a group of workers may be waiting for them
                reuse_actors=all(trial.workers == 1 for trial in trials),
            ),
            run_config=tune.RunConfig(
                name=plan.experiment.name,
                storage_path=scratch,
                verbose=0,
                callbacks=[_Follow(view, search, loggers), RetryOnProgress()],
                failure_config=tune.FailureConfig(max_failures=RETRIES),
            ),
        )
        try:
            with signals_deferred() as search.look:
                tuner.fit()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            ray.kill(monitor)
        return search.failures


def build_banks(
    planned: list[bank_plan.PlannedBank],
    resources: Resources,
    images: dict[str, Images],
    store: Store,
    address: str | None = None,
) -> None:
    """Compute teacher banks on all nodes of the cluster. Their teachers must be trained already.

    The chunks of each bank are shared by as many tasks as fit on the cluster.

    Args:
        planned: Banks to compute; at least one.
        resources: Resources of each task, as for one worker of a trial.
        images: Images of each dataset, from `checks.check_trials`.
        store: Store with the teachers' weights, which receives the chunks.
        address: Address of the cluster to join. By default, join the cluster that runs on this
            machine, or start a local one.

    Raises:
        InputError: The cluster cannot be reached, has no room for a task, or a task failed.
    """
    with connected(address):
        alone = planned[0].trial.model_copy(update={"workers": 1})
        one = need(alone, resolved(resources))
        if why := one.too_large("the teacher bank", nodes()):
            raise InputError(why)
        room = sum(one.workers_on(node) for node in nodes())
        references = _shared(images)
        ledger = open_ledger()
        task = ray.remote(fill_bank).options(num_cpus=one.cpus, num_gpus=one.gpus)
        tasks = [
            task.remote(
                some.trial.model_dump(mode="json"),
                [references[sharing_key(some.trial.data)]],
                store.uri,
                ledger,
                worker,
            )
            for some in planned
            for worker in range(room)
        ]
        try:
            ray.get(tasks)
        except (ray.exceptions.RayTaskError, ray.exceptions.WorkerCrashedError) as error:
            cause = getattr(error, "cause", "its processes died again and again; see ray.log")
            raise InputError(f"cannot complete the teacher bank: {cause}") from None


def _shared(images: dict[str, Images]) -> dict[str, Any]:
    """Put images where all workers find them, and return the references.

    Raises:
        InputError: A dataset of the user cannot be sent to another process.
    """
    try:
        return {name: ray.put(value) for name, value in images.items()}
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        said = str(error.__cause__ or error).strip().partition("\n")[0]  # Ray's own prints all data
        raise InputError(
            f"a dataset cannot be sent to the workers ({said}): expected one that opens its files "
            "in __getitem__, and not before"
        ) from error


def _placement(config: dict[str, Any]) -> tune.PlacementGroupFactory:
    """Return the resources that Tune reserves for the actor of a gang."""
    need = ResourceRequest(**config["needs"])
    if need.workers > 1:  # this actor only waits for its workers, which reserve their own
        return tune.PlacementGroupFactory([{HEAD: 0.001}])
    return tune.PlacementGroupFactory([need.worker])


class _Follow(Callback):
    """Passes the events of Tune to the view and to loggers, for each trial of a gang."""

    def __init__(
        self, view: ProgressView, search: PlanSearcher, loggers: Sequence[Logger] = ()
    ) -> None:
        self.view, self.search, self.loggers = view, search, loggers
        self.members: dict[str, Member] = {}  # the trials that run, by id

    def on_step_begin(self, iteration: int, trials: Any, **_: Any) -> None:
        self.search.look()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks to restore an experiment, which is never done here

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self._add_drawn()
        for number, settings in enumerate(trial.config["trials"]):
            key = settings["id"]
            self.view.start(key)
            if key not in self.members:
                name = f"{self.view.pending[key].label} {key}"
                self.members[key] = Member(f"{trial.trial_id}-{number}", settings, name)
            for logger in self.loggers:
                logger.start(self.members[key])

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        for epoch in result.get("epochs", ()):
            self.view.result(epoch["id"], epoch)
            for logger in self.loggers:
                logger.epoch(self.members[epoch["id"]], epoch)
        if "ended" in result:  # if the process dies, the trial is no part of the next attempt
            left = [each for each in trial.config["trials"] if each["id"] != result["ended"]]
            trial.config["trials"] = left
            self._leave([result["ended"]])
            self._end()

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self._leave([settings["id"] for settings in trial.config["trials"]])
        self._end()

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        said = ""
        with suppress(OSError, TypeError):
            said = Path(trial.error_file).read_text(errors="replace")
        if "low on memory" in said:
            for settings in trial.config["trials"]:
                if settings["id"] in self.search.failures:
                    why = "killed because its machine was low on memory"
                    self.search.failed(settings["id"], why)
        self.on_trial_complete(iteration, trials, trial)

    def _leave(self, keys: list[str]) -> None:
        """Tell the loggers that these trials do not run any more."""
        for key in keys:
            if (member := self.members.pop(key, None)) is not None:
                for logger in self.loggers:
                    logger.end(member)

    def _add_drawn(self) -> None:
        """Tell the view which trials a search has drawn."""
        while self.search.drawn:
            drawn = self.search.drawn.pop()
            self.view.add(drawn.trial, drawn.label)

    def _end(self) -> None:
        """Tell the view which trials ended; some end before they start."""
        self._add_drawn()
        while self.search.ended:
            key = self.search.ended.pop(0)
            self.view.end(key, self.search.failures.get(key), self.search.notes.get(key))

    def on_experiment_end(self, trials: Any, **_: Any) -> None:
        self._end()
        for logger in self.loggers:
            logger.close(trials)
