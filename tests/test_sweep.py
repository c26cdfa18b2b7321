from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from pld_ray.api.session import keep_plugins
from pld_ray.config.parts import Resources
from pld_ray.config.planning import plan
from pld_ray.data.datasets import load
from pld_ray.distill.loop import train
from pld_ray.store.claims import Claims
from pld_ray.store.store import Store
from pld_ray.sweep import checks, resources, runner
from pld_ray.sweep.progress import ProgressView
from pld_ray.sweep.resources import ResourceRequest
from pld_ray.sweep.scheduling import PlanSearcher

SMALL = """
base:
  data: {name: digits, pad: 1, limit: 101}
  student: resnet8
  teacher: resnet8
  epochs: 2
  batch_size: 32
grid: {loss: [ce, pld]}
"""

ONE = "resources.concurrent=1"  # one process then runs them all: each imports torch for seconds


def run(made, store):
    pending = {k: t for k, t in made.trials.items() if k not in store.finished(store.trials())}
    images = checks.check_trials(pending).images
    with ProgressView(made, pending, Console(quiet=True)) as view:
        failures = runner.run(made, images, store, view)
    return failures, pending


def test_teachers_first_everything_once_failures_told(local_ray, experiment, tmp_path):
    axes = ["grid.optimizer=[adamw, {name: sgd, lr: 1e30}]", "grid.teacher=[resnet8, wrn_16_2]"]
    made, store = plan(experiment(SMALL, *axes, ONE)), Store(tmp_path / "results")
    failures, pending = run(made, store)
    # CE twice, PLD four times, and one teacher: the other is the CE student itself
    assert len(pending) == 2 + 4 + 1
    diverged = {t.id for t in made.trials.values() if t.optimizer.name == "sgd"}
    assert set(failures) == diverged and len(diverged) == 3
    assert all("training loss is" in reason for reason in failures.values())
    assert store.finished(store.trials()) == made.trials.keys() - diverged
    for trial in made.trials.values():
        if trial.id not in diverged and trial.teacher:
            student, teacher = (store.record(t.id) for t in (trial, trial.teacher))
            assert teacher["finished"] <= student["finished"]
            assert student["metrics"]["teacher_top1"] == teacher["metrics"]["top1"]
    assert run(made, store)[1].keys() == diverged


@pytest.mark.slow
def test_students_of_a_failed_teacher_fail_with_it(local_ray, experiment, tmp_path):
    text = SMALL.replace(
        "teacher: resnet8", "teacher: {name: resnet8, train: {optimizer: {name: sgd, lr: 1e30}}}"
    )
    made, store = plan(experiment(text, "loss=pld", ONE)), Store(tmp_path / "results")
    failures, _ = run(made, store)
    teacher = next(iter(made.trials))
    assert failures.keys() == made.trials.keys()
    assert failures[made.cells[0].trial.id] == f"its teacher, trial {teacher}, failed"


@pytest.mark.slow
def test_two_workers_equal_one_where_no_batch_norm_is_involved(local_ray, experiment, tmp_path):
    # 101 images in batches of 66: the last has 35, of which the workers take 18 and 17
    text = """
base:
  data: {name: digits, pad: 1, limit: 101}
  student:
    name: vit_tiny_patch16_224
    args: {img_size: 8, patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}
  teacher:
    name: vit_tiny_patch16_224
    args: {img_size: 8, patch_size: 4, embed_dim: 48, depth: 2, num_heads: 2}
    train: {workers: 1}
  epochs: 2
  batch_size: 66
  clip_grad: 1
  optimizer: {name: sgd, lr: 0.1}  # Adam's first steps make much of a gradient's last bits
grid: {loss: [pld, vid], workers: [1, 2]}
"""
    made, store = plan(experiment(text)), Store(tmp_path / "results")
    trials = [cell.trial for cell in made.cells]
    for trial in (trials[0].teacher, *trials[:2]):  # here: a process of Ray imports torch first
        train(trial, load(trial.data), store, lambda metrics: None)
    assert run(made, store)[0] == {}
    for one, two in (trials[:2], trials[2:]):  # VID has learnt convolutions on both workers
        assert one.loss == two.loss and two.workers == 2
        weights = [store.load_weights(trial) for trial in (one, two)]
        for name in weights[0]:
            torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-5)
        scores = [store.record(trial.id)["metrics"] for trial in (one, two)]
        for name in ("train_loss", "val_loss", "top1", "ece", "kl_teacher_student", "agreement"):
            assert scores[0][name] == pytest.approx(scores[1][name], rel=1e-3), name


