"""Gangs on Ray: what goes together, the same bits as alone, and members that fall out."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from small import run as alone

from pld_ray.api.session import keep_plugins
from pld_ray.config import gangs
from pld_ray.config.planning import plan
from pld_ray.data import datasets
from pld_ray.store.claims import Claims
from pld_ray.store.store import Store
from pld_ray.sweep import checks, runner, search, worker
from pld_ray.sweep.early_stopping import EarlyStopping
from pld_ray.sweep.gangs import Gang, join
from pld_ray.sweep.progress import ProgressView
from pld_ray.sweep.retries import RetryOnProgress
from pld_ray.sweep.scheduling import PlanSearcher

TEXT = """
base:
  data: {name: digits, pad: 1, image_size: 8, limit: 101}
  student: resnet8
  teacher: {name: wrn_16_2, train: {epochs: 1}}
  epochs: 2
  batch_size: 32
grid: {loss: [ce, kd, pld, at, fitnet, rkd]}
"""
TWO = [{"CPU": 2.0}]


def run(made, store, monkeypatch=None):
    """Run a plan; return the failures, and the ids of the trials of each gang that started."""
    pending = {k: t for k, t in made.trials.items() if k not in store.finished(made.trials)}
    images, started = checks.check_trials(pending).images, []

    class Noting(runner._Follow):
        def on_trial_start(self, iteration, trials, trial, **info):
            started.append([settings["id"] for settings in trial.config["trials"]])
            super().on_trial_start(iteration, trials, trial, **info)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_Follow", Noting)
        with ProgressView(made, pending, Console(quiet=True)) as view:
            return runner.run(made, images, store, view), started


def digest(store, trial):
    return store.record(trial.id)["weights_sha256"]


@pytest.mark.slow
def test_a_grid_runs_as_gangs_with_the_bits_of_trials_alone(local_ray, experiment, tmp_path):
    made = plan(experiment(TEXT, "resources.concurrent=1"))
    store, other = Store(tmp_path / "results"), Store(tmp_path / "alone")
    failures, started = run(made, store)
    assert failures == {}
    # the teacher is not slowed down by others; then all trials step together
    ids = list(made.trials)
    assert started == [[ids[0]], [key for key in started[1]]] and sorted(started[1]) == sorted(
        ids[1:]
    )
    for trial in made.trials.values():
        alone(trial, other)
        assert digest(store, trial) == digest(other, trial), trial.label


@pytest.mark.slow
def test_half_a_gang_moves_to_a_core_that_is_idle(local_ray, experiment, tmp_path, monkeypatch):
    monkeypatch.setattr("pld_ray.sweep.scheduling.MOVE", 1.0)
    monkeypatch.setattr(
        "pld_ray.sweep.scheduling.join",
        lambda first, ready, largest, room, take: join(first, ready, largest, math.inf, take),
    )
    made = plan(
        experiment(TEXT, "grid.loss=[ce, ls]", "grid.optimizer.lr=[1e-3, 2e-3]", "epochs=40")
    )
    store, other = Store(tmp_path / "results"), Store(tmp_path / "alone")
    failures, started = run(made, store)
    assert failures == {} and store.finished(made.trials) == set(made.trials)
    assert len(started[0]) == 4 and len(started) > 1
    assert set(started[1]) < set(started[0])
    for trial in made.trials.values():
        alone(trial, other)
        assert digest(store, trial) == digest(other, trial)
        assert len(store.epochs(trial.id)) == 40
    assert not list(Path(store.uri).glob("trials/*/claim-*"))


def test_trials_that_move_wait_for_each_other(experiment, tmp_path, monkeypatch):
    store = Store(tmp_path / "results")
    more = "grid.loss=[ce, ls]", "grid.epochs=[10,20]"
    with Claims(store.files) as claims:
        nodes = [{"CPU": 1.0}]
        _, suggested = searcher(experiment, store, claims, monkeypatch, nodes, *more)
        asked = []
        suggested.move = asked.append
        keys = [each["id"] for each in suggested.suggest("a")["trials"]]
        epochs = dict(zip(keys, (10, 20, 10, 20), strict=True))
        assert {k: t.epochs for k, t in suggested.running["a"].trials.items()} == epochs
        nodes[0]["CPU"] = 2.0  # another core is there
        search.looked = -math.inf
        assert suggested.suggest("b") is None and asked == []  # no epoch has ended yet
        done = [{"id": key, "epoch": 1, "seconds": 0.3, "epochs": 20} for key in keys]
        suggested.on_trial_result("a", {"epochs": done})
        assert suggested.suggest("b") is None and asked == []  # 17 seconds are left: not worth it
        for epoch in done:
            epoch["seconds"] = 1.0
        suggested.on_trial_result("a", {"epochs": done})
        # 9, 19, 9 and 19 seconds are left: 28 in each half
        assert suggested.suggest("b") is None and asked == [{keys[1], keys[0]}]
        assert suggested.suggest("b") is None and len(asked) == 1
        suggested.on_trial_result("a", {"ended": keys[0], "back": "moved"})
        assert suggested.suggest("b") is None
        suggested.on_trial_result("a", {"ended": keys[1], "back": "moved"})
        moved = suggested.suggest("b")["trials"]
        assert {each["id"] for each in moved} == {keys[0], keys[1]}
        assert suggested.ended == [] and suggested.suggest("c") is None


def test_a_trial_in_its_last_epoch_does_not_move():
    trials = {name: SimpleNamespace(epochs=n) for name, n in zip("abc", (3, 9, 5), strict=True)}
    gang = Gang(trials, None, dict.fromkeys("abc", 2), {"a": 50.0, "b": 1.0, "c": 10.0})
    assert gang.seconds_left == {"a": 50.0, "b": 7.0, "c": 30.0}  # 43.5 is half
    assert gang.half() == {"c", "b"}
    gang.done["c"] = 4
    assert gang.half() == {"b"}  # 50, 7 and 10


SUICIDAL = '''
"""A loss that kills its process, in each attempt or in some."""

import os
import signal
from pathlib import Path

from torch.nn import functional as F

from pld_ray import DistillationLoss, register_loss


@register_loss("suicidal", label="Suicidal", takes="nothing")
class Suicidal(DistillationLoss):
    """Cross-entropy that kills."""

    def __init__(self, kills: int = 0, **options):
        super().__init__(**options)
        self.kills = kills

    def losses(self, student, teacher, labels, kept):
        marker = Path({marker!r})
        if len(labels) > 8 and (self.kills > marker.stat().st_size):
            with marker.open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return F.cross_entropy(student, labels, reduction="none")
'''
SUICIDAL_GRID = """
plugins: [./suicidal.py]
base:
  data: {name: digits, image_size: 8, limit: 101}
  student: resnet8
  epochs: 2
  batch_size: 32
