"""A part of an experiment: `methods` and `pairs`, from the command line, YAML and Python."""

import json

import pytest

import pld_ray
from analysis.records import frames
from pld_ray.config.experiment import Experiment, load_experiment
from pld_ray.config.planning import plan
from pld_ray.errors import InputError
from pld_ray.store.store import Store
from pld_ray.sweep import search

TEXT = """
base:
  data: {name: digits, limit: 100}
  optimizer: {name: sgd, lr: 0.05}
  epochs: 2
grid:
  teacher, student:
    - [wrn_16_2, resnet8]
    - [{name: wrn_16_2, train: {epochs: 1}}, wrn_40_1]
    - [resnet20.tv_in1k, resnet8]
    - [vgg13_cifar, mobilenetv2_cifar]
  loss: [ce, {name: kd, temperature: [1, 4]}, dkd, pld]
rules:
  - {when: {student: wrn_40_1}, set: {optimizer.lr: 0.01}}
  - {when: {student: wrn_40_1, loss: dkd}, set: {loss.beta: 2}}
seeds: [0, 1]
smoke:
  base: {epochs: 1}
  models: {resnet20: resnet14, wrn_40_1: wrn_16_1}
"""


def found(made):
    return [(c.teacher, c.trial.student.name, c.trial.loss.name) for c in made.cells]


def test_a_part_has_the_cells_of_the_whole(experiment):
    whole = plan(experiment(TEXT))
    assert len(whole.cells) == 4 * 5 * 2 and len(whole.teacher_ids) == 3
    part = plan(experiment(TEXT, "methods=[dkd, KD]", 'pairs=["wrn_16_2:wrn_40_1"]'))
    expected = [("wrn_16_2", "wrn_40_1", loss) for loss in ("kd", "kd", "dkd") for _ in (0, 1)]
    assert found(part) == sorted(expected, reverse=True)
    assert [cell.trial.id for cell in part.cells] == [
        cell.trial.id
        for cell in whole.cells
        if cell.trial.student.name == "wrn_40_1" and cell.trial.loss.name in ("kd", "dkd")
    ]
    assert part.teacher_ids < whole.teacher_ids and len(part.trials) == 6 + 1
    assert {cell.trial.optimizer.lr for cell in part.cells} == {0.01}
    assert part.cells[-1].trial.loss.beta == 2
    (teacher,) = part.teacher_ids
    assert part.trials[teacher].epochs == 1 and part.trials[teacher].optimizer.lr == 0.05


@pytest.mark.parametrize(
    ("pairs", "cells"),
    [
        (["*:resnet8"], 20),
        (["wrn*:*"], 20),
        (["resnet20:resnet8"], 10),
        (["resnet20.tv_in1k:resnet8", "wrn_16_2:resnet8"], 20),
        (["vgg13:mobilenetv2_cifar", "resnet20:resnet8"], 20),
        (["vgg13*:mobilenetv2"], 10),
    ],
)
def test_pairs_may_have_wildcards_and_tags(experiment, pairs, cells):
    made = plan(experiment(TEXT, f"pairs={json.dumps(pairs)}"))
    assert len(made.cells) == cells
    # the two rules are of the other pair, which is no error in a part


def test_the_miniature_of_a_part_is_named_as_the_original(experiment):
    experiment(TEXT)
    file = experiment.folder / "small.yaml"
    part = {"methods": ["pld"], "pairs": ["resnet20:resnet8", "wrn_16_2:wrn_40_1"]}
    small = plan(load_experiment(file, part, smoke=True))
    assert found(small) == [
        (teacher, student, "pld")
        for teacher, student in (("wrn_16_2", "wrn_16_1"), ("resnet14", "resnet8"))
        for _ in (0, 1)
    ]
    assert [(c.teacher, c.trial.student.name) for c in small.originals] == [
        (teacher, student)
        for teacher, student in (("wrn_16_2", "wrn_40_1"), ("resnet20.tv_in1k", "resnet8"))
        for _ in (0, 1)
    ]


def test_losses_that_vary_with_other_fields_and_overrides(experiment):
    text = TEXT.split("grid:")[0] + "  student: resnet8\n  teacher: wrn_16_2\ngrid:\n"
    rows = "  loss, epochs: [[ce, 1], [kd, 2], [pld, 3]]\n  loss.temperature: [1, 2]\n"
    made = plan(experiment(text + rows, "methods=[ce]"))  # although CE has no temperature
    assert {cell.trial.epochs for cell in made.cells} == {1} and len(made.trials) == 1
    made = plan(experiment(text + rows, "methods=[pld]", "student=resnet14"))
    assert [cell.trial.loss.temperature for cell in made.cells] == [1, 2]
    made = plan(experiment(text + rows, 'pairs=["wrn_16_2:resnet14"]', "student=resnet14"))
    assert len(made.cells) == 6


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"methods": ["kdd"]}, "methods has 'kdd': expected some of ce, kd, dkd, pld; did you"),
        ({"methods": ["kd", "xyz"]}, "methods has 'xyz': expected some of ce, kd, dkd, pld$"),
        (
            {"pairs": ["wrn_16_2:resnet9"]},
            "pairs has 'wrn_16_2:resnet9': expected some of wrn_16_2:resnet8, wrn_16_2:wrn_40_1, "
            r"resnet20.tv_in1k:resnet8, vgg13_cifar:mobilenetv2_cifar; "
            r"did you mean 'wrn_16_2:resnet8' or 'wrn_16_2:wrn_40_1'\?$",
        ),
        ({"pairs": ["resnet8"]}, "pairs has 'resnet8': expected some of wrn_16_2:resnet8, "),
        ({"methods": "kd"}, "methods is 'kd': input should be a valid list"),
        ({"methods": ["ce"], "reference": "pld"}, "methods is .'ce'., without the .*'pld'"),
        ({"methods": ["ce"], "reference": "KD (τ = 4)"}, "expected 'KD .* too, .*reference=ce$"),
    ],
)  # fmt: skip
def test_names_that_are_not_there(experiment, overrides, said):
    experiment(TEXT)
    with pytest.raises(InputError, match=said) as error:
        plan(load_experiment(experiment.folder / "small.yaml", overrides))
    assert str(error.value).count(". ") == 0  # one sentence


