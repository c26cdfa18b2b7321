"""What runs on the workers: a gang in a Tune actor, or in a Ray Train group of workers."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, NoReturn

import ray
from ray import tune

from pld_ray import plugins
from pld_ray.config.trial import Trial
from pld_ray.data.datasets import sharing_key
from pld_ray.data.images import Images
from pld_ray.errors import InputError
from pld_ray.imports import without_collection
from pld_ray.store.store import Store
from pld_ray.sweep.ledger import LedgerClient
from pld_ray.sweep.liveness import monitored
from pld_ray.sweep.resources import ResourceRequest

CONTEXT = 2**29  # bytes of a GPU that CUDA and its libraries take in each process, about


def run_gang(
    config: dict[str, Any],
    images: dict[str, Any],
    store_uri: str,
    scratch: str,
    ledger: LedgerClient | None,
    monitor: Any,
) -> None:
    """Run a gang in its Tune actor; see `gangs.py`. An exception makes Tune try it again.

    It reports {"epochs": metrics of each trial} and {"ended": id of a trial, further facts}.
    """
    store, trials = Store(store_uri), []
    for settings in config["trials"]:
        try:
            trial = _trial(settings["trial"], store)
        except InputError as error:  # of a plug-in
            store.fail(settings["id"], str(error), traceback.format_exc())
            tune.report({"ended": settings["id"], "failed": str(error)})
            continue
        over = config["search"] and store.stopped(trial.id) is not None
        if over or store.record(trial.id) is not None:  # the process died before it could say so
            tune.report({"ended": trial.id})
            continue
        store.forget_failure(trial)
        trials.append(trial)
    if not trials:
        return
    reference = images[sharing_key(trials[0].data)]
    try:
        if trials[0].workers == 1:
            _attempt(trials, reference, store, tune.report, ledger, monitor, config["search"])
        else:
            _train_on_workers(trials, reference, store, scratch, config, ledger, monitor)
    finally:  # not before: until here, an error holds the variables of the training
        from pld_ray.distill.device import release_memory

        release_memory()


def _trial(settings: dict[str, Any], store: Store) -> Trial:
    """Return a trial by its settings, after the plug-ins that it needs."""
    store.load_plugins(settings)
    return Trial.model_validate(settings)


def fill_bank(
    settings: dict[str, Any],
    images: list[Any],
    store_uri: str,
    ledger: LedgerClient,
    worker: int,
) -> None:
    """Compute the missing chunks of a trial's banks; a Ray task.

    The images are a reference in a list, so that the plug-ins are loaded before them.
    """
    from pld_ray.distill.bank import fill

    store = Store(store_uri)
    trial = _trial(settings, store)
    job = ray.get_runtime_context().get_job_id()  # a task that is retried keeps its claims
    try:
        fill(trial, ray.get(images[0]), store, ledger, f"build/{job}/{worker}", _assigned_device())
    except Exception as error:
        if _fault(error) == "device":
            _end_process()  # Ray tries a task again whose process ends
        raise


def _attempt(
    trials: list[Trial],
    images: Any,
    store: Store,
    report: Callable[[dict[str, Any]], None],
    ledger: LedgerClient | None,
    monitor: Any,
    search: bool,
) -> None:
    """Train a gang; report how each trial ends, and note in the store why it failed.

    Args:
        trials: The trials.
        images: Reference of their dataset.
        store: The store of the trials.
        report: Receives what `run_gang` reports.
        ledger: Keeps processes from computing the same teacher logits twice.
        monitor: Handle of the LivenessMonitor.
        search: Whether a search may stop trials: it notes that in the store.

    Raises:
        Exception: An error after which Tune tries the trials again.
    """
    # Importing torch takes seconds, in which the process gives no sign of life.
    with without_collection():
        from pld_ray.distill.loop import train_gang
        from pld_ray.distill.memory import NoRoom
        from pld_ray.distill.running import TrainingError
        from pld_ray.distill.steps import CaptureError

    grouped = trials[0].workers > 1
    # When one worker of several dies, the others see only a broken connection: always try again.
    again = Exception if grouped else OSError
    left, leaving, moved = {trial.id for trial in trials}, set[str](), set[str]()

    def tell(trial: Trial, **facts: str) -> None:
        left.discard(trial.id)
        report({"ended": trial.id, **facts})

    def ended(trial: Trial, error: Exception | None) -> None:
        if error is None:
            tell(trial, **({"back": "moved"} if trial.id in moved else {}))
            return
        if isinstance(error, NoRoom):
            tell(trial, back="no room")
            return
        final, fault, reason = isinstance(error, TrainingError), _fault(error), _reason(error)
        if final or not (fault or isinstance(error, again)):
            store.fail(trial.id, reason, _traceback(error), final)
            tell(trial, failed=reason)
            return
        with suppress(OSError):
            if fault == "memory" or not _explained(trial, store):
                store.fail(trial.id, reason, _traceback(error))
        if fault == "memory" and not grouped:
            tell(trial, out_of_memory=reason)
            if left and isinstance(error, CaptureError):
                _end_process()
            return
        if fault == "device" and not grouped:  # Train ends the processes of its workers
            _end_process()
        raise error

    def stopped(trial: Trial) -> bool:
        if search and store.stopped(trial.id) is not None:
            return True
        moved.update(leaving & {trial.id})
        return trial.id in moved

    with monitored(monitor, left, leaving) as step:
        try:
            found: Images = ray.get(images)
            found.check_visible()
            given = trials, found, store, lambda epochs: report({"epochs": epochs})
            train_gang(*given, ended, ledger, step, _device(trials[0]), stopped)
        except Exception as error:
            for trial in [trial for trial in trials if trial.id in left]:
                ended(trial, error)


def _traceback(error: Exception) -> str:
    return "".join(traceback.format_exception(error))


def _explained(trial: Trial, store: Store) -> bool:
    """Return whether another worker has noted why this attempt failed.

    When one worker fails, the others see only a broken connection.
    """
    from pld_ray.distill.device import MEMORY_FAULTS

    found = store.failure(trial.id) if trial.workers > 1 else None
    return found is not None and (
        found["final"] or any(text in found["reason"] for text in MEMORY_FAULTS)
    )


def _reason(error: Exception) -> str:
    """Return why a trial failed, in one line."""
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, InputError):
        reason = str(error)
    lines = reason.splitlines()
    wrapped = "in DataLoader worker process" in lines[0]  # the error itself comes last
    return plugins.location(error) + lines[-1 if wrapped else 0]


def _fault(error: Exception) -> Literal["memory", "device"] | None:
    """Return what an error says about the GPU: no memory left, failed, or nothing."""
    from pld_ray.distill.device import device_failed, out_of_memory

    if out_of_memory(error):
        return "memory"
    return "device" if device_failed(error) else None


def _end_process() -> NoReturn:
    """End this process at once. Ray tries its work again in a new one.

    After a fault of the GPU, CUDA refuses all further work of a process, also that of other trials.
    """
    os._exit(1)


def _device(trial: Trial) -> Any:
    """Return the device that Ray gave to this worker."""
    if trial.workers == 1:
        return _assigned_device()
    from ray.train.torch import get_device

    return get_device()


def _assigned_device() -> Any:
    """Return the GPU that Ray gave to this process, or the CPU.

    Ray hides the GPUs of others only from processes that have one. A process that has a share of a
    GPU gets this share of its memory, so that it cannot take that of its neighbours.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
    import torch

    if not (ray.get_gpu_ids() and torch.cuda.is_available()):
        return torch.device("cpu")
    share = min(ray.get_runtime_context().get_assigned_resources().get("GPU", 1.0), 1.0)
    if share < 1:
        share -= CONTEXT / torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(max(share, 0.0))
    return torch.device("cuda")