grid:
  loss: [{name: suicidal, kills: KILLS}, ce, {name: ls}, {name: ce, weight: 1}]
resources: {concurrent: 1}
"""


def deadly(experiment, tmp_path, kills):
    """An experiment with a loss that kills its process so often, its store, and its marker."""
    marker = tmp_path / "marker"
    marker.write_text("")
    (experiment.folder / "suicidal.py").write_text(
        SUICIDAL.replace("{marker!r}", repr(str(marker)))
    )
    text = SUICIDAL_GRID.replace("KILLS", str(kills)).replace(", {name: ce, weight: 1}", "")
    made, store = plan(experiment(text)), Store(tmp_path / "results")
    keep_plugins(made.trials.values(), store)
    return made, store, marker


@pytest.mark.slow
def test_a_gang_whose_process_dies_is_tried_again(local_ray, experiment, tmp_path):
    made, store, marker = deadly(experiment, tmp_path, 1)
    failures, started = run(made, store)
    assert failures == {} and marker.read_text() == "x"
    assert started == [list(made.trials)] * 2


@pytest.mark.slow
def test_a_member_that_always_kills_fails_alone_and_the_others_finish(
    local_ray, experiment, tmp_path
):
    made, store, marker = deadly(experiment, tmp_path, 1000)
    failures, started = run(made, store)
    bad, *others = made.trials
    assert failures == {bad: "its process died (3 times in epoch 1)"}
    assert store.finished(made.trials) == set(others)
    assert [len(gang) for gang in started if bad in gang] == [3, 3, 2, 2, 1, 1, 1]
    assert len(marker.read_text()) == 7
    other = Store(tmp_path / "alone")
    for key in others:
        alone(made.trials[key], other)
        assert digest(store, made.trials[key]) == digest(other, made.trials[key])


ASHA = """
base:
  data: {name: digits, pad: 1, image_size: 8, limit: 101}
  student: resnet8
  loss: ce
  epochs: 4
  batch_size: 32
