"""From Python: run, plan, status and results; the commands that show one trial; init and schema."""

import importlib
import json
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
import warm
import yaml

import pld_ray
from analysis.records import frames
from pld_ray import plugins
from pld_ray.api import session
from pld_ray.cli.trials import sparkline
from pld_ray.config.experiment import Experiment, experiments_folder
from pld_ray.config.parts import Data
from pld_ray.config.schema import experiment_schema
from pld_ray.config.yaml_files import parse_yaml
from pld_ray.data.datasets import load
from pld_ray.distill.loop import train
from pld_ray.errors import InputError
from pld_ray.store.store import Store

SMALL = {
    "base": {
        "data": Data(name="digits", limit=60),
        "student": "resnet8",
        "teacher": {"name": "resnet8", "train": {"epochs": 1}},
        "epochs": 2,
        "batch_size": 30,
    },
    "grid": {"loss": ["ce", {"name": "kd", "temperature": [1, 4]}]},
}
TEXT = """
base:
  data: {name: digits, limit: 60}
  student: resnet8
  teacher: {name: resnet8, train: {epochs: 1}}
  epochs: 2
  batch_size: 30
grid: {loss: [ce, {name: kd, temperature: [1, 4]}]}
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A store in which the trials of SMALL have finished, all but the last, which has failed."""
    folder = tmp_path_factory.mktemp("done")
    planned, store = pld_ray.plan(Experiment(name="small", **SMALL), storage=folder), Store(folder)
    *first, last = planned.trials.values()
    for trial in first:
        train(trial, load(trial.data), store, lambda metrics: None)
    store.start(last)
    store.fail(last.id, "RuntimeError: too hot", "Traceback ...\nRuntimeError: too hot")
    return folder, planned


# ---------------------------------------------------------------- Python


def test_an_experiment_in_python_is_that_of_its_yaml(experiment, tmp_path):
    ours = pld_ray.plan(Experiment(name="small", **SMALL), storage=tmp_path)
    file = experiment.folder / "small.yaml"
    file.write_text(TEXT)
    theirs = pld_ray.plan(file, storage=tmp_path)
    assert ours.trials.keys() == theirs.trials.keys() and len(ours.trials) == 4
    changed = pld_ray.plan(file, storage=tmp_path, overrides={"optimizer.lr": 0.5, "seeds": [3]})
    texts = pld_ray.plan(file, storage=tmp_path, overrides=["optimizer.lr=0.5", "seeds=[3]"])
    assert changed.trials.keys() == texts.trials.keys()
    assert {cell.trial.optimizer.lr for cell in changed.cells} == {0.5}
    assert {cell.trial.seed for cell in changed.cells} == {3}


def test_a_recipe_and_a_miniature_from_python():
    shipped = pld_ray.load_experiment("cifar100_methods")
    raw = parse_yaml((experiments_folder() / "cifar100_methods.yaml").read_text(), "")
    made = Experiment(name="cifar100_methods", **raw)
    assert pld_ray.load_experiment(made).base == shipped.base != made.base
    assert pld_ray.load_experiment(shipped).base == shipped.base
    small = pld_ray.load_experiment(made, smoke=True)
    assert small.base == pld_ray.load_experiment("cifar100_methods", smoke=True).base
    with pytest.raises(InputError, match="cifar100_methods-smoke is a miniature already"):
        pld_ray.load_experiment(small, smoke=True)


def test_relative_paths_in_python_are_those_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = {"data": {"name": "folder:images"}, "student": "resnet8", "epochs": 1}
    loaded = pld_ray.load_experiment(Experiment(name="x", base=base))
    assert loaded.base["data"]["name"] == f"folder:{tmp_path}/images"


def test_what_is_wrong_in_python_is_told():
    with pytest.raises(InputError, match="overrides is 'epochs=2': expected a list of texts"):
        pld_ray.load_experiment("demo", overrides="epochs=2")
    with pytest.raises(InputError, match="demo2.*not a file and not a shipped experiment"):
        pld_ray.run("demo2")


