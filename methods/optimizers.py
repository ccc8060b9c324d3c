"""Optimisers and schedules of the papers: SGD, LARS, Adam; cosine, linear, step, constant; linear warm-up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

import torch
from torch import nn

from methods.lars import LARS

__all__ = ["OptimizerConfig", "build_optimizer", "learning_rate", "peak_learning_rate", "set_learning_rate"]

# The batch size at which OptimizerConfig.learning_rate is stated.
REFERENCE_BATCH = 256
# Key of a parameter group that the schedule leaves at the peak learning rate.
FIXED = "fixed_learning_rate"


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights move.

    Attributes:
        optimizer: sgd, lars, larc (lars that also adapts and decays biases and BatchNorm: SwAV) or adam.
        learning_rate: peak learning rate for a global batch of 256 images.
        scale_learning_rate: multiply the learning rate by global batch / 256 (the linear rule of the papers).
        sgd_momentum: momentum of SGD, LARS and LARC.
        nesterov: Nesterov momentum (SGD).
        weight_decay: L2 penalty.
        schedule: cosine, linear, step or constant, after the warm-up.
        schedule_every: move the learning rate every "epoch" (MoCo) or every "step".
        milestones: for schedule="step": fractions of the run after which the learning rate is multiplied by `decay`.
        decay: factor at each milestone.
        warmup_epochs: epochs of linear warm-up from 0; may be fractional.
        final_learning_rate: where schedule="cosine" or "linear" ends, stated and scaled like `learning_rate`; the other
            schedules do not use it.
        adam_beta1: first Adam decay.
        adam_beta2: second Adam decay.
    """

    optimizer: Literal["sgd", "lars", "larc", "adam"] = "sgd"
    learning_rate: float = 0.03
    scale_learning_rate: bool = True
    sgd_momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    schedule: Literal["cosine", "linear", "step", "constant"] = "cosine"
    schedule_every: Literal["epoch", "step"] = "step"
    milestones: tuple[float, ...] = (0.6, 0.8)
    decay: float = 0.1
    warmup_epochs: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    final_learning_rate: float = 0.0

    def __post_init__(self) -> None:
        hints = get_type_hints(OptimizerConfig)
        for name in ("optimizer", "schedule", "schedule_every"):
            _require(getattr(self, name) in get_args(hints[name]), name, self, f"one of {get_args(hints[name])}")
        _require(_is_finite(self.learning_rate) and self.learning_rate > 0, "learning_rate", self, "a number above 0")
        _require(
            0 <= self.final_learning_rate <= self.learning_rate,
            "final_learning_rate",
            self,
            f"between 0 and learning_rate={self.learning_rate!r}",
        )
        _require(_is_finite(self.weight_decay) and self.weight_decay >= 0, "weight_decay", self, "a number >= 0")
        _require(_is_finite(self.warmup_epochs) and self.warmup_epochs >= 0, "warmup_epochs", self, "a number >= 0")
        for name in ("sgd_momentum", "adam_beta1", "adam_beta2"):
            _require(0 <= getattr(self, name) < 1, name, self, "in [0, 1)")
        _require(0 < self.decay <= 1, "decay", self, "in (0, 1]")
        is_ordered = list(self.milestones) == sorted(set(self.milestones))
        _require(
            is_ordered and all(0 < m < 1 for m in self.milestones),
            "milestones",
            self,
            "increasing fractions of the run, each between 0 and 1",
        )
        _require(
            not self.nesterov or (self.optimizer == "sgd" and self.sgd_momentum > 0),
            "nesterov",
            self,
            "False unless optimizer is sgd and sgd_momentum is above 0",
        )


def _is_finite(value: float) -> bool:
    return math.isfinite(value)


def _require(is_valid: bool, name: str, config: OptimizerConfig, allowed: str) -> None:
    if not is_valid:
        raise ValueError(f"{name}={getattr(config, name)!r} is not allowed: it must be {allowed}.")


def peak_learning_rate(config: OptimizerConfig, global_batch_size: int) -> float:
    """The learning rate after the warm-up."""
    return config.learning_rate * _scale(config, global_batch_size)


def _scale(config: OptimizerConfig, global_batch_size: int) -> float:
    return global_batch_size / REFERENCE_BATCH if config.scale_learning_rate else 1.0


