"""Published recipes of the linear read-off, and linear layers that train with many learning rates at once.

Facts from the official code; where paper and code differ, the code counts:

* moco: ``facebookresearch/moco: main_lincls.py``. SGD with momentum 0.9, learning rate 30 at 256 images, 100 epochs, x
  0.1 at epochs 60 and 80.
* simsiam: ``facebookresearch/simsiam: main_lincls.py --lars``. LARC of ``NVIDIA/apex`` (trust coefficient 0.001, no
  clipping, weight and bias alike) around SGD with momentum 0.9, learning rate 0.1 x B / 256 at B = 4096, 90 epochs,
  cosine that moves once an epoch. (The paper says 0.02; its authors in issue 13 of the repository: 0.1 is the code's.)
* byol: ``google-deepmind/deepmind-research: byol/configs/eval.py, byol/eval_experiment.py``. SGD with Nesterov momentum
  0.9, learning rate 0.2 x B / 256, 80 epochs, cosine that moves every step; batches of 1024 after the paper's appendix.
  haiku's default start: normal with deviation 1 / sqrt(D), cut at two deviations.

All of them: no weight decay, bias starts at 0, cross entropy, random crops of 8 to 100 % of the area and mirroring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from evaluation.linear import score_gradient

__all__ = ["LINEAR_RECIPES", "REFERENCE_BATCH", "LinearHeads", "LinearRecipe"]

REFERENCE_BATCH = 256  # images per step that a learning rate is stated for
TRUST_COEFFICIENT = 1e-3
LARC_EPSILON = 1e-8
MAX_SCORES = 1 << 24  # scores held at once: 64 MB in float32


@dataclass(frozen=True)
class LinearRecipe:
    """How one linear layer is trained.

    Attributes:
        source: where the facts are from.
        learning_rate: at a batch of 256 images; scaled linearly with the batch.
        grid: factors of ``learning_rate`` that are tried for features of a pretraining without labels.
        supervised_grid: the same for a pretraining that used labels.
        batch_size: images per step.
        epochs: passes over the training images.
        adaptive: scale weight and bias gradients as LARC does.
        nesterov: Nesterov momentum.
        milestones: epochs from which the rate is multiplied by 0.1; empty: cosine decay to 0.
        schedule_every: the cosine moves every "epoch" or every "step".
        start: standard deviation 0.01 ("normal"), or 1 / sqrt(D) cut at two deviations ("fan_in").
        momentum: momentum of SGD.
    """

    source: str
    learning_rate: float
    grid: tuple[float, ...]
    supervised_grid: tuple[float, ...]
    batch_size: int
    epochs: int
    adaptive: bool = False
    nesterov: bool = False
    milestones: tuple[int, ...] = ()
    schedule_every: Literal["epoch", "step"] = "epoch"
    start: Literal["normal", "fan_in"] = "normal"
    momentum: float = 0.9

    def rates(self, labels_used: bool) -> tuple[float, ...]:
        """The recipe's own grid of learning rates, at 256 images per step."""
        return tuple(self.learning_rate * factor for factor in (self.supervised_grid if labels_used else self.grid))

    def decay(self, epoch: int, step: int, steps_per_epoch: int, epochs: int) -> float:
        """Factor of the learning rate.

        Args:
            epoch: finished epochs.
            step: finished steps of this epoch.
            steps_per_epoch: steps of every epoch.
            epochs: length of the run; milestones keep their place in it.
        """
        if self.milestones:  # in integers, so that a milestone falls on its epoch whatever the rounding
            return 0.1 ** sum(epoch * self.epochs >= milestone * epochs for milestone in self.milestones)
        done = epoch / epochs if self.schedule_every == "epoch" else (epoch + step / steps_per_epoch) / epochs
        return 0.5 * (1 + math.cos(math.pi * done))

    def first_weight(self, dim: int, num_classes: int, generator: torch.Generator) -> Tensor:
        """Weight (D, C) before the first step."""
        weight = torch.empty(dim, num_classes)
        if self.start == "normal":
            return weight.normal_(0, 0.01, generator=generator)
        deviation = dim**-0.5
        return nn.init.trunc_normal_(weight, 0, deviation, -2 * deviation, 2 * deviation, generator=generator)


def _powers(lowest: float, highest: float) -> tuple[float, ...]:
    """Factors from 10^lowest to 10^highest in steps of half a decade."""
    return tuple(10 ** (lowest + k / 2) for k in range(round(2 * (highest - lowest)) + 1))


