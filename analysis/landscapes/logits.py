"""Loss landscapes in logit space: figures 3 and 4 of the paper. They need no training.

The teacher's logits t are a random vector of unit norm; d1 and d2 are random orthonormal
directions. The student's logits are s = t + a d1 + b d2 for (a, b) in [-5 |t|, 5 |t|]^2. The label
is the class with the teacher's largest logit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from analysis.figures.style import STYLE, Picture, save
from pld_ray.losses import DISTLoss, KDLoss, PLDLoss

Grid = npt.NDArray[np.float64]
STEPS = 61  # points along each side
REACH = 5.0  # largest |a| and |b|, in units of |t|


def plane(classes: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the teacher's logits and the plane of student logits at random.

    Args:
        classes: Number of classes.
        seed: Seed of the random vectors.

    Returns:
        (t, d1, d2), each [classes], float64: |t| = 1, and d1 and d2 are orthonormal.
    """
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(classes, generator=generator, dtype=torch.float64)
    directions = torch.randn(classes, 2, generator=generator, dtype=torch.float64)
    basis, _ = torch.linalg.qr(directions)
    return t / t.norm(), basis[:, 0], basis[:, 1]


def surface(loss: nn.Module, t: Tensor, d1: Tensor, d2: Tensor) -> tuple[Grid, Grid]:
    """Compute a loss over the plane of student logits.

    Every point is a batch of its own, so a loss that compares samples of a batch sees only one.

    Args:
        loss: A loss of (student logits [1, classes], teacher logits [1, classes], labels [1]).
        t: The teacher's logits [classes].
        d1: First direction [classes].
        d2: Second direction [classes].

    Returns:
        (axis [STEPS], values [STEPS, STEPS]): values[i, j] is the loss at b = axis[i] and
        a = axis[j].
    """
    axis = torch.linspace(-REACH, REACH, STEPS, dtype=torch.float64) * t.norm()
    b, a = torch.meshgrid(axis, axis, indexing="ij")
    students = t + a[..., None] * d1 + b[..., None] * d2  # [STEPS, STEPS, classes]
    teacher, label = t[None], t.argmax()[None]

    def at(student: Tensor) -> Tensor:
        return loss(student[None], teacher, label)

    values = torch.func.vmap(at)(students.reshape(-1, len(t)))
    return axis.numpy(), values.reshape(STEPS, STEPS).numpy()


def methods() -> dict[str, nn.Module]:
    """Return the losses of Figure 4: DIST, KD and PLD with the paper's ImageNet settings."""
    return {
        "DIST": DISTLoss(temperature=1.0, ce_weight=0.1, beta=0.45, gamma=0.45),
        "KD": KDLoss(temperature=2.0, ce_weight=0.1),
        "PLD": PLDLoss(temperature=1.0),
    }


def temperatures() -> dict[str, nn.Module]:
    """Return the losses of Figure 3: PLD at four temperatures of the teacher."""
    return {f"PLD, τ = {tau}": PLDLoss(temperature=tau) for tau in (2.0, 1.0, 0.5, 0.1)}


def draw(folder: Path, classes: int = 10, seed: int = 0) -> list[Path]:
    """Write landscape_methods and landscape_temperatures, each as PNG and PDF.

    Args:
        folder: Where to write; it is created if needed.
        classes: Number of classes.
        seed: Seed of the teacher's logits and of the directions.

    Returns:
        The paths of the PNG files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    both: dict[str, Callable[[], dict[str, nn.Module]]] = {
        "landscape_methods": methods,
        "landscape_temperatures": temperatures,
    }
    with matplotlib.rc_context(STYLE):
        return [save(_figure(make(), classes, seed), folder / name) for name, make in both.items()]


def _figure(losses: dict[str, nn.Module], classes: int, seed: int) -> Figure:
    """Draw surfaces above contours; mark the teacher's logits and the minimum of each loss."""
    t, d1, d2 = plane(classes, seed)
    figure = Picture(figsize=(2.7 * len(losses), 5.4))
    for i, (name, loss) in enumerate(losses.items()):
        axis, values = surface(loss, t, d1, d2)
        a, b = np.meshgrid(axis, axis)
        top = figure.add_subplot(2, len(losses), i + 1, projection="3d")
        top.plot_surface(a, b, values, cmap="viridis", rcount=STEPS, ccount=STEPS, lw=0)
        top.set_title(name)
        top.view_init(elev=32, azim=-55)
        top.tick_params(labelsize=7, pad=-2)
        for side in (top.xaxis, top.yaxis):
            side.set_major_locator(MaxNLocator(5))
        top.set_xlabel("a", labelpad=-6)
        top.set_ylabel("b", labelpad=-6)

        flat = figure.add_subplot(2, len(losses), len(losses) + i + 1)
        flat.grid(visible=False)
        flat.contourf(a, b, values, levels=24, cmap="viridis")
        flat.contour(a, b, values, levels=12, colors="white", linewidths=0.4, alpha=0.6)
        row, column = np.unravel_index(values.argmin(), values.shape)
        flat.plot(0, 0, "o", ms=5, mfc="none", mec="white", mew=1.3, label="teacher's logits")
        flat.plot(axis[column], axis[row], "x", ms=6, color="#D55E00", mew=2, label="minimum")
        flat.set_aspect("equal")
        flat.set_xlabel("a")
        flat.set_ylabel("b" if i == 0 else "")
    handles, labels = flat.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="lower center", ncol=2, facecolor="#4a7f8c")
    legend.get_frame().set_visible(True)
    for label in legend.get_texts():
        label.set_color("white")
    figure.suptitle(f"Loss over a plane of student logits ({classes} classes, seed {seed})")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    return figure
