"""Knowledge distillation: a divergence between the softened distributions, mixed with CE."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Unpack

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
from pld_ray.losses.parameters import Standardize, Temperature
from pld_ray.losses.registry import register_loss


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, from log-probabilities [N, C] to [N]; 0 log 0 is 0."""
    return (log_p.exp() * (log_p.clamp_min(-1e30) - log_q)).sum(1)


@register_loss("kd", label="KD")
class KDLoss(DistillationLoss):
    """w CE + (1 - w) tau^2 D, with p = softmax(teacher / tau), q = softmax(student / tau).

    D is KL(p || q) ("forward_kl": Hinton et al. 2015), KL(q || p) ("reverse_kl") or
    (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2 ("jensen_shannon"): paper, Table 11.
    With `standardize` the divergence sees z-scored logits and CE the student's own (Sun et al.).
    """

    def __init__(
        self,
        temperature: Temperature = 4.0,
        ce_weight: Annotated[float, Field(ge=0, le=1)] = 0.1,
        divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = "forward_kl",
        standardize: Standardize = "none",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(**options)
        self.temperature = temperature
        self.ce_weight = ce_weight
        self.divergence = divergence
        self.standardize = standardize

    def losses(
        self, student: Tensor, teacher: Tensor, labels: Tensor, kept: Tensor | None
    ) -> Tensor:
        """[N, C] student and teacher logits and [N] labels to the losses [N]."""
        z, t = standardize_pair(student, teacher, self.standardize)
        log_p = F.log_softmax(soften(t, self.temperature), 1)
        log_q = F.log_softmax(soften(z, self.temperature), 1)
        if self.divergence == "forward_kl":
            distance = kl_divergence(log_p, log_q)
        elif self.divergence == "reverse_kl":
            distance = kl_divergence(log_q, log_p)
        else:
            log_m = torch.logaddexp(log_p, log_q) - math.log(2)
            distance = (kl_divergence(log_p, log_m) + kl_divergence(log_q, log_m)) / 2
        losses = (1 - self.ce_weight) * self.temperature**2 * distance
        if self.ce_weight > 0:
            losses = losses + self.ce_weight * F.cross_entropy(student, labels, reduction="none")
        return losses
