"""One call for modules and loaders of your own: `fit` and `evaluate`, without YAML or Ray.

    distiller = Distiller(student, teacher, loss=PLDLoss(temperature=1.0))
    history = fit(distiller, train_loader, epochs=10, val_loader=val_loader, lr=1e-3)
    accuracy = evaluate(student, val_loader)

They use the same core as a trial: `Distiller`, and the optimizers and schedules of `optimization`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from timm.optim import list_optimizers
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from pld_ray.config.parts import Optimizer, Schedule
from pld_ray.config.registry import BUILT_IN_OPTIMIZERS
from pld_ray.config.validation import validated
from pld_ray.distill import metrics
from pld_ray.distill.device import Precision, autocast, pick_device, pick_precision
from pld_ray.distill.distiller import Distiller
from pld_ray.distill.dot import DOT
from pld_ray.distill.frozen_teacher import check_logits
from pld_ray.distill.optimization import create_optimizer, create_schedule, update
from pld_ray.errors import InputError, nearest
from pld_ray.models.checks import ONE_IMAGE

Batch = tuple[Tensor, ...]  # images [B, channels, H, W], labels [B] and maybe indices [B]


def fit(
    distiller: Distiller,
    train_loader: Iterable[Any],
    epochs: int,
    val_loader: Iterable[Any] | None = None,
    *,
    optimizer: str | torch.optim.Optimizer = "adamw",
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    schedule: str | Schedule = "cosine",
    warmup_epochs: float = 0.0,
    clip_grad: float | None = None,
    ema: float | None = None,
    precision: str = "auto",
    device: str | torch.device | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Train a student with a distiller, and return what each epoch came to.

    The student is changed in place. It is in training mode while it trains, and the teacher stays
    in evaluation mode throughout.

    Args:
        distiller: Student, teacher and loss.
        train_loader: Anything that can be iterated once per epoch and gives (images, labels):
            float images [B, channels, H, W] and integer labels [B]. It needs a length, unless the
            schedule is "constant". For a loss that keeps a memory of the training samples (CRD) it
            gives (images, labels, index), with the integer indices of the images [B]. For a loss
            that takes two views of each image, such as `MLKDLoss`, a batch is `torch.cat` of the
            first views and of the second views, with the labels twice.
        epochs: How often to go through `train_loader`.
        val_loader: If given, the student is evaluated on it after each epoch.
        optimizer: The name of an optimizer in timm, "dot", or an optimizer object. An object keeps
            its own learning rate and weight decay.
        lr: Learning rate.
        weight_decay: Weight decay.
        schedule: "cosine", "multistep", "step", "poly", "constant", or a `Schedule` with all its
            settings. It is stepped after each update.
        warmup_epochs: Epochs in which the learning rate rises linearly from 0, for a schedule that
            is given by name.
        clip_grad: The largest norm of all gradients together; None for no clipping.
        ema: The decay of an exponential moving average of the student, such as 0.999. The average
            is what is evaluated, and what the student holds in the end.
        precision: "float32", "bfloat16", or "auto": bfloat16 on CUDA. Losses are float32. It
            replaces the precision of the distiller.
        device: Where to train, such as "cuda". Default: CUDA if there is a GPU, else the CPU.
        progress: Whether to show a progress bar on a terminal.

    Returns:
        One row per epoch: epoch, train_loss, lr, images_per_second, and with `val_loader` top1 and
        top5 in percent, val_loss in nats and ece in [0, 1]. For a loss of two terms also loss_ce,
        the part of train_loss that is the cross-entropy with the labels, and loss_kd, the rest.
        For `CTKDLoss` also the temperature after the epoch.

    Raises:
        InputError: An argument or a batch cannot be used, or the loss is not finite.
    """
    _check_arguments(
        epochs, clip_grad, ema, {"train_loader": train_loader, "val_loader": val_loader}
    )
    place = _device(device)
    _prepare(distiller, train_loader, precision, place)
    settings = _schedule(schedule, warmup_epochs, epochs)
    stepper = _optimizer(optimizer, lr, weight_decay, distiller)
    steps = _length(train_loader, settings)
    schedule_ = create_schedule(settings, stepper, epochs, steps)
    average = ModelEmaV3(distiller.student, decay=ema) if ema else None
    rows: list[dict[str, float]] = []
    with _bar(progress) as bar:
        task = bar.add_task("", total=epochs * steps if hasattr(train_loader, "__len__") else None)
        for epoch in range(epochs):
            bar.update(task, description=f"epoch {epoch + 1}/{epochs}")
            given = checked_batches(
                train_loader, place, "train_loader", distiller.samples, distiller.paired
            )
            row = _train_epoch(
                distiller, given, epoch, steps,
                stepper, schedule_, clip_grad, average, lambda: bar.advance(task),
            )  # fmt: skip
            if val_loader is not None:
                student = distiller.student if average is None else average.module
                batches = checked_batches(val_loader, place, "val_loader")
                row |= _scores(student, batches, distiller.precision)
            rows.append(row)
    if isinstance(stepper, DOT):  # later losses would keep their graphs in memory
        distiller.loss.keeps_graphs = False
    if average is not None:
        distiller.student.load_state_dict(average.module.state_dict())
    if not all(torch.isfinite(parameter).all() for parameter in distiller.student.parameters()):
        raise InputError("the last update made the student's weights infinite or NaN: lower lr")
    return pd.DataFrame(rows)


