"""Losses on relations of features: NST, KDSVD and CC, each combined with cross-entropy.

NST compares how the channels of a map are distributed, KDSVD how successive stages relate, and CC
how the samples of a batch relate. They are called as the losses of `features`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pld_ray.losses.feature_loss import FeatureLoss, Features
from pld_ray.losses.parameters import Weight
from pld_ray.losses.registry import register_loss

FURTHER = 3
"""Singular vectors that KDSVD computes of the student beyond those of the teacher."""

SQUARINGS = 12
"""The power 2^12 of a Gram matrix is its leading eigenvector, if the next eigenvalue is at least
0.4 % smaller. If it is not, the two eigenvectors are mixed, and each mixture is as good."""

DOUBLINGS = 10
"""The gradient of a singular vector has 2^10 terms of a geometric series. It takes eigenvalues that
differ by less than 0.1 % as if they differed by about that much. The true one is infinite there."""

TERMS = 8
"""Terms of the series of exp(x y / 4) for |x|, |y| <= 1. The next one is below 1e-9."""


@register_loss("nst", label="NST", takes="features")
class NSTLoss(FeatureLoss):
    """Neuron selectivity transfer, NST (Huang and Wang 2017, arXiv 1707.01219).

        loss = ce_weight CE + weight * sum over stages of mean over samples of MMD^2
        MMD^2 = mean k(a_i, a_j) + mean k(b_i, b_j) - 2 mean k(a_i, b_j),  k(x, y) = (x . y)^2

    a_i and b_j are the channels of the maps of student and teacher, flattened and divided by their
    norms, and the means are over all pairs of channels. k is the polynomial kernel of degree 2
    without a constant, as in the CRD and mdistiller repositories; the paper also has other kernels.
    The larger map of a pair is average-pooled to the size of the smaller one. The number of
    channels may differ. Both networks need the same number of stages. The default weight is that
    of the CRD repository.

    Args:
        weight: Weight of the distance, at least 0. Default: 50.
        ce_weight: Weight of the cross-entropy with the labels, at least 0. Default: 1.
    """

    def __init__(self, weight: Weight = 50.0, ce_weight: Weight = 1.0) -> None:
        super().__init__(ce_weight)
        self.weight = weight

    def distance(self, student: Features, teacher: Features) -> Tensor:
        """Return the weighted distance; see `FeatureLoss.distance`."""
        pairs = self._pairs(student, teacher)
        return self.weight * torch.stack([_discrepancy(s, t).mean() for s, t in pairs]).sum()


def _discrepancy(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared MMD [B] between the channels of maps [B, channels, h, w] of one size."""
    a, b = (F.normalize(x.flatten(2), dim=2) / math.sqrt(x.shape[1]) for x in (student, teacher))
    # The sum of (a_i . b_j)^2 is that of A^T A times B^T B, so the smaller matrices are enough.
    if a.shape[2] < max(a.shape[1], b.shape[1]):
        return (a.mT @ a - b.mT @ b).square().sum((1, 2))
    aa, bb, ab = (x @ y.mT for x, y in ((a, a), (b, b), (a, b)))
    return aa.square().sum((1, 2)) + bb.square().sum((1, 2)) - 2 * ab.square().sum((1, 2))


