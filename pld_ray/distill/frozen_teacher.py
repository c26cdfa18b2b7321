"""A teacher's forward pass: no gradients, evaluation mode, logits and features in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pld_ray.distill.device import Precision, autocast
from pld_ray.losses.feature_loss import Features
from pld_ray.models.features import WithFeatures


class FrozenTeacher(nn.Module):
    """A teacher that stays in evaluation mode, takes no gradients and returns float32.

    Args:
        network: Maps images [B, channels, H, W] to logits [B, C]. Its parameters are frozen.
        renormalize: A module that is applied to the images first, such as
            `pld_ray.models.factory.Renormalize`, if the teacher was trained with another mean and
            standard deviation than the student.
        precision: "float32", or "bfloat16" for a forward pass under autocast.

    Attributes:
        images_seen: The number of images that went through the network.
    """

    def __init__(
        self,
        network: nn.Module,
        renormalize: nn.Module | None = None,
        precision: Precision = "float32",
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.renormalize = renormalize
        self.precision = precision
        self.images_seen = 0
        # whether the pass for these further features gives the same logits
        self.one_pass: dict[frozenset[str], bool] = {}

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stay in evaluation mode: dropout is off, batch norm uses its running statistics."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, C] of images [B, channels, H, W]."""
        return check_logits("teacher", self._run(self.network, images)).float()

    def features(self, images: Tensor, further: frozenset[str] = frozenset()) -> Features:
        """Return the features that losses compare, of images [B, channels, H, W].

        Args:
            images: [B, channels, H, W].
            further: The names of the features beyond `stages` and `pooled`; see `FeatureLoss`.
        """
        return self._run(WithFeatures(self.network, further), images)[1]

    def logits_and_features(
        self, images: Tensor, further: frozenset[str] = frozenset()
    ) -> tuple[Tensor, Features]:
        """Return what `forward` and `features` return, to the bit.

        One pass gives both, unless the first call with these features finds that its logits are not
        those of `forward`.
        """
        logits, features = self._run(WithFeatures(self.network, further), images)
        if self.one_pass.get(further):
            return logits.float(), features
        expected = self(images)
        if further not in self.one_pass:
            self.one_pass[further] = torch.equal(expected, logits.float())
        return expected, features

    @torch.no_grad()
    def _run(self, network: nn.Module, images: Tensor) -> Any:
        self.images_seen += len(images)
        with autocast(images.device, self.precision):
            return network(images if self.renormalize is None else self.renormalize(images))


def check_logits(name: str, outputs: Any) -> Tensor:
    """Return what a network returned if it is a tensor.

    Raises:
        ValueError: It is something else, such as an object that holds the logits.
    """
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"the {name} returned a {type(outputs).__name__}: expected logits [B, C]; wrap it in a "
            "module that returns them"
        )
    return outputs
