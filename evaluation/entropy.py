"""Representation entropy H_R and rank: over how many directions the features of the pretraining set spread.

Sun et al., AAAI 2022 (CAMtrast), Eq. 1. Eigenvalues l_j of the covariance of the features, normalised to sum one:
``H_R = -sum_j l_j ln l_j``. Larger means more spread; at most ln(min(D, N - 1)), reached when all directions carry the
same variance. Natural logarithm (the published values, up to 5.5, stay below ln 2048 = 7.62; the paper does not say).
Invariant to scale and rotation, so L2 normalisation changes it only through the vectors' individual norms; the default
is raw features, as for the paper's uniformity.

Three ranks of the same features come from the same matrix:

* ``entropy/effective_rank``: exp(H_R), the number of equally strong directions that would have this entropy;
* ``entropy/rank``: singular values s_j of the centred features above ``D eps s_max``, eps that of float32: the rule of
  ``torch.linalg.matrix_rank`` with D in place of max(N, D), so that the tolerance does not grow with the data;
* ``entropy/rankme``: Garrido et al., ICML 2023: ``exp(-sum_k p_k ln p_k)``, ``p_k = s_k / sum_j s_j + 1e-7``, over the
  min(N, D) singular values of the features *not* centred. Singular values, not their squares as in H_R, and a mean far
  from the origin counts as one strong direction. The paper's figures are of 25,600 images; it compares embeddings
  after the projector as well as representations, here it is the representation.

Comparing models draws H_R against the number of pretraining classes, as the CAMtrast paper's Figure 3 does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaluation.class_count_plot import Panel, plot_by_num_classes
from evaluation.feature_blocks import (
    as_tensor,
    centred_scatter,
    float64_blocks,
    inverse_norms,
    mean_row,
    row_norms,
    warn_of_zero_rows,
)
from evaluation.metric import Artifact, ClassCounts, EvaluationContext, Metric, ModelResult, Phase, get_features

__all__ = [
    "EntropyConfig",
    "Spectrum",
    "check",
    "compare",
    "evaluate",
    "feature_spectrum",
    "metric_names",
    "numerical_rank",
    "protocol",
    "rankme",
    "representation_entropy",
    "spectral_entropy",
    "splits",
]

RANKME_EPSILON = 1e-7  # Garrido et al. 2023, for float32
COLLAPSED = 1e-26  # share of the variance; float64 rounding of equal rows stays below, one float32 step is above


@dataclass(frozen=True)
class EntropyConfig:
    """Representation entropy.

    Attributes:
        normalize: scale each feature vector to unit length first; the papers' values are taken as raw.
    """

    normalize: bool = False


def metric_names(config: EntropyConfig) -> tuple[str, ...]:
    """Names of the main metrics; the upper bound for this N and D and three ranks are yielded too."""
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
        "effective_rank": "exp(H_R)",
        "rank": "singular values of the centred features above D * 1.19e-7 of the largest",
        "rankme": (
            f"exp(-sum p ln p), p = s / sum s + {RANKME_EPSILON:g}, s the singular values of the features, not centred "
            "(Garrido et al., ICML 2023); 0 if all are zero"
        ),
        "interval": "none: one number of the whole set",
        "config": asdict(config),
    }


def check(config: EntropyConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError where the data do not allow the evaluation."""
    if sum(class_counts.get("train", ())) < 2:
        raise ValueError("entropy needs at least 2 images in split 'train'; give train=URI with more images.")


def evaluate(config: EntropyConfig, context: EvaluationContext) -> Iterator[Metric]:
    """Yield H_R in nats, its upper bound, and the three ranks."""
    train = get_features(context, "train")
    check(config, context.phase, {"train": train.class_counts})
    n, dim = train.features.shape
    found = feature_spectrum(train.features, context.device, normalize=config.normalize)
    h_r = spectral_entropy(found.variances)
    yield Metric("entropy/h_r", h_r, n=n)
    yield Metric("entropy/h_r_upper_bound", math.log(min(dim, n - 1)))
    yield Metric("entropy/effective_rank", math.exp(h_r), n=n)
    yield Metric("entropy/rank", float(numerical_rank(found.variances, dim)), n=n)
    yield Metric("entropy/rankme", rankme(found.singular_values), n=n)


