"""Knowledge distillation: a divergence between softened distributions plus cross-entropy."""

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
    """Return KL(p || q) of each row.

    Args:
        log_p: Log-probabilities [N, C]. They may be -inf: 0 log 0 is 0.
        log_q: Log-probabilities [N, C].

    Returns:
        Divergences [N].
    """
    return (log_p.exp() * (log_p.clamp_min(-1e30) - log_q)).sum(1)


@register_loss("kd", label="KD")
class KDLoss(DistillationLoss):
    """Knowledge distillation (Hinton et al. 2015) with a choice of divergences.

        loss = w CE + (1 - w) tau^2 D(p, q)

    Here w is `ce_weight`, p = softmax(teacher / tau) and q = softmax(student / tau).

    Args:
        temperature: Temperature tau of both distributions, above 0. Default: 4.
        ce_weight: Weight w of the cross-entropy with the labels, in [0, 1]. Default: 0.1.
        divergence: "forward_kl" is KL(p || q), as in Hinton et al. 2015. "reverse_kl" is
            KL(q || p). "jensen_shannon" is (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2.
            Table 11 of the paper compares them. Default: "forward_kl".
        standardize: Which logits are z-scored before the divergence: "none", "both" or "teacher".
            Cross-entropy uses the original student logits (Sun et al. 2024). Default: "none".
        **options: `ignore_index` and `reduction`, see `DistillationLoss`.

    Example:
        loss = KDLoss(temperature=4.0, ce_weight=0.1)
        loss(student_logits, teacher_logits, labels)
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
        """Return the losses [N]; see `DistillationLoss.losses`."""
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
        return self.add_cross_entropy(losses, student, labels)
