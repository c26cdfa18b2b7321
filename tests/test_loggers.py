import struct

import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from pld_ray.cli.run import Logger
from pld_ray.config.planning import plan
from pld_ray.data.datasets import load
from pld_ray.distill.loop import train
from pld_ray.errors import InputError
from pld_ray.store.store import Store
from pld_ray.sweep import checks, loggers, runner
from pld_ray.sweep.progress import ProgressView

TEXT = """
base:
  data: {name: digits, limit: 100}
  student: resnet8
  loss: ce
  epochs: 4
  validate_every: 3
  batch_size: 50
"""


def run(made, store, names):
    followed = loggers.create(names, "small", store)
    with ProgressView(made, made.trials, Console(quiet=True)) as view:
        failures = runner.run(
            made, checks.check_trials(made.trials).images, store, view, loggers=followed
        )
    return failures, [logger.problem for logger in followed]


def tensorboard(folder, metric):
    """step -> metric, read from the bytes of an event file: length, crc, event, crc."""
    (path,) = folder.rglob("events.out.tfevents.*")
    content, found = path.read_bytes(), {}
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]
        for value in event.summary.value:
            if value.tag == f"ray/tune/{metric}":
                assert event.step not in found
                found[event.step] = value.simple_value
    return found


def records(content):
    """The records of LevelDB's log format: blocks of 32 KiB of parts (crc, length, type, part)."""
    place, record = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # too short for a header: padding
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<4xHB", content[place : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def wandb(folder, metric):
    """step -> metric, read from the file of a run that has not been sent to a server."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.rglob("run-*.wandb")
    found = {}
    for record in records(path.read_bytes()):
        items = Record.FromString(record).history.item
        row = {"/".join(item.nested_key) or item.key: item.value_json for item in items}
        if metric in row:
            found[int(row["training_iteration"])] = float(row[metric])
    return found


def interrupted(trial, store, monkeypatch):
    """Two epochs of a trial."""
    monkeypatch.setattr("pld_ray.distill.keeping.CHECKPOINT_SECONDS", 0)

    def report(metrics):
        if metrics["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(trial, load(trial.data), store, report)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload``")  # of mlflow's own database code
def test_every_logger_has_every_epoch(local_ray, experiment, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("WANDB_MODE", "offline")
    made, store = plan(experiment(TEXT)), Store(tmp_path / "results")
    (trial,) = made.trials.values()
    interrupted(trial, store, monkeypatch)
    assert len(store.epochs(trial.id)) == 2
    assert run(made, store, Logger) == ({}, [None] * 3)
    root = tmp_path / "results"
    client = mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    assert found.info.status == "FINISHED" and trial.id in found.info.run_name
    assert found.data.params["trial/student/name"] == "resnet8"
    for metric, epochs in (("train_loss", {1, 2, 3, 4}), ("top1", {3, 4})):
        logged = {e["epoch"]: e[metric] for e in store.epochs(trial.id) if metric in e}
        assert logged.keys() == epochs
        expected = pytest.approx(logged)
        assert tensorboard(root / "tensorboard" / "small", metric) == expected
        assert wandb(root / "wandb", metric) == expected
        history = client.get_metric_history(found.info.run_id, metric)
        assert {point.step: point.value for point in history} == expected


@pytest.mark.slow
def test_a_logger_that_fails_is_left_out(local_ray, experiment, tmp_path, monkeypatch):
    def end(self, *args):
        raise ConnectionError("the server is away\nand stays away")

    monkeypatch.setattr(loggers._TensorBoard, "log_trial_result", end)
    made, store = plan(experiment(TEXT)), Store(tmp_path / "results")
    failures, problems = run(made, store, ["tensorboard"])
    assert failures == {} and store.finished(made.trials) == made.trials.keys()
    assert problems == ["ConnectionError: the server is away"]


def test_a_logger_that_cannot_begin_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://server")
    with pytest.raises(InputError, match="--log mlflow: .*nowhere"):
        loggers.create(["mlflow"], "small", Store(tmp_path))
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'pld-ray\[wandb\]'"):
        loggers.create(["wandb"], "small", Store(tmp_path))
