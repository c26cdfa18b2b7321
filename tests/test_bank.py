"""What a bank keeps, how large it is, who computes what, and its commands."""

import asyncio
import threading
from concurrent.futures import wait
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import cells, chunks, opened, run, train

from pld_ray.cli.main import app
from pld_ray.data.datasets import load, size
from pld_ray.data.images import Size
from pld_ray.data.sampling import batches, order
from pld_ray.distill import bank_format, bank_plan
from pld_ray.errors import InputError
from pld_ray.store.store import Store
from pld_ray.sweep.ledger import Ledger

# ---------------------------------------------------------------- what is kept


def test_float16_is_exact_near_the_best_class(experiment, tmp_path):
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((200, 50)) * rng.choice([0.01, 1, 30, 1e4], (200, 1))).astype(
        "f4"
    )
    logits += rng.choice([0, 1000], (200, 1))
    logits[0, 3], logits[1, :25] = -np.inf, -np.inf
    kept = bank_format.unpack(bank_format.pack(logits, bank_format.row_type(50, "float16")), 50)
    finite = np.isfinite(logits)
    assert (np.isfinite(kept) == finite).all() and (kept[~finite] == -np.inf).all()
    with np.errstate(invalid="ignore"):
        gap = logits.max(1, keepdims=True).astype("f8") - logits
        off = np.abs(kept.astype("f8") - logits)
    rounding = 2.0**-23 * np.abs(logits.max(1, keepdims=True))  # of the float32 sums
    assert (off <= 2.0**-11 * gap + rounding + 3e-8)[finite].all()
    assert (kept.argmax(1) == logits.argmax(1)).all()
    exact = bank_format.unpack(bank_format.pack(logits, bank_format.row_type(50, "float32")), 50)
    assert (exact == logits).all()


# ---------------------------------------------------------------- how large


def test_planned_sizes_are_those_on_the_disk(experiment, tmp_path):
    trials, store = cells(experiment, "teacher.logits=float16"), Store(tmp_path)
    planned = bank_plan.planned(trials, size, store)
    per_view = 150 * (10 * 2 + 4)  # samples x (classes x float16 + a float32 maximum)
    assert sorted(p.bytes for p in planned.values()) == [3 * per_view, 360 * 10 * 4]
    for trial in trials:
        run(trial, store)
    on_disk = {b: sum(p.stat().st_size - 12 for p in chunks(store) if b in p.parts)
               for b in store.banks()}  # fmt: skip
    assert sorted(on_disk.values()) == sorted(p.bytes for p in planned.values())
    again = bank_plan.planned(trials, size, store)
    assert all(p.kept >= p.bytes for p in again.values())


def test_of_many_classes_the_order_is_kept_and_counted_too(experiment, tmp_path):
    store = Store(tmp_path)
    pld, kd = cells(experiment, "teacher.logits=float16", "epochs=2", "data.limit=100")
    images = replace(load(pld.data), classes=5000)
    train(pld.teacher, images, store, lambda metrics: None)
    for trials, ordered in (([kd], 0), ([kd, pld], 2 * 100 * 5000 * 2)):
        planned = bank_plan.planned(trials, lambda data: Size(100, 360, 5000), store)
        assert sum(p.bytes for p in planned.values() if p.split == "train") == (
            2 * 100 * (5000 * 2 + 4) + ordered
        )
        for trial in trials:
            train(trial, images, store, lambda metrics: None)
        kept = [p.stat().st_size - 12 for kind in ("logits", "order") for p in chunks(store, kind)]
        assert sum(kept) == sum(p.bytes for p in planned.values())


def test_a_bank_that_does_not_fit_is_refused_with_what_would(experiment, tmp_path, monkeypatch):
    trials, store = cells(experiment, "epochs=100", "seeds=[0,1]"), Store(tmp_path)
    planned = bank_plan.planned(trials, size, store).values()
    view, val = 150 * 10 * 4, 360 * 10 * 4
    room = 2 * 7 * view + val
    for free, advice in (
        (room, "set teacher.views to at most 7"),
        (room - 1, "set teacher.views to at most 6"),
        (2 * view, "not even one view fits: set teacher.logits to live, or give another --storage"),
    ):
        monkeypatch.setattr(store.files, "free_bytes", lambda free=free: int(free / 0.95) + 1)
        with pytest.raises(InputError, match=r"needs 1\.2 MB and there is room for .*: " + advice):
            bank_plan.check_disk_space(planned, store)
    monkeypatch.setattr(store.files, "free_bytes", lambda: int((200 * view + val) / 0.95) + 1)
    bank_plan.check_disk_space(planned, store)


def test_views_and_logits_of_a_teacher_become_the_trials(experiment):
    kd, ce = cells(experiment, "grid.loss=[kd,ce]", "teacher.views=2")
    assert (kd.views, kd.teacher_logits) == (2, "float32")
    assert (ce.views, ce.teacher_logits, ce.teacher) == (2, "float16", None)
    assert kd.teacher.views is None
    many, _ = cells(experiment, "teacher.views=3")  # there are 3 epochs
    assert many.views is None and many.id == cells(experiment)[0].id
    with pytest.raises(InputError, match=r"views: set teacher\.views"):
        cells(experiment, "views=2")
    with pytest.raises(InputError, match=r"teacher_logits: set teacher\.logits"):
        cells(experiment, "teacher_logits=live")
    with pytest.raises(InputError, match="data.mixup: loss pld ranks the classes with"):
        cells(experiment, "data.mixup=0.2")
    with pytest.raises(InputError, match=r"teacher: logits is 'float8'; did you mean 'float32'"):
        cells(experiment, "teacher.logits=float8")


