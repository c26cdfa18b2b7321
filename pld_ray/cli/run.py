"""The command `pld-ray run`: train the missing trials, then write tables and figures."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from pld_ray.api import session
from pld_ray.cli.options import (
    Address,
    Experiments,
    Methods,
    Out,
    Overrides,
    Pairs,
    Plugins,
    Smoke,
    Storage,
    app,
    chosen,
)


class Logger(StrEnum):
    """The loggers that can receive the metrics of a run."""

    tensorboard = "tensorboard"
    mlflow = "mlflow"
    wandb = "wandb"


@app.command()
def run(
    experiments: Experiments,
    overrides: Overrides = None,
    methods: Methods = None,
    pairs: Pairs = None,
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
    opened = [
        session.opened(name, chosen(overrides, methods, pairs), smoke, storage, True)
        for name in experiments
    ]
    for plan, store in opened:
        plan, failures = session.execute(plan, store, address, log or ())
        failed |= bool(failures)
        folder = session.write_tables(plan, store, out)
        if plan.cells:
            session.say("figures", session.draw_figures(plan, store, folder))
    if failed:
        raise typer.Exit(1)
