"""Plug-ins: losses, networks and datasets from a file of one's own."""

import importlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from pld_ray import plugins
from pld_ray.config.experiment import load_experiment
from pld_ray.config.parts import Data
from pld_ray.config.planning import plan
from pld_ray.data.datasets import load
from pld_ray.data.registry import DATASETS, find_dataset
from pld_ray.distill.bank_format import planned_key
from pld_ray.distill.loop import train
from pld_ray.errors import InputError, MissingError
from pld_ray.losses import REGISTRY
from pld_ray.models.checks import check_loss
from pld_ray.store.store import Store
from pld_ray.sweep.checks import check_trials

pytestmark = pytest.mark.filterwarnings("ignore:Overwriting own_net")  # by a newer version
LOSS = """
from typing import Annotated
from pydantic import Field
from pld_ray import DistillationLoss, register_loss

@register_loss("own", label="Own")
class OwnLoss(DistillationLoss):
    '''The squared distance of the logits.'''

    def __init__(self, weight: Annotated[float, Field(gt=0)] = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def losses(self, student, teacher, labels, kept):
        from {helper} import distance
        return self.weight * distance(student, teacher)
"""
HELPER = "def distance(a, b):\n    return (a - b).square().sum(1)\n"
REST = """
import numpy as np
import torch
from timm.models import register_model
from pld_ray import register_dataset
from pld_ray.data.images import Found

@register_model
def own_net_{name}(pretrained=False, num_classes=3, in_chans=1, img_size=4, **_):
    flat = torch.nn.Flatten()
    return torch.nn.Sequential(flat, torch.nn.Linear(in_chans * img_size**2, num_classes))

@register_dataset("stripes")
def stripes(data, path):
    labels = np.arange(60) % 3
    images = np.zeros((60, 4, 4, 1), np.uint8)
    images[np.arange(60), labels] = 200
    return Found((images[:45], labels[:45]), (images[45:], labels[45:]), ("a", "b", "c"))
"""
YAML = """
plugins: [{name}.py, {name}_rest.py]
base:
  data: {{name: stripes, image_size: 4}}
  student: own_net_{name}
  teacher: {{name: own_net_{name}, train: {{epochs: 1}}}}
  epochs: 2
  batch_size: 15
grid: {{loss: [ce, {{name: own, weight: [1, 2]}}]}}
"""


@pytest.fixture
def own(experiment, request):
    """Two plug-ins and a helper, named after the test: modules of a process have unique names."""
    name = request.function.__name__.removeprefix("test_")
    folder = experiment.folder

    class Own:
        loss, rest = folder / f"{name}.py", folder / f"{name}_rest.py"
        helper = folder / f"{name}_helper.py"

        def plan(self, *overrides):
            return plan(experiment(YAML.format(name=name), *overrides))

    own = Own()
    own.loss.write_text(LOSS.format(helper=own.helper.stem))
    own.helper.write_text(HELPER)
    rest = own.rest_text = REST.replace("{name}", name)
    own.rest.write_text(rest)
    return own


def test_the_source_is_part_of_what_uses_it(own):
    before = own.plan()
    first, rest = plugins.LOADED[own.loss.stem].digest, plugins.LOADED[own.rest.stem].digest
    assert [dict(c.trial.plugins) for c in before.cells] == [
        {own.rest.stem: rest},
        {own.loss.stem: first, own.rest.stem: rest},
        {own.loss.stem: first, own.rest.stem: rest},
    ]
    files = dict(plugins.LOADED[own.loss.stem].files)  # with what a function of it imports
    assert files.keys() == {own.loss.name, own.helper.name}
    assert before.cells[1].trial.loss.model_dump() == {"name": "own", "weight": 1.0}
    own.helper.write_text(HELPER.replace("square", "abs"))
    after = own.plan()
    same = [a.trial.id == b.trial.id for a, b in zip(before.cells, after.cells, strict=True)]
    assert same == [True, False, False]
    assert before.cells[1].trial.teacher.id == after.cells[1].trial.teacher.id
    keys = [planned_key(found.cells[1].trial, "train") for found in (before, after)]
    assert keys[0] == keys[1]  # the teacher's logits do not depend on the loss
    own.helper.write_text(HELPER)
    assert own.plan().trials.keys() == before.trials.keys()
    own.rest.write_text(own.rest_text + "# a comment\n")
    changed = own.plan()
    assert not changed.trials.keys() & before.trials.keys()
    assert planned_key(changed.cells[1].trial, "train") != keys[0]
    ordinary = ("data.name=digits", "data.image_size=8", "student=resnet8", "teacher=null")
    assert not own.plan(*ordinary, "grid.loss=[ce]").cells[0].trial.plugins


