"""The weighted Plackett-Luce likelihood of one ranking per sample, and its gradient in closed form.

A ranking puts the label first, then the classes of an order o_1 .. o_K with the label passed over,
then the classes that the order leaves out, as one unordered tail. With the student's logits s,
Z_k = sum of exp(s) over all that is not ranked before step k, and R_k = Z_k without step k's own,

    loss          = sum over k of w_k log(1 + R_k / exp(s_k))
    gradient at j = exp(s_j) A_j  -  w_j R_j / Z_j,     A_j = sum over k < j of w_k / Z_k

(arXiv 2506.12542, its closed form with w_j taken out of the first sum). A tail class has no second
term. Nothing cancels here: all terms of the loss are positive, and the gradient summed over the
steps up to m is -R_m (A_m + w_m / Z_m), which bounds both terms at j: neither is larger than the
1-norm of the whole gradient. So loss and gradient are as exact as exp and sums of positive numbers
are, however sure or wrong the student is.

What can still fail is exp itself. A row whose least probability is e^-50 or more is safe in float32
(no term underflows, and rounding s - max s, which is at most 50, moves a term by 2e-6), in float64
down to e^-500. Beyond that sums are taken in log space, which holds for any finite logits and costs
five times as much. On the CPU the batch is looked at and the cheapest safe form taken. On other
devices a look would stall the step: there it is always log space.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pld_ray.losses.common import transformed
from pld_ray.losses.order import Ranking

# dtype: (the least safe probability; what stands for the label's where the order passes over it:
# lost in every sum's rounding, yet neither 0 nor so small that 1 divided by it overflows)
LINEAR = {torch.float32: (math.exp(-50), 1e-37), torch.float64: (math.exp(-500), 1e-300)}


class Rule(Protocol):
    """What a loss says about its rankings: how they are made, and how their steps are weighed."""

    def rank(self, teacher: Tensor, labels: Tensor, order: Tensor | None) -> Ranking:
        """[N, C], [N] and the teacher's order [N, K], if it is known, to the ranking."""

    def weigh(self, teacher: Tensor, labels: Tensor, ranking: Ranking) -> Tensor:
        """The weights of the steps [N, M], 0 where a label is passed over."""

    def notice(self, teacher: Tensor) -> None:
        """Look at the teacher of a forward pass, for what there is to warn of."""


