"""KD and CTKD: a divergence between softened distributions plus cross-entropy."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Unpack

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pld_ray.losses.common import (
    DistillationLoss,
    Options,
    soften,
    standardize_pair,
)
from pld_ray.losses.parameters import Standardize, Temperature, Weight
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


@register_loss("ctkd", label="CTKD")
class CTKDLoss(DistillationLoss):
    """Curriculum temperature, CTKD (Li et al. 2023, AAAI), with one temperature for all samples.

        loss = ce_weight CE + beta tau^2 KL(p, q)        tau = lowest + span sigmoid(a)

    Here p = softmax(teacher / tau) and q = softmax(student / tau). The scalar a is learnt with the
    student, by the same optimizer and with its weight decay, as in the authors' code. It starts at
    1. Its gradient is multiplied by

        lambda = (cos(pi min(e, E) / E) - 1) / 2

    where e is the epoch, counted from 1, and E is `curriculum_epochs`. So lambda falls from 0 to
    -1: the temperature learns, more and more, to make the loss larger. The paper also has a variant
    with a temperature for each sample, which is not here.

    Args:
        ce_weight: Weight of the cross-entropy with the labels, at least 0. The authors use 0.1 on
            CIFAR-100 and 1 on ImageNet. Default: 0.1.
        beta: Weight of the divergence, at least 0. The authors use 0.9 on CIFAR-100 and 1 on
            ImageNet. Default: 0.9.
        lowest: Lower bound of tau, above 0. Default: 1.
        span: Upper bound of tau minus the lower one, at least 0. Default: 20.
        curriculum_epochs: Epochs E until the gradient is fully reversed, at least 1. `set_epoch`
            sets the current epoch. The authors use 10 on CIFAR-100 and 5 on ImageNet. Default: 10.
        **options: `ignore_index` and `reduction`, see `DistillationLoss`.

    Attributes:
        a: The learnt scalar.

    Example:
        loss = CTKDLoss()
        optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=0.05)
        loss.set_epoch(epoch)  # at the start of every epoch
        loss(student_logits, teacher_logits, labels)
    """

    def __init__(
        self,
        ce_weight: Weight = 0.1,
        beta: Weight = 0.9,
        lowest: Temperature = 1.0,
        span: Weight = 20.0,
        curriculum_epochs: Annotated[int, Field(ge=1)] = 10,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(**options)
        self.ce_weight = ce_weight
        self.beta = beta
        self.lowest = lowest
        self.span = span
        self.curriculum_epochs = curriculum_epochs
        self.a = nn.Parameter(torch.ones(()))
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Set the current epoch, counted from 0, for the reversal of the gradient."""
        progress = min(epoch + 1, self.curriculum_epochs) / self.curriculum_epochs
        self.reversal = (math.cos(math.pi * progress) - 1) / 2

    def temperature(self) -> Tensor:
        """Return the temperature tau, a scalar."""
        return self.lowest + self.span * torch.sigmoid(self.a)

    def learnt(self) -> dict[str, float]:
        """Return the temperature, which epochs report; see `LossOfTerms.learnt`."""
        return {"temperature": self.temperature().item()}

    def losses(
        self, student: Tensor, teacher: Tensor, labels: Tensor, kept: Tensor | None
    ) -> Tensor:
        """Return the losses [N]; see `DistillationLoss.losses`."""
        tau = self.temperature()
        constant = tau.detach()
        tau = constant + self.reversal * (tau - constant)  # the value of tau, the gradient reversed
        log_p = F.log_softmax(teacher / tau, 1)
        log_q = F.log_softmax(student / tau, 1)
        losses = self.beta * tau**2 * kl_divergence(log_p, log_q)
        return self.add_cross_entropy(losses, student, labels)
