"""Commands that turn results into tables, figures, landscapes, reports and exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pld_ray.api import session
from pld_ray.cli.options import (
    Address,
    ExperimentName,
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
from pld_ray.errors import InputError, nearest

if TYPE_CHECKING:
    import pandas as pd


@app.command()
def tables(
    experiments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[EXPERIMENT...]",
            help="Paths or names of experiments. By default, all that have a table in the paper.",
        ),
    ] = None,
    overrides: Overrides = None,
    methods: Methods = None,
    pairs: Pairs = None,
    plugin: Plugins = None,
    smoke: Smoke = False,
    storage: Storage = "results",
    out: Out = None,
    all_pairs: Annotated[
        bool, typer.Option("--all-pairs", help="Also compare every two methods, and rank them.")
    ] = False,
    sort: Annotated[
        str,
        typer.Option(
            metavar="METRIC",
            help="Order the settings of a loss by this metric, the best first, or grid: as listed.",
        ),
    ] = "top1",
    top: Annotated[
        int,
        typer.Option(min=0, help="Number of settings of each loss to print, 0 for all."),
    ] = 10,
) -> None:
    """Print tables and write them as Markdown, CSV and LaTeX.

    Tables of the paper show the reported numbers beside the measured ones.
    Gains are those of the experiment's reference: --set reference=kd sets it.
    table.csv has all settings, also those that are not printed.
    """
    from analysis.tables import paper_tables

    for name in experiments or dict.fromkeys(table.experiment for table in paper_tables.TABLES):
        plan, store = session.opened(name, chosen(overrides, methods, pairs), smoke, storage)
        session.write_tables(plan, store, out, all_pairs, sort, top)


@app.command()
def literature(
    experiment: ExperimentName,
    overrides: Overrides = None,
    methods: Methods = None,
    pairs: Pairs = None,
    plugin: Plugins = None,
    smoke: Smoke = False,
    storage: Storage = "results",
    out: Out = None,
    reported: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE.csv",
            help="Further results, with the columns dataset, student, method and top1, and if "
            "known teacher, source, std, epoch and note. May be repeated.",
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all-methods", help="Show all methods reported on these pairs.")
    ] = False,
    sources: Annotated[
        bool, typer.Option("--sources", help="Also print one line per reported result.")
    ] = False,
) -> None:
    """Print results beside those of the literature, and write both.

    Rows are methods, and columns are teacher-student pairs: the last and the
    best epoch of your trials, and what public repositories report. Below are
    mean ranks, and gains over KD and CE, for homogeneous and heterogeneous
    pairs. Without results, the tables show what is reported.
    """
    plan, store = session.opened(experiment, chosen(overrides, methods, pairs), smoke, storage)
    session.write_literature(plan, store, out, reported or (), everything, sources)


@app.command()
def best(
    experiment: ExperimentName,
    overrides: Overrides = None,
    methods: Methods = None,
    pairs: Pairs = None,
    plugin: Plugins = None,
    smoke: Smoke = False,
    storage: Storage = "results",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Show the best settings that a search or a grid has found so far for each loss."""
    from analysis.records import frames
    from analysis.tables import best
    from pld_ray.sweep import search

    plan, store = session.opened(experiment, chosen(overrides, methods, pairs), smoke, storage)
    sought = plan.experiment.search
    metric = "top1" if sought is None else sought.metric
    if sought is None:
        rows = best.of_grid(frames.frame(plan, store))
    else:
        rows = best.of_search(search.look(plan.experiment, store), metric)
    if not rows:
        raise InputError(f"{plan.experiment.name}: no trial has finished; run the experiment first")
    typer.echo(json.dumps(rows, indent=1) if as_json else best.text(rows, metric))


