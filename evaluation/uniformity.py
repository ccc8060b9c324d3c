"""Uniformity U of the features over all pairs of images, for unit-length and for raw features.

Sun et al., AAAI 2022 (CAMtrast), Eq. 2: ``U = -ln E exp(-t |f(x) - f(y)|^2)``, t = 2; larger is more uniform (the
opposite sign of ``SsnL/align_uniform: uniform_loss``). Unit vectors are bounded by 0 <= U <= 4 at t = 2 (Jensen; random
directions in 2048 dimensions give 3.996). The published 7.49 to 21.96 are therefore values of raw features: only
``uniformity/raw`` compares with them.

The mean is over all pairs i < j of the split (or of a seeded sample). One pass over the upper triangle: each block of
inner products is computed once, in reused buffers, and serves both numbers; sums are float64. Products of features
centred at their mean keep the raw distances of near-equal pairs exact to float32 rounding; where the features are so
long that this rounding could move U by more than 0.001, the products are float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaluation.metric import ClassCounts, EvaluationContext, Metric, Phase, get_features

__all__ = ["UniformityConfig", "check", "evaluate", "metric_names", "pairwise_uniformity", "protocol", "splits"]

BLOCK = 512  # rows; a block of float32 products is 1 MB
NEGLIGIBLE = -80.0  # e^-80 of the largest term; smaller exponents cost a slow path of exp and change no sum
RAW_ACCURACY = 1e-3


@dataclass(frozen=True)
class UniformityConfig:
    """Uniformity over all pairs.

    Attributes:
        t: scale of the squared distance.
        max_images: at most this many images, drawn without replacement with the evaluation's seed; None takes all. The
            cost grows with the square: 50,000 images of 2048 dimensions are minutes on a CPU core.
    """

    t: float = 2.0
    max_images: int | None = None


def metric_names(config: UniformityConfig) -> tuple[str, ...]:
    """Names of the metrics, in the order in which they are yielded."""
    return ("uniformity/normalized", "uniformity/raw")


def splits(config: UniformityConfig, phase: Phase) -> tuple[str, ...]:
    """Splits that the evaluation reads: the pretraining set in both phases, as for the entropy."""
    return ("train",)


def protocol(config: UniformityConfig, phase: Phase) -> dict:
    """Everything needed to reproduce the numbers, as JSON data."""
    if config.max_images is None:
        pairs = "all pairs i < j of the split"
    else:
        pairs = f"all pairs i < j of at most {config.max_images} images drawn without replacement with the seed"
    return {
        "name": "uniformity U",
        "source": "Sun et al., AAAI 2022 (CAMtrast), Eq. 2; sign opposite to SsnL/align_uniform",
        "phase": phase,
        "split": "train",
        "features": "pooled backbone output, one view per image; L2-normalised (a zero vector stays zero) and raw",
        "metric": f"-ln mean exp(-t |f(x) - f(y)|^2), t = {config.t:g}, natural logarithm",
        "pairs": pairs,
        "solver": (
            f"float32 products of centred features (float64 where rounding could exceed {RAW_ACCURACY:g}), float64 "
            "sums, log-sum-exp"
        ),
        "bounds": f"normalized: 0 to {2 * config.t:g} in expectation over independent pairs; raw: 0 and no upper bound",
        "interval": "none: one number of the whole set",
        "config": asdict(config),
    }


def check(config: UniformityConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError where the options or the data do not allow the evaluation."""
    if not 0 < config.t < float("inf") or (config.max_images is not None and config.max_images < 2):
        raise ValueError(
            f"uniformity got t={config.t}, max_images={config.max_images}; allowed: t positive (the papers use 2), "
            "max_images None or at least 2."
        )
    if sum(class_counts.get("train", ())) < 2:
        raise ValueError("uniformity needs at least 2 images in split 'train'; give train=URI with more images.")


def evaluate(config: UniformityConfig, context: EvaluationContext) -> Iterator[Metric]:
    """Yield U of unit-length and of raw features."""
    train = get_features(context, "train")
    check(config, context.phase, {"train": train.class_counts})
    x = train.features
    if config.max_images is not None and config.max_images < len(x):
        rows = np.random.default_rng(context.seed).choice(len(x), config.max_images, replace=False)
        x = x[np.sort(rows)]
    normalized, raw = pairwise_uniformity(x, config.t, context.device)
    yield Metric("uniformity/normalized", normalized, n=len(x))
    yield Metric("uniformity/raw", raw, n=len(x))