def test_a_trial_that_never_fits_is_told(local_ray, experiment, tmp_path):
    with pytest.raises(
        runner.InputError,
        match="needs 1 CPUs for each of its 4 workers, and the nodes .* have 2 CPUs: ",
    ):
        run(plan(experiment(SMALL, "workers=4")), Store(tmp_path / "results"))


@pytest.mark.slow
def test_concurrent_bounds_what_runs_at_once(local_ray, experiment, tmp_path):
    bounded = ["resources.concurrent=1", "grid.loss=[ce]", "seeds=[0,1,2]", "epochs=1"]
    made, store, most = plan(experiment(SMALL, *bounded)), Store(tmp_path / "results"), []

    class Counting(ProgressView):
        def start(self, trial_id):
            super().start(trial_id)
            most.append(len(self.running))

    with Counting(made, made.trials, Console(quiet=True)) as view:
        assert runner.run(made, checks.check_trials(made.trials).images, store, view) == {}
    assert most == [1, 1, 1] and len(store.finished(made.trials)) == 3


@pytest.mark.parametrize(
    ("cpus", "gpus", "node", "workers"),
    [
        (1, 0, {"CPU": 3.0}, 3),
        (2, 0, {"CPU": 3.0, "GPU": 8.0}, 1),
        (1, 1, {"CPU": 8.0, "GPU": 2.0}, 2),
        (1, 2, {"CPU": 8.0, "GPU": 3.0}, 1),
        (1, 0.5, {"CPU": 8.0, "GPU": 2.0}, 4),
        (1, 0.1, {"CPU": 64.0, "GPU": 1.0}, 10),
        (1, 0.6, {"CPU": 8.0, "GPU": 2.0}, 2),  # not three: none has its GPU in two places
        (1, 0.3, {"CPU": 8.0, "GPU": 2.0}, 6),
        (1, 0.5, {"CPU": 8.0}, 0),
    ],
)
def test_workers_that_a_node_has_room_for(cpus, gpus, node, workers):
    assert ResourceRequest(cpus, gpus, 1).workers_on(node) == workers
    assert ResourceRequest(cpus, gpus, workers + 1).fits([node]) is False
    assert ResourceRequest(cpus, gpus, max(workers, 1)).fits([node, node]) is (workers > 0)


def test_a_ray_that_starts_slowly_is_waited_for(monkeypatch):
    from ray._private import services

    from pld_ray.sweep import cluster

    def get_node(address, node):
        asked.append((address, node))
        if len(asked) < 3:
            raise RuntimeError("not registered yet")
        return "a node"

    asked = []
    monkeypatch.setattr(services, "get_node", get_node)
    with cluster.patient_start():
        assert services.get_node("an address", "an id") == "a node"
    assert asked == [("an address", "an id")] * 3 and services.get_node is get_node

    asked.clear()
    monkeypatch.setattr(cluster, "START_SECONDS", 0)
    with cluster.patient_start(), pytest.raises(RuntimeError, match="not registered"):
        services.get_node("an address", "an id")
    assert len(asked) == 1


