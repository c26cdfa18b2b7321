"""The commands `pld-ray bank`: list, delete and compute teacher banks."""

from __future__ import annotations

from typing import Annotated

import typer

from pld_ray.api import session
from pld_ray.cli.options import (
    Address,
    ExperimentName,
    Methods,
    Overrides,
    Pairs,
    Plugins,
    Smoke,
    Storage,
    chosen,
)
from pld_ray.errors import InputError, nearest

bank_app = typer.Typer(
    help="List, delete or compute the teacher bank: stored teacher logits that trials share.",
    no_args_is_help=True,
)


@bank_app.command("ls")
def bank_ls(storage: Storage = "results") -> None:
    """List the banks with their teacher, dataset, split, seed, number of views and size."""
    from pld_ray.api import plan_table
    from pld_ray.store.store import Store

    plan_table.show_banks(Store(storage))


@bank_app.command("rm")
def bank_rm(
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY...", help="Keys of banks, as pld-ray bank ls shows them."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Delete every bank.")] = False,
    storage: Storage = "results",
) -> None:
    """Delete banks. A trial that needs a deleted bank computes it again.

    Records and weights of trials are not deleted.
    """
    from pld_ray.store.store import Store
    from pld_ray.units import in_bytes

    store = Store(storage)
    banks = store.banks()
    if bool(keys) == everything:
        raise InputError("bank rm: expected either keys of banks (see pld-ray bank ls) or --all")
    for key in keys or []:
        if key not in banks:
            hint = nearest(key, banks) if banks else "it holds no banks"
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
    methods: Methods = None,
    pairs: Pairs = None,
    plugin: Plugins = None,
    smoke: Smoke = False,
    storage: Storage = "results",
    address: Address = None,
) -> None:
    """Compute all teacher logits of an experiment before its trials run.

    The whole cluster is used. Teachers that are not trained yet are trained first.
    """
    from pld_ray.config.planning import Cell, Plan

    plan, store = session.opened(
        experiment, chosen(overrides, methods, pairs), smoke, storage, download=True
    )
    banks = session.planned_banks(plan.trials, store)
    cells = tuple(Cell(plan.trials[key], None) for key in plan.teacher_ids)
    teachers = Plan(plan.experiment, cells)
    if (untrained := session.pending_trials(teachers, store)) and session.train(
        teachers, untrained, store, address
    ):
        raise typer.Exit(1)
    from pld_ray.api import plan_table
    from pld_ray.sweep import checks, runner
    from pld_ray.sweep.progress import redirect_prints

    planned = [bank for bank in banks.values() if bank.split == "train"]
    if not planned:
        raise InputError(f"{plan.experiment.name}: none of its trials reads a bank")
    session.keep_plugins((bank.trial for bank in planned), store)
    images = checks.check_trials({bank.trial.id: bank.trial for bank in planned}, address).images
    with (
        redirect_prints(session.ray_log(store)) as console,
        console.status("computing teacher logits"),
    ):
        runner.build_banks(planned, plan.experiment.resources, images, store, address)
    plan_table.show_banks(store)