class _Rows(NamedTuple):
    """What a block of products needs to know about its rows (or columns).

    Attributes:
        y: centred features (B, D).
        square: t |y|^2, (B,).
        inner: y . mean + |mean|^2 / 2, so that x_i . x_j = y_i . y_j + inner_i + inner_j, (B,).
        inverse: 1 / |x|, or 0 for a zero vector, (B,).
        unit: t |x / |x||^2, which is t, or 0 for a zero vector, (B,).
    """

    y: Tensor
    square: Tensor
    inner: Tensor
    inverse: Tensor
    unit: Tensor

    def block(self, start: int) -> _Rows:
        return _Rows(*(column[start : start + BLOCK] for column in self))


def pairwise_uniformity(x: np.ndarray, t: float = 2.0, device: str = "cpu") -> tuple[float, float]:
    """U of the unit-length rows and of the raw rows of ``x`` (N, D), over all pairs i < j."""
    n = len(x)
    rows = _prepare(x, t, device)
    products = rows.y.new_empty(BLOCK * BLOCK)
    cosines = torch.empty_like(products)
    normalized_sum, raw_max, raw_sum = 0.0, -math.inf, 0.0
    for i in range(0, n, BLOCK):
        left = rows.block(i)
        for j in range(i, n, BLOCK):
            right = rows.block(j)
            shape = (len(left.y), len(right.y))
            size = shape[0] * shape[1]
            gram = torch.mm(left.y, right.y.T, out=products[:size].view(shape))
            scores = _normalized_exponents(gram, left, right, t, cosines[:size].view(shape))
            distances = _raw_exponents(gram, left, right, t)
            if i == j:
                below = torch.ones_like(gram, dtype=torch.bool).tril_()  # each pair once, and no image with itself
                scores.masked_fill_(below, -math.inf)
                distances.masked_fill_(below, -math.inf)
            normalized_sum += float(scores.exp_().sum(dtype=torch.float64))
            largest = float(distances.max())
            if largest > raw_max:
                raw_sum, raw_max = raw_sum * math.exp(raw_max - largest), largest
            if raw_max > -math.inf:
                raw_sum += float(distances.sub_(raw_max).clamp_(min=NEGLIGIBLE).exp_().sum(dtype=torch.float64))
    log_pairs = math.log(n * (n - 1) / 2)
    # Rounding may put the mean above 1, that is U below 0, when all features are equal.
    normalized = max(0.0, log_pairs - math.log(normalized_sum))
    raw = max(0.0, log_pairs - (raw_max + math.log(raw_sum)))
    return normalized, raw


def _prepare(x: np.ndarray, t: float, device: str) -> _Rows:
    """Centre the features and choose the precision of the products."""
    exact = torch.from_numpy(x).to(device).double()
    mean = exact.mean(dim=0)
    norm = exact.norm(dim=1)
    inverse = torch.where(norm > 0, 1 / norm, 0)
    y = exact - mean
    square = y.square().sum(dim=1)
    # A squared distance |y|^2 + |y'|^2 - 2 y.y' rounds by about 2 eps |y|^2; U of a near-equal pair by t times that.
    rounding = 2 * t * torch.finfo(torch.float32).eps * float(square.max())
    dtype = torch.float32 if rounding <= RAW_ACCURACY else torch.float64
    inner = y @ mean + mean.square().sum() / 2
    unit = t * (inverse > 0).double()
    return _Rows(*(column.to(dtype) for column in (y, t * square, inner, inverse, unit)))


def _normalized_exponents(gram: Tensor, left: _Rows, right: _Rows, t: float, out: Tensor) -> Tensor:
    """``-t |x_i/|x_i| - x_j/|x_j||^2`` (B, B') from the products of the centred features, into ``out``."""
    torch.add(gram, left.inner[:, None], out=out).add_(right.inner)
    out.mul_((2 * t) * left.inverse[:, None]).mul_(right.inverse)
    return out.sub_(left.unit[:, None]).sub_(right.unit)


def _raw_exponents(gram: Tensor, left: _Rows, right: _Rows, t: float) -> Tensor:
    """``-t |x_i - x_j|^2`` (B, B'), in the place of the products."""
    return gram.mul_(2 * t).sub_(left.square[:, None]).sub_(right.square).clamp_(max=0)