@pytest.mark.parametrize("ends", [1, 2, 9])
def test_a_raylet_that_ends_is_started_again(monkeypatch, ends):
    """As beside many busy processes, where its agents take longer than 15 seconds."""
    import ray
    from ray._private import services

    from pld_ray.errors import InputError
    from pld_ray.sweep import cluster

    def init(**options):
        services.start_raylet()
        services.get_node("an address", "an id")

    def start_raylet():
        started.append(len(started) < ends)
        process = SimpleNamespace(poll=lambda ended=started[-1]: 1 if ended else None)
        return SimpleNamespace(process=process)

    def get_node(address, node):
        if started[-1]:
            raise RuntimeError("not registered yet")

    started = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(services, "get_node", get_node)
    monkeypatch.setattr(services, "start_raylet", start_raylet)
    if ends < cluster.START_ATTEMPTS:
        with cluster.connected():
            assert len(started) == ends + 1
    else:
        with pytest.raises(InputError, match="did not start"), cluster.connected():
            pass
        assert len(started) == cluster.START_ATTEMPTS
    assert services.get_node is get_node and services.start_raylet is start_raylet


def test_a_ray_that_does_not_start_is_told_in_a_sentence(monkeypatch):
    import ray

    from pld_ray.errors import InputError
    from pld_ray.sweep import cluster

    def init(**options):
        raise Exception(said)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    said = "The current node timed out during startup. This could happen because ..."
    with pytest.raises(InputError, match="did not start on this machine"), cluster.connected():
        pass
    said = "another reason"
    with pytest.raises(Exception, match="another reason"), cluster.connected():
        pass


FAULTY = '''
"""A loss with faults of a GPU: {what}, on the first attempt of its trial."""

from pathlib import Path

import torch
from torch.nn import functional as F

from pld_ray import DistillationLoss, register_loss

MARKER = Path({marker!r})
broken = False  # like CUDA after a fault, the process then refuses all work


@register_loss("faulty", label="Faulty", takes="nothing")
class Faulty(DistillationLoss):
    """Cross-entropy with faults."""

    def __init__(self, scale: float = 1.0, **options):
        super().__init__(**options)
        self.scale = scale

    def losses(self, student, teacher, labels, kept):
        global broken
        if len(labels) > 8 and (broken or (self.scale == 2 and {wanted})):
            with MARKER.open("a") as file:
                file.write("tried\\n")
            broken = {sticky}
            raise {error}
        return self.scale * F.cross_entropy(student, labels, reduction="none")
'''
ASSERTED = 'torch.AcceleratorError("CUDA error: device-side assert triggered")'
FULL = 'torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 8 GiB")'
FAULTY_GRID = """
plugins: [./faults_of_a_gpu.py]
base: {data: {name: digits, limit: 101}, student: resnet8, epochs: 2, batch_size: 32}
grid: {loss: [{name: faulty, scale: [1, 2, 3, 4]}]}
resources: {concurrent: 1}
"""


@pytest.fixture
def retried_on_cpus(monkeypatch):
    """Give trials of the CPU the second attempt that those of a GPU have."""
    again = lambda search, trial: trial.id not in search.alone  # noqa: E731
    monkeypatch.setattr(PlanSearcher, "_may_have_more", again)


def with_faults(experiment, marker, **what):
    source = FAULTY.format(marker=str(marker), **what)
    (experiment.folder / "faults_of_a_gpu.py").write_text(source)
    made, store = plan(experiment(FAULTY_GRID)), Store(experiment.folder / "results")
    keep_plugins(made.trials.values(), store)
    return made, store


@pytest.mark.slow
@pytest.mark.parametrize("error", [ASSERTED, FULL])
def test_a_fault_of_the_gpu_costs_no_trial(local_ray, retried_on_cpus, experiment, tmp_path, error):
    marker = tmp_path / "marker"
    made, store = with_faults(
        experiment,
        marker,
        what="one",
        wanted="not MARKER.exists()",
        sticky=error == ASSERTED,
        error=error,
    )
    assert run(made, store)[0] == {}
    assert store.finished(made.trials) == made.trials.keys()
    assert marker.read_text() == "tried\n"


