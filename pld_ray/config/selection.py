"""The part of an experiment that `methods` and `pairs` name: points of its grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from pld_ray.config.merge import merge, named, nest
from pld_ray.errors import InputError, nearest
from pld_ray.losses import REGISTRY

if TYPE_CHECKING:
    from pld_ray.config.experiment import Experiment

Point = Sequence[tuple[str, Any]]  # fields and their values; later entries override earlier ones
NAMED = ("teacher", "student", "loss")


def chosen(experiment: Experiment, points: Sequence[Point]) -> list[bool]:
    """Return for each point of a grid whether it belongs to the part that is asked for.

    Args:
        experiment: The experiment with `methods` and `pairs`. For a miniature, the original.
        points: The points of its grid, with the overrides after the fields of the grid.

    Raises:
        InputError: No point has one of the names, or the part has no point, or no reference.
    """
    names = [_names(experiment.base, point) for point in points]
    losses = [loss for _, _, loss in names]
    pairs = [f"{teacher}:{student}" for teacher, student, _ in names]
    wanted_losses = _wanted(experiment, "methods", losses, _is_loss)
    wanted_pairs = _wanted(experiment, "pairs", pairs, _is_pair)
    kept = [
        loss in wanted_losses and pair in wanted_pairs
        for loss, pair in zip(losses, pairs, strict=True)
    ]
    if not any(kept):
        raise InputError(
            f"{experiment.name}: methods is {experiment.methods} and pairs is {experiment.pairs}: "
            "no cell has both"
        )
    reference = experiment.reference.partition(" (")[0]  # its parameters follow
    of_reference = {loss for loss in losses if _is_loss(loss, reference)}
    if of_reference and not of_reference & wanted_losses:
        raise InputError(
            f"{experiment.name}: methods is {experiment.methods}, without the reference of the "
            f"experiment: expected {experiment.reference!r} too, or another reference, such as "
            f"--set reference={min(wanted_losses)}"
        )
    return kept


def _names(base: dict[str, Any], point: Point) -> tuple[str, str, str]:
    """Return the names of teacher, student and loss of a point, "" for what is not set."""
    raw = {field: value for field, value in base.items() if field in NAMED}
    for field, value in point:
        if field.partition(".")[0] in NAMED:
            raw = merge(raw, nest(field, value))
    entries = (named(field, raw.get(field)) for field in NAMED)
    teacher, student, loss = (
        str(entry.get("name", "")) if isinstance(entry, dict) else "" for entry in entries
    )
    return teacher, student, loss


def _is_loss(name: str, wanted: str) -> bool:
    """Return whether a loss has this name or label; the name may have wildcards."""
    return fnmatchcase(name, wanted) or (name in REGISTRY and REGISTRY[name].label == wanted)


def _is_pair(pair: str, wanted: str) -> bool:
    """Return whether a pair is the wanted one, by its names or by their short forms."""
    (teacher, colon, student), (above, _, below) = wanted.rpartition(":"), pair.rpartition(":")
    return colon == ":" and _is_network(above, teacher) and _is_network(below, student)


def _is_network(name: str, wanted: str) -> bool:
    """Return whether a network has this name, which may lack a tag of weights and "_cifar"."""
    untagged = name.partition(".")[0]
    forms = (name, untagged, untagged.removesuffix("_cifar"))
    return any(fnmatchcase(form, wanted) for form in forms)


def _wanted(
    experiment: Experiment, field: str, known: Sequence[str], fits: Callable[[str, str], bool]
) -> set[str]:
    """Return the names among the known ones that `methods` or `pairs` asks for; all if it is empty.

    Raises:
        InputError: One of the words fits none of the names.
    """
    words: list[str] = getattr(experiment, field)
    if not words:
        return set(known)
    for word in words:
        if not any(fits(name, word) for name in known):
            hint = nearest(word, known)
            close = f"; {hint}" if hint.startswith("did you mean") else ""
            raise InputError(
                f"{experiment.name}: {field} has {word!r}: expected some of "
                f"{', '.join(dict.fromkeys(known))}{close}"
            )
    return {name for name in known if any(fits(name, word) for word in words)}
