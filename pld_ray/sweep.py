"""Ray: runs the trials of a plan that have no record yet.

    Plan -> PlanSearch (a trial as soon as its teacher exists and the cluster has room)
         -> Ray Tune: one actor a trial, reused            -> train(), one worker
                      or, for workers > 1, TorchTrainer    -> train(), in every worker
         -> store; the Ledger sees to it that no two of them compute the same teacher logits

Tune restarts a trial whose process died; the trial itself goes on from its last checkpoint.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # our store keeps the records
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # 6 s less a TorchTrainer

import ray
from ray import tune
from ray.tune.callback import Callback
from ray.tune.search import Searcher

from pld_ray import bank, data, models
from pld_ray.errors import InputError, nearest
from pld_ray.experiment import Plan
from pld_ray.spec import Model, Resources, Trial, Weights
from pld_ray.store import Store
from pld_ray.view import View

RETRIES = 2  # of a trial whose process died
HEAD = "node:__internal_head__"  # a resource every head node has


def run(
    plan: Plan, images: dict[str, data.Images], store: Store, view: View, address: str | None = None
) -> dict[str, str]:
    """Run what `view.pending` holds; returns why trials failed, by trial id.

    images: from `check`. address: of a running cluster; without one, join what runs on this
    machine or start Ray here. Raises InputError for a trial that the cluster has no room for.
    """
    pending = view.pending
    with connected(address):
        cluster = ray.cluster_resources()
        needs = {key: _needs(trial, plan.experiment.resources) for key, trial in pending.items()}
        _check_room(pending, needs, cluster)
        references = {name: ray.put(value) for name, value in images.items()}
        search = PlanSearch(pending, needs, cluster, store)
        scratch = tempfile.mkdtemp(prefix="pld-ray-") if store.local else f"{store.uri}/.ray"
        single = all(trial.workers == 1 for trial in pending.values())
        trainable = tune.with_parameters(
            _trial,
            trials=pending,
            needs=needs,
            images=references,
            store_uri=store.uri,
            scratch=scratch,
            ledger=bank.open_ledger() if any(map(bank.banked, pending.values())) else None,
        )
        tuner = tune.Tuner(
            tune.with_resources(trainable, lambda config: _placement(needs[config["id"]])),
            tune_config=tune.TuneConfig(
                search_alg=search,
                num_samples=-1,
                # a kept actor holds its CPUs, which a group of workers may be waiting for
                reuse_actors=single,
            ),
            run_config=tune.RunConfig(
                name=plan.experiment.name,
                storage_path=scratch,
                verbose=0,
                callbacks=[_Follow(view, search)],
                failure_config=tune.FailureConfig(max_failures=RETRIES),
            ),
        )
        try:
            tuner.fit()
        finally:
            if store.local:
                shutil.rmtree(scratch, ignore_errors=True)
        return search.failures


def build_banks(
    planned: list[bank.Planned],
    resources: Resources,
    images: dict[str, data.Images],
    store: Store,
    address: str | None = None,
) -> None:
    """Compute all banks of `planned`, on every node of the cluster; their teachers are trained.

    Each bank in turn is shared out over as many tasks as the cluster has room for.
    """
    with connected(address):
        cluster = ray.cluster_resources()
        one_worker = planned[0].trial.model_copy(update={"workers": 1})
        need = _needs(one_worker, resources)
        _check_room({one_worker.id: one_worker}, {one_worker.id: need}, cluster)
        rooms = [cluster.get(kind, 0) // need[kind] for kind in ("CPU", "GPU") if need[kind]]
        references = {name: ray.put(value) for name, value in images.items()}
        ledger = bank.open_ledger()
        task = ray.remote(_fill).options(num_cpus=need["CPU"], num_gpus=need["GPU"])
        tasks = [
            task.remote(one.trial, references[data_key(one.trial)], store.uri, ledger, worker)
            for one in planned
            for worker in range(int(min(rooms)))
        ]
        try:
            ray.get(tasks)
        except ray.exceptions.RayTaskError as error:
            raise InputError(f"the teacher bank is not complete: {error.cause}") from None


# ---------------------------------------------------------------- before anything starts


def check(
    pending: dict[str, Trial], store: Store, address: str | None = None
) -> dict[str, data.Images]:
    """Load the datasets and make every network, so that bad input is known before Ray starts."""
    if address and address != "auto":
        _reach(address)
    from timm.optim import list_optimizers

    optimizers = set(list_optimizers())
    images: dict[str, data.Images] = {}
    seen: set[str] = set()
    for trial in pending.values():
        key = data_key(trial)
        if key not in images:
            images[key] = data.load(trial.data)
        if trial.optimizer.name not in optimizers:
            hint = nearest(trial.optimizer.name, optimizers)
            raise InputError(f"optimizer.name is {trial.optimizer.name!r}: not in timm; {hint}")
        wanted: list[Model | Weights] = [trial.student]
        teacher = trial.teacher
        if isinstance(teacher, Weights):
            wanted.append(teacher)
        elif teacher and teacher.id not in pending and teacher.id not in seen:
            seen.add(teacher.id)
            store.load_weights(teacher)
        for model in wanted:
            name = f"{key} {model!r}"
            if name not in seen:
                seen.add(name)
                models.check_model(model, *images[key].shape)
        compared = f"{key} {trial.student!r} {trial.teacher_name} {trial.loss!r}"
        if trial.loss.needs_features and compared not in seen:
            seen.add(compared)
            models.check_features(trial, *images[key].shape)
    return images


def data_key(trial: Trial) -> str:
    """Trials with one key share one copy of the images; augmentation is not in them."""
    return trial.data.model_copy(update={"pad": 0, "flip": False}).model_dump_json()


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Join a cluster or start Ray for the `with` block; what was started is shut down after."""
    owned = not ray.is_initialized()
    if owned:
        ray.init(address=address, log_to_driver=False)
    try:
        yield
    finally:
        if owned:
            ray.shutdown()


