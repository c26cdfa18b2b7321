"""DIST: the student keeps the teacher's relations, not its probabilities."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.nn import functional as F

from pld_ray.losses.common import (
    DistillationLoss,
    Options,
    soften,
    standardize_pair,
)
from pld_ray.losses.parameters import Standardize, Temperature, Weight
from pld_ray.losses.registry import register_loss


def pearson(a: Tensor, b: Tensor, dim: int, kept: Tensor | None = None) -> Tensor:
    """Pearson correlations of `a` and `b` along `dim`; `kept`: 1 or 0 for each entry along it."""
    a, b = (_centred(x, dim, kept) for x in (a, b))
    norms = [(x * x).sum(dim).clamp_min(1e-24).sqrt() for x in (a, b)]  # sqrt has no slope at 0
    return (a * b).sum(dim) / (norms[0] * norms[1] + 1e-8)


def _centred(x: Tensor, dim: int, kept: Tensor | None) -> Tensor:
    if kept is None:
        return x - x.mean(dim, keepdim=True)
    mean = (x * kept).sum(dim, keepdim=True) / kept.sum(dim, keepdim=True).clamp_min(1)
    return (x - mean) * kept


@register_loss("dist", label="DIST")
class DISTLoss(DistillationLoss):
    """w CE + tau^2 (beta inter + gamma intra), Pearson distances of softmax(logits / tau).

    Inter-class: over the classes of each sample. Intra-class: over the samples of each class, so
    this loss depends on the batch (with several workers: on each worker's share of it).
    Huang et al. 2022, "Knowledge distillation from a stronger teacher", eq. 8 to 10. The factor
    tau^2 stands in the authors' code, not in their formula: `tau_squared=False` leaves it out.
    """

    def __init__(
        self,
        temperature: Temperature = 4.0,
        ce_weight: Weight = 1.0,
        beta: Weight = 2.0,
        gamma: Weight = 2.0,
        tau_squared: bool = True,
        standardize: Standardize = "none",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(**options)
        self.temperature = temperature
        self.ce_weight = ce_weight
        scale = temperature**2 if tau_squared else 1.0
        self.inter_weight = scale * beta
        self.intra_weight = scale * gamma
        self.standardize = standardize

    def losses(
        self, student: Tensor, teacher: Tensor, labels: Tensor, kept: Tensor | None
    ) -> Tensor:
        """[N, C] student and teacher logits and [N] labels to the losses [N].

        The intra-class part, one number for the batch, is added to each.
        """
        z, t = standardize_pair(student, teacher, self.standardize)
        p = F.softmax(soften(t, self.temperature), 1)
        q = F.softmax(soften(z, self.temperature), 1)
        rows = None if kept is None else kept[:, None].to(q.dtype)
        losses = self.inter_weight * (1 - pearson(q, p, dim=1))
        losses = losses + self.intra_weight * (1 - pearson(q, p, dim=0, kept=rows).mean())
        if self.ce_weight > 0:
            losses = losses + self.ce_weight * F.cross_entropy(student, labels, reduction="none")
        return losses