def _train_on_workers(
    trials: list[Trial],
    images: Any,
    store: Store,
    scratch: str,
    config: dict[str, Any],
    ledger: LedgerClient | None,
    monitor: Any,
) -> None:
    """Run a gang as a Ray Train worker group: DDP over gloo or NCCL."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.tune.integration.ray_train import TuneReportCallback

    need = ResourceRequest(**config["needs"])
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "trials": [trial.model_dump(mode="json") for trial in trials],
            "store": store.uri,
            "images": [images],
            "ledger": ledger,
            "monitor": monitor,
            "search": config["search"],
        },
        scaling_config=ScalingConfig(
            num_workers=need.workers, use_gpu=need.gpus > 0, resources_per_worker=need.worker
        ),
        run_config=RunConfig(
            name=f"{trials[0].id}-workers", storage_path=scratch, callbacks=[TuneReportCallback()]
        ),
    )
    from pld_ray.distill.device import MEMORY_FAULTS

    try:
        trainer.fit()
    except TrainingFailedError:
        left = [trial for trial in trials if store.record(trial.id) is None]
        reasons = {trial.id: (store.failure(trial.id) or {}).get("reason", "") for trial in left}
        if not any(text in reason for reason in reasons.values() for text in MEMORY_FAULTS):
            raise  # a worker died: Tune tries again
        for key, reason in reasons.items():
            tune.report({"ended": key, "out_of_memory": reason or "it ran out of GPU memory"})


def _worker(config: dict[str, Any]) -> None:
    """Train in one worker of a Ray Train group."""
    store, report = Store(config["store"]), ray.train.report
    trials = [_trial(settings, store) for settings in config["trials"]]
    shared = config["images"][0], store, report, config["ledger"], config["monitor"]
    _attempt(trials, *shared, config["search"])
