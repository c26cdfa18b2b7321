"""Write one page with all tables, figures, specs of trials, machines and costs.

The page is a self-contained HTML file (embedded pictures, no network access) and the same as
Markdown, with the pictures next to it. A script sorts tables, filters rows and shows settings; the
page is complete without it.
"""

from __future__ import annotations

import base64
import io
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from PIL import Image

from analysis.figures import ablation, methods, paper_figures, style
from analysis.landscapes import logits, weights
from analysis.records import frames, imported
from analysis.report import summary
from analysis.tables import (
    best,
    comparison,
    comparison_printing,
    literature,
    literature_printing,
    paper_entries,
    paper_printing,
    paper_tables,
    rendering,
)
from pld_ray import __version__
from pld_ray.config.experiment import experiments_folder
from pld_ray.config.planning import Plan
from pld_ray.store.store import Store
from pld_ray.sweep import search
from pld_ray.units import duration

MANY = 500  # trials, above which the settings of a cell are shown for its first seed only
TITLE = "Plackett-Luce Distillation: reported and reproduced"


@dataclass
class Block:
    """A table or a picture, with its title and caption.

    Attributes:
        title: Heading above it.
        cells: The table, as strings.
        labels: Number of leading columns that identify the row.
        image: Path of the picture.
        caption: Text below it.
        row_trials: For each row of the table the id of a trial whose settings it stands for, or "".
    """

    title: str = ""
    cells: pd.DataFrame | None = None
    labels: int = 1
    image: Path | None = None
    caption: str = ""
    row_trials: list[str] = field(default_factory=list)


@dataclass
class Section:
    """The section of one experiment.

    Attributes:
        name: Name of the experiment.
        title: Heading of the section.
        state: How many trials have finished.
        command: The command that runs the experiment.
        note: Note of the experiment.
        summary: What was compared, and what is decided.
        blocks: Tables and pictures.
        trials: The id, label, state and spec of each trial.
        elsewhere: Ids of trials that earlier sections list.
    """

    name: str
    title: str
    state: str = ""
    command: str = ""
    note: str = ""
    summary: str = ""
    blocks: list[Block] = field(default_factory=list)
    trials: list[dict[str, str]] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)


