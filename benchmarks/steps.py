"""Measure a training step with each loss beside one with KD, and the draws of CRD.

    .venv/bin/python benchmarks/steps.py            # ten minutes on one core
    .venv/bin/python benchmarks/steps.py --quick    # a check that it runs

Two parts:

    steps   A step of ResNet-56 -> ResNet-20 on batches of 64 random images of 100 classes, with a
            live teacher and 50,000 training samples. In each round, every loss does a step, in a
            random order, and its time is divided by that of KD in the round. The table has the
            medians. "CRD, gathered" computes CRD as the authors' code does: it copies the vectors
            of the negatives of each sample, which are drawn independently. On the CPU, the time is
            that of the processor
    draws   How much the gradient of CRD differs between draws of the negatives, if the samples of a
            batch share their candidates and if they draw independently, and how much it differs
            between batches. It is that of the student's linear layer, for features of 64 numbers
            that are rectified class means with noise. The layers and memories of student and
            teacher are equal, as if the training were at its end. The table has root mean square
            distances from the mean gradient, as parts of the norm of that gradient
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pld_ray.config.parts import Model
from pld_ray.distill.device import pick_device
from pld_ray.distill.distiller import Distiller
from pld_ray.losses import CRDLoss, Features, create_loss
from pld_ray.losses.contrastive import EPS
from pld_ray.losses.registry import REGISTRY
from pld_ray.models.factory import create_model
from pld_ray.models.reused import reuse_classifier

CLASSES, BATCH = 100, 64
Row = dict[str, Any]


def independent(loss: CRDLoss, own: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `CRDLoss.draw` returns, if each sample draws its negatives independently."""
    other = loss.labels != loss.labels[own][:, None]
    keys = torch.rand(other.shape, device=own.device).where(other, 2)
    last = keys.kthvalue(loss.negatives, 1, keepdim=True).values
    return torch.arange(len(loss.labels), device=own.device), keys <= last


class Gathered(CRDLoss):
    """CRD with a copy of the vectors of all negatives of each sample, as in the authors' code.

    The negatives are drawn before. There, the processes that load the images draw them.
    """

    negatives_of: Tensor  # [B, K]

    def distance(self, student: Features, teacher: Features, index: Tensor | None = None) -> Tensor:
        """Return the weighted distance; see `FeatureLoss.distance`."""
        assert index is not None
        unit = torch.nn.functional.normalize
        s, t = unit(self.embed_student(student.pooled)), unit(self.embed_teacher(teacher.pooled))
        noise, total = self.negatives / len(self.labels), s.new_zeros(())
        rows = torch.cat([index[:, None], self.negatives_of], 1)
        for side, (v, memory) in enumerate(((s, self.teacher_memory), (t, self.student_memory))):
            vectors = memory[rows.flatten()].view(*rows.shape, self.dim)
            values = (torch.bmm(vectors, v[:, :, None])[:, :, 0] / self.temperature).exp()
            if not self.begun:
                self.log_scale[side] = (values.detach().mean() * len(self.labels)).log()
            values = values / self.log_scale[side].exp()
            first = values[:, 0] / (values[:, 0] + noise + EPS)
            total = total - first.log().sum() - (noise / (values[:, 1:] + noise + EPS)).log().sum()
        self.begun = True
        self._remember(index, s.detach(), t.detach())
        return self.weight * total / len(s)


