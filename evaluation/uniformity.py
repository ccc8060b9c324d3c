"""Uniformity U of the features over all pairs of images, for unit-length and for raw features.

Sun et al., AAAI 2022 (CAMtrast), Eq. 2: ``U = -ln E exp(-t |f(x) - f(y)|^2)``, t = 2; larger is more uniform (the
opposite sign of ``SsnL/align_uniform: uniform_loss``). Unit vectors are bounded by 0 <= U <= 4 at t = 2 (Jensen; random
directions in 2048 dimensions give 3.996). The published 7.49 to 21.96 are therefore values of raw features: only
``uniformity/raw`` compares with them.

The mean is over all pairs i < j of the split (or of a seeded sample). The same pass over the pairs gives two entropies
of the unit-length features, ``uniformity/vmf_entropy`` and ``uniformity/koleo``; formulas, sources and the handling of
rounding are in ``pair_statistics``. Comparing models draws U against the number of pretraining classes, as the paper's
Figure 3 does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from evaluation.class_count_plot import Panel, plot_by_num_classes
from evaluation.metric import Artifact, ClassCounts, EvaluationContext, Metric, ModelResult, Phase, get_features
from evaluation.pair_statistics import KOLEO_FLOOR, RAW_ACCURACY, pair_statistics

__all__ = ["UniformityConfig", "check", "compare", "evaluate", "metric_names", "protocol", "splits"]

MAX_T = 20.0  # exp(-4 t), the smallest kernel of unit vectors, must be a float32


@dataclass(frozen=True)
class UniformityConfig:
    """Uniformity over all pairs.

    Attributes:
        t: scale of the squared distance; at most 20.
        max_images: at most this many images, drawn without replacement with the evaluation's seed; None takes all. The
            cost grows with the square: 50,000 images of 2048 dimensions are about a minute on a CPU core.
    """

    t: float = 2.0
    max_images: int | None = None


def metric_names(config: UniformityConfig) -> tuple[str, ...]:
    """Names of the main metrics; ``uniformity/vmf_entropy`` and ``uniformity/koleo`` are yielded too."""
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
    kernel = f"exp(-t |f(x) - f(y)|^2), t = {config.t:g}"
    return {
        "name": "uniformity U",
        "source": "Sun et al., AAAI 2022 (CAMtrast), Eq. 2; sign opposite to SsnL/align_uniform",
        "phase": phase,
        "split": "train",
        "features": "pooled backbone output, one view per image; L2-normalised (a zero vector stays zero) and raw",
        "metric": f"-ln mean {kernel}, natural logarithm",
        "pairs": pairs,
        "solver": (
            f"float32 products (float64 where rounding could exceed {RAW_ACCURACY:g} of raw U), float64 sums, "
            "log-sum-exp"
        ),
        "bounds": f"normalized: 0 to {2 * config.t:g} in expectation over independent pairs; raw: 0 and no upper bound",
        "vmf_entropy": (
            f"L2-normalised: -mean over images of ln mean over the other images of {kernel}: resubstitution entropy "
            "with a vMF kernel up to its constant (Wang & Isola, ICML 2020), the image itself left out"
        ),
        "koleo": (
            f"L2-normalised: mean ln(distance of the nearest other image + {KOLEO_FLOOR:g}), minus the loss of "
            "Sablayrolles et al., ICLR 2019 (Kozachenko-Leonenko entropy without its constants); depends on the number "
            "of images; nearest neighbours are exact, in float64 where float32 cannot tell them apart"
        ),
        "interval": "none: one number of the whole set",
        "config": asdict(config),
    }


def check(config: UniformityConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError where the options or the data do not allow the evaluation."""
    if not 0 < config.t <= MAX_T or (config.max_images is not None and config.max_images < 2):
        raise ValueError(
            f"uniformity got t={config.t}, max_images={config.max_images}; allowed: t positive and at most {MAX_T:g} "
            "(the papers use 2), max_images None or at least 2."
        )
    if sum(class_counts.get("train", ())) < 2:
        raise ValueError("uniformity needs at least 2 images in split 'train'; give train=URI with more images.")


def evaluate(config: UniformityConfig, context: EvaluationContext) -> Iterator[Metric]:
    """Yield U of unit-length and of raw features, and the two entropies of unit-length features."""
    train = get_features(context, "train")
    check(config, context.phase, {"train": train.class_counts})
    x = train.features
    if config.max_images is not None and config.max_images < len(x):
        rows = np.random.default_rng(context.seed).choice(len(x), config.max_images, replace=False)
        x = x[np.sort(rows)]
    found = pair_statistics(x, config.t, context.device)
    yield Metric("uniformity/normalized", found.uniformity, n=len(x))
    yield Metric("uniformity/raw", found.raw_uniformity, n=len(x))
    yield Metric("uniformity/vmf_entropy", found.vmf_entropy, n=len(x))
    yield Metric("uniformity/koleo", found.koleo, n=len(x))


def compare(config: UniformityConfig, models: Sequence[ModelResult]) -> Iterator[Artifact]:
    """Yield U against the number of pretraining classes, where the models differ in it (Sun et al., Figure 3)."""
    panels = (
        Panel("uniformity/normalized", "U, unit-length features"),
        Panel("uniformity/raw", "U, raw features"),
    )
    yield from plot_by_num_classes(
        "uniformity/by_num_classes.png", "Uniformity of the pretraining images", panels, models
    )
