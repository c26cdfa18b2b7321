"""The core of a training step: student, teacher and loss as one module.

    images, labels -> teacher (or stored logits) -> student -> loss

The training loop of trials, `fit` and plain PyTorch loops all use this module.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pld_ray.data.mixing import MixedLabels
from pld_ray.distill.device import Precision, autocast
from pld_ray.distill.frozen_teacher import FrozenTeacher, check_logits
from pld_ray.errors import InputError
from pld_ray.losses.common import DistillationLoss, LossOfTerms
from pld_ray.losses.feature_loss import FeatureLoss, Features
from pld_ray.losses.plackett_luce import PLDLoss
from pld_ray.losses.registry import CLASSES, REGISTRY
from pld_ray.models.features import (
    WithFeatures,
    check_further,
    probe_features,
    teacher_layers,
)
from pld_ray.models.reused import ReusedClassifier


def _untimed(part: str) -> AbstractContextManager[None]:
    return nullcontext()


class Distiller(nn.Module):
    """Student, teacher and loss as one module that turns a batch into a scalar loss.

    Args:
        student: Maps images [B, channels, H, W] to logits [B, C].
        teacher: The teacher network. It is frozen and stays in evaluation mode. None if the loss
            needs no teacher, or if its logits are passed with every batch.
        loss: A loss module of `pld_ray.losses`, or any callable of (student logits [B, C],
            teacher logits [B, C], labels [B]). Default: `PLDLoss()`.
        renormalize: A module that is applied to the images before the teacher sees them.
        precision: "float32", or "bfloat16" for forward passes under autocast. The loss is always
            computed in float32.

    Raises:
        ValueError: The loss needs a teacher network and there is none, student and teacher share
            parameters, or an argument is something else than expected.

    Example:
        >>> distiller = Distiller(student, teacher, loss=PLDLoss(temperature=1.0))
        >>> for images, labels in loader:
        ...     optimizer.zero_grad()
        ...     distiller(images, labels).backward()
        ...     optimizer.step()
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        loss: Callable[..., Tensor] | None = None,
        *,
        renormalize: nn.Module | None = None,
        precision: Precision = "float32",
    ) -> None:
        super().__init__()
        _check_modules(student, teacher, loss)
        if teacher is not None and not isinstance(teacher, FrozenTeacher):
            teacher = FrozenTeacher(teacher, renormalize)
        elif renormalize is not None:
            raise ValueError("renormalize: expected a teacher network that is not frozen yet")
        self.student = student
        self.teacher = teacher
        self.loss: Any = PLDLoss() if loss is None else loss
        self.set_precision(precision)
        self.compares_features = isinstance(self.loss, FeatureLoss)
        name: str = getattr(self.loss, "name", "")
        registered = isinstance(self.loss, CLASSES.get(name, ()))
        self.needs_teacher = not registered or REGISTRY[name].needs_teacher
        self.paired = registered and REGISTRY[name].paired
        if self.compares_features and teacher is None:
            raise ValueError(
                f"{type(self.loss).__name__} compares features: expected a teacher network"
            )
        if isinstance(self.loss, FeatureLoss) and teacher is not None:
            if self.loss.reuses_classifier and not isinstance(student, ReusedClassifier):
                raise ValueError(
                    f"{type(self.loss).__name__}: the student predicts by the teacher's "
                    "classifier: expected reuse_classifier(student, teacher, images) as the student"
                )
            check_further(self.loss, student, teacher.network)
        self.takes_samples: bool = getattr(self.loss, "takes_samples", False)
        self.samples = 0  # their number, if the loss takes them
        self.connected = not self.compares_features
        self.clock: Callable[[str], AbstractContextManager[None]] = _untimed
        self._use_student()

    def _use_student(self) -> None:
        """Make the network of the forward pass from the student."""
        network = self.student
        if self.compares_features:
            network = WithFeatures(self.student, self.loss.student_further)
        # In a tuple, so that the student's weights are not registered twice.
        self._network: tuple[Any, nn.Module] = (network, self.student)

    def connect(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Create what a loss on features learns, for the shapes that the networks give.

        Any loss is moved to the device of the images. Call it once, before the optimizer is made:
        some losses add parameters here.

        Args:
            images: At least one image [1, channels, H, W] like those of the training.
            labels: The class indices of all training samples, int64 [N], for a loss that keeps a
                memory of them (CRD). Their order gives each sample its index.

        Raises:
            ValueError: The features of student and teacher cannot be compared, or the labels are
                missing.
        """
        if not self.connected:
            self._connect(images[:1], labels)
        if isinstance(self.loss, nn.Module):
            self.loss.to(images.device)

    def _connect(self, one: Tensor, labels: Tensor | None) -> None:
        """Create what the loss learns and keeps; see `connect`. one: [1, channels, H, W]."""
        assert self.teacher is not None and isinstance(self.loss, FeatureLoss)
        loss, teacher = self.loss, self.teacher.network
        if (
            loss.reuses_classifier
            and isinstance(self.student, ReusedClassifier)
            and not self.student.has_classifier_of(teacher)
        ):
            raise ValueError(
                f"{type(loss).__name__}: the student has the classifier of another teacher: "
                "expected reuse_classifier(student, teacher, images) with this teacher"
            )
        with autocast(one.device, self.precision):  # in which the teacher's weights may be
            features = (
                probe_features(self.student, one, loss.student_further),
                probe_features(teacher, one, loss.teacher_further),
            )
        loss.borrow(teacher_layers(teacher, loss.teacher_further))
        loss.connect(*features)
        if self.takes_samples:
            if labels is None:
                raise ValueError(
                    f"{type(loss).__name__} keeps a memory of the training samples: expected "
                    "distiller.connect(images, labels), with the labels of all of them"
                )
            given = torch.as_tensor(labels).cpu()
            if given.is_floating_point() or given.ndim != 1:
                raise ValueError(
                    f"labels is {given.dtype} {list(given.shape)}: expected the class indices of "
                    "all training samples, integers [N]"
                )
            loss.connect_samples(given.long())
            self.samples = len(labels)
        self.connected = True

    def learnt_numbers(self) -> dict[str, float]:
        """Return numbers that the loss has learnt, such as a temperature, by name."""
        return self.loss.learnt() if isinstance(self.loss, LossOfTerms) else {}

    def learnt_by_loss(self) -> list[nn.Parameter]:
        """Return the parameters of the loss, which train with the student and are not kept."""
        return list(self.loss.parameters()) if isinstance(self.loss, nn.Module) else []

    def set_precision(self, precision: Precision) -> None:
        """Set the precision of the forward passes of student and teacher.

        Raises:
            ValueError: It is neither "float32" nor "bfloat16".
        """
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision is {precision!r}: expected 'float32' or 'bfloat16'")
        self.precision = precision
        if self.teacher is not None:
            self.teacher.precision = precision

    def with_terms(self, loss: Tensor) -> Tensor:
        """Return what is reported of the last loss, without gradients.

        Args:
            loss: What the last forward pass returned.

        Returns:
            The loss and its cross-entropy term [2], or the loss alone, a scalar, if it has no such
            term (see `LossOfTerms`).
        """
        ce = getattr(self.loss, "ce_term", None)
        return loss.detach() if ce is None else torch.stack([loss, ce]).detach()

    def keep_graphs(self) -> None:
        """Let both terms of the loss be differentiated, for `take_terms`.

        Raises:
            InputError: The loss has no two terms, or its class overrides `forward`, which could add
                what is in neither of them.
        """
        if not (isinstance(self.loss, LossOfTerms) and self.loss.ce_weight > 0):
            said = self.loss.name if hasattr(self.loss, "name") else type(self.loss).__name__
            raise InputError(
                f"the loss {said} has no two terms, cross-entropy with the labels and another: "
                "expected a loss with a ce_weight above 0"
            )
        if type(self.loss).forward not in (FeatureLoss.forward, DistillationLoss.forward):
            raise InputError(
                f"the forward pass of {type(self.loss).__name__} is its own, so that its two terms "
                "are not known: expected one that overrides distance or losses, but not forward"
            )
        self.loss.keeps_graphs = True

    def take_terms(self) -> tuple[Tensor, Tensor]:
        """Return the terms of the last loss, cross-entropy and the rest, and forget them.

        Raises:
            InputError: It has no two terms, or `keep_graphs` was not called before.
        """
        ce, kd = getattr(self.loss, "ce_term", None), getattr(self.loss, "kd_term", None)
        if ce is None or kd is None:
            raise InputError(
                "the last loss has no two terms: call distiller.keep_graphs() once, with a loss "
                "that adds its cross-entropy by add_cross_entropy"
            )
        self.loss.ce_term, self.loss.kd_term = None, None
        return ce, kd

    def set_epoch(self, epoch: int) -> None:
        """Tell the loss the epoch (from 0), if it has a schedule."""
        if hasattr(self.loss, "set_epoch"):
            self.loss.set_epoch(epoch)

    def compile_student(self) -> None:
        """Compile the student's forward pass with `torch.compile`."""
        # A ragged batch would otherwise change the kernels of the later, whole batches.
        self._network = (torch.compile(self._network[0], dynamic=False), self.student)

    def _outputs(self, name: str, network: nn.Module, images: Tensor) -> Any:
        """Return what a network gives for images; it sees each view of them in its own pass."""
        if not self.paired:
            return network(images)
        return torch.cat([check_logits(name, network(view)) for view in images.chunk(2)])

    def _check_call(
        self, labels: Tensor | MixedLabels, teacher_logits: Tensor | None, index: Tensor | None
    ) -> None:
        """Raise ValueError if the loss cannot use what `forward` got."""
        name = type(self.loss).__name__
        if self.paired and isinstance(labels, MixedLabels):
            raise ValueError(
                f"{name} compares two views of one image, and a mixed image shows two: expected "
                "class indices as labels"
            )
        if self.compares_features and teacher_logits is not None:
            raise ValueError(f"{name} compares features: expected no teacher_logits")
        if not self.connected:
            raise ValueError(
                f"{name} compares features: call distiller.connect(images) once, before the "
                "optimizer is made"
            )
        if self.takes_samples and index is None:
            raise ValueError(
                f"{name} keeps a memory of the training samples: expected "
                "distiller(images, labels, index=...), with the indices of the images"
            )

    def _teacher_outputs(self, images: Tensor) -> Any:
        """Return what the loss takes from the teacher network: features, or logits [B, C]."""
        if self.teacher is None:
            raise ValueError(
                f"{type(self.loss).__name__} needs a teacher: expected a teacher network or "
                "teacher_logits"
            )
        if self.compares_features:
            return self.teacher.features(images, self.loss.teacher_further)
        return self._outputs("teacher", self.teacher, images)

    def forward(
        self,
        images: Tensor,
        labels: Tensor | MixedLabels,
        teacher_logits: Tensor | None = None,
        order: Tensor | None = None,
        teacher_features: Features | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a batch.

        A loss that takes two views of each image, such as `MLKDLoss`, gets 2B rows: those of the
        first views, and then those of the second views in the same order. The networks see one
        view after the other, so that batch norm has the statistics of each view.

        Args:
            images: [B, channels, H, W].
            labels: Class indices, int64 [B], or `MixedLabels` for images that are mixed from two.
                The loss is then the mean of the losses with both labels, weighted by their shares.
            teacher_logits: [B, C]. If given, the teacher network is not used.
            order: The teacher's order of the classes [B, C], as `teacher_order` returns it, for
                losses that rank. It saves them the sorting.
            teacher_features: The teacher's features of the images, as `FrozenTeacher.features`
                returns them, for losses that compare features. If given, the teacher network is
                not used.
            index: The indices of the images among all training samples, int64 [B], for losses that
                keep a memory of them. Other losses do not need it.

        Returns:
            A float32 scalar. Gradients reach the student and the parts that the loss learns.

        Raises:
            ValueError: Shapes or class counts of student, teacher and labels do not fit.
        """
        self._check_call(labels, teacher_logits, index)
        if self._network[1] is not self.student:  # it was replaced by another module
            self._use_student()
        target: Any = teacher_features if self.compares_features else teacher_logits
        if target is None and self.needs_teacher:
            with self.clock("teacher"):
                target = self._teacher_outputs(images)
        with self.clock("student"), autocast(images.device, self.precision):
            outputs = self._outputs("student", self._network[0], images)
        with self.clock("loss"):
            if self.compares_features:
                logits, features = outputs
                samples = {"index": index} if self.takes_samples else {}
                soft = soft_labels(labels, logits)
                return self.loss(logits, soft, features, target, **samples)
            logits = check_logits("student", outputs).float()
            further = {} if order is None else {"order": order}
            if isinstance(labels, MixedLabels):
                logits, target, labels, further["sample_weight"] = twice(logits, target, labels)
            loss = self.loss(logits, target, labels, **further)
        if not isinstance(loss, Tensor) or loss.ndim > 0:
            given = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the loss returned {given}: expected one number, such as a mean")
        return loss


def twice(
    logits: Tensor, teacher: Tensor | None, mixed: MixedLabels
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return mixed samples twice: with the first labels and with the second ones.

    The weighted mean of any loss over these rows is the mean over the samples of
    share * loss(labels) + (1 - share) * loss(others).

    Args:
        logits: Logits of the student [B, C].
        teacher: Logits of the teacher [B, C], or None.
        mixed: The labels of both images, and the share of the first one.

    Returns:
        Logits of student and teacher [2B, C], labels [2B] and weights [2B].
    """
    return (
        torch.cat([logits, logits]),
        None if teacher is None else torch.cat([teacher, teacher]),
        torch.cat([mixed.labels, mixed.others]),
        torch.cat([mixed.share, 1 - mixed.share]),
    )


def soft_labels(labels: Tensor | MixedLabels, logits: Tensor) -> Tensor:
    """Return mixed labels as probabilities [B, C], and others as they are, [B]."""
    if not isinstance(labels, MixedLabels):
        return labels
    found = torch.zeros_like(logits)
    found.scatter_add_(1, labels.labels[:, None], labels.share[:, None])
    return found.scatter_add_(1, labels.others[:, None], 1 - labels.share[:, None])


def _check_modules(student: Any, teacher: Any, loss: Any) -> None:
    """ValueError unless these can be the parts of a distiller."""
    for name, module in (("student", student), ("teacher", teacher)):
        if not isinstance(module, nn.Module) and not (name == "teacher" and module is None):
            raise ValueError(f"{name} is a {type(module).__name__}: expected a torch module")
    if loss is not None and (isinstance(loss, type) or not callable(loss)):
        raise ValueError(f"loss is {loss!r}: expected a loss module, such as PLDLoss()")
    if isinstance(loss, nn.modules.loss._Loss):
        raise ValueError(
            f"loss is a torch.nn.{type(loss).__name__}, which takes no teacher logits: expected a "
            "loss of pld_ray.losses, or a function of (student logits, teacher logits, labels)"
        )
    if teacher is not None:
        shared = set(map(id, student.parameters())) & set(map(id, teacher.parameters()))
        if shared:
            raise ValueError(
                "student and teacher share parameters, which would be frozen with the teacher: "
                "expected two networks; copy.deepcopy makes another"
            )
