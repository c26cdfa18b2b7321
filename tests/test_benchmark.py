"""The benchmark of the field: counts, settings of each pair and shared teachers, by hand."""

from collections import Counter

import pytest

from analysis.records import frames
from pld_ray.config.experiment import load_experiment
from pld_ray.config.planning import plan
from pld_ray.store.store import Store

HOMOGENEOUS = {  # beta of DKD
    ("wrn_40_2", "wrn_16_2"): 6,
    ("wrn_40_2", "wrn_40_1"): 6,
    ("resnet56", "resnet20"): 2,
    ("resnet110", "resnet20"): 2,
    ("resnet110", "resnet32"): 2,
    ("resnet32x4", "resnet8x4"): 8,
    ("vgg13_cifar", "vgg8_cifar"): 6,
}
HETEROGENEOUS = {  # beta of DKD, learning rate
    ("vgg13_cifar", "mobilenetv2_cifar"): (6, 0.01),
    ("resnet50_cifar", "mobilenetv2_cifar"): (8, 0.01),
    ("resnet50_cifar", "vgg8_cifar"): (8, 0.05),
    ("resnet32x4", "shufflenetv1"): (8, 0.01),
    ("resnet32x4", "shufflenetv2"): (8, 0.01),
    ("wrn_40_2", "shufflenetv1"): (8, 0.01),
}
PUBLISHED = {  # parameters of mdistiller, RepDistiller, DIST, cls_KD and TTM
    "kd": {"temperature": 4, "ce_weight": 0.1},
    "fitnet": {"stage": 2, "weight": 100, "ce_weight": 1},
    "at": {"weight": 1000, "ce_weight": 1},
    "sp": {"weight": 3000, "ce_weight": 1},
    "vid": {"weight": 1, "ce_weight": 1, "initial_variance": 5, "eps": 1e-5},
    "rkd": {"distance_weight": 25, "angle_weight": 50, "ce_weight": 1},
    "pkt": {"weight": 30000, "ce_weight": 1},
    "dist": {"temperature": 4, "ce_weight": 1, "beta": 2, "gamma": 2},
    "dkd": {"temperature": 4, "ce_weight": 1, "alpha": 1, "warmup_epochs": 20},
    "nkd": {"temperature": 3, "ce_weight": 1, "gamma": 3.5},
    "ttm": {"temperature": 10, "ce_weight": 1, "beta": 45},
    "wttm": {"temperature": 5, "ce_weight": 1, "beta": 4},
    "cc": {"weight": 0.02, "form": "differences", "dim": 128, "ce_weight": 1},
    "nst": {"weight": 50, "ce_weight": 1},
    "kdsvd": {"weight": 1, "vectors": 1, "over": "columns", "ce_weight": 1},
    "crd": {
        **{"weight": 0.8, "negatives": 16384, "temperature": 0.07, "momentum": 0.5, "dim": 128},
        "ce_weight": 1,
    },
    "ofd": {"weight": 1e-3, "ce_weight": 1},
    "reviewkd": {"warmup_epochs": 20, "student_preact": False, "ce_weight": 1},
    "srrl": {"weight": 1, "ce_weight": 1, "kd_weight": 1},
    "simkd": {"factor": 2, "weight": 1, "ce_weight": 0},
    "ctkd": {"ce_weight": 0.1, "beta": 0.9, "lowest": 1, "span": 20, "curriculum_epochs": 10},
    "mlkd": {"ce_weight": 0.1, "kd_weight": 0.9, "temperatures": (4, 3, 5, 2, 6)},
    "sdd": {"base": "kd", "temperature": 4},
    "pld": {"temperature": 4},
}
REVIEW = {  # weights of ReviewKD by its authors
    **{("wrn_40_2", "wrn_16_2"): 5, ("wrn_40_2", "wrn_40_1"): 5, ("resnet56", "resnet20"): 0.6},
    **{("resnet110", "resnet32"): 1, ("resnet32x4", "resnet8x4"): 5},
    **{("resnet32x4", "shufflenetv1"): 5, ("resnet32x4", "shufflenetv2"): 8},
    ("wrn_40_2", "shufflenetv1"): 5,
}
NAMES = ("benchmark_homogeneous", "benchmark_heterogeneous")


@pytest.fixture(scope="module")
def plans():
    return [plan(load_experiment(name)) for name in NAMES]


def pair_of(cell):
    return cell.teacher, cell.trial.student.name


def methods(made):
    return len({cell.trial.loss.name for cell in made.cells})


def test_counts(plans):
    one, other = plans
    n = methods(one)  # more methods can be added
    assert n == methods(other) >= 1 + len(PUBLISHED)
    assert len(one.cells) == n * 7 * 3 and len(other.cells) == n * 6 * 3
    assert one.teacher_ids & other.teacher_ids and len(one.teacher_ids) == 5
    assert len(other.teacher_ids) == 4 and len(one.teacher_ids | other.teacher_ids) == 6
    # CE needs no teacher: 6 and 4 students
    assert len(one.trials) == 5 + (n - 1) * 7 * 3 + 6 * 3
    assert len(other.trials) == 4 + (n - 1) * 6 * 3 + 4 * 3
    # shared: wrn_40_2, resnet32x4 and vgg13 as teachers, vgg8 with CE
    assert len(one.trials.keys() & other.trials.keys()) == 3 + 3


