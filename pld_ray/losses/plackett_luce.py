"""Plackett-Luce losses: the likelihood of one ranking of the classes per sample.

The ranking pi* puts the label first, then the other classes by descending teacher logit. Under the
Plackett-Luce model with utilities s (the student's logits) its step k costs

    logsumexp over l >= k of s[pi*_l]  -  s[pi*_k]

and a loss is the weighted sum of the C steps (arXiv 2506.12542). The losses here differ in their
weights alone: PLD takes the teacher's probabilities, ListMLE equal ones, P-ListMLE a fixed
decreasing sequence. All weights sum to 1; weights (1, 0, ..., 0) are cross-entropy.
The order of the classes is in `order`, the likelihood and its gradient in `likelihood`.
"""

from __future__ import annotations

import itertools
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Literal, Unpack

import torch
from pydantic import Field
from torch import Tensor

from pld_ray.losses.common import (
    DistillationLoss,
    Options,
    standardize_pair,
    transformed,
)
from pld_ray.losses.likelihood import ranking_loss
from pld_ray.losses.order import Ranking, rank_all, rank_in_order
from pld_ray.losses.parameters import Standardize, Temperature, TopK
from pld_ray.losses.registry import register_loss

FLAT = 0.9  # of log C: the teacher's entropy above which its ranking says little (paper, section 6)
FEWEST = 64  # ranked classes that top_k="auto" starts from


class RankingLoss(DistillationLoss):
    """What the losses of this file share; a child says how it weighs the steps of a ranking."""

    def __init__(self, standardize: str, **options: Unpack[Options]) -> None:
        super().__init__(**options)
        self.standardize = standardize

    def rank(self, teacher: Tensor, labels: Tensor, order: Tensor | None) -> Ranking:
        """The ranking by teacher logits [N, C], or by their order [N, K] if it is known."""
        if order is None:
            return rank_all(teacher, labels)
        return rank_in_order(self._columns(order, teacher.shape[1]), labels, teacher.shape[1])

    def _columns(self, order: Tensor, needed: int) -> Tensor:
        if order.shape[1] < needed:
            raise ValueError(f"order: expected {needed} classes, got {order.shape[1]}")
        return order[:, :needed]

    @abstractmethod
    def weigh(self, teacher: Tensor, labels: Tensor, ranking: Ranking) -> Tensor:
        """The weights of the steps [N, M], 0 where a label is passed over."""

    def weigh_samples(self, teacher: Tensor) -> Tensor | None:
        """Each sample's own weight [N] by the teacher's logits [N, C]; None: all the same."""
        return None

    def losses(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        kept: Tensor | None,
        order: Tensor | None = None,
        mean: bool = False,
    ) -> Tensor:
        """[N, C], [N, C], [N] and the order [N, K], where it is known, to losses [N] or a mean."""
        student, teacher = standardize_pair(student, teacher, self.standardize)
        return ranking_loss(student, teacher, labels, order, self, mean)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor,
        *,
        sample_weight: Tensor | None = None,
        order: Tensor | None = None,
    ) -> Tensor:
        """As every loss; `order`: integers [..., C], as `teacher_order(teacher_logits)` gives.

        With an order nothing is sorted. It is trusted: whether it is a permutation, and the
        teacher's, is not looked at. A loss with `top_k` uses the first top_k columns.
        """
        student, teacher, rows, kept = self._rows(student_logits, teacher_logits, labels)
        if order is not None:
            if order.shape[:-1] != labels.shape or order.is_floating_point():
                raise ValueError(
                    f"order: expected integers of shape {[*labels.shape, student.shape[1]]}, "
                    f"got {order.dtype} of shape {list(order.shape)}"
                )
            order = order.reshape(-1, order.shape[-1])
        adaptive = self.weigh_samples(teacher)
        if adaptive is not None:
            adaptive = adaptive.reshape(labels.shape)
            sample_weight = adaptive if sample_weight is None else adaptive * sample_weight
        if self.reduction == "mean" and kept is None and sample_weight is None:
            return self.losses(student, teacher, rows, kept, order, mean=True)
        losses = self.losses(student, teacher, rows, kept, order)
        return self._reduced(losses, kept, sample_weight, labels)


