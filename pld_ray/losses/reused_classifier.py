"""SimKD: the student learns the teacher's last feature map, and predicts by its classifier."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pld_ray.losses.feature_loss import FeatureLoss, Features, same_size
from pld_ray.losses.parameters import Weight
from pld_ray.losses.registry import register_loss


@register_loss("simkd", label="SimKD", takes="features")
class SimKDLoss(FeatureLoss):
    """Distillation with the reused teacher classifier, SimKD (Chen et al. 2022, CVPR, eq. 2).

        loss = ce_weight CE + weight * mean (p(s) - t)^2

    s and t are the last feature maps of student and teacher. The larger one is average-pooled to
    the size of the smaller one. The projector p is learnt: convolutions of 1x1, 3x3 and 1x1 pixels,
    each with batch normalisation and a ReLU. The student has no classifier of its own: it predicts
    by p, average pooling and the frozen classifier of the teacher, in training and afterwards. So
    p and this classifier are part of the trained student, its weights and its parameters.

    Both networks must end with average pooling and a linear layer. Outside of trials,
    `reuse_classifier` makes such a student.

    Args:
        factor: The projector has the channels of the teacher's map divided by this, at least 1. The
            paper also reports 4 and 8. Default: 2.
        weight: Weight of the distance, at least 0. Default: 1.
        ce_weight: Weight of the cross-entropy with the labels, at least 0. Default: 0.
    """

    student_further = teacher_further = frozenset({"last"})
    reuses_classifier = True

    def __init__(
        self,
        factor: Annotated[int, Field(ge=1)] = 2,
        weight: Weight = 1.0,
        ce_weight: Weight = 0.0,
    ) -> None:
        super().__init__(ce_weight)
        self.factor = factor
        self.weight = weight

    def distance(self, student: Features, teacher: Features) -> Tensor:
        """Return the weighted distance; see `FeatureLoss.distance`."""
        maps = (of.further["last"][0] for of in (student, teacher))
        return self.weight * F.mse_loss(*same_size(*maps))