def test_curves_have_their_columns_before_the_first_epoch(tmp_path):
    found = pld_ray.results(tmp_path, Experiment(name="small", **SMALL))
    assert list(found.curves()) == [*frames.GROUP, "seed", "id", "epoch"]
    assert found.curves().empty


def test_results_are_those_of_the_records(done, capsys):
    folder, planned = done
    found = pld_ray.results(folder, Experiment(name="small", **SMALL))
    frame = found.frame().set_index("id")
    store = Store(folder)
    assert list(frame["state"]) == ["done", "done", "done", "failed"]
    for key, trial in list(planned.trials.items())[:3]:
        assert frame.loc[key, "metrics.top1"] == store.record(key)["metrics"]["top1"]
        assert frame.loc[key, "trial.epochs"] == trial.epochs
    curves = found.curves()
    assert curves.groupby("id").size().tolist() == [2, 2]  # of the grid: no teacher
    session.write_tables(planned, store, folder / "out")
    table = found.table()
    assert str(table) == table.to_markdown()
    assert str(table) in capsys.readouterr().out
    assert table.to_latex() == (folder / "out" / "table.tex").read_text()
    assert r"\toprule" in table.to_latex() and table.numbers["n"].sum() == 2
    assert len(found.table(all_pairs=True).pairs) == 1
    status = pld_ray.status(Experiment(name="small", **SMALL), storage=folder).set_index("id")
    assert list(status["state"]) == ["done", "done", "done", "failed"]
    assert status["why"].iloc[-1] == "RuntimeError: too hot"


def test_a_storage_without_its_yaml(done):
    folder, planned = done
    found = pld_ray.results(folder)
    assert set(found.frame()["id"]) == set(planned.trials)
    assert found.curves().groupby("id").size().tolist() == [2, 2, 1]
    assert repr(found) == f"<Results of a storage: 3 of 4 done, in {folder}>"
    with pytest.raises(InputError, match="a storage mixes the trials of several experiments"):
        found.table()
    with pytest.raises(InputError, match="overrides and smoke are for an experiment"):
        pld_ray.results(folder, smoke=True)
    with pytest.raises(InputError, match="there are no trials in "):
        pld_ray.results(folder / "nowhere")


def test_a_student_gives_the_logits_of_its_record(done):
    folder, planned = done
    trial = planned.cells[0].trial
    student = pld_ray.results(folder).student(trial.id)
    assert not student.training
    images = load(trial.data)
    data = Store(folder).record(trial.id)["data"]
    pixels = torch.as_tensor(images.val).float().permute(0, 3, 1, 2) / 255
    normalised = (pixels - data["mean"][0]) / data["std"][0]
    with torch.no_grad():
        right = student(normalised).argmax(1) == torch.as_tensor(images.val_labels)
    top1 = Store(folder).record(trial.id)["metrics"]["top1"]
    assert 100 * right.float().mean().item() == pytest.approx(top1, abs=0.3)  # float32 order
    with pytest.raises(InputError, match="trial 'zzz' is not one of these results"):
        pld_ray.results(folder).student("zzz")


def test_figures_show_themselves_in_a_notebook(done):
    found = pld_ray.results(done[0], Experiment(name="small", **SMALL))
    pyplot = importlib.import_module("matplotlib.pyplot")
    before = pyplot.get_fignums()
    for figure in (found.accuracy_figure(), found.gains_figure(), found.curves_figure()):
        assert figure._repr_png_().startswith(b"\x89PNG")
    assert pyplot.get_fignums() == before  # they are not kept by pyplot
    empty = pld_ray.results(done[0], Experiment(name="s", **SMALL), overrides={"epochs": 9})
    with pytest.raises(InputError, match="nothing to draw yet: no trial has finished"):
        empty.accuracy_figure()


