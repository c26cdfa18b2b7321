"""pld-ray: knowledge-distillation experiments on Ray.

The losses work on their own: `from pld_ray import PLDLoss`. Experiments are run by the command
`pld-ray`, or from Python by `load_experiment`, `plan` and `pld_ray.sweep.run`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pld_ray.experiment import Experiment, load_experiment, plan
    from pld_ray.losses import (
        ATLoss,
        DISTLoss,
        DKDLoss,
        Features,
        FitNetLoss,
        KDLoss,
        ListMLELoss,
        PKTLoss,
        PlackettLuceLoss,
        PLDLoss,
        PListMLELoss,
        RKDLoss,
        SPLoss,
        VIDLoss,
        create_loss,
        teacher_order,
    )
    from pld_ray.spec import Trial
    from pld_ray.store import Store

__version__ = "0.1.0"

_home = {
    **dict.fromkeys(
        [
            "ATLoss",
            "DISTLoss",
            "DKDLoss",
            "Features",
            "FitNetLoss",
            "KDLoss",
            "ListMLELoss",
            "PKTLoss",
            "PLDLoss",
            "PListMLELoss",
            "PlackettLuceLoss",
            "RKDLoss",
            "SPLoss",
            "VIDLoss",
            "create_loss",
            "teacher_order",
        ],
        "losses",
    ),
    **dict.fromkeys(["Experiment", "load_experiment", "plan"], "experiment"),
    "Trial": "spec",
    "Store": "store",
}
__all__ = [
    "ATLoss",
    "DISTLoss",
    "DKDLoss",
    "Experiment",
    "Features",
    "FitNetLoss",
    "KDLoss",
    "ListMLELoss",
    "PKTLoss",
    "PLDLoss",
    "PListMLELoss",
    "PlackettLuceLoss",
    "RKDLoss",
    "SPLoss",
    "Store",
    "Trial",
    "VIDLoss",
    "create_loss",
    "load_experiment",
    "plan",
    "teacher_order",
]


def __getattr__(name: str) -> Any:
    if name in _home:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_home[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
