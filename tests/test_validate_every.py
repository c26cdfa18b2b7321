"""Trials whose student is not evaluated after every epoch."""

import io
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler
from rich.console import Console

from analysis.figures import methods, style
from analysis.records import export, frames
from pld_ray.cli.run import run as run_command
from pld_ray.config.experiment import load_experiment
from pld_ray.config.planning import plan
from pld_ray.data.datasets import load
from pld_ray.distill.loop import train
from pld_ray.errors import InputError
from pld_ray.store.store import Store
from pld_ray.sweep import search
from pld_ray.sweep.early_stopping import EarlyStopping
from pld_ray.sweep.progress import ProgressView

SMALL = """
base:
  data: {name: digits, pad: 1, flip: true, limit: 150}
  student: resnet8
  teacher: {name: resnet8, train: {epochs: 1}}
  optimizer: {lr: 0.01}
  epochs: 5
  batch_size: 64
  loss: kd
"""
SEARCH = """
base: {data: {name: digits, limit: 100}, student: resnet8, epochs: 6, batch_size: 50, loss: ce}
search:
  space: {optimizer.lr: {choice: [0.1, 0.01, 0.001, 0.0001, 0.00001]}}
  algorithm: grid
seeds: []
"""
VALIDATED = {"top1", "top5", "val_loss", "ece", "kl_teacher_student", "agreement", "teacher_top1"}


def untimed(epochs):
    """Epochs without what depends on the machine's speed, or on the trials before."""
    timed = ("seconds", "per_second", "teacher_images")
    return [{k: v for k, v in epoch.items() if not k.endswith(timed)} for epoch in epochs]


def weights(store, trial):
    return Path(store.folder(trial.id), "student.safetensors").read_bytes()


def test_only_every_second_epoch_and_the_last_one_have_values(experiment, tmp_path):
    store = Store(tmp_path / "results")
    whole, sparse, rare = (
        plan(experiment(SMALL, *sets)).cells[0].trial
        for sets in ((), ("validate_every=2",), ("validate_every=9",))
    )
    assert [epoch for epoch in range(1, 6) if sparse.validates(epoch)] == [2, 4, 5]
    assert [epoch for epoch in range(1, 6) if whole.validates(epoch)] == [1, 2, 3, 4, 5]
    assert [epoch for epoch in range(1, 6) if rare.validates(epoch)] == [5]
    for trial in (whole.teacher, sparse.teacher, whole, sparse):
        train(trial, load(trial.data), store, lambda metrics: None)
    every, found = store.epochs(whole.id), store.epochs(sparse.id)
    assert [epoch["epoch"] for epoch in found if "top1" in epoch] == [2, 4, 5]
    for epoch, other in zip(untimed(found), untimed(every), strict=True):
        # the same numbers to the bit, as JSON has all digits
        left_out = set() if epoch["epoch"] in (2, 4, 5) else VALIDATED
        assert epoch == {k: v for k, v in other.items() if k not in left_out}
        assert other.keys() >= VALIDATED
    for epoch in found:
        assert {"images_per_second", "seconds", "student_seconds"} <= epoch.keys()
        assert ("validation_seconds" in epoch) == ("top1" in epoch)
    assert weights(store, sparse) == weights(store, whole)
    records = [store.record(trial.id) for trial in (sparse, whole)]
    metrics, expected = (untimed([record["metrics"]]) for record in records)
    assert metrics == expected and metrics[0].keys() >= VALIDATED
    assert records[0]["best_top1"] == max(every[i]["top1"] for i in (1, 3, 4))
    assert records[0]["seconds"]["validation_seconds"] == pytest.approx(
        sum(found[i]["validation_seconds"] for i in (1, 3, 4))
    )


