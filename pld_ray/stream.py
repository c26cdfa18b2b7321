"""The stream: batches of augmented images as a pure function of (seed, view, index)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pld_ray.data import Hashes, Images, Ints, hashes
from pld_ray.spec import Data


class Stream:
    """Batches of a dataset on a device, normalised.

    On an accelerator the whole uint8 array is moved there once; on the CPU it stays shared.
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
        self.arrays = {"train": images.train, "val": images.val}
        self.labels = {
            "train": torch.from_numpy(images.train_labels.copy()).to(device),
            "val": torch.from_numpy(images.val_labels.copy()).to(device),
        }
        self.on_device = (
            {
                split: torch.from_numpy(array.copy()).to(device)
                for split, array in self.arrays.items()
            }
            if device.type != "cpu"
            else {}
        )
        mean, std = torch.tensor(images.mean), torch.tensor(images.std)
        self.scale = (1 / (255 * std)).to(device)
        self.shift = (-mean / std).to(device)

    def train(self, index: Ints, epoch: int) -> tuple[Tensor, Tensor]:
        """Augmented images [B, channels, H, W] float32 and labels [B] of the given samples."""
        images, where = self._gather("train", index)
        pad = self.data.pad
        if pad or self.data.flip:
            bits = hashes(self.seed, epoch, index, "augment")
            top = _below(bits, 0, 2 * pad + 1)
            left = _below(bits, 24, 2 * pad + 1)
            flip = _below(bits, 48, 2) if self.data.flip else np.zeros_like(top)
            images = crop_and_flip(images, pad, *(self._put(x) for x in (top, left, flip)))
        return self._normalise(images), self.labels["train"][where]

    def val(self, index: Ints) -> Tensor:
        """Validation images [B, channels, H, W] float32, not augmented."""
        return self._normalise(self._gather("val", index)[0])

    def _gather(self, split: str, index: Ints) -> tuple[Tensor, Tensor]:
        where = self._put(index)
        if split in self.on_device:
            return self.on_device[split][where], where
        return torch.from_numpy(self.arrays[split][index]), where

    def _put(self, x: Ints) -> Tensor:
        return torch.from_numpy(x).to(self.device, non_blocking=True)

    def _normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, channels] to float32 [B, channels, H, W] in the layout asked for."""
        x = (images * self.scale + self.shift).permute(0, 3, 1, 2)
        return x.contiguous(memory_format=self.layout)


def _below(bits: Hashes, shift: int, limit: int) -> Ints:
    """A number in [0, limit) from the bits above `shift`."""
    field = (bits >> np.uint64(shift)) & np.uint64(0xFFFF)
    return (field % np.uint64(limit)).astype(np.int64)


def crop_and_flip(images: Tensor, pad: int, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Zero-pad by `pad`, crop at (top, left), mirror where flip is 1.

    images uint8 [B, H, W, channels]; top, left in [0, 2 pad], flip in {0, 1}: int64 [B].
    """
    batch, height, width, _ = images.shape
    rows = top[:, None] + torch.arange(height, device=images.device)  # [B, H]
    columns = torch.arange(width, device=images.device)
    columns = torch.where(flip[:, None] == 1, width - 1 - columns, columns) + left[:, None]
    padded = torch.nn.functional.pad(images, (0, 0, pad, pad, pad, pad))
    sample = torch.arange(batch, device=images.device)[:, None, None]
    return padded[sample, rows[:, :, None], columns[:, None, :]]
