"""The registry of losses: one class in one file is all that a loss needs."""

import inspect
import subprocess
import sys
from typing import Annotated, Literal, Unpack

import pytest
import torch
from pydantic import Field

import pld_ray
from pld_ray import losses
from pld_ray.config.planning import plan
from pld_ray.config.trial import Trial
from pld_ray.data.datasets import load
from pld_ray.distill.loop import train
from pld_ray.errors import InputError
from pld_ray.losses import REGISTRY, create_loss, register_loss, registry
from pld_ray.losses.common import DistillationLoss, Options
from pld_ray.store.store import Store


@pytest.mark.parametrize("name", REGISTRY)
def test_what_is_read_from_the_source_is_what_the_class_says(name):
    params = REGISTRY[name]
    loss = create_loss(params(name=name))
    fields = registry._fields(type(loss))
    live = registry._describe(
        name, params.label, params.takes, params.source, inspect.getdoc(type(loss)), fields
    )
    assert params.model_json_schema() == live.model_json_schema()
    assert list(params.model_fields) == ["name", *fields]
    assert params.__doc__ == inspect.getdoc(type(loss)) != ""
    assert params.source == f"{type(loss).__module__}:{type(loss).__name__}"
    assert type(loss).name == name
    assert params.needs_features == isinstance(loss, losses.FeatureLoss)
    assert params.takes_samples == getattr(loss, "takes_samples", False)


def test_importing_a_loss_changes_nothing_in_the_registry():
    before = dict(REGISTRY)
    for name in registry.public_names():
        getattr(losses, name)
    assert before == REGISTRY


@pytest.fixture
def huber():
    @register_loss("huber", label="Huber")
    class HuberLoss(DistillationLoss):
        """Huber distance of the logits."""

        def __init__(
            self,
            delta: Annotated[float, Field(gt=0)] = 1.0,
            over: Literal["sum", "mean"] = "sum",
            **options: Unpack[Options],
        ) -> None:
            super().__init__(**options)
            self.delta = delta
            self.over = over

        def losses(self, student, teacher, labels, kept):
            apart = torch.nn.functional.huber_loss(
                student, teacher, reduction="none", delta=self.delta
            )
            return apart.sum(1) if self.over == "sum" else apart.mean(1)

    yield HuberLoss
    del REGISTRY["huber"], registry.CLASSES["huber"]


TEXT = """
base:
  data: {name: digits, limit: 64}
  student: resnet8
  teacher: {name: resnet8, train: {epochs: 1}}
  epochs: 1
grid: {loss: [{name: huber, delta: [1, 2]}]}
"""


def test_one_class_is_a_loss_in_yaml_and_python(huber, experiment, tmp_path):
    trials = [cell.trial for cell in plan(experiment(TEXT)).cells]
    assert [trial.loss.model_dump() for trial in trials] == [
        {"name": "huber", "delta": delta, "over": "sum"} for delta in (1.0, 2.0)
    ]
    assert trials[0].id != trials[1].id
    assert Trial.model_validate_json(trials[1].model_dump_json()).id == trials[1].id
    assert trials[1].label == "huber delta 2 resnet8 seed 0"
    loss = create_loss(trials[1].loss)
    s, t = torch.tensor([[0.0, 5.0]]), torch.tensor([[1.0, 0.0]])
    # delta 2: 1 / 2 for the first class, 2 (5 - 1) for the second
    assert loss(s, t, torch.tensor([0])).item() == pytest.approx(0.5 + 8.0)
    store = Store(tmp_path)
    train(trials[0].teacher, load(trials[0].data), store, lambda metrics: None)
    train(trials[0], load(trials[0].data), store, lambda metrics: None)
    assert store.record(trials[0].id)["metrics"]["train_loss"] > 0


def test_its_parameters_are_checked_everywhere(huber, experiment):
    with pytest.raises(ValueError, match="huber: delta is -1: Input should be greater than 0"):
        huber(delta=-1)
    with pytest.raises(InputError, match=r"loss\.delta is 0: input should be greater than 0"):
        plan(experiment(TEXT.replace("[1, 2]", "0")))
    with pytest.raises(InputError, match=r"loss\.dleta: unknown field; did you mean 'delta'\?"):
        plan(experiment(TEXT.replace("delta:", "dleta:")))
    with pytest.raises(InputError, match=r"loss: unknown loss 'hubr'; did you mean 'huber'"):
        plan(experiment(TEXT.replace("huber", "hubr")))
    with pytest.raises(InputError, match=r"loss\.over is 'max'; accepted: mean, sum"):
        plan(experiment(TEXT.replace("delta: [1, 2]", "over: max")))
    assert huber(2).delta == huber(delta="2").delta == 2.0


def test_names_are_unique_and_arguments_annotated(huber):
    with pytest.raises(ValueError, match="loss 'kd': pld_ray.losses.divergence:KDLoss has this"):
        register_loss("kd", label="KD")(type("Other", (DistillationLoss,), {}))

    class Bare(DistillationLoss):
        def __init__(self, delta=1.0):
            super().__init__()

    with pytest.raises(ValueError, match="Bare: argument 'delta' has no annotation"):
        register_loss("bare", label="Bare")(Bare)
    assert "bare" not in REGISTRY


def test_a_plan_imports_no_torch():
    code = "import sys, pld_ray.config.planning as p; from pld_ray.config.experiment import "
    code += "load_experiment; p.plan(load_experiment('cifar100_methods')); "
    code += "print({'torch', 'ray', 'timm'} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


@pytest.mark.parametrize("name", pld_ray.__all__)
def test_public_names_resolve(name):
    assert getattr(pld_ray, name).__doc__


def test_a_loss_is_created_by_its_name_or_by_its_settings():
    by_name = create_loss("kd", temperature=2, reduction="sum")
    by_settings = create_loss(REGISTRY["kd"](name="kd", temperature=2), reduction="sum")
    logits = torch.randn(3, 5), torch.randn(3, 5), torch.arange(3)
    assert by_name(*logits) == by_settings(*logits) != create_loss("kd")(*logits)
    with pytest.raises(ValueError, match="unknown loss 'kdd'.*kd"):
        create_loss("kdd")
    with pytest.raises(ValueError, match=r"kd: temperature is 0"):
        create_loss("kd", temperature=0)


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("cc", {"weight": True}, "cc: .*weight is True: expected a number"),
        ("sdd", {"ce_weight": False}, "sdd: .*ce_weight is False: expected a number"),
        ("mlkd", {"temperatures": [2, True]}, "mlkd: .*temperatures has True: expected numbers"),
        ("sdd", {"scales": 9}, "sdd: scales is 9: Input should be less than or equal to 8"),
    ],
)
def test_a_switch_or_a_size_that_no_machine_has_is_not_a_number(name, given, said):
    with pytest.raises(ValueError, match=said):
        create_loss(name, **given)


def test_losses_on_features_have_no_options_of_losses_on_logits():
    with pytest.raises(TypeError, match="unexpected keyword argument 'ignore_index'"):
        create_loss("nst", ignore_index=0)
