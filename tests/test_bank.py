"""The teacher bank: exact, computed once, bounded, and never damaged."""

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pld_ray import bank
from pld_ray.data import Size, load
from pld_ray.errors import InputError
from pld_ray.experiment import plan
from pld_ray.spec import Trial
from pld_ray.store import Store
from pld_ray.train import train

SMALL = """
base:
  data: {name: digits, pad: 1, flip: true, limit: 150}
  student: {name: resnet8}
  teacher: {name: resnet8, logits: float32, train: {epochs: 1}}
  epochs: 3
  batch_size: 32
grid: {loss: [pld, kd]}
"""


def run(trial, store, images=None, report=lambda metrics: None, ledger=None):
    if isinstance(trial.teacher, Trial) and store.record(trial.teacher.id) is None:
        train(trial.teacher, load(trial.teacher.data), store, lambda metrics: None)
    train(trial, images or load(trial.data), store, report, ledger)
    return store.record(trial.id)


def weights(store, trial):
    return Path(store.folder(trial.id), "student.safetensors").read_bytes()


def chunks(store):
    return sorted(Path(store.root).glob("banks/*/*/*.logits"))


def live(trial):
    return trial.model_copy(update={"teacher_logits": "live"})


# ---------------------------------------------------------------- exact


@pytest.mark.parametrize("drop_last", [False, True])  # 150 = 4 * 32 + 22
def test_bank_and_live_teacher_agree_to_the_bit(experiment, tmp_path, drop_last):
    first, second = (c.trial for c in plan(experiment(SMALL, f"drop_last={drop_last}")).cells)
    store = Store(tmp_path)
    records = {}
    for trial in (live(first), first, second, live(second)):
        records[trial.id] = run(trial, store)
    for trial in (first, second):
        assert weights(store, trial) == weights(store, live(trial))
        kept, computed = (records[t.id]["metrics"] for t in (trial, live(trial)))
        for name in ("train_loss", "top1", "kl_teacher_student", "agreement", "teacher_top1"):
            assert kept[name] == computed[name]
    # `first` computed every view, `second` none of them
    spent, avoided = (
        [records[t.id]["seconds"].get(name, 0) for t in (first, second)]
        for name in ("teacher_seconds", "teacher_avoided_seconds")
    )
    assert spent[0] > 0 and spent[1] == 0
    seen = 128 / 150 if drop_last else 1
    train_and_val = sum(seconds_of(path) for path in chunks(store))
    assert avoided[0] == pytest.approx(0, abs=1e-9)
    assert avoided[1] == pytest.approx(train_and_val - (1 - seen) * train_seconds(store), rel=1e-6)


def seconds_of(path):
    return float(np.frombuffer(path.read_bytes()[-12:-4], "<f8")[0])


def train_seconds(store):
    return sum(seconds_of(p) for p in chunks(store) if store.bank(p.parts[-3])["size"] == 150)
