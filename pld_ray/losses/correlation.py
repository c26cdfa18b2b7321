"""DIST: the student matches the teacher's relations between classes and between samples."""

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
    """Return the Pearson correlations of `a` and `b` along one dimension.

    Args:
        a: Tensor of any shape.
        b: Tensor of the same shape.
        dim: Dimension along which the correlation is computed.
        kept: 1 for entries along `dim` that count and 0 for the others, broadcast to the shape of
            `a`. None: all count.

    Returns:
        Tensor of the shape of `a` without `dim`. The correlation with a constant is 0.
    """
    a, b = (_centred(x, dim, kept) for x in (a, b))
    norms = [(x * x).sum(dim).clamp_min(1e-24).sqrt() for x in (a, b)]  # sqrt has no gradient at 0
    return (a * b).sum(dim) / (norms[0] * norms[1] + 1e-8)


def _centred(x: Tensor, dim: int, kept: Tensor | None) -> Tensor:
    """Subtract the mean along `dim` and set entries that are not kept to 0."""
    if kept is None:
        return x - x.mean(dim, keepdim=True)
    mean = (x * kept).sum(dim, keepdim=True) / kept.sum(dim, keepdim=True).clamp_min(1)
    return (x - mean) * kept


@register_loss("dist", label="DIST")
class DISTLoss(DistillationLoss):
    """DIST (Huang et al. 2022, "Knowledge distillation from a stronger teacher", eq. 8 to 10).

        loss = ce_weight CE + tau^2 (beta inter + gamma intra)

    The terms inter and intra are Pearson distances, 1 - correlation, between softmax(student / tau)
    and softmax(teacher / tau). The inter-class term compares the classes of each sample. The
    intra-class term compares the samples of each class, so the loss depends on the batch. With
    several workers, it depends on each worker's share of the batch.

    Args:
        temperature: Temperature tau of both distributions, above 0. Default: 4.
        ce_weight: Weight of the cross-entropy with the labels, at least 0. Default: 1.
        beta: Weight of the inter-class term, at least 0. Default: 2.
        gamma: Weight of the intra-class term, at least 0. Default: 2.
        tau_squared: Whether to multiply both terms by tau^2. The factor is in the authors' code,
            but not in their formula. Default: True.
        standardize: Which logits are z-scored first: "none", "both" or "teacher". Cross-entropy
            uses the original student logits. Default: "none".
        **options: `ignore_index` and `reduction`, see `DistillationLoss`.

    Example:
        loss = DISTLoss(temperature=4.0)
        loss(student_logits, teacher_logits, labels)
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
        """Return the losses [N]; see `DistillationLoss.losses`.

        The intra-class term is one number for the batch. It is added to the loss of every sample.
        """
        z, t = standardize_pair(student, teacher, self.standardize)
        p = F.softmax(soften(t, self.temperature), 1)
        q = F.softmax(soften(z, self.temperature), 1)
        rows = None if kept is None else kept[:, None].to(q.dtype)
        losses = self.inter_weight * (1 - pearson(q, p, dim=1))
        losses = losses + self.intra_weight * (1 - pearson(q, p, dim=0, kept=rows).mean())
        return self.add_cross_entropy(losses, student, labels)
