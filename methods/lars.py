"""LARS: SGD with momentum whose step per tensor is proportional to the norm of the tensor."""

# pyright: reportPrivateImportUsage=false
# torch has no public names for its foreach functions.
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["LARS"]


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv 1708.03888, algorithm 1).

    For a weight w with gradient g, decay d and trust coefficient eta:
    r = eta ||w|| / (||g|| + d ||w||), u <- mu u + r (g + d w), w <- w - lr u.
    Where w or g has norm 0, r = 1 and d = 0. Groups with ``adapt=False`` (biases and BatchNorm in SimCLR and BYOL)
    always take r = 1.

    One set of ``foreach`` calls per group and no look at values, so the device never waits for the host.

    Args:
        params: parameters or groups; a group may set ``adapt`` and ``weight_decay``.
        lr: learning rate.
        momentum: mu.
        weight_decay: d.
        trust_coefficient: eta.
        adapt: scale by r.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        adapt: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": adapt,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)
        return loss

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        updates = _scaled_gradients(group, params)
        momenta = []
        for p, update in zip(params, updates, strict=True):
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(update)
            momenta.append(state["momentum_buffer"])
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, updates)
        torch._foreach_add_(params, momenta, alpha=-group["lr"])


def _scaled_gradients(group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
    """r (g + d w) of every parameter, in new tensors."""
    gradients: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]  # the caller has filtered
    decay = group["weight_decay"]
    if not group["adapt"]:
        return list(torch._foreach_add(gradients, params, alpha=decay))
    w_norm = torch.stack(torch._foreach_norm(params))
    g_norm = torch.stack(torch._foreach_norm(gradients))
    is_regular = (w_norm > 0) & (g_norm > 0)
    ratio = group["trust_coefficient"] * w_norm / (g_norm + decay * w_norm)
    ratio = torch.where(is_regular, ratio, 1.0)
    decays = torch.where(is_regular, decay * ratio, 0.0)
    scaled = torch._foreach_mul(gradients, list(ratio.unbind()))
    torch._foreach_add_(scaled, torch._foreach_mul(params, list(decays.unbind())))
    return list(scaled)