search:
  algorithm: random
  num_trials: 6
  scheduler: asha
  space: {optimizer.lr: {loguniform: [1.0e-5, 0.1]}}
seeds: []
resources: {concurrent: 1}
"""


@pytest.mark.slow
def test_a_search_stops_members_and_the_others_go_on(local_ray, tmp_path, cli):
    (tmp_path / "search.yaml").write_text(ASHA)
    done = cli("run", tmp_path / "search.yaml", "--storage", tmp_path / "results", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    store = Store(tmp_path / "results")
    lengths = {key: len(store.epochs(key)) for key in store.trials()}
    stopped = {key for key in lengths if store.stopped(key) is not None}
    assert len(lengths) == 6 and 0 < len(stopped) < 6
    assert store.finished(lengths) == lengths.keys() - stopped
    for key, trial in store.trials().items():
        assert (lengths[key] < 4) == (key in stopped)
        if key in stopped:
            assert store.stopped(key)["epoch"] == lengths[key]
            assert len(store.load_checkpoint(trial)["history"]) == lengths[key]


def searcher(experiment, store, claims, monkeypatch, nodes, *overrides, text=TEXT):
    for room in ("scheduling", "resources"):
        monkeypatch.setattr(f"pld_ray.sweep.{room}.nodes", lambda: nodes)
    made = plan(experiment(text, *overrides))
    monkeypatch.setattr(store, "record", lambda key: None)
    return made, PlanSearcher(dict(made.trials), made.experiment.resources, store, claims)


def sizes(search, count):
    """The number of trials in each of the next gangs."""
    found = []
    for name in range(count):
        config = search.suggest(str(name))
        found.append(None if config is None else len(config["trials"]))
    return found


@pytest.mark.parametrize(
    ("nodes", "more", "expected"),
    [
        # 21 epochs for each of two cores: 1 + 2 + 3 + 4 + 5 + 6 = 21
        ([{"CPU": 2.0}], [], [6, 6, None]),
        ([{"CPU": 64.0}], [], [1] * 12),
        ([{"CPU": 2.0}], ["resources.gang=5"], [5, 5, None]),
        ([{"CPU": 2.0}], ["resources.gang=1"], [1, 1, None]),
        ([{"CPU": 1.0}], [], [12, None]),
        # 14 for each of three: 1 + ... + 5, 6 + 1 + ... + 4, 5 + 6
        ([{"CPU": 1.0}], ["resources.concurrent=3"], [5, 5, 2, None]),
    ],
)
def test_gangs_leave_work_for_all(experiment, tmp_path, monkeypatch, nodes, more, expected):
    text = TEXT.replace("[ce, kd, pld, at, fitnet, rkd]", "[ce, ls], epochs: [1, 2, 3, 4, 5, 6]")
    store = Store(tmp_path / "results")
    with Claims(store.files) as claims:
        _, suggested = searcher(experiment, store, claims, monkeypatch, nodes, *more, text=text)
        assert sizes(suggested, len(expected)) == expected


def test_two_drivers_leave_work_for_each_other(experiment, tmp_path, monkeypatch):
    store = Store(tmp_path / "results")
    more = "grid.loss=[ce, ls]", "grid.epochs=[2,3]"
    with Claims(store.files) as first, Claims(store.files) as second:
        assert first.drivers() == second.drivers() == 2
        one = [{"CPU": 1.0}]
        _, suggested = searcher(experiment, store, first, monkeypatch, one, *more)
        _, other = searcher(experiment, store, second, monkeypatch, one, *more)
        assert sizes(suggested, 1) == [2] and sizes(other, 1) == [2]
    assert first.drivers() == 0


@pytest.mark.parametrize(
    ("gang", "expected", "said"),
    [
        # 6 losses x 2 seeds x 2 epochs; the teacher runs for AT, FitNet and RKD
        ("auto", (2, 24, 4, 12, 4), "12 trials can step together in 2 gangs of up to 6: images are "
         "prepared for 4 instead of 24 epochs, and teachers run for 4 instead of 12"),
        # CE to AT, and FitNet with RKD, for each seed
        ("4", (4, 24, 8, 12, 8), "12 trials can step together in 4 gangs of up to 4: images are "
         "prepared for 8 instead of 24 epochs, and teachers run for 8 instead of 12"),
        ("1", (0, 0, 0, 0, 0), None),
    ],
)  # fmt: skip
def test_a_plan_says_what_gangs_spare(experiment, cli, tmp_path, gang, expected, said):
    sets = f"resources.gang={gang}", "seeds=[0,1]"
    made = plan(experiment(TEXT, *sets))
    found = gangs.planned(made.trials.values(), None if gang == "auto" else int(gang))
    sums = [sum(getattr(each, name) for each in found) for name in (
        "apart", "together", "taught_apart", "taught_together"
    )]  # fmt: skip
    assert (len(found), *sums) == expected
    options = [part for each in sets for part in ("--set", each)]
    path = experiment.folder / "small.yaml"
    printed = cli("plan", path, "--storage", tmp_path / "results", *options, cwd=tmp_path).stdout
    assert said in printed if said else "together" not in printed
    options.append("--json")
    printed = cli("plan", path, "--storage", tmp_path / "results", *options, cwd=tmp_path).stdout
    listed = json.loads(printed)["gangs"]
    assert [each["trials"] for each in listed] == [[t.id for t in each.trials] for each in found]
    assert sum(each["epochs"]["together"] for each in listed) == expected[2]


@pytest.mark.parametrize(
    ("more", "together"),
    [
        ([], [["at", "fitnet", "rkd"]]),  # one teacher runs for them; the others read its logits
        (["base.teacher.logits=live"], [["kd", "pld", "at", "fitnet", "rkd"]]),
        (["base.data.augment=[randaugment]"], [["ce", "kd", "pld", "at", "fitnet", "rkd"]]),
        (["base.data.image_size=16"], [["ce", "kd", "pld", "at", "fitnet", "rkd"]]),
        (["resources.gang=4"], [["ce", "kd", "pld", "at"], ["fitnet", "rkd"]]),
        (["resources.gang=1"], []),
    ],
)
def test_gangs_are_formed_where_they_share_what_costs_time(experiment, more, together):
    text = TEXT.replace("image_size: 8, ", "").replace("pad: 1, ", "")
    made = plan(experiment(text, *more))
    size = made.experiment.resources.gang
    found = gangs.planned(made.trials.values(), None if size == "auto" else size)
    assert [[trial.loss.name for trial in each.trials] for each in found] == together


def test_brief_trials_join_as_soon_as_one_has_ended(experiment, tmp_path, monkeypatch):
    text = TEXT.replace("image_size: 8, ", "")
    store = Store(tmp_path / "results")
    with Claims(store.files) as claims:
        more = "grid.loss=[ce]", "grid.optimizer.lr=[1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3]"
        _, suggested = searcher(
            experiment, store, claims, monkeypatch, [{"CPU": 1.0}], *more, text=text
        )
        sizes = []
        for name, pace in (("a", 0.51), ("b", 0.49), ("c", 0.6)):  # seconds of 2 epochs
            keys = [each["id"] for each in suggested.suggest(name)["trials"]]
            sizes.append(len(keys))
            for key in keys:
                done = {"id": key, "epoch": 2, "seconds": pace, "epochs": 2}
                suggested.on_trial_result(name, {"epochs": [done]})
                suggested.on_trial_result(name, {"ended": key})
            suggested.on_trial_complete(name, {})
        assert sizes == [1, 1, 4]
        assert suggested.brief == set()  # those of the last gang took longer


def test_companions_have_the_same_teacher_first(experiment, tmp_path, monkeypatch):
    text = TEXT.replace("[ce, kd, pld, at, fitnet, rkd]", "[at, rkd]").replace(
        "grid: {", "grid: {teacher: [wrn_16_2, resnet8], "
    )
    store = Store(tmp_path / "results")
    with Claims(store.files) as claims:
        made, suggested = searcher(
            experiment, store, claims, monkeypatch, [{"CPU": 1.0}], text=text
        )
        teachers = suggested.suggest("teachers")["trials"]
        assert {each["id"] for each in teachers} == made.teacher_ids
        for each in teachers:
            monkeypatch.setattr(
                store, "record", lambda key: {} if key in made.teacher_ids else None
            )
            suggested.on_trial_result("teachers", {"ended": each["id"]})
        suggested.on_trial_complete("teachers", {})
        suggested.resources = suggested.resources.model_copy(update={"gang": 2})
        for name in ("a", "b"):
            config = suggested.suggest(name)
            trials = [made.trials[each["id"]] for each in config["trials"]]
            assert len({trial.teacher.id for trial in trials}) == 1 and len(trials) == 2
            suggested.on_trial_complete(name, {})


def test_students_start_when_their_teacher_ends_and_its_gang_goes_on(
    experiment, tmp_path, monkeypatch
):
    store = Store(tmp_path / "results")
    with Claims(store.files) as claims:
        made, suggested = searcher(experiment, store, claims, monkeypatch, TWO, "grid.loss=[kd]")
        teacher = suggested.suggest("a")["trials"][0]["id"]
        assert suggested.suggest("b") is None
        suggested.running["a"] = Gang(
            {teacher: made.trials[teacher], "x": made.trials[teacher]}, suggested.needs[teacher]
        )
        monkeypatch.setattr(store, "record", lambda key: {} if key == teacher else None)
        suggested.on_trial_result("a", {"ended": teacher})
        assert suggested.suggest("b")["trials"][0]["id"] == made.cells[0].trial.id


def test_a_trial_without_memory_waits_for_a_smaller_gang(experiment, tmp_path, monkeypatch):
    more = "grid.loss=[ce, ls]", "grid.epochs=[1,2]"
    store = Store(tmp_path / "results")
    with Claims(store.files) as claims:
        _, suggested = searcher(experiment, store, claims, monkeypatch, [{"CPU": 1.0}], *more)
        keys = [each["id"] for each in suggested.suggest("a")["trials"]]
        for key in keys[2:]:
            suggested.on_trial_result("a", {"ended": key, "back": "no room"})
        assert list(suggested.waiting) == keys[2:] and suggested.ended == []
        assert [suggested._most(key) for key in keys] == [4, 4, 3, 2]
        suggested.on_trial_complete("a", {})
        assert [each["id"] for each in suggested.suggest("b")["trials"]] == keys[2:]


def test_a_gang_that_dies_goes_on_in_halves(experiment, tmp_path, monkeypatch):
    store = Store(tmp_path / "results")
    with Claims(store.files) as claims:
        _, suggested = searcher(
            experiment,
            store,
            claims,
            monkeypatch,
            [{"CPU": 1.0}],
            "grid.loss=[ce, ls]",
            "grid.epochs=[1,2]",
        )
        assert sizes(suggested, 1) == [4]
        suggested.on_trial_complete("0", None, error=True)
        assert suggested.failures == {} and len(suggested.waiting) == 4
        for name, size in (("b", 2), ("c", 1), ("d", 1)):
            assert len(suggested.suggest(name)["trials"]) == size
            suggested.on_trial_complete(name, None, error=True)
        assert len(suggested.failures) == 2 and "(3 times in epoch 1)" in str(suggested.failures)
        assert len(suggested.suggest("e")["trials"]) == 2
        suggested.on_trial_complete("e", {"done": True})
        assert suggested.suggest("f") == suggested.FINISHED
        assert not list(Path(store.uri).glob("trials/*/claim-*"))


def test_a_trial_that_has_a_record_is_not_run_again(experiment, tmp_path, monkeypatch):
    made, store = plan(experiment(TEXT, "grid.loss=[ce, ls]")), Store(tmp_path / "results")
    done, left = (cell.trial for cell in made.cells)
    alone(done, store)
    said, attempted = [], []
    monkeypatch.setattr(worker.tune, "report", said.append)
    monkeypatch.setattr(worker, "_attempt", lambda trials, *more: attempted.extend(trials))
    settings = [{"id": t.id, "trial": t.model_dump(mode="json")} for t in (done, left)]
    images = {datasets.sharing_key(done.data): None}
    config = {"trials": settings, "search": False}
    worker.run_gang(config, images, store.uri, "", None, None)
    assert said == [{"ended": done.id}] and attempted == [left]


def test_a_trial_that_was_stopped_does_not_return_when_its_gang_dies(
    experiment, tmp_path, monkeypatch
):
    store = Store(tmp_path / "results")
    made = experiment(ASHA)
    progress = search.look(made, store)
    stopping = EarlyStopping(progress, store)
    trials = {drawn.trial.id: drawn.trial for drawn in progress[0].drawn}
    for room in ("scheduling", "resources"):
        monkeypatch.setattr(f"pld_ray.sweep.{room}.nodes", lambda: [{"CPU": 1.0}])
    with Claims(store.files) as claims:
        searcher = PlanSearcher(dict(trials), made.resources, store, claims, stopping)
        keys = [each["id"] for each in searcher.suggest("a")["trials"]]
        assert keys == list(trials)
        stopping.stop(keys[1], "asha")
        searcher.on_trial_complete("a", None, error=True)
        assert list(searcher.waiting) == [key for key in keys if key != keys[1]]
        assert searcher.notes == {keys[1]: "stopped by asha"} and searcher.ended == [keys[1]]
        assert store.stopped(keys[1])["by"] == "asha"
        # a failure is told although a stop was noted before it
        searcher.suggest("b")
        stopping.stop(keys[0], "asha")
        store.fail(keys[0], "the training loss is nan", final=True)
        searcher.on_trial_result("b", {"ended": keys[0], "failed": "the training loss is nan"})
        assert searcher.failures == {keys[0]: "the training loss is nan"}


def test_students_of_a_teacher_that_failed_do_not_start(experiment, tmp_path, monkeypatch):
    store = Store(tmp_path / "results")
    with Claims(store.files) as claims:
        made, searcher_ = searcher(experiment, store, claims, monkeypatch, [{"CPU": 1.0}])
        (teacher,) = (each["id"] for each in searcher_.suggest("a")["trials"])
        searcher_.on_trial_complete("a", None, error=True)
        config = searcher_.suggest("b")
        labels = {made.trials[each["id"]].loss.name for each in config["trials"]}
        assert labels == {"ce"}
        assert searcher_.suggest("c") == searcher_.FINISHED
        assert searcher_.failures.keys() == {
            key for key, trial in made.trials.items() if trial.teacher or key == teacher
        }


def test_a_drawn_trial_that_fails_before_it_starts_is_told(experiment, tmp_path):
    made = plan(experiment(TEXT, "grid.loss=[ce]"))
    trial = made.cells[0].trial
    drawn = search.DrawnTrial({}, trial, "open", 0, None, 0, 0.0)
    waiting = SimpleNamespace(
        drawn=[drawn], ended=[trial.id], failures={trial.id: "its teacher failed"}, notes={}
    )
    view = ProgressView(made, {}, Console(quiet=True))
    runner._Follow(view, waiting).on_experiment_end([])
    assert view.failed == 1 and waiting.drawn == waiting.ended == []


def test_failures_are_counted_anew_when_a_trial_ends():
    retries = RetryOnProgress()
    trial = SimpleNamespace(
        config={"trials": [{"id": "a"}, {"id": "b"}]},
        run_metadata=SimpleNamespace(num_failures=0),
        max_failures=None,
    )
    retries.on_trial_start(0, [], trial)
    assert trial.max_failures == 1  # then it goes on in halves
    trial.run_metadata.num_failures = 1
    retries.on_trial_result(0, [], trial, {"epochs": [{"id": "a", "epoch": 1}]})
    assert trial.max_failures == 2
    trial.config["trials"] = trial.config["trials"][:1]
    retries.on_trial_result(0, [], trial, {"ended": "b"})
    assert trial.max_failures == 3  # the other one is alone now