def _reach(address: str) -> None:
    """Raise InputError if nothing listens there; Ray itself would try for minutes."""
    try:
        place = urlsplit(address if "//" in address else f"//{address}")
        socket.create_connection((place.hostname, place.port), timeout=10).close()
    except (OSError, ValueError) as error:
        raise InputError(
            f"--address is {address!r}: no Ray cluster answers there: {error}"
        ) from None


def _needs(trial: Trial, resources: Resources) -> dict[str, float]:
    """CPUs and GPUs of the whole trial and its number of workers."""
    gpus = resources.gpus
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    return {
        "CPU": resources.cpus * trial.workers,
        "GPU": gpus * trial.workers,
        "workers": trial.workers,
    }


def _check_room(
    pending: dict[str, Trial], needs: dict[str, dict[str, float]], cluster: dict[str, float]
) -> None:
    for trial_id, need in needs.items():
        for kind in ("CPU", "GPU"):
            if need[kind] > cluster.get(kind, 0):
                raise InputError(
                    f"trial {trial_id} ({pending[trial_id].label}) needs {need[kind]:g} {kind}s "
                    f"and the cluster has {cluster.get(kind, 0):g}: "
                    "change workers or resources, or join a larger cluster"
                )


def _placement(need: dict[str, float]) -> tune.PlacementGroupFactory:
    if need["workers"] > 1:  # this actor only waits for its workers, which bring their own
        return tune.PlacementGroupFactory([{HEAD: 0.001}])
    return tune.PlacementGroupFactory([{"CPU": need["CPU"], "GPU": need["GPU"]}])


# ---------------------------------------------------------------- which trial next


class PlanSearch(Searcher):
    """Hands out trials: a student when its teacher's record exists, a trial when it has room.

    Tune does not know what a nested TorchTrainer takes, so the room is counted here.
    """

    def __init__(
        self,
        pending: dict[str, Trial],
        needs: dict[str, dict[str, float]],
        cluster: dict[str, float],
        store: Store,
    ) -> None:
        super().__init__()
        self.waiting = dict(pending)
        self.needs = needs
        self.free = {kind: cluster.get(kind, 0.0) for kind in ("CPU", "GPU")}
        self.store = store
        self.running: dict[str, Trial] = {}
        self.failures: dict[str, str] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial as a Tune config, None to wait, or FINISHED."""
        for key, trial in list(self.waiting.items()):
            teacher = trial.teacher.id if isinstance(trial.teacher, Trial) else None
            if teacher in self.failures:
                self.failures[key] = f"its teacher, trial {teacher}, failed"
                del self.waiting[key]
                continue
            busy = teacher in self.waiting or any(t.id == teacher for t in self.running.values())
            need = self.needs[key]
            if not busy and all(need[kind] <= self.free[kind] for kind in self.free):
                for kind in self.free:
                    self.free[kind] -= need[kind]
                self.running[trial_id] = self.waiting.pop(key)
                return {"id": key}
        return None if self.waiting else self.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Give its room back, and note why it has no record if it has none."""
        trial = self.running.pop(trial_id)
        for kind in self.free:
            self.free[kind] += self.needs[trial.id][kind]
        if self.store.record(trial.id) is None:
            failure = self.store.failure(trial.id)
            if failure is None:
                failure = {"reason": f"its process died {RETRIES + 1} times"}
                self.store.fail(trial, failure["reason"])
            self.failures[trial.id] = failure["reason"]

    def save(self, checkpoint_path: str) -> None:
        """Nothing to keep: what is finished stands in the store."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing was kept."""