def test_it_is_part_of_the_id_of_student_and_teacher_unless_it_is_1(experiment):
    ids = {}
    for sets in ((), ("validate_every=1",), ("validate_every=2",), ("validate_every=3",)):
        trial = plan(experiment(SMALL, *sets)).cells[0].trial
        assert trial.teacher.validate_every == trial.validate_every
        ids[sets] = trial.id, trial.teacher.id
    none, one, two, three = ids.values()
    assert none == one
    for role in (0, 1):
        assert len({none[role], two[role], three[role]}) == 3
    with pytest.raises(InputError, match="validate_every is 0.* 1"):
        plan(experiment(SMALL, "validate_every=0"))


def test_the_best_top1_is_that_of_the_validated_epochs(experiment, tmp_path, monkeypatch):
    trial = plan(experiment(SMALL, "loss=ce", "validate_every=2")).cells[0].trial
    top1 = {1: 99.0, 2: 20.0, 3: 90.0, 4: 40.0, 5: 30.0}
    asked = []

    def scores(run):
        asked.append(len(run.history) + 1)
        return {"top1": top1[asked[-1]]}

    monkeypatch.setattr("pld_ray.distill.loop.scores", scores)
    store = Store(tmp_path / "results")
    train(trial, load(trial.data), store, lambda metrics: None)
    record = store.record(trial.id)
    assert asked == [2, 4, 5]
    assert record["best_top1"] == 40.0 and record["metrics"]["top1"] == 30.0


@pytest.mark.parametrize("killed", [2, 3])
def test_a_trial_resumes_after_an_epoch_without_values(experiment, tmp_path, monkeypatch, killed):
    monkeypatch.setattr("pld_ray.distill.keeping.CHECKPOINT_SECONDS", 0)
    trial = plan(experiment(SMALL, "loss=ce", "validate_every=2")).cells[0].trial
    stores = [Store(tmp_path / name) for name in ("whole", "killed")]

    def stop(metrics):
        if metrics["epoch"] == killed:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(trial, load(trial.data), stores[1], stop)
    last = stores[1].load_checkpoint(trial)["history"][-1]
    assert last["epoch"] == killed and ("top1" in last) == (killed == 2)
    for store in stores:
        train(trial, load(trial.data), store, lambda metrics: None)
    whole, resumed = (untimed(store.epochs(trial.id)) for store in stores)
    assert resumed == whole and ["top1" in e for e in resumed] == [False, True, False, True, True]
    assert weights(stores[1], trial) == weights(stores[0], trial)


# ---- searches


class TuneTrial:
    """What a scheduler sees of a gang of one trial."""

    def __init__(self, trial):
        self.trial_id, self.config = "gang", {"trials": [{"id": trial.id}]}


def epochs(*top1, every=2, of=6):
    """Epochs with a value after each `every` of them."""
    return [
        {"epoch": n, "epochs": of, "seconds": 1.0, "train_loss": 1.0}
        | ({"top1": value} if n % every == 0 or n == of else {})
        for n, value in enumerate(top1, 1)
    ]


def stops(stopping, trial, result):
    """Whether a trial is stopped after an epoch, and with it its gang."""
    told = {"epochs": [result | {"id": trial.id}]}
    decision = stopping.on_trial_result(None, TuneTrial(trial), told)
    assert (trial.id in stopping.stopped) == (stopping.store.stopped(trial.id) is not None)
    assert (decision == TrialScheduler.STOP) == (trial.id in stopping.stopped)
    return trial.id in stopping.stopped


def told(stopping, trial, results):
    """The epoch after which a trial is stopped, or None."""
    stopping.on_trial_add(None, TuneTrial(trial))
    return next((each["epoch"] for each in results if stops(stopping, trial, each)), None)


def searched(experiment, store, *sets):
    made = experiment(SEARCH, "validate_every=2", *sets)
    progress = search.look(made, store)
    return progress, [drawn.trial for drawn in progress[0].drawn]


