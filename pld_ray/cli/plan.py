"""The commands `pld-ray plan` and `pld-ray status`: show the work and its progress."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pld_ray.api import added_seeds, session
from pld_ray.cli.options import (
    ExperimentName,
    Experiments,
    Methods,
    Overrides,
    Pairs,
    Plugins,
    Smoke,
    Storage,
    app,
    chosen,
)
from pld_ray.errors import InputError


@app.command()
def plan(
    experiments: Experiments,
    overrides: Overrides = None,
    methods: Methods = None,
    pairs: Pairs = None,
    plugin: Plugins = None,
    smoke: Smoke = False,
    storage: Storage = "results",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Show the unique trials, their state, and an estimate of the work.

    Teachers come first. With several experiments, show how many trials
    each one has and how many trials they share.
    """
    from pld_ray.api import plan_table
    from pld_ray.data import datasets
    from pld_ray.distill import bank_plan
    from pld_ray.store.store import Store
    from pld_ray.sweep import search

    store = Store(storage)
    plans = [
        session.opened(name, chosen(overrides, methods, pairs), smoke, storage)[0]
        for name in experiments
    ]
    trials = {key: trial for planned in plans for key, trial in planned.trials.items()}
    done = store.finished(trials)
    try:
        banks = bank_plan.planned(trials.values(), datasets.size, store)
        unknown = ""
    except InputError as error:  # planning also works on a machine without the dataset
        banks, unknown = {}, f"teacher bank: size unknown: {error}"
    bank_plan.check_top64(banks.values())
    if as_json:
        found = [plan_table.for_programs(planned, store, done) for planned in plans]
        sizes = [plan_table.bank_row(bank) for bank in banks.values()]
        summary = found[0] if len(found) == 1 else {"experiments": found, "unique": len(trials)}
        typer.echo(json.dumps(summary | {"banks": sizes}, indent=1))
        return
    if len(plans) == 1:
        plan_table.show(plans[0], store, done)
        if plans[0].experiment.search is not None:
            plan_table.show_search(search.look(plans[0].experiment, store))
        added_seeds.tell(plans[0], store)
    else:
        plan_table.show_shared(plans, done)
    if banks or unknown:
        typer.echo(unknown or plan_table.bank_line(banks.values()))


@app.command()
def status(
    experiment: ExperimentName,
    overrides: Overrides = None,
    methods: Methods = None,
    pairs: Pairs = None,
    plugin: Plugins = None,
    smoke: Smoke = False,
    storage: Storage = "results",
) -> None:
    """List each trial with its state: done, begun, failed (with the reason) or missing.

    The exit code is 1 if any trial has failed.
    """
    planned, store = session.opened(experiment, chosen(overrides, methods, pairs), smoke, storage)
    failed, lines = 0, []
    width = max(map(len, planned.labels.values()), default=0)
    for key, outcome in store.outcomes(planned.trials).items():
        state = outcome.state(planned.trials[key].epochs)
        if not outcome.finished and outcome.failure is not None:
            failed += 1
            state += f" ({store.folder(key)})"
        lines.append(f"{key}  {planned.labels[key]:{width}}  {state}")
    typer.echo("\n".join(lines))
    if failed:
        raise typer.Exit(1)
