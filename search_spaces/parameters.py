"""The hyperparameters of the mission, each with one name, one range and one reason.

A parameter is suggested only for methods that have it, so a trial never carries an option without effect. The same
name has the same range for every method: Optuna then learns across methods, and MLflow compares them in one column.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from methods import METHODS
from search_spaces.space import SpaceContext

__all__ = ["preset_parameters", "queue_sizes", "suggest_parameters"]

# Zhao et al. (ICLR 2021) Table 10 sweeps 0.07 to 0.2; SimCLR uses up to 0.5 on small images.
TEMPERATURE = (0.04, 0.5)
# Per 256 images. The methods' published rates span 0.03 (MoCo) to 0.1 (supervised): half a decade to either side.
LEARNING_RATE = (0.01, 0.3)
PROJECTOR_DEPTHS = (1, 2, 3)  # linear layers: MoCo v1 has 1, MoCo v2 2, SimSiam 3
QUEUE_BATCHES = (4, 16, 64, 256)  # queue length in global batches: 65,536 keys are 256 batches of 256


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
    trial.suggest_float("learning_rate", *LEARNING_RATE, log=True)
    longest = max(1, context.epochs // 4)
    trial.suggest_int("warmup_epochs", 0, longest)
    if has(method, "temperature"):
        trial.suggest_float("temperature", *TEMPERATURE, log=True)
    if has(method, "queue_size"):
        trial.suggest_categorical("queue_size", queue_sizes(context))
    if has(method, "projector_depth"):
        trial.suggest_int("projector_depth", min(PROJECTOR_DEPTHS), max(PROJECTOR_DEPTHS))


def preset_parameters(method: str, context: SpaceContext) -> dict[str, Any]:
    """The paper's setting of a method, moved into the ranges above where this data set cannot hold it."""
    spec = METHODS[method]
    values: dict[str, Any] = {
        "learning_rate": _clip(spec.optimizer.learning_rate, LEARNING_RATE),
        "warmup_epochs": 0,
    }
    if has(method, "temperature"):
        values["temperature"] = _clip(spec.config.temperature, TEMPERATURE)
    if has(method, "queue_size"):
        allowed = queue_sizes(context)
        values["queue_size"] = max((k for k in allowed if k <= spec.config.queue_size), default=allowed[0])
    if has(method, "projector_depth"):
        values["projector_depth"] = int(_clip(spec.config.projector_depth, (1, 3)))
    return values


def _clip(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])
