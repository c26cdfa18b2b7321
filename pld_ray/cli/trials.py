"""The commands for one trial: `pld-ray show`, `logs` and `student`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pld_ray.api import session
from pld_ray.cli.options import Storage, app
from pld_ray.errors import InputError, nearest

if TYPE_CHECKING:
    from pld_ray.config.trial import Trial
    from pld_ray.store.store import Store

TrialId = Annotated[
    str, typer.Argument(metavar="TRIAL", help="Id of a trial, or the first characters of it.")
]
BLOCKS = "▁▂▃▄▅▆▇█"


def find(trial_id: str, store: Store) -> Trial:
    """Return a trial of a store by its id, or by the beginning of it.

    Raises:
        InputError: No trial, or more than one, has this id.
    """
    trials = store.files.folders("trials")
    found = [key for key in trials if key.startswith(trial_id)] if trial_id else []
    if trial_id in trials:
        found = [trial_id]
    if len(found) > 1:
        raise InputError(
            f"trial {trial_id}: {len(found)} trials in {store.uri} begin with it, such as "
            f"{found[0]} and {found[1]}: expected more characters"
        )
    if not found:
        hint = nearest(trial_id, trials) if trials else "it holds no trials"
        raise InputError(f"trial {trial_id!r}: no such trial in {store.uri}; {hint}")
    trial = store.trial(found[0])
    if trial is None:
        raise InputError(f"trial {found[0]}: trial.json in {store.folder(found[0])} is damaged")
    return trial


@app.command()
def show(trial: TrialId, storage: Storage = "results") -> None:
    """Show a trial: its settings, its curve, its metrics, its files, and trials to compare with.

    Those differ from it only in the loss.
    """
    import yaml

    from pld_ray.store.store import Store
    from pld_ray.units import in_bytes

    store = Store(storage)
    found = find(trial, store)
    outcome = store.outcomes([found.id])[found.id]
    typer.echo(f"{found.label} ({found.id}): {outcome.state(found.epochs)}\n")
    spec = found.model_dump(mode="json", exclude_defaults=True)
    typer.echo(yaml.safe_dump(spec, sort_keys=False, allow_unicode=True))
    for name in ("top1", "train_loss", "loss_ce", "loss_kd"):
        values = [epoch[name] for epoch in outcome.epochs if name in epoch]
        if values:
            typer.echo(f"{name:10}  {sparkline(values)}  {values[0]:.4g} to {values[-1]:.4g}")
    if outcome.record is not None:
        numbers = outcome.record["metrics"] | outcome.record["seconds"]
        typer.echo("\n" + "\n".join(f"{name:24}  {_number(v)}" for name, v in numbers.items()))
    typer.echo(f"\nfiles in {store.folder(found.id)}:")
    for name, size in sorted(store.files.listed(f"trials/{found.id}").items()):
        typer.echo(f"  {name:20}  {in_bytes(size)}")
    others = [each for each in store.trials().values() if _comparable(each, found)]
    records = store.records(each.id for each in others)
    if others:
        typer.echo("\nthe same with another loss:")
    for each in sorted(others, key=lambda one: one.label):
        record = records.get(each.id)
        top1 = "not done" if record is None else f"top-1 {record['metrics']['top1']:.2f}"
        typer.echo(f"  {each.id}  {each.label}: {top1}")


@app.command()
def logs(trial: TrialId, storage: Storage = "results") -> None:
    """Show the epochs of a trial, its notes, and the traceback of its last failure."""
    from pld_ray.api.plan_table import aligned
    from pld_ray.store.store import Store

    store = Store(storage)
    found = find(trial, store)
    outcome = store.outcomes([found.id])[found.id]
    typer.echo(f"{found.label} ({found.id}): {outcome.state(found.epochs)}\n")
    if outcome.epochs:
        fullest = max(outcome.epochs, key=len)  # its order is the best: it has been validated
        head = tuple(dict.fromkeys(name for each in (fullest, *outcome.epochs) for name in each))
        rows = [tuple(_number(epoch.get(name)) for name in head) for epoch in outcome.epochs]
        typer.echo(aligned(head, rows))
    for note in (outcome.record or {}).get("notes", []):
        typer.echo(f"note: {note}")
    if outcome.failure is not None:
        typer.echo("\n" + "\n".join(outcome.failure["traceback"]))


def sparkline(values: list[float], width: int = 60) -> str:
    """Draw numbers as a line of blocks; of more than `width` numbers, evenly spaced ones."""
    if len(values) > width:
        values = [values[round(i * (len(values) - 1) / (width - 1))] for i in range(width)]
    low, high = min(values), max(values)
    step = (high - low) / (len(BLOCKS) - 1)
    return "".join(BLOCKS[round((value - low) / step) if step else 0] for value in values)


@app.command()
def student(
    trial: TrialId,
    to: Annotated[
        Path | None, typer.Option(help="Folder to write to. The default is the id of the trial.")
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write an ONNX file instead.")] = False,
    storage: Storage = "results",
) -> None:
    """Write a trained student as a folder that timm loads (local-dir:FOLDER), or as ONNX."""
    from pld_ray.store.store import Store

    store = Store(storage)
    found = find(trial, store)
    from pld_ray.models import export  # torch takes seconds

    session.say("student", export.export_student(found, store, to or Path(found.id), onnx))


def _number(value: Any) -> str:
    """Format a metric."""
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else str(value)


def _comparable(one: Trial, other: Trial) -> bool:
    """Return whether two trials differ only in the loss, or in that one has no teacher."""
    left_out = {"loss", "teacher", "teacher_logits", "plugins"}
    settings, others = (trial.model_dump(exclude=left_out) for trial in (one, other))
    if one.loss == other.loss:  # of two versions of a plug-in
        return False
    taught = one.teacher is None or other.teacher is None or one.teacher == other.teacher
    return one.id != other.id and settings == others and taught
