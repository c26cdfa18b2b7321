"""Cross-entropy with the labels, with and without label smoothing: the students without teacher."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.nn import functional as F

from pld_ray.losses.common import DistillationLoss, Options, check_params


class CELoss(DistillationLoss):
    """-log softmax(student)[label]; the teacher is not looked at and may be None."""

    smoothing = 0.0

    def losses(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor, kept: Tensor | None
    ) -> Tensor:
        """[N, C] student logits and [N] labels to the losses [N]."""
        return F.cross_entropy(student, labels, reduction="none", label_smoothing=self.smoothing)


class LabelSmoothingLoss(CELoss):
    """Cross-entropy with (1 - smoothing) on the label and smoothing / C on every class.

    Szegedy et al. 2016; the paper's LS row uses 0.1.
    """

    def __init__(self, smoothing: float = 0.1, **options: Unpack[Options]) -> None:
        super().__init__(**options)
        check_params("ls", smoothing=smoothing)
        self.smoothing = smoothing
