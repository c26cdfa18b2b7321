import math
import random

import pytest

from pld_ray.cli.run import run as run_command
from pld_ray.config.experiment import load_experiment
from pld_ray.config.search_space import Range, Search, points, suggest
from pld_ray.config.validation import validated
from pld_ray.errors import InputError
from pld_ray.store.store import Store
from pld_ray.sweep import search

TEXT = """
base:
  data: {name: digits, limit: 100}
  student: resnet8
  teacher: {name: resnet8, train: {epochs: 1}}
  epochs: 4
  batch_size: 50
grid: {loss: [ce, {name: kd, temperature: 2}, dist]}
search:
  space:
    optimizer.lr: {loguniform: [1e-4, 1e-1]}
    loss.temperature: {uniform: [1, 8]}
    kd.ce_weight: {choice: [0, 0.5]}
  num_trials: 3
  base: {data: {holdout: 37}}
seeds: [1, 2]
"""


def searched(space, **settings):
    return validated(Search, {"space": space, "num_trials": 4, **settings}, "here")


def test_what_is_drawn_lies_in_its_range_and_is_spread_over_it():
    space = {"log": {"loguniform": [1e-4, 1e-1]}, "x": {"uniform": [-1, 3]}, "n": {"int": [2, 4]}}
    sought = searched(space, num_trials=4000)
    drawn = points(sought, sought.space, "cell")
    assert len(drawn) == 4000
    # of a uniform distribution on [a, b]: mean (a + b) / 2, deviation (b - a) / sqrt(12)
    for values, a, b in (
        ([math.log10(point["log"]) for point in drawn], -4, -1),
        ([point["x"] for point in drawn], -1, 3),
    ):
        assert min(values) >= a and max(values) <= b
        assert sum(values) / 4000 == pytest.approx((a + b) / 2, abs=4 * (b - a) / 12**0.5 / 63)
        below = sum(value < a + (b - a) / 4 for value in values)
        assert below == pytest.approx(1000, abs=4 * (4000 * 0.25 * 0.75) ** 0.5)
    assert {point["n"] for point in drawn} == {2, 3, 4}


def test_points_depend_on_seed_and_cell_alone():
    sought = searched({"lr": {"loguniform": [1e-4, 1]}}, num_trials=6)
    some = points(sought, sought.space, "cell")
    random.seed(3)
    assert (
        points(searched({"lr": {"loguniform": [1e-4, 1]}}, num_trials=4), sought.space, "cell")
        == some[:4]
    )
    assert points(sought, sought.space, "other") != some
    assert (
        points(searched({"lr": {"loguniform": [1e-4, 1]}}, seed=1), sought.space, "cell")
        != some[:4]
    )
    for point in some:  # four digits
        assert float(f"{point['lr']:.4g}") == point["lr"]


def test_a_small_space_is_drawn_without_repetitions():
    sought = searched({"a": {"choice": [1, 2]}, "b": {"int": [1, 2]}}, num_trials=50)
    found = points(sought, sought.space, "cell")
    assert len(found) == 4 and {(p["a"], p["b"]) for p in found} == {(1, 1), (1, 2), (2, 1), (2, 2)}


def test_a_grid_is_every_combination():
    sought = searched(
        {"a": {"choice": ["x", [1, 2]]}, "b": {"int": [1, 3]}}, algorithm="grid", num_trials=None
    )
    assert points(sought, sought.space, "cell") == [
        {"a": a, "b": b} for a in ("x", [1, 2]) for b in (1, 2, 3)
    ]


def test_optuna_finds_a_maximum():
    pytest.importorskip("optuna")
    space = {
        "x": {"uniform": [0, 1]},
        "log": {"loguniform": [1e-6, 1]},
        "c": {"choice": [[0], [5]]},
    }
    sought = searched(space, algorithm="optuna")

    def score(point):  # highest at 0.3, 1e-2, [5]
        off = abs(point["x"] - 0.3) + abs(math.log10(point["log"]) + 2) / 6
        return -off - (point["c"] == [0])

    tried = []
    for _ in range(50):
        point = suggest(sought, sought.space, "cell", tried)
        assert suggest(sought, sought.space, "cell", tried) == point  # nothing else decides
        tried.append((point, score(point), False))
    first, last = ([value for _, value, _ in part] for part in (tried[:15], tried[-15:]))
    assert sum(last) / 15 > sum(first) / 15 + 0.3
    best = max(tried, key=lambda each: each[1])[0]
    assert best["x"] == pytest.approx(0.3, abs=0.15) and best["c"] == [5]
    # what runs, failed or has no number yet is told as such
    more = [*tried, (tried[0][0], None, True), (tried[1][0], None, False)]
    assert suggest(sought, sought.space, "cell", more)["c"] in ([0], [5])