READ = """
import json, sys, torch
from pld_ray.config.trial import Trial
from pld_ray.losses import create_loss
from pld_ray.models.factory import create_model
from pld_ray.store.store import Store
from pld_ray.sweep.checks import check_trials
store, settings = Store(sys.argv[1]), json.loads(sys.argv[2])
store.load_plugins(settings)
trial = Trial.model_validate(settings)
loss = create_loss(trial.loss, reduction="sum")(
    torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2), torch.tensor([0])
)
network = create_model(trial.student, 3, 1, 4)
print(trial.id, loss.item(), sum(p.numel() for p in network.parameters()))
"""


def test_the_copy_in_the_store_is_all_that_a_worker_needs(own, tmp_path):
    made, store = own.plan(), Store(tmp_path / "results")
    trial = made.cells[2].trial
    for name in trial.all_plugins:
        store.keep_plugin(plugins.LOADED[name])
    for path in (own.loss, own.rest, own.helper):
        path.unlink()
    settings = trial.model_dump(mode="json")
    read = [sys.executable, "-c", READ, store.uri, json.dumps(settings)]
    found = subprocess.run(read, capture_output=True, text=True, check=True, cwd="/")
    # 2 (1^2 + 2^2), and 16 pixels by 3 classes with 3 biases
    assert found.stdout.split() == [trial.id, "10.0", "51"]
    (copy,) = (tmp_path / "results" / "plugins").glob(f"{own.loss.stem}-*.zip")
    with zipfile.ZipFile(copy, "a") as archive:
        archive.writestr("more.py", "")
    plugins._forget(own.loss.stem)
    with pytest.raises(InputError, match=r"its copy .*\.zip in the storage is damaged"):
        store.load_plugins(settings)
    copy.unlink()
    with pytest.raises(InputError, match=r"\.zip: the copy of a plug-in is missing"):
        store.load_plugins(settings)


def test_it_trains_and_its_record_says_so(own, tmp_path):
    made, store = own.plan(), Store(tmp_path / "results")
    for trial in made.trials.values():
        train(trial, load(trial.data), store, lambda metrics: None)
    records = store.records(made.trials)
    assert len(records) == 4
    for key, record in records.items():
        assert store.trial(key).id == record["id"] == key
        assert dict(store.trial(key).plugins) == dict(made.trials[key].plugins)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\ny = = 2\n", r"\.py: (\w+)\.py, line 2: invalid syntax"),
        ("x = 1\n\nraise KeyError('k')\n", r"\.py, line 3: KeyError: 'k'"),
        ("import no_such_module_of_anyone\n", r"line 1: ModuleNotFoundError: No module named"),
        (
            "from pld_ray import register_loss\n\n@register_loss('kd', label='K')\nclass A: ...\n",
            r"line 3: ValueError: loss 'kd': pld_ray.losses.divergence:KDLoss has this name",
        ),
    ],
)
def test_what_is_wrong_in_it_is_told_by_line(own, text, said):
    own.loss.write_text(text)
    with pytest.raises(InputError, match=said) as error:
        own.plan()
    assert "\n" not in str(error.value) and own.loss.name in str(error.value)
    assert own.loss.stem not in plugins.LOADED and own.loss.stem not in sys.modules
    own.loss.write_text(LOSS.format(helper=own.helper.stem))
    assert len(own.plan().trials) == 4  # nothing is left of it


def test_what_is_no_plugin(experiment, tmp_path):
    def refused(source):
        with pytest.raises(InputError) as error:
            experiment(f"plugins: ['{source}']\nbase: {{epochs: 1}}\n")
        return str(error.value)

    assert f"plug-in {tmp_path}/none.py: expected a Python file" in refused("none.py")
    assert "plug-in 'no_such': expected a Python file, such as my_method.py, or" in refused(
        "no_such"
    )
    (tmp_path / "my-method.py").touch()
    assert "'my-method' cannot be imported: expected a file name of letters" in refused(
        "my-method.py"
    )
    (tmp_path / "json.py").touch()
    assert "there is a module 'json' already (" in refused("json.py")
    (tmp_path / "wave.py").touch()  # of the standard library, and not imported
    assert "there is a module 'wave' already (" in refused("wave.py")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same_name.py").write_text(f"x = '{name}'\n")
    experiment("plugins: [one/same_name.py]\nbase: {epochs: 1}\n")
    assert "another plug-in has the name 'same_name', " in refused("two/same_name.py")


