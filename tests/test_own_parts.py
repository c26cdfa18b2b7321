"""Optimizers, schedules and metrics from plug-ins, against hand-computed values."""

import numpy as np
import pytest
import torch

from analysis.records import frames
from analysis.tables import comparison, comparison_printing
from pld_ray import plugins
from pld_ray.config.parts import Schedule
from pld_ray.config.planning import plan
from pld_ray.config.registry import register_metric
from pld_ray.data.datasets import load
from pld_ray.distill.loop import train
from pld_ray.distill.optimization import create_schedule
from pld_ray.distill.running import TrainingError
from pld_ray.errors import InputError
from pld_ray.store.store import Store
from pld_ray.sweep.checks import check_trials

PARTS = """
from typing import Annotated
import torch
from pydantic import Field
from pld_ray import register_metric, register_optimizer, register_schedule

@register_optimizer("half_sgd")
def half_sgd(params, lr, weight_decay, momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9):
    "SGD with half of the learning rate."
    return torch.optim.SGD(params, lr / 2, momentum, weight_decay=weight_decay)

@register_schedule("triangle")
def triangle(progress, peak: Annotated[float, Field(gt=0, lt=1)] = 0.5):
    "Up to the peak, then down to 0."
    return min(progress / peak, (1 - progress) / (1 - peak))

@register_metric("brier")
def brier(student, labels, teacher):
    "The Brier score."
    right = torch.nn.functional.one_hot(labels, student.shape[1])
    return (student.softmax(1) - right).square().sum(1)

@register_metric("distance")
def distance(student, labels, teacher):
    return labels * 0.0 if teacher is None else (student - teacher).square().sum(1)
"""
YAML = """
plugins: [own_parts_here.py]
base:
  data: {name: digits, limit: 60}
  student: resnet8
  teacher: {name: resnet8, logits: float32, train: {epochs: 1}}
  optimizer: {name: half_sgd, lr: 0.1, args: {momentum: 0.5}}
  schedule: {name: triangle, args: {peak: 0.25}}
  metrics: [brier, distance]
  epochs: 2
  batch_size: 30
grid: {loss: [ce, kd]}
"""


@pytest.fixture
def parts(experiment):
    (experiment.folder / "own_parts_here.py").write_text(PARTS)
    return lambda *overrides: plan(experiment(YAML, *overrides))


def test_a_trial_with_own_parts(parts, tmp_path):
    made, store = parts(), Store(tmp_path / "results")
    assert all(cell.trial.plugins for cell in made.cells)
    check_trials(made.trials)
    for trial in made.trials.values():
        train(trial, load(trial.data), store, lambda metrics: None)
    ce, kd = (store.record(cell.trial.id)["metrics"] for cell in made.cells)
    assert 0 < ce["brier"] < 2 and ce["distance"] == 0 < kd["distance"]
    assert "brier" not in store.record(kd_teacher(made).id)["metrics"]
    table = comparison.comparison(frames.frame(made, store)).set_index("method")
    assert table.loc["KD", "brier"] == kd["brier"]
    cells = comparison_printing.printed(table.reset_index())
    assert list(cells.columns[-4:]) == ["brier", "distance", "Seconds", "n"]


def kd_teacher(made):
    return made.cells[1].trial.teacher


def test_the_metric_is_the_mean_over_the_validation_images(parts, tmp_path):
    from pld_ray.models.export import load_student

    (cell, _), store = parts("grid.loss=[ce, kd]").cells, Store(tmp_path / "results")
    images = load(cell.trial.data)
    train(cell.trial, images, store, lambda metrics: None)
    record = store.record(cell.trial.id)
    network = load_student(cell.trial, store)
    x = torch.as_tensor(images.val).float().permute(0, 3, 1, 2) / 255
    x = (x - record["data"]["mean"][0]) / record["data"]["std"][0]
    with torch.no_grad():
        p = network(x).double().softmax(1).numpy()
    p[np.arange(len(p)), images.val_labels] -= 1
    assert record["metrics"]["brier"] == pytest.approx((p**2).sum(1).mean(), rel=1e-4)