LINEAR_RECIPES: dict[str, LinearRecipe] = {
    "moco": LinearRecipe(
        source="facebookresearch/moco: main_lincls.py",
        learning_rate=30.0,
        grid=_powers(-3, 1),
        # 30 is for MoCo's small unnormalised features; those of supervised training want a much smaller rate.
        supervised_grid=_powers(-5, -1),
        batch_size=256,
        epochs=100,
        milestones=(60, 80),
    ),
    "simsiam": LinearRecipe(
        source="facebookresearch/simsiam: main_lincls.py --lars; NVIDIA/apex: LARC",
        learning_rate=0.1,
        # LARC's steps do not grow with the gradient, so what is too small on ImageNet's 28,000 steps is far too small
        # on the few steps of a small data set: the grid reaches higher. The features' scale matters little.
        grid=_powers(-1, 4),
        supervised_grid=_powers(-1.5, 3.5),
        batch_size=4096,
        epochs=90,
        adaptive=True,
    ),
    "byol": LinearRecipe(
        source="google-deepmind/deepmind-research: byol/configs/eval.py, byol/eval_experiment.py; the paper's batch",
        learning_rate=0.2,
        grid=_powers(-2, 2),
        supervised_grid=_powers(-3, 1),
        batch_size=1024,
        epochs=80,
        nesterov=True,
        schedule_every="step",
        start="fan_in",
    ),
}


class LinearHeads:
    """G linear layers, one per learning rate, that see the same batches; their weights are one matrix's column groups.

    No step of a group depends on another group: each trains as it would alone, and one that diverges harms none.
    """

    def __init__(
        self,
        recipe: LinearRecipe,
        rates: tuple[float, ...],
        dim: int,
        num_classes: int,
        generator: torch.Generator,
        device: str = "cpu",
    ) -> None:
        """All layers start from the same weights.

        Args:
            recipe: optimiser and start.
            rates: learning rates as they multiply the updates, scaled with the batch (G).
            dim: D.
            num_classes: C.
            generator: of the start, on the CPU.
            device: where to compute.
        """
        self.recipe, self.num_rates, self.num_classes = recipe, len(rates), num_classes
        self.weight = recipe.first_weight(dim, num_classes, generator).repeat(1, len(rates)).to(device)
        self.bias = self.weight.new_zeros(len(rates) * num_classes)
        self.rates = torch.tensor(rates, device=device).repeat_interleave(num_classes)
        self.velocities = [torch.zeros_like(p) for p in (self.weight, self.bias)]
        self.gradients = [torch.zeros_like(p) for p in (self.weight, self.bias)]

    def step(self, x: Tensor, targets: Tensor, decay: float) -> None:
        """One update from the mean cross entropy of a batch.

        Args:
            x: features (B, D).
            targets: classes (B,).
            decay: the schedule's factor of every learning rate.
        """
        weight_gradient, bias_gradient = self.gradients
        weight_gradient.zero_()
        bias_gradient.zero_()
        block = max(1, MAX_SCORES // self.weight.shape[1])
        for rows, labels in zip(x.split(block), targets.split(block), strict=True):
            gradient = score_gradient(torch.addmm(self.bias, rows, self.weight), labels, self.num_rates)
            share = len(rows) / len(x)  # the gradient of a block is of the mean over that block
            weight_gradient.addmm_(rows.T, gradient, alpha=share)
            bias_gradient.add_(gradient.sum(dim=0), alpha=share)
        for parameter, gradient, velocity in zip(
            (self.weight, self.bias), self.gradients, self.velocities, strict=True
        ):
            self._update(parameter, gradient, velocity, decay)

    def _update(self, parameter: Tensor, gradient: Tensor, velocity: Tensor, decay: float) -> None:
        """Momentum SGD as torch.optim.SGD does it; parameter, gradient and velocity are (..., G C)."""
        if self.recipe.adaptive:
            gradient.mul_(self._trust(parameter, gradient))
        velocity.mul_(self.recipe.momentum).add_(gradient)
        if self.recipe.nesterov:
            parameter.addcmul_(gradient, self.rates, value=-decay)
            parameter.addcmul_(velocity, self.rates, value=-decay * self.recipe.momentum)
        else:
            parameter.addcmul_(velocity, self.rates, value=-decay)

    def _trust(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """LARC's factor per column (G C,): 0.001 ||p|| / (||g|| + 1e-8) of its layer, 1 where either norm is 0."""
        p_norm, g_norm = (
            torch.linalg.vector_norm(t.view(-1, self.num_rates, self.num_classes), dim=(0, 2))
            for t in (parameter, gradient)
        )
        factor = TRUST_COEFFICIENT * p_norm / (g_norm + LARC_EPSILON)
        return torch.where((p_norm > 0) & (g_norm > 0), factor, 1.0).repeat_interleave(self.num_classes)

    @property
    def diverged(self) -> Tensor:
        """Which layers hold NaN or infinite weights, bool (G,)."""
        finite = [
            torch.isfinite(p.view(-1, self.num_rates, self.num_classes)).all(dim=2).all(dim=0)
            for p in (self.weight, self.bias)
        ]
        return ~(finite[0] & finite[1])

    def scores(self, x: Tensor, layer: int) -> Tensor:
        """Scores (N, C) of features (N, D) under one layer."""
        columns = slice(layer * self.num_classes, (layer + 1) * self.num_classes)
        return torch.addmm(self.bias[columns], x, self.weight[:, columns])