@register_loss("kdsvd", label="KDSVD", takes="features")
class KDSVDLoss(FeatureLoss):
    """Self-supervised knowledge distillation using SVD, KDSVD (Lee, Kim and Song, ECCV 2018).

        loss = ce_weight CE + weight / B * sum over samples, successive stages and vectors of
            sum over i, j of (R_s - R_t)^2
        R = exp(-(u_i - v_j)^2 / 8)

    u and v are right singular vectors of unit length of one sample's maps, of a stage and of the
    one before. The teacher gives its first `vectors`. The student gives the one among its first
    `vectors` + 3 that has the largest |cosine| with the teacher's, with the sign of this cosine.
    Both are multiplied by the teacher's singular value, divided by the norm of those chosen.

    This is the form of the CRD and mdistiller repositories. The authors' code (SSKD_SVD) takes one
    further vector of the student instead of three, and half of the sum over the batch instead of
    its mean. The sign of a singular vector is free, but R depends on it. Here, the largest entry of
    a teacher's vector is positive. The repositories leave the sign to the SVD. Both networks need
    the same number of stages, at least two. The tables of the CRD repository do not have KDSVD; the
    default weight is that of the mdistiller repository.

    The vectors come from powers of Gram matrices, and not from `torch.linalg.svd`: there are only
    matrix products, which do not make the host wait for a GPU, as a CUDA graph requires.
    The gradient is finite for equal singular values, where that of an SVD is not. It is also finite
    for maps of zeros, whose vectors are zeros.

    Args:
        vectors: Number of singular vectors of the teacher, at least 1. Default: 1.
        over: What the singular vectors are over. "channels": the matrix of a map is [h w,
            channels], as in the authors' code and the CRD repository. The channels of student and
            teacher must be the same at each stage; the sizes may differ. "columns": the matrix is
            [channels h, w], as in the mdistiller repository. The channels may differ, and the
            larger map is average-pooled. Default: "channels".
        weight: Weight of the distance, at least 0. Default: 1.
        ce_weight: Weight of the cross-entropy with the labels, at least 0. Default: 1.
    """

    def __init__(
        self,
        vectors: Annotated[int, Field(ge=1)] = 1,
        over: Literal["channels", "columns"] = "channels",
        weight: Weight = 1.0,
        ce_weight: Weight = 1.0,
    ) -> None:
        super().__init__(ce_weight)
        self.vectors = vectors
        self.over = over
        self.weight = weight

    def distance(self, student: Features, teacher: Features) -> Tensor:
        """Return the weighted distance; see `FeatureLoss.distance`."""
        pairs = self._matrices(student, teacher)
        for number, pair in enumerate(pairs, 1):
            if self.vectors > (most := min(min(x.shape[1:]) for x in pair)):
                raise ValueError(
                    f"kdsvd: vectors is {self.vectors}, but a map of stage {number} has only {most}"
                )
        found = [_singular_vectors(s, t, self.vectors) for s, t in pairs]
        sums = [_rbf_difference(*one, *other) for one, other in zip(found[1:], found, strict=False)]
        return self.weight * torch.stack(sums).sum() / len(student.pooled)

    def _matrices(self, student: Features, teacher: Features) -> list[tuple[Tensor, Tensor]]:
        """Return the pairs of matrices [B, rows, d] whose right singular vectors are compared."""
        pairs = self._stages(student, teacher)
        if len(pairs) < 2:
            raise ValueError(
                f"kdsvd: the networks have {len(pairs)} stage; expected two or more, because "
                "successive stages are compared"
            )
        if self.over == "columns":
            pooled = self._pairs(student, teacher)
            return [(s.flatten(1, 2), t.flatten(1, 2)) for s, t in pooled]
        for number, (s, t) in enumerate(pairs, 1):
            if s.shape[1] != t.shape[1]:
                raise ValueError(
                    f"kdsvd: stage {number} has {s.shape[1]} channels in the student and "
                    f"{t.shape[1]} in the teacher; expected the same number, or over: columns"
                )
        return [(s.flatten(2).mT, t.flatten(2).mT) for s, t in pairs]


class _Leading(NamedTuple):
    """Leading eigenvectors of Gram matrices.

    Attributes:
        vectors: Unit eigenvectors [B, d, count]; zeros where a matrix has a lower rank.
        values: Their eigenvalues [B, 1, count].
        rest: The Gram matrices without the part of these vectors [B, d, d].
    """

    vectors: Tensor
    values: Tensor
    rest: Tensor


@torch.no_grad()
def _leading(x: Tensor, count: int) -> _Leading:
    """Return the leading eigenvectors of x^T x for matrices x [B, rows, d]."""
    vectors: list[Tensor] = []
    values: list[Tensor] = []
    for _ in range(count):
        power = _scaled(x.mT @ x)
        for _ in range(SQUARINGS):
            power = _scaled(power @ power)
        # The power is v v^T. The column of v's largest entry is the most precise one.
        largest = power.diagonal(dim1=1, dim2=2).argmax(1)
        v = F.normalize(torch.take_along_dim(power, largest[:, None, None], 2), dim=1)
        projected = x @ v
        value = projected.square().sum(1, keepdim=True)
        # What is left of a matrix of lower rank are rounding errors.
        v = v * (value > 1e-10 * (values[0] if values else 0))
        x = x - projected @ v.mT
        vectors.append(v)
        values.append(value)
    return _Leading(torch.cat(vectors, 2), torch.cat(values, 2), x.mT @ x)


def _scaled(gram: Tensor) -> Tensor:
    """Divide Gram matrices [B, d, d] by their traces. Zeros stay zeros."""
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)
    return gram / trace.clamp_min(torch.finfo(gram.dtype).tiny)[:, None, None]


