"""MLKD: logits of two views are matched at several temperatures and on three levels."""

from __future__ import annotations

from typing import Annotated, Literal, Unpack

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pld_ray.losses.common import (
    DistillationLoss,
    Options,
    soften,
    standardize_pair,
    transformed,
)
from pld_ray.losses.divergence import kl_divergence
from pld_ray.losses.parameters import Standardize, Strong, Temperature, Weight
from pld_ray.losses.registry import register_loss

SWAPPED = 2  # of the temperatures, the last ones that the released code uses in another way


@register_loss("mlkd", label="MLKD", paired=True)
class MLKDLoss(DistillationLoss):
    """Multi-level logit distillation (Jin, Wang and Lin 2023, CVPR).

        loss = ce_weight (CE1 + CE2) + kd_weight * sum over tau of
               [tau^2 (KL1 + KL2) + batch_weight batch / B + class_weight class / C]

    The loss takes two views of each of B images: the logits of the first views, which other losses
    see too, and then those of the second ones, which have further transforms. CE1 and KL1 are means
    over the first views, CE2 and KL2 over the second ones; KL is KL(softmax(teacher / tau) ||
    softmax(student / tau)). With P and Q [B, C], these probabilities of the teacher and of the
    student for the first views, batch is the sum of squares of P P' - Q Q' [B, B], which compares
    the images with each other, and class that of P' P - Q' Q [C, C], which compares the classes.
    Both depend on the batch. With several workers, they depend on each worker's share of it.

    Loss, weights and temperatures are those of the paper; on ImageNet, the authors use the
    temperatures 1, 3, 5, 2, 6 and both weights 0.5. Crop and flip are the same in both views; the
    authors draw them for each view.

    Args:
        temperatures: The temperatures tau, above 0. Their order matters for `variant: released`
            only. Default: 4, 3, 5, 2, 6.
        ce_weight: Weight of both cross-entropies with the labels, at least 0. Default: 0.1.
        kd_weight: Weight of all other terms, at least 0. Default: 0.9.
        batch_weight: Weight of the comparison of images, at least 0. Default: 1.
        class_weight: Weight of the comparison of classes, at least 0. Default: 1.
        strong: Transforms of the second views after those of the first ones, by their names in
            `data.augment`. Default: randaugment, cutout.
        variant: "paper" is the formula above. "released" is what the authors' code computes. It
            multiplies KL1 and batch by the share of the images on which the teacher is unsure, and
            class by the share of the classes of which it is unsure; both are about 1/2. Instead of
            KL2, it adds KL1 again, without this factor, at the last two temperatures. "masked" is
            what that code seems to intend: KL1 is a sum over the unsure images, divided by B, and
            batch and class are sums over the columns of unsure images and classes. The teacher is
            unsure of an image if its largest probability, at temperature 1, is at most the median
            in the batch; it is unsure of a class if the sum of its probabilities over the images
            is at most the median of the classes. Default: "paper".
        standardize: Which logits are z-scored before KL: "none", "both" or "teacher". All other
            terms use the original logits (Sun et al. 2024). Default: "none".
        **options: `ignore_index` and `reduction`, see `DistillationLoss`. The loss of a row is
            twice that of its view, and holds batch and class once: the mean over the 2B rows is
            the loss above.

    Example:
        loss = MLKDLoss()
        logits = torch.cat([student(images), student(strong_images)])  # [2B, C]
        loss(logits, teacher_logits, torch.cat([labels, labels]))
    """

    def __init__(
        self,
        temperatures: Annotated[tuple[Temperature, ...], Field(min_length=1)] = (
            4.0,
            3.0,
            5.0,
            2.0,
            6.0,
        ),
        ce_weight: Weight = 0.1,
        kd_weight: Weight = 0.9,
        batch_weight: Weight = 1.0,
        class_weight: Weight = 1.0,
        strong: Strong = ("randaugment", "cutout"),
        variant: Literal["paper", "masked", "released"] = "paper",
        standardize: Standardize = "none",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(**options)
        self.temperatures = temperatures
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight
        self.batch_weight = batch_weight
        self.class_weight = class_weight
        self.strong = strong
        self.variant = variant
        self.standardize = standardize

    def losses(
        self, student: Tensor, teacher: Tensor, labels: Tensor, kept: Tensor | None
    ) -> Tensor:
        """Return the losses [2B]; see `DistillationLoss.losses`.

        Raises:
            ValueError: The rows are not two views of the same images. The labels are compared on
                the CPU only.
        """
        check_pairs(labels)
        size = len(labels) // 2
        z, t = standardize_pair(student, teacher, self.standardize)
        first_z, first_t = student[:size], teacher[:size]
        kept = None if kept is None else kept[:size]
        images, classes = self._counted(F.softmax(first_t, 1), kept)
        swapped = len(self.temperatures) - (SWAPPED if self.variant == "released" else 0)
        kl, relations = student.new_zeros(2 * size), student.new_zeros(())
        for number, tau in enumerate(self.temperatures):
            log_p, log_q = (F.log_softmax(soften(x, tau), 1) for x in (t, z))
            first, second = (tau**2 * kl_divergence(log_p, log_q)).chunk(2)
            kl = kl + torch.cat([images * first, second if number < swapped else first])
            if self.batch_weight or self.class_weight:
                p, q = (F.softmax(soften(x, tau), 1) for x in (first_t, first_z))
                relations = relations + self._relations(p, q, images, classes, kept)
        losses = self.kd_weight * (2 * kl + relations)
        entropies = F.cross_entropy(student, labels, reduction="none")
        return self.add_cross_entropy(losses, student, labels, known=2 * entropies)

    def _counted(self, p: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return how much each image [B] and each class [C] counts in the terms of first views.

        Args:
            p: The teacher's probabilities at temperature 1, [B, C].
            kept: bool [B], False at ignored images; None if all count.
        """
        if self.variant == "paper":
            return p.new_ones(len(p)), p.new_ones(p.shape[1])
        confidence, whole = p.amax(1), p
        if kept is not None:
            confidence, whole = confidence.where(kept, torch.inf), p * kept[:, None]
        images, classes = (_low(x).to(p.dtype) for x in (confidence, whole.sum(0)))
        if self.variant == "masked":
            return images, classes
        share = images.sum() / _count(images, kept)
        return share.expand_as(images), classes.mean().expand_as(classes)

    def _relations(
        self, p: Tensor, q: Tensor, images: Tensor, classes: Tensor, kept: Tensor | None
    ) -> Tensor:
        """Return batch_weight batch / B + class_weight class / C at one temperature.

        With D = P - Q and S = P + Q, batch is the sum of squares of (D S' + S D') / 2, and class
        that of (D' S + S' D) / 2. All products here are [B, B], so that many classes take no
        memory. There is no difference of large numbers, since each product has a factor D.

        Args:
            p: Probabilities of the teacher [B, C].
            q: Probabilities of the student [B, C].
            images: How much each column of P P' - Q Q' counts [B].
            classes: How much each column of P' P - Q' Q counts [C].
            kept: bool [B], False at ignored images; None if all count.
        """
        if kept is not None:
            p, q = p * kept[:, None], q * kept[:, None]
        d, s = p - q, p + q
        between = d @ s.T
        batch = ((between + between.T).square() * images).sum() / 4
        if self.variant == "paper":
            of_classes = ((d @ d.T) * (s @ s.T) + between * between.T).sum() / 2
        else:
            some_d, some_s = d * classes, s * classes
            of_classes = (d @ d.T) * (s @ some_s.T) + (s @ s.T) * (d @ some_d.T)
            of_classes = (of_classes + 2 * between * (s @ some_d.T)).sum() / 4
        batch = self.batch_weight * batch / _count(images, kept)
        return batch + self.class_weight * of_classes / p.shape[1]


def check_pairs(labels: Tensor) -> None:
    """Check that labels [2B] are those of B images, twice. On a GPU only their number is checked.

    Raises:
        ValueError: They are not.
    """
    size, odd = divmod(len(labels), 2)
    if odd or (
        labels.device.type == "cpu"
        and not transformed()
        and not torch.equal(labels[:size], labels[size:])
    ):
        raise ValueError(
            f"labels: expected those of B images twice, for their first and their second views, "
            f"got {len(labels)} labels" + ("" if odd else " whose halves differ")
        )


def _low(x: Tensor) -> Tensor:
    """Return which of the finite numbers [N] are at most their median, bool [N].

    The median of an even count is the mean of the middle two, as in numpy.
    """
    count = x.isfinite().sum()
    middle = torch.stack([(count - 1) // 2, count // 2]).clamp_min(0)
    return x <= x.sort().values[middle].mean()


def _count(images: Tensor, kept: Tensor | None) -> Tensor | int:
    """Return the number of images that are not ignored, at least 1."""
    return len(images) if kept is None else kept.sum().clamp_min(1)
