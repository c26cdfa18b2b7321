"""The loss around trained students: over a plane of their weights, and its sharpness.

The plane (Li et al. 2018, "Visualizing the loss landscape of neural nets") is weights + a d1 + b d2
with random directions d1 and d2. Each filter of a direction has the norm of the student's filter;
biases and batch norm do not change. All methods of an experiment use the same directions. The loss
is cross-entropy, which compares all methods on one scale, and the loss that trained the student.
Each row of points is a Ray task.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from analysis.figures.style import STYLE, Picture, save
from analysis.tables import rendering
from pld_ray.config.planning import Plan
from pld_ray.config.trial import Trial
from pld_ray.data.sampling import order
from pld_ray.store.store import Store

Weights = dict[str, Tensor]
Loss = Callable[[Tensor], Tensor]  # student logits [N, C] to a scalar
PROBES = 16  # random vectors for the estimate of the trace


class Settings(NamedTuple):
    """Settings of a landscape.

    Attributes:
        points: Number of points along each side of the plane.
        reach: Half the side: a and b are in [-reach, reach].
        images: Number of training images, augmented as in the student's first epoch.
        seed: Seed of the directions.
    """

    points: int = 21
    reach: float = 1.0
    images: int = 512
    seed: int = 0


# ---------------------------------------------------------------- directions and curvature


def directions(weights: Weights, seed: int) -> tuple[Weights, Weights]:
    """Draw two random filter-normalised directions (Li et al. 2018).

    Args:
        weights: Parameters by name.
        seed: Seed of the directions.

    Returns:
        Two directions with the names and shapes of the weights. They are 0 for parameters with
        fewer than two dimensions.
    """
    generator = torch.Generator().manual_seed(seed)

    def one() -> Weights:
        found = {}
        for name, weight in weights.items():
            draw = torch.randn(weight.shape, generator=generator)
            if weight.ndim < 2:
                found[name] = torch.zeros_like(weight)
                continue
            lengths = [x.flatten(1).norm(dim=1) for x in (weight, draw)]
            scale = lengths[0] / lengths[1].clamp_min(1e-12)
            found[name] = draw * scale.view(-1, *[1] * (weight.ndim - 1))
        return found

    return one(), one()


def sharpness(loss: Callable[[Weights], Tensor], weights: Weights) -> tuple[float, float]:
    """Estimate the largest eigenvalue and the trace of the Hessian of the loss.

    The eigenvalue comes from Lanczos iteration on Hessian-vector products, the trace from
    Hutchinson's estimate with PROBES random sign vectors.

    Args:
        loss: A function from weights to a scalar loss.
        weights: The parameters by name at which the Hessian is taken.

    Returns:
        (largest eigenvalue, trace).
    """
    leaves = {name: w.detach().clone().requires_grad_() for name, w in weights.items()}
    gradient = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])

    def times(vector: Any) -> Any:
        v = torch.from_numpy(np.asarray(vector, np.float32).reshape(-1))
        parts = torch.autograd.grad(flat, list(leaves.values()), v, retain_graph=True)
        return torch.cat([p.reshape(-1) for p in parts]).double().numpy()

    size = len(flat)
    start = np.random.default_rng(0).standard_normal(size)
    hessian = LinearOperator((size, size), matvec=times, dtype=np.float64)
    top = eigsh(hessian, k=1, which="LA", v0=start, tol=1e-3, return_eigenvectors=False)
    signs = np.random.default_rng(1).choice([-1.0, 1.0], (PROBES, size))
    return float(top[0]), float(np.mean([v @ times(v) for v in signs]))


# ---------------------------------------------------------------- one student


class Subject(NamedTuple):
    """A trained student and the batch on which its losses are computed.

    Attributes:
        trial: The finished trial of the student.
        shape: (number of classes, number of channels, image size).
        weights: Parameters that were trained by name, in the order of the network.
        buffers: Buffers, and parameters that were frozen, by name.
        x: Images [N, channels, H, W].
        labels: Labels [N].
        teacher_logits: Teacher logits [N, C]; None if the loss needs none.
        storage: The URI of the store that holds the trial and its plug-ins.
    """

    trial: Trial
    shape: tuple[int, int, int]
    weights: Weights
    buffers: Weights
    x: Tensor
    labels: Tensor
    teacher_logits: Tensor | None
    storage: str

    def losses(self) -> dict[str, Loss]:
        """Return cross-entropy as "ce" and, if it uses only logits, the student's loss as "own"."""
        from pld_ray.losses import create_loss

        self._load_plugins()
        found: dict[str, Loss] = {"ce": lambda logits: F.cross_entropy(logits, self.labels)}
        if self.trial.loss.name != "ce" and not self.trial.loss.needs_features:
            own: Any = create_loss(self.trial.loss, ignore_index=None)
            found["own"] = lambda logits: own(logits, self.teacher_logits, self.labels)
        return found

    def network(self) -> nn.Module:
        """Create the student's network in evaluation mode: batch norm uses trained statistics."""
        from pld_ray.models.factory import create_student

        self._load_plugins()
        return create_student(self.trial, *self.shape).eval()

    def _load_plugins(self) -> None:
        """Import the plug-ins of the trial, if this process has not done it."""
        Store(self.storage).load_plugins(self.trial.model_dump(mode="json"))

    def logits(self, network: nn.Module, weights: Weights) -> Tensor:
        """Return the logits [N, C] of the images under the given weights."""
        return functional_call(network, (weights, self.buffers), (self.x,)).float()


