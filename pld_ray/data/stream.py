"""Batches of augmented images, as a pure function of (seed, view, index)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from pld_ray.config.parts import Data
from pld_ray.data.augmentation import below, crop_and_flip, crop_draws
from pld_ray.data.drawn import DrawnImages
from pld_ray.data.encoded import EncodedImages, prefetch
from pld_ray.data.images import Images
from pld_ray.data.mixing import MixedLabels, draw_mix, mix_images, partners
from pld_ray.data.sampling import Ints, random_bits
from pld_ray.data.workers import augmented


class Stream:
    """Batches of normalised images on a device.

    On an accelerator, a uint8 array is copied to the device once. On the CPU, all trials share the
    array. Encoded images are decoded batch by batch, in advance.

    Args:
        images: The dataset.
        data: The settings of the augmentation.
        seed: The random seed of the augmentation.
        device: The device of the batches.
        layout: The memory format of the batches.
    """

    def __init__(
        self,
        images: Images,
        data: Data,
        seed: int,
        device: torch.device,
        layout: torch.memory_format = torch.channels_last,
    ) -> None:
        self.seed, self.data, self.device, self.layout = seed, data, device, layout
        self.pixels = {"train": images.train, "val": images.val}
        self.labels = {
            "train": torch.from_numpy(images.train_labels.copy()).to(device),
            "val": torch.from_numpy(images.val_labels.copy()).to(device),
        }
        self.on_device = {
            split: torch.from_numpy(array.copy()).to(device)
            for split, array in self.pixels.items()
            if device.type != "cpu" and isinstance(array, np.ndarray)
        }
        mean, std = torch.tensor(images.mean), torch.tensor(images.std)
        self.scale = (1 / (255 * std)).to(device)
        self.shift = (-mean / std).to(device)

    def train(
        self, shares: Iterable[Ints], view: int
    ) -> Iterator[tuple[Tensor, Tensor | MixedLabels]]:
        """Yield augmented training batches.

        Args:
            shares: The indices of samples of each batch, [B]: this worker's share of the batch.
            view: The index of the augmentation.

        Yields:
            Images, float32 [B, channels, H, W], and labels, int64 [B], or `MixedLabels` if the
            images are mixed.
        """
        shares = list(shares)
        if self.data.mixes:
            yield from self._mixed(shares, view)
            return
        for index, images in zip(shares, self._seen(shares, view), strict=True):
            yield self._normalise(images), self.labels["train"][self._put(index)]

    def val(self, shares: Iterable[Ints]) -> Iterator[Tensor]:
        """Return an iterator over validation batches, without augmentation.

        Args:
            shares: The indices of samples of each batch, [B].

        Returns:
            An iterator over images, float32 [B, channels, H, W].
        """
        return map(self._normalise, self._gather("val", shares, 0))

    def _mixed(
        self, shares: list[Ints], view: int
    ) -> Iterator[tuple[Tensor, Tensor | MixedLabels]]:
        """Yield batches of images that are mixed with their partners."""
        pixels, labels = self.pixels["train"], self.labels["train"]
        partner = partners(self.seed, view, len(pixels))
        needed = [np.unique(np.concatenate([index, partner[index]])) for index in shares]
        for index, there, seen in zip(shares, needed, self._seen(needed, view), strict=True):
            images = self._normalise(seen)
            first, second = (
                self._put(np.searchsorted(there, each)) for each in (index, partner[index])
            )
            mix = draw_mix(self.data, self.seed, view, index, pixels.shape[1])
            share = torch.from_numpy(mix.share).float().to(self.device, non_blocking=True)
            mixed = mix_images(images[first], images[second], mix)
            ours, others = (labels[self._put(each)] for each in (index, partner[index]))
            mixed = mixed.contiguous(memory_format=self.layout)
            yield mixed, MixedLabels(ours, others, share)

    def _seen(self, shares: list[Ints], view: int) -> Iterator[Tensor]:
        """Yield the training images of each share after augmentation, uint8 [B, H, W, channels]."""
        if self.data.augment or isinstance(self.pixels["train"], DrawnImages):

            def read(index: Ints) -> Tensor:
                return self._cropped(self._read("train", index, view), index, view).clone()

            for images in augmented(read, self.data.augment, shares, self.seed, view):
                yield images.to(self.device, non_blocking=True)
            return
        for index, images in zip(shares, self._gather("train", shares, view), strict=True):
            yield self._cropped(images, index, view)

    def _cropped(self, images: Tensor, index: Ints, view: int) -> Tensor:
        """Pad, crop and mirror images as the settings say, uint8 [B, H, W, channels]."""
        pad, flip = self.data.pad, self.data.flip
        if not pad and not flip:
            return images
        bits = random_bits(self.seed, view, index, "augment")
        if not pad:
            chosen = torch.from_numpy(below(bits, 48, 2) == 1).to(images.device)
            return torch.where(chosen[:, None, None, None], images.flip(2), images)
        top = below(bits, 0, 2 * pad + 1)
        left = below(bits, 24, 2 * pad + 1)
        mirrored = below(bits, 48, 2) if flip else np.zeros_like(top)
        places = (
            torch.from_numpy(x).to(images.device, non_blocking=True) for x in (top, left, mirrored)
        )
        return crop_and_flip(images, pad, *places)

    def _gather(self, split: str, shares: Iterable[Ints], view: int) -> Iterator[Tensor]:
        """Yield the images of each share on the device, uint8 [B, H, W, channels]."""
        pixels = self.pixels[split]
        if not isinstance(pixels, np.ndarray):

            def read(index: Ints) -> Tensor:
                return self._read(split, index, view)

            ahead = (
                prefetch(read, shares)
                if isinstance(pixels, EncodedImages)
                else augmented(read, (), list(shares), self.seed, view)
            )
            for images in ahead:
                yield images.to(self.device, non_blocking=True)
            return
        for index in shares:
            if split in self.on_device:
                yield self.on_device[split][self._put(index)]
            else:
                yield self._read(split, index, view)

    def _read(self, split: str, index: Ints, view: int) -> Tensor:
        """Return images in the memory of the host, uint8 [B, H, W, channels]."""
        pixels = self.pixels[split]
        if isinstance(pixels, DrawnImages):
            return pixels.draw(index, self.seed if split == "train" else 0, view)
        if not isinstance(pixels, EncodedImages):
            return torch.from_numpy(pixels[index])
        drawn = split == "train" and self.data.random_resized_crop
        draws = crop_draws(self.seed, view, index) if drawn else None
        return torch.from_numpy(pixels.decode(index, draws))

    def _put(self, x: Ints) -> Tensor:
        """Copy an array to the device."""
        return torch.from_numpy(x).to(self.device, non_blocking=True)

    def _normalise(self, images: Tensor) -> Tensor:
        """Normalise uint8 [B, H, W, channels] to float32 [B, channels, H, W] in the layout.

        Floating-point images are normalised already.
        """
        if images.is_floating_point():
            return images.permute(0, 3, 1, 2).contiguous(memory_format=self.layout)
        batch, height, width, channels = images.shape
        # As rows of width * channels numbers: steps over the channels alone are not vectorised.
        x = images.reshape(batch, height, width * channels).float()
        x.mul_(self.scale.repeat(width)).add_(self.shift.repeat(width))
        x = x.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return x.contiguous(memory_format=self.layout)
