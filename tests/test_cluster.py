"""Two nodes of one CPU each, on this machine; the real command joins them."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress

import psutil
import pytest
import warm

from pld_ray.config.experiment import load_experiment
from pld_ray.config.planning import plan
from pld_ray.store.store import Store
from pld_ray.sweep import search

pytestmark = pytest.mark.slow
TEXT = """
base:
  data: {name: digits, limit: 100}
  student: resnet8
  teacher: {name: resnet8, train: {epochs: 1, workers: 1}}
  epochs: 3
  batch_size: 50
grid: {loss: [ce, kd]}
"""
# prints the address, then lists of what the cluster has free, one a line that it reads
CLUSTER = """
import socket, sys, ray
sys.executable = sys.argv[1]
from ray.cluster_utils import Cluster
import pld_ray.sweep
with socket.socket() as free:  # another Ray of these tests has the dashboard's usual port
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": port}
cluster = Cluster(initialize_head=True, head_node_args=head)
cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
ray.init(cluster.address, log_to_driver=False)
for line in sys.stdin:
    if line == "nodes\\n":
        print("=", sum(node["Alive"] for node in ray.nodes()), flush=True)
    else:
        print("=", ray.available_resources().get("CPU", 0), flush=True)
"""


class Cluster(subprocess.Popen):
    def __init__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # short, for Ray's sockets
        # apart from the place where others look for a cluster to join
        environment = os.environ | {"RAY_TMPDIR": self.folder}
        super().__init__(
            [sys.executable, "-c", CLUSTER, warm.executable()],
            stderr=subprocess.DEVNULL,
            env=environment,
            **pipes,
        )
        self.address = self.stdout.readline().strip()

    def ask(self, what):
        self.stdin.write(f"{what}\n")
        self.stdin.flush()
        while not (line := self.stdout.readline()).startswith("= "):
            assert line  # Ray's own messages come between
        return float(line[2:])

    def all_back(self, cpus=2.0):
        deadline = time.monotonic() + 300
        while self.ask("free") != cpus:
            assert time.monotonic() < deadline, "the cluster's resources did not come back"
            time.sleep(1)


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as cluster:
        yield cluster
        for child in psutil.Process(cluster.pid).children(recursive=True):
            child.kill()
        cluster.kill()
    shutil.rmtree(cluster.folder, ignore_errors=True)


def run(cluster, folder, *sets, text=TEXT):
    path = folder / "small.yaml"
    path.write_text(text)
    overrides = (x for s in sets for x in ("--set", s))
    place = "--storage", folder / "results", "--address", cluster.address
    driver = warm.command("run", path, *place, *overrides, output=folder / "printed.txt")
    return driver, load_experiment(path, sets), Store(folder / "results")


def ended(driver, folder):
    """Wait until a command has ended; return its exit code and what it printed."""
    driver.join()
    return driver.exitcode, (folder / "printed.txt").read_text()


def wait(condition):
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def children(cluster, wanted):
    found = []
    for process in psutil.Process(cluster.pid).children(recursive=True) + warm.workers():
        with suppress(psutil.Error, IndexError):
            if wanted(process):
                found.append(process)
    return found


def test_a_group_across_nodes_a_death_in_it_and_the_bank_they_share(cluster, tmp_path):
    driver, made, store = run(cluster, tmp_path, "workers=2", "epochs=40", "grid.loss=[kd]")
    trial = plan(made).cells[0].trial
    wait(lambda: store.load_checkpoint(trial))
    workers = children(cluster, lambda process: "RayTrainWorker" in process.cmdline()[0])
    assert len(workers) == 2
    workers[-1].kill()
    code, output = ended(driver, tmp_path)
    assert code == 0, output
    trials = plan(made).trials
    assert store.finished(trials) == trials.keys()
    assert store.record(trial.id) and store.trial(trial.id).workers == 2 and len(store.banks()) == 2
    assert [epoch["epoch"] for epoch in store.epochs(trial.id)] == list(range(1, 41))
    assert store.record(trial.id)["metrics"]["top1"] > 20  # of ten classes
    cluster.all_back()


SHIPPED = """
import sys
from pld_ray.sweep.cluster import connected
import ray

def where():
    import analysis, pld_ray
    return pld_ray.__file__, analysis.__file__

with connected(sys.argv[1]):
    print(*ray.get(ray.remote(where).remote()))
"""


def test_workers_run_the_code_of_whoever_joins(cluster, tmp_path):
    command = [sys.executable, "-c", SHIPPED, cluster.address]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    places = found.stdout.split()
    assert len(places) == 2
    assert all("runtime_resources/py_modules_files" in place for place in places), places


def test_groups_that_are_stopped_early_give_all_back(cluster, tmp_path):
    text = (
        TEXT.replace("[ce, kd]", "[ce]")
        + """
search:
  space: {optimizer.lr: {choice: [1e-2, 1e-6]}}
  algorithm: grid
  scheduler: asha
"""
    )
    driver, made, store = run(cluster, tmp_path, "workers=2", "epochs=12", text=text)
    code, output = ended(driver, tmp_path)
    assert code == 0, output
    states = [drawn.state for drawn in search.look(made, store)[0].drawn]
    assert "stopped" in states and "done" in states
    assert "stopped by asha" in output
    cluster.all_back()


def test_a_node_that_dies_takes_nothing_with_it(cluster, tmp_path):
    driver, made, store = run(cluster, tmp_path, "epochs=30", "seeds=[0,1]")
    wait(lambda: len(store.finished(store.trials())) >= 2)
    raylets = children(cluster, lambda process: process.name() == "raylet")
    [raylet for raylet in raylets if "--head" not in raylet.cmdline()][-1].kill()
    code, output = ended(driver, tmp_path)
    assert code == 0, output
    trials = plan(made).trials
    assert store.finished(trials) == trials.keys()
    assert cluster.ask("nodes") == 1
    cluster.all_back(1.0)
    # what needs both nodes is refused now, in a sentence
    driver, _, _ = run(cluster, tmp_path, "workers=2", "seeds=[9]")
    code, output = ended(driver, tmp_path)
    assert code == 2 and "needs 1 CPUs for each of its 2 workers" in output
