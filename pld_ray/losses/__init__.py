"""The registry of losses: each by its name in YAML, with its typed parameters.

Adding a loss: write its module in this folder, describe its parameters here, add it to `Loss`.
This file imports no torch, so that plans are made without it; the modules are loaded on use:

    from pld_ray.losses import PLDLoss
    loss = PLDLoss(temperature=1.0)(student_logits, teacher_logits, labels)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Unpack, get_args

from pydantic import BaseModel, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from pld_ray.losses.common import DistillationLoss, Options
    from pld_ray.losses.correlation import DISTLoss
    from pld_ray.losses.cross_entropy import CELoss, LabelSmoothingLoss
    from pld_ray.losses.decoupled import DKDLoss
    from pld_ray.losses.divergence import KDLoss
    from pld_ray.losses.features import (
        ATLoss,
        FeatureLoss,
        Features,
        FitNetLoss,
        PKTLoss,
        RKDLoss,
        SPLoss,
        VIDLoss,
    )
    from pld_ray.losses.order import teacher_order
    from pld_ray.losses.plackett_luce import (
        ListMLELoss,
        PlackettLuceLoss,
        PLDLoss,
        PListMLELoss,
    )

Temperature = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Standardize = Literal["none", "both", "teacher"]


def _top_k(value: Any) -> Any:
    if value in (None, "auto") or (type(value) is int and value > 0):
        return value
    raise PydanticCustomError("top_k", "expected a number of classes above 0, or auto")


TopK = Annotated[int | str | None, PlainValidator(_top_k)]


class LossParams(BaseModel):
    """Parameters common to all losses; the fields of each are its constructor's arguments."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    needs_teacher: ClassVar[bool] = True
    needs_features: ClassVar[bool] = False  # compares feature maps instead of logits
    ranks: ClassVar[bool] = False  # takes the teacher's order of the classes
    module: ClassVar[str]  # "file:class" in this folder
    label: ClassVar[str]  # as the paper's tables print it
    name: str

    @property
    def needs_order(self) -> bool:
        """Whether a kept order helps: one that ranks the first classes alone finds them itself."""
        return self.ranks and getattr(self, "top_k", None) is None


class CE(LossParams):
    """Cross-entropy with the labels; no teacher."""

    needs_teacher = False
    module = "cross_entropy:CELoss"
    label = "CE"
    name: Literal["ce"]


class LS(LossParams):
    """Cross-entropy with label smoothing; no teacher."""

    needs_teacher = False
    module = "cross_entropy:LabelSmoothingLoss"
    label = "LS"
    name: Literal["ls"]
    smoothing: float = Field(0.1, ge=0, lt=1)


class KD(LossParams):
    """Knowledge distillation (Hinton et al. 2015) under three divergences."""

    module = "divergence:KDLoss"
    label = "KD"
    name: Literal["kd"]
    temperature: Temperature = 4.0
    ce_weight: float = Field(0.1, ge=0, le=1)
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = "forward_kl"
    standardize: Standardize = "none"


class DIST(LossParams):
    """Correlation with a stronger teacher (Huang et al. 2022)."""

    module = "correlation:DISTLoss"
    label = "DIST"
    name: Literal["dist"]
    temperature: Temperature = 4.0
    ce_weight: Weight = 1.0
    beta: Weight = 2.0
    gamma: Weight = 2.0
    tau_squared: bool = True
    standardize: Standardize = "none"


class DKD(LossParams):
    """Decoupled knowledge distillation (Zhao et al. 2022)."""

    module = "decoupled:DKDLoss"
    label = "DKD"
    name: Literal["dkd"]
    temperature: Temperature = 4.0
    ce_weight: Weight = 1.0
    alpha: Weight = 1.0
    beta: Weight = 8.0
    warmup_epochs: int = Field(0, ge=0)
    standardize: Standardize = "none"


class PLD(LossParams):
    """Plackett-Luce distillation: the ranking weighted by the teacher's softmax."""

    ranks = True
    module = "plackett_luce:PLDLoss"
    label = "PLD"
    name: Literal["pld"]
    temperature: Temperature = 1.0
    standardize: Standardize = "none"
    top_k: TopK = None
    tolerance: float = Field(1e-3, gt=0, lt=1)
    adaptive: Literal["none", "entropy", "margin"] = "none"