def compare(config: EntropyConfig, models: Sequence[ModelResult]) -> Iterator[Artifact]:
    """Yield H_R against the number of pretraining classes, where the models differ in it (Sun et al., Figure 3)."""
    panels = (Panel("entropy/h_r", "H_R (nats)"),)
    title = "Representation entropy of the pretraining images"
    yield from plot_by_num_classes("entropy/by_num_classes.png", title, panels, models)


class Spectrum(NamedTuple):
    """Spectra of features (N, D), float64, each with min(N, D) entries in ascending order, none negative.

    Attributes:
        variances: eigenvalues of the scatter of the centred features (N times their covariance).
        singular_values: of the features, not centred.
    """

    variances: Tensor
    singular_values: Tensor


def feature_spectrum(x: np.ndarray, device: str = "cpu", *, normalize: bool = False) -> Spectrum:
    """Both spectra of features (N, D), without a second copy of them.

    The smaller of the D x D scatter and the N x N Gram matrix is used; their non-zero eigenvalues agree.

    Args:
        x: float32 features.
        device: where to compute.
        normalize: of the rows at unit length; a zero row stays zero and is warned about.
    """
    rows = as_tensor(x)
    n, dim = x.shape
    scales = None
    if normalize:
        norms = row_norms(rows)
        warn_of_zero_rows(norms, "train", stacklevel=2)
        scales = inverse_norms(norms)
    mean = mean_row(rows, device, scales)
    if n <= dim:
        centred = torch.cat(list(float64_blocks(rows, device, scales))).sub_(mean)
        scatter, left, right = centred @ centred.T, torch.ones_like(mean[:n]), centred @ mean + mean.square().sum() / 2
    else:
        scatter, left, right = centred_scatter(rows, mean, device, scales), mean, mean * (n / 2)
    collapsed = scatter.trace() <= COLLAPSED * n * mean.square().sum()
    variances = torch.zeros_like(mean[:n]) if collapsed else torch.linalg.eigvalsh(scatter).clamp_(min=0)
    # The same matrix of the features as they are: two of these matrices at a time would be 70 MB at 2048 dimensions.
    scatter.addr_(left, right).addr_(right, left)
    return Spectrum(variances, torch.linalg.eigvalsh(scatter).clamp_(min=0).sqrt_())


def spectral_entropy(weights: Tensor) -> float:
    """Entropy in nats of weights (K,) scaled to sum one; 0 if all are zero (the limit of a single direction)."""
    total = weights.sum()
    if total == 0:
        return 0.0
    shares = weights / total
    return float(-torch.xlogy(shares, shares).sum()) + 0.0  # -0.0 becomes 0.0


def representation_entropy(x: np.ndarray, device: str = "cpu") -> float:
    """H_R of features (N, D) in nats; 0 when all rows are equal."""
    return spectral_entropy(feature_spectrum(x, device).variances)


def numerical_rank(variances: Tensor, dim: int) -> int:
    """How many singular values, the roots of ``variances`` (K,), exceed ``dim`` float32 eps of the largest."""
    singular_values = variances.sqrt()
    tolerance = dim * torch.finfo(torch.float32).eps * singular_values.max()
    return int((singular_values > tolerance).sum())


def rankme(singular_values: Tensor) -> float:
    """RankMe of features with these singular values (K,); 0 if all are zero."""
    total = singular_values.sum()
    if total == 0:
        return 0.0
    shares = singular_values / total + RANKME_EPSILON
    return float(torch.exp(-torch.xlogy(shares, shares).sum()))
