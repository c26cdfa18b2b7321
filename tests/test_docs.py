"""What the documentation shows is what works: its commands, YAML, Python and links."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import timm
import torch
import typer
import warm
import yaml
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pld_ray
import pld_ray.models
from pld_ray import plugins
from pld_ray.cli.main import app
from pld_ray.config.experiment import Experiment, load_experiment
from pld_ray.config.planning import plan
from pld_ray.sweep import search

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BY_NAME = {page.name: page for page in PAGES}
VERSION = "pld-ray --version"
# Runs commands from an installed wheel, as `pld-ray` does, with workers that start fast.
FOLLOW = """
import shlex, sys
sys.path.insert(0, {site!r})
sys.executable = {executable!r}
from pld_ray.cli.main import main
from pld_ray.sweep import cluster
cluster.init(num_cpus=2, include_dashboard=False, log_to_driver=False)  # one Ray for all commands
for line in {lines!r}:
    print("$", line)
    sys.argv = shlex.split(line)
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, line
"""
SMALL = """
base:
  data: {name: digits, limit: 100}
  student: resnet8
  teacher: {name: resnet8, train: {epochs: 1}}
  epochs: 1
grid: {loss: [ce, kd]}
"""
# Commands that no test can run, or that another test runs; they are parsed like all others.
NOT_HERE = (
    *("cifar100_methods", "homogeneous_pairs", "landscapes"),  # hours of a GPU, or one of two cores
    *("pld-ray landscape\n", "report pairs.yaml"),  # test_analysis, test_report
    *("--address", "my_method", "own_method.yaml"),  # test_cluster, test_results, test_plugins
)


def blocks(page, language):
    """The code blocks of a page in a language, without the indent of a list."""
    found = re.findall(
        rf"^( *)```{language}\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE
    )
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def commands(page):
    """The command lines in the indented blocks of a page."""
    lines = re.sub(r"\\\n\s*", "", page.read_text()).splitlines()
    code = [line.strip() for line in lines if line.startswith("    ")]
    shown = [line.removeprefix(".venv/bin/").partition(" #")[0].strip() for line in code]
    return [line for line in shown if re.match(r"(pld-ray|make|python|ray job submit)\b", line)]


def parse(arguments):
    """Parse a command of pld-ray as the program does, without running it."""
    command = typer.main.get_command(app)
    context = command.make_context("pld-ray", list(arguments))
    while hasattr(command, "commands"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_exist_with_their_options(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in commands(page):
        program, *arguments = shlex.split(line)
        if program == "ray":  # what it submits
            program, *arguments = arguments[arguments.index("--") + 1 :]
        if program == "make":
            assert arguments[0] in targets, line
        elif program == "python":
            assert (ROOT / arguments[0]).is_file(), line
        elif line != VERSION:
            parse(arguments)
    for script in re.findall(r"`python ([\w./]+)", page.read_text()):
        assert (ROOT / script).is_file(), script


def test_a_wrong_command_would_be_found():
    for line in ("run pairs.yaml --sett x=1", "runn pairs.yaml", "data check"):
        with pytest.raises(Exception, match=r"option|command|parameter"):
            parse(shlex.split(line))
    assert len([line for page in PAGES for line in commands(page)]) > 50


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_yaml_is_valid(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "examples" / "own_method.py", tmp_path)
    for name, text in named(page, ("py",)).items():
        (tmp_path / name).write_text(text)
    for number, text in enumerate(blocks(page, "yaml")):
        shown, base = yaml.safe_load(text), yaml.safe_load(SMALL)
        for name, value in shown.items():  # a part of an experiment, or of its base
            if name in Experiment.model_fields:
                base[name] = value
            elif name == "data":
                base["base"][name] |= value
            else:
                base["base"][name] = value
        path = tmp_path / f"shown-{number}.yaml"
        path.write_text(yaml.safe_dump(base))
        made = load_experiment(path)
        assert plan(made).trials or search.groups(made), text


def named(page, endings):
    """The code blocks of a page that begin with the name of a file, by this name."""
    found = {}
    for language, ending in (("python", "py"), ("yaml", "yaml")):
        for text in blocks(page, language):
            first = text.split("\n", 1)[0].removeprefix("# ")
            if ending in endings and re.fullmatch(rf"\w+\.{ending}", first):
                found[first] = text
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)\s#]+)[^)\s]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_columns_of_an_export_are_documented(tmp_path):
    from pld_ray.data.datasets import load
    from pld_ray.distill.loop import train
    from pld_ray.store.store import Store

    (tmp_path / "pairs.yaml").write_text(SMALL)
    made, store = plan(load_experiment(tmp_path / "pairs.yaml")), Store(tmp_path / "results")
    for trial in made.trials.values():
        train(trial, load(trial.data), store, lambda metrics: None)
    text = BY_NAME["results.md"].read_text().split("## Columns of an export")[1]
    rows = [line.split("|")[1] for line in text.split("\n## ")[0].splitlines() if "|" in line]
    known = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    known |= {"metrics" + name for name in known if name.startswith(".")}
    exported = pld_ray.results(tmp_path / "results").frame()
    assert exported["state"].eq("done").all()
    for name in exported:
        place = name.partition(".")[0]
        part = place == "seconds" and name.endswith("_seconds")
        assert name in known or f"{place}.*" in known or part, name


# ---------------------------------------------------------------- Python


def test_plugins_are_what_a_plugin_may_be(tmp_path):
    imports = (
        "from typing import Annotated\nimport torch\nimport torch.nn.functional as F\n"
        "from pydantic import Field\n"
        "from pld_ray import *\nfrom pld_ray import DistillationLoss\n"
    )
    text = "\n\n".join(blocks(BY_NAME["plugins.md"], "python"))
    (tmp_path / "shown.py").write_text(imports + text)
    plugins.load(str(tmp_path / "shown.py"))
    from pld_ray.config import registry

    loss = pld_ray.create_loss("huber", delta=0.5)
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    expected = nn.functional.huber_loss(student, teacher, reduction="none", delta=0.5).sum(1)
    assert torch.allclose(loss(student, teacher, torch.arange(4) % 3), expected.mean())
    text = text.replace(" ", "")
    for name, known in (("half_sgd", registry.OPTIMIZERS), ("triangle", registry.SCHEDULES)):
        assert name in known and f'"{name}"' in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "python.md"])
def test_python_runs(name, tmp_path, monkeypatch, local_ray):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.yaml").write_text(SMALL)
    torch.manual_seed(0)
    images, labels = torch.randn(64, 3, 8, 8), torch.arange(64) % 3
    student, teacher = (timm.create_model(name, num_classes=3) for name in ("resnet8", "resnet20"))
    loader = DataLoader(TensorDataset(images, labels), batch_size=32)
    cells = pld_ray.plan("pairs.yaml", overrides={"epochs": 5}).cells
    names = {
        "student": student,
        "teacher": teacher,
        "train_loader": loader,
        "val_loader": loader,
        "optimizer": torch.optim.SGD(student.parameters(), 0.1),
        "student_logits": torch.randn(8, 100),
        "teacher_logits": torch.randn(8, 100),
        "trial_id": cells[-1].trial.id,
    }
    for text in blocks(BY_NAME[name], "python"):
        names["labels"] = torch.arange(8)  # a loop over a loader has used the name
        exec(compile(text, name, "exec"), names)
    assert len(names["history"]) == 10 and names["results"].failures == {}
    assert timm.create_model("local-dir:folder", pretrained=True).num_classes == 3
    assert isinstance(names["results"].accuracy_figure(), matplotlib.figure.Figure)


@pytest.mark.slow
def test_commands_run(tmp_path, monkeypatch, cli, local_ray):
    """The commands of all pages in turn, on a smaller `pairs.yaml` than the README shows."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pairs.yaml").write_text(SMALL.replace("100", "40"))
    papers = re.search(r"^( {4}dataset,.*\n( {4}.*\n)+)", BY_NAME["results.md"].read_text(), re.M)
    (tmp_path / "papers.csv").write_text(re.sub("^ {4}", "", papers[1], flags=re.M))
    images = np.random.default_rng(0).integers(0, 256, (24, 70, 90, 3), np.uint8)
    for number, image in enumerate(images):
        folder = tmp_path / "pets" / ("train", "val")[number < 6] / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    ran = set()
    for page in ("README", "experiments", "results", "data", "plugins", "paper"):
        for line in commands(BY_NAME[f"{page}.md"]):
            if (
                line in ran
                or "pld-ray" not in line
                or any(word in f"{line}\n" for word in NOT_HERE)
            ):
                continue
            ran.add(line)
            arguments = shlex.split(line)[1:]
            if "TRIAL" in line:
                arguments[arguments.index("TRIAL")] = pld_ray.plan("pairs.yaml").cells[-1].trial.id
            if arguments[-1] == "experiments/*.yaml":  # as the shell would write it
                arguments[-1:] = sorted((tmp_path / "experiments").glob("*.yaml"))
            done = cli(*arguments, cwd=tmp_path)
            assert done.returncode == 0, line + done.stdout + done.stderr
    assert len(ran) >= 20


