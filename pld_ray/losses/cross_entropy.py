"""Cross-entropy with the labels, with and without label smoothing: the students without teacher."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from pld_ray.losses.common import check_inputs, check_params


class CELoss(nn.Module):
    """-log softmax(student)[label], averaged over the batch."""

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor
    ) -> Tensor:
        """[B, C] student logits and [B] labels to a scalar; the teacher is not looked at."""
        check_inputs(student_logits, None, labels)
        return F.cross_entropy(student_logits, labels)


class LabelSmoothingLoss(nn.Module):
    """Cross-entropy with (1 - smoothing) on the label and smoothing / C on every class.

    Szegedy et al. 2016; the paper's LS row uses 0.1.
    """

    def __init__(self, smoothing: float = 0.1) -> None:
        super().__init__()
        check_params("ls", smoothing=smoothing)
        self.smoothing = smoothing

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor
    ) -> Tensor:
        """[B, C] student logits and [B] labels to a scalar; the teacher is not looked at."""
        check_inputs(student_logits, None, labels)
        return F.cross_entropy(student_logits, labels, label_smoothing=self.smoothing)