@app.command()
def power(
    experiment: ExperimentName,
    overrides: Overrides = None,
    methods: Methods = None,
    pairs: Pairs = None,
    plugin: Plugins = None,
    smoke: Smoke = False,
    storage: Storage = "results",
    effect: Annotated[
        list[float] | None,
        typer.Option(
            metavar="POINTS",
            help="Gain in points of top-1. May be repeated. The default is 0.2, 0.5 and 1.",
        ),
    ] = None,
    wanted: Annotated[
        float,
        typer.Option(
            "--power", min=0.01, max=0.99, help="Probability with which the gain is decided."
        ),
    ] = 0.8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Show how many seeds a gain takes, from the spread of the trials that have finished.

    Gains are those of the experiment's reference: --set reference=kd sets it.
    """
    import textwrap

    from analysis.records import frames
    from analysis.tables import power as table
    from analysis.tables import rendering

    effects = effect or [0.2, 0.5, 1.0]
    if wrong := [value for value in effects if not 0 < value < 100]:
        raise InputError(f"--effect is {wrong[0]}: expected points of top-1, such as 0.5")
    plan, store = session.opened(experiment, chosen(overrides, methods, pairs), smoke, storage)
    rows = table.of_records(frames.frame(plan, store), effects, wanted)
    if rows.empty or rows["spread"].isna().all():
        raise InputError(
            f"{plan.experiment.name}: nothing is known about the spread yet: expected at least 3 "
            "finished seeds of the reference and of another method, on each pair of networks"
        )
    if as_json:
        typer.echo(rows.to_json(orient="records", indent=1))
        return
    typer.echo(rendering.markdown(table.printed(rows, effects), 1) + "\n")
    typer.echo(textwrap.fill(table.explained(len(rows), wanted), 100))


@app.command()
def figures(
    experiment: ExperimentName,
    overrides: Overrides = None,
    methods: Methods = None,
    pairs: Pairs = None,
    plugin: Plugins = None,
    smoke: Smoke = False,
    storage: Storage = "results",
    out: Out = None,
    x: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="Draw one figure with this field on the x-axis."),
    ] = None,
    by: Annotated[
        str, typer.Option(metavar="FIELD", help="With --x: a line for each value of this field.")
    ] = "loss.name",
    facet: Annotated[
        str, typer.Option(metavar="FIELD", help="With --x: a panel for each value of this field.")
    ] = "",
    metric: Annotated[
        str, typer.Option("--y", metavar="METRIC", help="With --x: the metric on the y-axis.")
    ] = "top1",
) -> None:
    """Plot accuracies, gains, learning curves and what the grid varies, as PNG and PDF files.

    With --x, one figure of your choice is drawn instead, such as
    --x loss.temperature --by loss.name --facet student.
    """
    if x is None and (by, facet, metric) != ("loss.name", "", "top1"):
        raise InputError("--by, --facet and --y: expected --x too, the field on the x-axis")
    planned, store = session.opened(experiment, chosen(overrides, methods, pairs), smoke, storage)
    folder = session.reports(planned, store, out)
    if x is None:
        paths = session.draw_figures(planned, store, folder)
    if not planned.cells and (x is not None or not paths):
        raise InputError(
            f"{planned.experiment.name}: its search is not finished; run the experiment first"
        )
    if x is not None:
        paths = session.draw_chosen(planned, store, folder, x, by, facet, metric)
    session.say("figures", paths)


@app.command()
def landscape(
    experiment: Annotated[
        str | None,
        typer.Argument(
            metavar="[EXPERIMENT]",
            help="Experiment with trained students. By default, plot over logits.",
        ),
    ] = None,
    overrides: Overrides = None,
    methods: Methods = None,
    pairs: Pairs = None,
    plugin: Plugins = None,
    smoke: Smoke = False,
    storage: Storage = "results",
    address: Address = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to.")] = None,
    classes: Annotated[int, typer.Option(min=3, help="Number of classes (logits only).")] = 10,
    points: Annotated[
        int, typer.Option(min=3, help="Number of points along each axis (students only).")
    ] = 21,
    reach: Annotated[
        float,
        typer.Option(min=0.01, help="Range of each axis, from -REACH to REACH (students only)."),
    ] = 1.0,
    images: Annotated[
        int, typer.Option(min=1, help="Number of training images (students only).")
    ] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the logits or directions.")] = 0,
) -> None:
    """Plot losses over a plane of student logits or of student weights.

    Without an experiment, the plane is in logit space (Figures 3 and 4 of
    the paper). With an experiment, the planes are around the weights of its
    trained students, and the sharpness of each minimum is computed.
    """
    if experiment is None:
        _check_part(methods, pairs)
        from analysis.landscapes import logits

        session.say("landscapes", logits.draw(out or Path("results/landscape"), classes, seed))
        return
    plan, store = session.opened(experiment, chosen(overrides, methods, pairs), smoke, storage)
    from rich.console import Console

    from analysis.landscapes import weights
    from pld_ray.sweep.progress import redirect_prints

    trials = weights.students(plan, store)
    if not trials:
        raise InputError(f"{plan.experiment.name}: no trial has finished; run the experiment first")
    settings = weights.Settings(points, reach, images, seed)
    with Console().status(f"{len(trials)} students: starting Ray"):
        from pld_ray.sweep import checks, cluster

        shown = checks.check_trials({trial.id: trial for trial in trials.values()}, address).images
    with (
        redirect_prints(session.ray_log(store)) as console,
        console.status(f"{points} x {points} points around {len(trials)} students"),
        cluster.connected(address),
    ):
        weights.compute(trials, shown, store, settings)
    folder = session.reports(plan, store, out)
    session.say("landscapes", weights.draw(trials, store, folder))
    typer.echo("\n" + (folder / "sharpness.md").read_text(encoding="utf-8"))


@app.command()
def report(
    experiments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[EXPERIMENT...]",
            help="Paths or names of experiments. By default, all that are shipped.",
        ),
    ] = None,
    overrides: Overrides = None,
    methods: Methods = None,
    pairs: Pairs = None,
    plugin: Plugins = None,
    smoke: Smoke = False,
    storage: Storage = "results",
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to. The default is STORAGE/reports.")
    ] = None,
) -> None:
    """Write one self-contained HTML page with all tables, figures and trials.

    The same report is also written as Markdown.
    """
    from analysis.report import page
    from analysis.tables import paper_tables

    names = experiments or paper_tables.experiments()
    opened = [
        session.opened(name, chosen(overrides, methods, pairs), smoke, storage) for name in names
    ]
    store = opened[0][1]
    folder = out or Path(store.uri if store.local else "results") / "reports"
    session.say("report", page.write([plan for plan, _ in opened], store, folder))


@app.command()
def export(
    experiments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[EXPERIMENT...]",
            help="Paths or names of experiments. By default, all stored trials.",
        ),
    ] = None,
    overrides: Overrides = None,
    methods: Methods = None,
    pairs: Pairs = None,
    plugin: Plugins = None,
    smoke: Smoke = False,
    storage: Storage = "results",
    to: Annotated[Path, typer.Option(help="File to write, .csv or .parquet.")] = Path("trials.csv"),
) -> None:
    """Write one table with the settings, metrics and times of trials, for other programs."""
    from analysis.records import export
    from pld_ray import plugins
    from pld_ray.store.store import Store

    export.check(to)
    store = Store(storage)
    if experiments:
        plans = [
            session.opened(name, chosen(overrides, methods, pairs), smoke, storage)[0]
            for name in experiments
        ]
        trials = {key: trial for plan in plans for key, trial in plan.trials.items()}
    else:
        _check_part(methods, pairs)
        trials = store.trials()
        if unknown := store.plugins().keys() - plugins.LOADED.keys():
            typer.echo(
                f"note: trials that use a plug-in ({', '.join(sorted(unknown))}) are left out: "
                "name their experiments",
                err=True,
            )
    if not trials:
        raise InputError(f"there are no trials in {store.uri}")
    table = export.frame(trials, store)
    export.write(table, to)
    session.say(f"{len(table)} trials", [to])


def _check_part(methods: str | None, pairs: str | None) -> None:
    """Raise InputError for a part of an experiment where none is named."""
    if methods is not None or pairs is not None:
        raise InputError("--methods and --pairs: expected an EXPERIMENT too, whose part is taken")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A CSV file of results.")],
    storage: Storage = "results",
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove what was imported from a file of this name.")
    ] = False,
) -> None:
    """Import results from elsewhere, which tables and figures show as "reported".

    The file has the columns dataset, student, method and top1 (in percent).
    It may have teacher, setting, source, note, std and n, or seed (one row
    per seed). Datasets, networks and losses are named as in experiments. A
    second import of a file of this name replaces the first one.
    """
    from analysis.records import imported
    from pld_ray.store.store import Store

    store, name = Store(storage), file.name.removesuffix(".csv")
    if remove:
        imported.remove(name, store)
        typer.echo(f"removed the results of {name} from {store.uri}")
        return
    table, unused = imported.read(file)
    replaced = imported.keep(table, name, store)
    for note in _notes(table, unused):
        typer.echo(f"note: {note}")
    sources = table["source"].nunique()
    typer.echo(
        f"{'replaced' if replaced else 'imported'} {name}: {len(table)} results from "
        f"{sources} {'source' if sources == 1 else 'sources'}; tables and figures of experiments "
        "on the same dataset, student and teacher show them"
    )


def _notes(table: pd.DataFrame, unused: list[str]) -> list[str]:
    """Return sentences about what an imported table has and the program does not know."""
    import timm

    import pld_ray.models  # noqa: F401 - registers our networks

    said = [f"columns that are not used: {', '.join(unused)}"] if unused else []
    known = {*timm.list_models(), *timm.list_pretrained()}
    names = [name for name in {*table["student"], *table["teacher"]} - {""} if name not in known]
    if names:
        hints = [f"{name!r} ({nearest(name, known)})" for name in sorted(names)[:5]]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        said.append(
            f"networks that are neither timm's nor ours: {', '.join(hints)}{more}; they only stand "
            "beside networks of plug-ins with the same name"
        )
    return said