def write(plans: list[Plan], store: Store, folder: Path) -> list[Path]:
    """Write report.html, report.md and their pictures.

    Args:
        plans: The plans of the experiments, one section each.
        store: The store that holds the records.
        folder: Where to write; it is created if needed.

    Returns:
        The paths of report.html and report.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown: dict[str, dict[str, Any] | None] = {}  # records by trial id; None: not finished
    sections = [_section(plan, store, folder / plan.experiment.name, shown) for plan in plans]
    paper = any(paper_tables.of_experiment(plan.experiment.name) for plan in plans)
    if paper:
        sections.append(_logits(folder / "landscape"))
    done = {key: record for key, record in shown.items() if record is not None}
    spent = sum(record["seconds"]["seconds"] for record in done.values())
    page: dict[str, Any] = {
        "title": TITLE if paper else " · ".join(section.title for section in sections),
        "version": __version__,
        "date": time.strftime("%Y-%m-%d"),
        "summary": f"{len(done)} of {len(shown)} trials finished; {duration(spent)} of training.",
        "sections": sections,
        "machines": [_machines(list(done.values())), _costs(plans, done)],
    }
    paths = [folder / "report.html", folder / "report.md"]
    paths[0].write_text(_html(page), encoding="utf-8")
    paths[1].write_text(_markdown(page, folder), encoding="utf-8")
    return paths


# ---------------------------------------------------------------- content


def _section(
    plan: Plan, store: Store, folder: Path, shown: dict[str, dict[str, Any] | None]
) -> Section:
    """Return the section of an experiment, and add its trials to `shown`."""
    experiment = plan.experiment
    miniature = experiment.miniature_of is not None
    found = store.outcomes(plan.trials)
    finished = sum(outcome.record is not None for outcome in found.values())
    stopped = sum(o.record is None and o.stopped is not None for o in found.values())
    name = experiment.name.removesuffix("-smoke") if miniature else experiment.name
    if experiment.file is not None and experiment.file.parent != experiments_folder():
        name = experiment.file.name
    section = Section(
        name=experiment.name,
        title=experiment.title or experiment.name,
        state=f"{finished} of {len(found)} trials finished"
        + (f", {stopped} stopped early by the search" if stopped else ""),
        command=f"pld-ray run {name}" + (" --smoke" if miniature else ""),
        note=experiment.note,
        elsewhere=[key for key in found if key in shown],
    )
    frame = frames.frame(plan, store)
    for declared in paper_tables.of_experiment(experiment.name):
        cells = paper_entries.of_table(declared, frame)
        section.blocks.append(
            Block(
                paper_tables.title(declared, miniature),
                paper_printing.printed(declared, cells, miniature),
                caption=paper_printing.legend(declared, cells, miniature),
            )
        )
        advantage = paper_printing.printed_gains(declared, cells, miniature)
        if len(advantage):
            section.blocks.append(Block(cells=advantage))
    section.blocks += [
        Block(f"Figure {path.stem.removeprefix('figure-')}", image=path)
        for path in paper_figures.draw_paper(frame, experiment.name, miniature, folder)
    ]
    if experiment.search is not None:
        metric = experiment.search.metric
        rows = best.of_search(search.look(experiment, store), metric)
        section.blocks.append(Block("Best settings of each cell", best.printed(rows, metric), 3))
    if frame["finished"].any():
        few = frame["method"].nunique() <= comparison_printing.WIDEST
        own = comparison.tables(frame, imported.beside(frame, store), few)
        dataset = " and ".join(dict.fromkeys(cell.trial.data.name for cell in plan.cells))
        section.summary = " ".join(summary.sentences(frame, own, dataset))
        section.blocks += _ours(plan, store, frame, own, folder)
    specified: set[int] = set()
    for key, outcome in found.items():
        if key not in shown:
            trial, record = plan.trials[key], outcome.record
            shown[key] = record
            state = outcome.state(trial.epochs)
            spec = trial.model_dump(mode="json", exclude_defaults=True)
            if record is not None:
                state = f"top-1 {record['metrics']['top1']:.2f}"
                spec = {"trial": spec, "metrics": record["metrics"], "ran": record["environment"]}
            first = len(found) <= MANY or id(trial.settings) not in specified
            specified.add(id(trial.settings))  # the seeds of a cell share it
            text = json.dumps(spec, indent=1) if first else ""
            section.trials.append(
                {"id": key, "label": plan.labels[key], "state": state, "spec": text}
            )
    return section


def _ours(
    plan: Plan, store: Store, frame: pd.DataFrame, own: comparison.Tables, folder: Path
) -> list[Block]:
    """Return the comparison of an experiment's trials, and its figures and landscapes."""
    table = own.numbers
    cells = comparison_printing.printed(table, comparison_printing.TOP)
    legend = " ".join(comparison_printing.legend(table))
    legend += " " + comparison_printing.order_legend(own)
    first = frame.groupby(frames.GROUP)["id"].first()
    printed = table[comparison_printing.is_shown(table, comparison_printing.TOP)]
    trials = [first.get(tuple(row), "") for row in printed[frames.GROUP].values.tolist()]
    labels = comparison_printing.labels(cells)
    blocks = [Block("All metrics", cells, labels, caption=legend, row_trials=trials)]
    if len(own.reported):
        shown = comparison_printing.printed_reported(own.reported, table)
        named, caption = comparison_printing.labels(shown), comparison_printing.REPORTED
        blocks.append(Block("Results from elsewhere", shown, named, caption=caption))
    shown_against = comparison_printing.shown_methods(own.against, table, comparison_printing.TOP)
    against = comparison_printing.printed_against(shown_against)
    if len(against):
        name = comparison.reference_name(table)
        caption = comparison_printing.explained(len(own.against), name, own.looks)
        blocks.append(Block(f"{name} against the other methods", against, caption=caption))
    wins = comparison_printing.printed_wins(own.pairs)
    if len(wins):
        caption = comparison_printing.EXPLAINED_WINS
        blocks.append(Block("Every two methods", wins, caption=caption))
    if plan.experiment.miniature_of is None and frame["original_teacher"].ne("").any():
        blocks += _literature(literature.compare(frame))
    drawn = methods.draw(
        frame, frames.curves(methods.best_settings(frame), store), folder, own.reported
    )
    pictures, told = ablation.ablation(frame)
    drawn += style.save_all(pictures, folder)
    blocks += [Block(image=path) for path in drawn]
    blocks += [Block(caption=sentence.capitalize() + ".") for sentence in told]
    students = weights.students(plan, store)
    kept = {name: store.landscape(trial.id) for name, trial in students.items()}
    known = {name: one for name, one in kept.items() if one is not None}
    if known:
        paths = weights.draw(students, store, folder)
        sharp = weights.printed(weights.numbers(students, known, store))
        blocks.append(Block("The loss around the trained weights", image=paths[0]))
        blocks.append(Block(cells=sharp, caption=weights.LEGEND))
    return blocks


