"""What a trial keeps in the store while it runs: its log, its checkpoints and its record.

A checkpoint is written after an epoch, at most once a second. It holds all that is needed to
continue with the same bits.
"""

from __future__ import annotations

import os
import platform
import time
from itertools import pairwise
from typing import Any

import torch

from pld_ray import __version__
from pld_ray.data.datasets import describe
from pld_ray.distill.optimization import load_optimizer
from pld_ray.distill.running import Run

CHECKPOINT_SECONDS = 1.0  # the least time between two checkpoints


def resume(run: Run) -> None:
    """Continue from the last checkpoint, or say in the store that the trial has begun."""
    state = run.shared.store.load_checkpoint(run.trial)
    if state is None:
        run.environments = [environment(run)]
        if run.shared.rank == 0:
            run.shared.store.start(run.trial)
        return
    run.history, run.environments = state["history"], state["environments"]
    run.kept = len(run.history)
    if (now := environment(run)) != run.environments[-1] | {"from_epoch": now["from_epoch"]}:
        run.environments.append(now)
    run.distiller.student.load_state_dict(state["student"])
    load_optimizer(run.optimizer, state["optimizer"])
    run.distiller.loss.load_state_dict(state["loss"])
    if run.ema is not None:
        run.ema.load_state_dict(state["ema"])


def keep_epoch(run: Run) -> None:
    """Write the epoch log and, once a second, a checkpoint."""
    if run.shared.rank > 0:
        return
    run.shared.store.log(run.trial, run.history)
    if time.perf_counter() - run.kept_at >= CHECKPOINT_SECONDS:
        keep_checkpoint(run)


def keep_checkpoint(run: Run) -> None:
    """Write all that is needed to continue after the last epoch, unless it is written already."""
    if run.shared.rank > 0 or run.kept == len(run.history):
        return
    state = {
        "history": run.history,
        "environments": run.environments,
        "student": run.distiller.student.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "ema": run.ema.state_dict() if run.ema is not None else {},
        "loss": run.distiller.loss.state_dict(),
    }
    run.shared.store.checkpoint(run.trial, state)
    run.kept, run.kept_at = len(run.history), time.perf_counter()


def environment(run: Run) -> dict[str, Any]:
    """Return what the bits of an epoch depend on beside the trial, from the next epoch on."""
    cuda = run.shared.device.type == "cuda"
    return {
        "from_epoch": len(run.history) + 1,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "precision": run.distiller.precision,
        "tf32": cuda and torch.backends.cudnn.allow_tf32,
        "torch": str(torch.__version__),
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "deterministic": not (cuda and torch.is_deterministic_algorithms_warn_only_enabled()),
    }


def change_notes(environments: list[dict[str, Any]]) -> list[str]:
    """Return sentences about a trial whose epochs did not all run in the same way."""
    notes = []
    for before, after in pairwise(environments):
        changed = [
            f"{name} {before.get(name)} before and {after.get(name)} from then on"
            for name in ("device", "precision", "tf32", "torch", "cudnn", "deterministic")
            if before.get(name) != after.get(name)
        ]
        notes.append(f"resumed in epoch {after['from_epoch']} with {', '.join(changed)}")
    return notes


def was_compiled() -> bool:
    """Return whether torch.compile has compiled all that it was given since it was last reset."""
    frames = torch._dynamo.utils.counters["frames"]
    return 0 < frames["total"] == frames["ok"]


def keep_record(run: Run) -> None:
    """Write the weights and the record of a finished trial."""
    if run.shared.rank == 0:
        run.shared.store.finish(run.trial, _record(run), run.best_student.state_dict())


def _record(run: Run) -> dict[str, Any]:
    """Return what a finished trial leaves behind; the metrics are those of its last epoch.

    `best_top1` is the best of the epochs after which the student was evaluated.
    """
    import timm

    history = run.history
    parts = dict.fromkeys(n for epoch in history for n in epoch if n.endswith("seconds"))
    spent = {*parts, "epoch", "teacher_images"}
    ran = {name: value for name, value in run.environments[-1].items() if name != "from_epoch"}
    return {
        "id": run.trial.id,
        "metrics": {k: v for k, v in history[-1].items() if k not in spent},
        "data": describe(run.trial.data, run.shared.images),
        "best_top1": max(epoch["top1"] for epoch in history if "top1" in epoch),
        "seconds": {name: sum(epoch.get(name, 0.0) for epoch in history) for name in parts},
        "teacher_images": sum(epoch.get("teacher_images", 0) for epoch in history),
        "parameters": sum(p.numel() for p in run.distiller.student.parameters()),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": {
            "pld_ray": __version__,
            **ran,
            "compiled": run.trial.compile and was_compiled(),
            "cuda_graph": run.update.replay is not None,
            "timm": timm.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "host": platform.node(),
            "cores": os.cpu_count(),
        },
        "notes": [
            *run.distiller.loss.notes,
            *change_notes(run.environments),
            *filter(None, [run.update.note, run.note]),
        ],
    }
