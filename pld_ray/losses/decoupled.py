"""DKD: the KD divergence split into its target-class and non-target-class parts."""

from __future__ import annotations

from typing import Annotated, Unpack

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pld_ray.losses.common import (
    DistillationLoss,
    Options,
    soften,
    standardize_pair,
)
from pld_ray.losses.divergence import kl_divergence
from pld_ray.losses.parameters import Standardize, Temperature, Weight
from pld_ray.losses.registry import register_loss


@register_loss("dkd", label="DKD")
class DKDLoss(DistillationLoss):
    """w CE + tau^2 (alpha TCKD + beta NCKD); Zhao et al. 2022, eq. 7.

    TCKD: KL of the two-way distributions (label, rest). NCKD: KL of the softmax over the classes
    other than the label. With `warmup_epochs` W the distilled part is multiplied by
    min((epoch + 1) / W, 1), the epoch as last told to `set_epoch` (authors' code: W = 20).
    """

    def __init__(
        self,
        temperature: Temperature = 4.0,
        ce_weight: Weight = 1.0,
        alpha: Weight = 1.0,
        beta: Weight = 8.0,
        warmup_epochs: Annotated[int, Field(ge=0)] = 0,
        standardize: Standardize = "none",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(**options)
        self.temperature = temperature
        self.ce_weight = ce_weight
        self.alpha = alpha
        self.beta = beta
        self.warmup_epochs = warmup_epochs
        self.standardize = standardize
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Tell the loss which epoch (from 0) it is in, for its warm-up."""
        self.warmup = min((epoch + 1) / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0

    def losses(
        self, student: Tensor, teacher: Tensor, labels: Tensor, kept: Tensor | None
    ) -> Tensor:
        """[N, C] student and teacher logits and [N] labels to the losses [N]."""
        z, t = standardize_pair(student, teacher, self.standardize)
        target_p, others_p = _split(soften(t, self.temperature), labels)
        target_q, others_q = _split(soften(z, self.temperature), labels)
        distance = self.alpha * kl_divergence(target_p, target_q)
        distance = distance + self.beta * kl_divergence(others_p, others_q)
        losses = self.warmup * self.temperature**2 * distance
        if self.ce_weight > 0:
            losses = losses + self.ce_weight * F.cross_entropy(student, labels, reduction="none")
        return losses


def _split(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (label, rest) [N, 2], and of the other classes [N, C].

    The latter has the label too, with a probability of 0 whose logarithm is finite.
    """
    index = labels[:, None]
    others = logits.scatter(1, index, torch.finfo(logits.dtype).min / 4)
    rest = others.logsumexp(1, keepdim=True)
    return F.log_softmax(torch.cat([logits.gather(1, index), rest], 1), 1), others - rest
