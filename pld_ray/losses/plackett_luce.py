"""Plackett-Luce losses: the weighted likelihood of one ranking of the classes per sample.

The ranking pi* lists the label first, then the other classes by descending teacher logit. Under the
Plackett-Luce model with the student's logits s as utilities, step k of the ranking costs

    logsumexp over l >= k of s[pi*_l]  -  s[pi*_k]

and a loss is the weighted sum of the C steps (arXiv 2506.12542). The losses in this file differ
only in their weights: PLD uses the teacher's probabilities, ListMLE equal weights and P-ListMLE a
fixed decreasing sequence. All weights sum to 1. The weights (1, 0, ..., 0) give cross-entropy.
The module `order` sorts the classes; `likelihood` computes the likelihood and its gradient.
"""

from __future__ import annotations

import itertools
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, Literal, Unpack

import torch
from pydantic import Field
from torch import Tensor

from pld_ray.losses.common import (
    DistillationLoss,
    Options,
    standardize_pair,
    transformed,
)
from pld_ray.losses.likelihood import Weighting, ranking_loss
from pld_ray.losses.order import Ranking
from pld_ray.losses.parameters import Standardize, Temperature, TopK
from pld_ray.losses.registry import register_loss

# Above this fraction of log C, the teacher's entropy is so high that its ranking carries little
# information (paper, section 6).
FLAT = 0.9
FEWEST = 64  # the number of ranked classes that top_k="auto" tries first