def _singular_vectors(student: Tensor, teacher: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the aligned and weighted singular vectors that KDSVD compares.

    Args:
        student: Matrices of the student [B, rows, d].
        teacher: Matrices of the teacher [B, rows, d]; the number of rows may be another.
        count: Number of vectors of the teacher.

    Returns:
        Vectors of student and teacher, [B, d, count] each. Those of the student are differentiable.
    """
    with torch.no_grad():
        tall = _tall(teacher)
        w, values, _ = _leading(tall, count)
        t = _right(teacher, tall, w)
        largest = t.abs().argmax(1, keepdim=True)
        t = t * _sign(torch.take_along_dim(t, largest, 1))
        share = F.normalize(values.sqrt(), dim=2)
        tall = _tall(student)
        found = _leading(tall, min(count + FURTHER, tall.shape[2]))
        cosines = _right(student, tall, found.vectors).mT @ t  # [B, count + 3, count]
        closest = cosines.abs().argmax(1, keepdim=True)
        sign = _sign(torch.take_along_dim(cosines, closest, 1))
    w = _Chosen.apply(_tall(student), *found, closest)
    return _right(student, _tall(student), w) * (sign * share), t * share


def _tall(x: Tensor) -> Tensor:
    """Transpose matrices [B, rows, d] if they are wide, so that their Gram matrix is smaller."""
    return x if x.shape[1] >= x.shape[2] else x.mT


def _right(x: Tensor, tall: Tensor, vectors: Tensor) -> Tensor:
    """Return the right singular vectors of x, from those of `tall`."""
    return vectors if tall is x else F.normalize(tall @ vectors, dim=1)


def _sign(x: Tensor) -> Tensor:
    """Return 1 where x is not negative, else -1."""
    return torch.where(x < 0, -1.0, 1.0).to(x)


class _Chosen(torch.autograd.Function):
    """Choose eigenvectors of x^T x, with the gradient for x.

    For an eigenvector w with the eigenvalue c, and others v_i with c_i, a change dG of the Gram
    matrix changes w by the sum of v_i (v_i . dG w) / (c - c_i).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, vectors: Tensor, values: Tensor, rest: Tensor, chosen: Tensor
    ) -> Tensor:
        """Return the chosen vectors [B, d, k]. x: [B, rows, d], chosen: indices [B, 1, k]."""
        w, value = (torch.take_along_dim(found, chosen, 2) for found in (vectors, values))
        ctx.save_for_backward(x, vectors, values, rest, w, value)
        return w

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient for x."""
        x, vectors, values, rest, w, value = ctx.saved_tensors
        value = value.clamp_min(1e-30)  # of maps of zeros, whose w is zero
        # The vectors that are known: 1 / (c - c_i), bounded; w itself has the factor 0.
        parts = vectors.mT @ gradient  # [B, vectors, k]
        gap = 1 - values.mT / value  # divided by c, as all that follows
        change = vectors @ (parts * gap / (gap.square() + 4.0**-DOUBLINGS))
        # The others together: 1 / (1 - a) is the product of 1 + a^(2^i).
        others = []
        for k, left in enumerate((gradient - vectors @ parts).split(1, 2)):
            power = rest / value[:, :, k : k + 1]
            for doubling in range(DOUBLINGS):
                power = power @ power if doubling else power
                left = left + power @ left
            others.append(left)
        change = (change + torch.cat(others, 2)) / value
        return x @ (w @ change.mT + change @ w.mT), None, None, None, None


def _rbf_difference(s: Tensor, t: Tensor, s_before: Tensor, t_before: Tensor) -> Tensor:
    """Return the sum of (exp(-(s_i - s_before_j)^2 / 8) - exp(-(t_i - t_before_j)^2 / 8))^2.

    The sum is over samples, i, j and vectors. Entries are at most 1. With
    exp(-(x - y)^2 / 8) = exp(-x^2 / 8) exp(-y^2 / 8) sum over p of (x / 2)^p (y / 2)^p / p!
    no tensor of all pairs i, j is needed: 2048 and 1024 channels would take 8 MB a sample.

    Args:
        s: Vectors of the student [B, d, k].
        t: Vectors of the teacher [B, d, k].
        s_before: Vectors of the student at the stage before [B, e, k].
        t_before: Vectors of the teacher there [B, e, k].

    Returns:
        A scalar.
    """
    # With the terms S, T [d, p] and U, V [e, p]: S U^T - T V^T = (S - T) U^T + T (U - V)^T.
    terms_t, terms_u = _terms(t), _terms(s_before)
    change, change_before = _terms_change(s, t), _terms_change(s_before, t_before)
    return (
        (change.mT @ change) * (terms_u.mT @ terms_u)
        + (terms_t.mT @ terms_t) * (change_before.mT @ change_before)
        + 2 * (change.mT @ terms_t) * (terms_u.mT @ change_before)
    ).sum()


def _terms(x: Tensor) -> Tensor:
    """Return exp(-x^2 / 8) (x / 2)^p / sqrt(p!) of x [B, d, k] for each p, as [B, k, d, p]."""
    terms = [(-x.square() / 8).exp()]
    for p in range(1, TERMS):
        terms.append(terms[-1] * x / (2 * math.sqrt(p)))
    return torch.stack(terms, 3).transpose(1, 2)


def _terms_change(x: Tensor, y: Tensor) -> Tensor:
    """Return _terms(x) - _terms(y), without the rounding of the first term, which is near 1."""
    first = torch.expm1(-x.square() / 8) - torch.expm1(-y.square() / 8)
    further = (_terms(x) - _terms(y))[..., 1:]
    return torch.cat([first.transpose(1, 2)[..., None], further], 3)


@register_loss("cc", label="CC", takes="features")
class CCLoss(FeatureLoss):
    """Correlation congruence, CC (Peng et al., ICCV 2019).

        loss = ce_weight CE + weight * distance(x, y)
        differences: mean over i < B of d_i . d_(i+1),  d_i = |x_i - y_i|
        rbf: mean over i, j of (K(x_i, x_j) - K(y_i, y_j))^2
             K(x, y) = exp(-2 gamma) sum over p <= order of (2 gamma x . y)^p / p!

    x and y are learnt linear maps of the pooled features of student and teacher to `dim` numbers.
    Both are trained with the student, as in the CRD repository. With one image in a batch, the
    distance "differences" is 0.

    The two forms are different losses. "differences" is that of the CRD repository, which had it
    from the authors; its published numbers of CC on CIFAR-100 belong to it. "rbf" compares the
    kernel matrices of the batch, as the paper does: K is the series of the Gaussian kernel
    exp(-gamma |x - y|^2) for vectors of length 1, so x and y are divided by their norms, as in the
    repository Knowledge-Distillation-Zoo. The torchdistill repository does not divide them, and has
    the norm of the differences divided by B^2 instead of their mean square.

    Args:
        form: The distance: "differences" or "rbf". Default: "differences".
        weight: Weight of the distance, at least 0. Default: 0.02 for "differences", as in the CRD
            repository, and 100 for "rbf", as in Knowledge-Distillation-Zoo on CIFAR-10.
        ce_weight: Weight of the cross-entropy with the labels, at least 0. Default: 1.
        dim: Width of x and y, 1 to 65,536. Default: 128.
        gamma: Inverse width of the Gaussian kernel, above 0; for "rbf" only. Default: 0.4.
        order: Order of its series, at least 1; for "rbf" only. Default: 2.
    """

    def __init__(
        self,
        form: Literal["differences", "rbf"] = "differences",
        weight: Weight | None = None,
        ce_weight: Weight = 1.0,
        dim: Annotated[int, Field(ge=1, le=65_536)] = 128,
        gamma: Annotated[float, Field(gt=0)] = 0.4,
        order: Annotated[int, Field(ge=1)] = 2,
    ) -> None:
        super().__init__(ce_weight)
        self.form = form
        self.weight = weight if weight is not None else 0.02 if form == "differences" else 100.0
        self.dim = dim
        self.gamma = gamma
        self.order = order
        self.student_map: nn.Module = nn.Identity()
        self.teacher_map: nn.Module = nn.Identity()

    def connect(self, student: Features, teacher: Features) -> None:
        """Create the linear maps; see `FeatureLoss.connect`."""
        self.student_map = nn.Linear(student.pooled.shape[1], self.dim)
        self.teacher_map = nn.Linear(teacher.pooled.shape[1], self.dim)

    def distance(self, student: Features, teacher: Features) -> Tensor:
        """Return the weighted distance; see `FeatureLoss.distance`."""
        x, y = self.student_map(student.pooled), self.teacher_map(teacher.pooled)
        if self.form == "rbf":
            return self.weight * F.mse_loss(self._kernel(x), self._kernel(y))
        apart = (x - y).abs()
        return self.weight * (apart[:-1] * apart[1:]).sum() / max(len(apart) - 1, 1)

    def _kernel(self, x: Tensor) -> Tensor:
        """Return the kernel matrix [B, B] of x [B, dim]."""
        unit = F.normalize(x)
        cosines, width = unit @ unit.T, 2 * self.gamma
        # The factors are computed by their logarithms: each is at most 1, their parts may overflow.
        log_width = math.log(width)
        factors = [
            math.exp(p * log_width - math.lgamma(p + 1) - width) for p in range(self.order + 1)
        ]
        return torch.stack([factor * cosines**p for p, factor in enumerate(factors)]).sum(0)
