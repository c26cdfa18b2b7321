"""The command `pld-ray run`: train the missing trials, then write tables and figures."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import Annotated

import typer

from pld_ray.cli import session
from pld_ray.cli.options import Address, Experiments, Out, Overrides, Plugins, Smoke, Storage, app


class Logger(StrEnum):
    """The loggers that can receive the metrics of a run."""

    tensorboard = "tensorboard"
    mlflow = "mlflow"
    wandb = "wandb"


@app.command()
def run(
    experiments: Experiments,
    overrides: Overrides = None,
    plugin: Plugins = None,
    smoke: Smoke = False,
    storage: Storage = "results",
    address: Address = None,
    out: Out = None,
    log: Annotated[
        list[Logger] | None,
        typer.Option(help="Also send the metrics of every epoch to this logger. May be repeated."),
    ] = None,
) -> None:
    """Run the trials that have no record yet, then write tables and figures.

    To resume after an interruption, run the same command again. The exit
    code is 1 if any trial has failed.
    """
    failed = False
    opened = [session.opened(name, overrides, smoke, storage, True) for name in experiments]
    for plan, store in opened:
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