def learning_rate(
    config: OptimizerConfig, global_batch_size: int, step: int, total_steps: int, steps_per_epoch: int
) -> float:
    """Learning rate of one optimiser step; a pure function.

    Warm-up: peak * step / warm-up steps. Then, with t = how far the run is between the end of the warm-up and its own
    end (0 to 1, below 1) and floor = the scaled final rate: cosine is floor + (peak - floor) * (1 + cos(pi t)) / 2,
    linear is floor + (peak - floor) * (1 - t). The step schedule counts its milestones over the whole run, warm-up
    included. With ``schedule_every="epoch"`` the position moves at epoch boundaries only (MoCo, SimSiam); the warm-up
    always moves every step.

    Args:
        config: peak, warm-up and schedule.
        global_batch_size: images per optimiser step over all workers.
        step: optimiser steps finished before this one.
        total_steps: optimiser steps of the run.
        steps_per_epoch: optimiser steps of an epoch.

    Raises:
        ValueError: the warm-up is longer than the run.
    """
    warmup_steps = config.warmup_epochs * steps_per_epoch
    if warmup_steps > total_steps:
        raise ValueError(
            f"warmup_epochs={config.warmup_epochs:g} is longer than the run of {total_steps / steps_per_epoch:g} "
            "epochs. Set fewer warm-up epochs or more epochs."
        )
    peak = peak_learning_rate(config, global_batch_size)
    warmup = step / warmup_steps if step < warmup_steps else 1.0
    if config.schedule == "constant":
        return peak * warmup
    position = step // steps_per_epoch * steps_per_epoch if config.schedule_every == "epoch" else step
    if config.schedule == "step":
        # The tolerance keeps 0.6 * 200 epochs at 120 whatever the rounding of 0.6.
        passed = sum(position >= m * total_steps - 1e-6 * steps_per_epoch for m in config.milestones)
        return peak * warmup * config.decay**passed
    if step < warmup_steps:
        return peak * warmup
    t = max(0.0, position - warmup_steps) / (total_steps - warmup_steps)
    floor = config.final_learning_rate * _scale(config, global_batch_size)
    if config.schedule == "linear":
        return floor + (peak - floor) * (1 - t)
    return floor + (peak - floor) * (1 + math.cos(math.pi * t)) / 2


def build_optimizer(method: nn.Module, config: OptimizerConfig, global_batch_size: int) -> torch.optim.Optimizer:
    """The optimiser over the trainable parameters of a method, at the peak learning rate.

    Parameters under the prefixes of ``method.fixed_learning_rate`` (SimSiam's predictor) form groups that
    ``set_learning_rate`` leaves alone. SGD and Adam decay every parameter, as the official MoCo, SimSiam and
    CAMtrast codes do; LARS neither decays nor adapts vectors (biases and BatchNorm), as SimCLR and BYOL do; LARC
    (``apex`` with clip off, SwAV) makes no such difference.

    Raises:
        ValueError: a prefix of ``fixed_learning_rate`` that names no parameter, or nothing to train.
    """
    prefixes: tuple[str, ...] = getattr(method, "fixed_learning_rate", ())
    named = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    unused = [prefix for prefix in prefixes if not any(name.startswith(prefix) for name, _ in named)]
    if unused or not named:
        raise ValueError(
            f"{type(method).__name__}: fixed_learning_rate={unused} names no trainable parameter."
            if unused
            else f"{type(method).__name__} has no trainable parameter."
        )
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in named:
        is_vector = config.optimizer == "lars" and p.ndim <= 1
        groups.setdefault((name.startswith(prefixes), is_vector), []).append(p)
    peak = peak_learning_rate(config, global_batch_size)
    param_groups = [
        {"params": params, "lr": peak, FIXED: is_fixed} | ({"weight_decay": 0.0, "adapt": False} if is_vector else {})
        for (is_fixed, is_vector), params in groups.items()
    ]
    if config.optimizer in ("lars", "larc"):
        return LARS(param_groups, peak, momentum=config.sgd_momentum, weight_decay=config.weight_decay)
    if config.optimizer == "adam":
        betas = (config.adam_beta1, config.adam_beta2)
        return torch.optim.Adam(param_groups, peak, betas=betas, weight_decay=config.weight_decay, foreach=True)
    return torch.optim.SGD(
        param_groups,
        peak,
        momentum=config.sgd_momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        foreach=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets the learning rate of every group that has no fixed one."""
    for group in optimizer.param_groups:
        if not group.get(FIXED, False):
            group["lr"] = value