@pytest.mark.parametrize(
    "space, message",
    [
        ({"lr": {"uniform": [2, 1]}}, "expected the lower bound first"),
        ({"lr": {"loguniform": [0, 1]}}, "expected bounds above 0"),
        ({"lr": {"uniform": [0, 1], "int": [0, 1]}}, "expected one of uniform, loguniform"),
        ({"lr": {}}, "expected one of uniform, loguniform"),
        ({"lr": {"normal": [0, 1]}}, "unknown field"),
        ({"lr": {"choice": []}}, "at least 1 item"),
        ({}, "at least 1 item"),
    ],
)
def test_bad_ranges(space, message):
    with pytest.raises(InputError, match=message):
        searched(space)


def test_each_loss_searches_what_it_has(experiment):
    groups = search.groups(experiment(TEXT))
    assert [list(group.space) for group in groups] == [
        ["optimizer.lr"],
        ["optimizer.lr", "loss.temperature", "loss.ce_weight"],
        ["optimizer.lr", "loss.temperature"],
    ]
    trial = groups[1].trial({"optimizer.lr": 0.01, "loss.temperature": 3.0, "loss.ce_weight": 0.5})
    assert (trial.optimizer.lr, trial.loss.temperature, trial.loss.ce_weight) == (0.01, 3.0, 0.5)
    assert trial.data.holdout == 37 and trial.seed == 0
    assert trial.teacher.data.holdout == 37  # no one has seen the images that decide
    final = groups[1].cells({"optimizer.lr": 0.01}, [5])[0].trial
    assert final.data.holdout is None and final.seed == 5 and final.optimizer.lr == 0.01


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["search.space={loss.temprature: {int: [1, 2]}}"],
            "no such parameter; did you mean 'temperature'",
        ),
        (["search.space={pld.tau: {int: [1, 2]}}"], "no such parameter; accepted: .*temperature"),
        (["search.space={optimizer.lrr: {int: [1, 2]}}"], "optimizer.lrr: unknown field"),
        (["search.metric=agreement"], "ce has no teacher to compare with"),
        (["search.metric=top2"], "search: metric is 'top2'.*top1"),
        (["search.num_trials=null"], "num_trials: algorithm random needs a number of trials"),
        (["search.algorithm=grid"], "space.optimizer.lr: algorithm grid needs choice or int"),
        (["search.seed=2"], "search.seed is 2, which is also one of seeds"),
        (
            ["search.algorithm=optuna", "search.space={data.limit: {int: [1, 2]}}"],
            "optuna draws values while trials run",
        ),
    ],
)
def test_bad_searches(experiment, tmp_path, overrides, message):
    with pytest.raises(InputError, match=message):
        search.plan(experiment(TEXT, *overrides), Store(tmp_path))


def test_a_search_of_nothing_but_a_space_has_no_seeds(experiment):
    text = TEXT.replace("seeds: [1, 2]\n", "")
    assert experiment(text).seeds == [] and experiment(TEXT).seeds == [1, 2]
    with pytest.raises(InputError, match=r"seeds is \[\]"):
        experiment("base: {data: digits, student: resnet8, loss: ce, epochs: 1}\nseeds: []")


def finish(store, trial, top1):
    record = {"metrics": {"top1": top1}, "seconds": {"seconds": 10.0}}
    store.finish(trial, record, {})


