"""Open an experiment, run what is left of it, and print and write its results.

Heavy modules are imported inside the functions that need them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pld_ray.api import added_seeds
from pld_ray.errors import InputError

if TYPE_CHECKING:
    from pld_ray.config.experiment import Experiment, Overrides
    from pld_ray.config.planning import Plan
    from pld_ray.config.trial import Trial
    from pld_ray.distill.bank_plan import PlannedBank
    from pld_ray.store.store import Store
    from pld_ray.sweep.search import SearchProgress


def tell(text: str) -> None:
    """Print a message that is not part of the results, to standard error."""
    print(text, file=sys.stderr)


def execute(
    plan: Plan, store: Store, address: str | None = None, log: Sequence[str] = ()
) -> tuple[Plan, dict[str, str]]:
    """Run what is left of an experiment: its search, then its trials.

    Where seeds are added by a rule, this goes on until the rule wants no more. Each trial runs at
    most once in a call.

    Args:
        plan: The plan of the experiment.
        store: The store for records, weights and banks.
        address: Address of a Ray cluster, or None.
        log: Names of the loggers that receive the metrics.

    Returns:
        The plan, which has the best settings after a search, and the reasons of the failed trials
        by id.
    """
    failures: dict[str, str] = {}
    if plan.experiment.search is not None:
        failures |= run_search(plan.experiment, store, address, log)
        plan = planned(plan.experiment, store)
    tried: set[str] = set()
    while True:
        needed = replace(plan, searched=())
        pending = pending_trials(needed, store)
        pending = {key: trial for key, trial in pending.items() if key not in tried}
        if not pending:
            break
        tried |= pending.keys()
        planned_banks(pending, store)
        failures |= train(needed, pending, store, address, log=log)
        plan = planned(plan.experiment, store)
        added_seeds.tell(plan, store)
    if not tried:
        print(f"{plan.experiment.name}: all {len(plan.trials)} trials are done")
    return plan, failures


def pending_trials(plan: Plan, store: Store) -> dict[str, Trial]:
    """Return the trials of a plan that have to run.

    These are the trials without a record, and the teachers of these trials if the weights of the
    teacher are damaged.

    Args:
        plan: The plan of an experiment.
        store: The store with the records and weights.

    Returns:
        The trials by id, in the order of the plan.
    """
    from pld_ray.config.trial import Trial

    finished = store.finished(plan.trials)
    pending = {key: trial for key, trial in plan.trials.items() if key not in finished}
    taught_by = {t.teacher.id for t in pending.values() if isinstance(t.teacher, Trial)}
    damaged = {key for key in taught_by & finished if not store.intact(plan.trials[key])}
    if damaged:
        tell(f"{len(damaged)} teachers have damaged weights and are trained again")
    return {key: trial for key, trial in plan.trials.items() if key in pending.keys() | damaged}


def planned_banks(trials: dict[str, Trial], store: Store) -> dict[str, PlannedBank]:
    """Return the banks that trials need, and print their size.

    Args:
        trials: The trials that will run, by id.
        store: The store in which the banks are kept.

    Returns:
        The banks by their planned key.

    Raises:
        InputError: If the banks do not fit on the disk, or top64 spares nothing.
    """
    from pld_ray.api import plan_table
    from pld_ray.data import datasets
    from pld_ray.distill import bank_plan

    banks = bank_plan.planned(trials.values(), datasets.size, store)
    bank_plan.check_top64(banks.values())
    bank_plan.check_disk_space(banks.values(), store)
    if banks:
        print(plan_table.bank_line(banks.values()))
    return banks


def run_search(
    experiment: Experiment, store: Store, address: str | None, log: Sequence[str] = ()
) -> dict[str, str]:
    """Run the remaining trials of a search.

    Args:
        experiment: An experiment with a search.
        store: The store with the points and records of the search.
        address: Address of a Ray cluster, or None.
        log: Names of the loggers that receive the metrics.

    Returns:
        The reasons of those failed trials that could succeed when they are run again, by id.
    """
    from pld_ray.config.planning import Plan
    from pld_ray.config.trial import Trial
    from pld_ray.sweep import search

    progress = search.look(experiment, store)
    if all(each.over for each in progress):
        print(f"{experiment.name}: the search is finished")
        return {}
    cells = [each.group.cell.trial for each in progress]
    teachers = [cell.teacher for cell in cells if isinstance(cell.teacher, Trial)]
    drawn = [drawn for each in progress for drawn in each.drawn]
    plan = Plan(experiment, (), (*teachers, *(each.trial for each in drawn)))
    ended = {d.trial.id for d in drawn} - {d.trial.id for each in progress for d in each.open}
    pending = {key: t for key, t in pending_trials(plan, store).items() if key not in ended}
    planned_banks({trial.id: trial for trial in [*cells, *pending.values()]}, store)
    failures = train(plan, pending, store, address, progress, log)
    return {
        key: why for key, why in failures.items() if not (store.failure(key) or {}).get("final")
    }


def train(
    plan: Plan,
    pending: dict[str, Trial],
    store: Store,
    address: str | None,
    progress: Sequence[SearchProgress] = (),
    log: Sequence[str] = (),
) -> dict[str, str]:
    """Run trials with a live progress view, and print the reasons of failures.

    Args:
        plan: The plan to which the trials belong.
        pending: The trials to run, by id.
        store: The store for records, weights and banks.
        address: Address of a Ray cluster, or None.
        progress: The progress of a search, if the trials belong to one.
        log: Names of the loggers that receive the metrics.

    Returns:
        The reasons of the failed trials, by id.
    """
    from rich.console import Console

    from pld_ray.data import datasets
    from pld_ray.imports import without_collection
    from pld_ray.sweep.progress import ProgressView, redirect_prints

    said, screen = f"{len(pending)} trials to run: checking them and starting Ray", Console()
    with screen.status(said) if screen.is_terminal else nullcontext():
        with without_collection():
            from pld_ray.sweep import checks, identity, loggers, runner

        followed = loggers.create(log, plan.experiment.name, store)
        cells = {each.group.key: each.group.cell.trial for each in progress}
        ready, notes = checks.check_trials(pending | cells, address)
        for trial in {trial.data: trial for trial in pending.values()}.values():
            if trial.data.fingerprint:
                images = ready[datasets.sharing_key(trial.data)]
                store.keep_dataset(identity.dataset_entry(trial.data, images))
        keep_plugins((pending | cells).values(), store)
    for note in notes:
        tell(f"note: {note}")
    to_draw = sum({each.group.key: each.to_draw for each in progress}.values())
    with (
        redirect_prints(ray_log(store)) as console,
        ProgressView(plan, pending, console, to_draw) as view,
    ):
        failures = runner.run(plan, ready, store, view, address, progress, followed)
    for logger in followed:
        if logger.problem:
            tell(f"--log {logger.name} stopped early: {logger.problem}")
    for key, reason in failures.items():
        tell(f"failed: {view.labels[key]}: {reason} ({store.folder(key)})")
    return failures


def keep_plugins(trials: Iterable[Trial], store: Store) -> None:
    """Keep the source of the plug-ins that trials use, so that workers can import them."""
    from pld_ray import plugins

    for name in {name for trial in trials for name in trial.all_plugins}:
        store.keep_plugin(plugins.LOADED[name])


def ray_log(store: Store) -> Path:
    """Return the path of the file that collects the messages of Ray and other libraries."""
    return Path(store.uri if store.local else ".") / "ray.log"


def opened(
    experiment: str | os.PathLike[str] | Experiment,
    overrides: Overrides | None,
    smoke: bool,
    storage: str | os.PathLike[str],
    download: bool = False,
) -> tuple[Plan, Store]:
    """Load an experiment, identify its data, and open the store of its results.

    What the user should know about the data is printed.

    Args:
        experiment: Path of a YAML file, name of a shipped experiment, or an experiment.
        overrides: Overrides, as for `load_experiment`.
        smoke: Whether to load the miniature of the experiment.
        storage: Folder or URI of the store.
        download: Whether a dataset of a hub may be downloaded.

    Returns:
        The plan of the experiment and the store.
    """
    from pld_ray.config.experiment import load_experiment
    from pld_ray.store.store import Store
    from pld_ray.sweep.identity import DataIdentity, changed_plugins

    store = Store(os.fspath(storage))
    identity = DataIdentity(store, download)
    loaded = load_experiment(experiment, overrides or (), smoke).identified(identity)
    plan = planned(loaded, store)
    if loaded.reference or loaded.looks:
        _check_methods(plan, store)
    for note in [*identity.notes, *changed_plugins(store)]:
        tell(f"note: {note}")
    return plan, store


def _check_methods(plan: Plan, store: Store) -> None:
    """Raise InputError if no method is the reference, or none is left to compare by a rule."""
    from analysis.records import frames
    from pld_ray.sweep import search

    if plan.experiment.search is not None:  # before it ends, it has no cells
        cells = tuple(each.group.cell for each in search.look(plan.experiment, store))
        plan = replace(plan, cells=cells, points=None, kept=None)
    frames.check_reference(plan)
    if plan.experiment.looks and frames.places(plan)["method"].nunique() < 2:
        raise InputError(
            f"{plan.experiment.name}: seeds.until is 'decided': expected at least two methods, of "
            "which one is compared with the others; or a list of seeds"
        )


def planned(experiment: Experiment, store: Store) -> Plan:
    """Return the plan of an experiment. For a search, it has the trials known so far."""
    from pld_ray.config.planning import plan
    from pld_ray.sweep import search

    found = plan(experiment) if experiment.search is None else search.plan(experiment, store)
    return added_seeds.wanted(found, store) if experiment.looks and found.cells else found


def reports(plan: Plan, store: Store, out: Path | None) -> Path:
    """Return the folder for tables and figures: `out`, or by default a folder in the store."""
    root = Path(store.uri if store.local else "results")
    return out or root / "reports" / plan.experiment.name


def tell_other_file(experiment: Experiment, folder: Path) -> None:
    """Say that the reports of another experiment with the same name are replaced."""
    marker = folder / "experiment.txt"
    before = marker.read_text(encoding="utf-8").strip() if marker.is_file() else ""
    if experiment.file is None or before == str(experiment.file):
        return
    if before:
        tell(
            f"note: {folder} held the reports of {before}, which has the same name, "
            f"{experiment.name!r}: they are replaced; set name: in one of the files to keep both"
        )
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(f"{experiment.file}\n", encoding="utf-8")


def write_tables(
    plan: Plan,
    store: Store,
    out: Path | None,
    all_pairs: bool = False,
    sort: str = "top1",
    top: int = 10,
) -> Path:
    """Print and write the tables of an experiment.

    Args:
        plan: The plan of the experiment.
        store: The store with the records.
        out: Folder to write to, or None for the default.
        all_pairs: Whether to compare every two methods as well.
        sort: The metric by which the settings of a loss are ordered, or "grid".
        top: The number of settings of each loss to print; 0 for all.

    Returns:
        The folder that holds the tables.
    """
    from analysis.records import frames, imported
    from analysis.tables import (
        best,
        comparison,
        comparison_printing,
        paper_entries,
        paper_printing,
        paper_tables,
    )
    from pld_ray.sweep import search

    folder = reports(plan, store, out)
    tell_other_file(plan.experiment, folder)
    if (sought := plan.experiment.search) is not None:
        rows = best.of_search(search.look(plan.experiment, store), sought.metric)
        print("\nBest settings of each cell\n\n" + best.text(rows, sought.metric))
        if not plan.cells:
            return folder
    frame = frames.frame(plan, store)
    paths = []
    if frame["finished"].any() or not paper_tables.of_experiment(plan.experiment.name):
        own = comparison.tables(frame, imported.beside(frame, store), all_pairs, sort)
        paths += comparison_printing.write(own, folder, plan.experiment, top)
        print("\n" + comparison_printing.text(own, plan.experiment, top) + "\n")
    miniature = plan.experiment.miniature_of is not None
    for declared in paper_tables.of_experiment(plan.experiment.name):
        found = paper_entries.of_table(declared, frame)
        paths += paper_printing.write(declared, found, miniature, folder)
        print(paper_printing.text(declared, found, miniature) + "\n")
    for note in dict.fromkeys(note for notes in frame["notes"] for note in notes):
        print(f"note: {note}\n")
    say("tables", paths)
    return folder


def write_literature(
    plan: Plan,
    store: Store,
    out: Path | None,
    files: Sequence[Path] = (),
    everything: bool = False,
    sources: bool = False,
) -> Path:
    """Print and write the results of an experiment beside those of the literature.

    Args:
        plan: The plan of the experiment.
        store: The store with the records and with imported results, which are shown too.
        out: Folder to write to, or None for the default.
        files: CSV files with further results.
        everything: Whether to show all methods that are reported on the pairs.
        sources: Whether to print one line per reported result.

    Returns:
        The folder that holds the tables.
    """
    from shutil import get_terminal_size

    from analysis.records import frames, imported
    from analysis.tables import literature, literature_printing

    if not plan.cells:
        raise InputError(
            f"{plan.experiment.name}: its search is not finished; run the experiment first"
        )
    read = [literature.read(path) for path in files]
    folder = reports(plan, store, out)
    tell_other_file(plan.experiment, folder)
    miniature = plan.experiment.miniature_of is not None
    tables = [*(table for table, _ in read), imported.stored(store)]
    found = literature.compare(frames.frame(plan, store), tables, miniature, everything)
    for path, (table, unknown), unused in zip(files, read, found.unused, strict=False):
        if unknown:
            tell(f"note: {path}: columns that are not used: {', '.join(unknown)}")
        if unused:
            tell(
                f"note: {path}: {unused} of {len(table)} results are on other datasets or networks "
                f"than those of {plan.experiment.name}, and are not shown"
            )
    width = min(max(get_terminal_size((100, 24)).columns, 80), 160)
    print("\n" + literature_printing.text(found, plan.experiment, width, sources) + "\n")
    say("tables", literature_printing.write(found, folder, plan.experiment))
    return folder


def draw_figures(plan: Plan, store: Store, folder: Path) -> list[Path]:
    """Draw the figures of an experiment into a folder and return their paths."""
    from analysis.figures import ablation, methods, paper_figures, style
    from analysis.records import frames, imported

    sought = draw_search(plan, store, folder)
    if not plan.cells:  # the search is not finished
        return sought
    frame, name = frames.frame(plan, store), plan.experiment.name
    reported = imported.beside(frame, store)
    curves = frames.curves(methods.best_settings(frame), store)
    paths = methods.draw(frame, curves, folder, reported)
    pictures, told = ablation.ablation(frame)
    paths += style.save_all(pictures, folder)
    for sentence in told if pictures else ():
        tell(f"note: {sentence}")
    return [
        *sought,
        *paths,
        *paper_figures.draw_paper(frame, name, plan.experiment.miniature_of is not None, folder),
    ]


def draw_search(plan: Plan, store: Store, folder: Path) -> list[Path]:
    """Draw the figures of the search of an experiment, if it has one; return their paths."""
    if plan.experiment.search is None:
        return []
    from analysis.figures import searches, style
    from analysis.tables import best
    from pld_ray.sweep import search

    progress = search.look(plan.experiment, store)
    space = {field: found for each in progress for field, found in each.group.space.items()}
    sought = plan.experiment.search
    pictures, told = searches.draw(best.drawn(progress), space, sought.metric, sought.better)
    for sentence in told:
        tell(f"note: {sentence}")
    return style.save_all(pictures, folder) if pictures else []


def draw_chosen(
    plan: Plan, store: Store, folder: Path, x: str, by: str, facet: str, metric: str
) -> list[Path]:
    """Draw a figure with axes that the user names (see `ablation.chosen`); return its paths."""
    from analysis.figures import ablation, style
    from analysis.records import frames

    frame = frames.frame(plan, store)
    if not frame["finished"].any():
        raise InputError(f"{plan.experiment.name}: nothing to draw yet: no trial has finished")
    pictures, told = ablation.chosen(frame, x, by, facet, metric)
    for sentence in told:
        tell(f"note: {sentence}")
    return style.save_all(pictures, folder)


def say(kind: str, paths: list[Path]) -> None:
    """Print one line per written file.

    Args:
        kind: What the files are, such as "tables".
        paths: The files; paths below the working directory are shortened.
    """
    for path in paths:
        shown: Any = path
        if path.is_absolute() and path.is_relative_to(Path.cwd()):
            shown = path.relative_to(Path.cwd())
        print(f"{kind}: {shown}")
