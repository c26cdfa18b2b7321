"""A small network and batches, as a user of the Python API has them."""

import torch
from torch import nn


class Small(nn.Module):
    """Logits of four classes, with batch norm and dropout, so that the mode matters."""

    def __init__(self, width=6):
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(12, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5)
        )
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.body(x))


def batch(seed=0, count=8):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 2, 2, generator=generator)
    return x, torch.randint(0, 4, (count,), generator=generator)


def loader(batches=3):
    return [batch(seed) for seed in range(batches)]
