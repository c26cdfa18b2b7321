import pytest
import torch
from pyarrow import fs

from pld_ray.errors import InputError
from pld_ray.spec import Trial
from pld_ray.store import Store

TRIAL = Trial.model_validate({"data": "digits", "student": "resnet8", "loss": "ce", "epochs": 3})


def test_round_trip(tmp_path):
    store = Store(tmp_path)
    assert store.finished() == set() and store.record(TRIAL.id) is None
    assert store.load_checkpoint(TRIAL) is None and store.epochs(TRIAL.id) == []
    store.start(TRIAL)
    assert (
        Trial.model_validate_json((tmp_path / "trials" / TRIAL.id / "trial.json").read_text())
        == TRIAL
    )
    state = {"history": [{"epoch": 1, "top1": 3.0}], "student": {"w": torch.arange(3.0)}}
    store.checkpoint(TRIAL, state)
    store.log(TRIAL, state["history"])
    loaded = store.load_checkpoint(TRIAL)
    assert loaded["history"] == state["history"] == store.epochs(TRIAL.id)
    assert torch.equal(loaded["student"]["w"], state["student"]["w"])
    store.fail(TRIAL, "loss is nan", "Traceback\n  line")
    assert store.failure(TRIAL.id)["traceback"] == ["Traceback", "  line"]
    assert store.finished() == set()
    store.finish(TRIAL, {"id": TRIAL.id}, {"w": torch.arange(3.0)})
    assert store.finished() == {TRIAL.id} and store.record(TRIAL.id)["id"] == TRIAL.id
    assert store.failure(TRIAL.id) is None and store.load_checkpoint(TRIAL) is None
    assert torch.equal(store.load_weights(TRIAL)["w"], torch.arange(3.0))
    names = {path.name for path in (tmp_path / "trials" / TRIAL.id).iterdir()}
    assert names == {"trial.json", "epochs.jsonl", "record.json", "student.safetensors"}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.checkpoint(TRIAL, {"history": [{"epoch": 1}]})

    class Full(fs.LocalFileSystem):
        def move(self, *_):
            raise OSError("disk full")

    monkeypatch.setattr(store, "fs", Full())
    with pytest.raises(OSError, match="disk full"):
        store.checkpoint(TRIAL, {"history": [{"epoch": 1}, {"epoch": 2}]})
    assert Store(tmp_path).load_checkpoint(TRIAL)["history"] == [{"epoch": 1}]
    assert not list((tmp_path / "trials" / TRIAL.id).glob(".*"))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" * 99])
def test_a_damaged_checkpoint_is_no_checkpoint(tmp_path, damage):
    store = Store(tmp_path)
    store.checkpoint(TRIAL, {"history": [], "student": {"w": torch.zeros(1000)}})
    path = tmp_path / "trials" / TRIAL.id / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    assert store.load_checkpoint(TRIAL) is None


def test_a_checkpoint_cannot_run_code(tmp_path):
    store = Store(tmp_path)
    store.checkpoint(TRIAL, {"history": [], "student": print})
    assert store.load_checkpoint(TRIAL) is None


def test_a_uri_is_a_store_too(tmp_path):
    store = Store(tmp_path.as_uri())
    store.finish(TRIAL, {"id": TRIAL.id}, {"w": torch.zeros(1)})
    assert Store(tmp_path).finished() == {TRIAL.id}
    with pytest.raises(InputError, match="expected a folder or a URI"):
        Store("nosuch://bucket/x")


def test_a_broken_record_is_told(tmp_path):
    store = Store(tmp_path)
    store.finish(TRIAL, {"id": TRIAL.id}, {"w": torch.zeros(1)})
    (tmp_path / "trials" / TRIAL.id / "record.json").write_text("{")
    with pytest.raises(InputError, match="record.json: not valid JSON"):
        store.record(TRIAL.id)
