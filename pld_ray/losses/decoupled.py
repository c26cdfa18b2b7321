"""DKD and NKD: the label and the other classes are distilled by separate terms."""

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
    """Decoupled knowledge distillation (Zhao et al. 2022, eq. 7).

        loss = ce_weight CE + warmup tau^2 (alpha TCKD + beta NCKD)

    TCKD is KL(teacher || student) of the two-way distributions (label, rest). NCKD is the same
    divergence of the softmax over the classes other than the label. Both use logits / tau. The
    factor warmup is min((epoch + 1) / W, 1) with W = `warmup_epochs`, and 1 if W is 0.

    Args:
        temperature: Temperature tau of both distributions, above 0. Default: 4.
        ce_weight: Weight of the cross-entropy with the labels, at least 0. Default: 1.
        alpha: Weight of TCKD, at least 0. Default: 1.
        beta: Weight of NCKD, at least 0. Default: 8.
        warmup_epochs: Epochs W over which the weight of the distillation terms rises to 1, at
            least 0. `set_epoch` sets the current epoch. The authors' code uses 20. Default: 0.
        standardize: Which logits are z-scored first: "none", "both" or "teacher". Cross-entropy
            uses the original student logits. Default: "none".
        **options: `ignore_index` and `reduction`, see `DistillationLoss`.

    Example:
        loss = DKDLoss(beta=8.0, warmup_epochs=20)
        loss.set_epoch(epoch)  # at the start of every epoch
        loss(student_logits, teacher_logits, labels)
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
        """Set the current epoch, counted from 0, for the warm-up."""
        self.warmup = min((epoch + 1) / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0

    def losses(
        self, student: Tensor, teacher: Tensor, labels: Tensor, kept: Tensor | None
    ) -> Tensor:
        """Return the losses [N]; see `DistillationLoss.losses`."""
        z, t = standardize_pair(student, teacher, self.standardize)
        target_p, others_p = _split(soften(t, self.temperature), labels)
        target_q, others_q = _split(soften(z, self.temperature), labels)
        distance = self.alpha * kl_divergence(target_p, target_q)
        distance = distance + self.beta * kl_divergence(others_p, others_q)
        losses = self.warmup * self.temperature**2 * distance
        return self.add_cross_entropy(losses, student, labels)


@register_loss("nkd", label="NKD")
class NKDLoss(DistillationLoss):
    """Normalized knowledge distillation (Yang et al. 2023, ICCV, section 3).

        loss = ce_weight CE - p_y log q_y - gamma tau^2 sum over i != y of p'_i log q'_i

    Here y is the label, and p and q are the softmax of the teacher's and the student's logits, at
    temperature 1. p' and q' are the softmax of logits / tau over the classes other than the label,
    so both have the sum 1. The last term is the NCKD of DKD plus the entropy of p', which is
    constant. It is 0 for samples whose teacher gives -inf to all other classes.

    The authors' code (yzd-v/cls_KD) differs in two places. For soft labels, such as those of Mixup,
    it uses the most probable class alone; here the loss is the mean with both labels. Some of its
    versions keep the label in p' and q', which its authors call a mistake (its issue 16).

    Args:
        temperature: Temperature tau of p' and q', above 0. The paper uses 1 on ImageNet; the
            authors' configuration for CIFAR-100 has 3. Default: 1.
        ce_weight: Weight of the cross-entropy with the labels, at least 0. Default: 1.
        gamma: Weight of the term of the other classes, at least 0. The paper uses 1.5 on ImageNet;
            the authors' configuration for CIFAR-100 has 3.5. Default: 1.5.
        **options: `ignore_index` and `reduction`, see `DistillationLoss`.

    Example:
        loss = NKDLoss(temperature=3.0, gamma=3.5)
        loss(student_logits, teacher_logits, labels)
    """

    def __init__(
        self,
        temperature: Temperature = 1.0,
        ce_weight: Weight = 1.0,
        gamma: Weight = 1.5,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(**options)
        self.temperature = temperature
        self.ce_weight = ce_weight
        self.gamma = gamma

    def losses(
        self, student: Tensor, teacher: Tensor, labels: Tensor, kept: Tensor | None
    ) -> Tensor:
        """Return the losses [N]; see `DistillationLoss.losses`."""
        p_label = F.softmax(teacher, 1).gather(1, labels[:, None])[:, 0]
        _, others_p = _split(soften(teacher, self.temperature), labels)
        _, others_q = _split(soften(student, self.temperature), labels)
        cross_entropy = F.cross_entropy(student, labels, reduction="none")
        others = -(others_p.exp() * others_q).sum(1)
        losses = p_label * cross_entropy + self.gamma * self.temperature**2 * others
        return self.add_cross_entropy(losses, student, labels, cross_entropy)


def _split(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of (label, rest) [N, 2], and of the other classes [N, C].

    The second tensor also has a column for the label: its probability is 0 and its logarithm is
    finite. All its probabilities are 0 if the logits of all other classes are -inf.
    """
    index = labels[:, None]
    lowest = torch.finfo(logits.dtype).min
    others = logits.scatter(1, index, lowest / 4)
    rest = others.logsumexp(1, keepdim=True).clamp_min(lowest / 8)
    return F.log_softmax(torch.cat([logits.gather(1, index), rest], 1), 1), others - rest
