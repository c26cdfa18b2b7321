"""Ray: runs the trials of a plan that have no record yet.

    Plan -> PlanSearch (a trial as soon as its teacher exists and the cluster has room)
         -> Ray Tune: one actor a trial, reused            -> train(), one worker
                      or, for workers > 1, TorchTrainer    -> train(), in every worker
         -> store; the Ledger sees to it that no two of them compute the same teacher logits

Tune restarts a trial whose process died, the Watch sees to it that one which hangs dies; the trial
itself goes on from its last checkpoint.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pld_ray.cluster import connected, reach

# isort: split
import ray
from ray import tune
from ray.tune.callback import Callback

from pld_ray import bank, data, models
from pld_ray.claims import Claims
from pld_ray.dispatch import RETRIES, Need, PlanSearch, need, nodes, resolved
from pld_ray.errors import InputError, nearest
from pld_ray.experiment import Plan
from pld_ray.search import Progress
from pld_ray.spec import Model, Resources, Trial, Weights
from pld_ray.stopping import Stopping
from pld_ray.store import Store
from pld_ray.view import View
from pld_ray.watch import open_watch, watched

HEAD = "node:__internal_head__"  # a resource every head node has


def run(
    plan: Plan,
    images: dict[str, data.Images],
    store: Store,
    view: View,
    address: str | None = None,
    progress: Sequence[Progress] = (),
    loggers: Sequence[Callback] = (),
) -> dict[str, str]:
    """Run what `view.pending` holds; returns why trials failed, by trial id.

    images: from `check`. address: of a running cluster; without one, join what runs on this
    machine or start Ray here. progress: of the search whose trials these are. loggers: told of
    every epoch. Raises InputError for a trial that the cluster has no room for.
    """
    pending, resources = dict(view.pending), plan.experiment.resources
    stopping = Stopping(progress, store) if progress else None
    with connected(address), Claims(store.files) as claims:
        search = PlanSearch(pending, resources, store, claims, stopping)
        for key in {needed: key for key, needed in search.needs.items()}.values():
            if why := search.too_large(key):
                raise InputError(why)
        trials = [*pending.values(), *(each.group.cell.trial for each in progress)]
        watch = open_watch(resources.patience, store)
        scratch = tempfile.mkdtemp(prefix="pld-ray-")
        trainable = tune.with_parameters(
            _trial,
            images={name: ray.put(value) for name, value in images.items()},
            store_uri=store.uri,
            scratch=scratch,
            ledger=bank.open_ledger() if any(map(bank.banked, trials)) else None,
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
            with _signals_deferred() as search.look:
                tuner.fit()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            ray.kill(watch)
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
        alone = planned[0].trial.model_copy(update={"workers": 1})
        one = need(alone, resolved(resources))
        if why := one.too_large("the teacher bank", nodes()):
            raise InputError(why)
        room = sum(one.workers_on(node) for node in nodes())
        references = {name: ray.put(value) for name, value in images.items()}
        ledger = bank.open_ledger()
        task = ray.remote(_fill).options(num_cpus=one.cpus, num_gpus=one.gpus)
        tasks = [
            task.remote(some.trial, references[data_key(some.trial)], store.uri, ledger, worker)
            for some in planned
            for worker in range(room)
        ]
        try:
            ray.get(tasks)
        except ray.exceptions.RayTaskError as error:
            raise InputError(f"the teacher bank is not complete: {error.cause}") from None


# ---------------------------------------------------------------- before anything starts


def check(pending: dict[str, Trial], address: str | None = None) -> dict[str, data.Images]:
    """Load the datasets and make every network, so that bad input is known before Ray starts."""
    if address is not None and address != "auto":
        reach(address)
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
        if isinstance(trial.teacher, Weights):
            wanted.append(trial.teacher)
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


def _name(trial: Any) -> str:
    """A trial's name in loggers."""
    return f"{Trial.model_validate(trial.config['trial']).label} {trial.config['id']}"


def _placement(config: dict[str, Any]) -> tune.PlacementGroupFactory:
    need = Need(**config["needs"])
    if need.workers > 1:  # this actor only waits for its workers, which bring their own
        return tune.PlacementGroupFactory([{HEAD: 0.001}])
    return tune.PlacementGroupFactory([need.worker])


