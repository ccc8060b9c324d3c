"""The hyperparameters of the mission, each with one name, one range and one reason.

A parameter is suggested only for methods that have it, so a trial never carries an option without effect. The same
name has the same range for every method (the learning rate: for every optimiser): Optuna then learns across methods,
and MLflow compares them in one column. ``suggest_own_parameters`` adds what only one or two methods have; the space of
a single method sweeps that too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from methods import METHODS
from search_spaces.space import SpaceContext

__all__ = [
    "fitted_constants",
    "own_preset",
    "preset_parameters",
    "queue_sizes",
    "suggest_own_parameters",
    "suggest_parameters",
    "suggested_preset",
]

# Zhao et al. (ICLR 2021) Table 10 sweeps 0.07 to 0.2; SimCLR uses up to 0.5 on small images.
TEMPERATURE = (0.04, 0.5)
# Per 256 images, half a decade or more around the published rates: SGD 0.03 (MoCo) to 0.2 (Rotation), LARS 0.2 (BYOL)
# to 0.6 (SwAV), Adam 5e-4 (Newell & Deng).
LEARNING_RATE = {"sgd": (0.01, 0.6), "lars": (0.05, 2.0), "larc": (0.05, 2.0), "adam": (1e-4, 1e-2)}
PROJECTOR_DEPTHS = (1, 2, 3)  # linear layers: MoCo v1 has 1, MoCo v2 2, SimSiam 3
QUEUE_BATCHES = (4, 16, 64, 256)  # queue length in global batches: 65,536 keys are 256 batches of 256
# MoCo (He et al. 2020, section 4.1) ablates 0 to 0.9999; BYOL uses 0.97 for 40 epochs to 0.996 for 1,000.
MOMENTA = (0.9, 0.97, 0.99, 0.996, 0.999)
# Parameters of one or two methods: name -> range (log-uniform) or choices, from the papers' ablations.
OWN_RANGES: Mapping[str, tuple[float, float]] = {
    "kl_weight": (1e-6, 1e-3),  # around Newell & Deng's 1e-5
    "tanh_clip": (5.0, 40.0),  # AMDIM: 20 and 30
    "epsilon": (0.02, 0.1),  # SwAV: 0.05
}
OWN_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "bank_momentum": (0.2, 0.4, 0.5, 0.7),  # InstDisc and CMC 0.5, Newell & Deng 0.2 and 0.4
    "num_negatives": (1024, 4096, 16384, 65536),  # InstDisc 4,096 and 65,536, CMC 4,096 to 16,384
    "num_prototypes": (30, 100, 300, 1000, 3000),  # SwAV, Table 11 of the paper: 3,000 to 100,000 on ImageNet
    "projector_batchnorm": (True, False),  # SL-MLP's ablation
    "projector_relu": (True, False),
    "rotations": ("all", "random"),
    "second_view": ("suppressed", "augmented"),
    "suppress_to": ("mean_color", "black"),
}
# "augmented" needs a second view per image, which a trial cannot add.
NOT_SWEPT = ("second_view",)


def has(method: str, name: str) -> bool:
    """Whether the method's own config has a field of this name."""
    return name in {f.name for f in dataclasses.fields(METHODS[method].config)}


def queue_sizes(context: SpaceContext) -> list[int]:
    """Queue lengths to choose from: multiples of the global batch that do not exceed the pretraining set."""
    most = context.num_images // context.batch_size
    multiples = [m for m in QUEUE_BATCHES if m <= most] or [max(1, most)]
    return [m * context.batch_size for m in multiples]


def suggest_parameters(trial: Any, method: str, context: SpaceContext) -> None:
    """Suggest every hyperparameter of the mission that ``method`` has."""
    trial.suggest_float("learning_rate", *LEARNING_RATE[METHODS[method].optimizer.optimizer], log=True)
    trial.suggest_int("warmup_epochs", 0, _longest_warmup(context))
    if has(method, "temperature"):
        trial.suggest_float("temperature", *TEMPERATURE, log=True)
    if has(method, "queue_size"):
        trial.suggest_categorical("queue_size", queue_sizes(context))
    if has(method, "momentum"):
        trial.suggest_categorical("momentum", list(MOMENTA))
    if has(method, "projector_depth"):
        trial.suggest_int("projector_depth", min(PROJECTOR_DEPTHS), max(PROJECTOR_DEPTHS))


