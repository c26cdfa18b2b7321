"""Students of the bank and of a live teacher: the same; and no logits computed twice."""

import dataclasses
import hashlib
import json
import os
import signal
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import warm
from safetensors.torch import save_file
from small import CPU, cells, chunks, live, opened, run, seconds_of, weights

from pld_ray.config.parts import Weights
from pld_ray.config.trial import Trial
from pld_ray.data.datasets import load
from pld_ray.data.images import Images
from pld_ray.data.sampling import order
from pld_ray.data.stream import Stream
from pld_ray.distill import bank, teacher
from pld_ray.distill.loop import train
from pld_ray.distill.teacher import Teacher
from pld_ray.errors import InputError
from pld_ray.store.store import Store
from pld_ray.sweep.ledger import Ledger, LedgerClient

# ---------------------------------------------------------------- exact


@pytest.mark.parametrize("drop_last", [False, True])  # 150 = 4 * 32 + 22
def test_bank_and_live_teacher_agree_to_the_bit(experiment, tmp_path, drop_last):
    first, second = cells(experiment, f"drop_last={drop_last}")
    store = Store(tmp_path)
    records = {trial.id: run(trial, store) for trial in (live(first), first, second, live(second))}
    for trial in (first, second):
        assert weights(store, trial) == weights(store, live(trial))
        kept, computed = (records[t.id]["metrics"] for t in (trial, live(trial)))
        for name in ("train_loss", "top1", "kl_teacher_student", "agreement", "teacher_top1"):
            assert kept[name] == computed[name]
    spent, avoided = (
        [records[t.id]["seconds"].get(name, 0) for t in (first, second)]
        for name in ("teacher_seconds", "teacher_avoided_seconds")
    )
    cost = {n: sum(seconds_of(p) for p in chunks(store) if kind(store, p) == n) for n in KINDS}
    used = 128 / 150 if drop_last else 1
    assert spent == [pytest.approx(sum(cost.values()), rel=0.2), 0]  # the first pays for both
    assert avoided == pytest.approx([0, cost["val"] + used * cost["train"]])


KINDS = ("train", "val")


def kind(store, path):
    return store.bank(path.parts[-3])["spec"]["split"]


def test_what_is_read_is_what_the_teacher_says(experiment, tmp_path):
    trial, _ = cells(experiment, "teacher.views=2", "epochs=5")
    store, images = Store(tmp_path), load(trial.data)
    train(trial.teacher, load(trial.teacher.data), store, lambda metrics: None)
    train_bank, val_bank, stream, network = opened(trial, store, images)
    for epoch in (4, 0, 3):  # in the order of another view: batches that nobody computed
        view = trial.view(epoch)
        assert view == epoch % 2
        index = order(trial.seed, epoch, 150)[40:90]
        logits, _ = train_bank.read(index, view)
        expected = network(next(stream.train([index], view))[0])
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    index = np.array([359, 0, 17])
    expected = network(next(stream.val([index])))
    torch.testing.assert_close(val_bank.read(index, 0)[0], expected, rtol=1e-5, atol=1e-5)


def test_float16_trains_the_same_student(experiment, tmp_path):
    store = Store(tmp_path)
    trials = cells(experiment, "teacher.logits=float16")
    for trial in trials:
        half, full = (run(t, store)["metrics"] for t in (trial, live(trial)))
        assert half["train_loss"] == pytest.approx(full["train_loss"], rel=1e-3)
        assert half["kl_teacher_student"] == pytest.approx(full["kl_teacher_student"], rel=0.02)
        assert half["teacher_top1"] == full["teacher_top1"]


def test_views_bound_the_bank_and_are_what_the_student_sees(experiment, tmp_path):
    trial, _ = cells(experiment, "teacher.views=2", "epochs=5")
    store = Store(tmp_path)
    kept, computed = (run(t, store)["metrics"] for t in (trial, live(trial)))
    assert kept["train_loss"] == pytest.approx(computed["train_loss"], rel=1e-4)
    views = [p.parts[-2] for p in chunks(store) if kind(store, p) == "train"]
    assert views == ["0", "1"]
    every = run(trial.model_copy(update={"views": None}), store)["metrics"]
    assert abs(every["train_loss"] - kept["train_loss"]) > 1e-3 * kept["train_loss"]


