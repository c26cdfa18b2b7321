"""The weighted Plackett-Luce likelihood of one ranking per sample, and its closed-form gradient.

A ranking lists the label first, then the other classes of an order o_1 .. o_K. The classes that the
order leaves out follow as one unordered tail. Let s be the student's logits, Z_k the sum of exp(s)
over all classes that are not ranked before step k, and R_k the same sum without the class of step
k. Then

    loss          = sum over k of w_k log(1 + R_k / exp(s_k))
    gradient at j = exp(s_j) A_j  -  w_j R_j / Z_j,     A_j = sum over k < j of w_k / Z_k

This is the closed form of arXiv 2506.12542, with w_j taken out of the first sum. Classes in the
tail have no second term.

The formulas lose no precision by cancellation. All terms of the loss are positive. The gradient
summed over the steps up to m is -R_m (A_m + w_m / Z_m), which bounds both terms at j: neither is
larger than the 1-norm of the whole gradient. Loss and gradient are therefore as exact as exp and
sums of positive numbers, however confident or wrong the student is.

Only exp itself can fail. In float32 a row is safe if its smallest probability is at least e^-50: no
term underflows, and rounding max s - s, which is at most 50, changes a term by 2e-6. In float64 the
limit is e^-500. Beyond these limits the sums are computed in log space, which works for any finite
logits and takes five times as long. On the CPU the code inspects the batch and uses the cheapest
safe form. On other devices the inspection would stall the step. On CUDA there is a kernel
(`triton_kernel.py`), which is as exact in float32 for any logits. Log space is used there only for
weights without a `Weighting`, for logits in float64 and without Triton.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from pld_ray.losses.common import transformed
from pld_ray.losses.order import Ranking, rank_all, rank_in_order

# dtype: (smallest safe probability, stand-in for the label's probability where the order lists
# the label again). The stand-in vanishes in the rounding of every sum, but it is not 0 and not
# so small that 1 divided by it overflows.
LINEAR = {torch.float32: (math.exp(-50), 1e-37), torch.float64: (math.exp(-500), 1e-300)}

CHECKED = 10_000  # classes with which the kernel is checked: three tiles


class Weighting(NamedTuple):
    """The weights of the steps, as the kernel on CUDA takes them.

    Attributes:
        temperature: The weights are the teacher's softmax at this temperature.
        tolerance: If given, steps weigh nothing once the classes that are not ranked yet have less
            than this probability.
        schedule: If given, the weights are these, [C], in the order of the ranking.
    """

    temperature: float = 1.0
    tolerance: float | None = None
    schedule: Tensor | None = None


class Rule(Protocol):
    """How a loss ranks the classes and how it weights the steps of a ranking."""

    def weighting(self, teacher: Tensor) -> Weighting | None:
        """Return what `weigh` computes, in the kernel's form, or None if the kernel has no form.

        Args:
            teacher: Teacher logits [N, C].
        """

    def chosen(self, teacher: Tensor, order: Tensor | None) -> Tensor | None:
        """Return the order of the classes to rank [N, K], or None if all are to be sorted.

        Args:
            teacher: Teacher logits [N, C].
            order: The teacher's order [N, C], or None if it is not known.
        """

    def weigh(self, teacher: Tensor, labels: Tensor, ranking: Ranking) -> Tensor:
        """Return the weights of the steps [N, M]; they are 0 where the order repeats the label.

        Args:
            teacher: Teacher logits [N, C].
            labels: Labels [N].
            ranking: The ranking of every sample.
        """

    def notice(self, teacher: Tensor) -> None:
        """Inspect the teacher logits [N, C] of a forward pass and warn if necessary."""


def ranking_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    order: Tensor | None,
    rule: Rule,
    mean: bool = False,
) -> Tensor:
    """Return the weighted negative log-likelihood of each sample's ranking.

    Only the student receives a gradient. It is computed together with the loss, and the backward
    pass needs no other stored tensors except the arguments. Second derivatives are supported; for
    them, the gradient is computed again in log space. Inside torch.compile and torch.func the loss
    is computed in log space, by plain operations that they can differentiate.

    Args:
        student: Student logits [N, C], float32 or float64.
        teacher: Teacher logits [N, C], float32 or float64.
        labels: Labels [N], int64.
        order: The teacher's order [N, K], or None if it is not known.
        rule: How to rank the classes and weight the steps.
        mean: Whether to return the mean over the samples.

    Returns:
        Losses [N], or their mean.
    """
    if transformed():
        ranking, weights = _ranked(rule, teacher, labels, order)
        losses = _in_log_space(student, ranking, weights)[0].to(student.dtype)
        return losses.mean() if mean else losses
    result: Tensor = _ClosedForm.apply(student, teacher, labels, order, rule, mean)
    return result


def _ranked(
    rule: Rule, teacher: Tensor, labels: Tensor, order: Tensor | None
) -> tuple[Ranking, Tensor]:
    """Return the ranking of every sample and the weights of its steps [N, M]."""
    chosen = rule.chosen(teacher, order)
    if chosen is None:
        ranking = rank_all(teacher, labels)
    else:
        ranking = rank_in_order(chosen, labels, teacher.shape[1])
    return ranking, rule.weigh(teacher, labels, ranking)


class _ClosedForm(torch.autograd.Function):
    """Compute the loss and its gradient in the forward pass."""

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
        rule.notice(teacher)
        wanted = ctx.needs_input_grad[0]
        weighting = None
        if _on_cuda(student) and _says_weighting(rule):
            weighting = rule.weighting(teacher)
        kernel = None if weighting is None else checked_kernel(student.device)
        if weighting is not None and kernel is not None:
            chosen = rule.chosen(teacher, order)
            if chosen is None:
                chosen = rank_all(teacher, labels).index
            losses, gradient = kernel(student, teacher, labels, chosen, weighting, wanted)
            losses = losses.mean() if mean else losses
        else:
            ranking, weights = _ranked(rule, teacher, labels, order)
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
        if torch.is_grad_enabled():  # for second derivatives
            rule, teacher, labels, order = ctx.constants
            ranking, weights = _ranked(rule, teacher, labels, order)
            gradient = cast(Tensor, _in_log_space(student, ranking, weights, True)[1])
            gradient = gradient.to(student.dtype)
        scale = grad_losses / len(student) if ctx.mean else grad_losses[:, None]
        return gradient * scale, None, None, None, None, None


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Weighting, bool], tuple[Tensor, Tensor | None]]


def _on_cuda(student: Tensor) -> bool:
    """Return whether the kernel takes student logits [N, C] as they are."""
    return student.device.type == "cuda" and student.dtype == torch.float32


def _says_weighting(rule: Rule) -> bool:
    """Return whether `weighting` is what `weigh` computes; a subclass may define only `weigh`."""
    weighs = next(kind for kind in type(rule).__mro__ if "weigh" in vars(kind))
    return "weighting" in vars(weighs)


@cache
def checked_kernel(device: torch.device) -> Kernel | None:
    """Return the Triton kernel if it runs on a device and agrees with `_in_log_space`.

    The two are compared once per process and device, on random logits: PLD over all classes, over
    some, and with a tolerance; and ListMLE. If they differ, or the kernel does not compile, a
    warning says so and the result is None.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    from pld_ray.losses.plackett_luce import ListMLELoss, PLDLoss

    classes = CHECKED
    generator = torch.Generator().manual_seed(0)
    student, teacher = 30 * torch.randn(2, 2, classes, generator=generator).to(device)
    labels = torch.tensor([0, classes - 1], device=device)
    rules: list[Rule] = [PLDLoss(4.0), PLDLoss(4.0, top_k=classes // 2), PLDLoss(4.0, top_k="auto")]
    try:
        from pld_ray.losses.triton_kernel import plackett_luce

        for rule in (*rules, ListMLELoss()):
            ranking, weights = _ranked(rule, teacher, labels, None)
            weighting = cast(Weighting, rule.weighting(teacher))
            given = student, teacher, labels, ranking.index, weighting, True
            expected = _in_log_space(student, ranking, weights, True)
            for ours, theirs in zip(plackett_luce(*given), expected, strict=True):
                assert ours is not None and theirs is not None
                torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-6)
    except Exception as error:  # of Triton, of its compiler, or of the comparison
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        warnings.warn(f"pld: the Triton kernel is not used on {device}: {said}", stacklevel=2)
        return None
    return plackett_luce


def _safe_probabilities(student: Tensor) -> Tensor | None:
    """Return softmax(student) in the cheapest safe type, or None if no type is safe."""
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
    """Return losses [N] (or their mean) and, if `wanted`, gradients [N, C] in linear space.

    `exp` is exp(s) [N, C] up to a factor per row, and is overwritten. `weights` has shape [N, M].
    """
    # items [N, L]: the ranked classes, then the tail if there is one
    items = ranking.take(exp, LINEAR[exp.dtype][1], overwrite=True)
    if ranking.tailed:
        tail = exp.scatter_(1, ranking.index, 0.0).sum(1, keepdim=True)
        items = torch.cat([items, tail], 1)
    z = items.flip(1).cumsum_(1).flip(1)
    steps = items.shape[1] - 1  # at the last item no choice is left, so it costs nothing
    rest, weights = z[:, 1:], weights[:, :steps]
    if weights.dtype != exp.dtype:
        weights = weights.to(exp.dtype)
    costs = (rest / items[:, :-1]).log1p_()
    costs.mul_(weights)  # not a matrix product, which autocast would run in half precision
    losses = costs.sum() / len(costs) if mean else costs.sum(1)
    if not wanted:
        return losses, None

    shares = torch.div(weights, z[:, :-1], out=costs)  # reuses the memory of costs
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
    """Do the same as `_linear`, in log space and with operations that autograd can differentiate.

    This works for any finite logits and on any device.
    """
    # exp turns an absolute error of s into a relative error, so float32 is too coarse if the
    # logits have a range of 1e4
    dtype = torch.float32 if student.device.type == "mps" else torch.float64
    nothing = torch.finfo(dtype).min / 4  # stands for log 0; finite, so that derivatives are finite
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
    # put_ overwrites this tensor, but the derivative of exp needs its result: clone it
    gradient = (s + before[:, -1:]).exp().clone() if ranking.tailed else torch.zeros_like(s)
    return losses, ranking.put_(gradient, pushes - pulls)
