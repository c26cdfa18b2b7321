"""Images whose transforms draw from the generators of torch, numpy and Python, from processes.

A worker process seeds all three from (seed, view, index) before each image, so that the image is a
pure function of them. Processes are needed because threads share these generators with the
training.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pld_ray.config.parts import AUGMENTS
from pld_ray.data.drawn import image_seeds, seed_everything
from pld_ray.data.sampling import Ints
from pld_ray.errors import InputError

GREY = 127  # of 255


def transform(names: tuple[str, ...]) -> Callable[[Tensor], Tensor]:
    """Return the transform of uint8 images [channels, H, W] with these names, in this order."""
    from torchvision.transforms import v2

    made = {
        "randaugment": v2.RandAugment,
        "autoaugment": v2.AutoAugment,
        "trivialaugment": v2.TrivialAugmentWide,
        "random_erasing": v2.RandomErasing,
        "color_jitter": lambda: v2.ColorJitter(0.4, 0.4, 0.4),
        "cutout": lambda: cutout,
    }
    assert made.keys() == set(AUGMENTS) - {"own"}
    return v2.Compose([made[name]() for name in names])


def cutout(image: Tensor) -> Tensor:
    """Fill a square of an image with grey (DeVries and Taylor 2017, "Cutout").

    Its side is uniform between 0 and half the shorter side of the image, as in the strong views of
    Jin et al. 2023. Its centre is uniform in the image; what lies outside of the image is left out.

    Args:
        image: An image, uint8 [channels, H, W].
    """
    height, width = image.shape[1:]
    side, y, x = torch.rand(3).tolist()
    half = side * min(height, width) / 4
    rows = slice(max(0, round(y * height - half)), round(y * height + half))
    columns = slice(max(0, round(x * width - half)), round(x * width + half))
    image = image.clone()
    image[:, rows, columns] = GREY
    return image


class _Batches(Dataset[Any]):
    """Batches by the indices of their images; the error instead if a batch cannot be read."""

    def __init__(
        self, read: Callable[[Ints], Tensor], names: tuple[str, ...], seed: int, view: int
    ) -> None:
        self.read, self.seed, self.view = read, seed, view
        self.names = tuple(name for name in names if name != "own")
        self.change: Callable[[Tensor], Tensor] | None = None

    def __getitem__(self, index: Any) -> Tensor | InputError:
        try:
            images = self.read(index)
        except InputError as error:  # a loader would add a traceback to its message
            return error
        if not self.names:
            return images
        change = self.change = self.change or transform(self.names)
        for slot, bits in enumerate(image_seeds(self.seed, self.view, index, "library")):
            seed_everything(bits)
            images[slot] = change(images[slot].permute(2, 0, 1)).permute(1, 2, 0)
        return images


def augmented(
    read: Callable[[Ints], Tensor],
    names: tuple[str, ...],
    shares: list[Ints],
    seed: int,
    view: int,
) -> Iterator[Tensor]:
    """Yield batches of images, computed in advance by one process per core.

    Args:
        read: Returns the images of some indices, uint8 [B, H, W, channels], in a new tensor.
        names: The names of the transforms that change the images, in order.
        shares: The indices of each batch, [B].
        seed: The random seed.
        view: The index of the augmentation.

    Yields:
        Images, as `read` gives them.

    Raises:
        InputError: A batch cannot be read.
    """
    loader: Any = DataLoader(
        _Batches(read, names, seed, view),
        batch_size=None,  # an item is a batch
        sampler=shares,
        num_workers=int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
        generator=torch.Generator(),  # else it draws from that of the training
    )
    for images in loader:
        if isinstance(images, InputError):
            raise images
        yield images
