"""What lies in deploy/, by the schemas and tools of those who read it."""

import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from pld_ray.config.experiment import load_experiment
from pld_ray.config.planning import plan

DEPLOY = Path(__file__).parent.parent / "deploy"


@pytest.mark.parametrize("name", ["cluster.yaml", "aws-spot.yaml"])
def test_rays_own_schema_accepts_the_cluster_files(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((DEPLOY / name).read_text()))
    validate_config(config)
    assert config["max_workers"] in (2, 8) and config["cluster_name"] == "pld-ray"


def test_the_pods_of_the_ray_job_are_valid():
    job = yaml.safe_load((DEPLOY / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
        kubernetes_validate.validate(pod, "1.31", strict=True)


def test_shellcheck_finds_nothing_in_the_slurm_script():
    command = [Path(sys.executable).with_name("shellcheck"), DEPLOY / "slurm.sh"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_the_commands_in_them_name_experiments_and_fields_that_exist():
    found = 0
    for path in DEPLOY.iterdir():
        text = re.sub(r"\\?\n#?\s+(?=--)", " ", path.read_text())
        for command in re.findall(r"pld-ray run ([\w.=:/ -]+)", text):
            name, *words = shlex.split(command)
            sets = [after for word, after in pairwise(words) if word == "--set"]
            assert plan(load_experiment(name, tuple(sets))).cells
            found += 1
    assert found == 3