def test_images_that_do_not_change_have_one_view_for_all_seeds(experiment, tmp_path):
    text = ["data.pad=0", "data.flip=false", "seeds=[0,1]"]
    trials, store = cells(experiment, *text), Store(tmp_path)
    spent = [run(trial, store)["seconds"].get("teacher_seconds", 0) for trial in trials]
    assert spent[0] > 0 and spent[1:] == [0, 0, 0]
    assert len(chunks(store)) == 2  # train and val
    for trial in trials:
        kept, computed = (store.record(trial.id), run(live(trial), store))
        for name in ("train_loss", "kl_teacher_student"):
            assert kept["metrics"][name] == pytest.approx(computed["metrics"][name], rel=1e-4)


def test_the_order_is_kept_where_there_are_many_classes(experiment, tmp_path):
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (90, 8, 8, 3), np.uint8), rng.integers(0, 5000, 90)
    images = Images(pixels, labels, pixels[:20], labels[:20], 5000, (0.5,) * 3, (0.2,) * 3)
    trial, other = cells(experiment, "student=resnet8", "teacher=resnet8", "epochs=2")
    store = Store(tmp_path)
    train(trial.teacher, images, store, lambda metrics: None)
    trials = [trial.model_copy(update={"teacher_logits": kept}) for kept in ("float32", "live")]
    for one in trials:
        run(one, store, images)
    assert weights(store, trials[0]) == weights(store, trials[1])
    assert len(chunks(store, "order")) == 2  # one a view
    run(other.model_copy(update={"teacher_logits": "float16"}), store, images)
    assert len(chunks(store, "order")) == 2  # KD sorts nothing
    train_bank, *_ = opened(trials[0], store, images)
    index = order(trial.seed, 0, 90)[:32]
    logits, kept = train_bank.read(index, 0, with_order=True)
    logits[torch.arange(32), torch.tensor(labels[index])] = torch.inf
    assert (kept.numpy() == np.argsort(-logits.numpy(), 1, kind="stable")).all()


WORKER = """
import sys, torch.distributed as dist
from pld_ray.data.datasets import load
from pld_ray.config.trial import Trial
from pld_ray.store.store import Store
from pld_ray.distill.loop import train
import torch
from safetensors.torch import save_file
torch.set_num_threads(1)
store, rank, spec = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
dist.init_process_group("gloo", init_method=f"file://{store}/rendezvous", rank=rank, world_size=2)
for text in spec:
    trial = Trial.model_validate_json(text)
    train(trial, load(trial.data), Store(store), lambda metrics: None)
"""


def test_two_workers_agree_with_a_live_teacher(experiment, tmp_path):
    trial, _ = cells(experiment, "workers=2", "teacher.train.workers=1")
    store = Store(tmp_path)
    train(trial.teacher, load(trial.teacher.data), store, lambda metrics: None)
    specs = [t.model_dump_json() for t in (trial, live(trial))]
    workers = [warm.start(WORKER, tmp_path, rank, *specs) for rank in (0, 1)]
    for worker in workers:
        worker.join(600)
    assert [worker.exitcode for worker in workers] == [0, 0]
    kept, computed = (store.record(t.id)["metrics"] for t in (trial, live(trial)))
    for name in ("train_loss", "val_loss", "kl_teacher_student"):
        assert kept[name] == pytest.approx(computed[name], rel=1e-4)


CHILD = """
import os, signal, sys, torch
torch.set_num_threads(1)
from pld_ray.data.datasets import load
from pld_ray.config.trial import Trial
from pld_ray.store.store import Store
from pld_ray.data.stream import Stream
from pld_ray.distill import keeping
from pld_ray.distill.loop import train

keeping.CHECKPOINT_SECONDS = 0
trial, calls, shown = Trial.model_validate_json(sys.argv[2]), int(sys.argv[3]), Stream.batches

def dying(*arguments):
    global calls
    for batch in shown(*arguments):
        calls -= 1
        if calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch

Stream.batches = dying
train(trial, load(trial.data), Store(sys.argv[1]), lambda metrics: None)
"""


def test_a_pretrained_teacher_sees_images_normalised_as_it_was_trained(tmp_path):
    name = "resnet18.a1_in1k"
    known = timm.get_pretrained_cfg(name)
    mean, std = (torch.tensor(x)[:, None, None] for x in (known.mean, known.std))
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8), np.arange(6) % 2
    images = Images(pixels, labels, pixels, labels, 1000, (0.3, 0.4, 0.5), (0.1, 0.2, 0.3))
    trial = Trial.model_validate(
        {
            "data": "x",
            "student": "resnet8",
            "teacher": {"name": name, "weights": "pretrained"},
            "loss": "kd",
            "epochs": 1,
        }
    )
    teacher = Teacher(trial, images, Store(tmp_path), CPU)
    teacher.network = torch.nn.Identity()
    x = next(Stream(images, trial.data, 0, CPU).val([np.arange(6)]))
    expected = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    torch.testing.assert_close(teacher(x), expected)


