"""Optimizers, schedules and one update of the weights, as trials and `fit` use them."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from pld_ray.config.registry import OPTIMIZERS, SCHEDULES
from pld_ray.config.trial import Optimizer, Schedule
from pld_ray.distill.distiller import Distiller
from pld_ray.errors import InputError


def create_optimizer(settings: Optimizer, distiller: Distiller) -> torch.optim.Optimizer:
    """Create an optimizer for the student and for what the loss learns.

    Args:
        settings: Name, learning rate, weight decay and further arguments.
        distiller: Must be connected if its loss learns parts of its own.

    Raises:
        InputError: An optimizer of the user does not accept the arguments.
    """
    learnt = distiller.learnt_by_loss()
    if (own := OPTIMIZERS.get(settings.name)) is not None:
        groups = param_groups_weight_decay(distiller.student, settings.weight_decay)
        if learnt:
            groups.append({"params": learnt, "weight_decay": settings.weight_decay})
        arguments = own.arguments(settings.args, "optimizer.args")
        made = own.function(groups, settings.lr, settings.weight_decay, **arguments)
        if not isinstance(made, torch.optim.Optimizer):
            raise InputError(
                f"optimizer {settings.name} returns a {type(made).__name__}: expected a "
                "torch.optim.Optimizer"
            )
        return made
    betas = {} if settings.betas is None else {"betas": settings.betas}
    optimizer = create_optimizer_v2(
        distiller.student,
        opt=settings.name,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        **betas,
        **settings.args,
    )
    if learnt:
        optimizer.add_param_group({"params": learnt, "weight_decay": settings.weight_decay})
    return optimizer


def create_schedule(
    settings: Schedule, optimizer: torch.optim.Optimizer, epochs: int, steps: int
) -> Any:
    """Create a schedule of the learning rate, stepped with `step_update(update)`.

    Args:
        settings: Name, warm-up and decay. "constant" never decays.
        optimizer: Its learning rate is the highest one.
        epochs: Epochs of the whole training.
        steps: Updates in an epoch.
    """
    if settings.name in SCHEDULES:
        return OwnSchedule(settings, optimizer, epochs, steps)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="step" if settings.name == "constant" else settings.name,
        num_epochs=epochs,
        decay_epochs=epochs + 1 if settings.name == "constant" else settings.decay_epochs,
        decay_milestones=list(settings.milestones),
        decay_rate=settings.decay_rate,
        min_lr=settings.min_lr,
        warmup_lr=settings.warmup_lr,
        warmup_epochs=settings.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    return scheduler


class OwnSchedule:
    """A schedule of the user: the factor of the learning rate by the progress of the training.

    The arguments are those of `create_schedule`.
    """

    def __init__(
        self, settings: Schedule, optimizer: torch.optim.Optimizer, epochs: int, steps: int
    ) -> None:
        self.settings, self.optimizer = settings, optimizer
        self.highest = [group["lr"] for group in optimizer.param_groups]
        self.own = SCHEDULES[settings.name]
        self.arguments = self.own.arguments(settings.args, "schedule.args")
        self.updates, self.warmup = epochs * steps, settings.warmup_epochs * steps
        self.step_update(0)

    def step_update(self, update: int) -> None:
        """Set the learning rates for an update (from 0)."""
        low = self.settings.warmup_lr
        for group, highest in zip(self.optimizer.param_groups, self.highest, strict=True):
            if update < self.warmup:
                group["lr"] = low + (highest - low) * update / self.warmup
            else:
                factor = float(self.own.function(update / self.updates, **self.arguments))
                group["lr"] = max(self.settings.min_lr, highest * factor)


def update(
    loss: Tensor,
    distiller: Distiller,
    optimizer: torch.optim.Optimizer,
    step: int,
    clip_grad: float | None,
    ema: ModelEmaV3 | None,
) -> None:
    """Do one update: backward pass, clipped gradients, optimizer step, moving average.

    Args:
        loss: A scalar.
        distiller: Holds the student and the parts that the loss learns.
        optimizer: The optimizer of the parameters of the student and of the loss.
        step: The number of the update, from 0.
        clip_grad: The largest norm of all gradients together; None for no clipping.
        ema: The exponential moving average of the student, if there is one.
    """
    optimizer.zero_grad()
    loss.backward()
    if clip_grad:
        parameters = [*distiller.student.parameters(), *distiller.learnt_by_loss()]
        nn.utils.clip_grad_norm_(parameters, clip_grad)
    optimizer.step()
    if ema is not None:
        ema.update(distiller.student, step=step)