@pytest.mark.parametrize("grace, stopped", [(1, 2), (2, 2), (3, 4), (4, 4)])
def test_asha_stops_a_trial_after_the_first_epoch_with_a_value(
    experiment, tmp_path, grace, stopped
):
    store = Store(tmp_path / "results")
    progress, (best, worst, better, *_) = searched(
        experiment, store, "search.scheduler=asha", f"search.grace_epochs={grace}"
    )
    stopping = EarlyStopping(progress, store)
    assert told(stopping, best, epochs(0, 80, 0, 85, 0, 90)) is None
    # in epochs 1, 3 and 5 there is nothing to compare
    assert told(stopping, worst, epochs(0, 50, 0, 55, 0, 99)) == stopped
    assert told(stopping, better, epochs(0, 81, 0, 86, 0, 10)) is None  # the last is never stopped
    assert stopping.stopped == {worst.id: "asha"}


@pytest.mark.parametrize("scheduler", ["asha", "median", "hyperband"])
def test_epochs_after_a_stop_are_not_compared(experiment, tmp_path, scheduler):
    store = Store(tmp_path / "results")
    sets = f"search.scheduler={scheduler}", "search.time_budget=3"
    progress, (trial, *_) = searched(experiment, store, *sets)
    stopping = EarlyStopping(progress, store)
    assert told(stopping, trial, epochs(0, 80, 0, 80)) == 3
    for late in epochs(0, 0, 0, 80, 0)[3:]:
        assert stops(stopping, trial, late)
    assert stopping.spent == {progress[0].group.key: 5.0}


def test_the_median_rule_compares_the_epochs_with_values(experiment, tmp_path):
    store = Store(tmp_path / "results")
    progress, trials = searched(experiment, store, "search.scheduler=median")
    stopping = EarlyStopping(progress, store)
    for trial, at in zip(trials[:3], (60.0, 70.0, 80.0), strict=True):
        assert told(stopping, trial, epochs(0, at, 0, at, 0, at)) is None
    # the median of three is 70
    assert told(stopping, trials[3], epochs(0, 71, 0, 71, 0, 71)) is None
    assert told(stopping, trials[4], epochs(0, 65, 0, 65, 0, 65)) == 2


def test_the_median_rule_does_not_read_a_trial_that_ended_without_a_value(experiment, tmp_path):
    store = Store(tmp_path / "results")
    sets = "search.scheduler=median", "search.space={epochs: {choice: [5, 6]}}"
    progress, (short, long, *_) = searched(experiment, store, *sets)
    assert (short.epochs, long.epochs) == (5, 6)
    stopping = EarlyStopping(progress, store)
    assert told(stopping, long, epochs(0, 80, 0, 80, 0)) is None
    assert told(stopping, short, epochs(0, 80, 0, 80, 80, of=5)) is None


def test_a_scheduler_hears_of_earlier_runs(experiment, tmp_path):
    store = Store(tmp_path / "results")
    _, (done, resumed, worse, *_) = searched(experiment, store, "search.scheduler=asha")
    store.log(done, epochs(0, 80, 0, 85, 0, 90))
    store.finish(done, {"metrics": {"top1": 90.0}, "seconds": {"seconds": 6.0}}, {})
    store.log(resumed, epochs(0, 82, 0))
    progress, _ = searched(experiment, store, "search.scheduler=asha")
    stopping = EarlyStopping(progress, store)
    assert told(stopping, resumed, epochs(0, 82, 0, 40)[3:]) == 4  # 40 is below 85
    assert told(stopping, worse, epochs(0, 79)) == 2


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_the_time_budget_ends_trials_in_any_epoch(experiment, tmp_path, scheduler):
    store = Store(tmp_path / "results")
    sets = f"search.scheduler={scheduler}", "search.time_budget=20"
    progress, trials = searched(experiment, store, *sets)
    stopping = EarlyStopping(progress, store)
    for trial in trials[:3]:  # 18 seconds
        assert told(stopping, trial, epochs(0, 80, 0, 80, 0, 80)) is None
    stopping.on_trial_add(None, TuneTrial(trials[4]))
    one, two, *_ = epochs(0, 80)
    assert not stops(stopping, trials[4], one)
    assert told(stopping, trials[3], epochs(0, 80, 0, 80)) == 1
    # the trial that was stopped has no value, and the one beside it is compared all the same
    assert stops(stopping, trials[4], two)
    assert stopping.stopped == {trials[3].id: "time_budget", trials[4].id: "time_budget"}


