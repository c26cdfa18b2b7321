"""Mixup and CutMix, as pure functions of (seed, view, sample index)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from pld_ray.config.parts import Data
from pld_ray.data.sampling import Ints, order, random_bits

if TYPE_CHECKING:
    from torch import Tensor

Floats = npt.NDArray[np.float64]


class MixedLabels(NamedTuple):
    """The labels of images that are mixed from two images.

    Attributes:
        labels: The class indices of the first images, int64 [B].
        others: The class indices of the second images, int64 [B].
        share: The share of the first image in each mixed image, in [0, 1], float32 [B].
    """

    labels: Tensor
    others: Tensor
    share: Tensor


class Mix(NamedTuple):
    """How each image of a batch is mixed with its partner.

    Attributes:
        share: The share of the image itself, in [0, 1], float64 [B].
        box: For CutMix, the part that the partner fills: left, top, right and bottom in pixels,
            int64 [B, 4]. It is empty for images that are mixed by Mixup.
        cut: Whether the image is mixed by CutMix, bool [B].
    """

    share: Floats
    box: Ints
    cut: npt.NDArray[np.bool_]


def partners(seed: int, view: int, size: int) -> Ints:
    """Return the partner of each sample: samples that follow each other in an epoch are pairs.

    Both images of a pair are then mostly in the same batch, and neither is decoded twice. With an
    odd number of samples, the last one in the order is its own partner.

    Args:
        seed: The random seed.
        view: The index of the augmentation.
        size: The number of samples.

    Returns:
        The index of the partner of each sample, [size].
    """
    samples = order(seed, view, size)
    found = np.empty(size, np.int64)
    found[samples] = samples[np.minimum(np.arange(size) ^ 1, size - 1)]
    return found


def draw_mix(data: Data, seed: int, view: int, index: Ints, side: int) -> Mix:
    """Draw how the images of a batch are mixed.

    The share is drawn from Beta(alpha, alpha) (Zhang et al. 2018, "mixup"). For CutMix, the partner
    fills a box with the area 1 - share, whose centre is uniform; the share is then that of the
    pixels that are left (Yun et al. 2019, "CutMix"). If both are set, each image has one of them
    with equal probability.

    Args:
        data: The settings: `mixup` and `cutmix` hold the alphas.
        seed: The random seed.
        view: The index of the augmentation.
        index: The indices of samples, [B].
        side: The side of the images in pixels.
    """
    from scipy.special import betaincinv  # importing scipy takes a moment

    alphas = np.array([data.mixup or 0.0, data.cutmix or 0.0])
    uniform, choice, x, y = (
        (random_bits(seed, view, index, f"mix{i}") >> np.uint64(11)).astype(np.float64) / 2**53
        for i in range(4)
    )
    cut = np.full(len(index), alphas[0] == 0) if 0 in alphas else choice < 0.5
    alpha = np.where(cut, alphas[1], alphas[0])
    share = betaincinv(alpha, alpha, uniform)
    half = np.sqrt(1 - share) / 2
    edges = [(c + sign * half) * side for sign in (-1, 1) for c in (x, y)]
    box = np.stack(edges, 1).round().clip(0, side).astype(np.int64)
    box[~cut] = 0
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    return Mix(np.where(cut, 1 - area / side**2, share), box, cut)


def mix_images(images: Tensor, others: Tensor, box: Tensor, weight: Tensor) -> Tensor:
    """Mix images with their partners.

    Args:
        images: Images, float32 [B, channels, H, W].
        others: Their partners, float32 [B, channels, H, W].
        box: The part that the partner fills, int64 [B, 4], as in `Mix`.
        weight: The weight of the image itself in the rest, float32 [B].

    Returns:
        Images, float32 [B, channels, H, W].
    """
    import torch

    left, top, right, bottom = box.T[:, :, None]
    place = torch.arange(images.shape[-1], device=images.device)
    rows = (place >= top) & (place < bottom)  # [B, H]
    columns = (place >= left) & (place < right)  # [B, W]
    inside = (rows[:, :, None] & columns[:, None, :])[:, None]
    weight = weight[:, None, None, None]
    return torch.where(inside, others, images * weight + others * (1 - weight))
