"""Plackett-Luce losses: the likelihood of one ranking of the classes per example.

The ranking pi* puts the label first, then the other classes by descending teacher logit. Under the
Plackett-Luce model with utilities s (the student's logits) its step k costs

    logsumexp over l >= k of s[pi*_l]  -  s[pi*_k]

and a loss is the weighted sum of the C steps (arXiv 2506.12542, section 4). The losses here differ
in their weights alone: PLD takes the teacher's probabilities, ListMLE equal ones, P-ListMLE a
fixed decreasing sequence. All weights sum to 1; weights (1, 0, ..., 0) are cross-entropy.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pld_ray.losses.common import check_inputs, check_params, standardize_pair


def teacher_ranking(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """[B, C] teacher logits and [B] labels to pi*: [B, C] class indices, the best first.

    Ties keep the lower class first, so that the ranking is a function of its arguments alone.
    """
    label_first = teacher_logits.scatter(1, labels[:, None], float("inf"))
    return label_first.argsort(dim=1, descending=True, stable=True)


def plackett_luce_loss(student_logits: Tensor, ranking: Tensor, weights: Tensor) -> Tensor:
    """Weighted negative log-likelihood of `ranking`, averaged over the batch.

    student_logits [B, C]; ranking [B, C] class indices; weights [B, C] or [C], weights[..., k]
    belongs to step k of the ranking.
    """
    ranked = student_logits.gather(1, ranking)
    tails = ranked.flip(1).logcumsumexp(1).flip(1)  # [B, C], over the steps l >= k
    return (weights * (tails - ranked)).sum(1).mean()


class PLDLoss(nn.Module):
    """Plackett-Luce distillation: step k weighted by softmax(teacher / tau)[pi*_k].

    arXiv 2506.12542, eq. 7. It needs neither a cross-entropy term nor a mixing weight; the
    temperature softens the weights alone. The paper uses tau 1 on ImageNet and 4 on CIFAR-100.
    """

    def __init__(self, temperature: float = 1.0, standardize: str = "none") -> None:
        super().__init__()
        check_params("pld", temperature=temperature, standardize=standardize)
        self.temperature = temperature
        self.standardize = standardize

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """[B, C] student and teacher logits and [B] labels to a scalar."""
        check_inputs(student_logits, teacher_logits, labels)
        student, teacher = standardize_pair(student_logits, teacher_logits, self.standardize)
        ranking = teacher_ranking(teacher, labels)
        weights = F.softmax(teacher / self.temperature, -1).gather(1, ranking)
        return plackett_luce_loss(student, ranking, weights)


class ListMLELoss(nn.Module):
    """Equal weights 1/C: ListMLE (Xia et al. 2008) divided by the number of classes."""

    name = "listmle"

    def __init__(self, standardize: str = "none") -> None:
        super().__init__()
        check_params(self.name, standardize=standardize)
        self.standardize = standardize

    def weights(self, classes: int, like: Tensor) -> Tensor:
        """The C weights of the steps, of the type and device of `like`."""
        return torch.full((classes,), 1 / classes, dtype=like.dtype, device=like.device)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """[B, C] student and teacher logits and [B] labels to a scalar."""
        check_inputs(student_logits, teacher_logits, labels)
        student, teacher = standardize_pair(student_logits, teacher_logits, self.standardize)
        weights = self.weights(student.shape[1], like=student)
        return plackett_luce_loss(student, teacher_ranking(teacher, labels), weights)


class PListMLELoss(ListMLELoss):
    """Weights proportional to 2^(C-k) - 1, k = 1 .. C: position-aware ListMLE (Lan et al. 2014).

    Normalised to sum 1, which also keeps them from overflowing: 2^(C-k) - 1 is first divided by
    2^(C-1). The paper's text gives its own row weights equal to PLD's; this is the sequence of
    the method it names.
    """

    name = "plistmle"

    def weights(self, classes: int, like: Tensor) -> Tensor:
        """The C weights of the steps, of the type and device of `like`."""
        step = torch.arange(1, classes + 1, dtype=torch.float64, device=like.device)
        weights = torch.exp2(1 - step) - 2.0 ** (1 - classes)
        # with one class 2^0 - 1 = 0: nothing is ranked and the loss is 0
        return (weights / weights.sum().clamp_min(1e-300)).to(like.dtype)
