"""Crops and flips, as pure functions of (seed, view, sample index)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pld_ray.data.image_files import Box
from pld_ray.data.sampling import Hashes, Ints, random_bits

if TYPE_CHECKING:
    from torch import Tensor


TRIES = 10  # draws of a random crop before the largest central crop is used instead
AREA = (0.08, 1.0)  # area of a crop as a fraction of the image
RATIO = (3 / 4, 4 / 3)  # width over height

Draws = npt.NDArray[np.float64]


def crop_draws(seed: int, view: int, index: Ints) -> Draws:
    """Draw the random numbers for the random resized crops of a batch.

    Args:
        seed: The random seed.
        view: The index of the augmentation.
        index: The indices of samples, [B].

    Returns:
        Numbers in [0, 1), float64 [B, TRIES, 4].
    """
    bits = np.stack([random_bits(seed, view, index, f"crop{i}") for i in range(TRIES)], 1)
    fields = bits[..., None] >> (np.arange(4, dtype=np.uint64) * np.uint64(16))
    return (fields & np.uint64(0xFFFF)).astype(np.float64) / 2**16


def centre(width: int, height: int, part: float) -> Box:
    """Return the central square of an image.

    Args:
        width: The width of the image in pixels.
        height: The height of the image in pixels.
        part: The side of the square as a fraction of the shorter side of the image.

    Returns:
        Left, top, right and bottom of the square in pixels.
    """
    side = max(1, round(min(width, height) * part))
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def crop(width: int, height: int, draws: list[list[float]]) -> Box:
    """Return the first random crop that fits into the image, as in RandomResizedCrop (torchvision).

    If no crop fits, the largest central crop within the bounds of the aspect ratio is returned.

    Args:
        width: The width of the image in pixels.
        height: The height of the image in pixels.
        draws: Numbers in [0, 1), [TRIES, 4]: area, aspect ratio, horizontal and vertical position.

    Returns:
        Left, top, right and bottom of the crop in pixels.
    """
    for area, ratio, x, y in draws:
        pixels = width * height * (AREA[0] + area * (AREA[1] - AREA[0]))
        aspect = math.exp(math.log(RATIO[0]) + ratio * (math.log(RATIO[1]) - math.log(RATIO[0])))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def below(bits: Hashes, shift: int, limit: int) -> Ints:
    """Convert 16 random bits to an integer in [0, limit).

    Args:
        bits: Random bits, uint64 [B].
        shift: The position of the lowest of the 16 bits.
        limit: The exclusive upper bound.

    Returns:
        Integers, int64 [B].
    """
    field = (bits >> np.uint64(shift)) & np.uint64(0xFFFF)
    return (field % np.uint64(limit)).astype(np.int64)


def crop_and_flip(images: Tensor, pad: int, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Zero-pad images, crop them to their original size, and mirror some of them.

    Args:
        images: Images, uint8 [B, H, W, channels].
        pad: The padding on each side in pixels.
        top: The top of each crop in the padded image, in [0, 2 pad], int64 [B].
        left: The left side of each crop in the padded image, in [0, 2 pad], int64 [B].
        flip: 1 for images that are mirrored horizontally, else 0, int64 [B].

    Returns:
        Images, uint8 [B, H, W, channels].
    """
    import torch  # imported here, because a plan needs this module but must not load torch

    batch, height, width, _ = images.shape
    rows = top[:, None] + torch.arange(height, device=images.device)  # [B, H]
    columns = torch.arange(width, device=images.device)
    columns = torch.where(flip[:, None] == 1, width - 1 - columns, columns) + left[:, None]
    padded = torch.nn.functional.pad(images, (0, 0, pad, pad, pad, pad))
    sample = torch.arange(batch, device=images.device)[:, None, None]
    return padded[sample, rows[:, :, None], columns[:, None, :]]