class ListMLE(LossParams):
    """The same ranking with equal weights 1/C (Xia et al. 2008)."""

    ranks = True
    module = "plackett_luce:ListMLELoss"
    label = "ListMLE"
    name: Literal["listmle"]
    standardize: Standardize = "none"


class PListMLE(LossParams):
    """The same ranking with fixed decreasing weights (Lan et al. 2014)."""

    ranks = True
    module = "plackett_luce:PListMLELoss"
    label = "P-ListMLE"
    name: Literal["plistmle"]
    standardize: Standardize = "none"


class AT(LossParams):
    """Attention transfer (Zagoruyko and Komodakis 2017)."""

    needs_features = True
    module = "features:ATLoss"
    label = "AT"
    name: Literal["at"]
    weight: Weight = 1000.0
    ce_weight: Weight = 1.0


class FitNet(LossParams):
    """Hints (Romero et al. 2015)."""

    needs_features = True
    module = "features:FitNetLoss"
    label = "FitNet"
    name: Literal["fitnet"]
    stage: int = Field(2, ge=1)
    weight: Weight = 100.0
    ce_weight: Weight = 1.0


class PKT(LossParams):
    """Probabilistic knowledge transfer (Passalis and Tefas 2018)."""

    needs_features = True
    module = "features:PKTLoss"
    label = "PKT"
    name: Literal["pkt"]
    weight: Weight = 30000.0
    ce_weight: Weight = 1.0


class RKD(LossParams):
    """Relational knowledge distillation (Park et al. 2019)."""

    needs_features = True
    module = "features:RKDLoss"
    label = "RKD"
    name: Literal["rkd"]
    distance_weight: Weight = 25.0
    angle_weight: Weight = 50.0
    ce_weight: Weight = 1.0


class SP(LossParams):
    """Similarity preserving (Tung and Mori 2019)."""

    needs_features = True
    module = "features:SPLoss"
    label = "SP"
    name: Literal["sp"]
    weight: Weight = 3000.0
    ce_weight: Weight = 1.0


class VID(LossParams):
    """Variational information distillation (Ahn et al. 2019)."""

    needs_features = True
    module = "features:VIDLoss"
    label = "VID"
    name: Literal["vid"]
    weight: Weight = 1.0
    ce_weight: Weight = 1.0
    initial_variance: float = Field(5.0, gt=0)
    eps: float = Field(1e-5, gt=0)


Loss = Annotated[
    CE | LS | KD | DIST | DKD | PLD | ListMLE | PListMLE | AT | FitNet | PKT | RKD | SP | VID,
    Field(discriminator="name"),
]
REGISTRY: dict[str, type[LossParams]] = {
    get_args(params.model_fields["name"].annotation)[0]: params
    for params in get_args(get_args(Loss)[0])
}


def create_loss(params: LossParams, **options: Unpack[Options]) -> DistillationLoss | FeatureLoss:
    """Return the torch module that computes the loss described by `params`.

    `options`: `ignore_index` and `reduction`, which all losses on logits take.
    """
    return _load(params.module)(**params.model_dump(exclude={"name"}), **options)


def _load(module: str) -> Any:
    file, _, name = module.partition(":")
    return getattr(importlib.import_module(f"{__name__}.{file}"), name)


_modules = {params.module.partition(":")[2]: params.module for params in REGISTRY.values()}
_modules |= {"PlackettLuceLoss": "plackett_luce:PlackettLuceLoss"}
_modules |= {"Features": "features:Features", "FeatureLoss": "features:FeatureLoss"}
_modules |= {"teacher_order": "order:teacher_order", "DistillationLoss": "common:DistillationLoss"}
__all__ = [
    "REGISTRY",
    "ATLoss",
    "CELoss",
    "DISTLoss",
    "DKDLoss",
    "DistillationLoss",
    "FeatureLoss",
    "Features",
    "FitNetLoss",
    "KDLoss",
    "LabelSmoothingLoss",
    "ListMLELoss",
    "Loss",
    "LossParams",
    "PKTLoss",
    "PLDLoss",
    "PListMLELoss",
    "PlackettLuceLoss",
    "RKDLoss",
    "SPLoss",
    "VIDLoss",
    "create_loss",
    "teacher_order",
]


def __getattr__(name: str) -> Any:
    if name in _modules:
        return _load(_modules[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
