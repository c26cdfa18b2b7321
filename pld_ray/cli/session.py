"""What the commands share: an experiment opened with its store, trained, and printed.

Heavy imports wait until they are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from pld_ray.config.experiment import Experiment
    from pld_ray.config.planning import Plan
    from pld_ray.config.trial import Trial
    from pld_ray.distill.bank_plan import PlannedBank
    from pld_ray.store.store import Store
    from pld_ray.sweep.search import SearchProgress


def pending_trials(plan: Plan, store: Store) -> dict[str, Trial]:
    """The trials that have no record yet, and the teachers of these whose weights are damaged."""
    from pld_ray.config.trial import Trial

    finished = store.finished(plan.trials)
    pending = {key: trial for key, trial in plan.trials.items() if key not in finished}
    taught_by = {t.teacher.id for t in pending.values() if isinstance(t.teacher, Trial)}
    damaged = {key for key in taught_by & finished if not store.intact(plan.trials[key])}
    if damaged:
        typer.echo(f"{len(damaged)} teachers have damaged weights and are trained again", err=True)
    return {key: trial for key, trial in plan.trials.items() if key in pending.keys() | damaged}


def planned_banks(trials: dict[str, Trial], store: Store) -> dict[str, PlannedBank]:
    """The banks that trials need; says how large, and refuses what does not fit the disk."""
    from pld_ray.cli import estimate
    from pld_ray.data import datasets
    from pld_ray.distill import bank_plan

    banks = bank_plan.planned(trials.values(), datasets.size, store)
    bank_plan.check_disk_space(banks.values(), store)
    if banks:
        typer.echo(estimate.bank_line(banks.values()))
    return banks


def run_search(
    experiment: Experiment, store: Store, address: str | None, log: Sequence[str] = ()
) -> bool:
    """Run what is left of a search; whether a trial failed that could succeed another time."""
    from pld_ray.config.planning import Plan
    from pld_ray.config.trial import Trial
    from pld_ray.sweep import search

    progress = search.look(experiment, store)
    if all(each.over for each in progress):
        typer.echo(f"{experiment.name}: the search is over")
        return False
    cells = [each.group.cell.trial for each in progress]
    teachers = [cell.teacher for cell in cells if isinstance(cell.teacher, Trial)]
    drawn = [drawn for each in progress for drawn in each.drawn]
    plan = Plan(experiment, (), (*teachers, *(each.trial for each in drawn)))
    ended = {d.trial.id for d in drawn} - {d.trial.id for each in progress for d in each.open}
    pending = {key: t for key, t in pending_trials(plan, store).items() if key not in ended}
    planned_banks({trial.id: trial for trial in [*cells, *pending.values()]}, store)
    failures = train(plan, pending, store, address, progress, log)
    return any(not (store.failure(key) or {}).get("final") for key in failures)


def train(
    plan: Plan,
    pending: dict[str, Trial],
    store: Store,
    address: str | None,
    progress: Sequence[SearchProgress] = (),
    log: Sequence[str] = (),
) -> dict[str, str]:
    """Run trials under the live view; returns, and prints, why some failed.

    log: names of loggers that are to follow them.
    """
    from rich.console import Console

    from pld_ray.sweep.progress import ProgressView, redirect_prints

    with Console().status(f"{len(pending)} trials to run: checking them and starting Ray"):
        from pld_ray.sweep import checks, loggers, runner

        followed = loggers.create(log, plan.experiment.name, store)
        cells = {each.group.key: each.group.cell.trial for each in progress}
        ready = checks.check_trials(pending | cells, address)
    to_draw = sum({each.group.key: each.to_draw for each in progress}.values())
    with (
        redirect_prints(ray_log(store)) as console,
        ProgressView(plan, pending, console, to_draw) as view,
    ):
        failures = runner.run(plan, ready, store, view, address, progress, followed)
    for logger in followed:
        if logger.problem:
            typer.echo(f"--log {logger.name} ended early: {logger.problem}", err=True)
    for key, reason in failures.items():
        typer.echo(f"failed: {view.labels[key]}: {reason} ({store.folder(key)})", err=True)
    return failures


def ray_log(store: Store) -> Path:
    """Where what is not ours to print goes."""
    return Path(store.uri if store.local else ".") / "ray.log"


def opened(
    experiment: str, overrides: list[str] | None, smoke: bool, storage: str
) -> tuple[Plan, Store]:
    """An experiment with overrides, as a plan, and the store of its results."""
    from pld_ray.config.experiment import load_experiment
    from pld_ray.store.store import Store

    store = Store(storage)
    return planned(load_experiment(experiment, tuple(overrides or ()), smoke), store), store


def planned(experiment: Experiment, store: Store) -> Plan:
    """The trials of an experiment; of a search as far as it has come."""
    from pld_ray.config.planning import plan
    from pld_ray.sweep import search

    return plan(experiment) if experiment.search is None else search.plan(experiment, store)


def reports(plan: Plan, store: Store, out: Path | None) -> Path:
    """The folder for tables and figures."""
    root = Path(store.uri if store.local else "results")
    return out or root / "reports" / plan.experiment.name


def write_tables(plan: Plan, store: Store, out: Path | None) -> Path:
    """Print and write the tables; returns their folder."""
    from analysis.records import frames
    from analysis.tables import best, comparison, paper_tables
    from pld_ray.sweep import search

    folder = reports(plan, store, out)
    if (sought := plan.experiment.search) is not None:
        rows = best.of_search(search.look(plan.experiment, store), sought.metric)
        typer.echo("\nThe best of each cell\n\n" + best.text(rows, sought.metric))
        if not plan.cells:
            return folder
    frame = frames.frame(plan, store)
    paths = []
    if frame["finished"].any() or not paper_tables.of_experiment(plan.experiment.name):
        own = comparison.comparison(frame), comparison.against(frame)
        paths += comparison.write(*own, folder, plan.experiment)
        typer.echo("\n" + comparison.text(*own, plan.experiment) + "\n")
    miniature = plan.experiment.miniature_of is not None
    for declared in paper_tables.of_experiment(plan.experiment.name):
        found = paper_tables.entries(declared, frame)
        paths += paper_tables.write(declared, found, miniature, folder)
        typer.echo(paper_tables.text(declared, found, miniature) + "\n")
    for note in dict.fromkeys(note for notes in frame["notes"] for note in notes):
        typer.echo(f"note: {note}\n")
    say("tables", paths)
    return folder


def draw_figures(plan: Plan, store: Store, folder: Path) -> list[Path]:
    """Draw the figures; returns their paths."""
    from analysis.figures import methods, paper_figures
    from analysis.records import frames

    frame, name = frames.frame(plan, store), plan.experiment.name
    paths = methods.draw(frame, frames.curves(plan, store), folder)
    return paths + paper_figures.draw_paper(
        frame, name, plan.experiment.miniature_of is not None, folder
    )


def say(kind: str, paths: list[Path]) -> None:
    """Print what was written, a line each."""
    for path in paths:
        shown: Any = path
        if path.is_absolute() and path.is_relative_to(Path.cwd()):
            shown = path.relative_to(Path.cwd())
        typer.echo(f"{kind}: {shown}")
