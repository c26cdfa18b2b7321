"""A student that predicts by the classifier of its teacher, as SimKD trains it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, build_model_with_cfg, register_model
from torch import Tensor, nn

from pld_ray.errors import InputError
from pld_ray.losses.feature_loss import average_pool
from pld_ray.models.features import check_linear_head, feature_stages, probe_features


class ReusedClassifier(nn.Module):
    """A network whose last feature map is projected to that of a teacher, for its classifier.

        images -> network -> map -> projector -> average pooling -> classifier of the teacher

    It has the methods of a timm network. Its last feature map is the projected one.

    Args:
        network: A network that ends with average pooling and a linear layer. It loses this layer.
        inputs: The number of channels of its last feature map.
        width: The number of channels of the teacher's map.
        size: Height and width of the teacher's map. Larger maps are average-pooled to it.
        classes: The number of classes.
        factor: The projector has width / factor channels, rounded down.

    Attributes:
        classifier: The last layer. It is frozen, and random until it is loaded or `copy_classifier`
            is called.
    """

    has_linear_head = True

    def __init__(
        self,
        network: nn.Module,
        inputs: int,
        width: int,
        size: tuple[int, int],
        classes: int,
        factor: int,
    ) -> None:
        super().__init__()
        if type(factor) is not int or factor < 1:
            raise InputError(f"simkd: factor is {factor!r}: expected a whole number from 1")
        if factor > width:
            raise InputError(
                f"simkd: factor is {factor}: expected at most the {width} channels of the "
                "teacher's last feature map"
            )
        _remove_classifier(network)
        self.network: Any = network
        middle = width // factor
        self.projector = nn.Sequential(
            *_layer(inputs, middle, 1), *_layer(middle, middle, 3), *_layer(middle, width, 1)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, classes).requires_grad_(False)
        self.size = size
        self.taps = feature_stages(network)
        self.num_features, self.num_classes = width, classes

    def copy_classifier(self, teacher: nn.Module) -> None:
        """Copy the classifier of a teacher.

        Raises:
            InputError: It has another number of classes.
        """
        theirs: nn.Linear = teacher.get_classifier()  # type: ignore[operator]
        if theirs.out_features != self.num_classes:
            raise InputError(
                f"simkd: the teacher has {theirs.out_features} classes, but the student has "
                f"{self.num_classes}; expected the same number of classes"
            )
        state = theirs.state_dict()
        if theirs.bias is None:
            state["bias"] = torch.zeros(self.num_classes)
        self.classifier.load_state_dict(state)

    def has_classifier_of(self, teacher: nn.Module) -> bool:
        """Return whether the classifier is that of this teacher, whose weights may be bfloat16."""
        theirs: nn.Linear = teacher.get_classifier()  # type: ignore[operator]
        bias = torch.zeros(1) if theirs.bias is None else theirs.bias
        return all(
            torch.equal(own.to(other), other)
            for own, other in (
                (self.classifier.weight, theirs.weight),
                (self.classifier.bias, bias.expand(theirs.out_features)),
            )
        )

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.classifier

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images [B, channels, H, W] to the projected feature map [B, width, h, w]."""
        return self._project(self.network.forward_features(x))

    def forward_intermediates(self, x: Tensor, indices: list[int]) -> tuple[Tensor, list[Tensor]]:
        """Return the projected feature map, and the outputs of stages of the network."""
        last, stages = self.network.forward_intermediates(x, indices=indices)
        return self._project(last), stages

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map the projected feature map to logits [B, C], or to pooled features [B, width]."""
        x = self.pool(x).flatten(1)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, channels, H, W] to logits [B, C]."""
        return self.forward_head(self.forward_features(x))

    def _project(self, x: Tensor) -> Tensor:
        size = min(x.shape[2], self.size[0]), min(x.shape[3], self.size[1])
        return self.projector(x if x.shape[2:] == size else average_pool(x, *size))


def _layer(inputs: int, outputs: int, size: int) -> Iterator[nn.Module]:
    """Yield a convolution without bias, its batch normalisation and a ReLU."""
    yield nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    yield nn.BatchNorm2d(outputs)
    yield nn.ReLU()


def _remove_classifier(network: Any) -> None:
    """Replace the last linear layer of a network by the identity."""
    last = network.get_classifier()
    for parent in network.modules():
        for name, child in parent.named_children():
            if child is last:
                setattr(parent, name, nn.Identity())


def reuse_classifier(
    student: nn.Module, teacher: nn.Module, images: Tensor, factor: int = 2
) -> ReusedClassifier:
    """Return a student for `SimKDLoss`, which predicts by the classifier of its teacher.

    Args:
        student: A network that ends with average pooling and a linear layer, which it loses.
        teacher: A network that ends in the same way; its last layer is copied.
        images: Images like those of the training; the first one gives the shapes.
        factor: The projector has the channels of the teacher's map divided by this.

    Raises:
        InputError: A network ends in another way, or `factor` is too large.

    Example:
        >>> student = reuse_classifier(student, teacher, images)
        >>> distiller = Distiller(student, teacher, SimKDLoss())
    """
    shapes = map_shapes(student, teacher, images)
    classes: Any = teacher.num_classes
    made = ReusedClassifier(student, *shapes, classes, factor).to(images.device)
    made.copy_classifier(teacher)
    return made


def map_shapes(
    student: nn.Module, teacher: nn.Module, images: Tensor
) -> tuple[int, int, tuple[int, int]]:
    """Return the channels of the student's last map, and channels and size of the teacher's.

    Args:
        student: The student.
        teacher: The teacher.
        images: [B, channels, H, W], of which the first one gives the shapes.

    Raises:
        InputError: A network does not end with average pooling and a linear layer.
    """
    shapes = []
    for network in (student, teacher):
        check_linear_head("simkd", network)
        (last,) = probe_features(network, images[:1], frozenset({"last"})).further["last"]
        shapes.append(last.shape)
    return shapes[0][1], shapes[1][1], (shapes[1][2], shapes[1][3])


@register_model
def reused_classifier(
    pretrained: bool = False,
    *,
    student: str,
    inputs: int,
    width: int,
    size: tuple[int, int],
    factor: int = 2,
    student_args: dict[str, Any] | None = None,
    **kwargs: Any,
) -> ReusedClassifier:
    """A student of SimKD, which predicts by the classifier of its teacher."""
    own: dict[str, Any] = {"student": student, "student_args": student_args or {}}
    own |= {"inputs": inputs, "width": width, "size": list(size), "factor": factor}

    def make(num_classes: int, in_chans: int) -> ReusedClassifier:
        shape = {"num_classes": num_classes, "in_chans": in_chans}
        network = timm.create_model(student, **shape, **own["student_args"])
        made = ReusedClassifier(network, inputs, width, (size[0], size[1]), num_classes, factor)
        made.model_args = own  # type: ignore[assignment]
        return made

    kwargs["pretrained_cfg"] = kwargs.get("pretrained_cfg") or PretrainedCfg(
        num_classes=100, input_size=(3, 32, 32), classifier="classifier"
    )
    return build_model_with_cfg(make, "reused_classifier", pretrained, **kwargs)