def test_a_package_is_a_plugin(experiment, tmp_path):
    package = tmp_path / "own_package"
    (package / "parts").mkdir(parents=True)
    (package / "__init__.py").write_text("from .parts.losses import OwnLoss\n")
    (package / "parts" / "losses.py").write_text(
        LOSS.format(helper="..distances").replace('"own"', '"packed"')
    )
    (package / "distances.py").write_text(HELPER)
    experiment("plugins: [./own_package]\nbase: {epochs: 1}\n")
    plugin = plugins.PROVIDED["loss", "packed"]
    assert [path for path, _ in plugin.files] == [
        "own_package/__init__.py",
        "own_package/distances.py",
        "own_package/parts/losses.py",
    ]
    check_loss(REGISTRY["packed"](name="packed"), 5)
    plugins._forget("own_package")
    assert "packed" not in REGISTRY


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("digits:/x", "'digits:/x': expected 'digits' alone$"),
        ("folder", "'folder': expected a path too, folder:PATH"),
        ("stripes:/x", r"expected 'stripes' alone; register_dataset\(..., has_path=True\) lets"),
        ("stripe", "no such dataset; did you mean 'stripes'"),
    ],
)
def test_a_dataset_with_and_without_a_path(own, name, said):
    own.plan()
    with pytest.raises(InputError, match=said):
        find_dataset(Data(name=name))


def test_a_newer_version_takes_the_place_of_the_older(own):
    own.plan()
    own.rest.write_text(own.rest_text.replace('"stripes"', '"bars"'))
    with pytest.raises(InputError, match="no such dataset; "):
        own.plan(), load(own.plan().cells[0].trial.data)
    assert "bars" in DATASETS and "stripes" not in DATASETS


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return student - teacher", r"OwnLoss\.losses gives the shape \[4, 7\]: expected one"),
        ("return (student * 0).sum(1).log() * 0", "loss own is nan on random logits"),
        ("return teacher.sum(1)", "loss own has no gradient for the student's logits"),
        ("return student.detach().sum(1)", "loss own has no gradient for the student's logits"),
        ("return (student - student).norm(dim=1) / 0", "loss own is nan"),
        ("return student.sum(1) @ labels", r"loss own: \w+\.py, line 15: RuntimeError: "),
        ("return ((student - student) ** 2).sum(1).sqrt()", "a gradient that is not finite"),
    ],
)
def test_a_loss_is_computed_once_before_ray_starts(own, body, said):
    text = LOSS.format(helper=own.helper.stem)
    kept = text[: text.index("        from")]
    own.loss.write_text(kept + f"        {body}\n")
    own.plan()
    with pytest.raises(InputError, match=said):
        check_loss(REGISTRY["own"](name="own"), 7)


@pytest.mark.parametrize("name", [n for n, p in REGISTRY.items() if not p.needs_features])
@pytest.mark.parametrize("classes", [2, 10])
def test_our_own_losses_pass(name, classes):
    check_loss(REGISTRY[name](name=name), classes)


def test_options_reach_a_loss_that_does_not_name_them(own):
    own.plan()
    loss = REGISTRY["own"](name="own")
    from pld_ray.losses import create_loss

    s, t = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 2)
    args = s, t, torch.tensor([0, -100])
    assert create_loss(loss, reduction="sum")(*args) == 9
    assert create_loss(loss, reduction="none")(*args).tolist() == [9, 0]
    assert create_loss(loss, ignore_index=None, reduction="mean")(s, t, torch.ones(2).long()) == 5


