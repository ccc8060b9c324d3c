"""Features with planted truth."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from evaluation import EvaluationContext, Features, Phase


def clusters(
    num_classes: int, per_class: int, dim: int, *, spread: float, seed: int, centre_seed: int = 0, scale: float = 1.0
) -> Features:
    """Gaussian classes around random unit-variance centres; ``spread`` is the standard deviation within a class."""
    centres = np.random.default_rng(centre_seed).normal(size=(num_classes, dim))
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(num_classes), per_class))
    x = centres[labels] + spread * rng.normal(size=(len(labels), dim))
    return Features((scale * x).astype(np.float32), labels, tuple(f"class {c}" for c in range(num_classes)))


def with_labels(features: Features, labels: np.ndarray) -> Features:
    """The same images under other labels."""
    return Features(features.features, labels, features.class_names)


def context_of(splits: Mapping[str, Features], phase: Phase, seed: int = 0) -> EvaluationContext:
    """Context over given features; a split that is missing is a KeyError."""
    return EvaluationContext(splits.__getitem__, phase, seed)


def five_splits(num_classes: int = 6, per_class: int = 30, dim: int = 16, spread: float = 0.5) -> dict[str, Features]:
    """All splits of a small data set: base images, and two sets of other classes."""
    base = {
        name: clusters(num_classes, count, dim, spread=spread, seed=i)
        for i, (name, count) in enumerate({"train": per_class, "val": 10, "test": 12}.items())
    }
    unseen = {
        name: clusters(num_classes, per_class, dim, spread=spread, seed=10 + i, centre_seed=20 + i)
        for i, name in enumerate(("val_classes", "novel_classes"))
    }
    return base | unseen
