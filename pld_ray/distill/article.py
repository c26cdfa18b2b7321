"""`PLDKnowledgeDistillation`: PLD behind the three methods that an introductory article shows.

A thin layer over `Distiller`, for those who know PLD from that article. New code is better off
with `Distiller` and `fit`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pld_ray.distill.distiller import Distiller
from pld_ray.distill.fit import checked_batches, evaluate
from pld_ray.errors import InputError
from pld_ray.losses.plackett_luce import PLDLoss


class PLDKnowledgeDistillation:
    """Train a student with PLD and AdamW.

    Args:
        teacher_model: Maps images [B, channels, H, W] to logits [B, C]. It is frozen.
        student_model: Likewise. It is trained in place.
        temperature: Softens the teacher's probabilities, which weigh the steps of the ranking.
        lr: Learning rate of AdamW.
        device: Where to train. Without a CUDA device "cuda" means the CPU, with a warning.
    """

    def __init__(
        self,
        teacher_model: nn.Module,
        student_model: nn.Module,
        temperature: float = 1.0,
        lr: float = 0.01,
        device: str | torch.device = "cuda",
    ) -> None:
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            warnings.warn("no CUDA device is available: training on the CPU", stacklevel=2)
            device = "cpu"
        self.device = torch.device(device)
        distiller = Distiller(student_model, teacher_model, PLDLoss(temperature=temperature))
        self.distiller = distiller.to(self.device)
        self.teacher, self.student = teacher_model, student_model
        self.optimizer = torch.optim.AdamW(student_model.parameters(), lr=lr)

    def train_step(self, images: Tensor, labels: Tensor) -> float:
        """Do one update on a batch and return its loss.

        Args:
            images: [B, channels, H, W].
            labels: Class indices [B].
        """
        self.distiller.train()
        self.optimizer.zero_grad()
        loss = self.distiller(images.to(self.device), labels.to(self.device))
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def validate(self, loader: Iterable[Any]) -> float:
        """Return the student's accuracy on batches (images, labels), in [0, 1]."""
        return evaluate(self.student, loader, device=self.device)

    def fit(
        self, train_loader: Iterable[Any], epochs: int, test_loader: Iterable[Any] | None = None
    ) -> dict[str, list[float]]:
        """Train for some epochs.

        Args:
            train_loader: Gives batches (images, labels); iterated once per epoch.
            epochs: The number of epochs.
            test_loader: If given, the student is validated on it after each epoch.

        Returns:
            "train_loss": the mean loss of the batches of each epoch. "val_acc": the accuracy after
            each epoch, in [0, 1]; empty without `test_loader`.

        Raises:
            InputError: A batch cannot be used, an epoch has no batch, or the loss is not finite.
        """
        if type(epochs) is not int or epochs < 1:
            raise InputError(f"epochs is {epochs!r}: expected a whole number from 1")
        history: dict[str, list[float]] = {"train_loss": [], "val_acc": []}
        for _ in range(epochs):
            shown = checked_batches(train_loader, self.device, "train_loader")
            losses = [self.train_step(images, labels) for images, labels in shown]
            mean = sum(losses) / len(losses)
            if not math.isfinite(mean):
                raise InputError(f"the training loss is {mean}: a lower learning rate may help")
            history["train_loss"].append(mean)
            if test_loader is not None:
                history["val_acc"].append(self.validate(test_loader))
        return history
