"""Augmentation by torchvision, in worker processes.

The transforms of libraries draw from the generators of torch, numpy and Python. A worker process
seeds all three from (seed, view, index) before each image, so that the image is a pure function of
them. Processes are needed because threads share these generators with the training.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pld_ray.config.trial import AUGMENTS
from pld_ray.data.sampling import Ints, random_bits


def transform(names: tuple[str, ...]) -> Callable[[Tensor], Tensor]:
    """Return the transform of uint8 images [channels, H, W] with these names, in this order."""
    from torchvision.transforms import v2

    made = {
        "randaugment": v2.RandAugment,
        "autoaugment": v2.AutoAugment,
        "trivialaugment": v2.TrivialAugmentWide,
        "random_erasing": v2.RandomErasing,
        "color_jitter": lambda: v2.ColorJitter(0.4, 0.4, 0.4),
    }
    assert made.keys() == set(AUGMENTS)
    return v2.Compose([made[name]() for name in names])


def seed_everything(seed: int, view: int, index: int) -> None:
    """Seed the generators of torch, numpy and Python for one image."""
    bits = int(random_bits(seed, view, np.array([index]), "library")[0])
    torch.manual_seed(bits >> 1)  # torch takes 63 bits
    np.random.seed(bits & 0xFFFFFFFF)
    random.seed(bits)


class _Batches(Dataset[Tensor]):
    """Batches by the indices of their images."""

    def __init__(
        self, read: Callable[[Ints], Tensor], names: tuple[str, ...], seed: int, view: int
    ) -> None:
        self.read, self.names, self.seed, self.view = read, names, seed, view
        self.change: Callable[[Tensor], Tensor] | None = None

    def __getitem__(self, index: Any) -> Tensor:
        change = self.change = self.change or transform(self.names)
        images = self.read(index)
        for slot, i in enumerate(index.tolist()):
            seed_everything(self.seed, self.view, i)
            images[slot] = change(images[slot].permute(2, 0, 1)).permute(1, 2, 0)
        return images


def augmented(
    read: Callable[[Ints], Tensor],
    names: tuple[str, ...],
    shares: list[Ints],
    seed: int,
    view: int,
) -> Iterator[Tensor]:
    """Yield batches of augmented images, computed in advance by one process per core.

    Args:
        read: Returns the images of some indices, uint8 [B, H, W, channels], in a new tensor.
        names: The names of the transforms, in order.
        shares: The indices of each batch, [B].
        seed: The random seed.
        view: The index of the augmentation.

    Yields:
        Images, uint8 [B, H, W, channels].
    """
    loader: Any = DataLoader(
        _Batches(read, names, seed, view),
        batch_size=None,  # an item is a batch
        sampler=shares,
        num_workers=int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
        generator=torch.Generator(),  # else it draws from that of the training
    )
    yield from loader