def evaluate(
    student: nn.Module,
    loader: Iterable[Any],
    *,
    precision: Precision = "float32",
    device: str | torch.device | None = None,
) -> float:
    """Return the accuracy of a network, in [0, 1].

    The network is in evaluation mode meanwhile, and then in the mode in which it was.

    Args:
        student: Maps images [B, channels, H, W] to logits [B, C].
        loader: Gives batches (images, labels).
        precision: "float32" or "bfloat16".
        device: Default: where the network's parameters are.

    Raises:
        InputError: A batch cannot be used, or there is none.
        ValueError: The precision is unknown, or the network returns no logits [B, C].
    """
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision is {precision!r}: expected 'float32' or 'bfloat16'")
    parameter = next(student.parameters(), None)
    place = torch.device("cpu") if parameter is None else parameter.device
    if device is not None:
        place = _device(device)
        student.to(place)
    return _scores(student, checked_batches(loader, place, "loader"), precision)["top1"] / 100


def _prepare(
    distiller: Distiller, loader: Iterable[Any], precision: str, device: torch.device
) -> None:
    """Move the distiller to the device, and connect it to the shape of the first images."""
    if precision not in ("auto", "float32", "bfloat16"):
        raise InputError(f"precision is {precision!r}; accepted: auto, bfloat16, float32")
    distiller.to(device)
    distiller.set_precision(pick_precision(precision, device))
    if not distiller.connected:
        if distiller.takes_samples:
            raise InputError(
                f"{type(distiller.loss).__name__} keeps a memory of the training samples: call "
                "distiller.connect(images, labels) before fit, with the labels of all of them"
            )
        if isinstance(loader, Iterator):  # the batch that is looked at would be lost
            raise InputError(
                "train_loader is an iterator: call distiller.connect(images) before fit"
            )
        distiller.connect(next(checked_batches(loader, device, "train_loader"))[0])


def _train_epoch(
    distiller: Distiller,
    batches: Iterator[Batch],
    epoch: int,
    steps: int,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    clip_grad: float | None,
    ema: ModelEmaV3 | None,
    done: Callable[[], None],
) -> dict[str, float]:
    """Train on all batches; `done` is called after each."""
    distiller.set_epoch(epoch)
    distiller.train()
    seen, rate = 0, optimizer.param_groups[0]["lr"]
    losses: Any = 0.0  # on the device, so that no step waits for the host
    started = time.perf_counter()
    for number, (images, labels, *index) in enumerate(batches):
        step = epoch * steps + number
        schedule.step_update(step)
        rate = optimizer.param_groups[0]["lr"]
        with _one_image_told():
            loss = distiller(images, labels, index=index[0] if index else None)
        size = len(images) // (2 if distiller.paired else 1)
        losses = losses + distiller.with_terms(loss).double() * size
        update(loss, distiller, optimizer, step, clip_grad, ema)
        seen += size
        done()
    means = (losses / seen).flatten().tolist()
    if not math.isfinite(means[0]):
        raise InputError(
            f"the training loss is {means[0]} in epoch {epoch + 1}: expected a finite number; "
            "a lower learning rate, clip_grad, or images without NaN may help"
        )
    return {
        "epoch": epoch + 1,
        **metrics.loss_means(means),
        **distiller.learnt_numbers(),
        "lr": rate,
        "images_per_second": seen / (time.perf_counter() - started),
    }


