"""Check the datasets, networks and optimizers of trials before Ray starts."""

from __future__ import annotations

from typing import NamedTuple

from pld_ray.config.parts import Model, Weights
from pld_ray.config.registry import BUILT_IN_OPTIMIZERS, OPTIMIZERS
from pld_ray.config.trial import Trial
from pld_ray.data import datasets
from pld_ray.data.images import Images
from pld_ray.distill import metrics
from pld_ray.distill.optimization import check_own
from pld_ray.errors import InputError, nearest
from pld_ray.models.checks import check_features, check_loss, check_model
from pld_ray.sweep.cluster import reach


class Checked(NamedTuple):
    """What the check of trials found.

    Attributes:
        images: The images of each dataset, by `datasets.sharing_key`.
        notes: Sentences for the user.
    """

    images: dict[str, Images]
    notes: list[str]


def check_trials(pending: dict[str, Trial], address: str | None = None) -> Checked:
    """Load all datasets and try all networks, to report bad input before Ray starts.

    The networks are built without memory for their weights.

    Args:
        pending: Trials that will run, by trial id.
        address: Address of the Ray cluster to join, or None.

    Raises:
        InputError: No cluster answers at `address`, or a dataset, network, optimizer, batch size
            or the features that a loss compares are not usable.
    """
    if address is not None and address != "auto":
        reach(address)
    from timm.optim import list_optimizers

    optimizers = {*list_optimizers(), *OPTIMIZERS, *BUILT_IN_OPTIMIZERS}
    images: dict[str, Images] = {}
    notes: dict[str, None] = {}
    seen: set[str] = set()
    for trial in pending.values():
        key = datasets.sharing_key(trial.data)
        if key not in images:
            images[key] = datasets.load(trial.data)
        for each, field in zip(trial.each_view, ("data.augment", "loss.strong"), strict=False):
            datasets.check_augmentation(each.data, images[key].train, field)
        if trial.optimizer.name not in optimizers:
            hint = nearest(trial.optimizer.name, optimizers)
            raise InputError(f"optimizer.name is {trial.optimizer.name!r}: not in timm; {hint}")
        check_own(trial.optimizer, trial.schedule)
        metrics.check(trial.metrics, images[key].classes, trial.loss.needs_teacher)
        smallest = _smallest_batch(trial, images[key])
        wanted: list[tuple[Model | Weights, int]] = [(trial.student, smallest)]
        if isinstance(trial.teacher, Weights):
            wanted.append((trial.teacher, 2))
        for model, batch in wanted:
            name = f"{key} {model!r} {batch}"
            if name not in seen:
                seen.add(name)
                notes |= dict.fromkeys(check_model(model, *images[key].shape, batch))
        computed = f"{images[key].classes} {trial.loss!r}"
        if not trial.loss.needs_features and computed not in seen:
            seen.add(computed)
            check_loss(trial.loss, images[key].classes)
        compared = f"{key} {trial.student!r} {trial.teacher!r} {trial.loss!r} {smallest}"
        if trial.loss.needs_features and compared not in seen:
            seen.add(compared)
            check_features(trial, *images[key].shape, smallest, images[key].train_labels)
    return Checked(images, list(notes))


def _smallest_batch(trial: Trial, images: Images) -> int:
    """Return the smallest number of images that a worker trains on at once: 1, or 2 for more.

    Raises:
        InputError: An epoch has no batch, or its last batch has no image for one of the workers.
    """
    count, size = len(images.train), trial.batch_size
    if trial.drop_last and count < size:
        raise InputError(
            f"batch_size is {size} and there are {count} training images: with drop_last that "
            "leaves no batch"
        )
    last = size if trial.drop_last else count % size or size
    if last < trial.workers:
        raise InputError(
            f"the last batch of an epoch has {last} samples for {trial.workers} workers: set "
            "drop_last: true"
        )
    if len(images.val) < trial.workers:
        raise InputError(
            f"there are {len(images.val)} validation images for {trial.workers} workers"
        )
    return min(2, last // trial.workers)
