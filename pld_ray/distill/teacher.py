"""The teacher of a trial: a network that is loaded when it is first needed."""

from __future__ import annotations

import hashlib
from functools import cached_property

import torch
from safetensors.torch import save
from torch import Tensor, nn

from pld_ray.config.parts import Weights
from pld_ray.config.trial import Trial
from pld_ray.data.images import Images
from pld_ray.distill.device import memory_format, pick_precision
from pld_ray.distill.frozen_teacher import FrozenTeacher
from pld_ray.models.factory import (
    Renormalize,
    create_student,
    load_teacher,
    pretrained_statistics,
)
from pld_ray.store.store import Store


class Teacher:
    """The teacher of a trial. With a full teacher bank its network is never loaded.

    Args:
        trial: The student's trial, which has a teacher.
        images: The dataset of the trial.
        store: Holds the weights of teachers that were trained as trials.
        device: Where the network runs.
    """

    def __init__(self, trial: Trial, images: Images, store: Store, device: torch.device) -> None:
        self.trial, self.images, self.store, self.device = trial, images, store, device
        self.precision = pick_precision(trial.precision, device)

    @cached_property
    def module(self) -> FrozenTeacher:
        """The teacher as a module, on its device."""
        network = self.network
        if self.precision == "bfloat16":
            del self.network  # it is loaded again if its weights are asked for
            _cast_weights(network)
        return FrozenTeacher(network, self._renormalize(), self.precision)

    @cached_property
    def network(self) -> nn.Module:
        """The network alone, on its device."""
        with torch.random.fork_rng():  # loading it must not change the trial's random numbers
            network = self._load()
        return network.to(self.device).to(memory_format=memory_format(self.trial.channels_last))

    def _load(self) -> nn.Module:
        teacher = self.trial.teacher
        if isinstance(teacher, Trial):
            model = create_student(teacher, *self.images.shape)
            model.load_state_dict(self.store.load_weights(teacher))
            return model
        assert teacher is not None
        return load_teacher(teacher, *self.images.shape)

    def _renormalize(self) -> nn.Module | None:
        """From the normalisation of the trial to that for which existing weights were trained."""
        teacher = self.trial.teacher
        if not isinstance(teacher, Weights):
            return None
        ours = self.images.mean, self.images.std
        if teacher.weights == "pretrained":
            theirs = pretrained_statistics(teacher.name)
        elif teacher.mean and teacher.std:
            theirs = teacher.mean, teacher.std
        else:
            return None
        return None if theirs == ours else Renormalize(*ours, *theirs).to(self.device)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits [B, C], float32, of images [B, channels, H, W]."""
        return self.module(x)

    def take_images_seen(self) -> int:
        """Return how many images went through the network since the last call."""
        if "module" not in vars(self):
            return 0
        seen, self.module.images_seen = self.module.images_seen, 0
        return seen

    def digest(self) -> str:
        """Return the sha256 of the weights. Pretrained weights of timm are loaded for it, once."""
        teacher = self.trial.teacher
        if isinstance(teacher, Trial):
            return self.store.weights_digest(teacher)
        assert teacher is not None
        if teacher.sha256:
            return teacher.sha256
        name = teacher.model_dump_json()
        if name not in _pretrained:
            state = {k: v.cpu().contiguous() for k, v in self.network.state_dict().items()}
            _pretrained[name] = hashlib.sha256(save(state)).hexdigest()
        return _pretrained[name]


def _cast_weights(network: nn.Module) -> None:
    """Give convolutions and linear layers the bfloat16 weights that autocast makes in every step.

    Subclasses may compute with their weights in other ways, so they keep theirs.
    """
    for module in network.modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            module.to(torch.bfloat16)


_pretrained: dict[str, str] = {}  # digests, for all trials of this process
