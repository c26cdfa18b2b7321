"""Batches of augmented images, as a pure function of (seed, view, index)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
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


@dataclass(frozen=True)
class Batch:
    """A training batch whose images are made on its device, from what differs between batches.

    Attributes:
        given: Tensors on the device: indices or uint8 images, then the places of their crops.
        make: Turns them into images, float32 [B, channels, H, W]. It waits for nothing.
        labels: Labels, int64 [B], or `MixedLabels` if the images are mixed.
        index: The indices of the samples, int64 [B], for losses that take them.
    """

    given: tuple[Tensor, ...]
    make: Callable[..., Tensor]
    labels: Tensor | MixedLabels
    index: Tensor | None = None

    @property
    def images(self) -> Tensor:
        """Make the images."""
        return self.make(*self.given)

    def copy(self) -> Batch:
        """Return a batch whose tensors are copies."""
        labels = self.labels
        if isinstance(labels, MixedLabels):
            copied: Tensor | MixedLabels = MixedLabels(*(part.clone() for part in labels))
        else:
            copied = labels.clone()
        index = None if self.index is None else self.index.clone()
        return Batch(tuple(x.clone() for x in self.given), self.make, copied, index)


@dataclass(frozen=True)
class _Joined:
    """Makes the images of two batches; equal to another one that makes them in the same way.

    Attributes:
        first: Makes the images of the first batch.
        second: Makes those of the second batch.
        given: The number of tensors that the first batch gives.
    """

    first: Callable[..., Tensor]
    second: Callable[..., Tensor]
    given: int

    def __call__(self, *given: Tensor) -> Tensor:
        images = self.first(*given[: self.given]), self.second(*given[self.given :])
        return torch.cat(images)


def joined(batches: Sequence[Batch]) -> Batch:
    """Return the batch [2B] of the first and the second views of the same images, in this order.

    Args:
        batches: The batch [B] of each view, with labels that are not mixed; a single one is
            returned as it is.
    """
    if len(batches) == 1:
        return batches[0]
    first, second = batches
    assert isinstance(first.labels, Tensor) and isinstance(second.labels, Tensor)
    make = _Joined(first.make, second.make, len(first.given))
    return Batch((*first.given, *second.given), make, torch.cat([first.labels, second.labels]))


class Stream:
    """Batches of normalised images on a device.

    On an accelerator, a uint8 array is copied to the device once if it takes at most a quarter of
    the free memory. What an epoch draws for such images is copied before its first batch, so that
    no batch waits for the host. Otherwise all trials share the array in the memory of the host.
    Encoded images are decoded batch by batch, in advance.

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
        self.on_device: dict[str, Tensor] = {}
        self.mixers: dict[Any, Callable[..., Tensor]] = {}  # one for each way to make images
        for split, array in self.pixels.items():
            if isinstance(array, np.ndarray) and array.nbytes <= free_memory(device) / 4:
                self.on_device[split] = torch.from_numpy(array.copy()).to(device)
        mean, std = torch.tensor(images.mean), torch.tensor(images.std)
        self.scale = (1 / (255 * std)).to(device)
        self.shift = (-mean / std).to(device)

    def with_data(self, data: Data) -> Stream:
        """Return a stream of the same images that augments them as other settings say."""
        other = copy(self)
        other.data, other.mixers = data, {}
        return other

    @property
    def costly(self) -> bool:
        """Whether it takes long to read or augment images, which is then done once if possible."""
        return not isinstance(self.pixels["train"], np.ndarray) or bool(self.data.augment)

    def train(
        self, shares: Iterable[Ints], view: int
    ) -> Iterator[tuple[Tensor, Tensor | MixedLabels]]:
        """Yield the images and labels of `batches`."""
        return ((batch.images, batch.labels) for batch in self.batches(shares, view))

    def batches(self, shares: Iterable[Ints], view: int) -> Iterator[Batch]:
        """Yield augmented training batches.

        Args:
            shares: The indices of samples of each batch, [B]: this worker's share of the batch.
            view: The index of the augmentation.
        """
        shares = list(shares)
        if not shares:
            return
        if self.data.mixes:
            yield from self._mixed(shares, view)
            return
        labels = self.labels["train"][self._put(np.concatenate(shares))]
        each = labels.split([len(index) for index in shares])
        for chosen, (given, make) in zip(each, self._seen(shares, view), strict=True):
            yield Batch(given, make, chosen)

    def val(self, shares: Iterable[Ints]) -> Iterator[Tensor]:
        """Return an iterator over validation batches, without augmentation.

        Args:
            shares: The indices of samples of each batch, [B].

        Returns:
            An iterator over images, float32 [B, channels, H, W].
        """
        return map(self._normalise, self._gather("val", shares, 0))

    def _mixed(self, shares: list[Ints], view: int) -> Iterator[Batch]:
        """Yield batches of images that are mixed with their partners."""
        pixels, labels = self.pixels["train"], self.labels["train"]
        partner = partners(self.seed, view, len(pixels))
        needed = [np.unique(np.concatenate([index, partner[index]])) for index in shares]
        # All batches of an epoch need as many: a CUDA graph has one shape.
        most = max(map(len, needed))
        needed = [np.pad(each, (0, most - len(each)), "edge") for each in needed]
        samples = np.concatenate(shares)
        mix = draw_mix(self.data, self.seed, view, samples, pixels.shape[1])
        weight = np.where(mix.cut, 1.0, mix.share)
        # the place of each image, and of its partner, among those that its batch needs
        pairs = [[index, partner[index]] for index in shares]
        places = [np.searchsorted(*each) for each in zip(needed, pairs, strict=True)]
        epoch = (
            *map(self._put, np.concatenate(places, 1)),
            self._put(mix.box),
            self._put(weight.astype(np.float32)),
            *(labels[self._put(each)] for each in (samples, partner[samples])),
            self._put(mix.share.astype(np.float32)),
        )
        lengths = [len(index) for index in shares]
        drawn = zip(*(each.split(lengths) for each in epoch), strict=True)
        for (given, make), (*how, ours, others, share) in zip(
            self._seen(needed, view), drawn, strict=True
        ):
            mixer = self.mixers.setdefault(make, partial(self._mix, make))
            yield Batch((*given, *how), mixer, MixedLabels(ours, others, share))

    def _mix(self, make: Callable[..., Tensor], *given: Tensor) -> Tensor:
        """Make images and mix them; the last tensors are their places, boxes and weights."""
        *given_images, first, second, box, weight = given
        images = make(*given_images)
        mixed = mix_images(images[first], images[second], box, weight)
        return mixed.contiguous(memory_format=self.layout)

    def _seen(
        self, shares: list[Ints], view: int
    ) -> Iterator[tuple[tuple[Tensor, ...], Callable[..., Tensor]]]:
        """Yield what makes the augmented training images of each share: `given` and `make`."""
        if self.data.augment or isinstance(self.pixels["train"], DrawnImages):

            def read(index: Ints) -> Tensor:
                images = self._read("train", index, view)
                return self._cropped(images, *self._places(index, view)).clone()

            for images in augmented(read, self.data.augment, shares, self.seed, view):
                yield (upload(images, self.device),), self._normalise
            return
        lengths = [len(index) for index in shares]
        drawn = self._places(np.concatenate(shares), view)
        places = zip(*(upload(each, self.device).split(lengths) for each in drawn), strict=True)
        resident = "train" in self.on_device
        source = self.indices(shares) if resident else self._gather("train", shares, view)
        make = self._from_device if resident else self._from_pixels
        for first in source:
            yield (first, *next(places, ())), make

    def _from_device(self, index: Tensor, *places: Tensor) -> Tensor:
        """Make images of the indices of samples [B], whose pixels are on the device."""
        return self._from_pixels(self.on_device["train"][index], *places)

    def _from_pixels(self, pixels: Tensor, *places: Tensor) -> Tensor:
        """Make images of pixels, uint8 [B, H, W, channels]."""
        return self._normalise(self._cropped(pixels, *places))

    def _places(self, index: Ints, view: int) -> tuple[Tensor, ...]:
        """Draw top, left and mirroring (0 or 1) of the crops of some images, int64 [B] each.

        Returns:
            Nothing if the images are neither cropped nor mirrored.
        """
        pad, flip = self.data.pad, self.data.flip
        if not pad and not flip:
            return ()
        bits = random_bits(self.seed, view, index, "augment")
        top, left = (below(bits, shift, 2 * pad + 1) for shift in (0, 24))
        mirrored = below(bits, 48, 2) if flip else np.zeros_like(top)
        return tuple(torch.from_numpy(each) for each in (top, left, mirrored))

    def _cropped(self, images: Tensor, *places: Tensor) -> Tensor:
        """Pad, crop and mirror images, uint8 [B, H, W, channels], as `_places` says."""
        if not places:
            return images
        if not self.data.pad:
            chosen = places[2] == 1
            return torch.where(chosen[:, None, None, None], images.flip(2), images)
        return crop_and_flip(images, self.data.pad, *places)

    def _gather(self, split: str, shares: Iterable[Ints], view: int) -> Iterator[Tensor]:
        """Yield the images of each share on the device, uint8 [B, H, W, channels]."""
        pixels = self.pixels[split]
        if not isinstance(pixels, np.ndarray):

            def read(index: Ints) -> Tensor:
                return self._read(split, index, view)

            def pinned(index: Ints) -> Tensor:  # on a thread; processes have no GPU
                return _pinned(read(index), self.device)

            ahead = (
                prefetch(pinned, shares)
                if isinstance(pixels, EncodedImages)
                else augmented(read, (), list(shares), self.seed, view)
            )
            for images in ahead:
                yield upload(images, self.device)
        elif split in self.on_device:
            for index in self.indices(list(shares)):
                yield self.on_device[split][index]
        else:
            for share in shares:
                yield upload(self._read(split, share, view), self.device)

    def indices(self, shares: list[Ints]) -> Iterator[Tensor]:
        """Yield the indices of each share on the device, [B]; all are copied at once."""
        index = self._put(np.concatenate(shares))
        yield from index.split([len(share) for share in shares])

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

    def _put(self, x: npt.NDArray[Any]) -> Tensor:
        """Copy an array to the device."""
        return upload(torch.from_numpy(x), self.device)

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


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device, without waiting for the copy."""
    return _pinned(x, device).to(device, non_blocking=True)


def _pinned(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host in pinned memory, which CUDA copies in the background."""
    return x.pin_memory() if device.type == "cuda" else x


def free_memory(device: torch.device) -> float:
    """Return the bytes that this process can still have of an accelerator; 0 for the CPU."""
    if device.type == "cuda":
        number = device.index  # None, which some of these functions refuse inside a torch.device
        free, total = torch.cuda.mem_get_info(number)
        share = torch.cuda.get_per_process_memory_fraction(number)
        return min(free, share * total - torch.cuda.memory_reserved(number))
    return 0 if device.type == "cpu" else math.inf
