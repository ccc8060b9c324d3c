"""Models compared image by image: both see the same images, so only the images on which they differ matter.

Of N images let b be those that only model A classifies right and c those that only B does. The difference of the
accuracies is (b - c) / N. Its p-value is McNemar's exact test: given that the models differ on an image, either is
right with probability one half. Its 95 % interval is Agresti and Min's (Statistics in Medicine 2005): the normal
interval of the paired difference after half an image is added to each of the four cells, which does not shrink to
nothing where the models never differ. Both are about the images, not about the seeds of pretraining.
"""

from __future__ import annotations

import csv
import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from evaluation.metric import Artifact, Metric, ModelResult
from evaluation.paired import holm

__all__ = ["PairedDifference", "compare_images", "paired_difference"]

Z95 = 1.959963984540054  # 97.5 % point of the standard normal distribution


class PairedDifference(NamedTuple):
    """Accuracy of A minus that of B on the same images.

    Attributes:
        difference: in percentage points.
        ci95: half width of a 95 % interval around it, in percentage points: the larger side of Agresti and Min's.
        p_value: McNemar's exact test, two-sided.
        only_a: images that only A classifies right.
        only_b: images that only B classifies right.
        n: images.
    """

    difference: float
    ci95: float
    p_value: float
    only_a: int
    only_b: int
    n: int


def paired_difference(a: np.ndarray, b: np.ndarray) -> PairedDifference:
    """Compare two models.

    Args:
        a: 1 where A is right, else 0 (N,).
        b: the same for B, on the same images in the same order.

    Raises:
        ValueError: not the same images, none, or values other than 0 and 1.
    """
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(
            f"paired comparison got results of shapes {a.shape} and {b.shape}; it needs one value per image, of the "
            "same images for both models. Evaluate both on the same split of the same data."
        )
    if not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
        raise ValueError("paired comparison needs 1 where a model is right and 0 where it is wrong.")
    from scipy.stats import binomtest

    a, b = a.astype(bool), b.astype(bool)
    n, only_a, only_b = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    differ = only_a + only_b
    p_value = float(binomtest(only_a, differ).pvalue) if differ else 1.0
    difference = (only_a - only_b) / n
    centre = (only_a - only_b) / (n + 2)
    half = Z95 * math.sqrt(differ + 1 - (only_a - only_b) ** 2 / (n + 2)) / (n + 2)
    return PairedDifference(100 * difference, 100 * (half + abs(difference - centre)), p_value, only_a, only_b, n)


def compare_images(name: str, models: Sequence[ModelResult]) -> Iterator[Metric | Artifact]:
    """Every model against the best one as metrics, all pairs as a table.

    Metrics, in the order of ``models``: ``<name>/<model>_minus_<best>`` in percentage points with its interval,
    and ``/p_value`` below that name. The p-values of the table are also given after Holm's correction for the number of
    pairs.

    Args:
        name: of the samples: per image 1 where the model is right.
        models: those without these samples are left out with a warning.
    """
    missing = [model.name for model in models if name not in model.samples]
    if missing:
        message = f"comparison of {name}: no per-image results of {', '.join(missing)}; evaluate them again"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    known = [model for model in models if name in model.samples]
    if len(known) < 2:
        return
    best = max(range(len(known)), key=lambda i: known[i].samples[name].mean())
    keys = _keys([model.name for model in known])
    for i, model in enumerate(known):
        if i != best:
            found = paired_difference(model.samples[name], known[best].samples[name])
            pair = f"{name}/{keys[i]}_minus_{keys[best]}"
            yield Metric(pair, found.difference, found.ci95, found.n)
            yield Metric(f"{pair}/p_value", found.p_value, n=found.n)
    yield Artifact(f"{name}_pairs.csv", _table(name, known).encode())


def _table(name: str, models: Sequence[ModelResult]) -> str:
    """CSV of all pairs."""
    pairs = [(a, b, paired_difference(a.samples[name], b.samples[name])) for a, b in combinations(models, 2)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("model_a", "model_b", "difference_pp", "ci95_pp", "p", "p_holm", "only_a", "only_b", "images"))
    for (a, b, found), corrected in zip(pairs, holm(np.array([found.p_value for _, _, found in pairs])), strict=True):
        numbers = (f"{value:.6g}" for value in (found.difference, found.ci95, found.p_value, corrected))
        writer.writerow((a.name, b.name, *numbers, found.only_a, found.only_b, found.n))
    return text.getvalue()


def _keys(names: Sequence[str]) -> list[str]:
    """Names as parts of metric names: lower case, letters, digits, ``-`` and ``_``; distinct."""
    keys: list[str] = []
    for name in names:
        key = re.sub(r"[^a-z0-9_-]+", "_", name.lower())
        keys.append(key if key not in keys else f"{key}_{len(keys)}")
    return keys