def ranking_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    order: Tensor | None,
    rule: Rule,
    mean: bool = False,
) -> Tensor:
    """The weighted negative log-likelihood of each sample's ranking: [N], or their mean.

    student, teacher float32 or float64 [N, C]; labels [N] int64. The gradient goes to the student
    alone. It is made together with the loss, and is all that is kept for the backward pass beside
    the arguments. Second derivatives are right, and made anew in log space. Inside torch.compile
    and torch.func the loss is the one in log space, as plain operations for them to differentiate.
    """
    if transformed():
        ranking = rule.rank(teacher, labels, order)
        weights = rule.weigh(teacher, labels, ranking)
        losses = _in_log_space(student, ranking, weights)[0].to(student.dtype)
        return losses.mean() if mean else losses
    result: Tensor = _ClosedForm.apply(student, teacher, labels, order, rule, mean)
    return result


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        order: Tensor | None,
        rule: Rule,
        mean: bool,
    ) -> Tensor:
        ranking = rule.rank(teacher, labels, order)
        weights = rule.weigh(teacher, labels, ranking)
        rule.notice(teacher)
        wanted = ctx.needs_input_grad[0]
        probabilities = _safe_probabilities(student)
        if probabilities is None:
            losses, gradient = _in_log_space(student, ranking, weights, wanted)
            losses = losses.mean() if mean else losses
        else:
            losses, gradient = _linear(probabilities, ranking, weights, wanted, mean)
        if losses.dtype != student.dtype:
            losses = losses.to(student.dtype)
            gradient = None if gradient is None else gradient.to(student.dtype)
        if wanted:
            ctx.constants, ctx.mean = (rule, teacher, labels, order), mean
            ctx.save_for_backward(student, gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        student, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will itself be differentiated
            rule, teacher, labels, order = ctx.constants
            ranking = rule.rank(teacher, labels, order)
            weights = rule.weigh(teacher, labels, ranking)
            gradient = cast(Tensor, _in_log_space(student, ranking, weights, True)[1])
            gradient = gradient.to(student.dtype)
        scale = grad_losses / len(student) if ctx.mean else grad_losses[:, None]
        return gradient * scale, None, None, None, None, None


def _safe_probabilities(student: Tensor) -> Tensor | None:
    """softmax(student) in the cheapest type in which it is safe; None: there is none."""
    if student.device.type != "cpu":
        return None
    for dtype, (least, _) in LINEAR.items():
        if dtype.itemsize >= student.dtype.itemsize:
            probabilities = student.softmax(1, dtype=dtype)
            if probabilities.amin().item() >= least:
                return probabilities
    return None


def _linear(
    exp: Tensor, ranking: Ranking, weights: Tensor, wanted: bool, mean: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses [N], or their mean, and where wanted their gradients [N, C], by sums of exponentials.

    exp: exp(s) up to a factor of each row [N, C], overwritten; weights [N, M].
    """
    # items [N, L]: what is ranked, then the tail if there is one
    items = ranking.take(exp, LINEAR[exp.dtype][1], overwrite=True)
    if ranking.tailed:
        tail = exp.scatter_(1, ranking.index, 0.0).sum(1, keepdim=True)
        items = torch.cat([items, tail], 1)
    z = items.flip(1).cumsum_(1).flip(1)
    steps = items.shape[1] - 1  # the last item is all that is left: it costs nothing
    rest, weights = z[:, 1:], weights[:, :steps]
    if weights.dtype != exp.dtype:
        weights = weights.to(exp.dtype)
    costs = rest / items[:, :-1]
    # torch.log1p takes float32 numbers one by one, at 1,000 classes as long as all the rest
    array = costs.numpy()
    np.log1p(array, out=array)
    costs.mul_(weights)  # by no product that autocast would do in half precision
    losses = costs.sum() / len(costs) if mean else costs.sum(1)
    if not wanted:
        return losses, None

    shares = torch.div(weights, z[:, :-1], out=costs)  # in the memory of what is done with
    pulls = rest.mul_(shares)
    before = shares.cumsum_(1)
    items[:, 1:].mul_(before)
    items[:, :1].zero_()
    items[:, :-1].sub_(pulls)
    if ranking.tailed:
        exp *= before[:, -1:]
    return losses, ranking.put_(exp, items)


def _in_log_space(
    student: Tensor, ranking: Ranking, weights: Tensor, wanted: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The same for any finite logits and on any device, by operations autograd can follow."""
    # exp turns an error of s into a relative error: at a range of 1e4 float32 is not enough
    dtype = torch.float32 if student.device.type == "mps" else torch.float64
    nothing = torch.finfo(dtype).min / 4  # log 0, finite so that derivatives are
    student = student.to(dtype)
    s = student - student.detach().amax(1, keepdim=True)
    items = ranking.take(s, nothing)
    if ranking.tailed:
        tail = s.scatter(1, ranking.index, nothing).logsumexp(1, keepdim=True)
        items = torch.cat([items, tail], 1)
    z = items.flip(1).logcumsumexp(1).flip(1)
    steps = items.shape[1] - 1
    rest, weights = z[:, 1:], weights[:, :steps].to(dtype)
    losses = -(weights * F.logsigmoid(items[:, :-1] - rest)).sum(1)
    if not wanted:
        return losses, None

    shares = (weights.log().clamp_min(nothing) - z[:, :-1]).masked_fill(weights == 0, nothing)
    before = shares.logcumsumexp(1)
    pushes = F.pad((items[:, 1:] + before).exp(), (1, 0))
    pulls = F.pad(weights * (rest - z[:, :-1]).exp(), (0, 1))
    # cloned, since it is overwritten and the derivative of exp needs its result
    gradient = (s + before[:, -1:]).exp().clone() if ranking.tailed else torch.zeros_like(s)
    return losses, ranking.put_(gradient, pushes - pulls)