@pytest.mark.slow
def test_run_from_python(local_ray, tmp_path, capfd):
    found = pld_ray.run(Experiment(name="small", **SMALL), storage=tmp_path)
    assert found.failures == {} and set(found.frame()["state"]) == {"done"}
    assert "4 trials to run, 0 done before" in capfd.readouterr().out
    again = pld_ray.run(Experiment(name="small", **SMALL), storage=tmp_path)
    assert "small: all 4 trials are done" in capfd.readouterr().out
    assert again.frame().equals(found.frame())


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    import nbclient
    import nbformat

    examples = Path(__file__).parents[1] / "examples"
    shutil.copy(examples / "own_method.py", tmp_path)
    notebook = nbformat.read(examples / "notebook.ipynb", 4)
    first = f"import sys\nsys.executable = {warm.executable()!r}"  # for Ray's workers
    notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
    client = nbclient.NotebookClient(notebook, timeout=600)
    client.execute(cwd=str(tmp_path))
    shown = [
        output.get("data", {}) | {"stream": output.get("text", "")}
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    ]
    assert not any("ray" in str(data.get("stream")) for data in shown)  # its messages
    assert any("| Huber " in data.get("text/markdown", "") for data in shown)
    assert any("image/png" in data for data in shown)
    assert any("5 of 5 done" in data.get("text/plain", "") for data in shown)


def test_values_of_python_are_those_of_yaml(tmp_path):
    given = {
        "data": {"name": "digits", "limit": np.int64(60)},
        "student": {"name": "resnet8", "args": {"drop_rate": np.float64(0.5)}},
        "loss": {"name": "kd", "temperature": np.array([1.0, 4.0])},
        "teacher": {"name": "resnet8", "train": {"epochs": 1}},
        "epochs": 1,
    }
    made = pld_ray.plan(Experiment(name="x", base=given), storage=tmp_path)
    assert [cell.trial.loss.temperature for cell in made.cells] == [1, 4]
    assert made.cells[0].trial.student.args == {"drop_rate": 0.5}
    base = {"data": {"root": tmp_path / "x"}}
    assert Experiment(name="x", smoke={"base": base}).smoke.base["data"]["root"] == f"{tmp_path}/x"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"name": "x", "gird": {}}, "Experiment: gird: unknown field; did you mean 'grid'"),
        ({"name": "x", "seeds": []}, "Experiment: seeds is \\[\\]: expected at least one seed"),
        ({"name": "x y"}, "Experiment: name is 'x y'"),
        ({"name": "x", "plugins": ["nope.py"]}, "nope.py"),
    ],
)
def test_an_experiment_in_python_is_refused_in_one_sentence(fields, expected):
    with pytest.raises(InputError, match=expected):
        Experiment(**fields)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"overrides": {"epochs": 4}}, "--set overrides: expected the field of a trial"),
        ({"recipe": "cifar10"}, "recipe 'cifar10' does not exist; did you mean"),
        ({None: 3}, "overrides has None: expected the text of a field"),
        (3, "overrides is 3: expected a list of texts, or a mapping"),
        ({"seed": 3}, "seeds"),
    ],
)
def test_overrides_that_would_do_nothing_are_refused(overrides, expected):
    with pytest.raises(InputError, match=expected):
        pld_ray.load_experiment(Experiment(name="small", **SMALL), overrides)


def test_a_recipe_can_be_an_override():
    shipped = pld_ray.load_experiment("cifar100_methods")
    base = {k: v for k, v in shipped.base.items() if k in ("student", "teacher")}
    made = pld_ray.load_experiment(Experiment(name="x", base=base), {"recipe": "cifar100"})
    assert made.base["optimizer"] == shipped.base["optimizer"]


def test_a_seed_in_base_and_a_loss_among_several_fields(tmp_path):
    with pytest.raises(InputError, match="small: seed: set seeds beside base"):
        pld_ray.plan(Experiment(name="small", base=SMALL["base"] | {"seed": 3}), storage=tmp_path)
    both = Experiment(
        name="x",
        base=SMALL["base"] | {"loss": "ce"},
        grid={"loss, epochs": [["kd", 1], ["pld", 2]]},
    )
    made = pld_ray.plan(both, storage=tmp_path)
    assert [(c.trial.loss.name, c.trial.epochs) for c in made.cells] == [("kd", 1), ("pld", 2)]


