"""Cross-entropy with the labels, with and without label smoothing, for training without teacher."""

from __future__ import annotations

from typing import Annotated, Unpack

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pld_ray.losses.common import DistillationLoss, Options
from pld_ray.losses.registry import register_loss


@register_loss("ce", label="CE", takes="nothing")
class CELoss(DistillationLoss):
    """Cross-entropy with the labels.

        loss = -log softmax(student)[label]

    The teacher logits are not used and may be None.

    Args:
        **options: `ignore_index` and `reduction`, see `DistillationLoss`.

    Example:
        CELoss()(student_logits, None, labels)
    """

    smoothing = 0.0

    def losses(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor, kept: Tensor | None
    ) -> Tensor:
        """Return the losses [N]; see `DistillationLoss.losses`."""
        return F.cross_entropy(student, labels, reduction="none", label_smoothing=self.smoothing)


@register_loss("ls", label="LS", takes="nothing")
class LabelSmoothingLoss(CELoss):
    """Cross-entropy with smoothed labels (Szegedy et al. 2016).

    The target distribution is (1 - smoothing) on the label plus smoothing / C on every class.
    The teacher logits are not used and may be None.

    Args:
        smoothing: Probability that is spread over all classes, in [0, 1). The paper's LS row uses
            0.1. Default: 0.1.
        **options: `ignore_index` and `reduction`, see `DistillationLoss`.

    Example:
        LabelSmoothingLoss(smoothing=0.1)(student_logits, None, labels)
    """

    def __init__(
        self, smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1, **options: Unpack[Options]
    ) -> None:
        super().__init__(**options)
        self.smoothing = smoothing