class RankingLoss(DistillationLoss):
    """Base class of the ranking losses. A subclass defines the weights of the steps in `weigh`.

    Args:
        standardize: Which logits are z-scored first: "none", "both" or "teacher".
        **options: `ignore_index` and `reduction`, see `DistillationLoss`.
    """

    def __init__(self, standardize: str, **options: Unpack[Options]) -> None:
        super().__init__(**options)
        self.standardize = standardize

    def weighting(self, teacher: Tensor) -> Weighting | None:
        """Return what `weigh` computes in the form that the kernel on CUDA takes, if it has one.

        Args:
            teacher: Teacher logits [N, C].
        """
        return None

    def chosen(self, teacher: Tensor, order: Tensor | None) -> Tensor | None:
        """Return the order of the classes to rank [N, K], or None if all are to be sorted.

        Args:
            teacher: Teacher logits [N, C].
            order: The teacher's order [N, C], or None if it is not known.

        Raises:
            ValueError: The order has too few columns.
        """
        return None if order is None else self.columns(order, teacher.shape[1])

    def columns(self, order: Tensor, needed: int) -> Tensor:
        """Return the first `needed` columns of the order."""
        if order.shape[1] < needed:
            raise ValueError(f"order: expected {needed} classes, got {order.shape[1]}")
        return order[:, :needed]

    @abstractmethod
    def weigh(self, teacher: Tensor, labels: Tensor, ranking: Ranking) -> Tensor:
        """Return the weights of the steps [N, M]; they are 0 where the order repeats the label.

        Args:
            teacher: Teacher logits [N, C].
            labels: Labels [N].
            ranking: The ranking of every sample.
        """

    def weigh_samples(self, teacher: Tensor) -> Tensor | None:
        """Return sample weights [N] from teacher logits [N, C], or None for equal weights."""
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
        """Return the losses [N], or their mean if `mean` is True; see `DistillationLoss.losses`.

        Args:
            student: Student logits [N, C].
            teacher: Teacher logits [N, C].
            labels: Labels [N].
            kept: Not used here.
            order: The teacher's order [N, C], or None if it is not known.
            mean: Whether to return the mean over all samples.
        """
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
        """Compute the loss; see `DistillationLoss.forward`.

        Args:
            student_logits: Student logits [..., C], floating point.
            teacher_logits: Teacher logits [..., C].
            labels: Class indices [...], int64.
            sample_weight: Weights of the samples [...].
            order: The teacher's order, integers [..., C], as `teacher_order(teacher_logits)`
                returns it. The loss then sorts nothing. It does not check that the order is a
                permutation or that it fits the teacher. A loss with `top_k` uses the first top_k
                columns.

        Returns:
            A scalar, or the losses [...] if the reduction is "none".

        Raises:
            ValueError: The shapes or types do not fit, or a label is out of range. Label values
                are checked on the CPU only.
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
    """Plackett-Luce distillation, PLD (arXiv 2506.12542).

        loss    = sum over k of alpha_k (logsumexp over l >= k of s[pi*_l]  -  s[pi*_k])
        alpha_k = softmax(teacher / tau)[pi*_k]

    Here s are the student's logits. The ranking pi* lists the label first, then the other classes
    by descending teacher logit. The loss needs neither a cross-entropy term nor a mixing weight.
    The temperature softens only the weights alpha_k. The paper uses tau = 1 on ImageNet and tau = 4
    on CIFAR-100.

    **Many classes.** With `top_k` = K, the label and the teacher's K best classes are ranked, and
    the other classes form one unordered tail. The steps of the ranked classes are exact: their
    denominators include the tail. The steps of the tail itself are left out. Let eps be the
    teacher's probability of the n classes in the tail, and s the student's logits on them. Then

        0 <= full loss - top-K loss <= eps (log n + max s - min s)
        1-norm of the difference of the gradients <= 2 eps

    because a step k of the tail costs logsumexp over l >= k of s_l - s_k, which is at least 0 and
    at most log n + max s - min s; its gradient is softmax minus one-hot, with a 1-norm of at most
    2; and the weights of these steps sum to eps. With `top_k` = "auto", each sample keeps its
    steps until eps is below `tolerance`. The loss of a sample does not depend on its batch.

    **Adaptive weights** (an open direction of the paper). With `adaptive`, samples are weighted by
    how much information the teacher's ranking carries, and the mean is the weighted mean.

    The loss warns once if the teacher's mean entropy is above 0.9 log C, where the paper expects
    little benefit from PLD (section 6). To save time, it checks the entropy only in calls 1, 2, 3,
    5, 9, ..., and on an accelerator only in the first.

    Args:
        temperature: Temperature tau of the weights alpha_k, above 0. Default: 1.
        standardize: Which logits are z-scored first: "none", "both" or "teacher". Default: "none".
        top_k: The number K of the teacher's classes to rank, at least 1; "auto" to choose it by
            `tolerance`; None to rank all classes. Default: None.
        tolerance: The teacher's probability that top_k="auto" may leave out, in (0, 1).
            Default: 1e-3.
        adaptive: The weight of a sample, with q = softmax(teacher / tau). "entropy" is
            1 - H(q) / log C. "margin" is the difference of the two largest q. "none" weights all
            samples equally. Default: "none".
        **options: `ignore_index` and `reduction`, see `DistillationLoss`.

    Example:
        loss = PLDLoss(temperature=1.0)
        loss(student_logits, teacher_logits, labels)
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
        self._calls = itertools.count()

    def weighting(self, teacher: Tensor) -> Weighting:
        """Return the softmax of the teacher, with the tolerance of top_k="auto"."""
        return Weighting(self.temperature, self.tolerance if self.top_k == "auto" else None)

    def _probabilities(self, teacher: Tensor) -> Tensor:
        """Return softmax(teacher / tau) [N, C]."""
        if self.temperature != 1:  # subtract the maximum first: dividing large logits rounds them
            teacher = (teacher - teacher.amax(1, keepdim=True)).div_(self.temperature)
        return teacher.softmax(1)

    def chosen(self, teacher: Tensor, order: Tensor | None) -> Tensor | None:
        """Return the classes that `top_k` selects; see `RankingLoss.chosen`."""

        def best(k: int) -> Tensor:
            return teacher.topk(k, 1).indices if order is None else self.columns(order, k)

        found = None
        if self.top_k == "auto":
            # The search would make the host wait for an accelerator. It saves time only: `weigh`
            # leaves out the same classes without it.
            if teacher.device.type == "cpu" and not transformed():
                found = self._enough(teacher, best)
        elif self.top_k is not None and int(self.top_k) < teacher.shape[1]:
            found = best(int(self.top_k))
        return super().chosen(teacher, order) if found is None else found

    def _enough(self, teacher: Tensor, best: Callable[[int], Tensor]) -> Tensor | None:
        """Return the 64, 256, ... best classes that leave out less than `tolerance` of probability.

        Return None if all classes should be ranked: for larger numbers, the search for the best
        classes takes longer than sorting all of them.
        """
        probabilities, k = self._probabilities(teacher), FEWEST
        while 16 * k <= teacher.shape[1]:
            chosen = best(k)
            if (1 - probabilities.gather(1, chosen.long()).sum(1)).max() < self.tolerance:
                return chosen
            k *= 4
        return None

    def weigh(self, teacher: Tensor, labels: Tensor, ranking: Ranking) -> Tensor:
        """Return the teacher's probabilities in the order of the ranking [N, M]."""
        weights = ranking.take(self._probabilities(teacher), 0.0, overwrite=not transformed())
        if self.top_k == "auto":
            left_out = 1 - weights.cumsum(1)[:, :-1]  # before each step except the first
            weights[:, 1:] *= left_out >= self.tolerance
        return weights

    def weigh_samples(self, teacher: Tensor) -> Tensor | None:
        """Return the weights [N] that `adaptive` selects, from teacher logits [N, C]."""
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
        """Warn once if the softmax of the teacher logits [N, C] is close to uniform.

        On the CPU, the calls 1, 2, 3, 5, 9, ... look at the logits; on an accelerator, the first.
        """
        call, classes = next(self._calls), teacher.shape[1]
        if call & (call - 1) or self.notes or classes == 1:
            return
        if call and teacher.device.type != "cpu":  # to look would stall an accelerator
            return
        _, teacher = standardize_pair(teacher, teacher, self.standardize)
        entropy = float(_entropy(self._probabilities(teacher)).mean()) / math.log(classes)
        if entropy > FLAT:
            self.notes.append(
                f"pld: the teacher is close to uniform at temperature {self.temperature:g} (mean "
                f"entropy {entropy:.0%} of log {classes}), so its ranking carries little "
                "information and PLD gains less; a lower temperature sharpens the weights"
            )
            warnings.warn(self.notes[-1], stacklevel=2)


