"""Loss landscapes in logit space: the paper's figures 3 and 4; they need no training.

t: a random teacher-logit vector of unit norm; d1, d2: random orthonormal directions. Student
logits s = t + a d1 + b d2 over (a, b) in [-5 |t|, 5 |t|]^2; the label is the teacher's first class.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from analysis.figures.style import STYLE, save
from pld_ray.losses import DISTLoss, KDLoss, PLDLoss

Grid = npt.NDArray[np.float64]
STEPS = 61  # points along each side
REACH = 5.0


def plane(classes: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(t, d1, d2), each [classes] float64: |t| = 1, d1 and d2 orthonormal."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(classes, generator=generator, dtype=torch.float64)
    directions = torch.randn(classes, 2, generator=generator, dtype=torch.float64)
    basis, _ = torch.linalg.qr(directions)
    return t / t.norm(), basis[:, 0], basis[:, 1]


def surface(loss: nn.Module, t: Tensor, d1: Tensor, d2: Tensor) -> tuple[Grid, Grid]:
    """(axis [STEPS], values [STEPS, STEPS]): values[i, j] is the loss at b = axis[i], a = axis[j].

    Every point is a batch of its own, so losses that look across a batch see one sample.
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
    """Figure 4: DIST, KD and PLD with the paper's ImageNet settings."""
    return {
        "DIST": DISTLoss(temperature=1.0, ce_weight=0.1, beta=0.45, gamma=0.45),
        "KD": KDLoss(temperature=2.0, ce_weight=0.1),
        "PLD": PLDLoss(temperature=1.0),
    }


def temperatures() -> dict[str, nn.Module]:
    """Figure 3: PLD at four temperatures of the teacher."""
    return {f"PLD, τ = {tau}": PLDLoss(temperature=tau) for tau in (2.0, 1.0, 0.5, 0.1)}


def draw(folder: Path, classes: int = 10, seed: int = 0) -> list[Path]:
    """Write landscape_methods and landscape_temperatures, PNG and PDF; returns the PNGs' paths."""
    folder.mkdir(parents=True, exist_ok=True)
    both: dict[str, Callable[[], dict[str, nn.Module]]] = {
        "landscape_methods": methods,
        "landscape_temperatures": temperatures,
    }
    with plt.rc_context(STYLE):
        return [save(_figure(make(), classes, seed), folder / name) for name, make in both.items()]


def _figure(losses: dict[str, nn.Module], classes: int, seed: int) -> Figure:
    """Surfaces above, contours below; the teacher's own logits and each minimum are marked."""
    t, d1, d2 = plane(classes, seed)
    figure = plt.figure(figsize=(2.7 * len(losses), 5.4))
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
