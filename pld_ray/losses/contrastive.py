"""CRD, a contrastive loss on features that keeps a memory of all training samples.

loss = CRDLoss()
loss.connect(student_features, teacher_features)  # both once, before the optimizer is created
loss.connect_samples(labels)  # of all training samples
loss.set_epoch(epoch)  # before each epoch: draws the negatives
loss(student_logits, labels, student_features, teacher_features, index)
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pld_ray.losses.feature_loss import FeatureLoss, Features
from pld_ray.losses.parameters import Temperature, Weight
from pld_ray.losses.registry import register_loss

EPS = 1e-7
"""What the authors' code adds to the denominators."""


@register_loss("crd", label="CRD", takes="features", takes_samples=True)
class CRDLoss(FeatureLoss):
    """Contrastive representation distillation, CRD (Tian et al. 2020), as the authors' code has it.

        loss = ce_weight CE + weight * (contrast(v_s, M_t) + contrast(v_t, M_s))
        contrast(v, M) = mean over i of [log((a_ii + c) / a_ii) + sum over j of log((a_ij + c) / c)]
        a_ij = exp(M_j . v_i / temperature) / Z

    v_s and v_t are the pooled features of student and teacher, each mapped to `dim` numbers by a
    learnt linear layer and divided by its norm. The memories M_s and M_t hold such a vector of each
    of the n training samples. j goes over the negatives of sample i, which are K samples of other
    classes, and c = K / n. Z is n times the mean of exp(...) over the first batch, for each side.
    After each batch, M_i becomes momentum * M_i + (1 - momentum) * v_i, divided by its norm.

    The K negatives of a sample are drawn without replacement from all samples of other classes, as
    in the authors' code for CIFAR-100. There, the samples of a batch draw them independently. Here,
    they draw from the same K samples and a few more, which costs a small part of the time. The loss
    and its gradient have the same expectation in both ways.

    The memories, 8 n dim bytes, are kept in checkpoints. If fewer than `negatives` samples are of
    other classes than the largest one, K is their number.

    Args:
        negatives: The number of negatives K of each sample, at least 1. Default: 16384.
        temperature: Divides the products of the vectors, above 0. Default: 0.07.
        momentum: The share of the old vector in a memory, from 0 to below 1. Default: 0.5.
        dim: The length of the vectors, 1 to 65,536. Default: 128.
        weight: Weight of the distance, at least 0. Default: 0.8.
        ce_weight: Weight of the cross-entropy with the labels, at least 0. Default: 1.
    """

    student_memory: Tensor  # [n, dim]
    teacher_memory: Tensor  # [n, dim]
    log_scale: Tensor  # log Z of both sides, [2]; -inf before the first batch
    labels: Tensor  # [n]
    order: Tensor  # a permutation of the samples, [n]
    starts: Tensor  # for each sample, the place in `order` where the candidates of its batch begin

    def __init__(
        self,
        negatives: Annotated[int, Field(ge=1)] = 16384,
        temperature: Temperature = 0.07,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5,
        dim: Annotated[int, Field(ge=1, le=65_536)] = 128,
        weight: Weight = 0.8,
        ce_weight: Weight = 1.0,
    ) -> None:
        super().__init__(ce_weight)
        self.negatives, self.temperature, self.momentum = negatives, temperature, momentum
        self.dim, self.weight = dim, weight
        self.candidates = 0  # so many samples have K of other classes for each class
        self.begun = False  # whether Z is known
        self.embed_student: nn.Module = nn.Identity()
        self.embed_teacher: nn.Module = nn.Identity()
        self.register_load_state_dict_post_hook(lambda loss, _: loss._continue())

    def connect(self, student: Features, teacher: Features) -> None:
        """Create the linear layers; see `FeatureLoss.connect`."""
        self.embed_student = nn.Linear(student.pooled.shape[1], self.dim)
        self.embed_teacher = nn.Linear(teacher.pooled.shape[1], self.dim)

    def connect_samples(self, labels: Tensor) -> None:
        """Create the memories; see `FeatureLoss.connect_samples`."""
        if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.dtype != torch.int64:
            shown = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else labels
            raise ValueError(f"crd: the labels are {shown}: expected class indices, int64 [N]")
        count = len(labels)
        if count and int(labels.min()) < 0:
            raise ValueError(f"crd: a label is {int(labels.min())}: expected class indices from 0")
        largest = int(labels.bincount().max()) if count else 0
        if largest == count:
            raise ValueError(
                f"crd: all {count} training samples are of one class: expected two classes or more"
            )
        if count - largest < self.negatives:
            self.notes.append(
                f"crd: {count - largest} negatives instead of {self.negatives}: no more of the "
                f"{count} training samples are of other classes than the largest one"
            )
            self.negatives = count - largest
        self.candidates = min(count, self.negatives + largest)
        bound = (3 / self.dim) ** 0.5
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, torch.empty(count, self.dim).uniform_(-bound, bound))
        self.register_buffer("log_scale", torch.full((2,), -torch.inf))
        order, starts = _draw(count)
        for name, new in (("labels", labels.clone()), ("order", order), ("starts", starts)):
            self.register_buffer(name, new, persistent=False)

    def set_epoch(self, epoch: int) -> None:
        """Draw an order of the samples, and where each batch of the epoch begins in it.

        The numbers are from torch's generator, which a trial seeds before each epoch.
        """
        for kept, new in zip((self.order, self.starts), _draw(len(self.labels)), strict=True):
            kept.copy_(new)  # in place: a CUDA graph reads them

    def distance(self, student: Features, teacher: Features, index: Tensor | None = None) -> Tensor:
        """Return the weighted distance; see `FeatureLoss.distance`."""
        if index is None or len(index) < len(student.pooled):
            raise ValueError("crd: expected the index of each sample of the batch")
        s = F.normalize(self.embed_student(student.pooled))
        t = F.normalize(self.embed_teacher(teacher.pooled))
        own = index[: len(s)]
        candidates, chosen = self.draw(own)
        scores = [
            (
                (v * memory[own]).sum(1) / self.temperature,
                v / self.temperature @ memory[candidates].T,
            )
            for v, memory in ((s, self.teacher_memory), (t, self.student_memory))
        ]
        log_scale = self.log_scale if self.begun else self._first_scale(scores, chosen)
        if self.training:
            if not self.begun:
                self.log_scale.copy_(log_scale)
                self.begun = True
            self._remember(index, s.detach(), t.detach())
        sides = [
            self._contrast(*score, chosen, log_z)
            for score, log_z in zip(scores, log_scale, strict=True)
        ]
        return self.weight * torch.stack(sides).sum()

    def draw(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """Return the negatives of the samples of a batch.

        The candidates of the batch follow each other in the order of the epoch. They begin at a
        place that was drawn for the first sample. The negatives of a sample are the first K
        candidates of other classes.

        Args:
            own: The indices of the samples, int64 [B].

        Returns:
            The indices of the candidates, int64 [N], and which of them are negatives of each
            sample, bool [B, N].
        """
        place = torch.arange(self.candidates, device=own.device) + self.starts[own[:1]]
        candidates = self.order[place % len(self.order)]
        other = self.labels[candidates] != self.labels[own][:, None]
        return candidates, other & (other.cumsum(1, dtype=torch.int32) <= self.negatives)

    def _contrast(
        self, positive: Tensor, negative: Tensor, chosen: Tensor, log_scale: Tensor
    ) -> Tensor:
        """Return the loss of one side.

        Args:
            positive: Products of the vectors with those of the same samples, [B].
            negative: Products with those of the candidates, [B, N].
            chosen: Which candidates are negatives, bool [B, N].
            log_scale: log Z of this side, a scalar.
        """
        # With d = c + EPS: log((a + d) / a) = softplus(log d - log a), and
        # log((a + d) / c) = softplus(log a - log d) + log(d / c). No exponential is too large.
        noise = self.negatives / len(self.labels)
        shift = log_scale + math.log(noise + EPS)
        attracted = F.softplus(shift - positive)
        repelled = F.softplus(negative - shift) + math.log1p(EPS / noise)
        return (attracted.sum() + repelled.where(chosen, 0).sum()) / len(positive)

    @torch.no_grad()
    def _first_scale(self, scores: list[tuple[Tensor, Tensor]], chosen: Tensor) -> Tensor:
        """Return log Z of both sides, from the products of the first batch."""
        every = [torch.cat([p[:, None], n.where(chosen, -torch.inf)], 1) for p, n in scores]
        largest = torch.stack([each.max() for each in every])
        if _workers() > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        sums = [(each - most).exp().sum() for each, most in zip(every, largest, strict=True)]
        count = torch.full_like(sums[0], len(chosen) * (1 + self.negatives))
        total = torch.stack([*sums, count])
        if _workers() > 1:
            dist.all_reduce(total)
        return largest + (total[:2] / total[2] * len(self.labels)).log()

    @torch.no_grad()
    def _remember(self, index: Tensor, student: Tensor, teacher: Tensor) -> None:
        """Update the memories with the vectors of a batch, also with those of other workers."""
        if _workers() > 1:
            # A worker with one sample less has the index of its last one twice.
            more = len(index) - len(student)
            student, teacher = (torch.cat([v, v[-1:].expand(more, -1)]) for v in (student, teacher))
            index, student, teacher = map(_of_all_workers, (index, student, teacher))
        for memory, new in ((self.student_memory, student), (self.teacher_memory, teacher)):
            mixed = memory[index] * self.momentum + new * (1 - self.momentum)
            memory.index_copy_(0, index, F.normalize(mixed))

    def _continue(self) -> None:
        """Use the Z that was loaded, if it was known."""
        self.begun = bool(self.log_scale.isfinite().all())


def _draw(count: int) -> tuple[Tensor, Tensor]:
    """Draw a permutation of some samples, and a place in it for each of them, int64 [count]."""
    return torch.randperm(count), torch.randint(count, (count,))


def _workers() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _of_all_workers(x: Tensor) -> Tensor:
    """Concatenate the tensors [B, ...] of all workers, which have one shape."""
    found = [torch.empty_like(x) for _ in range(_workers())]
    dist.all_gather(found, x.contiguous())
    return torch.cat(found)