@contextmanager
def _one_image_told() -> Iterator[None]:
    """Say what can be done about a batch norm that is given a batch of one image."""
    try:
        yield
    except ValueError as error:
        if ONE_IMAGE not in str(error):
            raise
        raise InputError(
            "train_loader: a batch has one image, on which batch norm cannot train: expected two "
            "or more, for example with drop_last=True in the DataLoader"
        ) from None


@torch.no_grad()
def _scores(network: nn.Module, batches: Iterator[Batch], precision: Precision) -> dict[str, float]:
    """Metrics of a network without a teacher."""
    training = network.training
    network.eval()
    try:
        parts = []
        for images, labels in batches:
            with autocast(images.device, precision):
                logits = check_logits("network", network(images)).float()
            if not torch.isfinite(logits).all():
                raise InputError("the network's logits are not finite on the validation images")
            _check_labels("validation", labels, logits.shape[1])
            parts.append(metrics.sums(logits, labels, None))
    finally:
        network.train(training)
    return metrics.averages(torch.stack(parts).sum(0), has_teacher=False)


# ---------------------------------------------------------------- arguments


def _check_arguments(
    epochs: int, clip_grad: float | None, ema: float | None, loaders: dict[str, Any]
) -> None:
    if type(epochs) is not int or epochs < 1:
        raise InputError(f"epochs is {epochs!r}: expected a whole number from 1")
    if clip_grad is not None and not clip_grad > 0:
        raise InputError(f"clip_grad is {clip_grad!r}: expected a number above 0, or None")
    if ema is not None and not 0 < ema < 1:
        raise InputError(f"ema is {ema!r}: expected a number between 0 and 1, or None")
    for name, loader in loaders.items():
        if isinstance(loader, Iterator) and epochs > 1:
            raise InputError(
                f"{name} is an iterator, which can be read only once: pass a DataLoader or a list"
            )


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return pick_device()
    try:
        place = torch.device(device)
    except RuntimeError:
        raise InputError(f"device is {device!r}: expected cpu, cuda or cuda:NUMBER") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device is {str(device)!r}: this machine has no CUDA device; use cpu")
    return place


def _schedule(schedule: str | Schedule, warmup_epochs: float, epochs: int) -> Schedule:
    if warmup_epochs and isinstance(schedule, Schedule):
        raise InputError("warmup_epochs: expected in the Schedule, or a schedule given by name")
    if not isinstance(schedule, Schedule):
        given = {"name": schedule, "warmup_epochs": warmup_epochs}
        schedule = validated(Schedule, given, "schedule")
    if schedule.warmup_epochs >= epochs:
        raise InputError(
            f"warmup_epochs is {schedule.warmup_epochs:g}: expected fewer than the {epochs} epochs"
        )
    return schedule


def _optimizer(
    optimizer: str | torch.optim.Optimizer, lr: float, weight_decay: float, distiller: Distiller
) -> torch.optim.Optimizer:
    if not any(parameter.requires_grad for parameter in distiller.student.parameters()):
        raise InputError(
            "the student has no parameter that trains: expected requires_grad (a network that was "
            "a teacher is frozen)"
        )
    if isinstance(optimizer, torch.optim.Optimizer):
        _check_parameters(optimizer, distiller)
        if isinstance(optimizer, DOT):
            distiller.keep_graphs()
        return optimizer
    if not isinstance(optimizer, str):
        raise InputError(
            f"optimizer is {optimizer!r}: expected a torch optimizer, or the name of one in timm"
        )
    known = [*BUILT_IN_OPTIMIZERS, *list_optimizers()]
    if optimizer not in known:
        raise InputError(f"optimizer is {optimizer!r}: not in timm; {nearest(optimizer, known)}")
    settings = {"name": optimizer, "lr": lr, "weight_decay": weight_decay}
    return create_optimizer(validated(Optimizer, settings, "optimizer"), distiller)