def test_a_plugin_beside_the_script(tmp_path, monkeypatch):
    (tmp_path / "beside_script.py").write_text("X = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("beside_script")  # as the script itself, or what it has imported
    shutil.copy(experiments_folder() / "templates" / "my_method.py", tmp_path / "beside_loss.py")
    monkeypatch.chdir(tmp_path)
    made = Experiment(name="x", plugins=["beside_loss.py"])
    assert made.plugins == [f"{tmp_path}/beside_loss.py"]


def test_a_reference_holds_for_the_miniature_and_overrides(tmp_path):
    smoke = {"grid": {"loss": ["ce", {"name": "kd", "temperature": [2, 3]}]}}
    made = Experiment(name="x", **SMALL, reference="KD (τ = 4)", smoke=smoke)
    small = pld_ray.plan(made, storage=tmp_path, smoke=True)
    assert frames.frame(small, Store(tmp_path))["reference"].tolist() == [False, False, True]
    one = pld_ray.plan(made, storage=tmp_path, overrides={"loss.temperature": 4})
    assert frames.frame(one, Store(tmp_path))["reference"].tolist() == [False, True]
    search = {"space": {"optimizer.lr": {"choice": [0.1, 0.2]}}, "algorithm": "grid"}
    with pytest.raises(InputError, match="reference is 'zz'"):
        pld_ray.plan(Experiment(name="x", **SMALL, reference="zz", search=search), storage=tmp_path)
    with pytest.raises(InputError, match="x-smoke is a miniature already"):
        mini = pld_ray.load_experiment(made, smoke=True)
        pld_ray.load_experiment(mini, {"seeds": [0, 1]})


def test_a_storage_brings_its_plugins(tmp_path):
    shutil.copy(experiments_folder() / "templates" / "my_method.py", tmp_path / "of_storage.py")
    text = (tmp_path / "of_storage.py").read_text().replace("my_method", "of_storage")
    (tmp_path / "of_storage.py").write_text(text.replace("My method", "Of a storage"))
    made = Experiment(
        name="x",
        plugins=[tmp_path / "of_storage.py"],
        base=SMALL["base"] | {"loss": "of_storage"},
    )
    planned, store = pld_ray.plan(made, storage=tmp_path), Store(tmp_path)
    trial = planned.cells[0].trial
    store.start(trial)
    store.keep_plugin(plugins.LOADED["of_storage"])
    plugins._forget("of_storage")
    assert trial.id in pld_ray.results(tmp_path).trials


# ---------------------------------------------------------------- one trial


def test_show_and_logs(done, cli):
    folder, planned = done
    teacher, ce, kd, failed = planned.trials.values()
    shown = cli("show", ce.id[:8], "--storage", folder, cwd=folder).stdout
    assert shown.startswith(f"{ce.label} ({ce.id}): done\n")
    assert yaml.safe_load(shown.split("\n\n")[1])["student"] == {"name": "resnet8"}
    assert f"{kd.id}  {kd.label}: top-1 " in shown and f"{failed.label}: not done" in shown
    assert teacher.label not in shown.split("the same with another loss")[1]
    assert "student.safetensors" in shown and "record.json" in shown
    told = cli("logs", failed.id, "--storage", folder, cwd=folder).stdout
    assert "FAILED: RuntimeError: too hot" in told and "Traceback ..." in told
    epochs = cli("logs", kd.id, "--storage", folder, cwd=folder).stdout
    assert len(epochs.strip().splitlines()) == 2 + 3  # a title, a head, two epochs
    refused = cli("show", "nothing", "--storage", folder, cwd=folder)
    assert refused.returncode == 2 and "trial 'nothing': no such trial in" in refused.stderr


def test_sparkline_by_hand():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5, 5]) == "▁▁"
    assert sparkline(list(range(1000))) == "".join(
        "▁▂▃▄▅▆▇█"[round(7 * round(i * 999 / 59) / 999)] for i in range(60)
    )


