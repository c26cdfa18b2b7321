import hashlib
import json
import multiprocessing
from pathlib import Path
from uuid import uuid4

import pytest
import torch
import warm
from creating import create
from small import SMALL

from pld_ray.config.planning import plan
from pld_ray.config.trial import Trial
from pld_ray.data.datasets import load
from pld_ray.distill.loop import train
from pld_ray.errors import InputError
from pld_ray.store.documents import to_document, to_lines
from pld_ray.store.outcomes import Outcome
from pld_ray.store.store import Store

TRIAL = Trial.model_validate({"data": "digits", "student": "resnet8", "loss": "ce", "epochs": 3})


RECORD = {"metrics": {"top1": 50.0}, "seconds": {"seconds": 1.25}}


@pytest.fixture(params=["local", "memory", "s3"])
def store(request, tmp_path):
    if request.param == "local":
        return Store(tmp_path)
    if request.param == "memory":
        return Store(f"memory:/{tmp_path}")
    return Store(f"{request.getfixturevalue('s3')}/{uuid4().hex}")


def test_round_trip(store):
    assert store.trials() == {} and store.record(TRIAL.id) is None
    assert store.load_checkpoint(TRIAL) is None and store.epochs(TRIAL.id) == []
    store.start(TRIAL)
    spec = store.files.read(f"trials/{TRIAL.id}/trial.json")
    assert Trial.model_validate_json(spec) == TRIAL
    state = {
        "history": [{"epoch": 1, "seconds": 2.0, "top1": 3.0}],
        "student": {"w": torch.arange(3.0)},
    }
    store.checkpoint(TRIAL, state)
    store.log(TRIAL, state["history"])
    loaded = store.load_checkpoint(TRIAL)
    assert loaded["history"] == state["history"] == store.epochs(TRIAL.id)
    assert torch.equal(loaded["student"]["w"], state["student"]["w"])
    store.fail(TRIAL.id, "loss is nan", "Traceback\n  line")
    assert store.failure(TRIAL.id) == {
        "reason": "loss is nan",
        "traceback": ["Traceback", "  line"],
        "final": False,
    }
    assert store.finished([TRIAL.id, "other"]) == set()
    store.finish(TRIAL, RECORD, {"w": torch.arange(3.0)})
    assert store.finished([TRIAL.id, "other"]) == store.finished(store.trials()) == {TRIAL.id}
    assert store.record(TRIAL.id)["metrics"] == RECORD["metrics"]
    assert store.failure(TRIAL.id) is None and store.load_checkpoint(TRIAL) is None
    assert torch.equal(store.load_weights(TRIAL)["w"], torch.arange(3.0))
    names = set(store.files.listed(f"trials/{TRIAL.id}"))
    assert names == {"trial.json", "epochs.jsonl", "record.json", "student.safetensors"}


def test_chunks(store):
    store.start_bank("k", {"teacher": "resnet8"})
    store.write_chunk("k/0/1.logits", b"abc")
    store.write_chunk("k/1/0.logits", b"")
    assert store.banks() == {
        "k": {
            "bank.json": len(store.files.read("banks/k/bank.json")),
            "0/1.logits": 3,
            "1/0.logits": 0,
        }
    }
    assert store.bank("k") == {"teacher": "resnet8"} and store.bank("none") is None
    assert bytes(store.read_chunk("k/0/1.logits")) == b"abc"
    assert len(store.read_chunk("k/1/0.logits")) == 0 and store.read_chunk("k/0/0.logits") is None
    names = ["k/1/0.logits", "k/0/0.logits", "k/0/1.logits", "k/2/0.logits"]
    assert store.missing_chunks(names) == ["k/0/0.logits", "k/2/0.logits"]
    store.drop_chunk("k/0/1.logits")
    store.drop_chunk("k/0/1.logits")
    assert store.missing_chunks(names) == names[1:]
    store.drop_bank("k")
    store.drop_bank("k")
    assert store.banks() == {}


def test_many_files_are_read_with_one_request_each(store, monkeypatch):
    contents = {f"f/{number}": bytes([number]) * number for number in range(5)}
    for path, content in contents.items():
        store.files.write(path, content)

    def asked(*_):
        raise AssertionError("a request for the size")

    monkeypatch.setattr(store.files.fs, "_size", asked, raising=False)
    assert store.files.read_many([*contents, "f/none"]) == contents
    assert store.files.read_many(["f/3"]) == {"f/3": b"\x03\x03\x03"}
    assert store.files.read_many(["f/none"]) == {}