# ---------------------------------------------------------------- who computes what


def test_the_ledger_gives_a_chunk_to_one_at_a_time(monkeypatch):
    monkeypatch.setattr(Ledger, "LEASE", 0.2)

    async def story():
        ledger = Ledger()
        assert await ledger.claim("s", ["a", "b"], "one", 0) == "a"
        assert await ledger.claim("s", ["a", "b"], "two", 0) == "b"
        assert await ledger.claim("s", ["a", "b"], "three", 0) is None
        assert await ledger.claim("t", ["a"], "three", 0) == "a"  # of another store
        assert await ledger.claim("s", ["a"], "one", 0) == "a"  # tried again after it died
        waiting = asyncio.create_task(ledger.claim("s", ["b"], "three", 60))
        await asyncio.sleep(0.01)
        await ledger.release("s", "b", "one", True)  # is not its own
        await asyncio.sleep(0.01)
        assert await waiting is None  # woken, to look at the store again
        for _ in range(4):
            await asyncio.sleep(0.1)
            await ledger.renew("s", "a", "one")
        assert await ledger.claim("s", ["a"], "three", 0) is None  # it shows signs of life
        assert await ledger.claim("s", ["b"], "three", 0) == "b"  # "two" does not
        await ledger.release("s", "a", "one", False)  # it could not
        assert await ledger.claim("s", ["a"], "three", 0) == "a"
        await ledger.release("s", "a", "three", True)
        assert await ledger.claim("s", ["a"], "one", 60) is None  # soon: it is in the store
        await asyncio.sleep(0.3)
        assert await ledger.claim("s", ["a"], "one", 0) == "a"  # it is not: damaged, or deleted

    asyncio.run(story())


# ---------------------------------------------------------------- the commands


@pytest.mark.slow
def test_bank_build_ls_and_rm(local_ray, experiment, tmp_path, capfd):
    cells(experiment)
    path, storage = str(tmp_path / "small.yaml"), ["--storage", str(tmp_path / "results")]

    def cli(*arguments):
        app([*arguments, *storage], standalone_mode=False)
        return capfd.readouterr().out

    # 3 views of 150 and one of 360, 10 float32 each
    said = "teacher bank: 32 kB in 2 banks of up to 3 views, {} of it computed so far"
    assert said.format("none") in cli("plan", path)
    one = ("--set", "resources.concurrent=1")  # process, which imports torch once
    built = cli("bank", "build", path, *one)
    assert "1 trials to run, 0 done before" in built
    rows = {row[3]: row for line in built.splitlines() if len(row := line.split()) == 8}
    assert rows["train"][1:] == ["resnet8", "digits", "train", "0", "3", "19", "kB"]
    assert rows["val"][1:] == [
        "resnet8",
        "digits",
        "val",
        "any",
        "1",
        "15",
        "kB",
    ]  # and bank_format.json
    assert said.format("all") in cli("plan", path)
    ran = cli("run", path, *one)
    assert "2 trials to run, 1 done before" in ran
    assert "teacher forward passes: 0 s spent, " in ran
    store = Store(tmp_path / "results")
    for trial in cells(experiment):
        assert "teacher_seconds" not in store.record(trial.id)["seconds"]
    with pytest.raises(InputError, match="needs 4096 CPUs, and the nodes of the cluster have"):
        cli("bank", "build", path, "--set", "resources.cpus_per_worker=4096")
    assert "deleted: 1 banks, 15 kB" in cli("bank", "rm", rows["val"][0])
    assert rows["train"][0] in cli("bank", "ls") and len(store.banks()) == 1
    assert "deleted: 1 banks" in cli("bank", "rm", "--all") and store.banks() == {}


def test_the_next_chunk_is_read_while_one_is_used(experiment, tmp_path, monkeypatch):
    trial, _ = cells(experiment, "base.data.limit=null")
    store, images = Store(tmp_path), load(trial.data)
    train(trial.teacher, load(trial.teacher.data), store, lambda metrics: None)
    monkeypatch.setattr(bank_format, "ROWS", 256)
    first, *_ = opened(trial, store, images)
    shares = list(batches(order(trial.seed, 0, len(images.train)), 32, drop_last=False))
    computed = [first.read(share, 0, True)[0] for share in shares]
    reads, read_chunk = [], store.read_chunk

    def watched(name):
        reads.append((name.split("/")[-1], threading.current_thread() is threading.main_thread()))
        return read_chunk(name)

    monkeypatch.setattr(store, "read_chunk", watched)
    second, *_ = opened(trial, store, images)
    assert torch.equal(second.read(shares[0], 0, True)[0], computed[0])
    assert reads[0] == ("0.logits", True)
    for share, expected in zip(shares[1:], computed[1:], strict=True):
        assert torch.equal(second.read(share, 0, True)[0], expected)
    assert [name for name, here in reads if here] == ["0.logits"]
    assert [name for name, here in reads if not here] == [f"{n}.logits" for n in range(1, 6)]

    def fails(name):
        monkeypatch.setattr(store, "read_chunk", read_chunk)
        raise OSError("the network is down")

    third, *_ = opened(trial, store, images)
    third.read(shares[0], 0)
    wait([*third.ahead.values()])
    third.ahead.clear()
    monkeypatch.setattr(store, "read_chunk", fails)
    third.read(shares[1], 0)  # another thread reads the second chunk, and fails
    with pytest.raises(OSError, match="the network is down"):
        third.read(shares[8], 0)
    assert torch.equal(third.read(shares[8], 0)[0], computed[8])
