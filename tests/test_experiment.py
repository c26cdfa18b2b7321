import hashlib
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pld_ray.config.experiment import load_experiment
from pld_ray.config.parts import Weights
from pld_ray.config.planning import plan
from pld_ray.config.trial import Trial, canonical
from pld_ray.errors import InputError
from pld_ray.losses import REGISTRY

BASE = {"data": "digits", "student": "resnet8", "loss": "ce", "epochs": 3}


def trial(**fields):
    return Trial.model_validate(BASE | fields)


SMALL = """
base: {data: digits, student: resnet8, epochs: 2, teacher: resnet20}
grid:
  loss: [ce, {name: kd, temperature: [1, 4]}, pld]
seeds: [0, 1]
"""


def test_id_is_the_hash_of_what_was_said():
    text = (
        '{"data":{"name":"digits"},"epochs":3,"format":1,"loss":{"name":"ce"},'
        '"student":{"name":"resnet8"}}'
    )
    assert trial().id == hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("seed", [0, 7])
def test_the_id_of_every_setting_and_seed(seed):
    """The hash of the whole canonical form as JSON with sorted keys."""
    own = {"name": "resnet8", "args": {"seed": 3, "a": {"zoo": [1, "x"]}}}
    fields = {"teacher": trial(workers=2, seed=5), "loss": "kd", "student": own, "ema": 0.5}
    some = trial(**fields, batch_size=64, views=2, schedule={"name": "step"}, seed=seed)
    for found in (some, some.with_seed(11).with_seed(seed)):
        text = json.dumps(canonical(some), sort_keys=True, separators=(",", ":"))
        assert found.id == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_id_is_stable_across_forms_of_the_same_spec():
    pld = {"name": "pld", "temperature": 2}
    teacher = Weights(name="resnet20", weights="pretrained")
    one = trial(loss=pld, teacher=teacher, student={"name": "resnet8", "args": {"x": 1.0}})
    same = Trial.model_validate(
        {
            "epochs": 3.0,
            "student": {"args": {"x": 1}, "name": "resnet8"},
            "loss": {"temperature": 2.0, "standardize": "none", "name": "pld"},
            "optimizer": {"name": "adamw", "lr": 0.001},
            "data": {"name": "digits", "pad": 0, "root": "/elsewhere"},
            "teacher": {"name": "resnet20", "weights": "pretrained"},
            "seed": 0,
        }
    )
    assert one.id == same.id
    assert Trial.model_validate_json(one.model_dump_json()).id == one.id
    for changed in ({"seed": 1}, {"epochs": 4}, {"loss": {"name": "pld", "temperature": 3}}):
        assert Trial.model_validate(one.model_dump() | changed).id != one.id


def test_id_does_not_depend_on_the_process():
    code = f"from pld_ray.config.trial import Trial; print(Trial.model_validate({BASE!r}).id)"
    for seed in ("1", "2"):
        out = subprocess.check_output([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed})
        assert out.decode().strip() == trial().id


@given(st.permutations(list(BASE)))
def test_id_does_not_depend_on_key_order(keys):
    assert Trial.model_validate({key: BASE[key] for key in keys}).id == trial().id


def test_a_weights_file_is_known_by_its_content(experiment, tmp_path):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "c.safetensors"]
    for path, content in zip(paths, (b"one", b"one", b"two"), strict=True):
        path.write_bytes(content)
    ids = []
    for path in paths:
        made = experiment(SMALL, f"teacher.weights={path}", "loss=pld", "seeds=[0]")
        ids.append({cell.trial.id for cell in plan(made).cells})
    assert ids[0] == ids[1] != ids[2]


