"""Crops and flips, as pure functions of (seed, view, sample index)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pld_ray.data.sampling import Hashes, Ints, random_bits

if TYPE_CHECKING:
    from torch import Tensor


TRIES = 10  # of a crop, before the largest central one is taken
AREA = (0.08, 1.0)  # of the image
RATIO = (3 / 4, 4 / 3)  # width over height

Draws = npt.NDArray[np.float64]
Box = tuple[int, int, int, int]  # left, top, right, bottom


def crop_draws(seed: int, view: int, index: Ints) -> Draws:
    """Numbers [B, TRIES, 4] in [0, 1) for the random resized crops of some images."""
    bits = np.stack([random_bits(seed, view, index, f"crop{i}") for i in range(TRIES)], 1)
    fields = bits[..., None] >> (np.arange(4, dtype=np.uint64) * np.uint64(16))
    return (fields & np.uint64(0xFFFF)).astype(np.float64) / 2**16


def centre(width: int, height: int, part: float) -> tuple[float, float, float, float]:
    """The central square whose side is `part` of the shorter side of the image."""
    side = min(width, height) * part
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def crop(width: int, height: int, draws: list[list[float]]) -> Box:
    """The first of the tries that fits: a part of the area, of a ratio, somewhere in the image.

    draws: of each try four numbers in [0, 1). As torchvision's RandomResizedCrop has it.
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
    """A number in [0, limit) from the bits above `shift`."""
    field = (bits >> np.uint64(shift)) & np.uint64(0xFFFF)
    return (field % np.uint64(limit)).astype(np.int64)


def crop_and_flip(images: Tensor, pad: int, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Zero-pad by `pad`, crop at (top, left), mirror where flip is 1.

    images uint8 [B, H, W, channels]; top, left in [0, 2 pad], flip in {0, 1}: int64 [B].
    """
    import torch  # here, because a plan needs this module and must not wait for torch

    batch, height, width, _ = images.shape
    rows = top[:, None] + torch.arange(height, device=images.device)  # [B, H]
    columns = torch.arange(width, device=images.device)
    columns = torch.where(flip[:, None] == 1, width - 1 - columns, columns) + left[:, None]
    padded = torch.nn.functional.pad(images, (0, 0, pad, pad, pad, pad))
    sample = torch.arange(batch, device=images.device)[:, None, None]
    return padded[sample, rows[:, :, None], columns[:, None, :]]
