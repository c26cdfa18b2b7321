"""The loss around trained students: over a plane of their weights, and how sharp the minimum is.

The plane (Li et al. 2018, "Visualizing the loss landscape of neural nets"): weights + a d1 + b d2
with random directions d, each filter of them as long as the student's own; biases and batch norm
stay. All methods of an experiment are seen in the same directions, under cross-entropy, so that
they compare on one scale, and under the loss by which each was trained. Points are Ray tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from analysis.figures.style import STYLE, save
from analysis.tables import rendering
from pld_ray.config.planning import Plan
from pld_ray.config.trial import Trial
from pld_ray.data.sampling import order
from pld_ray.store.store import Store

Weights = dict[str, Tensor]
Loss = Callable[[Tensor], Tensor]  # student logits [N, C] to a scalar
PROBES = 16  # random vectors for the trace


class Settings(NamedTuple):
    """What of a landscape is computed."""

    points: int = 21  # along each side
    reach: float = 1.0  # a and b in [-reach, reach]
    images: int = 512  # training images, as the student saw them in its first epoch
    seed: int = 0  # of the directions


# ---------------------------------------------------------------- directions and curvature


def directions(weights: Weights, seed: int) -> tuple[Weights, Weights]:
    """Two random directions, filter-normalised; 0 for parameters of fewer than two dimensions."""
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
    """(largest eigenvalue, trace) of the Hessian of the loss at the weights.

    The eigenvalue by Lanczos iteration on Hessian-vector products, the trace by Hutchinson's
    estimate from PROBES random sign vectors.
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
    """A trained student and what its losses are measured on: all that a task needs."""

    trial: Trial
    shape: tuple[int, int, int]
    weights: Weights
    buffers: Weights
    x: Tensor  # [N, channels, H, W]
    labels: Tensor  # [N]
    teacher_logits: Tensor | None  # [N, C]

    def losses(self) -> dict[str, Loss]:
        """CE, and the student's own loss if it is one on logits."""
        from pld_ray.losses import create_loss

        found: dict[str, Loss] = {"ce": lambda logits: F.cross_entropy(logits, self.labels)}
        if self.trial.loss.name != "ce" and not self.trial.loss.needs_features:
            own: Any = create_loss(self.trial.loss, ignore_index=None)
            found["own"] = lambda logits: own(logits, self.teacher_logits, self.labels)
        return found

    def network(self) -> nn.Module:
        """In evaluation mode: batch norm as it was trained."""
        from pld_ray.models.factory import create_model

        return create_model(self.trial.student, *self.shape).eval()

    def logits(self, network: nn.Module, weights: Weights) -> Tensor:
        """Of the images [N, C] under other weights."""
        return functional_call(network, (weights, self.buffers), (self.x,)).float()


def subject(trial: Trial, images: Any, store: Store, count: int) -> Subject:
    """The student of a finished trial, on the first `count` images of its first epoch."""
    from pld_ray.data.stream import Stream
    from pld_ray.distill.teacher import Teacher
    from pld_ray.models.factory import create_model

    cpu = torch.device("cpu")
    stream = Stream(images, trial.data, trial.seed, cpu)
    shown = order(trial.seed, 0, len(images.train))[:count]
    x, labels = next(stream.train([shown], trial.view(0)))
    state = store.load_weights(trial)
    network = create_model(trial.student, *images.shape)
    # in the network's order, in which directions are drawn: a file has none
    weights = {name: state.pop(name) for name, _ in network.named_parameters()}
    logits = None
    if trial.teacher is not None and not trial.loss.needs_features:
        logits = Teacher(trial, images, store, cpu)(x)
    return Subject(trial, images.shape, weights, state, x, labels, logits)


@torch.no_grad()
def line(subject: Subject, b: float, axis: list[float], seed: int) -> dict[str, list[float]]:
    """Each loss at (a, b) for every a of the axis."""
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
    """`sharpness` under each loss."""
    network = subject.network()
    found = {}
    for name, loss in subject.losses().items():

        def at(weights: Weights, loss: Loss = loss) -> Tensor:
            return loss(subject.logits(network, weights))

        found[name] = sharpness(at, subject.weights)
    return found


# ---------------------------------------------------------------- an experiment


def students(plan: Plan, store: Store) -> dict[str, Trial]:
    """The finished trials that are shown, by what they are called: each method's first seed."""
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
    """Compute and keep the landscapes that are not there yet; Ray runs."""
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
    """Write weights (PNG, PDF) and sharpness (Markdown, CSV, LaTeX) of what is kept."""
    found = {name: store.landscape(trial.id) for name, trial in trials.items()}
    kept = {name: landscape for name, landscape in found.items() if landscape is not None}
    if not kept:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
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
    "λ: largest eigenvalue of the Hessian over the weights, tr: its trace; under cross-entropy "
    "(CE) and under the loss by which the student was trained. The smaller, the flatter."
)


def numbers(trials: dict[str, Trial], kept: dict[str, Any], store: Store) -> pd.DataFrame:
    """One row a student: top1, and eigenvalue and trace under CE and its own loss."""
    rows = []
    for name, landscape in kept.items():
        record = store.record(trials[name].id) or {"metrics": {}}
        row = {"student": name, "top1": record["metrics"].get("top1", float("nan"))}
        for loss, values in landscape["losses"].items():
            row |= {f"{loss}_{key}": values[key] for key in ("top_eigenvalue", "trace")}
        rows.append(row)
    return pd.DataFrame(rows)


def printed(table: pd.DataFrame) -> pd.DataFrame:
    """`numbers` as strings."""
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
    if math.isnan(x):
        return "–"
    return _significant(x, 4) if digits is None else f"{x:.{digits}f}"


def _significant(x: float, digits: int) -> str:
    """Rounded to so many digits, and never as 1.4e+02."""
    return f"{float(f'{x:.{digits}g}'):,.12g}"


def _levels(values: Any) -> Any:
    """17 contours, evenly apart on a logarithmic scale."""
    low = max(values.min(), 1e-6)
    return np.geomspace(low, max(values.max(), 1.01 * low), 17)


def figure(kept: dict[str, Any]) -> Figure:
    """Contours: above under CE, one scale for all; below under each one's own loss."""
    both = any("own" in one["losses"] for one in kept.values())
    shape = (2 if both else 1), len(kept)
    drawn, axes = plt.subplots(
        *shape, figsize=(0.8 + 2.6 * shape[1], 0.6 + 2.7 * shape[0]), squeeze=False
    )
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