def test_teachers_are_those_of_the_other_cifar_100_experiments(plans):
    trained = {
        trial.student.name: key
        for made in plans
        for key, trial in made.trials.items()
        if key in made.teacher_ids
    }
    for name in ("cifar100_methods", "cifar100_sgd", "runtime"):
        other = plan(load_experiment(name))
        assert len(other.teacher_ids) == 4 and other.teacher_ids < set(trained.values())
    for made in plans:
        for key in made.teacher_ids:
            teacher = made.trials[key]
            assert (teacher.optimizer.lr, teacher.loss.name, teacher.seed) == (0.05, "ce", 0)


def test_every_trial_has_the_common_recipe(plans):
    for trial in (trial for made in plans for trial in made.trials.values()):
        assert (trial.epochs, trial.batch_size, trial.data.name) == (240, 64, "cifar100")
        assert (trial.data.pad, trial.data.flip, trial.data.augment) == (4, True, ())
        optimizer, schedule = trial.optimizer, trial.schedule
        assert (optimizer.name, optimizer.momentum) == ("momentum", 0.9)  # without Nesterov
        assert optimizer.weight_decay == 5e-4
        assert (schedule.name, schedule.milestones) == ("multistep", (150, 180, 210))
        assert schedule.decay_rate == 0.1


def test_what_rules_set_by_pair(plans):
    wanted = {pair: (beta, 0.05) for pair, beta in HOMOGENEOUS.items()} | HETEROGENEOUS
    counts = Counter(pair_of(cell) for made in plans for cell in made.cells)
    assert set(counts) == set(wanted) and set(counts.values()) == {methods(plans[0]) * 3}
    for cell in (cell for made in plans for cell in made.cells):
        beta, rate = wanted[pair_of(cell)]
        assert cell.trial.optimizer.lr == rate, pair_of(cell)
        if cell.trial.loss.name == "dkd":
            assert cell.trial.loss.beta == beta, pair_of(cell)
        if cell.trial.loss.name == "reviewkd" and pair_of(cell) in REVIEW:
            assert cell.trial.loss.weight == REVIEW[pair_of(cell)], pair_of(cell)


def test_settings_of_methods_are_the_published_ones(plans):
    for loss in (cell.trial.loss for made in plans for cell in made.cells):
        for field, value in PUBLISHED.get(loss.name, {}).items():
            assert getattr(loss, field) == value, (loss.name, field)


def test_each_method_is_one_row(plans, tmp_path):
    small = [plan(load_experiment(name, smoke=True)) for name in NAMES]
    for made in (*plans, *small):
        rows = frames.frame(made, Store(tmp_path))
        assert set(rows["method"]) == {cell.trial.loss.label for cell in made.cells}
        assert set(rows["setting"]) == {""}
        assert set(rows.loc[rows["reference"], "method"]) == {"PLD"}


def test_dot_has_all_pairs_and_shares_kd_with_sgd(plans):
    made = plan(load_experiment("benchmark_dot"))
    assert {pair_of(cell) for cell in made.cells} == HOMOGENEOUS.keys() | HETEROGENEOUS.keys()
    new = made.trials.keys() - plans[0].trials.keys() - plans[1].trials.keys()
    assert len(made.cells) == 13 * 2 * 3 and len(made.trials) == 6 + 13 * 2 * 3
    assert new == {cell.trial.id for cell in made.cells if cell.trial.optimizer.name == "dot"}
    assert len(new) == 13 * 3
    rates = {(made.trials[key].optimizer.lr, made.trials[key].student.name[:2]) for key in new}
    mobile = {(0.01, "mo"), (0.01, "sh")}
    assert rates == mobile | {(0.05, "wr"), (0.05, "re"), (0.05, "vg")}
    assert {made.trials[key].optimizer.args.get("delta", 0.075) for key in new} == {0.075}


def test_imagenet():
    made = plan(load_experiment("benchmark_imagenet"))
    pairs = {
        ("resnet34.tv_in1k", "resnet18"): 0.5,
        ("resnet50.tv_in1k", "mobilenetv1_100"): 2,
    }
    n = methods(made)
    assert {pair_of(cell) for cell in made.cells} == set(pairs)
    assert len(made.cells) == len(made.trials) == 2 * n and not made.teacher_ids
    for cell in made.cells:
        trial = cell.trial
        assert (trial.epochs, trial.batch_size, trial.workers) == (100, 512, 8)
        assert (trial.optimizer.name, trial.optimizer.lr) == ("momentum", 0.2)
        assert trial.optimizer.weight_decay == 1e-4
        assert trial.schedule.milestones == (30, 60, 90) and trial.schedule.decay_rate == 0.1
        assert (trial.data.image_size, trial.data.crop_pct) == (224, 224 / 256)
        if trial.loss.name != "ce":
            assert trial.teacher.weights == "pretrained"
        if trial.loss.name == "dkd":
            assert trial.loss.beta == pairs[pair_of(cell)]
            assert (trial.loss.temperature, trial.loss.warmup_epochs) == (1, 1)
        if trial.student.name == "mobilenetv1_100":
            assert trial.student.args == {"act_layer": "relu"}
    by_name = {cell.trial.loss.name: cell.trial.loss for cell in made.cells}
    assert (by_name["kd"].temperature, by_name["kd"].ce_weight) == (1, 0.5)
    assert (by_name["nkd"].temperature, by_name["nkd"].gamma) == (1, 1.5)


@pytest.mark.parametrize("name", NAMES)
def test_a_pair_and_methods_of_the_benchmark(name):
    pair, methods = "vgg13:*", ["dkd", "pld"]
    made = plan(load_experiment(name, {"pairs": [pair], "methods": methods}))
    assert len(made.cells) == 2 * 3 and len(made.trials) == 1 + 2 * 3
    assert [cell.trial.loss.beta for cell in made.cells[:3]] == [6] * 3