def _literature(found: literature.Literature) -> list[Block]:
    """Return the tables beside the literature; none if it has no result on these pairs."""
    if found.sources.empty:
        return []
    blocks = []
    for kind in literature_printing.kinds(found):
        title = f"Beside the literature: {literature_printing.KINDS[kind].lower()}"
        blocks.append(Block(title, literature_printing.printed(found, kind, repeat=True), 2))
    blocks[-1].caption = " ".join(literature_printing.legend(found))
    caption = " ".join(literature_printing.legend_methods(found))
    for kind, title in literature_printing.KINDS.items():
        cells = literature_printing.printed_methods(found, kind)
        if len(cells):
            blocks.append(Block(f"{title} by method", cells, caption=caption))
            caption = ""  # under the first one only
    return blocks


def _logits(folder: Path) -> Section:
    """Return the section with figures 3 and 4, which need no training."""
    named = {"landscape_methods": "Figure 4: methods", "landscape_temperatures": "Figure 3: PLD"}
    blocks = [Block(named[path.stem], image=path) for path in logits.draw(folder)]
    title = "Losses over a plane of student logits"
    return Section("landscape", title, "computed", "pld-ray landscape", blocks=blocks)


def _machines(done: list[dict[str, Any]]) -> Block:
    """Return a table of the machines and versions, with the number of trials for each."""
    fields = ["device", "cores", "threads", "host", "python", "torch", "timm", "pld_ray"]
    rows = pd.DataFrame([record["environment"] for record in done], columns=fields)
    counted = rows.astype(str).value_counts(sort=False).rename("trials").reset_index()
    return Block(
        cells=counted.astype(str),
        labels=len(fields),
        caption="Machines and software versions of the trials.",
    )


def _costs(plans: list[Plan], done: dict[str, dict[str, Any]]) -> Block:
    """Return a table of training time by experiment."""
    lines = []
    for plan in plans:
        parts = [done[key]["seconds"] for key in plan.trials if key in done]
        if parts:
            total, teacher, spared = (
                sum(part.get(name, 0.0) for part in parts)
                for name in ("seconds", "teacher_seconds", "teacher_avoided_seconds")
            )
            lines.append(
                {
                    "Experiment": plan.experiment.name,
                    "Trials": str(len(parts)),
                    "Time": duration(total),
                    "of it the teacher": duration(teacher),
                    "spared by the bank": duration(spared),
                }
            )
    columns = ["Experiment", "Trials", "Time", "of it the teacher", "spared by the bank"]
    caption = "Training time summed over trials; a trial counts in every experiment that has it."
    return Block(cells=pd.DataFrame(lines, columns=columns), caption=caption)


# ---------------------------------------------------------------- output


def _html(page: dict[str, Any]) -> str:
    """Render the page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(
        **page,
        html=rendering.html,
        embedded=_embedded,
        width=_width,
    )


def _embedded(path: Path) -> str:
    """Encode a picture as base64 PNG in 256 colours, which needs a third of the bytes."""
    content = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").quantize(256).save(content, "PNG", optimize=True)
    return base64.b64encode(content.getvalue()).decode()


def _width(path: Path) -> int:
    """Return the display width of a picture: half its pixels, for high-density screens."""
    with Image.open(path) as image:
        return image.width // 2


def _markdown(page: dict[str, Any], folder: Path) -> str:
    """Render the page as Markdown."""
    lines = [f"# {page['title']}", f"pld-ray {page['version']}, {page['date']}. {page['summary']}"]
    for section in page["sections"]:
        lines += [f"## {section.title}", f"{section.state} · `{section.command}`"]
        lines += [section.summary, section.note]
        for block in section.blocks:
            lines += [f"### {block.title}" if block.title else "", *_block(block, folder)]
        if section.trials:
            rows = [{k: t[k] for k in ("id", "label", "state")} for t in section.trials]
            lines += ["### Trials", rendering.markdown(pd.DataFrame(rows), 3)]
    lines.append("## Machines, versions, cost")
    for block in page["machines"]:
        lines += _block(block, folder)
    return "\n\n".join(line for line in lines if line) + "\n"


def _block(block: Block, folder: Path) -> list[str]:
    """Render the table, picture and caption of a block as Markdown."""
    table = "" if block.cells is None else rendering.markdown(block.cells, block.labels)
    image = ""
    if block.image is not None:
        image = f"![{block.title or block.image.stem}]({block.image.relative_to(folder)})"
    return [table, image, block.caption]
