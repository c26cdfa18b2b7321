"""The command `pld-ray`. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pld_ray import session
from pld_ray.errors import InputError, nearest

app = typer.Typer(
    help="Knowledge-distillation experiments on Ray: run grids, make tables, plot landscapes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

ExperimentName = Annotated[
    str, typer.Argument(metavar="EXPERIMENT", help="A YAML file, or a shipped one by name: demo.")
]
Experiments = Annotated[
    list[str],
    typer.Argument(metavar="EXPERIMENT...", help="YAML files, or shipped ones by name: demo."),
]
Smoke = Annotated[
    bool, typer.Option("--smoke", help="In miniature: the same cells, so small that 2 cores do.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Override, e.g. loss.temperature=2."),
]
Storage = Annotated[
    str,
    typer.Option(
        envvar="PLD_RAY_STORAGE", help="Where records and weights are kept: a folder or a URI."
    ),
]
Address = Annotated[str | None, typer.Option(help="Ray cluster to join; default: start Ray here.")]
Out = Annotated[
    Path | None, typer.Option(help="Folder to write to [default: STORAGE/reports/EXPERIMENT].")
]


class Logger(StrEnum):
    """What can follow a run."""

    tensorboard = "tensorboard"
    mlflow = "mlflow"
    wandb = "wandb"


@app.command()
def run(
    experiments: Experiments,
    overrides: Overrides = None,
    smoke: Smoke = False,
    storage: Storage = "results",
    address: Address = None,
    out: Out = None,
    log: Annotated[
        list[Logger] | None, typer.Option(help="Send every epoch there too; may be repeated.")
    ] = None,
) -> None:
    """Run the trials that have no record yet, then write the tables and the figures."""
    failed = False
    for plan, store in [session.opened(name, overrides, smoke, storage) for name in experiments]:
        if plan.experiment.search is not None:
            failed |= session.run_search(plan.experiment, store, address, log or ())
            plan = session.planned(plan.experiment, store)
        needed = replace(plan, searched=())
        if pending := session.pending_trials(needed, store):
            session.planned_banks(pending, store)
            failed |= bool(session.train(needed, pending, store, address, log=log or ()))
        else:
            typer.echo(f"{plan.experiment.name}: all {len(plan.trials)} trials are done")
        folder = session.write_tables(plan, store, out)
        if plan.cells:
            session.say("figures", session.draw_figures(plan, store, folder))
    if failed:
        raise typer.Exit(1)


@app.command()
def plan(
    experiments: Experiments,
    overrides: Overrides = None,
    smoke: Smoke = False,
    storage: Storage = "results",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show the unique trials, teachers first, which are done, and an estimate of the work.

    Of several experiments: how many trials each has, and how many they share.
    """
    from pld_ray import bank, data, estimate, search
    from pld_ray.store import Store

    store = Store(storage)
    plans = [session.opened(name, overrides, smoke, storage)[0] for name in experiments]
    trials = {key: trial for planned in plans for key, trial in planned.trials.items()}
    done = store.finished(trials)
    try:
        banks = bank.planned(trials.values(), data.size, store)
        unknown = ""
    except InputError as error:  # a plan can be made where the data is not
        banks, unknown = {}, f"teacher bank: of unknown size: {error}"
    if as_json:
        found = [estimate.for_programs(planned, store, done) for planned in plans]
        sizes = [estimate.bank_row(bank) for bank in banks.values()]
        summary = found[0] if len(found) == 1 else {"experiments": found, "unique": len(trials)}
        typer.echo(json.dumps(summary | {"banks": sizes}, indent=1))
        return
    if len(plans) == 1:
        estimate.show(plans[0], store, done)
        if plans[0].experiment.search is not None:
            estimate.show_search(search.look(plans[0].experiment, store))
    else:
        estimate.show_shared(plans, done)
    if banks or unknown:
        typer.echo(unknown or estimate.bank_line(banks.values()))


@app.command()
def status(
    experiment: ExperimentName,
    overrides: Overrides = None,
    smoke: Smoke = False,
    storage: Storage = "results",
) -> None:
    """List what is done, begun, failed (and why) and missing; exit code 1 if anything failed."""
    planned, store = session.opened(experiment, overrides, smoke, storage)
    failed = 0
    width = max(map(len, planned.labels.values()), default=0)
    for key, outcome in store.outcomes(planned.trials).items():
        state = outcome.state(planned.trials[key].epochs)
        if outcome.record is None and outcome.failure is not None:
            failed += 1
            state += f" ({store.folder(key)})"
        typer.echo(f"{key}  {planned.labels[key]:{width}}  {state}")
    if failed:
        raise typer.Exit(1)


