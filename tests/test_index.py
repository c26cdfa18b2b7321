"""The index gives what the files of the trials say, whatever happens to it or to them."""

import json
from pathlib import Path

import pytest

from analysis.records import frames
from pld_ray.store import files, index
from pld_ray.store.documents import to_document, to_lines
from pld_ray.store.store import Store

IDS = [f"{number:016x}" for number in range(30)]


def record(top1):
    return {
        "weights_sha256": "0" * 64,
        "metrics": {"top1": float(top1)},
        "seconds": {"seconds": 1.0},
    }


@pytest.fixture(params=["disk", "s3"])
def store(request, tmp_path, monkeypatch):
    """A store with more finished trials than are read without an index; all may be indexed."""
    monkeypatch.setattr(index, "FEW", 20)
    monkeypatch.setattr(files, "SETTLED", 0)
    root = (
        tmp_path if request.param == "disk" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    )
    made = Store(root)
    for number, key in enumerate(IDS):
        made.files.write(f"trials/{key}/record.json", to_document(record(number)))
        made.files.write(f"trials/{key}/epochs.jsonl", to_lines([{"epoch": 1, "top1": 1.0}]))
    return made


def top1(store):
    return {key: found["metrics"]["top1"] for key, found in store.records(IDS).items()}


def reads(store, monkeypatch):
    """Read all records; return their top-1 and the paths that were read one by one."""
    seen, read_many = [], store.files.read_many

    def watched(paths):
        paths = list(paths)
        seen.extend(paths)
        return read_many(paths)

    with monkeypatch.context() as patched:
        patched.setattr(store.files, "read_many", watched)
        return top1(store), seen


EXPECTED = {key: float(number) for number, key in enumerate(IDS)}


def test_the_second_read_opens_no_trial(store, monkeypatch):
    found, seen = reads(store, monkeypatch)
    assert found == EXPECTED and len(seen) == 30
    assert reads(store, monkeypatch) == (EXPECTED, [])


def test_a_changed_record_wins_over_the_index(store, monkeypatch):
    top1(store)
    store.files.write(f"trials/{IDS[7]}/record.json", to_document(record(99)))
    store.files.write(f"trials/{IDS[8]}/record.json", to_document(record(99))[:-20])
    store.files.delete(f"trials/{IDS[9]}/record.json")
    expected = {key: EXPECTED[key] for key in IDS if key not in IDS[8:10]} | {IDS[7]: 99.0}
    found, seen = reads(store, monkeypatch)
    assert found == expected
    assert seen == [f"trials/{key}/record.json" for key in IDS[7:9]]
    assert store.finished(IDS) == expected.keys()


@pytest.mark.parametrize("damage", ["deleted", "cut", "changed", "other"])
def test_a_damaged_index_is_written_again(store, monkeypatch, damage):
    top1(store)
    path = index.path("record.json")
    content = store.files.read(path)
    half = len(content) // 2
    store.files.write(
        path,
        {
            "deleted": b"",
            "cut": content[:half],
            "changed": content[:200]
            + bytes(byte ^ 255 for byte in content[200:300])
            + content[300:],
            "other": store.files.read(index.path("record.json")).replace(b"stamp", b"stomp"),
        }[damage],
    )
    found, seen = reads(store, monkeypatch)
    assert found == EXPECTED and len(seen) == 30
    assert reads(store, monkeypatch) == (EXPECTED, [])


def test_damaged_records_do_not_enter_the_index(store, monkeypatch):
    store.files.write(f"trials/{IDS[3]}/record.json", b"{}")
    expected = {key: value for key, value in EXPECTED.items() if key != IDS[3]}
    assert top1(store) == expected
    assert reads(store, monkeypatch) == (expected, [f"trials/{IDS[3]}/record.json"])


def test_all_files_of_trials(store):
    store.files.write(f"trials/{IDS[0]}/failure.json", to_document({"reason": "why"}))
    store.files.delete(f"trials/{IDS[0]}/record.json")
    for _ in range(2):
        found = store.outcomes(IDS)
        assert found[IDS[0]].failure == {"reason": "why"} and not found[IDS[0]].finished
        assert found[IDS[1]].record == record(1)
        assert all(outcome.epochs == [{"epoch": 1, "top1": 1.0}] for outcome in found.values())
        lines = store.epoch_lines(IDS)
        assert {key: json.loads(line) for key, line in lines.items()} == {
            key: {"epoch": 1, "top1": 1.0} for key in IDS
        }


def test_a_store_that_cannot_be_written_is_read(store, monkeypatch):
    def full(path, content):
        raise OSError("no space left on device")

    monkeypatch.setattr(store.files, "write", full)
    assert top1(store) == EXPECTED and store.files.read(index.path("record.json")) is None


def test_a_file_that_was_just_written_is_not_indexed(store, monkeypatch):
    """Another write within the resolution of the clock would give it the same stamp."""
    if not store.files.local:
        pytest.skip("an object store has ETags")
    monkeypatch.setattr(files, "SETTLED", 10**15)
    top1(store)
    assert len(reads(store, monkeypatch)[1]) == 30


def test_an_index_that_cannot_be_read_is_no_obstacle(store, monkeypatch):
    if not store.files.local:
        pytest.skip("an object store has no folders")
    folder = Path(store.uri) / index.path("record.json")
    folder.mkdir(parents=True)
    assert top1(store) == EXPECTED
    folder.rmdir()
    folder.parent.rmdir()
    folder.parent.write_bytes(b"")
    assert top1(store) == EXPECTED


def test_epochs_with_and_without_a_last_newline(store):
    """The last newline may be missing, and a metric may have another type in another trial."""
    path = f"trials/{IDS[1]}/epochs.jsonl"
    store.files.write(path, (store.files.read(path) or b"").rstrip())
    found = frames.epochs(IDS, store)
    assert list(found["id"]) == IDS and (found["top1"] == 1).all()
    store.files.write(path, to_lines([{"epoch": 1, "top1": 2.0, "own": "text"}]))
    store.files.write(f"trials/{IDS[2]}/epochs.jsonl", to_lines([{"epoch": 1, "own": 1.5}] * 2))
    found = frames.epochs(IDS, store)
    assert len(found) == 31 and list(found["id"][:4]) == [*IDS[:3], IDS[2]]
    assert found["own"].dropna().tolist() == ["text", 1.5, 1.5]
    small = list(frames._batches(store.epoch_lines(IDS), most=100))
    assert len(small) > 5 and {k: v for part in small for k, v in part.items()} == (
        store.epoch_lines(IDS)
    )