def _check_parameters(optimizer: torch.optim.Optimizer, distiller: Distiller) -> None:
    """InputError unless an optimizer trains the student and what the loss learns."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in trained for parameter in distiller.student.parameters()):
        raise InputError("optimizer: it has none of the student's parameters")
    if not all(id(parameter) in trained for parameter in distiller.learnt_by_loss()):
        raise InputError(
            "optimizer: it lacks parameters that the loss learns: call distiller.connect(images) "
            "first, and add distiller.learnt_by_loss() to the optimizer"
        )


def _length(loader: Iterable[Any], schedule: Schedule) -> int:
    """Batches in an epoch; 1 if that is unknown and does not matter."""
    try:
        steps = len(loader)  # type: ignore[arg-type]
    except TypeError:
        if schedule.name == "constant" and not schedule.warmup_epochs:
            return 1
        raise InputError(
            f"train_loader is a {type(loader).__name__} without a length, which the schedule "
            f"{schedule.name!r} needs: pass a DataLoader or a list, or schedule='constant'"
        ) from None
    if steps == 0:
        raise InputError("train_loader has no batches")
    return steps


def checked_batches(
    loader: Iterable[Any],
    device: torch.device,
    name: str,
    samples: int = 0,
    paired: bool = False,
) -> Iterator[Batch]:
    """The batches of a loader on the device, float32, checked; InputError if there is none.

    With `samples`, each batch has the indices of its images among so many training samples. With
    `paired`, it holds two views of each image.
    """
    count = 0
    for batch in loader:
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise InputError(
                f"{name}: a batch is a {type(batch).__name__}: expected (images, labels)"
            )
        images, labels = batch[0], batch[1]
        if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
            kinds = f"({type(images).__name__}, {type(labels).__name__})"
            raise InputError(f"{name}: a batch is {kinds}: expected two tensors, images and labels")
        if labels.ndim != 1 or not images.is_floating_point() or len(images) != len(labels):
            raise InputError(
                f"{name}: images are {images.dtype} {list(images.shape)} and labels "
                f"{list(labels.shape)}: expected floating point [B, ...] and [B]"
                + ("; pass a DataLoader, not a dataset" if labels.ndim == 0 else "")
            )
        if labels.is_floating_point():
            raise InputError(f"{name}: labels are {labels.dtype}: expected class indices")
        if len(images) == 0:
            continue
        first, second = labels[: len(labels) // 2], labels[len(labels) // 2 :]
        if paired and not torch.equal(first, second):
            raise InputError(
                f"{name}: the loss takes two views of each image: expected batches of the first "
                "views and then the second views of the same images, with their labels twice"
            )
        count += 1
        index = [_checked_index(batch, samples, name)] if samples else []
        images, labels, *index = (x.to(device, non_blocking=True) for x in (images, labels, *index))
        yield images.float(), labels.long(), *index
    if count == 0:
        raise InputError(
            f"{name} gave no batch: an iterator can be read only once; pass a DataLoader or a list"
        )


def _checked_index(batch: Any, samples: int, name: str) -> Tensor:
    """Return the indices of the images of a batch, int64 [B]."""
    index = batch[2] if len(batch) > 2 else None
    if not isinstance(index, Tensor) or index.is_floating_point() or index.shape != batch[1].shape:
        raise InputError(
            f"{name}: the loss keeps a memory of the training samples: expected batches (images, "
            "labels, index), with the integer index [B] of each image"
        )
    wrong = index[(index < 0) | (index >= samples)]
    if len(wrong):
        raise InputError(f"{name}: expected indices in [0, {samples}), got {int(wrong[0])}")
    return index.long()


def _check_labels(name: str, labels: Tensor, classes: int) -> None:
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise InputError(f"{name}: expected labels in [0, {classes}), got {int(wrong[0])}")


def _bar(shown: bool) -> Progress:
    """A progress bar on standard error; nothing is shown where there is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not (shown and console.is_terminal))
