"""Optimizers, schedules and one update of the weights, as trials and `fit` use them."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_class,
    list_optimizers,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from pld_ray import plugins
from pld_ray.config.parts import Optimizer, Schedule
from pld_ray.config.registry import OPTIMIZERS, SCHEDULES
from pld_ray.distill.distiller import Distiller
from pld_ray.distill.dot import DOT
from pld_ray.errors import InputError

CAPTURABLE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)  # their fused kernels on CUDA
KERNELS = ("foreach", "fused", "capturable", "differentiable")  # arguments that choose kernels


def create_optimizer(settings: Optimizer, distiller: Distiller) -> torch.optim.Optimizer:
    """Create an optimizer for the student and for what the loss learns.

    Args:
        settings: Name, learning rate, weight decay and further arguments.
        distiller: Must be connected if its loss learns parts of its own.

    Raises:
        InputError: An optimizer of the user does not accept the arguments, or the loss has no two
            terms, which DOT needs.
    """
    learnt = distiller.learnt_by_loss()
    if settings.name == "dot" or settings.name in OPTIMIZERS:
        groups = param_groups_weight_decay(distiller.student, settings.weight_decay)
        if learnt:
            groups.append({"params": learnt, "weight_decay": settings.weight_decay})
        if settings.name != "dot":
            return _own_optimizer(settings, groups)
        distiller.keep_graphs()
        return DOT(groups, settings.lr, settings.momentum, delta=settings.delta)
    betas = {} if settings.betas is None else {"betas": settings.betas}
    optimizer = create_optimizer_v2(
        distiller.student,
        opt=settings.name,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        **betas,
        **_fused(settings, distiller),
        **settings.args,
    )
    if learnt:
        optimizer.add_param_group({"params": learnt, "weight_decay": settings.weight_decay})
    return optimizer


def _fused(settings: Optimizer, distiller: Distiller) -> dict[str, Any]:
    """Return the arguments for torch's fused kernels on CUDA, which a CUDA graph can hold."""
    on_cuda = next(distiller.student.parameters()).device.type == "cuda"
    kind = get_optimizer_class(settings.name, bind_defaults=False)
    if not on_cuda or kind not in CAPTURABLE or set(KERNELS) & settings.args.keys():
        return {}
    return {"fused": True} if kind is torch.optim.SGD else {"fused": True, "capturable": True}


def is_capturable(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a CUDA graph can hold the steps of an optimizer."""
    return type(optimizer) in CAPTURABLE and all(
        group["fused"] and group.get("capturable", True) for group in optimizer.param_groups
    )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `optimizer.state_dict()` returned, maybe on another device.

    Which kernels the optimizer uses belongs to the device and is kept.
    """
    groups = [
        kept | {name: own[name] for name in KERNELS if name in own}
        for kept, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict(state | {"param_groups": groups})


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


def _own_optimizer(settings: Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Create an optimizer of the user for parameter groups, and check what it is."""
    name, own = settings.name, OPTIMIZERS[settings.name]
    if name in list_optimizers():
        raise InputError(f"optimizer {name!r} of a plug-in: timm has this name: expected another")
    arguments = own.arguments(settings.args, "optimizer.args")
    wanted = {id(parameter) for group in groups for parameter in group["params"]}
    with plugins.errors_told(f"optimizer {name}"):
        made = own.function(groups, settings.lr, settings.weight_decay, **arguments)
    if not isinstance(made, torch.optim.Optimizer):
        raise InputError(
            f"optimizer {name} returns a {type(made).__name__}: expected a torch.optim.Optimizer"
        )
    if {id(each) for group in made.param_groups for each in group["params"]} != wanted:
        raise InputError(f"optimizer {name} has other parameters than those that it was given")
    return made


def check_own(optimizer: Optimizer, schedule: Schedule) -> None:
    """Use an optimizer and a schedule of the user once, on a small network.

    Raises:
        InputError: One of them raises an error, or returns what cannot be used.
    """
    if not {optimizer.name, schedule.name} & (OPTIMIZERS.keys() | SCHEDULES.keys()):
        return
    layer = nn.Linear(2, 2)
    stepped: torch.optim.Optimizer = torch.optim.SGD(layer.parameters(), optimizer.lr)
    if optimizer.name in OPTIMIZERS:
        groups: list[dict[str, Any]] = param_groups_weight_decay(layer, optimizer.weight_decay)
        stepped = _own_optimizer(optimizer, groups)
        layer(torch.ones(1, 2)).sum().backward()
        try:
            stepped.step()
        except Exception as error:
            said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            where = plugins.location(error)
            raise InputError(f"optimizer {optimizer.name}: {where}its step: {said}") from error
    if schedule.name in SCHEDULES:
        made = OwnSchedule(schedule, stepped, 1, 100)
        for update in range(100):
            made.step_update(update)


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
                group["lr"] = max(self.settings.min_lr, highest * self._factor(update))

    def _factor(self, update: int) -> float:
        """Return the factor of the learning rate, or raise InputError if it is none."""
        name, progress = self.settings.name, update / self.updates
        with plugins.errors_told(f"schedule {name}"):
            factor = self.own.function(progress, **self.arguments)
        if not isinstance(factor, Real) or not math.isfinite(factor) or factor < 0:
            raise InputError(
                f"schedule {name} returns {factor!r} at progress {progress:g}: expected a finite "
                "number of at least 0"
            )
        return float(factor)


class MovingAverage(ModelEmaV3):
    """The exponential moving average of a network, timm's `ModelEmaV3` with the same results.

    The places of the tensors are listed once, because to list the tensors at each update takes most
    of its time.

    Args:
        model: The network. It stays on its device.
        decay: The share of the average that an update keeps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, decay=decay)
        self.places: list[tuple[dict[str, Any], dict[str, Any], str]] = []
        for ours, theirs in zip(self.module.modules(), model.modules(), strict=True):
            kept = [
                name for name in theirs._buffers if name not in ours._non_persistent_buffers_set
            ]
            self.places += [(ours._parameters, theirs._parameters, n) for n in theirs._parameters]
            self.places += [(ours._buffers, theirs._buffers, name) for name in kept]

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Move the average towards the weights and buffers of the network."""
        pairs = [(ours[name], theirs[name]) for ours, theirs, name in self.places]
        moved = [pair for pair in pairs if pair[0] is not None and pair[0].is_floating_point()]
        averages, values = [pair[0] for pair in moved], [pair[1].detach() for pair in moved]
        torch._foreach_lerp_(averages, values, weight=1.0 - decay)
        for ours, theirs in pairs:
            if ours is not None and not ours.is_floating_point():
                ours.copy_(theirs)


def update(
    loss: Tensor,
    distiller: Distiller,
    optimizer: torch.optim.Optimizer,
    step: int,
    clip_grad: float | None,
    ema: MovingAverage | None,
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
    if isinstance(optimizer, DOT):
        optimizer.backward(*distiller.take_terms())
    else:
        optimizer.zero_grad()
        loss.backward()
    if clip_grad and isinstance(optimizer, DOT):
        optimizer.clip_grad_norm(clip_grad)
    elif clip_grad:
        parameters = [*distiller.student.parameters(), *distiller.learnt_by_loss()]
        nn.utils.clip_grad_norm_(parameters, clip_grad)
    optimizer.step()
    if ema is not None:
        ema.update(distiller.student, step=step)