def _entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy of every row in nats."""
    return torch.special.entr(probabilities).sum(-1)


class PlackettLuceLoss(RankingLoss):
    """Plackett-Luce loss with custom weights of the steps.

    Args:
        schedule: Function from the steps 1 .. C (float64 [C]) to their weights [C]. The weights
            must be finite, not negative and not all 0; the loss normalises them to sum to 1. The
            function is called in every forward pass, so the weights may change during training.
        standardize: Which logits are z-scored first: "none", "both" or "teacher". Default: "none".
        **options: `ignore_index` and `reduction`, see `DistillationLoss`.

    Example:
        loss = PlackettLuceLoss(lambda step: 1 / step)
        loss(student_logits, teacher_logits, labels)
    """

    def __init__(
        self,
        schedule: Callable[[Tensor], Tensor],
        standardize: Standardize = "none",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(standardize, **options)
        self.schedule = schedule
        self.fixed = False  # whether the weights are the same in every forward pass
        self.kept: dict[Any, Tensor] = {}

    def _step_weights(self, like: Tensor) -> Tensor:
        """Return the weights of the steps [C] as the teacher logits [N, C] are stored."""
        classes, where = like.shape[1], (like.shape[1], like.device, like.dtype)
        if not self.fixed or transformed():
            return schedule_weights(self.schedule, classes).to(like)
        if where not in self.kept:
            self.kept[where] = schedule_weights(self.schedule, classes).to(like)
        return self.kept[where]

    def weighting(self, teacher: Tensor) -> Weighting:
        """Return the weights of the schedule."""
        return Weighting(schedule=self._step_weights(teacher))

    def weigh(self, teacher: Tensor, labels: Tensor, ranking: Ranking) -> Tensor:
        """Return the weights of the schedule for every sample [N, M]; see `RankingLoss.weigh`."""
        classes = teacher.shape[1]
        weights = self._step_weights(teacher)
        if not ranking.repeated:
            return weights.expand(len(labels), classes)
        # the label is step 1, so classes before it in the order move one step later
        again = ranking.index[:, 1:] == labels[:, None]
        step = torch.arange(1, classes + 1, device=labels.device) - again.cumsum(1)
        rows = weights[step.clamp_max(classes - 1)].masked_fill(again, 0)
        return torch.cat([weights[:1].expand(len(rows), 1), rows], 1)


def schedule_weights(schedule: Callable[[Tensor], Tensor], classes: int) -> Tensor:
    """Evaluate a schedule and normalise its weights.

    Args:
        schedule: Function from the steps 1 .. C (float64 [C]) to their weights [C].
        classes: The number of classes C.

    Returns:
        Weights [C], float64, that sum to 1.

    Raises:
        ValueError: The number of weights is not C, or the weights are negative, not finite or
            all 0.
    """
    steps = torch.arange(1, classes + 1, dtype=torch.float64)
    weights = schedule(steps).double()
    if weights.shape != steps.shape:
        raise ValueError(
            f"schedule: expected {classes} weights for {classes} steps, "
            f"got a tensor of shape {list(weights.shape)}"
        )
    total, least = weights.sum(), weights.min()
    if not transformed() and not (0 < float(total) < math.inf and float(least) >= 0):
        raise ValueError(
            "schedule: expected finite weights, none negative and not all 0; "
            f"their sum is {total:g} and the smallest is {least:g}"
        )
    return weights / total


@register_loss("listmle", label="ListMLE", takes="order")
class ListMLELoss(PlackettLuceLoss):
    """ListMLE (Xia et al. 2008) divided by the number of classes C.

        loss = 1/C sum over k of (logsumexp over l >= k of s[pi*_l]  -  s[pi*_k])

    Here s are the student's logits. The ranking pi* lists the label first, then the other classes
    by descending teacher logit.

    Args:
        standardize: Which logits are z-scored first: "none", "both" or "teacher". Default: "none".
        **options: `ignore_index` and `reduction`, see `DistillationLoss`.

    Example:
        ListMLELoss()(student_logits, teacher_logits, labels)
    """

    def __init__(self, standardize: Standardize = "none", **options: Unpack[Options]) -> None:
        super().__init__(torch.ones_like, standardize, **options)
        self.fixed = True


@register_loss("plistmle", label="P-ListMLE", takes="order")
class PListMLELoss(PlackettLuceLoss):
    """Position-aware ListMLE, P-ListMLE (Lan et al. 2014).

        loss = sum over k of w_k (logsumexp over l >= k of s[pi*_l]  -  s[pi*_k])
        w_k proportional to 2^(C-k) - 1, k = 1 .. C

    Here s are the student's logits. The ranking pi* lists the label first, then the other classes
    by descending teacher logit. The weights are normalised to sum to 1. To avoid overflow,
    2^(C-k) - 1 is first divided by 2^(C-1). The text of the PLD paper gives its P-ListMLE row
    weights that are equal to PLD's. This class uses the sequence of the method that it names.

    Args:
        standardize: Which logits are z-scored first: "none", "both" or "teacher". Default: "none".
        **options: `ignore_index` and `reduction`, see `DistillationLoss`.

    Example:
        PListMLELoss()(student_logits, teacher_logits, labels)
    """

    def __init__(self, standardize: Standardize = "none", **options: Unpack[Options]) -> None:
        super().__init__(position_weights, standardize, **options)
        self.fixed = True


def position_weights(step: Tensor) -> Tensor:
    """Return the weights of P-ListMLE divided by 2^(C-1).

    Args:
        step: The steps 1 .. C (float64 [C]).

    Returns:
        Weights [C], not normalised.
    """
    classes = len(step)
    # with one class the weight is 2^0 - 1 = 0, and any other weight gives the same loss of 0
    return torch.exp2(1 - step) - 2.0 ** (1 - classes) if classes > 1 else torch.ones_like(step)
