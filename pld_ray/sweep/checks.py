"""Check the datasets, networks and optimizers of trials before Ray starts."""

from __future__ import annotations

from pld_ray.config.trial import Model, Trial, Weights
from pld_ray.data import datasets
from pld_ray.data.images import Images
from pld_ray.errors import InputError, nearest
from pld_ray.models.checks import check_features, check_model
from pld_ray.sweep.cluster import reach


def check_trials(pending: dict[str, Trial], address: str | None = None) -> dict[str, Images]:
    """Load all datasets and build all networks, to report bad input before Ray starts.

    The networks are built without memory for their weights.

    Args:
        pending: Trials that will run, by trial id.
        address: Address of the Ray cluster to join, or None.

    Returns:
        The images of each dataset, by `datasets.sharing_key`.

    Raises:
        InputError: No cluster answers at `address`, or a dataset, network, optimizer or the
            features that a loss compares are not usable.
    """
    if address is not None and address != "auto":
        reach(address)
    from timm.optim import list_optimizers

    optimizers = set(list_optimizers())
    images: dict[str, Images] = {}
    seen: set[str] = set()
    for trial in pending.values():
        key = datasets.sharing_key(trial.data)
        if key not in images:
            images[key] = datasets.load(trial.data)
        if trial.optimizer.name not in optimizers:
            hint = nearest(trial.optimizer.name, optimizers)
            raise InputError(f"optimizer.name is {trial.optimizer.name!r}: not in timm; {hint}")
        wanted: list[Model | Weights] = [trial.student]
        if isinstance(trial.teacher, Weights):
            wanted.append(trial.teacher)
        for model in wanted:
            name = f"{key} {model!r}"
            if name not in seen:
                seen.add(name)
                check_model(model, *images[key].shape)
        compared = f"{key} {trial.student!r} {trial.teacher_name} {trial.loss!r}"
        if trial.loss.needs_features and compared not in seen:
            seen.add(compared)
            check_features(trial, *images[key].shape)
    return images
