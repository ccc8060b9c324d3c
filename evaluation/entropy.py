"""Representation entropy H_R: over how many directions the features of the pretraining set spread.

Sun et al., AAAI 2022 (CAMtrast), Eq. 1. Eigenvalues l_j of the covariance of the features, normalised to sum one:
``H_R = -sum_j l_j ln l_j``. Larger means more spread; at most ln(min(D, N - 1)), reached when all directions carry the
same variance. Natural logarithm (the published values, up to 5.5, stay below ln 2048 = 7.62; the paper does not say).
Invariant to scale and rotation, so L2 normalisation changes it only through the vectors' individual norms; the default
is raw features, as for the paper's uniformity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch

from evaluation.metric import ClassCounts, EvaluationContext, Metric, Phase, get_features, l2_normalize

__all__ = ["EntropyConfig", "check", "evaluate", "metric_names", "protocol", "representation_entropy", "splits"]

BLOCK = 4096  # rows converted to float64 at once


@dataclass(frozen=True)
class EntropyConfig:
    """Representation entropy.

    Attributes:
        normalize: scale each feature vector to unit length first; the papers' values are taken as raw.
    """

    normalize: bool = False


def metric_names(config: EntropyConfig) -> tuple[str, ...]:
    """Names of the main metrics; the upper bound for this N and D is yielded too."""
    return ("entropy/h_r",)


def splits(config: EntropyConfig, phase: Phase) -> tuple[str, ...]:
    """Splits that the evaluation reads: the whole pretraining set in both phases."""
    return ("train",)


def protocol(config: EntropyConfig, phase: Phase) -> dict:
    """Everything needed to reproduce the numbers, as JSON data."""
    kind = "L2-normalised (a zero vector stays zero)" if config.normalize else "raw"
    return {
        "name": "representation entropy H_R",
        "source": "Sun et al., AAAI 2022 (CAMtrast), Eq. 1",
        "phase": phase,
        "split": "train",
        "features": f"pooled backbone output, one view per image, {kind}",
        "metric": "-sum l ln l over the eigenvalues l of the covariance, normalised to sum 1; natural logarithm",
        "solver": "covariance and eigenvalues in float64; negative eigenvalues (rounding) are 0, 0 ln 0 = 0",
        "upper_bound": "ln(min(D, N - 1)), the metric entropy/h_r_upper_bound",
        "interval": "none: one number of the whole set",
        "config": asdict(config),
    }


def check(config: EntropyConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError where the data do not allow the evaluation."""
    if sum(class_counts.get("train", ())) < 2:
        raise ValueError("entropy needs at least 2 images in split 'train'; give train=URI with more images.")


def evaluate(config: EntropyConfig, context: EvaluationContext) -> Iterator[Metric]:
    """Yield H_R in nats and its upper bound."""
    train = get_features(context, "train")
    check(config, context.phase, {"train": train.class_counts})
    x = l2_normalize(train.features, "train") if config.normalize else train.features
    n, dim = x.shape
    yield Metric("entropy/h_r", representation_entropy(x, context.device), n=n)
    yield Metric("entropy/h_r_upper_bound", math.log(min(dim, n - 1)))


def representation_entropy(x: np.ndarray, device: str = "cpu") -> float:
    """H_R of features (N, D) in nats; 0 when all rows are equal (the limit of a single direction).

    The smaller of the D x D covariance and the N x N Gram matrix is used; their non-zero eigenvalues agree.
    """
    n, dim = x.shape
    rows = torch.from_numpy(x)
    mean = torch.from_numpy(x.mean(axis=0, dtype=np.float64)).to(device)
    if n <= dim:
        centred = rows.to(device).double() - mean
        scatter = centred @ centred.T
    else:
        scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        for block in rows.split(BLOCK):
            centred = block.to(device).double() - mean
            scatter.addmm_(centred.T, centred)
    eigenvalues = torch.linalg.eigvalsh(scatter).clamp_(min=0)
    total = eigenvalues.sum()
    if total == 0:
        return 0.0
    shares = eigenvalues / total
    return float(-torch.xlogy(shares, shares).sum()) + 0.0  # -0.0 becomes 0.0
