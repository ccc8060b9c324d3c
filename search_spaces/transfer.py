"""Which method transfers best, and with which hyperparameters: the default space, over every method.

Command: ``python rayjobs/sweep.py`` (rendered data, CPU, minutes). The papers' own settings are tried first, one trial
per method; Optuna's TPE goes on from there.
"""

from __future__ import annotations

from typing import Any

from methods import METHODS
from search_spaces.parameters import fitted_constants, suggest_parameters, suggested_preset
from search_spaces.space import SearchSpace, SpaceContext

__all__ = ["SPACE", "presets", "sample"]


def sample(trial: Any, context: SpaceContext) -> dict[str, Any]:
    """The method first, then the hyperparameters that it has."""
    if len(context.methods) == 1:
        method = context.methods[0]
        suggest_parameters(trial, method, context)
        return {"method": method, **fitted_constants(method, context)}
    method = trial.suggest_categorical("method", list(context.methods))
    suggest_parameters(trial, method, context)
    return fitted_constants(method, context)


def presets(context: SpaceContext) -> list[dict[str, Any]]:
    """Each method's published setting."""
    is_choice = len(context.methods) > 1
    return [{**({"method": m} if is_choice else {}), **suggested_preset(m, context)} for m in context.methods]


SPACE = SearchSpace(
    name="transfer",
    methods=tuple(METHODS),
    sample=sample,
    presets=presets,
    summary="every method, with temperature, queue size, momentum, warm-up, projector depth and learning rate where it "
    "has them",
)
