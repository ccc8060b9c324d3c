"""The record that every evaluation yields, and the context it works in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

__all__ = ["EvaluationContext", "Features", "Metric", "Phase"]

Phase = Literal["val", "test"]


class Metric(NamedTuple):
    """One number: ``name`` is ``<task>/<metric>``; ``ci95`` is the half width of a 95 % interval; ``n`` its sample count."""

    name: str
    value: float
    ci95: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Features:
    """Frozen features of one split.

    Attributes:
        features: float32 (N, D), pooled backbone output, not normalised.
        labels: int64 (N,), 0..len(class_names)-1.
        class_names: names in label order.
    """

    features: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationContext:
    """What an evaluation may ask for.

    Attributes:
        features: split name -> Features; one streamed pass per split, cached. Splits: "train", "val", "test" (images of
            the base classes) and "val_classes", "novel_classes" (classes never seen in pretraining).
        phase: "val" while hyperparameters are still being chosen (test data is never touched), "test" for the report.
        seed: seed of task lists and solvers; the same for all models, so that comparisons are paired.
    """

    features: Callable[[str], Features]
    phase: Phase
    seed: int = 0