def test_the_score_is_that_of_the_last_epoch_with_one(experiment, tmp_path):
    store = Store(tmp_path / "results")
    sets = "search.scheduler=asha", "search.time_budget=9"
    _, (one, two, three, *_) = searched(experiment, store, *sets)
    store.log(one, epochs(0, 70, 0, 60))
    store.log(two, epochs(0, 50, 0, 65, 0))
    store.log(three, epochs(0))
    for trial in (one, two, three):
        store.stop(trial, "time_budget")
    (progress,), _ = searched(experiment, store, *sets)
    found = [(drawn.epoch, drawn.score, drawn.scored) for drawn in progress.drawn]
    assert found == [(4, 60.0, 4), (5, 65.0, 4), (1, None, 0), (0, None, 0), (0, None, 0)]
    assert progress.over and progress.best.trial.id == two.id
    store.log(one, epochs(0, 70, 0, 66))  # of the same epoch: more epochs do not count
    (progress,), _ = searched(experiment, store, *sets)
    assert progress.best.trial.id == one.id


@pytest.mark.parametrize(
    "sets, first",
    [
        (("validate_every=6",), 1),
        (("validate_every=9", "search.scheduler=median"), 1),
        (("validate_every=4", "search.grace_epochs=5", "search.scheduler=hyperband"), 5),
    ],
)
def test_a_scheduler_that_could_never_act_is_refused(experiment, sets, first):
    made = experiment(SEARCH, "search.scheduler=asha", *sets)
    said = (
        f"validate_every is {sets[0][-1]}: {made.search.scheduler} could not stop any trial, "
        f"because top1 is not known in epochs {first} to 5 of 6: expected a smaller validate_every"
    )
    with pytest.raises(InputError, match=said):
        search.groups(made)


@pytest.mark.parametrize(
    "base, sets",
    [
        (5, []),
        (6, ["search.scheduler=none"]),
        (6, ["search.metric=train_loss"]),  # every epoch has one
        (6, ["search.base={validate_every: 3}"]),
        (6, ["search.space={epochs: {choice: [6, 20]}}"]),
        (1, ["search.grace_epochs=9"]),
    ],
)
def test_other_searches_are_not_refused(experiment, base, sets):
    text = SEARCH.replace("epochs: 6", f"epochs: 6, validate_every: {base}")
    (group,) = search.groups(experiment(text, "search.scheduler=asha", *sets))
    assert group.cell.trial.validate_every == (3 if "search.base" in "".join(sets) else base)


def test_a_miniature_may_do_without_its_scheduler(experiment):
    text = SEARCH.replace("epochs: 6", "epochs: 6, validate_every: 2")
    made = experiment(text, "search.scheduler=asha")
    small = load_experiment(made, smoke=True)
    (group,) = search.groups(small)
    assert (group.cell.trial.epochs, group.cell.trial.validate_every) == (2, 2)


