"""Optimisers and learning-rate schedules of the papers: SGD, LARS, Adam; cosine, step, constant; linear warm-up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["OptimizerConfig"]


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights move.

    Attributes:
        optimizer: sgd, lars or adam.
        learning_rate: peak learning rate for a global batch of 256 images.
        scale_learning_rate: multiply the learning rate by global batch / 256 (the linear rule of the papers).
        sgd_momentum: momentum of SGD and LARS.
        nesterov: Nesterov momentum (SGD).
        weight_decay: L2 penalty.
        schedule: cosine, step or constant, after the warm-up.
        schedule_every: move the learning rate every "epoch" (MoCo) or every "step".
        milestones: for schedule="step": fractions of the run after which the learning rate is multiplied by `decay`.
        decay: factor at each milestone.
        warmup_epochs: epochs of linear warm-up from 0; may be fractional.
        adam_beta1: first Adam decay.
        adam_beta2: second Adam decay.
    """

    optimizer: Literal["sgd", "lars", "adam"] = "sgd"
    learning_rate: float = 0.03
    scale_learning_rate: bool = True
    sgd_momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    schedule_every: Literal["epoch", "step"] = "step"
    milestones: tuple[float, ...] = (0.6, 0.8)
    decay: float = 0.1
    warmup_epochs: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