def test_axes_without_x_are_refused(cli, tmp_path):
    for options in (["--by", "seed"], ["--facet", "student"], ["--y", "ece"]):
        said = cli("figures", "demo", *options, cwd=tmp_path)
        assert said.returncode == 2 and "expected --x too" in said.stderr


# ---------------------------------------------------------------- init and schema


def test_init_writes_what_runs(cli, tmp_path):
    written = cli("init", "squared", cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {
        "squared.yaml",
        "squared.py",
        "squared.schema.json",
    }
    planned = pld_ray.plan(tmp_path / "squared.yaml", storage=tmp_path, overrides={"epochs": 1})
    assert len(planned.cells) == 10 and planned.experiment.reference == "squared"
    student = torch.randn(4, 5, requires_grad=True)
    teacher, labels = torch.randn(4, 5), torch.arange(4)
    loss = pld_ray.create_loss(planned.cells[-1].trial.loss)
    assert (loss.temperature, loss.weight) == (4, 10)
    p, q = ((logits.double() / 4).softmax(1) for logits in (student, teacher))
    ce = -student.double().log_softmax(1)[range(4), labels]
    expected = (ce + 10 * 16 * ((p - q) ** 2).sum(1)).mean()
    assert loss(student, teacher, labels).item() == pytest.approx(expected.item(), rel=1e-5)
    schema = json.loads((tmp_path / "squared.schema.json").read_text())
    jsonschema.validate(parse_yaml((tmp_path / "squared.yaml").read_text(), ""), schema)
    again = cli("init", "squared", cwd=tmp_path)
    assert again.returncode == 2 and "squared.yaml exists already" in again.stderr
    for name, why in [
        *(("kd", "is taken"), ("My-Loss", "expected small letters"), ("if", "taken")),
        *(("json", "is taken"), ("on", "expected small letters"), ("_", "expected small letters")),
    ]:
        refused = cli("init", name, cwd=tmp_path)
        assert refused.returncode == 2 and why in refused.stderr
        assert not (tmp_path / f"{name}.yaml").exists()


def test_the_shipped_schema_is_the_current_one(cli, tmp_path):
    shipped = (experiments_folder() / "schema.json").read_text()
    assert cli("schema", cwd=tmp_path).stdout == shipped  # else: pld-ray schema --to ...
    schema = json.loads(shipped)
    jsonschema.Draft202012Validator.check_schema(schema)
    fields = schema["$defs"]["Settings"]["properties"]
    assert all("description" in field for field in schema["properties"].values())
    assert fields["epochs"]["minimum"] == 1 and fields["epochs"]["description"]


@pytest.mark.parametrize("path", sorted(experiments_folder().rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_yaml_names_the_schema_and_meets_it(path):
    schema = experiment_schema()
    up, part = "", ""
    if path.parent.name == "recipes":
        up, part = "../", "#/$defs/Recipe"
        schema |= {"$ref": part, "properties": {}, "additionalProperties": True}
    text = path.read_text()
    if path.parent.name == "templates":
        assert text.startswith("# yaml-language-server: $schema=my_method.schema.json\n")
        return  # its own loss is not registered here: see test_init_writes_what_runs
    assert text.startswith(f"# yaml-language-server: $schema={up}schema.json{part}\n")
    jsonschema.validate(parse_yaml(text, ""), schema)


@pytest.mark.parametrize(
    "text",
    [
        "bas: {}",
        "base: {epoch: 2}",
        "base: {epochs: 0}",
        "base: {loss: kdd}",
        "base: {loss: {name: kd, temprature: 2}}",
        "base: {loss: {name: kd, temperature: -1}}",
        "base: {teacher: {name: x, train: {epoch: 1}}}",
        "base: {data: {name: digits, flip: maybe}}",
        "grid: {loss: ce}",
        "grid: {epochs: [0]}",
        "seeds: [a]",
    ],
)
def test_the_schema_refuses(text):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(parse_yaml(text, ""), experiment_schema())