def subject(trial: Trial, images: Any, store: Store, count: int) -> Subject:
    """Load the student of a finished trial and the first images of its first epoch.

    Images are not mixed (Mixup, CutMix), so that each has one label.

    Args:
        trial: A finished trial.
        images: The images of the trial's data set.
        store: The store that holds the weights.
        count: Number of images.
    """
    from pld_ray.data.stream import Stream
    from pld_ray.distill.teacher import Teacher
    from pld_ray.models.factory import create_student

    cpu = torch.device("cpu")
    data = trial.data.model_copy(update={"mixup": None, "cutmix": None})
    stream = Stream(images, data, trial.seed, cpu)
    shown = order(trial.seed, 0, len(images.train))[:count]
    x, labels = next(stream.train([shown], trial.view(0)))
    assert isinstance(labels, Tensor)
    state = store.load_weights(trial)
    network = create_student(trial, *images.shape)
    # Directions are drawn in the order of the network's parameters; a file of weights has no order.
    trained = [name for name, weight in network.named_parameters() if weight.requires_grad]
    weights = {name: state.pop(name) for name in trained}
    logits = None
    if trial.teacher is not None and not trial.loss.needs_features:
        logits = Teacher(trial, images, store, cpu)(x)
    return Subject(trial, images.shape, weights, state, x, labels, logits, store.uri)


@torch.no_grad()
def line(subject: Subject, b: float, axis: list[float], seed: int) -> dict[str, list[float]]:
    """Compute each loss along one row of the plane.

    Args:
        subject: The student.
        b: Coordinate of the row.
        axis: Values of a.
        seed: Seed of the directions.

    Returns:
        For each loss, its value at (a, b) for every a of the axis.
    """
    network, losses = subject.network(), subject.losses()
    first, second = directions(subject.weights, seed)
    values: dict[str, list[float]] = {name: [] for name in losses}
    for a in axis:
        moved = {n: w + a * first[n] + b * second[n] for n, w in subject.weights.items()}
        logits = subject.logits(network, moved)
        for name, loss in losses.items():
            values[name].append(loss(logits).item())
    return values


def curvature(subject: Subject) -> dict[str, tuple[float, float]]:
    """Return (largest eigenvalue, trace) of the Hessian for each loss of the student."""
    network = subject.network()
    found = {}
    for name, loss in subject.losses().items():

        def at(weights: Weights, loss: Loss = loss) -> Tensor:
            return loss(subject.logits(network, weights))

        found[name] = sharpness(at, subject.weights)
    return found


# ---------------------------------------------------------------- an experiment


def students(plan: Plan, store: Store) -> dict[str, Trial]:
    """Return the finished trials to show, by display name.

    Each method of each (student, teacher, setting) is shown by its first finished seed.
    """
    from analysis.records import frames

    frame = frames.frame(plan, store)
    trials = {cell.trial.id: cell.trial for cell in plan.cells}
    groups = frame[frame["finished"]].drop_duplicates(frames.GROUP)
    one_pair = len(groups[["student", "teacher", "setting"]].drop_duplicates()) < 2
    found = {}
    for row in groups.to_dict("records"):
        pair = "" if one_pair else f", {row['teacher']} → {row['student']} {row['setting']}"
        found[f"{row['method']}{pair}".strip()] = trials[row["id"]]
    return found


def compute(
    trials: dict[str, Trial], images: dict[str, Any], store: Store, settings: Settings
) -> None:
    """Compute and store the landscapes that the store does not have with these settings.

    Ray must be running.

    Args:
        trials: Finished trials by display name.
        images: The images of each data set, by `sharing_key`.
        store: The store that holds the weights and keeps the landscapes.
        settings: Settings of the landscapes.
    """
    import ray

    from pld_ray.data.datasets import sharing_key

    row, curve = ray.remote(line), ray.remote(curvature)
    axis = np.linspace(-settings.reach, settings.reach, settings.points).tolist()
    wanted = dict(zip(Settings._fields, settings, strict=True))
    tasks = []
    for trial in trials.values():
        kept = store.landscape(trial.id)
        if kept is not None and kept["settings"] == wanted:
            continue
        one = ray.put(subject(trial, images[sharing_key(trial.data)], store, settings.images))
        rows = [row.remote(one, b, axis, settings.seed) for b in axis]
        tasks.append((trial, rows, curve.remote(one)))
    for trial, rows, curved in tasks:
        lines, sharp = ray.get(rows), ray.get(curved)
        losses = {
            name: {
                "values": [one[name] for one in lines],  # [b, a]
                "top_eigenvalue": top,
                "trace": trace,
            }
            for name, (top, trace) in sharp.items()
        }
        store.keep_landscape(trial, {"settings": wanted, "axis": axis, "losses": losses})