def test_two_names_without_a_common_cell(experiment):
    rows = "[[wrn_16_2, resnet8, kd], [wrn_16_2, wrn_40_1, pld]]"
    text = TEXT.split("grid:")[0] + f"grid: {{'teacher, student, loss': {rows}}}"
    part = ("methods=[kd]", 'pairs=["*:wrn_40_1"]')
    with pytest.raises(InputError, match="no cell has both"):
        plan(experiment(text, *part))


def test_the_reference_of_a_part(experiment, tmp_path):
    def reference(*sets):
        rows = frames.frame(plan(experiment(TEXT, *sets)), Store(tmp_path / "none"))
        return set(rows.loc[rows["reference"], "method"])

    part = 'pairs=["*:wrn_40_1"]'
    assert reference() == reference(part) == reference("methods=[dkd,pld]") == {"PLD"}
    assert reference("methods=[dkd, ce]") == {"CE"}  # there is no PLD in it: the first one
    assert reference("reference=dkd", part, "methods=[dkd, pld]") == {"DKD"}
    sets = ("reference=KD (τ = 4)", part)
    assert reference(*sets, "methods=[kd, pld]") == reference(*sets) == {"KD (τ = 4)"}


def test_searches_have_parts_too(experiment, tmp_path):
    more = (
        "search={algorithm: random, num_trials: 2, space: {kd.temperature: {uniform: [1, 8]}}}",
        "seeds=[]",
        "methods=[ce, pld]",
        'pairs=["*:wrn_40_1"]',
    )
    groups = search.groups(experiment(TEXT, *more))
    assert [group.cell.trial.loss.name for group in groups] == ["ce", "pld"]
    assert {group.cell.trial.student.name for group in groups} == {"wrn_40_1"}


def test_python_takes_the_fields_as_overrides_or_in_an_experiment(tmp_path):
    part = {"methods": ["kd"], "pairs": ["resnet20:resnet8"]}
    by_name = pld_ray.plan("demo", storage=tmp_path, overrides=part)
    assert [cell.trial.loss.name for cell in by_name.cells] == ["kd"] * 5
    base = {"data": "digits", "student": "resnet8", "teacher": "resnet20", "epochs": 1}
    made = Experiment(name="own", base=base, grid={"loss": ["ce", "kd", "pld"]}, methods=["p*d"])
    assert [cell.trial.loss.name for cell in pld_ray.plan(made, storage=tmp_path).cells] == ["pld"]


# ---------------------------------------------------------------- the command line

PART = ("--methods", "kd, pld", "--pairs", "resnet20:resnet8")


def test_commands_take_a_part(cli, tmp_path):
    planned = json.loads(cli("plan", "demo", *PART, "--json", cwd=tmp_path).stdout)
    assert planned["cells"] == 10 and len(planned["trials"]) == 11
    assert planned["trials"][0]["teacher"]
    lines = cli("status", "demo", *PART, "--set", "seeds=[3]", cwd=tmp_path).stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["ce", "kd", "pld"]
    done = cli("plan", "demo", "runtime", "--methods", "ce,pld", cwd=tmp_path)
    rows = {line.split()[0]: line.split()[1:3] for line in done.stdout.splitlines() if line}
    assert rows["demo"] == ["10", "11"] and rows["runtime"] == ["8", "12"]
    table = cli("tables", "cifar100_methods", "--methods", "ce,pld", cwd=tmp_path).stdout
    assert "Table 1" in table and "| PLD" in table


COMMANDS = (
    *("run", "plan", "status", "tables", "literature", "figures", "best", "power", "landscape"),
    *("report", "export", "bank build"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_other_names(cli, tmp_path, command):
    done = cli(*command.split(), "demo", "--methods", "kd,pldd", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == (
        "pld-ray: demo: methods has 'pldd': expected some of ce, kd, dist, pld; did you mean "
        "'pld'?\n"
    )
    done = cli(*command.split(), "demo", "--pairs", "resnet20-resnet8", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == (
        "pld-ray: demo: pairs has 'resnet20-resnet8': expected some of resnet20:resnet8; did you "
        "mean 'resnet20:resnet8'?\n"
    )


@pytest.mark.parametrize("words", ["", "kd,", "kd,,pld", ","])
def test_empty_names(cli, tmp_path, words):
    done = cli("plan", "demo", "--methods", words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"pld-ray: --methods is {words!r}: expected names such as kd,pld\n"


def test_a_part_of_no_experiment(cli, tmp_path):
    for command in ("export", "landscape"):
        done = cli(command, "--methods", "kd", cwd=tmp_path)
        assert done.returncode == 2 and "expected an EXPERIMENT too" in done.stderr
    assert not list(tmp_path.rglob("*.*"))