def test_a_trial_killed_in_mid_epoch_ends_with_the_same_bits(experiment, tmp_path):
    trial, _ = cells(experiment)
    store = Store(tmp_path)
    run(live(trial), store)
    # batches 1 to 5 of a view are computed when the first is read, then the student has 5 steps
    for calls in (3, 7, 13):
        child = warm.start(CHILD, store.uri, trial.model_dump_json(), calls)
        child.join()
        assert child.exitcode == -signal.SIGKILL
    assert store.record(trial.id) is None and store.epochs(trial.id)
    run(trial, store)
    assert weights(store, trial) == weights(store, live(trial))


# ---------------------------------------------------------------- never damaged


DAMAGES = {
    "cut": lambda b: b[: len(b) // 2],
    "empty": lambda b: b"",
    "one bit of the logits": lambda b: b[:100] + bytes([b[100] ^ 1]) + b[101:],
    "one bit of the checksum": lambda b: b[:-1] + bytes([b[-1] ^ 128]),
    "longer": lambda b: b + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_chunk_is_computed_again(experiment, tmp_path, damage):
    first, second = cells(experiment, "epochs=1")
    store = Store(tmp_path)
    run(first, store)
    before = {path: path.read_bytes() for path in chunks(store)}
    for path, content in before.items():
        path.write_bytes(DAMAGES[damage](content))
        (path.parent / f".{path.name}.0123abcd").write_bytes(content[:50])  # a writer that died
    run(second, store)
    run(live(second), store)
    assert weights(store, second) == weights(store, live(second))
    for path, content in before.items():
        again = path.read_bytes()
        assert again[:-12] == content[:-12]
        assert struct.unpack("<I", again[-4:])[0] == zlib.crc32(again[:-4])


def test_an_object_store_serves_the_same_chunks(experiment, tmp_path):
    first, second = cells(experiment, "epochs=1")
    store = Store(f"memory:/{tmp_path}")
    run(first, store)
    run(second, store)
    run(live(second), store)
    assert not list(tmp_path.glob("*s")) and len(store.banks()) == 2  # nothing on the disk
    assert store.record(second.id)["seconds"].get("teacher_seconds", 0) == 0
    banked, computed = (store.load_weights(t) for t in (second, live(second)))
    assert all(torch.equal(banked[name], computed[name]) for name in computed)
    for key in store.banks():
        store.drop_bank(key)
    assert store.banks() == {} and store.files.free_bytes() is None


# ---------------------------------------------------------------- whose logits


def test_the_key_is_the_content(experiment, tmp_path):
    trial, _ = cells(experiment)
    store, images = Store(tmp_path), load(trial.data)
    train(trial.teacher, load(trial.teacher.data), store, lambda metrics: None)

    def keys(trial, images):
        return [b.key for b in opened(trial, store, images)[:2]]

    same = keys(trial, images)
    changed = trial.model_copy(update={"epochs": 9, "batch_size": 64, "views": 4})
    assert keys(changed, images) == same
    seed = keys(trial.model_copy(update={"seed": 1}), images)
    assert seed[0] != same[0] and seed[1] == same[1]  # validation images have no seed
    pixels = images.train.copy()
    pixels[0, 0, 0] ^= 1
    assert not set(keys(trial, dataclasses.replace(images, train=pixels))) & set(same)
    weighed = dict(store.record(trial.teacher.id), weights_sha256="0" * 64)
    Path(store.folder(trial.teacher.id), "record.json").write_text(json.dumps(weighed))
    assert not set(keys(trial, images)) & set(same)
    with pytest.raises(InputError, match="missing or damaged"):
        store.load_weights(trial.teacher)


def test_the_digest_of_pretrained_weights(monkeypatch, tmp_path):
    from safetensors.torch import save

    model = torch.nn.Conv2d(1, 2, 3)
    monkeypatch.setattr(teacher, "load_teacher", lambda *_: model)
    images = load(Trial(data="digits", student="resnet8", loss="ce", epochs=1).data)
    weights = Weights(name="x.y", weights="pretrained")
    trial = Trial(data="digits", student="resnet8", teacher=weights, loss="kd", epochs=1)
    expected = hashlib.sha256(save(model.state_dict())).hexdigest()
    assert Teacher(trial, images, Store(tmp_path), CPU).digest() == expected


# ---------------------------------------------------------------- computed once


def race(store_uri, trial, ledger, log, kill):
    """A trial that notes which chunks it computes, and dies in its first one if `kill`."""
    compute, log, mine = bank.Bank._compute, Path(log), f"{trial.id} "

    def noted(self, name):
        with log.open("a") as file:
            file.write(f"{mine}{name}\n")
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)
        others = {live.removeprefix("live-") for live in os.listdir(log.parent)} - {trial.id}
        # with more chunks than one, the other trial finds this one taken and computes the next
        while self.views > 1 and not others & {x.split()[0] for x in log.read_text().splitlines()}:
            self.ledger.renew(self.store.uri, name, self.holder)
            time.sleep(0.05)
        compute(self, name)

    bank.Bank._compute = noted
    if not kill:  # start with the other one
        (log.parent / f"live-{trial.id}").touch()
        while len(list(log.parent.glob("live-*"))) < 2:
            time.sleep(0.01)
    try:
        train(trial, load(trial.data), Store(store_uri), lambda metrics: None, ledger)
    finally:
        bank.Bank._compute = compute


@pytest.mark.slow
def test_trials_that_start_together_compute_each_chunk_once(experiment, tmp_path, local_ray):
    local_ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    losses = "grid.loss=[pld,kd,dist]"
    *trials, doomed = cells(experiment, losses, "data.limit=300", "epochs=4", "batch_size=64")
    store, log = Store(tmp_path), tmp_path / "log"
    train(doomed.teacher, load(doomed.teacher.data), store, lambda metrics: None)

    class Hasty(Ledger):
        LEASE = 4.0

    ledger = LedgerClient(local_ray.remote(Hasty).options(num_cpus=0).remote())
    task = local_ray.remote(race).options(num_cpus=0.01, max_retries=0)
    dead = task.remote(store.uri, doomed, ledger, str(log), True)
    with pytest.raises(local_ray.exceptions.WorkerCrashedError):
        local_ray.get(dead, timeout=600)
    assert len(log.read_text().splitlines()) == 1  # it died with a claim
    local_ray.get([task.remote(store.uri, t, ledger, str(log), False) for t in trials], timeout=600)
    names = [line.split()[1] for line in log.read_text().splitlines()]
    assert names.count(names[0]) == 2 and len(set(names)) == len(names) - 1 == len(chunks(store))
    assert len(chunks(store)) == 4 + 1  # views, validation
    spent = [store.record(t.id)["seconds"].get("teacher_seconds", 0) for t in trials]
    assert sum(s > 0 for s in spent) > 1  # they shared the work
    for trial in trials:
        run(live(trial), store)
        assert weights(store, trial) == weights(store, live(trial))


@pytest.mark.parametrize("name", ["resnet8", "vit_tiny_patch16_224", "resnetv2_50x1_bit"])
def test_a_teacher_in_bfloat16_has_the_bits_of_one_that_casts_in_each_step(tmp_path, name):
    size = {"img_size": 32, "patch_size": 8} if "vit" in name else {}
    network = timm.create_model(name, num_classes=10, **size).eval()
    file = tmp_path / "weights.safetensors"
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, file)
    data = {"name": "cifar100"}
    settings = {"name": name, "args": size, "weights": str(file)}
    trial = Trial.model_validate(
        {"data": data, "student": "resnet8", "loss": "kd", "epochs": 1}
        | {"teacher": settings, "precision": "bfloat16", "channels_last": False}
    )
    pixels, labels = np.zeros((1, 32, 32, 3), np.uint8), np.arange(1)
    images = Images(pixels, labels, pixels, labels, 10, (0.5,) * 3, (0.25,) * 3)
    teacher = Teacher(trial, images, Store(tmp_path / "store"), torch.device("cpu"))
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = network(x).float()
    assert torch.equal(teacher(x), expected)
    plain = (torch.nn.Linear, torch.nn.Conv2d)
    changed = {m.weight.dtype for m in teacher.module.modules() if type(m) in plain}
    assert changed == {torch.bfloat16} or name == "resnetv2_50x1_bit"
    assert all(p.dtype == torch.float32 for p in teacher.network.parameters())