@pytest.mark.slow
def test_a_search_with_asha_stops_a_trial(local_ray, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SEARCH.replace("epochs: 6", "epochs: 4, validate_every: 2"))
    sets = ["search.scheduler=asha", "resources.concurrent=1"]
    run_command([str(path)], overrides=sets, storage=str(tmp_path / "results"))
    store = Store(tmp_path / "results")
    (progress,) = search.look(load_experiment(path, sets), store)
    states = [drawn.state for drawn in progress.drawn]
    # one after another: a trial goes on if its value after two epochs is at least the 75th
    # percentile of those before it
    before, expected = [], []
    for drawn in progress.drawn:
        history = store.epochs(drawn.trial.id)
        assert [e["epoch"] for e in history if "top1" in e] == [2, 4][: len(history) // 2]
        value = history[1]["top1"]
        stops = bool(before) and value < np.percentile(before, 75)
        before.append(value)
        expected.append("stopped" if stops else "done")
        assert drawn.epoch == len(history) == (2 if stops else 4)
        assert drawn.score == history[-1]["top1"]
    assert states == expected and {"stopped", "done"} == set(states)


# ---- what reads epochs


@pytest.fixture
def begun(experiment, tmp_path):
    """A finished trial and one in its third epoch, with made-up values."""
    made = plan(experiment(SMALL.replace("loss: kd", "loss: ce\ngrid: {loss: [ce, ls]}")))
    store = Store(tmp_path / "results")
    done, other = (cell.trial for cell in made.cells)
    store.start(done)
    store.start(other)
    store.log(done, epochs(0, 20, 0, 40, 50, of=5))
    store.finish(done, {"metrics": {"top1": 50.0}, "seconds": {"seconds": 5.0}}, {})
    store.log(other, epochs(0, 30, 0, of=5))
    return made, store, done, other


def lines(axis):
    return [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axis.lines]


def test_curves_join_the_epochs_with_values(begun):
    made, store, _, other = begun
    records = frames.frame(made, store)
    curves = frames.curves(records, store)
    assert len(curves) == 5 + 3 and curves["top1"].isna().sum() == 2 + 2
    with matplotlib.rc_context(style.STYLE):
        figure = methods.learning_curves(curves, style.method_colours(records))
    left, right = figure.axes
    assert lines(left) == [([2, 4, 5], [20.0, 40.0, 50.0]), ([2], [30.0])]
    assert left.lines[1].get_marker() == "o"
    assert lines(right) == [([1, 2, 3, 4, 5], [1.0] * 5), ([1, 2, 3], [1.0] * 3)]
    store.log(other, epochs(0, of=5))
    early = frames.epochs([other.id], store)
    assert early["top1"].isna().all() and early["train_loss"].tolist() == [1.0]


def test_an_export_has_the_last_value_of_each_metric(begun):
    _, store, done, other = begun
    history = epochs(0, 30, 0, of=5)
    history[2]["train_loss"] = 0.5
    store.log(other, history)
    table = export.frame({trial.id: trial for trial in (done, other)}, store).set_index("id")
    assert table.loc[done.id, "metrics.top1"] == 50.0
    row = table.loc[other.id]
    assert (row["epoch"], row["metrics.top1"], row["metrics.train_loss"]) == (3, 30.0, 0.5)


def test_the_progress_view_shows_the_last_top1(begun):
    made, _, _, other = begun
    screen = io.StringIO()
    view = ProgressView(made, {other.id: other}, Console(file=screen, width=120))
    view.start(other.id)
    shown = []
    for result in epochs(0, 30, 0, of=5):
        view.result(other.id, result)
        page = Console(file=io.StringIO(), width=120)
        page.print(view)
        (row,) = [line for line in page.file.getvalue().splitlines() if "/5" in line]
        shown.append(("30.00" in row, f"{result['epoch']}/5" in row))
    assert shown == [(False, True), (True, True), (True, True)]
    assert view.epochs_left == 2
    view.end(other.id, None, "stopped by time budget")
    assert "top-1 30.00, stopped by time budget" in screen.getvalue()


def test_commands_show_a_trial_with_gaps(begun, cli):
    _, store, _, other = begun
    root = Path(store.uri).parent
    shown = cli("show", other.id, cwd=root)
    assert shown.returncode == 0 and "30 to 30" in shown.stdout and "3/5 epochs" in shown.stdout
    logs = cli("logs", other.id, cwd=root).stdout.splitlines()
    (head,) = [i for i, line in enumerate(logs) if line.split()[:1] == ["epoch"]]
    column = logs[head].split().index("top1")
    assert logs[head + 2].split()[column] == "30"
    assert [len(line.split()) for line in logs[head + 1 : head + 4]] == [4, 5, 4]
