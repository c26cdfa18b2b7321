"""TTM and WTTM: the student, at temperature 1, matches a power of the teacher's probabilities."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.nn import functional as F

from pld_ray.losses.common import DistillationLoss, Options, soften
from pld_ray.losses.divergence import kl_divergence
from pld_ray.losses.parameters import Temperature, Weight
from pld_ray.losses.registry import register_loss


@register_loss("ttm", label="TTM")
class TTMLoss(DistillationLoss):
    """Transformed teacher matching (Zheng and Yang 2024, ICLR, section 3).

        loss = ce_weight CE + beta KL(p^(1/tau) / U || q)

    Here p and q are the softmax of the teacher's and the student's logits, at temperature 1, and U
    is the sum of p^(1/tau) over the classes. The first argument of KL is softmax(teacher / tau). So
    this is KD with a temperature of the teacher only, and without the factor tau^2.

    Args:
        temperature: Temperature tau of the teacher, above 0. The paper calls 1 / tau gamma. The
            authors' example, VGG-13 and VGG-8 on CIFAR-100, has gamma = 0.1. Default: 10.
        ce_weight: Weight of the cross-entropy with the labels, at least 0. Default: 1.
        beta: Weight of the divergence, at least 0. The example has 45. Default: 45.
        **options: `ignore_index` and `reduction`, see `DistillationLoss`.

    Example:
        loss = TTMLoss(temperature=10.0, beta=45.0)
        loss(student_logits, teacher_logits, labels)
    """

    weighted = False

    def __init__(
        self,
        temperature: Temperature = 10.0,
        ce_weight: Weight = 1.0,
        beta: Weight = 45.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(**options)
        self.temperature = temperature
        self.ce_weight = ce_weight
        self.beta = beta

    def losses(
        self, student: Tensor, teacher: Tensor, labels: Tensor, kept: Tensor | None
    ) -> Tensor:
        """Return the losses [N]; see `DistillationLoss.losses`."""
        powers = soften(F.log_softmax(teacher, 1), self.temperature)  # their logarithms, [N, C]
        total = powers.logsumexp(1, keepdim=True)
        losses = self.beta * kl_divergence(powers - total, F.log_softmax(student, 1))
        if self.weighted:
            losses = losses * total[:, 0].exp()
        return self.add_cross_entropy(losses, student, labels)


@register_loss("wttm", label="WTTM")
class WTTMLoss(TTMLoss):
    """Weighted transformed teacher matching (Zheng and Yang 2024, ICLR, section 4).

        loss = ce_weight CE + beta U KL(p^(1/tau) / U || q)

    This is TTM with the weight U of each sample, the sum of p^(1/tau) over the classes. For tau
    above 1, U is between 1, if the teacher is sure of one class, and C^(1 - 1/tau), if it gives
    all C classes the same probability.

    Args:
        temperature: Temperature tau of the teacher, above 0. The paper calls 1 / tau gamma. The
            authors' example, VGG-13 and VGG-8 on CIFAR-100, has gamma = 0.2. Default: 5.
        ce_weight: Weight of the cross-entropy with the labels, at least 0. Default: 1.
        beta: Weight of the divergence, at least 0. The example has 4, with CRD as a further loss.
            Default: 4.
        **options: `ignore_index` and `reduction`, see `DistillationLoss`.

    Example:
        loss = WTTMLoss(temperature=5.0, beta=4.0)
        loss(student_logits, teacher_logits, labels)
    """

    weighted = True

    def __init__(
        self,
        temperature: Temperature = 5.0,
        ce_weight: Weight = 1.0,
        beta: Weight = 4.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(temperature, ce_weight, beta, **options)
