"""A loss, a network and a dataset of your own, for the experiment own_method.yaml."""

from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from sklearn.datasets import load_digits
from timm.models import register_model

from pld_ray import DistillationLoss, register_dataset, register_loss


@register_loss("huber", label="Huber")
class HuberLoss(DistillationLoss):
    """Huber distance of the logits, without their mean."""

    def __init__(self, delta: Annotated[float, Field(gt=0)] = 1.0) -> None:
        super().__init__()
        self.delta = delta

    def losses(self, student, teacher, labels, kept):
        """Return the loss of each sample: [N, C], [N, C], [N] to [N]."""
        s, t = (x - x.mean(1, keepdim=True) for x in (student, teacher))
        return F.huber_loss(s, t, reduction="none", delta=self.delta).sum(1)


@register_model
def two_layers(pretrained=False, num_classes=10, in_chans=1, img_size=8, width=64, **_):
    """A perceptron; `width` can be set with `student: {name: two_layers, args: {width: 32}}`."""
    layers = torch.nn.Linear(in_chans * img_size**2, width), torch.nn.Linear(width, num_classes)
    return torch.nn.Sequential(torch.nn.Flatten(), layers[0], torch.nn.ReLU(), layers[1])


class Digits(torch.utils.data.Dataset):
    """Handwritten digits, with noise from one of the generators that are seeded for each image."""

    def __init__(self, rows: slice, noise: float) -> None:
        digits = load_digits()
        self.images, self.targets = digits.images[rows] * 15, digits.target[rows]
        self.noise = noise

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        image = self.images[i]
        if self.noise:
            image = image + self.noise * np.random.normal(size=image.shape)
        return image.clip(0, 255).astype(np.uint8), int(self.targets[i])


@register_dataset("noisy_digits")
def noisy_digits(data, path):
    """A training and a validation dataset; `path` is what follows a colon in data.name."""
    return Digits(slice(1437), noise=20), Digits(slice(1437, None), noise=0)