def test_the_learning_rates_by_hand(parts):
    parts()
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], 0.8)
    settings = {"name": "triangle", "args": {"peak": 0.25}, "min_lr": 0.05}
    schedule = create_schedule(Schedule(**settings), optimizer, epochs=2, steps=4)
    rates = []
    for step in range(8):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    # progress k/8: up to 1 at 2/8, then down by 1/6 each
    by_hand = [0.05, 0.4, 0.8, 0.8 * 5 / 6, 0.8 * 4 / 6, 0.4, 0.8 * 2 / 6, 0.8 / 6]
    assert rates == pytest.approx(by_hand)
    optimizer.param_groups[0]["lr"] = 0.8
    warm = Schedule(**settings, warmup_epochs=1, warmup_lr=0.4)
    schedule = create_schedule(warm, optimizer, epochs=2, steps=4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4)
    schedule.step_update(3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4 + 0.4 * 3 / 4)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.args={momentum: 2}", "optimizer.args: momentum is 2: input should be less"),
        ("optimizer.args={mometum: 0.5}", "optimizer.args: mometum: unknown field; did you mean"),
        ("schedule.args={peak: 1}", "peak is 1: input should be less than 1"),
        ("schedule={name: triangel, args: {}}", "name is 'triangel'; did you mean 'triangle'"),
        ("schedule={name: cosine, args: {peak: 0.5}}", "args: only for a schedule in a plug-in"),
        ("metrics=[brierr]", "metrics has 'brierr', which is not registered; did you mean 'brier'"),
    ],
)
def test_wrong_arguments_are_told_before_ray(parts, override, expected):
    with pytest.raises(InputError) as refused:
        check_trials(parts(override).trials)
    assert expected in str(refused.value)


def test_metrics_of_the_wrong_shape_are_told_before_ray(parts, experiment):
    file = experiment.folder / "own_parts_here.py"
    file.write_text(PARTS.replace(".square().sum(1)", ".square().sum()"))
    with pytest.raises(InputError, match=r"brier returns \[\]: expected a tensor with one real"):
        check_trials(parts().trials)
    file.write_text(PARTS.replace("right =", "raise KeyError('x')  #"))
    with pytest.raises(
        InputError, match=r"metric brier: own_parts_here.py, line \d+: KeyError: 'x'"
    ):
        check_trials(parts().trials)


def test_an_edit_makes_only_those_trials_new_that_use_the_plugin(parts, experiment):
    before = parts()
    file = experiment.folder / "own_parts_here.py"
    file.write_text(PARTS.replace("lr / 2", "lr / 3"))
    assert not before.trials.keys() & parts().trials.keys()
    plain = ["optimizer={name: adamw, args: {}}", "schedule={name: cosine, args: {}}", "metrics=[]"]
    after = parts(*plain)
    file.write_text(PARTS)
    assert parts(*plain).trials.keys() == after.trials.keys()


def test_list_shows_them(parts, experiment, cli):
    plugin = experiment.folder / "own_parts_here.py"
    plugin.write_text(PARTS)
    for kind, name, said in (
        ("optimizers", "half_sgd", "momentum = 0.9 (at least 0, below 1)"),
        ("schedules", "triangle", "peak = 0.5 (above 0, below 1)"),
        ("metrics", "brier", "The Brier score."),
    ):
        shown = cli("list", kind, name, "--plugin", plugin, cwd=experiment.folder).stdout
        assert shown.startswith(name) and said in shown


# ---------------------------------------------------------------- what must not pass

SGD, MIN = "return torch.optim.SGD(params", "return min("


def run(made, store):
    for trial in made.trials.values():
        train(trial, load(trial.data), store, lambda metrics: None)


def test_a_metric_that_is_not_finite_ends_the_trial(parts, experiment, tmp_path):
    file, store = experiment.folder / "own_parts_here.py", Store(tmp_path / "results")
    file.write_text(PARTS.replace("student.softmax(1) - right", "student.softmax(1) / (0 * right)"))
    made = parts("grid.loss=[ce]")
    with pytest.raises(TrainingError, match="the metric brier is inf after epoch 1"):
        run(made, store)
    assert store.record(made.cells[0].trial.id) is None


def test_a_metric_cannot_change_the_logits_of_others(parts, experiment, tmp_path):
    file, plain = experiment.folder / "own_parts_here.py", Store(tmp_path / "plain")
    run(before := parts(), plain)
    file.write_text(
        PARTS.replace("return labels", "student.mul_(0); labels.mul_(0); return labels")
    )
    run(after := parts(), changed := Store(tmp_path / "changed"))
    for one, other in zip(before.cells, after.cells, strict=True):
        metrics = [s.record(c.trial.id)["metrics"] for s, c in ((plain, one), (changed, other))]
        for name in ("top1", "val_loss", "brier"):
            assert metrics[0][name] == metrics[1][name]


