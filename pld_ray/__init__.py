"""pld-ray: knowledge-distillation experiments on Ray.

The losses work on their own: `from pld_ray import PLDLoss`. Experiments are run by the command
`pld-ray`, or from Python by `load_experiment`, `plan` and `pld_ray.sweep.runner.run`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pld_ray.config.experiment import Experiment, load_experiment
    from pld_ray.config.planning import plan
    from pld_ray.config.trial import Trial
    from pld_ray.losses.registry import create_loss, register_loss
    from pld_ray.store.store import Store

__version__ = "0.1.0"

_HOME = {  # where each name is defined; it is imported on first use, since torch takes seconds
    "Experiment": "config.experiment",
    "Store": "store.store",
    "Trial": "config.trial",
    "create_loss": "losses.registry",
    "load_experiment": "config.experiment",
    "plan": "config.planning",
    "register_loss": "losses.registry",
}


def _public() -> dict[str, str]:
    from pld_ray.losses.registry import public_names

    losses = {name: "losses" for name in public_names() if name.endswith("Loss")}
    return losses | {"Features": "losses", "teacher_order": "losses"} | _HOME


def __getattr__(name: str) -> Any:
    if not name.startswith("__") and name in (home := _public()):
        return getattr(importlib.import_module(f"{__name__}.{home[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_public(), "__version__"])


__all__ = [  # the losses come on top: see `dir(pld_ray)`
    "Experiment",
    "Store",
    "Trial",
    "create_loss",
    "load_experiment",
    "plan",
    "register_loss",
]