def stepper(name: str, samples: int, device: torch.device, quick: bool) -> Callable[[], Any]:
    """Return a function that does a training step with a loss."""
    torch.manual_seed(0)
    networks = ("resnet8", "resnet20") if quick else ("resnet20", "resnet56")
    student, teacher = (create_model(Model(name=net), CLASSES, 3, 32) for net in networks)
    loss = Gathered() if name == "CRD, gathered" else create_loss(name)
    if loss.name == "simkd":
        student = reuse_classifier(student, teacher, torch.randn(1, 3, 32, 32))
    distiller = Distiller(student, teacher, loss).to(device, memory_format=torch.channels_last)
    images = torch.randn(BATCH, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.arange(samples) % CLASSES
    distiller.connect(images, labels)
    distiller.train()
    index = torch.randperm(samples)[:BATCH]
    parameters = [*student.parameters(), *distiller.learnt_by_loss()]
    optimizer = torch.optim.SGD(parameters, 0.01, momentum=0.9)
    given = images, labels[index].to(device)
    if distiller.paired:
        given = torch.cat([images, images]), given[1].repeat(2)
    index = index.to(device)
    if isinstance(loss, Gathered):
        loss.negatives_of = torch.stack(
            [torch.randperm(samples, device=device)[: loss.negatives] for _ in range(BATCH)]
        )

    def step() -> None:
        optimizer.zero_grad()
        distiller(*given, index=index).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def steps(device: torch.device, rounds: int, quick: bool) -> Iterator[Row]:
    """Yield the times of a step with each loss."""
    samples = 1000 if quick else 50_000
    names = [*(name for name, loss in REGISTRY.items() if loss.needs_teacher), "CRD, gathered"]
    todo = {name: stepper(name, samples, device, quick) for name in names}
    found: dict[str, list[float]] = {name: [] for name in names}
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    for number in range(rounds + 1):
        for name in random.sample(names, len(names)):
            started = clock()
            todo[name]()
            if number:  # the first step makes what the others keep
                found[name].append(1000 * (clock() - started))
    for name, taken in found.items():
        ratios = [one / kd for one, kd in zip(taken, found["kd"], strict=True)]
        label = REGISTRY[name].label if name in REGISTRY else name
        yield {"Loss": label, "ms": f"{median(taken):.1f}", "Times KD": f"{median(ratios):.2f}"}


def draws(device: torch.device, rounds: int, quick: bool) -> Iterator[Row]:
    """Yield how much the gradient differs between draws and between batches."""
    samples = 1000 if quick else 50_000
    for spread in (0.3, 1.0, 3.0):
        torch.manual_seed(0)
        labels = torch.randint(CLASSES, (samples,))
        loss = CRDLoss(**({"negatives": 300} if quick else {}))
        means = torch.randn(CLASSES, 64)
        features = (means[labels] + spread * torch.randn(samples, 64)).relu()
        pooled = Features([], features)
        loss.connect(pooled, pooled)
        loss.connect_samples(labels)
        loss.embed_teacher.load_state_dict(loss.embed_student.state_dict())
        with torch.no_grad():
            vectors = torch.nn.functional.normalize(loss.embed_student(features))
        loss.student_memory.copy_(vectors)
        loss.teacher_memory.copy_(vectors)
        loss.to(device)

        def gradient(index: Tensor, loss: CRDLoss = loss, features: Tensor = features) -> Tensor:
            given = Features([], features[index].to(device))
            value = loss.distance(given, given, index.to(device))
            return torch.autograd.grad(value, loss.embed_student.weight)[0]  # type: ignore[arg-type]

        index, found = torch.randperm(samples)[:BATCH], {}
        loss.train()
        gradient(index)  # finds Z
        loss.eval()
        for name in ("Shared candidates", "Independent draws"):
            if name == "Independent draws":
                loss.draw = partial(independent, loss)  # type: ignore[method-assign]
            each = []
            for epoch in range(rounds):
                loss.set_epoch(epoch)
                each.append(gradient(index))
            found[name] = torch.stack(each)
        others = torch.stack([gradient(torch.randperm(samples)[:BATCH]) for _ in range(rounds)])
        found["Other batches"] = others
        norm = found["Independent draws"].mean(0).norm()
        row: Row = {"Noise": f"{spread:g}"}
        for name, each in found.items():
            apart = (each - each.mean(0)).square().sum().div(rounds - 1).sqrt() / norm
            row[name] = f"{apart:.4f}"
        yield row


PARTS = {"steps": steps, "draws": draws}


def main() -> None:
    """Measure both parts and print their tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="parts")
    parser.add_argument("--quick", action="store_true", help="few samples, small networks")
    parser.add_argument("--rounds", type=int, default=11, help="rounds, and draws")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    random.seed(0)
    console, device = Console(width=120), pick_device()
    for part in arguments.parts:
        rows = list(PARTS[part](device, arguments.rounds, arguments.quick))
        table = Table(*rows[0], box=box.MARKDOWN)
        for row in rows:
            table.add_row(*row.values())
        console.print(table)


if __name__ == "__main__":
    main()