# ---------------------------------------------------------------- what Tune does, told on


@contextmanager
def _signals_deferred() -> Iterator[Callable[[], None]]:
    """SIGINT and SIGTERM do what they did before, but when what this gives is called.

    Raised in the midst of Ray's own code, an exception can come out as another one. A second
    signal is not deferred.
    """
    came: list[int] = []
    before: dict[int, Any] = {}

    def look() -> None:
        for number in came:
            if not callable(before[number]):
                raise KeyboardInterrupt
            before[number](number, None)

    def note(number: int, frame: Any) -> None:
        came.append(number)
        if len(came) > 1:
            look()

    if threading.current_thread() is threading.main_thread():
        before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield look
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Follow(Callback):
    """Tells the view what Tune does."""

    def __init__(self, view: View, search: PlanSearch) -> None:
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


# ---------------------------------------------------------------- on the workers


def _trial(
    config: dict[str, Any],
    images: dict[str, Any],
    store_uri: str,
    scratch: str,
    ledger: Any,
    watch: Any,
) -> None:
    """Run one trial in its Tune actor; what is raised here makes Tune try again."""
    trial = Trial.model_validate(config["trial"])
    store, reference = Store(store_uri), images[data_key(trial)]
    store.forget_failure(trial)
    try:
        if trial.workers == 1:
            _attempt(trial, reference, store, tune.report, ledger, watch, OSError)
        else:
            need = Need(**config["needs"])
            _train_on_workers(trial, reference, store, scratch, need, ledger, watch)
    except _NotedError as error:
        tune.report({"failed": str(error)})


def _fill(trial: Trial, images: data.Images, store_uri: str, ledger: Any, worker: int) -> None:
    from pld_ray.teacher import fill

    job = ray.get_runtime_context().get_job_id()  # two builds are not one, a task tried again is
    fill(trial, images, Store(store_uri), ledger, f"build/{job}/{worker}")


class _NotedError(RuntimeError):
    """The trial failed, and would again; why stands in the store."""


def _attempt(
    trial: Trial,
    images: Any,
    store: Store,
    report: Callable[[dict[str, Any]], None],
    ledger: Any,
    watch: Any,
    again: type[Exception],
) -> None:
    """Train; raises what is worth another attempt (`again`), or else notes it: _NotedError."""
    with watched(watch, trial.id) as step:
        from pld_ray.train import TrainingError, train

        try:
            train(trial, ray.get(images), store, report, ledger, step)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            reason, final = reason.splitlines()[0], isinstance(error, TrainingError)
            if final or not isinstance(error, again):
                store.fail(trial.id, reason, traceback.format_exc(), final)
                raise _NotedError(reason) from error
            with suppress(OSError):
                store.fail(trial.id, reason, traceback.format_exc())
            raise


def _train_on_workers(
    trial: Trial,
    images: Any,
    store: Store,
    scratch: str,
    need: Need,
    ledger: Any,
    watch: Any,
) -> None:
    """Run one trial as a Ray Train worker group: DDP over gloo or NCCL."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.tune.integration.ray_train import TuneReportCallback

    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "trial": trial,
            "store": store.uri,
            "images": [images],
            "ledger": ledger,
            "watch": watch,
        },
        scaling_config=ScalingConfig(
            num_workers=trial.workers, use_gpu=need.gpus > 0, resources_per_worker=need.worker
        ),
        run_config=RunConfig(
            name=f"{trial.id}-workers", storage_path=scratch, callbacks=[TuneReportCallback()]
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError:
        failure = store.failure(trial.id)
        if failure is None or not failure["final"]:
            raise  # a worker died: Tune tries again
        raise _NotedError(failure["reason"]) from None


def _worker(config: dict[str, Any]) -> None:
    store, report = Store(config["store"]), ray.train.report
    shared = config["images"][0], store, report, config["ledger"], config["watch"]
    # when one of the group dies the others see no more than a broken connection
    _attempt(config["trial"], *shared, Exception)