def test_the_best_of_each_cell_is_compared_on_fresh_seeds(experiment, tmp_path):
    made, store = experiment(TEXT), Store(tmp_path)
    plan = search.plan(made, store)
    assert len(plan.searched) == 9 and plan.cells == ()
    assert len(plan.trials) == 9 + 1  # and the teacher
    progress = search.look(made, store)
    best = {0: 2, 1: 0, 2: 1}
    for cell, each in enumerate(progress):
        for number, drawn in enumerate(each.drawn):
            finish(store, drawn.trial, 90.0 if number == best[cell] else 80.0 - number)
    plan = search.plan(made, store)
    assert len(plan.cells) == 6 and len(plan.searched) == 9
    for i, cell in enumerate(plan.cells):
        point = progress[i // 2].drawn[best[i // 2]].point
        assert cell.trial.optimizer.lr == point["optimizer.lr"]
        assert cell.trial.seed == [1, 2][i % 2] and cell.trial.data.holdout is None
    assert [t.loss.name for t in plan.points] == ["ce", "ce", "kd", "kd", "dist", "dist"]
    assert {t.optimizer.lr for t in plan.points} == {0.001}  # tables name them by the grid
    with pytest.raises(InputError, match="mode is 'min': expected 'max' for top1, or no mode"):
        experiment(TEXT, "search.mode=min")


def test_of_finished_trials_the_best_is_that_with_the_best_score(experiment, tmp_path):
    text = TEXT.replace("optimizer.lr: {loguniform: [1e-4, 1e-1]}", "epochs: {choice: [2, 4]}")
    text = text.replace("    loss.temperature: {uniform: [1, 8]}\n", "")
    made = experiment(text, "search.algorithm=grid", "grid.loss=[ce]")
    store = Store(tmp_path)
    (progress,) = search.look(made, store)
    short, long = (drawn.trial for drawn in progress.drawn)
    assert (short.epochs, long.epochs) == (2, 4)
    finish(store, short, 90.0)
    finish(store, long, 80.0)
    assert search.look(made, store)[0].best.trial.id == short.id


def test_stopped_failed_and_paused_trials(experiment, tmp_path):
    made, store = experiment(TEXT, "search.scheduler=asha"), Store(tmp_path)
    first = search.look(made, store)[0]
    trials = [drawn.trial for drawn in first.drawn]
    epochs = [{"epoch": 1, "top1": 50.0, "seconds": 4.0}]
    store.log(trials[0], epochs)
    store.stop(trials[0], "asha")
    store.log(trials[1], [*epochs, {"epoch": 2, "top1": 40.0, "seconds": 5.0}])
    store.fail(trials[2].id, "the training loss is nan", final=True)

    def states(*overrides):
        return [d.state for d in search.look(experiment(TEXT, *overrides), store)[0].drawn]

    assert states("search.scheduler=asha") == ["stopped", "open", "failed"]
    assert states("search.scheduler=median") == ["open", "open", "failed"]
    store.stop(trials[1], "time_budget")
    assert states("search.scheduler=asha") == ["stopped", "paused", "failed"]
    kept = store.stopped(trials[1].id)
    assert (kept["epoch"], kept["by"], kept["metrics"]["top1"]) == (2, "time_budget", 40.0)

    def over(budget):
        sets = ("search.scheduler=asha", f"search.time_budget={budget}")
        return search.look(experiment(TEXT, *sets), store)[0].over

    assert over(13) and not over(14)  # 4 + 9 seconds are spent
    best = search.look(experiment(TEXT, "search.scheduler=asha", "search.time_budget=9"), store)[
        0
    ].best
    assert best.trial.id == trials[1].id  # none has finished: it has come furthest


def run(folder, *overrides):
    overrides = (*overrides, "resources.concurrent=1")  # one process, which imports torch once
    path = folder / "small.yaml"
    path.write_text(TEXT)
    run_command([str(path)], overrides=list(overrides), storage=str(folder / "results"))
    return load_experiment(path, overrides), Store(folder / "results")


@pytest.mark.slow
def test_a_search_with_asha_and_then_the_comparison(local_ray, tmp_path, capfd):
    sets = ["search.scheduler=asha", "search.num_trials=4", "grid.loss=[ce,kd]"]
    made, store = run(tmp_path, *sets)
    progress = search.look(made, store)
    for each in progress:
        assert each.over and len(each.drawn) == 4
        states = [drawn.state for drawn in each.drawn]
        assert set(states) <= {"done", "stopped"} and "done" in states
        assert each.best.score == max(d.score for d in each.drawn if d.state == "done")
        for drawn in each.drawn:
            if drawn.state == "stopped":
                kept = store.stopped(drawn.trial.id)
                assert kept["epoch"] == drawn.epoch < 4 and kept["by"] == "asha"
                assert len(store.load_checkpoint(drawn.trial)["history"]) == drawn.epoch
    stopped = [d for each in progress for d in each.drawn if d.state == "stopped"]
    assert (
        stopped
    )  # rungs at 1 and 4 epochs: the later ones of four cannot all be in the best quarter
    plan = search.plan(made, store)
    assert len(plan.cells) == 4
    assert store.finished(c.trial.id for c in plan.cells) == {c.trial.id for c in plan.cells}
    printed = capfd.readouterr().out
    assert "| resnet8 → resnet8 | KD " in printed and "stopped by asha" in printed
    finished = store.records(store.trials())
    # the same command has nothing to do; without a scheduler the stopped ones go on where they were
    run(tmp_path, *sets)
    assert store.records(store.trials()) == finished
    run(tmp_path, "search.num_trials=4", "grid.loss=[ce,kd]")
    for drawn in stopped:
        record = store.record(drawn.trial.id)
        assert record is not None and store.stopped(drawn.trial.id) is None
        assert len(store.epochs(drawn.trial.id)) == 4


@pytest.mark.slow
def test_optuna_goes_on_where_it_was(local_ray, tmp_path, capfd):
    pytest.importorskip("optuna")
    sets = ["search.algorithm=optuna", "grid.loss=[ce]", "seeds=[]"]
    made, store = run(tmp_path, *sets)
    first = search.look(made, store)[0]
    assert first.over and [d.state for d in first.drawn] == ["done"] * 3
    made, store = run(tmp_path, *sets, "search.num_trials=5")
    more = search.look(made, store)[0]
    assert [d.trial.id for d in more.drawn[:3]] == [d.trial.id for d in first.drawn]
    assert len({d.trial.id for d in more.drawn}) == 5 and more.over
    assert "[5/5] ce resnet8 seed 0 optimizer.lr " in capfd.readouterr().out


def test_ranges_are_parts():
    assert Range.model_validate({"int": [1, 3]}).values() == [1, 2, 3]
    assert Range.model_validate({"uniform": [1, 3]}).values() is None


def test_the_metric_says_whether_lower_is_better(experiment, tmp_path):
    store = Store(tmp_path)
    made = experiment(TEXT, "search.metric=val_loss", "grid.loss=[ce]")
    (progress,) = search.look(made, store)
    for number, drawn in enumerate(progress.drawn):
        metrics = {"top1": 50.0, "val_loss": [0.7, 0.3, 0.5][number]}
        store.finish(drawn.trial, {"metrics": metrics, "seconds": {"seconds": 1.0}}, {})
    (progress,) = search.look(made, store)
    assert progress.best.score == 0.3
    same = experiment(TEXT, "search.metric=val_loss", "search.mode=min", "grid.loss=[ce]")
    assert search.groups(same)[0].key == progress.group.key
    assert searched({"x": {"int": [1, 2]}}, metric="top1").better == "max"


def test_a_metric_of_a_plugin_is_searched(experiment, tmp_path):
    (tmp_path / "hinge.py").write_text(
        "import pld_ray\n@pld_ray.register_metric('hinge')\n"
        "def hinge(student, labels, teacher):\n    return 1 - student[:, 0]\n"
    )
    text = TEXT.replace(
        "base:\n  data", "plugins: [hinge.py]\nbase:\n  metrics: [hinge]\n  data", 1
    )
    made = experiment(text, "search.metric=hinge", "search.mode=min", "grid.loss=[ce]")
    (progress,) = search.look(made, Store(tmp_path))
    for number, drawn in enumerate(progress.drawn):
        metrics = {"top1": 50.0, "hinge": [0.7, 0.3, 0.5][number]}
        record = {"metrics": metrics, "seconds": {"seconds": 1.0}}
        Store(tmp_path).finish(drawn.trial, record, {})
    (progress,) = search.look(made, Store(tmp_path))
    assert progress.best.score == 0.3 and progress.best.trial.metrics == ("hinge",)
    with pytest.raises(InputError, match="search: metric is 'hinge': .*needs mode, max or min"):
        experiment(text, "search.metric=hinge")
    with pytest.raises(InputError, match="search.metric is 'hing'.*did you mean 'hinge'"):
        search.groups(experiment(text, "search.metric=hing", "search.mode=min"))