class _Follow(Callback):
    """Tells the view what Tune does."""

    def __init__(self, view: View, search: PlanSearch) -> None:
        self.view, self.search = view, search
        self.told: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks to restore an experiment; we never do

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self.view.start(trial.config["id"])

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        if "epoch" in result:
            self.view.result(trial.config["id"], result)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self._end()
        key = trial.config["id"]
        if key not in self.told:
            self.told.add(key)
            self.view.end(key, self.search.failures.get(key))

    on_trial_error = on_trial_complete

    def _end(self) -> None:
        for key, reason in self.search.failures.items():
            if key not in self.told:
                self.told.add(key)
                self.view.end(key, reason)

    def on_experiment_end(self, trials: Any, **_: Any) -> None:
        self._end()


# ---------------------------------------------------------------- on the workers


def _trial(
    config: dict[str, str],
    trials: dict[str, Trial],
    needs: dict[str, dict[str, float]],
    images: dict[str, Any],
    store_uri: str,
    scratch: str,
    ledger: Any,
) -> None:
    """Run one trial in its Tune actor; a failure that would come again is noted, not raised."""
    trial = trials[config["id"]]
    store = Store(store_uri)
    store.forget_failure(trial)
    reference = images[data_key(trial)]
    if trial.workers == 1:
        _train_and_note(trial, reference, store, tune.report, ledger)
    else:
        _train_on_workers(trial, reference, store, scratch, needs[trial.id], ledger)
    if store.failure(trial.id):
        tune.report({"failed": True})


def _fill(trial: Trial, images: data.Images, store_uri: str, ledger: Any, worker: int) -> None:
    from pld_ray.teacher import fill

    job = ray.get_runtime_context().get_job_id()  # two builds are not one, a task tried again is
    fill(trial, images, Store(store_uri), ledger, f"build/{job}/{worker}")


def _train_and_note(
    trial: Trial, images: Any, store: Store, report: Callable[[dict[str, Any]], None], ledger: Any
) -> bool:
    """Train; True if it finished, False if the reason why not stands in the store."""
    from pld_ray.train import train

    try:
        train(trial, ray.get(images), store, report, ledger)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        store.fail(trial, reason.splitlines()[0], traceback.format_exc())
        return False
    return True


def _train_on_workers(
    trial: Trial, images: Any, store: Store, scratch: str, need: dict[str, float], ledger: Any
) -> None:
    """Run one trial as a Ray Train worker group: DDP over gloo or NCCL."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.tune.integration.ray_train import TuneReportCallback

    gpus = need["GPU"] / trial.workers
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "trial": trial,
            "store": store.uri,
            "images": [images],
            "ledger": ledger,
        },
        scaling_config=ScalingConfig(
            num_workers=trial.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": need["CPU"] / trial.workers, "GPU": gpus},
        ),
        run_config=RunConfig(
            name=f"{trial.id}-workers", storage_path=scratch, callbacks=[TuneReportCallback()]
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError:
        if store.failure(trial.id) is None:
            raise  # a worker died: Tune tries again


def _worker(config: dict[str, Any]) -> None:
    store = Store(config["store"])
    trial, images, ledger = config["trial"], config["images"][0], config["ledger"]
    if not _train_and_note(trial, images, store, ray.train.report, ledger):
        raise RuntimeError("the trial failed; its reason stands in the store")
