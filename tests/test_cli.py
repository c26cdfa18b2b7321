import json
import re
import subprocess
import sys

import pytest
import torch

import pld_ray
from pld_ray.config.experiment import load_experiment
from pld_ray.config.planning import plan
from pld_ray.losses import REGISTRY
from pld_ray.store.store import Store

BAD = {
    "plan demmo": "'demmo' is not a file and not a shipped experiment: did you mean 'demo'?",
    "plan demo --set optimizer.lrr=1": "demo: optimizer.lrr: unknown field; did you mean 'lr'?",
    "run demo --set student=resnet9": "model 'resnet9' is not known to timm; did you mean",
    "run demo --set optimizer=adamx": "optimizer.name is 'adamx': not in timm; did you mean",
    "run demo --set data.name=folder:/nowhere": "the folder /nowhere does not exist",
    "run demo --set teacher=resnet18.a1_in1k": "has 1000 classes, but the data has 10;",
    "run demo --address 127.0.0.1:9": "no Ray cluster answers there",
    "run demo --set loss.temperature=-1": "loss.temperature is -1: input should be greater than 0",
    "run demo --set loss=pld --set loss.top_k=0": "loss.top_k is 0: expected a number of classes",
    "bank rm x": "bank rm x: no such bank in ",
    "bank rm": "bank rm: expected either keys of banks (see pld-ray bank ls) or --all",
    "run demo --set epochs=99999999": "TB and there is room for ",
    "run demo --set data.cutmix=1": "data.cutmix: loss pld ranks the classes with the label first",
    "bank build demo --set grid.loss=[ce]": "demo: none of its trials reads a bank",
    "landscape demo": "demo: no trial has finished; run the experiment first",
    "run demo landscape --smoke": "'landscape' is not a file and not a shipped experiment",
    "run demo --set data.random_resized_crop=true": "random_resized_crop needs image_size",
    "run demo --set resources.gpus_per_worker=1.5": "gpus_per_worker is 1.5: expected a whole",
    "status demo --storage nosuch://x": "storage 'nosuch://x': expected a folder or a URI",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(cli, command, tmp_path):
    done = cli(*command.split(), cwd=tmp_path)
    assert done.returncode == 2
    assert BAD[command] in done.stderr and done.stderr.startswith("pld-ray: ")
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.*"))  # nothing half-written


def test_the_command_is_its_own_process_too(tmp_path):
    command = [sys.executable, "-m", "pld_ray.cli", "plan", "demmo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr == f"pld-ray: {BAD['plan demmo']}\n"


def test_plan_prints_trials_and_json(cli, tmp_path):
    done = cli("plan", "demo", "--json", cwd=tmp_path)
    planned = json.loads(done.stdout)
    assert planned["cells"] == 20 and len(planned["trials"]) == 21
    assert planned["trials"][0]["teacher"] and not planned["trials"][0]["done"]
    made = plan(load_experiment("demo"))
    assert [t["id"] for t in planned["trials"]] == list(made.trials)
    store, first = Store(tmp_path / "results"), next(iter(made.trials.values()))
    store.finish(
        first, {"metrics": {"top1": 5.0}, "seconds": {"seconds": 5.0}}, {"w": torch.zeros(1)}
    )
    text = cli("plan", "demo", cwd=tmp_path).stdout
    assert "21 unique trials" in text and "1 done, 20 to run (1,200 epochs)" in text
    assert text.splitlines()[1].split() == [
        first.id,
        *["ce", "resnet20", "seed", "0", "is", "a", "teacher", "20", "done", "5", "s"],
    ]


def test_plan_of_several_experiments_says_what_they_share(cli, tmp_path):
    done = cli("plan", "cifar100_methods", "runtime", "demo", cwd=tmp_path)
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line}
    # cells, trials, new, done, epochs to run; a teacher has 240 epochs, a student 250
    assert rows["cifar100_methods"] == ["132", "136", "136", "0", str(4 * 240 + 132 * 250)]
    assert rows["runtime"] == ["44", "48", "0", "0", "0"]
    assert "196 cells, 157 unique trials: sharing saves 48 trials and 11,960 of" in done.stdout
    found = json.loads(cli("plan", "runtime", "demo", "--json", cwd=tmp_path).stdout)
    assert [e["experiment"] for e in found["experiments"]] == ["runtime", "demo"]
    assert found["unique"] == 48 + 21


def test_tables_without_results_are_the_reported_ones(cli, tmp_path):
    printed = cli("tables", cwd=tmp_path).stdout
    for heading in ("Table 1:", "Table 2:", "Tables 5 and 8:", "Table 13:"):
        assert heading in printed
    assert len(list(tmp_path.rglob("table-*.md"))) == 11
    assert not list(tmp_path.rglob("table.md"))  # of nothing that was run here


def test_status_names_failures_and_sets_the_exit_code(cli, tmp_path):
    made, store = plan(load_experiment("demo")), Store(tmp_path / "results")
    assert cli("status", "demo", cwd=tmp_path).returncode == 0
    trial = made.cells[-1].trial
    store.fail(trial.id, "the training loss is nan in epoch 3")
    done = cli("status", "demo", cwd=tmp_path)
    assert done.returncode == 1
    assert f"FAILED: the training loss is nan in epoch 3 ({store.folder(trial.id)})" in done.stdout
    assert done.stdout.count("not begun") == 20


def test_help_needs_no_heavy_import(tmp_path):
    code = (
        "import sys\nfrom pld_ray.cli import main as cli\nsys.argv = ['pld-ray', '--help']\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'timm', 'ray', 'pandas', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_plan_needs_no_torch(tmp_path):
    code = (
        "import sys\nfrom pld_ray import load_experiment, plan, Store\n"
        "plan(load_experiment('demo')); Store('x').trials()\n"
        "print([m for m in ('torch', 'timm', 'ray') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "[]"


def test_two_experiments_of_one_name_are_told(cli, tmp_path):
    text = "base: {data: digits, student: resnet8, loss: ce, epochs: 1}\n"
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.yaml").write_text(text)
    first = cli("tables", "one/same.yaml", cwd=tmp_path)
    again = cli("tables", "one/same.yaml", cwd=tmp_path)
    assert "note:" not in first.stderr + again.stderr
    other = cli("tables", "two/same.yaml", cwd=tmp_path)
    assert f"held the reports of {tmp_path}/one/same.yaml" in other.stderr
    assert "set name: in one of the files to keep both" in other.stderr


def test_list_shows_parameters_with_defaults_and_bounds(cli, tmp_path):
    found = cli("list", "losses", "kd", cwd=tmp_path).stdout
    assert re.search(r"^kd +KD: Knowledge distillation \(Hinton et al. 2015\)", found, re.MULTILINE)
    assert "temperature = 4.0 (above 0)" in found
    assert "ce_weight = 0.1 (at least 0, at most 1)" in found
    assert "divergence = forward_kl (forward_kl, reverse_kl, jensen_shannon)" in found
    assert not re.search("^(ce|pld) ", found, re.MULTILINE)
    everything = cli("list", "losses", cwd=tmp_path).stdout
    assert set(re.findall(r"^(\w+) ", everything, re.MULTILINE)) == REGISTRY.keys()


@pytest.mark.parametrize(
    ("kind", "word", "line"),
    [
        ("networks", "RESNET8", "resnet8    ResNet-8 for 32x32 images."),
        ("datasets", "digits", "digits  Load 1,797 handwritten digits"),
        ("optimizers", "adamw", "adamw "),
        ("experiments", "demo", "demo  Handwritten digits, 200 training images"),
    ],
)
def test_list_finds_a_word(cli, tmp_path, kind, word, line):
    found = cli("list", kind, word, cwd=tmp_path).stdout
    assert any(each.startswith(line) for each in found.splitlines())
    assert all(word.lower() in each.lower() for each in found.splitlines())


def test_list_of_nothing(cli, tmp_path):
    done = cli("list", "losses", "kdd", cwd=tmp_path)
    assert done.returncode == 2
    assert "list losses: nothing has 'kdd' in it; did you mean 'kd' or" in done.stderr


def test_version(cli, tmp_path):
    assert cli("--version", cwd=tmp_path).stdout == f"pld-ray {pld_ray.__version__}\n"
