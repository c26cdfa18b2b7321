"""A small experiment and what tests of the teacher bank do with it."""

import struct
from pathlib import Path

import torch

from pld_ray.config.planning import plan
from pld_ray.config.trial import Trial
from pld_ray.data.datasets import load
from pld_ray.data.stream import Stream
from pld_ray.distill.bank import open_banks
from pld_ray.distill.device import Clock
from pld_ray.distill.loop import train
from pld_ray.distill.teacher import Teacher

CPU = torch.device("cpu")
SMALL = """
base:
  data: {name: digits, pad: 1, flip: true, limit: 150}
  student: {name: resnet8}
  teacher: {name: resnet8, logits: float32, train: {epochs: 1}}
  epochs: 3
  batch_size: 32
grid: {loss: [pld, kd]}
"""


def run(trial, store, images=None, ledger=None):
    if isinstance(trial.teacher, Trial) and store.record(trial.teacher.id) is None:
        train(trial.teacher, load(trial.teacher.data), store, lambda metrics: None)
    train(trial, images or load(trial.data), store, lambda metrics: None, ledger)
    return store.record(trial.id)


def cells(experiment, *overrides):
    return [cell.trial for cell in plan(experiment(SMALL, *overrides)).cells]


def live(trial):
    return trial.model_copy(update={"teacher_logits": "live"})


def weights(store, trial):
    return Path(store.folder(trial.id), "student.safetensors").read_bytes()


def chunks(store, kind="logits"):
    return sorted(Path(store.uri).glob(f"banks/*/*/*.{kind}"))


def seconds_of(path):
    return struct.unpack("<d", path.read_bytes()[-12:-4])[0]


def opened(trial, store, images):
    """The banks of a trial, its stream, and its teacher to compare them with."""
    stream, network = (
        Stream(images, trial.data, trial.seed, CPU),
        Teacher(trial, images, store, CPU),
    )
    return *open_banks(network, trial, stream, Clock(CPU), None, "test"), stream, network