@register_loss("pld", label="PLD", takes="order")
class PLDLoss(RankingLoss):
    """Plackett-Luce distillation: step k weighted by alpha_k = softmax(teacher / tau)[pi*_k].

    arXiv 2506.12542. It needs neither a cross-entropy term nor a mixing weight; the temperature
    softens the weights alone. The paper uses tau 1 on ImageNet and 4 on CIFAR-100.

    **Many classes.** With `top_k` K the label and the teacher's K best classes are ranked and the
    others are one unordered tail: the steps of the ranked classes are exact, tail in their
    denominators and all; the tail's own steps are left out. With eps the teacher's probability of
    the tail's n classes, and s the student's logits on them,

        0 <= full loss - top-K loss <= eps (log n + max s - min s)
        1-norm of the difference of the gradients <= 2 eps

    for a step k of the tail costs logsumexp over l >= k of s_l - s_k, which is at least 0 and at
    most log n + max s - min s; its gradient is softmax minus one-hot, of 1-norm at most 2; and the
    weights of these steps sum to eps. With "auto" each sample keeps its steps until eps is under
    `tolerance`: a sample's loss does not depend on the batch it is in.

    **Adaptive weights** (an open direction of the paper): samples count by how much the teacher's
    ranking says, with q = softmax(teacher / tau): "entropy" 1 - H(q) / log C, or "margin", the
    difference of the two largest q. The mean is then the weighted one.

    Warns once when the teacher's mean entropy is above 0.9 log C, where the paper expects little
    of PLD (section 6). It is looked at in calls 1, 2, 4, 8, ... only, so that it costs nothing.
    """

    def __init__(
        self,
        temperature: Temperature = 1.0,
        standardize: Standardize = "none",
        top_k: TopK = None,
        tolerance: Annotated[float, Field(gt=0, lt=1)] = 1e-3,
        adaptive: Literal["none", "entropy", "margin"] = "none",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(standardize, **options)
        self.temperature = temperature
        self.top_k = top_k
        self.tolerance = tolerance
        self.adaptive = adaptive
        self._calls = itertools.count(1)

    def _probabilities(self, teacher: Tensor) -> Tensor:
        if self.temperature != 1:  # the maximum first: dividing rounds large logits
            teacher = (teacher - teacher.amax(1, keepdim=True)).div_(self.temperature)
        return teacher.softmax(1)

    def rank(self, teacher: Tensor, labels: Tensor, order: Tensor | None) -> Ranking:
        """The ranking, of as many classes as `top_k` says."""
        classes, chosen = teacher.shape[1], None

        def best(k: int) -> Tensor:
            return teacher.topk(k, 1).indices if order is None else self._columns(order, k).long()

        if self.top_k == "auto":
            chosen = None if transformed() else self._enough(teacher, best)
        elif self.top_k is not None and int(self.top_k) < classes:
            chosen = best(int(self.top_k))
        if chosen is None:
            return super().rank(teacher, labels, order)
        return rank_in_order(chosen, labels, classes)

    def _enough(self, teacher: Tensor, best: Callable[[int], Tensor]) -> Tensor | None:
        """The 64, 256, ... best classes that leave less than `tolerance` out; None: take them all.

        Many of them cost more to find than sorting all classes does.
        """
        probabilities, k = self._probabilities(teacher), FEWEST
        while 16 * k <= teacher.shape[1]:
            chosen = best(k)
            if (1 - probabilities.gather(1, chosen).sum(1)).max() < self.tolerance:
                return chosen
            k *= 4
        return None

    def weigh(self, teacher: Tensor, labels: Tensor, ranking: Ranking) -> Tensor:
        """The teacher's probabilities, ranked: [N, M]."""
        weights = ranking.take(self._probabilities(teacher), 0.0, overwrite=not transformed())
        if self.top_k == "auto":
            left_out = 1 - weights.cumsum(1)[:, :-1]  # before each step but the label's
            weights[:, 1:] *= left_out >= self.tolerance
        return weights

    def weigh_samples(self, teacher: Tensor) -> Tensor | None:
        """1 - entropy / log C, or the margin, of the teacher's probabilities: [N, C] to [N]."""
        if self.adaptive == "none":
            return None
        _, teacher = standardize_pair(teacher, teacher, self.standardize)
        probabilities = self._probabilities(teacher)
        classes = teacher.shape[1]
        if classes == 1:
            return torch.ones_like(probabilities[:, 0])
        if self.adaptive == "margin":
            best = probabilities.topk(2, dim=1).values
            return best[:, 0] - best[:, 1]
        return (1 - _entropy(probabilities) / math.log(classes)).clamp_min(0)

    def notice(self, teacher: Tensor) -> None:
        """Warn once if the teacher [N, C] is close to uniform."""
        call, classes = next(self._calls), teacher.shape[1]
        if call & (call - 1) or self.notes or classes == 1:
            return
        _, teacher = standardize_pair(teacher, teacher, self.standardize)
        entropy = float(_entropy(self._probabilities(teacher)).mean()) / math.log(classes)
        if entropy > FLAT:
            self.notes.append(
                f"pld: the teacher is close to uniform at temperature {self.temperature:g} (mean "
                f"entropy {entropy:.0%} of log {classes}): its ranking says little there, and PLD "
                "gains less; a lower temperature sharpens its weights"
            )
            warnings.warn(self.notes[-1], stacklevel=2)


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(-1)


class PlackettLuceLoss(RankingLoss):
    """The ranking under weights of one's own: `schedule` gives each step's.

    `schedule` maps the steps 1 .. C (float64 [C]) to weights [C], finite, not negative, not all 0;
    they are normalised to sum 1. It is asked at every call, so that it may change in the course of
    the training. An example: `PlackettLuceLoss(lambda step: 1 / step)`.
    """

    def __init__(
        self,
        schedule: Callable[[Tensor], Tensor],
        standardize: Standardize = "none",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(standardize, **options)
        self.schedule = schedule

    def weigh(self, teacher: Tensor, labels: Tensor, ranking: Ranking) -> Tensor:
        """The schedule's weights for each sample: [N, M]."""
        classes = teacher.shape[1]
        weights = schedule_weights(self.schedule, classes).to(teacher)
        if not ranking.repeated:
            return weights.expand(len(labels), classes)
        # the label took the first step: what the order has before it comes one step later
        again = ranking.index[:, 1:] == labels[:, None]
        step = torch.arange(1, classes + 1, device=labels.device) - again.cumsum(1)
        rows = weights[step.clamp_max(classes - 1)].masked_fill(again, 0)
        return torch.cat([weights[:1].expand(len(rows), 1), rows], 1)


def schedule_weights(schedule: Callable[[Tensor], Tensor], classes: int) -> Tensor:
    """The weights of a schedule, float64 [C] of sum 1. Raises ValueError if they are none."""
    steps = torch.arange(1, classes + 1, dtype=torch.float64)
    weights = schedule(steps).double()
    if weights.shape != steps.shape:
        raise ValueError(
            f"schedule: expected {classes} weights for {classes} steps, got {list(weights.shape)}"
        )
    total, least = weights.sum(), weights.min()
    if not transformed() and not (0 < float(total) < math.inf and float(least) >= 0):
        raise ValueError(
            "schedule: expected finite weights, none negative and not all 0; "
            f"their sum is {total:g} and the least is {least:g}"
        )
    return weights / total


@register_loss("listmle", label="ListMLE", takes="order")
class ListMLELoss(PlackettLuceLoss):
    """Equal weights 1/C: ListMLE (Xia et al. 2008) divided by the number of classes."""

    def __init__(self, standardize: Standardize = "none", **options: Unpack[Options]) -> None:
        super().__init__(torch.ones_like, standardize, **options)


@register_loss("plistmle", label="P-ListMLE", takes="order")
class PListMLELoss(PlackettLuceLoss):
    """Weights proportional to 2^(C-k) - 1, k = 1 .. C: position-aware ListMLE (Lan et al. 2014).

    Normalised to sum 1, which also keeps them from overflowing: 2^(C-k) - 1 is first divided by
    2^(C-1). The paper's text gives its own row weights equal to PLD's; this is the sequence of
    the method it names.
    """

    def __init__(self, standardize: Standardize = "none", **options: Unpack[Options]) -> None:
        super().__init__(position_weights, standardize, **options)


def position_weights(step: Tensor) -> Tensor:
    """P-ListMLE's weights divided by 2^(C-1): of steps 1 .. C (float64 [C]), to [C]."""
    classes = len(step)
    # with one class 2^0 - 1 = 0; nothing is ranked there and any weight gives a loss of 0
    return torch.exp2(1 - step) - 2.0 ** (1 - classes) if classes > 1 else torch.ones_like(step)