def test_of_many_who_create_a_file_one_succeeds(store):
    if store.uri.startswith("memory"):
        pytest.skip("lives in one process")
    spawn = multiprocessing.get_context("spawn")
    start, won = spawn.Event(), spawn.Queue()
    words = [b"a", b"b", b"c", b"d"]
    many = [spawn.Process(target=create, args=(store.uri, "x/y", w, start, won)) for w in words]
    for process in many:
        process.start()
    start.set()
    found = dict(won.get(timeout=400) for _ in many)
    for process in many:
        process.join()
    assert sorted(found) == [False, True]  # a dict keeps one who failed
    assert store.files.read("x/y") == found[True] * 1000
    assert not store.files.create("x/y", b"late")
    assert list(store.files.listed("x")) == ["y"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.checkpoint(TRIAL, {"history": [{"epoch": 1}]})

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        store.checkpoint(TRIAL, {"history": [{"epoch": 1}, {"epoch": 2}]})
    assert Store(tmp_path).load_checkpoint(TRIAL)["history"] == [{"epoch": 1}]
    assert not list((tmp_path / "trials" / TRIAL.id).glob(".*"))


def flipped(content, byte):
    return content[:byte] + bytes([content[byte] ^ 4]) + content[byte + 1 :]


DAMAGES = [
    lambda content: content[: len(content) // 2],
    lambda content: b"",
    lambda content: b"x" * 99,
    lambda content: flipped(content, len(content) // 3),
    lambda content: flipped(content, len(content) - 9),
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["checkpoint.pt", "record.json", "failure.json", "landscape.json"])
def test_what_is_damaged_is_not_there(tmp_path, damage, name):
    store = Store(tmp_path)
    store.finish(TRIAL, RECORD, {"w": torch.zeros(1)})
    store.checkpoint(TRIAL, {"history": [], "student": {"w": torch.zeros(1000)}})
    store.fail(TRIAL.id, "loss is nan", "Traceback")
    store.keep_landscape(TRIAL, {"trace": 3.5, "points": [1, 2, 3]})
    read = {
        "checkpoint.pt": lambda: store.load_checkpoint(TRIAL),
        "record.json": lambda: store.record(TRIAL.id),
        "failure.json": lambda: store.failure(TRIAL.id),
        "landscape.json": lambda: store.landscape(TRIAL.id),
    }[name]
    assert read() is not None
    path = tmp_path / "trials" / TRIAL.id / name
    path.write_bytes(damage(path.read_bytes()))
    assert read() is None
    assert store.finished([TRIAL.id]) == (set() if name == "record.json" else {TRIAL.id})


@pytest.mark.parametrize("damage", [*DAMAGES, None])
@pytest.mark.parametrize("by", ["load_weights", "intact"])
def test_damaged_weights_take_their_record_with_them(tmp_path, damage, by):
    store = Store(tmp_path)
    store.finish(TRIAL, RECORD, {"w": torch.zeros(1000)})
    path = tmp_path / "trials" / TRIAL.id / "student.safetensors"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == store.weights_digest(TRIAL)
    assert store.intact(TRIAL)
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    if by == "intact":
        assert not store.intact(TRIAL)
    else:
        with pytest.raises(InputError, match=r"student.safetensors: missing or damaged"):
            store.load_weights(TRIAL)
    assert store.finished([TRIAL.id]) == set()


def test_records_without_a_checksum_are_read(tmp_path):
    path = tmp_path / "trials" / TRIAL.id / "record.json"
    path.parent.mkdir(parents=True)
    old = RECORD | {"weights_sha256": "0" * 64}
    path.write_text(json.dumps(old))
    assert Store(tmp_path).record(TRIAL.id) == old
    for broken in ([1, 2], {}, RECORD, old | {"metrics": {"top1": "high"}}):
        path.write_text(json.dumps(broken))
        assert Store(tmp_path).record(TRIAL.id) is None


def test_a_checkpoint_cannot_run_code(tmp_path):
    store = Store(tmp_path)
    store.checkpoint(TRIAL, {"history": [], "student": print})
    assert store.load_checkpoint(TRIAL) is None


def test_a_uri_is_a_store_too(tmp_path):
    store = Store(tmp_path.as_uri())
    store.finish(TRIAL, RECORD, {"w": torch.zeros(1)})
    assert Store(tmp_path).record(TRIAL.id) is not None


@pytest.mark.parametrize("root", ["nosuch://bucket/x", "", "a\0b"])
def test_what_is_no_place(root):
    with pytest.raises(InputError, match="expected a folder or a URI"):
        Store(root)


def test_an_object_store_that_is_not_there_is_told(s3):
    store = Store("s3://no-such-bucket/results")
    with pytest.raises(OSError, match="no-such-bucket"):
        store.start(TRIAL)


@pytest.mark.slow
def test_an_experiment_on_an_object_store_is_the_same_to_the_bit(
    s3, experiment, cli, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    made, local = plan(experiment(SMALL)), Store(tmp_path)
    for trial in made.trials.values():
        train(trial, load(trial.data), local, lambda metrics: None)
    arguments = ["run", experiment.folder / "small.yaml", "--storage", f"{s3}/whole"]
    printed = tmp_path / "printed.txt"
    command = warm.command(*arguments, output=printed)  # its Ray knows where the S3 is
    command.join()
    assert command.exitcode == 0 and "3 trials to run" in printed.read_text()
    assert "all 3 trials are done" in cli(*arguments, cwd=tmp_path).stdout
    remote = Store(f"{s3}/whole")
    for key in made.trials:
        assert remote.record(key)["weights_sha256"] == local.record(key)["weights_sha256"]
    assert remote.banks().keys() == local.banks().keys() != set()


EPOCH = {"epoch": 1}


@pytest.mark.parametrize(
    ("files", "state"),
    [
        (
            {"record.json": to_document(RECORD), "failure.json": to_document({"reason": "old"})},
            "done",
        ),
        ({"failure.json": to_document({"reason": "loss is nan"})}, "FAILED: loss is nan"),
        (
            {"stopped.json": to_document({"by": "time_budget", "epoch": 1})},
            "stopped by time budget after 1/9 epochs",
        ),
        ({"epochs.jsonl": to_lines([EPOCH, EPOCH])}, "2/9 epochs"),
        ({}, "not begun"),
    ],
)
def test_states_for_people(files, state):
    assert Outcome(files).state(9) == state


def test_documents_are_strict_json(store):
    found = {"values": [[1.0, float("nan")], [float("inf"), 2.0]], "top_eigenvalue": -float("inf")}
    store.keep_landscape(TRIAL, found)
    content = store.files.read(f"trials/{TRIAL.id}/landscape.json").decode()
    assert json.loads(content, parse_constant=pytest.fail)["values"] == [[1.0, None], [None, 2.0]]
    assert store.landscape(TRIAL.id)["top_eigenvalue"] is None