@pytest.mark.slow
def test_the_tutorial_from_the_wheel_in_an_empty_folder(tmp_path, monkeypatch):
    """Who has only the docs compares a loss of their own with others, as the tutorial says."""
    build = [sys.executable, *shlex.split("-m hatchling build -t wheel -d"), str(tmp_path / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site, folder = tmp_path / "site", tmp_path / "empty"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    folder.mkdir()
    page = BY_NAME["tutorial.md"]
    for name, text in named(page, ("py", "yaml")).items():
        short = text.replace("train: {epochs: 5, data: {limit: null}}", "train: {epochs: 1}")
        assert name.endswith(".py") or short != text  # the teachers learn on few images here
        (folder / name).write_text(short)
    lines = [line for line in commands(page) if "--address" not in line and line != VERSION]
    code = [text for text in blocks(page, "python") if text.startswith("import pld_ray")]
    check = "assert not student.training and len(results.frame()) == 26\n"
    check += f"assert pld_ray.__file__.startswith({str(site)!r})"
    script = FOLLOW.format(site=str(site), executable=warm.executable(), lines=lines)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(site))  # for Ray's workers
    printed = tmp_path / "printed.txt"
    done = warm.start("\n".join([script, *code, check]), output=printed)
    done.join()
    assert done.exitcode == 0, printed.read_text()
    parts = printed.read_text().split("$ pld-ray ")[1:]
    outputs = {f"pld-ray {part.partition(chr(10))[0]}": part for part in parts}
    assert list(outputs) == lines
    table = outputs["pld-ray tables squared.yaml --all-pairs"]
    for method in ("KD", "DIST", "PLD", "Squared (τ = 1)", "Squared (τ = 2)", "Squared (τ = 4)"):
        assert f"| {method} " in table
    assert "Squared (τ = 1) gain" in table and "Squared (τ = 1) against" in table
    assert "wrn_16_2 → resnet8" in table and "**" not in table  # two seeds decide nothing
    reports = folder / "results" / "reports"
    against = pd.read_csv(reports / "squared" / "against.csv")
    assert set(against["method"]) == {"Squared (τ = 1)"} and len(against) == 5
    assert against["n"].eq(4).all() and against["mean"].notna().all()
    assert len(pd.read_csv(reports / "squared" / "pairs.csv")) == 15
    for figure in ("accuracy.png", "gains.png", "curves.png"):
        assert (reports / "squared" / figure).stat().st_size > 10_000
    page = (reports / "report.html").read_text()
    assert "Squared (τ = 1) against the other methods" in page and "Every two methods" in page
