"""How long and how fast a fine-tuning run trains: a frozen record and the learning rate as a function of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

__all__ = ["Decay", "Schedule", "build_optimizer", "learning_rate", "set_learning_rate"]

Decay = Literal["constant", "steps", "cosine", "poly", "exponential"]


@dataclass(frozen=True)
class Schedule:
    """A training schedule, counted in iterations (optimiser steps on one global batch).

    Attributes:
        iterations: in all.
        batch_size: images of a global batch, over all workers.
        learning_rate: peak.
        optimizer: sgd, adam or adamw.
        momentum: of sgd.
        nesterov: of sgd.
        weight_decay: of all parameters, where a group does not say otherwise.
        warmup_iterations: linear rise from ``warmup_factor`` times the learning rate.
        warmup_factor: see there.
        decay: constant, steps (times ``gamma`` at each milestone), cosine (to 0), poly ((1 - t/T)^power, not below
            ``min_learning_rate``), exponential (times ``gamma`` after every ``gamma_iterations``).
        milestones: iterations of "steps".
        gamma: see ``decay``.
        gamma_iterations: see ``decay``.
        power: of poly.
        min_learning_rate: floor of poly.
        clip_norm: largest norm of the gradient; 0 does not clip.
    """

    iterations: int
    batch_size: int
    learning_rate: float
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    warmup_iterations: int = 0
    warmup_factor: float = 0.001
    decay: Decay = "constant"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    gamma_iterations: int = 1
    power: float = 0.9
    min_learning_rate: float = 0.0
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.batch_size < 1:
            raise ValueError(
                f"iterations is {self.iterations} and batch_size {self.batch_size}; both must be at least 1."
            )
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0.")

    def with_batch_size(self, batch_size: int) -> Schedule:
        """The linear scaling rule (Goyal et al. 2017; detectron2's ``auto_scale_workers``).

        k times the batch: k times the learning rate, and 1/k of the iterations, milestones and warm-up, so that as many
        images are seen.
        """
        scale = batch_size / self.batch_size

        def shorter(iterations: int) -> int:
            return max(1, round(iterations / scale))

        return replace(
            self,
            batch_size=batch_size,
            learning_rate=self.learning_rate * scale,
            min_learning_rate=self.min_learning_rate * scale,
            iterations=shorter(self.iterations),
            warmup_iterations=shorter(self.warmup_iterations) if self.warmup_iterations else 0,
            milestones=tuple(shorter(milestone) for milestone in self.milestones),
            gamma_iterations=shorter(self.gamma_iterations),
        )

    def with_iterations(self, iterations: int) -> Schedule:
        """The same shape over another number of iterations."""
        scale = iterations / self.iterations
        return replace(
            self,
            iterations=iterations,
            warmup_iterations=round(self.warmup_iterations * scale),
            milestones=tuple(max(1, round(milestone * scale)) for milestone in self.milestones),
            gamma_iterations=max(1, round(self.gamma_iterations * scale)),
        )

    def to_json(self) -> dict[str, Any]:
        """All fields, for protocols."""
        return asdict(self)


def learning_rate(schedule: Schedule, iteration: int) -> float:
    """Learning rate of an iteration, counted from 0."""
    warmup = 1.0
    if iteration < schedule.warmup_iterations:
        share = iteration / schedule.warmup_iterations
        warmup = schedule.warmup_factor * (1 - share) + share
    return warmup * _decayed(schedule, iteration)


def _decayed(schedule: Schedule, iteration: int) -> float:
    peak, done = schedule.learning_rate, iteration / schedule.iterations
    if schedule.decay == "steps":
        return peak * schedule.gamma ** sum(iteration >= milestone for milestone in schedule.milestones)
    if schedule.decay == "cosine":
        return 0.5 * peak * (1 + math.cos(math.pi * done))
    if schedule.decay == "poly":
        floor = schedule.min_learning_rate
        return (peak - floor) * (1 - done) ** schedule.power + floor
    if schedule.decay == "exponential":
        return peak * schedule.gamma ** (iteration // schedule.gamma_iterations)
    return peak


def build_optimizer(schedule: Schedule, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser over parameter groups with optional "lr_scale" and "weight_decay"."""
    groups = [{"lr_scale": 1.0, **group} for group in groups]
    common: dict[str, Any] = {"lr": schedule.learning_rate, "weight_decay": schedule.weight_decay, "fused": True}
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=schedule.momentum, nesterov=schedule.nesterov, **common)
    kind = torch.optim.Adam if schedule.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, **common)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """The learning rate of the next step, times each group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["lr_scale"]
