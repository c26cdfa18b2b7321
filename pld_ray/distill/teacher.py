"""The teacher of a trial: its forward pass, and the bank that makes most of them unnecessary.

bank.read(samples, view):  the chunk in the store?  read it
                           nobody at work on it?    compute it, keep it
                           somebody is?             compute one of the next, or wait
"""

from __future__ import annotations

import hashlib
from functools import cached_property

import torch
from safetensors.torch import save
from torch import Tensor, nn

from pld_ray.config.trial import Trial, Weights
from pld_ray.data.images import Images
from pld_ray.distill.device import memory_format, uses_bfloat16
from pld_ray.losses.features import Features
from pld_ray.models.factory import create_model, load_teacher, pretrained_statistics
from pld_ray.models.features import WithFeatures
from pld_ray.store.store import Store


class Teacher:
    """The frozen network, made when it is first needed: with a full bank it never is."""

    def __init__(self, trial: Trial, images: Images, store: Store, device: torch.device) -> None:
        self.trial, self.images, self.store, self.device = trial, images, store, device
        self.bfloat16 = uses_bfloat16(trial, device)
        self.images_seen = 0

    @cached_property
    def network(self) -> nn.Module:
        """On its device, in evaluation mode."""
        with torch.random.fork_rng():  # whether it is made changes no random number of the trial
            model = self._load()
        model = model.to(self.device).to(memory_format=memory_format(self.trial))
        return model.eval().requires_grad_(False)

    def _load(self) -> nn.Module:
        teacher = self.trial.teacher
        if isinstance(teacher, Trial):
            model = create_model(teacher.student, *self.images.shape)
            model.load_state_dict(self.store.load_weights(teacher))
            return model
        assert teacher is not None
        return load_teacher(teacher, *self.images.shape)

    def load(self) -> None:
        """Make the network now."""
        _ = self.network

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Images [B, channels, H, W] to logits [B, C], float32."""
        self.images_seen += len(x)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.network(self._as_it_knows_them(x)).float()

    @torch.no_grad()
    def features(self, x: Tensor) -> Features:
        """Images [B, channels, H, W] to what losses on features compare."""
        self.images_seen += len(x)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            return WithFeatures(self.network)(self._as_it_knows_them(x))[1]

    def _as_it_knows_them(self, x: Tensor) -> Tensor:
        """Images normalised as the teacher was trained, which need not be as the student is."""
        if self.renormalise is None:
            return x
        scale, shift = self.renormalise
        return x * scale + shift

    @cached_property
    def renormalise(self) -> tuple[Tensor, Tensor] | None:
        """Scale and shift [channels, 1, 1] from our normalisation to that of timm's weights."""
        teacher = self.trial.teacher
        if not isinstance(teacher, Weights) or teacher.weights != "pretrained":
            return None
        mean, std = (torch.tensor(x) for x in pretrained_statistics(teacher.name))
        ours = torch.tensor(self.images.mean), torch.tensor(self.images.std)
        if len(ours[0]) != len(mean):  # grey images: timm sums the weights over its channels
            mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
        scale, shift = ours[1] / std, (ours[0] - mean) / std
        return scale[:, None, None].to(self.device), shift[:, None, None].to(self.device)

    def digest(self) -> str:
        """The sha256 of its weights; of timm's pretrained ones they are loaded for it, once."""
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


_pretrained: dict[str, str] = {}  # digests, for the trials that this process runs