def draw(trials: dict[str, Trial], store: Store, folder: Path) -> list[Path]:
    """Write the figure "weights" and the table "sharpness" of the stored landscapes.

    Args:
        trials: Finished trials by display name.
        store: The store that holds the landscapes.
        folder: Where to write; it is created if needed.

    Returns:
        The paths of the figure (PNG; the PDF is next to it) and of the table (Markdown, CSV,
        LaTeX); empty if no landscape is stored.
    """
    found = {name: store.landscape(trial.id) for name, trial in trials.items()}
    kept = {name: landscape for name, landscape in found.items() if landscape is not None}
    if not kept:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        paths = [save(figure(kept), folder / "weights")]
    table = numbers(trials, kept, store)
    cells = printed(table)
    for kind, content in (
        ("md", f"{rendering.markdown(cells, 1)}\n\n{LEGEND}\n"),
        ("csv", table.to_csv(index=False)),
        ("tex", rendering.latex(cells, 1)),
    ):
        paths.append(folder / f"sharpness.{kind}")
        paths[-1].write_text(content, encoding="utf-8")
    return paths


LEGEND = (
    "λ: largest eigenvalue of the Hessian with respect to the weights; tr: trace of the Hessian. "
    "Both are under cross-entropy (CE) and under the student's own training loss. Smaller values "
    "mean a flatter minimum."
)


def numbers(trials: dict[str, Trial], kept: dict[str, Any], store: Store) -> pd.DataFrame:
    """Return one row per student: top1, and the eigenvalue and trace under CE and its own loss.

    Args:
        trials: Finished trials by display name.
        kept: Stored landscapes by display name.
        store: The store that holds the records.
    """
    rows = []
    for name, landscape in kept.items():
        record = store.record(trials[name].id) or {"metrics": {}}
        row = {"student": name, "top1": record["metrics"].get("top1", float("nan"))}
        for loss, values in landscape["losses"].items():
            row |= {f"{loss}_{key}": values[key] for key in ("top_eigenvalue", "trace")}
        rows.append(row)
    return pd.DataFrame(rows)


def printed(table: pd.DataFrame) -> pd.DataFrame:
    """Format the table of `numbers` as strings."""
    heads = {
        "top1": "Top-1 %",
        "ce_top_eigenvalue": "λ, CE",
        "ce_trace": "tr, CE",
        "own_top_eigenvalue": "λ, own loss",
        "own_trace": "tr, own loss",
    }
    cells = table[["student"]].rename(columns={"student": "Student of"})
    for field, head in heads.items():
        if field in table:
            digits = 2 if field == "top1" else None
            cells[head] = [_cell(x, digits) for x in table[field]]
    return cells


def _cell(x: float, digits: int | None) -> str:
    """Format a number with fixed decimals, or with four significant digits for None."""
    if math.isnan(x):
        return "–"
    return _significant(x, 4) if digits is None else f"{x:.{digits}f}"


def _significant(x: float, digits: int) -> str:
    """Format a number with so many significant digits, without an exponent for large numbers."""
    return f"{float(f'{x:.{digits}g}'):,.12g}"


def _levels(values: Any) -> Any:
    """Return 17 contour levels, evenly spaced on a logarithmic scale."""
    low = max(values.min(), 1e-6)
    return np.geomspace(low, max(values.max(), 1.01 * low), 17)


def figure(kept: dict[str, Any]) -> Figure:
    """Draw contours of the loss: cross-entropy above, the student's own loss below.

    Cross-entropy has one scale for all students; the own losses have one scale each.

    Args:
        kept: Stored landscapes by display name.
    """
    both = any("own" in one["losses"] for one in kept.values())
    shape = (2 if both else 1), len(kept)
    drawn = Picture(figsize=(0.8 + 2.6 * shape[1], 0.6 + 2.7 * shape[0]))
    axes = drawn.subplots(*shape, squeeze=False)
    shared = np.concatenate([np.ravel(one["losses"]["ce"]["values"]) for one in kept.values()])
    levels = _levels(shared)
    for column, (name, one) in enumerate(kept.items()):
        for row, loss in enumerate(["ce", "own"][: shape[0]]):
            axis = axes[row][column]
            if loss not in one["losses"]:
                axis.remove()
                continue
            values = np.array(one["losses"][loss]["values"])
            chosen = levels if loss == "ce" else _levels(values)
            at = one["axis"], one["axis"], values
            scale = LogNorm(chosen[0], chosen[-1])
            axis.contourf(*at, chosen, cmap="viridis", norm=scale, extend="both")
            lines = axis.contour(*at, chosen[2::4], colors="white", linewidths=0.6)
            axis.clabel(lines, fmt=lambda x: _significant(x, 2), fontsize=6.5)
            axis.plot(0, 0, "x", color="#D55E00", ms=6, mew=2)
            axis.grid(visible=False)
            axis.set_aspect("equal")
            axis.set_title(f"{name}\n{'cross-entropy' if loss == 'ce' else 'its own loss'}")
    drawn.tight_layout()
    return drawn
