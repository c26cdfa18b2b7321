"""pld-ray: knowledge-distillation experiments on Ray.

Three ways to use it: the command `pld-ray`, or `pld_ray.run` in Python, runs experiments;
`Distiller` and `fit` train modules and loaders of your own; the losses work on their own:
`from pld_ray import PLDLoss`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pld_ray.api.results import Results, plan, results, run, status
    from pld_ray.config.experiment import Experiment, load_experiment
    from pld_ray.config.registry import register_metric, register_optimizer, register_schedule
    from pld_ray.config.trial import Trial
    from pld_ray.data.registry import register_dataset
    from pld_ray.distill.article import PLDKnowledgeDistillation
    from pld_ray.distill.distiller import Distiller
    from pld_ray.distill.dot import DOT
    from pld_ray.distill.fit import evaluate, fit
    from pld_ray.losses.registry import create_loss, register_loss
    from pld_ray.models.export import save
    from pld_ray.models.reused import reuse_classifier
    from pld_ray.store.store import Store

__version__ = "0.1.0"

_HOME = {  # where each name is defined; it is imported on first use, since torch takes seconds
    "DOT": "distill.dot",
    "Distiller": "distill.distiller",
    "Experiment": "config.experiment",
    "PLDKnowledgeDistillation": "distill.article",
    "Results": "api.results",
    "Store": "store.store",
    "Trial": "config.trial",
    "create_loss": "losses.registry",
    "evaluate": "distill.fit",
    "fit": "distill.fit",
    "load_experiment": "config.experiment",
    "plan": "api.results",
    "register_dataset": "data.registry",
    "register_loss": "losses.registry",
    "register_metric": "config.registry",
    "register_optimizer": "config.registry",
    "register_schedule": "config.registry",
    "results": "api.results",
    "reuse_classifier": "models.reused",
    "run": "api.results",
    "save": "models.export",
    "status": "api.results",
}


def _public() -> dict[str, str]:
    from pld_ray.losses.registry import public_names

    losses = {name: "losses" for name in public_names() if name.endswith("Loss")}
    return losses | {"Features": "losses", "teacher_order": "losses"} | _HOME


def __getattr__(name: str) -> Any:
    from pld_ray.imports import without_collection

    if not name.startswith("__") and name in (home := _public()):
        with without_collection():
            return getattr(importlib.import_module(f"{__name__}.{home[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_public(), "__version__"])


__all__ = [  # the losses come on top: see `dir(pld_ray)`
    "DOT",
    "Distiller",
    "Experiment",
    "PLDKnowledgeDistillation",
    "Results",
    "Store",
    "Trial",
    "create_loss",
    "evaluate",
    "fit",
    "load_experiment",
    "plan",
    "register_dataset",
    "register_loss",
    "register_metric",
    "register_optimizer",
    "register_schedule",
    "results",
    "reuse_classifier",
    "run",
    "save",
    "status",
]
