"""What runs on the workers: one trial in a Tune actor, or in a Ray Train group of workers."""

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


def run_trial(
    config: dict[str, Any],
    images: dict[str, Any],
    store_uri: str,
    scratch: str,
    ledger: LedgerClient | None,
    monitor: Any,
) -> None:
    """Run one trial in its Tune actor. An exception makes Tune try the trial again."""
    store = Store(store_uri)
    try:
        trial = _trial(config["trial"], store)
    except InputError as error:  # of a plug-in
        store.fail(config["id"], str(error), traceback.format_exc())
        tune.report({"failed": str(error)})
        return
    reference = images[sharing_key(trial.data)]
    store.forget_failure(trial)
    try:
        if trial.workers == 1:
            _attempt(trial, reference, store, tune.report, ledger, monitor, OSError)
        else:
            need = ResourceRequest(**config["needs"])
            _train_on_workers(trial, reference, store, scratch, need, ledger, monitor)
    except NotedError as error:
        tune.report({"failed": str(error)})
    except OutOfMemory as error:
        tune.report({"out_of_memory": str(error)})
    finally:  # not before: until here, the error holds the variables of the training
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


class NotedError(RuntimeError):
    """The trial failed and would fail again. The store holds the reason."""


class OutOfMemory(RuntimeError):
    """The GPU had no memory left, perhaps because of its other trials."""


def _attempt(
    trial: Trial,
    images: Any,
    store: Store,
    report: Callable[[dict[str, Any]], None],
    ledger: LedgerClient | None,
    monitor: Any,
    again: type[Exception],
) -> None:
    """Train, and note in the store why it failed.

    Args:
        trial: The trial.
        images: Reference of its dataset.
        store: The store of the trial.
        report: Receives the metrics of each epoch.
        ledger: Keeps trials from computing the same teacher logits twice.
        monitor: Handle of the LivenessMonitor.
        again: The type of errors after which Tune may try again.

    Raises:
        NotedError: The trial failed; another attempt would fail too.
        OutOfMemory: The GPU had no memory left.
    """
    # Importing torch takes seconds, in which the process gives no sign of life.
    with without_collection():
        from pld_ray.distill.loop import train
        from pld_ray.distill.running import TrainingError

    with monitored(monitor, trial.id) as step:
        try:
            found: Images = ray.get(images)
            found.check_visible()
            train(trial, found, store, report, ledger, step, _device(trial))
        except Exception as error:
            final, fault = isinstance(error, TrainingError), _fault(error)
            reason = _reason(error)
            if final or not (fault or isinstance(error, again)):
                store.fail(trial.id, reason, traceback.format_exc(), final)
                raise NotedError(reason) from error
            with suppress(OSError):
                if fault == "memory" or not _explained(trial, store):
                    store.fail(trial.id, reason, traceback.format_exc())
            if fault == "memory":
                raise OutOfMemory(reason) from error
            if fault == "device" and trial.workers == 1:  # Train ends the processes of its workers
                _end_process()
            raise


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
    trial: Trial,
    images: Any,
    store: Store,
    scratch: str,
    need: ResourceRequest,
    ledger: LedgerClient | None,
    monitor: Any,
) -> None:
    """Run one trial as a Ray Train worker group: DDP over gloo or NCCL."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.tune.integration.ray_train import TuneReportCallback

    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "trial": trial.model_dump(mode="json"),
            "store": store.uri,
            "images": [images],
            "ledger": ledger,
            "monitor": monitor,
        },
        scaling_config=ScalingConfig(
            num_workers=trial.workers, use_gpu=need.gpus > 0, resources_per_worker=need.worker
        ),
        run_config=RunConfig(
            name=f"{trial.id}-workers", storage_path=scratch, callbacks=[TuneReportCallback()]
        ),
    )
    from pld_ray.distill.device import MEMORY_FAULTS

    try:
        trainer.fit()
    except TrainingFailedError:
        failure = store.failure(trial.id)
        if failure is not None and any(text in failure["reason"] for text in MEMORY_FAULTS):
            raise OutOfMemory(failure["reason"]) from None
        if failure is None or not failure["final"]:
            raise  # a worker died: Tune tries again
        raise NotedError(failure["reason"]) from None


def _worker(config: dict[str, Any]) -> None:
    """Train in one worker of a Ray Train group."""
    store, report = Store(config["store"]), ray.train.report
    trial = _trial(config["trial"], store)
    shared = config["images"][0], store, report, config["ledger"], config["monitor"]
    # When one worker dies, the others see only a broken connection: try again after any error.
    _attempt(trial, *shared, Exception)
