"""Metrics of a student, as sums over validation samples that workers can add up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pld_ray import plugins
from pld_ray.config.registry import metric
from pld_ray.errors import InputError

BINS = 15  # of confidence, for the calibration error (Guo et al. 2017)


def sums(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> Tensor:
    """Compute the sums of a batch that `averages` needs.

    Args:
        logits: Logits of the student [B, C].
        labels: Class indices, int64 [B].
        teacher_logits: Logits of the teacher [B, C], or None.

    Returns:
        float64 [6 + 3 BINS]. The sums of two batches add up to those of both together.
    """
    log_q = F.log_softmax(logits.float(), 1)
    confidence, predicted = log_q.max(1)
    confidence = confidence.exp().double()
    right = (predicted == labels).double()
    best = log_q.topk(min(5, log_q.shape[1]), 1).indices
    scalars = [
        torch.ones_like(right).sum(),
        right.sum(),
        (best == labels[:, None]).any(1).double().sum(),
        F.nll_loss(log_q, labels, reduction="sum").double(),
    ]
    if teacher_logits is None:
        scalars += [right.new_zeros(())] * 2
    else:
        log_p = F.log_softmax(teacher_logits.float(), 1)
        scalars.append(F.kl_div(log_q, log_p, reduction="sum", log_target=True).double())
        scalars.append((log_p.argmax(1) == predicted).double().sum())
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    # A product, because `index_add_` adds in any order on an accelerator.
    inside = F.one_hot(bins, BINS).to(right)
    table = torch.stack([torch.ones_like(right), confidence, right]) @ inside
    return torch.cat([torch.stack(scalars), table.flatten()])


def loss_means(means: Sequence[float]) -> dict[str, float]:
    """Return the losses of an epoch by name: train_loss, and its terms if it has two.

    Args:
        means: The mean of the loss and, of a loss with two terms, the mean of its cross-entropy
            with the labels, times its weight.
    """
    found = {"train_loss": means[0]}
    for ce in means[1:]:
        found |= {"loss_ce": ce, "loss_kd": means[0] - ce}
    return found


def own_sums(
    names: Sequence[str], logits: Tensor, labels: Tensor, teacher_logits: Tensor | None
) -> Tensor:
    """Compute the sums of a batch of metrics of the user.

    Args:
        names: Names of the metrics.
        logits: Logits of the student [B, C].
        labels: Class indices, int64 [B].
        teacher_logits: Logits of the teacher [B, C], or None.

    Returns:
        float64 [len(names)].

    Raises:
        InputError: A metric does not return one number for each sample.
    """
    found = logits.new_zeros(len(names), dtype=torch.float64)
    for i, name in enumerate(names):
        teacher = None if teacher_logits is None else teacher_logits.clone()  # it may change them
        values = metric(name).function(logits.clone(), labels.clone(), teacher)
        if not isinstance(values, Tensor) or values.shape != labels.shape or values.is_complex():
            shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise InputError(
                f"metric {name} returns {shape}: expected a tensor with one real number for "
                f"each of the {len(labels)} samples"
            )
        found[i] = values.double().sum()
    return found


def check(names: Sequence[str], classes: int, has_teacher: bool) -> None:
    """Compute metrics of the user once, on random logits.

    Raises:
        InputError: A metric is not registered, raises an error, or returns wrong values.
    """
    drawn = torch.randn(2, 4, classes, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4) % classes
    for name in names:
        metric(name)
        try:
            own_sums([name], drawn[0], labels, drawn[1] if has_teacher else None)
        except InputError:
            raise
        except Exception as error:
            where, reason = plugins.location(error), str(error).strip().partition("\n")[0]
            raise InputError(f"metric {name}: {where}{type(error).__name__}: {reason}") from error


def averages(total: Tensor, has_teacher: bool) -> dict[str, float]:
    """Compute metrics from the sums of all batches.

    Args:
        total: The sum of `sums` over the batches.
        has_teacher: Whether the sums include a teacher.

    Returns:
        top1 and top5 in percent, val_loss in nats, and ece in [0, 1] (Guo et al. 2017). With a
        teacher also kl_teacher_student, KL(teacher || student) in nats at temperature 1 (paper,
        Table 12), and agreement: the percentage of samples for which both predict the same class.
    """
    values = total.tolist()
    count, right, right5, loss, kl, agree = values[:6]
    _, confidence, hits = total[6:].view(3, BINS).cpu()
    found = {
        "top1": 100 * right / count,
        "top5": 100 * right5 / count,
        "val_loss": loss / count,
        "ece": float((confidence - hits).abs().sum() / count),
    }
    if has_teacher:
        found |= {"kl_teacher_student": kl / count, "agreement": 100 * agree / count}
    return found
