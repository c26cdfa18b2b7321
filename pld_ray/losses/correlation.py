"""DIST: the student keeps the teacher's relations, not its probabilities."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from pld_ray.losses.common import check_inputs, check_params, standardize_pair


def pearson_distance(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """1 - the mean Pearson correlation of `a` and `b` along `dim`."""
    a = a - a.mean(dim, keepdim=True)
    b = b - b.mean(dim, keepdim=True)
    correlation = (a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=dim) + 1e-8)
    return 1 - correlation.mean()


class DISTLoss(nn.Module):
    """w CE + tau^2 (beta inter + gamma intra), Pearson distances of softmax(logits / tau).

    Inter-class: over the classes of each sample. Intra-class: over the samples of each class, so
    this loss depends on the batch (with several workers: on each worker's share of it).
    Huang et al. 2022, "Knowledge distillation from a stronger teacher", eq. 8 to 10. The factor
    tau^2 stands in the authors' code, not in their formula: `tau_squared=False` leaves it out.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        ce_weight: float = 1.0,
        beta: float = 2.0,
        gamma: float = 2.0,
        tau_squared: bool = True,
        standardize: str = "none",
    ) -> None:
        super().__init__()
        check_params(
            "dist",
            temperature=temperature,
            ce_weight=ce_weight,
            beta=beta,
            gamma=gamma,
            tau_squared=tau_squared,
            standardize=standardize,
        )
        self.temperature = temperature
        self.ce_weight = ce_weight
        scale = temperature**2 if tau_squared else 1.0
        self.inter_weight = scale * beta
        self.intra_weight = scale * gamma
        self.standardize = standardize

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """[B, C] student and teacher logits and [B] labels to a scalar."""
        check_inputs(student_logits, teacher_logits, labels)
        student, teacher = standardize_pair(student_logits, teacher_logits, self.standardize)
        p = F.softmax(teacher / self.temperature, -1)
        q = F.softmax(student / self.temperature, -1)
        loss = self.inter_weight * pearson_distance(q, p, dim=1)
        loss = loss + self.intra_weight * pearson_distance(q, p, dim=0)
        if self.ce_weight > 0:
            loss = loss + self.ce_weight * F.cross_entropy(student_logits, labels)
        return loss
