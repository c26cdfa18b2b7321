"""The distillation-oriented trainer: SGD with a momentum for each of the two terms of a loss.

optimizer = DOT(distiller.student.parameters(), lr=0.05)
distiller.keep_graphs()  # once
for images, labels in loader:
    distiller(images, labels)
    optimizer.backward(*distiller.take_terms())
    optimizer.step()
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class DOT(torch.optim.Optimizer):
    """Distillation-oriented trainer (Zhao et al. 2023, ICCV, "DOT").

        v_kd = (momentum + delta) v_kd + gradient of the distillation term
        v_ce = (momentum - delta) v_ce + gradient of the cross-entropy term + weight_decay w
        w    = w - lr (v_kd + v_ce)

    A weight that only one term reaches has the momentum `momentum`, and its decay is added to that
    term, as in the authors' code (mdistiller). That code leaves the decay out in the first step of
    weights that only distillation reaches; here it is always added. With delta = 0, this is SGD.

    Args:
        params: Parameters, or groups of parameters.
        lr: The learning rate, at least 0.
        momentum: The momentum, in [0, 1).
        weight_decay: The weight decay, at least 0.
        delta: Half of the difference between the two momenta, at least 0. The paper uses 0.075 on
            CIFAR-100 and Tiny-ImageNet, and 0.09 on ImageNet.

    Raises:
        ValueError: An argument is out of its range, or one of the momenta is not in [0, 1).
    """

    # A GradScaler then hands its scale over, instead of dividing one of the two gradients by it.
    _step_supports_amp_scaling = True
    _kd_gradients: dict[Tensor, Tensor] | None = None  # of the next step

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        delta: float = 0.075,
    ) -> None:
        given = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "delta": delta}
        for name, value in given.items():
            if not isinstance(value, int | float | Tensor) or not value >= 0:
                raise ValueError(f"{name} is {value!r}: expected a number of at least 0")
        if not 0 <= momentum - delta <= momentum + delta < 1:
            raise ValueError(
                f"delta is {delta!r}: expected momentum - delta of at least 0 and momentum + delta "
                f"below 1, where momentum is {momentum!r}"
            )
        super().__init__(params, given)

    def backward(self, ce: Tensor, kd: Tensor) -> None:
        """Compute the gradients of the two terms of a loss, which may share parts of their graph.

        Earlier gradients are forgotten. Those of `ce` are then in `grad`.

        Args:
            ce: The term of cross-entropy, a scalar.
            kd: The term of distillation, a scalar.
        """
        self.zero_grad()
        kd.backward(retain_graph=True)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        self._kd_gradients = {w: w.grad for w in weights if w.grad is not None}
        self.zero_grad()
        ce.backward()

    def clip_grad_norm(self, largest: float) -> None:
        """Scale both gradients by one factor, so that their sum has at most this norm.

        The norm is that over all weights together. The sum is the gradient of the whole loss, and
        the factor that of `torch.nn.utils.clip_grad_norm_`.
        """
        ce, kd = self._gradients()
        total = [ce[w] + kd[w] if w in ce and w in kd else (ce | kd)[w] for w in ce | kd]
        norm = torch.nn.utils.get_total_norm(total)
        factor = (largest / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([*ce.values(), *kd.values()], factor)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update the weights.

        Raises:
            RuntimeError: `backward` was not called before, or gradients are scaled.
        """
        if hasattr(self, "found_inf"):
            raise RuntimeError("DOT: GradScaler is not supported: expected bfloat16 or float32")
        ce, kd = self._gradients()
        for group in self.param_groups:
            weights = [w for w in group["params"] if w in ce or w in kd]
            decayed = group["weight_decay"] != 0
            for weight in weights if decayed else ():
                term = ce if weight in ce else kd
                term[weight] = term[weight].add(weight, alpha=group["weight_decay"])
            for name, term, sign in (("ce", ce, -1), ("kd", kd, 1)):
                reached = [w for w in weights if w in term]
                if not reached:
                    continue
                for weight in reached:
                    if name not in self.state[weight]:
                        self.state[weight][name] = torch.zeros_like(weight)
                velocities = [self.state[weight][name] for weight in reached]
                momenta = [
                    group["momentum"] + (sign * group["delta"] if w in ce and w in kd else 0.0)
                    for w in reached
                ]
                torch._foreach_mul_(velocities, momenta)
                torch._foreach_add_(velocities, [term[weight] for weight in reached])
                torch._foreach_add_(reached, velocities, alpha=-group["lr"])
        self._kd_gradients = None

    def _gradients(self) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
        """Return the gradients of both terms, by weight."""
        if self._kd_gradients is None:
            raise RuntimeError("DOT: expected a call of optimizer.backward(ce, kd) before")
        weights = [weight for group in self.param_groups for weight in group["params"]]
        return {w: w.grad for w in weights if w.grad is not None}, self._kd_gradients
