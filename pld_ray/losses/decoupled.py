"""DKD: the KD divergence split into its target-class and non-target-class parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pld_ray.losses.common import check_inputs, check_params, standardize_pair
from pld_ray.losses.divergence import kl_divergence


class DKDLoss(nn.Module):
    """w CE + tau^2 (alpha TCKD + beta NCKD); Zhao et al. 2022, eq. 7.

    TCKD: KL of the two-way distributions (label, rest). NCKD: KL of the softmax over the classes
    other than the label. With `warmup_epochs` W the distilled part is multiplied by
    min((epoch + 1) / W, 1), the epoch as last told to `set_epoch` (authors' code: W = 20).
    """

    def __init__(
        self,
        temperature: float = 4.0,
        ce_weight: float = 1.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        warmup_epochs: int = 0,
        standardize: str = "none",
    ) -> None:
        super().__init__()
        check_params(
            "dkd",
            temperature=temperature,
            ce_weight=ce_weight,
            alpha=alpha,
            beta=beta,
            warmup_epochs=warmup_epochs,
            standardize=standardize,
        )
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

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """[B, C] student and teacher logits and [B] labels to a scalar."""
        check_inputs(student_logits, teacher_logits, labels)
        student, teacher = standardize_pair(student_logits, teacher_logits, self.standardize)
        target_p, others_p = _split(teacher / self.temperature, labels)
        target_q, others_q = _split(student / self.temperature, labels)
        distance = self.alpha * kl_divergence(target_p, target_q)
        distance = distance + self.beta * kl_divergence(others_p, others_q)
        loss = self.warmup * self.temperature**2 * distance
        if self.ce_weight > 0:
            loss = loss + self.ce_weight * F.cross_entropy(student_logits, labels)
        return loss


def _split(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (label, rest) [B, 2], and of the C - 1 other classes [B, C - 1]."""
    classes = logits.shape[1]
    index = labels[:, None]
    rank = torch.arange(classes - 1, device=logits.device)
    others = logits.gather(1, rank + (rank >= index))  # the label's column skipped
    two_way = torch.cat([logits.gather(1, index), others.logsumexp(1, keepdim=True)], 1)
    return F.log_softmax(two_way, 1), F.log_softmax(others, 1)
