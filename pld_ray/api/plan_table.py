"""Print the trials of a plan and its work: epochs, and time where similar trials have finished."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pld_ray.config import gangs
from pld_ray.config.planning import Plan
from pld_ray.config.trial import Trial
from pld_ray.distill.bank_plan import PlannedBank
from pld_ray.store.store import Store
from pld_ray.sweep.search import SearchProgress
from pld_ray.units import duration, in_bytes

RANDOM = ("pad", "flip", "random_resized_crop", "augment", "mixup", "cutmix")
"""Fields of a bank that make its images depend on the seed."""


def seconds(plan: Plan, store: Store, done: set[str]) -> dict[str, float]:
    """Estimate the seconds that each trial takes, from finished trials that are similar.

    Trials are similar if they have the same student, teacher, data, batch size, number of workers
    and number of views of an image. The time is proportional to the number of epochs.

    Args:
        plan: The plan whose trials are estimated.
        store: The store with the records of finished trials.
        done: Ids of the finished trials.

    Returns:
        Wall seconds by trial id. Trials without a similar finished trial are left out.
    """
    kinds = _kinds(plan.trials)
    measured: dict[Any, float] = {}
    for key, trial in plan.trials.items():
        if key in done and kinds[key] not in measured:
            record = store.record(key)
            if record:
                measured[kinds[key]] = record["seconds"]["seconds"] / trial.epochs
    return {
        key: measured[kinds[key]] * trial.epochs
        for key, trial in plan.trials.items()
        if kinds[key] in measured
    }


def _kinds(trials: dict[str, Trial]) -> dict[str, tuple[Any, ...]]:
    """Return for each trial the settings that similar trials have in common."""
    found, by_settings = {}, {}
    for key, trial in trials.items():
        same = id(trial.settings)  # trials that differ in the seed only share this object
        if same not in by_settings:
            data = trial.data.model_dump_json()
            kind = trial.student.name, trial.teacher_name, data, trial.batch_size, trial.workers
            by_settings[same] = *kind, trial.loss.paired
        found[key] = by_settings[same]
    return found


def for_programs(plan: Plan, store: Store, done: set[str]) -> dict[str, Any]:
    """Return the plan as plain values for `--json`: what `show` prints and all trial settings.

    Args:
        plan: The plan to describe.
        store: The store with the records of finished trials.
        done: Ids of the finished trials.
    """
    estimate = seconds(plan, store, done)
    ruled = {cell.trial.id: cell.rules for cell in plan.cells}
    rows = [
        {
            "id": key,
            "label": plan.labels[key],
            "teacher": key in plan.teacher_ids,
            "done": key in done,
            "epochs": trial.epochs,
            "seconds": estimate.get(key),
            "rules": [
                {"rule": number, "set": plan.experiment.rules[number].set}
                for number in ruled.get(key, ())
            ],
            "trial": trial.model_dump(mode="json"),
        }
        for key, trial in plan.trials.items()
    ]
    together = [
        {
            "trials": [trial.id for trial in gang.trials],
            "epochs": {"apart": gang.apart, "together": gang.together},
            "teacher_epochs": {"apart": gang.taught_apart, "together": gang.taught_together},
        }
        for gang in _gangs(plan, done)
    ]
    return {
        "experiment": plan.experiment.name,
        "cells": len(plan.cells),
        "trials": rows,
        "gangs": together,
    }


def _gangs(plan: Plan, done: set[str]) -> list[gangs.PlannedGang]:
    """Return the gangs that the trials of a plan can form."""
    left = [trial for key, trial in plan.trials.items() if key not in done]
    largest = plan.experiment.resources.gang
    return gangs.planned(left, None if largest == "auto" else largest)


def _gang_line(found: list[gangs.PlannedGang]) -> str:
    """Return a line that says what gangs spare."""
    apart, together = sum(gang.apart for gang in found), sum(gang.together for gang in found)
    line = (
        f"{sum(len(gang.trials) for gang in found)} trials can step together in {len(found)} "
        f"{'gangs' if len(found) > 1 else 'gang'} of up to "
        f"{max(len(gang.trials) for gang in found)}: images are prepared for {together:,} instead "
        f"of {apart:,} epochs"
    )
    taught = sum(gang.taught_apart for gang in found)
    if taught:
        once = sum(gang.taught_together for gang in found)
        line += f", and teachers run for {once:,} instead of {taught:,}"
    return line


def show_shared(plans: list[Plan], done: set[str]) -> None:
    """Print the work in several experiments, and how much of it they share.

    Args:
        plans: One plan per experiment.
        done: Ids of the finished trials.
    """
    seen: dict[str, Trial] = {}
    rows = []
    for plan in plans:
        new = {key: trial for key, trial in plan.trials.items() if key not in seen}
        seen |= new
        counts = len(plan.cells), len(plan.trials), len(new), len(plan.trials.keys() & done)
        epochs = sum(trial.epochs for key, trial in new.items() if key not in done)
        rows.append((plan.experiment.name, *counts, epochs))
    print(aligned(("experiment", "cells", "trials", "new", "done", "epochs to run"), rows))
    cells, trials = sum(row[1] for row in rows), sum(row[2] for row in rows)
    epochs = sum(trial.epochs for trial in seen.values())
    apart = sum(trial.epochs for plan in plans for trial in plan.trials.values())
    print(
        f"\n{cells} cells, {len(seen)} unique trials: sharing saves {trials - len(seen)} "
        f"trials and {apart - epochs:,} of {apart:,} epochs ({1 - epochs / apart:.0%})"
    )
    print(f"{len(seen.keys() & done)} done, {len(seen.keys() - done)} to run")


def show(plan: Plan, store: Store, done: set[str]) -> None:
    """Print one line per trial and the total work.

    Args:
        plan: The plan to print.
        store: The store with the records of finished trials.
        done: Ids of the finished trials.
    """
    estimate, together = seconds(plan, store, done), _gangs(plan, done)
    gang = {trial.id: n for n, each in enumerate(together, 1) for trial in each.trials}
    rows = []
    for key, trial in plan.trials.items():
        teacher = trial.teacher
        taught_by = teacher.id if isinstance(teacher, Trial) else teacher and teacher.weights
        role = "is a teacher" if key in plan.teacher_ids else taught_by or ""
        state = "done" if key in done else "to run"
        takes = duration(estimate[key]) if key in estimate else ""
        row = (key, plan.labels[key], role, trial.epochs, str(gang.get(key, "")), state, takes)
        rows.append(row)
    print(aligned(("id", "trial", "teacher", "epochs", "gang", "state", "time"), rows))
    left = [key for key in plan.trials if key not in done]
    epochs = sum(plan.trials[key].epochs for key in left)
    print(
        f"\n{len(plan.cells)} cells, {len(plan.trials)} unique trials (teachers: "
        f"{len(plan.teacher_ids)}): {len(plan.trials) - len(left)} done, {len(left)} to run"
        + (f" ({epochs:,} epochs)" if left else "")
    )
    if pairs := [plan.trials[key].epochs for key in left if plan.trials[key].loss.paired]:
        print(
            f"{sum(pairs):,} of these epochs prepare two views of each image, for "
            f"{len(pairs)} trials whose loss compares them"
        )
    if together:
        print(_gang_line(together))
    known = [estimate[key] for key in left if key in estimate]
    if known:
        rest = (
            f"; {len(left) - len(known)} trials have no estimate" if len(known) < len(left) else ""
        )
        print(f"about {duration(sum(known))} if they run one after another{rest}")


def show_search(progress: list[SearchProgress]) -> None:
    """Print the progress of a search and the step after it.

    Args:
        progress: The progress in each cell of the grid.
    """
    experiment = progress[0].group.experiment
    unique = {each.group.key: each for each in progress}.values()
    drawn, coming = sum(len(e.drawn) for e in unique), sum(e.to_draw for e in unique)
    left = sum(len(each.open) for each in unique)
    seeds = len(experiment.all_seeds)
    often = f"{experiment.looks[0]} to {seeds}" if experiment.looks else f"{seeds}"
    after = f"the best settings on {often} seeds" if seeds else "nothing"
    if left or coming:
        print(
            f"search over {len(unique)} cells: {drawn} trials drawn, {left} of them to run, "
            f"{coming} still to draw; next: {after}"
        )
    else:
        print(f"the search over {len(unique)} cells is finished after {drawn} trials")


def aligned(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """Format rows as a text table with right-aligned integers.

    rich is not used here because it takes seconds for 10,000 rows.

    Args:
        head: The column names.
        rows: The rows; the types in the first row decide the alignment of the columns.
    """
    numeric = [bool(rows) and isinstance(value, int) for value in (rows or [head])[0]]
    cells = [head, *([str(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    )


def bank_row(bank: PlannedBank) -> dict[str, Any]:
    """Return a planned bank as plain values for `--json`, with sizes in bytes."""
    trial = bank.trial
    return {
        "teacher": trial.teacher_name,
        "data": trial.data.name,
        "augment": list(trial.data.augment) if bank.split == "train" else [],
        "split": bank.split,
        "seed": trial.seed if bank.split == "train" and trial.data.augmented else None,
        "logits": trial.teacher_logits if bank.split == "train" else "float32",
        "views": bank.views,
        "bytes": bank.bytes,
        "kept": bank.kept,
    }


def bank_line(banks: Iterable[PlannedBank]) -> str:
    """Return one line with the size of the teacher bank of a plan."""
    banks = list(banks)
    most = max(bank.views for bank in banks)
    total, kept = sum(bank.bytes for bank in banks), sum(bank.kept for bank in banks)
    share = "all" if kept >= total else in_bytes(kept) if kept else "none"
    return (
        f"teacher bank: {in_bytes(total)} in {len(banks)} banks of up to {most} views, "
        f"{share} of it computed so far"
    )


def show_banks(store: Store) -> None:
    """Print the banks of a store and their total size."""
    banks = store.banks()
    known = [(store.bank(key), key, files) for key, files in banks.items()]
    rows = [(about, key, files) for about, key, files in known if about is not None]
    shown: list[tuple[Any, ...]] = []
    for about, key, files in sorted(rows, key=lambda row: str(row[0])):
        spec, views = about["spec"], {name.split("/")[0] for name in files if "/" in name}
        seed = str(spec["seed"]) if any(spec.get(field) for field in RANDOM) else "any"
        data = " +".join([about["data"], *spec.get("augment", ())])
        size = in_bytes(sum(files.values()))
        shown.append((key, about["teacher"], data, spec["split"], seed, len(views), size))
    print(aligned(("key", "teacher", "data", "split", "seed", "views", "size"), shown))
    total = sum(sum(files.values()) for files in banks.values())
    print(f"\n{len(banks)} banks, {in_bytes(total)} in {store.uri}")