@pytest.mark.slow
def test_a_run_on_ray(own, local_ray, cli, experiment, tmp_path):
    own.plan()
    path = experiment.folder / "small.yaml"
    sets = ("--set", "resources.concurrent=1", "--storage", tmp_path / "results")
    done = cli("run", path, *sets, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| Own (weight = 2) |" in done.stdout
    own.helper.write_text(HELPER.replace("square", "abs"))
    trials = Store(tmp_path / "results").trials().values()
    plugins._forget(own.loss.stem)  # as in a process that has not read the experiment
    (trial,) = (t for t in trials if t.loss.name == "own" and t.loss.weight == 2)
    assert Store(tmp_path / "results").trial(trial.id).id == trial.id
    plugins._forget(own.loss.stem)  # which the line above has imported from its copy
    exported = cli("export", "--storage", tmp_path / "results", cwd=tmp_path)
    assert f"note: trials that use a plug-in ({own.loss.stem}" in exported.stderr
    assert "2 trials" in exported.stdout
    again = cli("plan", path, *sets, cwd=tmp_path)
    assert f"note: plug-in {own.loss.stem} has changed: trials that use it now" in again.stderr
    assert "2 done, 2 to run" in again.stdout


def test_the_example(tmp_path):
    example = Path(__file__).parents[1] / "examples" / "own_method.yaml"
    small = ("epochs=2", "teacher.train.epochs=1", "data.limit=64")
    made, store = plan(load_experiment(example, small)), Store(tmp_path)
    assert [cell.trial.loss.name for cell in made.cells] == ["ce", "kd", "pld", "huber", "huber"]
    last = made.cells[-1].trial
    assert last.loss.delta == 2 and set(last.plugins) == {"own_method"}
    images = load(last.data)
    assert images.shape == (10, 1, 8) and len(images.train) == 64
    for trial in (last.teacher, last):
        train(trial, images, store, lambda metrics: None)
    assert store.record(last.id)["metrics"]["top1"] > 10  # chance


def test_two_plugins_share_a_helper(experiment, tmp_path):
    (tmp_path / "common_of_two.py").write_text(
        "from pld_ray import register_dataset\n\n@register_dataset('of_two')\n"
        "def of_two(data, path): ...\n\nclass Same: number = 1\n"
    )
    for name in ("first_of_two", "second_of_two"):
        (tmp_path / f"{name}.py").write_text("from common_of_two import Same\n")
    text = "plugins: [first_of_two.py, second_of_two.py]\nbase: {epochs: 1}\n"

    def numbers():
        experiment(text)
        first, second = (sys.modules[f"{name}_of_two"].Same for name in ("first", "second"))
        assert first is second
        return first.number

    assert numbers() == 1 and plugins.PROVIDED["dataset", "of_two"].name == "first_of_two"
    common = (tmp_path / "common_of_two.py").read_text()
    (tmp_path / "common_of_two.py").write_text(common.replace("= 1", "= 2"))
    assert numbers() == 2
    for name in ("first_of_two", "second_of_two"):
        plugins._forget(name)
    assert "of_two" not in DATASETS and "common_of_two" not in sys.modules


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "flat = torch.nn.Flatten()",
            "flat = torch.nn.Flaten()",
            r"_rest\.py, line 10: AttributeError: module 'torch.nn' has no attribute 'Flaten'",
        ),
        (
            "flat = torch",
            "flat = torch.zeros(2) @ torch.zeros(3)\n    flat = torch",
            r"line 10: RuntimeError: ",
        ),
        (
            "num_classes=3, in",
            "classes=3, in",
            "line 11: NameError: name 'num_classes' is not",
        ),
        (
            "return torch.nn.Sequential(flat",
            "return torch.nn.Sequential(Odd()",
            "line 23: KeyError: 5",
        ),
        ("labels = np", "lables = np", r"data 'stripes': \w+_rest\.py, line 17: NameError: "),
    ],
)
def test_errors_of_networks_and_datasets_are_told_by_line(own, old, new, said):
    odd = "\n\nclass Odd(torch.nn.Flatten):\n    def forward(self, x):\n        raise KeyError(5)\n"
    own.rest.write_text(own.rest_text.replace(old, new) + (odd if "Odd" in new else ""))
    trial = own.plan().cells[0].trial
    with pytest.raises(InputError, match=said) as error:
        check_trials({trial.id: trial})
    assert "\n" not in str(error.value)


def test_names_of_networks_and_datasets_are_unique(own):
    for old, new, said in (
        (
            "def own_net_{name}",
            "def resnet20",
            "network 'resnet20': pld_ray.models.networks.cifar has",
        ),
        ('"stripes"', '"cifar100"', "dataset 'cifar100' is registered already"),
    ):
        text = REST.replace(old, new).replace("{name}", "x").replace("own_net_x", "unique_net")
        own.rest.write_text(text)
        with pytest.raises(InputError, match=said):
            own.plan()
    importlib.reload(sys.modules["pld_ray.models.networks.cifar"])  # its resnet20 again


