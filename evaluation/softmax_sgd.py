"""Softmax regression on cached features by the SGD recipes of published protocols, many settings at once.

The settings (learning rate, weight decay) of one batch size see the same batches: their weights are the column groups
of one matrix, so a step is two matrix products however many settings there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaluation.feature_blocks import as_tensor
from evaluation.linear import Probes, score_gradient

__all__ = ["Recipe", "Setting", "correct_share", "fit_softmax"]

BN_MOMENTUM, BN_EPS = 0.1, 1e-5  # torch.nn.BatchNorm1d's defaults


class Setting(NamedTuple):
    """What is tuned.

    Attributes:
        learning_rate: at the start.
        weight_decay: of weights and biases.
    """

    learning_rate: float
    weight_decay: float


@dataclass(frozen=True)
class Recipe:
    """What all settings share.

    Attributes:
        epochs: passes over the features.
        batch_size: features per step; the whole set where it is smaller.
        momentum: of SGD.
        factor: epoch -> factor of the learning rate.
        batch_norm: BatchNorm without affine parameters first: batch statistics in training, running ones afterwards.
        drop_last: leave out each epoch's last batch where it is smaller than the others.
    """

    epochs: int
    batch_size: int
    momentum: float
    factor: Callable[[int], float]
    batch_norm: bool = False
    drop_last: bool = False


def fit_softmax(
    x: np.ndarray,
    y: np.ndarray,
    num_classes: int,
    recipe: Recipe,
    settings: Sequence[Setting],
    generator: torch.Generator,
    device: str = "cpu",
) -> Probes:
    """Train one linear layer per setting, from zero.

    Args:
        x: features (N, D), float32; at least 2 rows with ``batch_norm``.
        y: labels (N,).
        num_classes: C.
        recipe: how.
        settings: G of them.
        generator: order of the features, on the CPU.
        device: where to compute.
    """
    features, targets = as_tensor(x).to(device), torch.from_numpy(y).to(device)
    (n, dim), columns = x.shape, len(settings) * num_classes
    weight, bias = features.new_zeros(dim, columns), features.new_zeros(columns)
    weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    rates, decays = features.new_tensor(settings).repeat_interleave(num_classes, dim=0).T.contiguous()
    norm = _BatchNorm(dim, device) if recipe.batch_norm else None
    size = min(recipe.batch_size, n)
    for epoch in range(recipe.epochs):
        rate = rates * recipe.factor(epoch)
        for rows in torch.randperm(n, generator=generator)[: n - n % size if recipe.drop_last else n].split(size):
            rows = rows.to(device)
            batch = features.index_select(0, rows)
            if norm is not None:
                batch = norm(batch)
            gradient = score_gradient(torch.addmm(bias, batch, weight), targets[rows], len(settings))
            weight_velocity.addmm_(batch.T, gradient, beta=recipe.momentum).addcmul_(weight, decays)
            bias_velocity.mul_(recipe.momentum).add_(gradient.sum(dim=0)).addcmul_(bias, decays)
            weight.addcmul_(weight_velocity, rate, value=-1)
            bias.addcmul_(bias_velocity, rate, value=-1)
    mean, scale = (features.new_zeros(dim), features.new_ones(dim)) if norm is None else norm.statistics()
    return Probes(mean, scale, weight.view(dim, len(settings), num_classes), bias.view(len(settings), num_classes))


class _BatchNorm:
    """BatchNorm without affine parameters; its input needs no gradient."""

    def __init__(self, dim: int, device: str) -> None:
        self.mean, self.variance = torch.zeros(dim, device=device), torch.ones(dim, device=device)

    def __call__(self, batch: Tensor) -> Tensor:
        """Batch (B, D) at zero mean and unit variance; updates the running statistics (unbiased variance)."""
        variance, mean = torch.var_mean(batch, dim=0, correction=0)
        self.mean.lerp_(mean, BN_MOMENTUM)
        self.variance.lerp_(variance * (len(batch) / max(len(batch) - 1, 1)), BN_MOMENTUM)
        return (batch - mean) * (variance + BN_EPS).rsqrt()

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Running mean and inverse standard deviation (D,)."""
        return self.mean, (self.variance + BN_EPS).rsqrt()


def correct_share(probes: Probes, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Share (G,) of features that each setting's probe classifies right; -1 for a probe that diverged."""
    predicted = probes.predict(x)
    return np.where(predicted[0] < 0, -1.0, (predicted == y[:, None]).mean(axis=0))
