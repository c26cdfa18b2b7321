"""Losses: each a torch module with typed parameters, registered under its name in YAML.

    from pld_ray.losses import PLDLoss
    loss = PLDLoss(temperature=1.0)(student_logits, teacher_logits, labels)

Enters: student logits or features, what the teacher says of them, labels. Leaves: a scalar.
To add a loss, write one class in one file of this folder: see `registry`. This package imports
no torch until a loss is used.

Uses: nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

from pld_ray.losses.parameters import LossParams
from pld_ray.losses.registry import REGISTRY, create_loss, public_names, register_loss

__all__ = ["REGISTRY", "LossParams", "create_loss", "register_loss"]


def __getattr__(name: str) -> Any:
    if name in public_names():
        return getattr(importlib.import_module(public_names()[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *public_names()})
