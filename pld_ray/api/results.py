"""Run experiments from Python and look at their results: `run`, `plan`, `status` and `results`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pld_ray.config.experiment import Experiment, Overrides
from pld_ray.config.planning import Plan
from pld_ray.config.trial import Trial
from pld_ray.errors import InputError, nearest
from pld_ray.store.store import Store

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import nn

Source = str | os.PathLike[str] | Experiment
Place = str | os.PathLike[str]


@dataclass(frozen=True, repr=False)
class Table:
    """The tables that the command line prints, for one experiment.

    Python and a notebook show them as they are.

    Attributes:
        numbers: One row per method, in full precision (see `analysis.tables.comparison`).
        against: The reference against each other method; empty with one method.
        pairs: Every two methods, if they were asked for; else empty.
        ranking: The mean ranks of the methods, if they were asked for; else empty.
        reported: Imported results beside our own (see `analysis.records.imported.beside`).
        cells: What is shown of `numbers`, as strings.
        text: All tables as Markdown, with legends.
    """

    numbers: pd.DataFrame
    against: pd.DataFrame
    pairs: pd.DataFrame
    ranking: pd.DataFrame
    reported: pd.DataFrame
    cells: pd.DataFrame
    text: str

    def __repr__(self) -> str:
        return self.text

    def to_markdown(self) -> str:
        """Return all tables as Markdown."""
        return self.text

    def to_latex(self) -> str:
        """Return the table of methods as LaTeX (booktabs)."""
        from analysis.tables import comparison_printing, rendering

        return rendering.latex(self.cells, comparison_printing.labels(self.cells))

    def _repr_markdown_(self) -> str:
        return self.text


@dataclass(frozen=True, repr=False)
class Results:
    """The results of an experiment, or of all trials of a storage.

    It reads the storage each time, so that it also shows what others have finished meanwhile.

    Attributes:
        trials: The trials by id.
        store: The storage that holds their records and weights.
        plan: The plan of the experiment, or None for all trials of a storage.
        failures: The reason of each trial that failed in this call of `run`, by trial id.
    """

    trials: dict[str, Trial]
    store: Store
    plan: Plan | None = None
    failures: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        done = len(self.store.finished(self.trials))
        name = "a storage" if self.plan is None else self.plan.experiment.name
        failed = f", {len(self.failures)} failed" if self.failures else ""
        return (
            f"<Results of {name}: {done} of {len(self.trials)} done{failed}, in {self.store.uri}>"
        )

    def frame(self) -> pd.DataFrame:
        """Return one row per trial, teachers included, with the columns of `pld-ray export`.

        These are id, label, epoch, state, why, trial.* (its settings), metrics.*, seconds.* and
        others (see docs/results.md).
        """
        from analysis.records import export

        return export.frame(self.trials, self.store)

    def curves(self) -> pd.DataFrame:
        """Return one row per epoch of each trial, also of unfinished trials.

        Of an experiment, these are the trials of its grid, with the columns student, teacher,
        setting, method, seed, id, epoch and the metrics. Of a storage, these are all trials, with
        the columns id, label, epoch and the metrics.
        """
        from analysis.records import frames

        if self.plan is not None:
            return frames.curves(frames.frame(self.plan, self.store), self.store)
        found = frames.epochs(self.trials, self.store)
        found.insert(1, "label", found["id"].map({k: t.label for k, t in self.trials.items()}))
        return found

    def table(self, all_pairs: bool = False, sort: str = "top1", top: int = 10) -> Table:
        """Return the tables that the command line prints, for an experiment.

        Args:
            all_pairs: Whether to compare every two methods as well, and to rank them.
            sort: The metric by which the settings of a loss are ordered, or "grid".
            top: The number of settings of each loss that `text` and `cells` show; 0 for all.

        Raises:
            InputError: These are the results of a whole storage, or there are no trials yet.
        """
        from analysis.records import frames, imported
        from analysis.tables import (
            comparison,
            comparison_printing,
            paper_entries,
            paper_printing,
            paper_tables,
        )

        plan = self._comparable()
        frame, experiment = frames.frame(plan, self.store), plan.experiment
        own = comparison.tables(frame, imported.beside(frame, self.store), all_pairs, sort)
        parts = [comparison_printing.text(own, experiment, top)]
        miniature = experiment.miniature_of is not None
        for declared in paper_tables.of_experiment(experiment.name):
            found = paper_entries.of_table(declared, frame)
            parts.append(paper_printing.text(declared, found, miniature))
        cells = comparison_printing.printed(own.numbers, top)
        text = "\n\n".join(parts)
        return Table(own.numbers, own.against, own.pairs, own.ranking, own.reported, cells, text)

    def accuracy_figure(self) -> Figure:
        """Return the figure of top-1 by method, with every seed as a dot.

        Raises:
            InputError: No trial has finished.
        """
        return self._drawn("accuracy")

    def gains_figure(self) -> Figure:
        """Return the figure of the gain of the reference over each other method.

        Raises:
            InputError: No trial of the reference and of another method has finished.
        """
        return self._drawn("gains")

    def curves_figure(self) -> Figure:
        """Return the figure of top-1 and training loss by epoch.

        Raises:
            InputError: No trial has finished.
        """
        return self._drawn("curves")

    def terms_figure(self) -> Figure:
        """Return the figure of the two terms of the training loss by epoch.

        Raises:
            InputError: No trial has finished, or none has a loss of two terms.
        """
        return self._drawn("terms")

    def ablation_figure(
        self, x: str, by: str = "loss.name", facet: str = "", metric: str = "top1"
    ) -> Figure:
        """Return a figure of a metric by settings of your choice.

        Args:
            x: The field on the x-axis: a setting that varies, such as "optimizer.lr", or student,
                teacher, loss.name, method or setting.
            by: The field with a line for each value.
            facet: The field with a panel for each value; by default, the pair of networks.
            metric: The metric on the y-axis.

        Raises:
            InputError: No trial has finished, or a field does not vary.
        """
        from analysis.figures import ablation
        from analysis.records import frames

        plan = self._comparable()
        frame = frames.frame(plan, self.store)
        if not frame["finished"].any():
            raise InputError(f"{plan.experiment.name}: nothing to draw yet: no trial has finished")
        pictures, _ = ablation.chosen(frame, x, by, facet, metric)
        return next(iter(pictures.values()))

    def student(self, trial_id: str) -> nn.Module:
        """Return the trained student of a trial, in evaluation mode.

        Its input is images [B, channels, H, W], normalised by the mean and standard deviation of
        the data, which the record of the trial holds: `results.store.record(trial_id)["data"]`.

        Args:
            trial_id: The id of a finished trial, as in the column id of `frame`.

        Raises:
            InputError: There is no such trial, or it has not finished.
        """
        from pld_ray.models.export import load_student

        trial = self.trials.get(trial_id)
        if trial is None:
            hint = nearest(trial_id, self.trials) if self.trials else "there are no trials"
            raise InputError(f"trial {trial_id!r} is not one of these results; {hint}")
        self.store.load_plugins(trial.model_dump(mode="json"))
        return load_student(trial, self.store)

    def _drawn(self, name: Literal["accuracy", "gains", "curves", "terms"]) -> Figure:
        """Return one of the figures, in the style of all figures."""
        import matplotlib

        from analysis.figures import methods, style
        from analysis.records import frames, imported
        from analysis.tables import comparison

        plan = self._comparable()
        frame = frames.frame(plan, self.store)
        colours, done = style.method_colours(frame), frame[frame["finished"]]
        compared = comparison.against(frame)
        if done.empty or (name == "gains" and compared.empty):
            raise InputError(
                f"{plan.experiment.name}: nothing to draw yet: no trial has finished"
                + (" of the reference and of another method" if name == "gains" else "")
            )
        with matplotlib.rc_context(style.STYLE):
            if name == "accuracy":
                return methods.accuracy(done, colours, imported.beside(frame, self.store))
            if name == "gains":
                return methods.gains(compared, colours)
            if (curves := self.curves()).empty:
                raise InputError(f"{plan.experiment.name}: the files of epochs are lost")
            if name == "curves":
                return methods.learning_curves(curves, colours)
            if "loss_ce" not in curves:
                raise InputError(f"{plan.experiment.name}: no loss reports two terms")
            return methods.term_curves(curves, colours)

    def _comparable(self) -> Plan:
        """Return the plan, or raise InputError without trials that can be compared."""
        if self.plan is None:
            raise InputError(
                "a storage mixes the trials of several experiments: expected the results of one "
                "for tables and figures, as in pld_ray.results(storage, 'pairs.yaml')"
            )
        if not self.plan.cells:
            raise InputError(f"{self.plan.experiment.name}: there are no trials to compare yet")
        return self.plan


def run(
    experiment: Source,
    *,
    storage: Place = "results",
    overrides: Overrides = (),
    smoke: bool = False,
    address: str | None = None,
    log: Sequence[str] = (),
) -> Results:
    """Run the trials of an experiment that have no record yet, as `pld-ray run` does.

    After an interruption (Ctrl-C raises KeyboardInterrupt), the same call resumes.

    Args:
        experiment: Path of a YAML file, name of a shipped experiment, or an `Experiment`.
        storage: Folder or URI where results are stored.
        overrides: A mapping of fields to values, such as `{"loss.temperature": 2}`, or texts as for
            `--set`.
        smoke: Whether to run the miniature of the experiment.
        address: Address of a Ray cluster. By default, use this process's connection to Ray, the
            cluster of this machine, or start one.
        log: Names of loggers that also receive the metrics: tensorboard, mlflow, wandb.

    Returns:
        The results, with the reasons of failed trials in `failures`.

    Raises:
        InputError: The experiment or its data is not valid, or the cluster cannot be reached.
    """
    from pld_ray.api import session

    plan, store = session.opened(experiment, overrides, smoke, storage, download=True)
    try:
        plan, failures = session.execute(plan, store, address, log)
    except KeyboardInterrupt:
        session.tell("stopped; run the same call again to resume")
        raise
    return Results(plan.trials, store, plan, failures)


def plan(
    experiment: Source,
    *,
    storage: Place = "results",
    overrides: Overrides = (),
    smoke: bool = False,
) -> Plan:
    """Return the plan of an experiment: its unique trials, without running them.

    The arguments are those of `run`. After a search has begun, the plan has the trials that are
    known so far.

    Raises:
        InputError: The experiment is not valid.
    """
    from pld_ray.api import session

    return session.opened(experiment, overrides, smoke, storage)[0]


def status(
    experiment: Source,
    *,
    storage: Place = "results",
    overrides: Overrides = (),
    smoke: bool = False,
) -> pd.DataFrame:
    """Return one row per trial of an experiment: id, label, epochs, state and epoch reached.

    The arguments are those of `run`. The state is done, failed, stopped, begun or not begun; `why`
    says why a trial failed or was stopped.

    Raises:
        InputError: The experiment is not valid.
    """
    planned = plan(experiment, storage=storage, overrides=overrides, smoke=smoke)
    frame = Results(planned.trials, Store(os.fspath(storage)), planned).frame()
    frame["label"] = frame["id"].map(planned.labels)
    frame["epochs"] = frame["trial.epochs"]
    return frame[["id", "label", "state", "epoch", "epochs", "why"]]


def results(
    storage: Place = "results",
    experiment: Source | None = None,
    *,
    overrides: Overrides = (),
    smoke: bool = False,
) -> Results:
    """Return the results that a storage holds, without running anything.

    Args:
        storage: Folder or URI where results are stored.
        experiment: The experiment, as for `run`. By default, all trials of the storage, without
            their YAML files; tables and figures need an experiment. Plug-ins that trials use are
            imported from the storage, so its content must be trusted.
        overrides: As for `run`; only with an experiment.
        smoke: As for `run`; only with an experiment.

    Raises:
        InputError: The storage holds no trials, or the experiment is not valid.
    """
    from pld_ray.api import session

    if experiment is not None:
        planned, store = session.opened(experiment, overrides, smoke, storage)
        return Results(planned.trials, store, planned)
    if overrides or smoke:
        raise InputError("results: overrides and smoke are for an experiment, and none is given")
    store = Store(os.fspath(storage))
    trials = store.trials(with_plugins=True)
    if not trials:
        raise InputError(f"there are no trials in {store.uri}")
    return Results(trials, store)
