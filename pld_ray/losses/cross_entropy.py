"""Cross-entropy with the labels, with and without label smoothing: the students without teacher."""

from __future__ import annotations

from typing import Annotated, Unpack

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pld_ray.losses.common import DistillationLoss, Options
from pld_ray.losses.registry import register_loss


@register_loss("ce", label="CE", takes="nothing")
class CELoss(DistillationLoss):
    """-log softmax(student)[label]; the teacher is not looked at and may be None."""

    smoothing = 0.0

    def losses(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor, kept: Tensor | None
    ) -> Tensor:
        """[N, C] student logits and [N] labels to the losses [N]."""
        return F.cross_entropy(student, labels, reduction="none", label_smoothing=self.smoothing)


@register_loss("ls", label="LS", takes="nothing")
class LabelSmoothingLoss(CELoss):
    """Cross-entropy with (1 - smoothing) on the label and smoothing / C on every class.

    Szegedy et al. 2016; the paper's LS row uses 0.1.
    """

    def __init__(
        self, smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1, **options: Unpack[Options]
    ) -> None:
        super().__init__(**options)
        self.smoothing = smoothing