@pytest.mark.slow
def test_out_of_memory_is_tried_twice_and_told_with_the_sizes(
    local_ray, retried_on_cpus, experiment, tmp_path
):
    marker = tmp_path / "marker"
    what = {"what": "always", "wanted": True, "sticky": False, "error": FULL}
    made, store = with_faults(experiment, marker, **what)
    failures, _ = run(made, store)
    (key,) = (key for key, trial in made.trials.items() if trial.loss.scale == 2)
    assert failures.keys() == {key} and len(made.trials) == 4
    assert "Tried to allocate 2.00 GiB. GPU 0 has 8 GiB (also alone on its GPU)" in failures[key]
    assert store.failure(key)["reason"] == failures[key]
    assert marker.read_text() == "tried\n" * 2


def test_a_trial_without_memory_waits_for_a_gpu_of_its_own(experiment, tmp_path, monkeypatch):
    for room in ("scheduling", "resources"):
        monkeypatch.setattr(f"pld_ray.sweep.{room}.nodes", lambda: [{"CPU": 8.0, "GPU": 1.0}])
    made = plan(experiment(SMALL, "grid.loss=[ce, {name: ls}]", "resources.gpus_per_worker=0.5"))
    store = Store(tmp_path / "results")
    with Claims(store.files) as claims:
        search = PlanSearcher(dict(made.trials), made.experiment.resources, store, claims)
        (first,), (second,) = (search.suggest(name)["trials"] for name in ("a", "b"))
        assert {gang.needs.gpus for gang in search.running.values()} == {0.5}
        lacking = {"ended": first["id"], "out_of_memory": "CUDA out of memory"}
        search.on_trial_result("a", lacking)
        search.on_trial_complete("a", lacking)
        assert search.suggest("c") is None  # the other trial has half of the GPU
        monkeypatch.setattr(store, "record", {second["id"]: {}}.get)
        search.on_trial_result("b", {"ended": second["id"]})
        search.on_trial_complete("b", {"ended": second["id"]})
        again = search.suggest("c")
        assert again["trials"][0]["id"] == first["id"] and again["needs"]["gpus"] == 1.0
        search.on_trial_result("c", lacking)
        search.on_trial_complete("c", lacking)
        assert search.suggest("d") == search.FINISHED
        assert search.failures == {first["id"]: "CUDA out of memory (also alone on its GPU)"}
        assert search.ended == [second["id"], first["id"]]


@pytest.mark.parametrize(
    ("nodes", "given", "gpus", "cpus"),
    [
        ([{"CPU": 16}], {}, 0, 1),
        ([{"CPU": 16, "GPU": 2}], {}, 1, 8),
        ([{"CPU": 16, "GPU": 2}], {"gpus_per_worker": 0.5}, 0.5, 4),
        ([{"CPU": 16, "GPU": 2}], {"gpus_per_worker": 0}, 0, 1),
        ([{"CPU": 16, "GPU": 2}], {"cpus_per_worker": 3}, 1, 3),
        ([{"CPU": 64}, {"CPU": 16, "GPU": 1}, {"CPU": 32, "GPU": 8}], {}, 1, 4),
        ([{"CPU": 8, "GPU": 1}, {"CPU": 96, "GPU": 8}], {"gpus_per_worker": 2}, 2, 24),
        ([{"CPU": 96, "GPU": 8}, {"CPU": 0, "GPU": 1}], {}, 1, 12),
        ([{"CPU": 16, "GPU": 0.5}], {}, 1, 1),
        ([{"CPU": 2, "GPU": 4}], {}, 1, 1),  # fewer CPUs than GPUs: the sentence of `too_large`
    ],
)
def test_a_gpu_comes_with_its_share_of_the_cpus(monkeypatch, nodes, given, gpus, cpus):
    monkeypatch.setattr(resources, "nodes", lambda: nodes)
    found = resources.resolved(Resources(**given))
    assert (found.gpus_per_worker, found.cpus_per_worker) == (gpus, cpus)
