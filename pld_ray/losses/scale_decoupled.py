"""SDD: the logits of parts of the image are distilled, at several scales."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from pld_ray.errors import InputError
from pld_ray.losses.decoupled import DKDLoss, NKDLoss
from pld_ray.losses.divergence import KDLoss
from pld_ray.losses.feature_loss import FeatureLoss, Features
from pld_ray.losses.parameters import Temperature, Weight
from pld_ray.losses.registry import register_loss

PUBLISHED = {"kd": (0.9, 0.1), "dkd": (1.0, 1.0), "nkd": (1.0, 1.0)}
"""The weights of the cells and of the cross-entropy in the authors' code, for each base."""


@register_loss("sdd", label="SDD", takes="features")
class SDDLoss(FeatureLoss):
    """Scale decoupled distillation, SDD (Wei et al. 2024, CVPR).

        loss = ce_weight CE + warmup weight * mean over images and cells of w base(s, t)

    The last feature map is average-pooled to m x m cells, for m = 1, 2, 4 and so on. The network's
    linear layer turns each cell into logits s (student) and t (teacher). base is the loss KD, DKD
    or NKD of these logits without its cross-entropy. w is 2 if the teacher is right about the cell
    and wrong about the whole image, or the other way round, and 1 otherwise. The factor warmup is
    min((epoch + 1) / W, 1) with W = `warmup_epochs`, and 1 if W is 0.

    Both networks must end with average pooling and a linear layer. As in the authors' code
    (shicaiwei123/SDD-CVPR2024), the cells of all scales have the same weight in the mean, and maps
    smaller than m x m repeat their cells. The default weights are those of that code. For the two
    labels of a mixed image, the loss is the weighted mean of the losses with each of them.

    Args:
        base: The loss of each cell: "kd", "dkd" or "nkd". Default: "kd".
        scales: The number of scales, from 1 to 8: the last one has 2^(scales - 1) cells along each
            side. The paper uses 2 for networks of one family, and 3 for others. Default: 3.
        temperature: Temperature of the base, above 0. The authors use 1 on ImageNet. Default: 4.
        weight: Weight of the cells, at least 0. Default: 0.9 for kd, otherwise 1.
        ce_weight: Weight of the cross-entropy with the labels, at least 0. Default: 0.1 for kd,
            otherwise 1.
        beta: Weight of the term of the other classes, at least 0: NCKD in dkd, gamma in nkd. The
            base kd has none. Default: 8.
        warmup_epochs: Epochs W over which the weight of the cells rises to 1, at least 0. The
            authors use 20 for dkd and nkd. Default: 0.
    """

    takes_labels = True

    def __init__(
        self,
        base: Literal["kd", "dkd", "nkd"] = "kd",
        scales: Annotated[int, Field(ge=1, le=8)] = 3,
        temperature: Temperature = 4.0,
        weight: Weight | None = None,
        ce_weight: Weight | None = None,
        beta: Weight | None = None,
        warmup_epochs: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        if base == "kd" and beta is not None:
            raise InputError(
                f"sdd: beta is {beta}, and the base kd has no such term: expected no beta, or the "
                "base dkd or nkd"
            )
        usual = PUBLISHED[base]
        super().__init__(usual[1] if ce_weight is None else ce_weight)
        self.weight = usual[0] if weight is None else weight
        beta = 8.0 if beta is None else beta
        options: Any = {"temperature": temperature, "ce_weight": 0.0}
        options |= {"ignore_index": None, "reduction": "sum"}
        if base == "kd":
            self.base: KDLoss | DKDLoss | NKDLoss = KDLoss(**options)
        elif base == "dkd":
            self.base = DKDLoss(beta=beta, **options)
        else:
            self.base = NKDLoss(gamma=beta, **options)
        self.cells = [f"cells{2**k}" for k in range(scales)]
        self.student_further = self.teacher_further = frozenset(self.cells)
        self.warmup_epochs = warmup_epochs
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Set the current epoch, counted from 0, for the warm-up."""
        self.warmup = min((epoch + 1) / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0

    def distance(self, student: Features, teacher: Features, labels: Tensor) -> Tensor:  # type: ignore[override]
        """Return the weighted distance; see `FeatureLoss.distance`.

        Args:
            student: Features of the student.
            teacher: Features of the teacher.
            labels: Class indices, int64 [B], or for mixed images the shares of their classes
                [B, C], of which at most two are above 0.

        Raises:
            ValueError: More than two are above 0. It is raised on the CPU only.
        """
        s, t = (
            torch.cat([of.further[name][0] for name in self.cells], 1) for of in (student, teacher)
        )  # [B, cells, C]; the first cell is the whole image
        predicted = t.argmax(2)
        if labels.ndim == 1:
            classes, shares = labels[:, None], None
        else:  # a mixed image has two labels, or twice the same one
            shares, classes = labels.topk(2)
            # read on the CPU only: a GPU would have to be waited for
            if shares.is_cpu and not torch.allclose(shares.sum(1), labels.sum(1)):
                raise ValueError(
                    "sdd: soft labels with more than two classes for an image: expected class "
                    "indices [B], or those of images that are mixed from two"
                )
        total = s.new_zeros(())
        for i in range(classes.shape[1]):
            label = classes[:, i : i + 1]
            right = predicted == label
            weights = 1.0 + (right != right[:, :1])
            if shares is not None:
                weights = weights * shares[:, i : i + 1]
            total = total + self.base(s, t, label.expand_as(predicted), sample_weight=weights)
        return self.weight * self.warmup / predicted.numel() * total