@pytest.mark.parametrize(
    "name", ["seed", "n", "id", "method", "my_seconds", "a_std", "A", "a|b", ""]
)
def test_names_of_metrics_that_tables_use_are_refused(name):
    with pytest.raises(ValueError, match="metric"):
        register_metric(name)(lambda student, labels, teacher: labels)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (SGD, "torch.optim.SGD(params", "half_sgd returns a NoneType"),
        (SGD, f"raise KeyError('x')\n    {SGD}", "own_parts_here.py, line 10: KeyError: 'x'"),
        (SGD, f"params = params[0]['params'][:1]\n    {SGD}", "half_sgd has other parameters"),
        (SGD, f"return Lazy(params)\n    {SGD}", "half_sgd: its step: TypeError"),
        ("half_sgd", "adamw", "timm has this name"),
        (MIN, f"return float('nan')\n    {MIN}", "triangle returns nan at progress 0: expected"),
        (MIN, f"return 'high'\n    {MIN}", "triangle returns 'high' at progress 0"),
        (MIN, "return -min(", "triangle returns -0.04 at progress 0.01"),
        (MIN, f"return {{}}[0]\n    {MIN}", "own_parts_here.py, line 15: KeyError: 0"),
    ],
)
def test_optimizers_and_schedules_are_tried_before_ray(parts, experiment, old, new, expected):
    lazy = "class Lazy(torch.optim.SGD):\n    def step(self, closure): pass\n"
    (experiment.folder / "own_parts_here.py").write_text(PARTS.replace(old, new) + lazy)
    override = ["optimizer.name=adamw"] if new == "adamw" else []
    with pytest.raises(InputError) as refused:
        check_trials(parts(*override).trials)
    assert expected in str(refused.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "optimizer.momentum=0.5",
            "momentum is 0.5: half_sgd is from a plug-in and does not get it",
        ),
        ("optimizer.betas=[0.9]", "betas is (0.9,): half_sgd is from a plug-in"),
        ("schedule.decay_rate=0.5", "decay_rate is 0.5: triangle is from a plug-in"),
        ("metrics=[brier, brier]", "expected each metric once"),
    ],
)
def test_fields_that_would_do_nothing_are_refused(parts, override, expected):
    with pytest.raises(InputError) as refused:
        parts(override)
    assert expected in str(refused.value)


def test_a_name_that_a_newer_version_gives_up_is_not_its_any_more(parts, experiment):
    file = experiment.folder / "own_parts_here.py"
    file.write_text(PARTS.replace("half_sgd", "adamw"))
    parts("optimizer.name=adamw")
    file.write_text(PARTS)
    parts()
    assert ("optimizer", "adamw") not in plugins.PROVIDED
    assert ("optimizer", "half_sgd") in plugins.PROVIDED


def test_what_does_not_matter_does_not_change_the_id(parts, experiment):
    def ids(*overrides):
        return list(parts(*overrides).trials)

    without = plan(experiment(YAML.replace(", args: {momentum: 0.5}", "")))
    assert list(without.trials) == ids("optimizer.args={momentum: 0.9}")
    assert ids() == ids("optimizer.args={momentum: '0.5'}") == ids("metrics=[distance, brier]")
    assert ids() != ids("optimizer.args={momentum: 0.6}")
    assert kd_teacher(parts("metrics=[]")).id == kd_teacher(parts()).id  # the teacher has none


def test_a_plugin_that_ends_the_program_is_bad_input(tmp_path, cli):
    code = "from pld_ray import register_dataset\n\n"
    code += '@register_dataset("ends_here")\ndef ends_here(data, path):\n    raise SystemExit(0)\n'
    (tmp_path / "ends.py").write_text(code)
    text = "plugins: [ends.py]\nbase: {data: ends_here, student: resnet8, epochs: 1, loss: ce}\n"
    (tmp_path / "x.yaml").write_text(text)
    done = cli("run", "x.yaml", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "pld-ray: ends.py, line 5: SystemExit: expected a plug-in that does not end the program\n"
    )
