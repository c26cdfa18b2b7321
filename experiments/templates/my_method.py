"""The loss of the experiment my_method.yaml. Replace the formula by your own."""

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field

from pld_ray import DistillationLoss, register_loss


@register_loss("my_method", label="My method")
class MyLoss(DistillationLoss):
    """Cross-entropy, plus the squared distance of the softened probabilities.

    The typed arguments of the constructor are the parameters in YAML.
    """

    def __init__(
        self,
        temperature: Annotated[float, Field(gt=0)] = 4.0,
        weight: Annotated[float, Field(ge=0)] = 10.0,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = weight

    def losses(self, student, teacher, labels, kept):
        """Return the loss of each sample [N].

        student and teacher are logits [N, C], labels [N]. `kept` [N] is False at samples whose
        label is ignored, or None if there are none; such a sample may have any finite loss.
        """
        s, t = (F.softmax(logits / self.temperature, dim=1) for logits in (student, teacher))
        distance = (s - t).square().sum(1) * self.temperature**2
        return F.cross_entropy(student, labels, reduction="none") + self.weight * distance
