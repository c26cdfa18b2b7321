"""Optimizers, schedules and metrics of the user, each by its name in YAML.

    @register_optimizer("half_sgd")
    def half_sgd(params, lr, weight_decay, momentum: Annotated[float, Field(ge=0)] = 0.9):
        return torch.optim.SGD(params, lr / 2, momentum, weight_decay=weight_decay)

    @register_schedule("triangle")
    def triangle(progress, peak: Annotated[float, Field(gt=0, lt=1)] = 0.3):
        return min(progress / peak, (1 - progress) / (1 - peak))

    @register_metric("margin")
    def margin(student, labels, teacher):
        top = student.topk(2).values
        return top[:, 0] - top[:, 1]

The typed arguments are the parameters in YAML: `optimizer.args` and `schedule.args`. A metric is
named in `metrics` and takes none. Nothing here imports torch.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, create_model

from pld_ray.config.validation import validated
from pld_ray.errors import InputError, nearest
from pld_ray.plugins import provide

_Function = TypeVar("_Function", bound=Callable[..., Any])
BUILT_IN_OPTIMIZERS = {"dot": "SGD with a momentum for each of the two terms of a loss (DOT)"}
BUILT_IN_SCHEDULES = ("cosine", "multistep", "step", "poly", "constant")  # of timm
TAKEN = (  # names in the history of a trial, and columns of tables
    *("top1", "top5", "val_loss", "ece", "kl_teacher_student", "agreement", "train_loss"),
    *("epoch", "epochs", "lr", "parameters", "teacher_top1", "images_per_second", "id", "label"),
    *("student", "teacher", "setting", "method", "seed", "loss", "optimizer", "original", "gain"),
    *("original_teacher", "own_metrics", "reference", "finished", "notes", "n", "planned", "state"),
    *("teacher_images", "failed", "why", "dataset", "done", "stopped", "open", "trial", "trials"),
    *("to_draw", "best", "settings", "loss_ce", "loss_kd", "temperature"),
)


@dataclass(frozen=True)
class Own:
    """A function of the user.

    Attributes:
        function: The function that was decorated.
        parameters: The model of its typed arguments, without those that the program passes.
    """

    function: Callable[..., Any]
    parameters: type[BaseModel]

    def arguments(self, given: dict[str, Any], where: str) -> dict[str, Any]:
        """Return all arguments, defaults included.

        Args:
            given: The arguments that are set, by name.
            where: The field that sets them, for error messages.

        Raises:
            InputError: An argument is unknown, is missing or has a wrong value.
        """
        return dict(validated(self.parameters, given, where))

    def identity(self, given: dict[str, Any], where: str) -> dict[str, Any]:
        """Return the arguments in the form that identifies a trial: without defaults."""
        found = validated(self.parameters, given, where)
        return found.model_dump(mode="json", exclude_defaults=True)


OPTIMIZERS: dict[str, Own] = {}
SCHEDULES: dict[str, Own] = {}
METRICS: dict[str, Own] = {}


def register_optimizer(name: str) -> Callable[[_Function], _Function]:
    """Register a function that creates an optimizer.

    It is called with the parameter groups, the learning rate and the weight decay, and returns a
    `torch.optim.Optimizer`. As in timm, biases and the parameters of norms are in a group without
    weight decay.

    Raises:
        ValueError: Another optimizer has this name, or an argument has no annotation.
    """
    return _register("optimizer", name, OPTIMIZERS, 3, BUILT_IN_OPTIMIZERS)


def register_schedule(name: str) -> Callable[[_Function], _Function]:
    """Register a function that returns the factor of the learning rate.

    It is called with the progress of the training, in [0, 1): the number of the update divided by
    the number of all updates. The fields for the warm-up and the lowest rate apply to it as well.

    Raises:
        ValueError: Another schedule has this name, or an argument has no annotation.
    """
    return _register("schedule", name, SCHEDULES, 1, BUILT_IN_SCHEDULES)


def register_metric(name: str) -> Callable[[_Function], _Function]:
    """Register a function that returns a metric of each validation sample; the mean is kept.

    It is called with the logits of the student [N, C], the labels [N], and the logits of the
    teacher [N, C] (None for a loss that needs no teacher), and returns a tensor [N].

    Raises:
        ValueError: The name is taken, or the function has further arguments.
    """
    if name.endswith(("seconds", "_std")):
        raise ValueError(f"metric {name!r}: expected a name that ends neither in seconds nor _std")
    return _register("metric", name, METRICS, 3, TAKEN)


def metric(name: str) -> Own:
    """Return a metric by its name.

    Raises:
        InputError: There is no such metric.
    """
    if name not in METRICS:
        known = nearest(name, METRICS) if METRICS else "no plug-in has registered one"
        raise InputError(f"metrics has {name!r}, which is not registered; {known}")
    return METRICS[name]


def _register(
    kind: str, name: str, registry: dict[str, Own], passed: int, taken: Collection[str] = ()
) -> Callable[[_Function], _Function]:
    """Return a decorator. The first `passed` arguments of the function are no parameters."""
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise ValueError(f"{kind} {name!r}: expected small letters, digits and underscores")

    def register(function: _Function) -> _Function:
        if name in registry or name in taken:
            raise ValueError(f"{kind} {name!r}: there is one with this name already")
        hints = get_type_hints(function, include_extras=True)
        fields: dict[str, Any] = {}
        for argument in list(inspect.signature(function).parameters.values())[passed:]:
            if argument.name not in hints:
                raise ValueError(f"{kind} {name!r}: argument {argument.name!r} has no annotation")
            default = ... if argument.default is argument.empty else argument.default
            fields[argument.name] = hints[argument.name], default
        if fields and registry is METRICS:
            raise ValueError(f"metric {name!r}: expected 3 arguments, without {', '.join(fields)}")
        checked = ConfigDict(extra="forbid", allow_inf_nan=False)
        model = create_model(name, __config__=checked, **fields)
        registry[name] = Own(function, model)
        provide(kind, name, function.__module__, lambda: registry.pop(name))
        return function

    return register