def test_expansion(experiment):
    made = plan(experiment(SMALL))
    losses = [(c.trial.loss.name, getattr(c.trial.loss, "temperature", None)) for c in made.cells]
    assert losses == [("ce", None)] * 2 + [("kd", 1)] * 2 + [("kd", 4)] * 2 + [("pld", 1)] * 2
    assert [c.trial.seed for c in made.cells] == [0, 1] * 4
    assert len(made.trials) == 9
    first = next(iter(made.trials.values()))
    assert first.student.name == "resnet20" and first.loss.name == "ce" and first.seed == 0
    assert made.teacher_ids == {first.id}
    assert made.cells[0].trial.teacher is None and made.cells[0].teacher == "resnet20"
    assert all(c.trial.teacher == first for c in made.cells[2:])


def test_trials_said_twice_are_planned_once(experiment):
    made = plan(experiment(SMALL, "grid.loss=[ce, ce, {name: ce}]"))
    assert len(made.cells) == 6 and len(made.trials) == 2


def test_pairs_vary_together(experiment):
    text = """
base: {data: digits, epochs: 2, loss: pld}
grid:
  teacher, student: [[resnet20, resnet8], [wrn_40_2, wrn_40_1]]
  optimizer.lr: [0.1, 0.2]
"""
    made = plan(experiment(text))
    seen = [(c.teacher, c.trial.student.name, c.trial.optimizer.lr) for c in made.cells]
    pairs = [("resnet20", "resnet8"), ("wrn_40_2", "wrn_40_1")]
    assert seen == [(*pair, lr) for pair in pairs for lr in (0.1, 0.2)]
    # the grid varies the student: both learning rates learn from one teacher
    assert len(made.teacher_ids) == 2
    assert {t.optimizer.lr for t in made.trials.values() if t.id in made.teacher_ids} == {0.001}


def test_overrides(experiment):
    made = plan(experiment(SMALL, "loss.temperature=2", "epochs=5", "seeds=[7]"))
    kinds = [(c.trial.loss.name, getattr(c.trial.loss, "temperature", None)) for c in made.cells]
    assert kinds == [("ce", None), ("kd", 2), ("kd", 2), ("pld", 2)]
    assert {t.epochs for t in made.trials.values()} == {5}
    assert {c.trial.seed for c in made.cells} == {7}
    made = plan(experiment(SMALL, "teacher.train.epochs=9", "optimizer=lamb", "optimizer.lr=1e-2"))
    teacher = next(iter(made.trials.values()))
    assert teacher.epochs == 9 and teacher.optimizer.name == "lamb" and teacher.optimizer.lr == 0.01


def test_another_optimizer_keeps_the_rate_and_another_loss_nothing(experiment):
    text = """
base:
  {data: digits, student: resnet8, teacher: resnet20, epochs: 1, optimizer: {name: sgd, lr: 0.5},
   loss: {name: pld, temperature: 3}}
grid:
  optimizer: [lamb, {name: adan, lr: 0.1}]
  loss: [kd, pld]
"""
    made = plan(experiment(text))
    assert [c.trial.optimizer.lr for c in made.cells] == [0.5, 0.5, 0.1, 0.1]
    assert [c.trial.loss.temperature for c in made.cells] == [4, 3, 4, 3]


def test_recipe_lies_under_base(experiment, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "tiny.yaml").write_text("data: digits\nepochs: 9\noptimizer: {lr: 2}")
    text = "recipe: tiny\nbase: {student: resnet8, loss: ce, optimizer: {name: sgd}}"
    only = plan(experiment(text)).cells[0].trial
    assert (only.epochs, only.optimizer.lr, only.optimizer.name) == (9, 2, "sgd")
    with pytest.raises(InputError, match="recipe 'tinny' does not exist; did you mean 'tiny'"):
        experiment(text.replace("tiny", "tinny"))


def test_a_teacher_may_learn_from_a_teacher(experiment):
    text = """
base:
  data: digits
  student: resnet8
  epochs: 1
  loss: pld
  teacher: {name: resnet20, train: {loss: kd, teacher: resnet32}}
"""
    names = [t.student.name for t in plan(experiment(text)).trials.values()]
    assert names == ["resnet32", "resnet20", "resnet8"]