def suggest_own_parameters(trial: Any, method: str, context: SpaceContext) -> None:
    """Suggest what only this method and its nearest relatives have."""
    for name, bounds in OWN_RANGES.items():
        if has(method, name):
            trial.suggest_float(name, *bounds, log=True)
    for name, choices in OWN_CHOICES.items():
        if has(method, name) and name not in NOT_SWEPT:
            trial.suggest_categorical(name, _allowed(name, choices, context))


def preset_parameters(method: str, context: SpaceContext) -> dict[str, Any]:
    """The paper's setting of a method, moved to what this data set and this length of run can hold."""
    return suggested_preset(method, context) | fitted_constants(method, context)


def suggested_preset(method: str, context: SpaceContext) -> dict[str, Any]:
    """The published values of what ``suggest_parameters`` suggests, moved into its ranges."""
    spec = METHODS[method]
    values: dict[str, Any] = {
        "learning_rate": spec.optimizer.learning_rate,
        "warmup_epochs": min(int(spec.optimizer.warmup_epochs), context.epochs // 10),
    }
    if has(method, "temperature"):
        values["temperature"] = spec.config.temperature
    if has(method, "queue_size"):
        allowed = queue_sizes(context)
        values["queue_size"] = max((k for k in allowed if k <= spec.config.queue_size), default=allowed[0])
    if has(method, "momentum"):
        values["momentum"] = min(MOMENTA, key=lambda m: abs(m - spec.config.momentum))
    if has(method, "projector_depth"):
        values["projector_depth"] = min(max(spec.config.projector_depth, min(PROJECTOR_DEPTHS)), max(PROJECTOR_DEPTHS))
    return values


def own_preset(method: str, context: SpaceContext) -> dict[str, Any]:
    """The published values of what ``suggest_own_parameters`` suggests, moved to the nearest choice."""
    config = METHODS[method].config
    values = {name: getattr(config, name) for name in OWN_RANGES if has(method, name)}
    for name, choices in OWN_CHOICES.items():
        if has(method, name) and name not in NOT_SWEPT:
            allowed, published = _allowed(name, choices, context), getattr(config, name)
            is_listed = published in allowed
            values[name] = published if is_listed else min(allowed, key=lambda c, p=published: abs(c - p))
    return values


def fitted_constants(method: str, context: SpaceContext) -> dict[str, Any]:
    """Published settings that only make sense at the published scale, scaled down; part of every trial.

    Noise samples and prototypes: at most as many as there are images (prototypes: a quarter). SwAV's queue and frozen
    prototypes: the same share of the run as in its recipe of 200 epochs.
    """
    config, values = METHODS[method].config, {}
    if has(method, "num_negatives"):
        values["num_negatives"] = min(config.num_negatives, context.num_images)
    if has(method, "num_prototypes"):
        values["num_prototypes"] = min(config.num_prototypes, max(2, context.num_images // 4))
    if has(method, "queue_start_epoch"):
        values["queue_start_epoch"] = min(config.queue_start_epoch, round(context.epochs * 15 / 200))
        values["frozen_prototype_epochs"] = min(config.frozen_prototype_epochs, context.epochs / 200)
    return values


def _longest_warmup(context: SpaceContext) -> int:
    return max(1, context.epochs // 4)


def _allowed(name: str, choices: tuple[Any, ...], context: SpaceContext) -> list[Any]:
    """Choices that this data set can hold."""
    limit = {"num_negatives": context.num_images, "num_prototypes": context.num_images // 4}.get(name)
    if limit is None:
        return list(choices)
    return [c for c in choices if c <= limit] or [max(2, limit)]