@app.command()
def tables(
    experiments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[EXPERIMENT...]", help="As for run; none: all that the paper has tables of."
        ),
    ] = None,
    overrides: Overrides = None,
    smoke: Smoke = False,
    storage: Storage = "results",
    out: Out = None,
) -> None:
    """Write and print tables, the paper's numbers beside ours: Markdown, CSV, LaTeX."""
    from analysis import paper

    for name in experiments or dict.fromkeys(table.experiment for table in paper.TABLES):
        session.write_tables(*session.opened(name, overrides, smoke, storage), out)


@app.command()
def best(
    experiment: ExperimentName,
    overrides: Overrides = None,
    smoke: Smoke = False,
    storage: Storage = "results",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show the best settings that a search, or a grid, has found so far, for each loss."""
    from analysis import best as found
    from analysis import records
    from pld_ray import search

    plan, store = session.opened(experiment, overrides, smoke, storage)
    sought = plan.experiment.search
    metric = "top1" if sought is None else sought.metric
    if sought is None:
        rows = found.of_grid(records.frame(plan, store))
    else:
        rows = found.of_search(search.look(plan.experiment, store), metric)
    if not rows:
        raise InputError(f"{plan.experiment.name}: no trial has finished: run it first")
    typer.echo(json.dumps(rows, indent=1) if as_json else found.text(rows, metric))


@app.command()
def figures(
    experiment: ExperimentName,
    overrides: Overrides = None,
    smoke: Smoke = False,
    storage: Storage = "results",
    out: Out = None,
) -> None:
    """Plot accuracies and learning curves: PNG and PDF."""
    planned, store = session.opened(experiment, overrides, smoke, storage)
    if not planned.cells:
        raise InputError(f"{planned.experiment.name}: its search is not over: run it first")
    session.say(
        "figures", session.draw_figures(planned, store, session.reports(planned, store, out))
    )


@app.command()
def landscape(
    experiment: Annotated[
        str | None,
        typer.Argument(metavar="[EXPERIMENT]", help="Its trained students; none: over logits."),
    ] = None,
    overrides: Overrides = None,
    smoke: Smoke = False,
    storage: Storage = "results",
    address: Address = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to.")] = None,
    classes: Annotated[int, typer.Option(min=3, help="Logits: length of the vectors.")] = 10,
    points: Annotated[int, typer.Option(min=3, help="Students: points along a side.")] = 21,
    reach: Annotated[float, typer.Option(min=0.01, help="Students: a and b up to it.")] = 1.0,
    images: Annotated[int, typer.Option(min=1, help="Students: training images.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Of logits and directions.")] = 0,
) -> None:
    """Plot losses over a plane: of student logits (the paper's figures 3 and 4), or of weights.

    With an experiment: around its trained students, with the sharpness of each minimum.
    """
    if experiment is None:
        from analysis import landscape as surfaces

        session.say("landscapes", surfaces.draw(out or Path("results/landscape"), classes, seed))
        return
    plan, store = session.opened(experiment, overrides, smoke, storage)
    from rich.console import Console

    from analysis import weight_space
    from pld_ray.view import screen_apart

    trials = weight_space.students(plan, store)
    if not trials:
        raise InputError(f"{plan.experiment.name}: no trial has finished: run it first")
    settings = weight_space.Settings(points, reach, images, seed)
    with Console().status(f"{len(trials)} students: starting Ray"):
        from pld_ray import cluster, sweep

        shown = sweep.check({trial.id: trial for trial in trials.values()}, address)
    with (
        screen_apart(session.ray_log(store)) as console,
        console.status(f"{points} x {points} points around {len(trials)} students"),
        cluster.connected(address),
    ):
        weight_space.compute(trials, shown, store, settings)
    folder = session.reports(plan, store, out)
    session.say("landscapes", weight_space.draw(trials, store, folder))
    typer.echo("\n" + (folder / "sharpness.md").read_text(encoding="utf-8"))


@app.command()
def report(
    experiments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[EXPERIMENT...]", help="As for run; none: all that are shipped."),
    ] = None,
    overrides: Overrides = None,
    smoke: Smoke = False,
    storage: Storage = "results",
    out: Annotated[Path | None, typer.Option(help="Folder [default: STORAGE/reports].")] = None,
) -> None:
    """Write one self-contained HTML page of all tables, figures and trials; and Markdown."""
    from analysis import paper
    from analysis import report as pages

    names = experiments or paper.experiments()
    opened = [session.opened(name, overrides, smoke, storage) for name in names]
    store = opened[0][1]
    folder = out or Path(store.uri if store.local else "results") / "reports"
    session.say("report", pages.write([plan for plan, _ in opened], store, folder))


@app.command()
def export(
    experiments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[EXPERIMENT...]", help="As for run; none: all trials there are."),
    ] = None,
    overrides: Overrides = None,
    smoke: Smoke = False,
    storage: Storage = "results",
    to: Annotated[Path, typer.Option(help="File to write: .csv or .parquet.")] = Path("trials.csv"),
) -> None:
    """Write one table of trials, their specs, metrics and seconds, for other programs."""
    from analysis import export as tables
    from pld_ray.store import Store

    tables.check(to)
    store = Store(storage)
    if experiments:
        plans = [session.opened(name, overrides, smoke, storage)[0] for name in experiments]
        trials = {key: trial for plan in plans for key, trial in plan.trials.items()}
    else:
        trials = store.trials()
    if not trials:
        raise InputError(f"there are no trials in {store.uri}")
    table = tables.frame(trials, store)
    tables.write(table, to)
    session.say(f"{len(table)} trials", [to])


@app.command()
def student(
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="The id of a finished trial.")],
    to: Annotated[Path | None, typer.Option(help="Folder to write to [default: TRIAL].")] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="As ONNX instead.")] = False,
    storage: Storage = "results",
) -> None:
    """Write a trained student as the folder that timm loads (local-dir:FOLDER), or as ONNX."""
    from pld_ray.store import Store

    store = Store(storage)
    trials = store.trials()
    if trial not in trials:
        hint = nearest(trial, trials) if trials else "there is none"
        raise InputError(f"student {trial}: no such trial in {store.uri}; {hint}")
    from pld_ray import publish

    session.say("student", publish.write(trials[trial], store, to or Path(trial), onnx))


bank_app = typer.Typer(
    help="The teacher bank: logits of teachers, kept so that no trial computes them again.",
    no_args_is_help=True,
)
app.add_typer(bank_app, name="bank")


@bank_app.command("ls")
def bank_ls(storage: Storage = "results") -> None:
    """List the banks: whose logits, on which images, how many views, how large."""
    from pld_ray import estimate
    from pld_ray.store import Store

    estimate.show_banks(Store(storage))


@bank_app.command("rm")
def bank_rm(
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="KEY...", help="As ls has it.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Delete every bank.")] = False,
    storage: Storage = "results",
) -> None:
    """Delete banks. Records and weights stay; a trial that needs a bank computes it again."""
    from pld_ray.bank import in_bytes
    from pld_ray.store import Store

    store = Store(storage)
    banks = store.banks()
    if bool(keys) == everything:
        raise InputError("bank rm: expected the keys of banks (pld-ray bank ls), or --all")
    for key in keys or []:
        if key not in banks:
            hint = nearest(key, banks) if banks else "there is none"
            raise InputError(f"bank rm {key}: no such bank in {store.uri}; {hint}")
    chosen = list(dict.fromkeys(keys or banks))
    for key in chosen:
        store.drop_bank(key)
    freed = sum(sum(banks[key].values()) for key in chosen)
    typer.echo(f"deleted: {len(chosen)} banks, {in_bytes(freed)}")


@bank_app.command("build")
def bank_build(
    experiment: ExperimentName,
    overrides: Overrides = None,
    smoke: Smoke = False,
    storage: Storage = "results",
    address: Address = None,
) -> None:
    """Compute all teacher logits of an experiment on the whole cluster, before its trials run."""
    from pld_ray.experiment import Cell, Plan

    plan, store = session.opened(experiment, overrides, smoke, storage)
    banks = session.planned_banks(plan.trials, store)
    cells = tuple(Cell(plan.trials[key], None) for key in plan.teacher_ids)
    teachers = Plan(plan.experiment, cells)
    if (untrained := session.pending_trials(teachers, store)) and session.train(
        teachers, untrained, store, address
    ):
        raise typer.Exit(1)
    from pld_ray import estimate, sweep
    from pld_ray.view import screen_apart

    planned = [bank for bank in banks.values() if bank.split == "train"]
    if not planned:
        raise InputError(f"{plan.experiment.name}: none of its trials reads a bank")
    images = sweep.check({bank.trial.id: bank.trial for bank in planned}, address)
    with (
        screen_apart(session.ray_log(store)) as console,
        console.status("computing teacher logits"),
    ):
        sweep.build_banks(planned, plan.experiment.resources, images, store, address)
    estimate.show_banks(store)


class _Stopped(BaseException):
    """SIGINT or SIGTERM came; typer would make something else of a KeyboardInterrupt."""


def _stop(number: int, frame: Any) -> None:
    raise _Stopped(number)


def main() -> None:
    """Entry point: bad input is one sentence and exit code 2, a stop from outside 130 or 143."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app()
    except InputError as error:
        typer.echo(f"pld-ray: {error}", err=True)
        sys.exit(2)
    except OSError as error:  # a full disk, a storage that is away
        typer.echo(f"pld-ray: {error}; the same command goes on from what is kept", err=True)
        sys.exit(1)
    except _Stopped as stopped:
        typer.echo("stopped; the same command goes on from here", err=True)
        sys.exit(128 + stopped.args[0])


if __name__ == "__main__":
    main()