@pytest.mark.parametrize(
    ("file", "name"),
    [("my exp.yaml", "my-exp"), ("Größe 2.yaml", "Groe-2"), ("_a.b_.yml", "a.b")],
)
def test_an_experiment_has_the_name_of_its_file(tmp_path, file, name):
    (tmp_path / file).write_text(SMALL)
    assert load_experiment(tmp_path / file).name == name
    (tmp_path / file).write_text(f"name: mine\n{SMALL}")
    assert load_experiment(tmp_path / file).name == "mine"


def test_a_file_without_a_usable_name_needs_one(tmp_path):
    (tmp_path / "実験.yaml").write_text(SMALL)
    with pytest.raises(InputError, match=r"実験.yaml: cannot be turned into a name .* set name:"):
        load_experiment(tmp_path / "実験.yaml")


def test_a_misspelt_field_is_told_before_the_one_that_is_missing(experiment):
    text = "base: {data: digits, student: resnet8, loss: ce, epoch: 1}"
    with pytest.raises(InputError, match="epoch: unknown field; did you mean 'epochs'"):
        plan(experiment(text))


BAD = {
    "optimizer.lrr=3": "optimizer.lrr: unknown field; did you mean 'lr'",
    "optimiser=3": "optimiser: unknown field; did you mean 'optimizer'",
    "loss=pldd": "unknown loss 'pldd'; did you mean 'pld'",
    "loss.temprature=2": "loss.temprature: none of its losses .* did you mean 'temperature'",
    "loss.temperature=-1": "loss.temperature is -1: input should be greater than 0",
    "loss={name: kd, divergence: reverse}": "divergence is 'reverse'; did you mean 'reverse_kl'",
    "epochs=x": "epochs is 'x': input should be a valid integer",
    "epochs=0": "epochs is 0: input should be greater than or equal to 1",
    "epochs=[": "line 1: not valid YAML",
    "optimizer.lr=.nan": "optimizer.lr is nan: input should be a finite number",
    "workers=3": "batch_size is 128: expected a multiple of workers, which is 3",
    "seeds=1": "seeds is 1: expected a list",
    "seed=1": "set seeds",
    "epochs": "expected FIELD=VALUE",
    "teacher=null": "loss kd needs a teacher",
    "teacher.weights=nope": 'expected "train", "pretrained" or a weights file',
    "grid.loss=3": "grid.loss is 3",
    "grid.epochs=[]": "expected a list with at least one value",
    "name=../x": "name is '../x'",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_input_is_one_sentence(experiment, override):
    with pytest.raises(InputError, match=BAD[override]) as error:
        plan(experiment(SMALL, override))
    assert "\n" not in str(error.value)


def test_yaml_errors_name_file_and_line(experiment):
    with pytest.raises(InputError, match=r"small.yaml, line 3: not valid YAML"):
        experiment("base:\n  a: 1\n b: [")
    with pytest.raises(InputError, match=r"small.yaml, line 1: .*'base' appears twice"):
        experiment("base: {}\nbase: {}")
    with pytest.raises(InputError, match="not valid YAML"):
        experiment("base: !!python/object/apply:os.system [ls]")
    with pytest.raises(InputError, match="did you mean 'demo'"):
        load_experiment("demmo")


def test_shipped_experiments_plan():
    made = plan(load_experiment("demo"))
    assert len(made.cells) == 20 and len(made.trials) == 21
    teacher = next(iter(made.trials.values()))
    assert teacher.data.limit is None and made.cells[0].trial.data.limit == 200


def test_every_loss_can_be_named_alone(experiment):
    for name in REGISTRY:
        assert plan(experiment(SMALL, f"loss={name}")).cells[0].trial.loss.name == name


def test_a_changed_copy_has_another_id(experiment):
    trial = plan(experiment("base: {data: digits, student: resnet8, loss: ce, epochs: 2}")).cells[0]
    first = trial.trial.id
    assert trial.trial.model_copy(update={"epochs": 3}).id != first
    assert trial.trial.model_copy().id == first
