"""SRRL: the teacher's own classifier judges the student's features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pld_ray.losses.divergence import kl_divergence
from pld_ray.losses.feature_loss import FeatureLoss, Features, TeacherLayers
from pld_ray.losses.parameters import Temperature, Weight
from pld_ray.losses.registry import register_loss


@register_loss("srrl", label="SRRL", takes="features")
class SRRLLoss(FeatureLoss):
    """Softmax regression representation learning, SRRL (Yang et al. 2021, ICLR).

        loss = ce_weight CE + weight [mean (g - e_t)^2 + mean (W g + b - z_t)^2]
               + kd_weight tau^2 KL(p || q)

    e_s and e_t are the pooled features of student and teacher. g = ReLU(BN(A e_s)) is learnt, with
    as many numbers as e_t. W and b are the teacher's last linear layer, which stays as it is, and
    z_t = W e_t + b are the teacher's logits. p and q are the softmax of z_t / tau and of the
    student's logits / tau.

    The first two terms are those of the paper. The last one is that of the SimKD repository, whose
    settings are the defaults; the paper has none.

    Args:
        weight: Weight of the two distances, at least 0. Default: 1.
        ce_weight: Weight of the cross-entropy with the labels, at least 0. Default: 1.
        kd_weight: Weight of the divergence, at least 0. Default: 1.
        temperature: Temperature tau of the divergence, above 0. Default: 4.
    """

    classifier_weight: Tensor
    classifier_bias: Tensor

    def __init__(
        self,
        weight: Weight = 1.0,
        ce_weight: Weight = 1.0,
        kd_weight: Weight = 1.0,
        temperature: Temperature = 4.0,
    ) -> None:
        super().__init__(ce_weight)
        self.weight = weight
        self.kd_weight = kd_weight
        self.temperature = temperature
        self.transfer: nn.Module = nn.Identity()

    def borrow(self, teacher: TeacherLayers) -> None:
        """Copy the teacher's last linear layer; see `FeatureLoss.borrow`."""
        last = teacher.classifier
        if not isinstance(last, nn.Linear):
            raise ValueError(
                f"srrl: the last layer of {teacher.network} is a {type(last).__name__}: expected a "
                "teacher whose last layer is a torch.nn.Linear"
            )
        self.constant("classifier_weight", last.weight)
        bias = torch.zeros_like(last.weight[:, 0]) if last.bias is None else last.bias
        self.constant("classifier_bias", bias)

    def connect(self, student: Features, teacher: Features) -> None:
        """Create the layer between the features; see `FeatureLoss.connect`."""
        width = teacher.pooled.shape[1]
        linear = nn.Linear(student.pooled.shape[1], width, bias=False)
        self.transfer = nn.Sequential(linear, nn.BatchNorm1d(width), nn.ReLU())

    def distance(self, student: Features, teacher: Features) -> Tensor:
        """Return the weighted distance; see `FeatureLoss.distance`."""
        moved = self.transfer(student.pooled)
        logits = F.mse_loss(self._classified(moved), self._classified(teacher.pooled))
        return self.weight * (F.mse_loss(moved, teacher.pooled) + logits)

    def logit_distance(self, student_logits: Tensor, teacher: Features) -> Tensor | None:
        """Return the weighted divergence; see `FeatureLoss.logit_distance`."""
        if self.kd_weight == 0:
            return None
        log_p, log_q = (
            F.log_softmax(logits / self.temperature, 1)
            for logits in (self._classified(teacher.pooled), student_logits)
        )
        return self.kd_weight * self.temperature**2 * kl_divergence(log_p, log_q).mean()

    def _classified(self, pooled: Tensor) -> Tensor:
        """Return the logits [B, C] that the teacher's last layer makes of features [B, width]."""
        return F.linear(pooled, self.classifier_weight, self.classifier_bias)