def test_what_it_imports_of_ours_stays_ours(own):
    own.loss.write_text("from pld_ray import KDLoss\n" + LOSS.format(helper=own.helper.stem))
    own.plan()
    assert ("loss", "kd") not in plugins.PROVIDED and ("loss", "own") in plugins.PROVIDED
    plugins._forget(own.loss.stem)
    assert "kd" in REGISTRY


def test_an_import_that_cannot_be_followed_is_refused(own):
    own.loss.write_text(f"import importlib\nimportlib.import_module('{own.helper.stem}')\n")
    with pytest.raises(
        InputError, match=rf"{own.helper.name} is imported, and no import statement"
    ):
        own.plan()
    sys.modules.pop(own.helper.stem)


def test_a_folder_without_init_is_found_in_the_copy(own, tmp_path):
    parts = own.loss.parent / f"{own.loss.stem}_parts"
    parts.mkdir()
    (parts / "deep.py").write_text(HELPER)
    own.loss.write_text(LOSS.format(helper=f"{parts.name}.deep"))
    plugin, trial = own.plan() and plugins.LOADED[own.loss.stem], own.plan().cells[1].trial
    store = Store(tmp_path / "results")
    store.keep_plugin(plugin)
    store.keep_plugin(plugins.LOADED[own.rest.stem])
    (parts / "deep.py").unlink()
    plugins._forget(own.loss.stem)
    store.load_plugins(trial.model_dump(mode="json"))
    check_loss(trial.loss, 4)


def test_ours_and_installed_packages_are_not_part_of_it(tmp_path):
    site = tmp_path / "site-packages"
    (site / "own_packed").mkdir(parents=True)
    (site / "own_packed" / "__init__.py").write_text("import own_neighbour\n")
    (site / "own_neighbour.py").write_text("")
    sys.path.append(str(site))
    try:
        loaded = plugins.load("own_packed")
        assert [path for path, _ in loaded.files] == ["own_packed/__init__.py"]
    finally:
        sys.path.remove(str(site))
    root = Path(plugins.__file__).parents[1]  # a plug-in in the root of a checkout
    sources = plugins._sources(root, [root / "examples" / "own_method.py"], "")
    assert [path for path, _ in sources] == ["examples/own_method.py"]


def test_a_gradient_that_fails_is_told(own):
    text = LOSS.format(helper=own.helper.stem)
    own.loss.write_text(
        text[: text.index("        from")]
        + "        x = student.exp()\n        x += 1\n        return x.sum(1)\n"
    )
    own.plan()
    with pytest.raises(InputError, match="loss own: RuntimeError: one of the variables needed for"):
        check_loss(REGISTRY["own"](name="own"), 7)


def test_a_dataset_whose_files_are_elsewhere_is_missing(own):
    own.rest.write_text(
        own.rest_text.replace("labels = np", "open('/no/such/file')\n    labels = np")
    )
    data = own.plan().cells[0].trial.data
    with pytest.raises(MissingError, match="data 'stripes': /no/such/file is not there"):
        load(data)


def test_a_loss_on_features_that_learns_is_trained_like_a_built_in_one(experiment, tmp_path):
    """VID under another name ends with the bits of VID: what it learns is trained with it."""
    source = Path(importlib.import_module("pld_ray.losses.features").__file__).read_text()
    vid = source[source.index('@register_loss("vid"') :]
    (tmp_path / "own_vid.py").write_text(
        "import math\nfrom typing import Annotated\nimport torch\nimport torch.nn.functional as F\n"
        "from pydantic import Field\nfrom torch import Tensor, nn\n"
        "from pld_ray import Features, FeatureLoss, register_loss\n"
        "Weight = Annotated[float, Field(ge=0)]\n"
        + vid.replace('"vid", label="VID"', '"own_vid", label="Own VID"')
    )
    made = plan(
        experiment(
            "plugins: [own_vid.py]\n"
            "base:\n  data: {name: digits, limit: 64}\n  student: resnet8\n  epochs: 2\n"
            "  teacher: {name: resnet8, train: {epochs: 1}}\n  batch_size: 32\n"
            "grid: {loss: [vid, {name: own_vid, weight: [1.0, 2.0]}]}\n"
        )
    )
    store = Store(tmp_path / "results")
    for trial in made.trials.values():
        train(trial, load(trial.data), store, lambda metrics: None)
    digests = [store.record(cell.trial.id)["weights_sha256"] for cell in made.cells]
    assert digests[0] == digests[1] != digests[2]
