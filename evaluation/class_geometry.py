"""How the classes lie in feature space: discriminative ratio, feature mixtureness and feature redundancy of SL-MLP.

SL-MLP (Wang et al., CVPR 2022) explains the transfer of a backbone by the variation within pretraining classes that it
keeps, by how far pretraining and evaluation classes mix, and by how much its feature dimensions repeat each other. Only
the names and the directions are confirmed by a text at hand; **the formulas are ours, recalled from the literature**,
and so are all choices below. Compare values of this program with each other, not with published ones.

* ``class_geometry/discriminative_ratio``: phi = D_inter / D_intra of the pretraining classes, with class centres mu_c,
  ``D_inter = 1/(C (C-1)) sum_{j != k} |mu_j - mu_k|^2`` and ``D_intra = 1/C sum_c mean_{x in c} |f(x) - mu_c|^2``.
  Lower: more variation within classes is kept. Both parts are yielded (``inter_class``, ``intra_class``).
* ``class_geometry/mixtureness``: of every centre among those of C_pre pretraining and C_eval unseen classes, the share
  n_c / k of unseen ones among its k nearest other centres (equal distances share their places);
  ``Pi = 1 - mean_c | n_c / k - C_eval / (C_pre + C_eval) |``. 1: every neighbourhood is mixed like the whole. The
  smaller k, the lower Pi even of classes mixed at random, so compare at equal k and equal numbers of classes.
* ``class_geometry/redundancy``: ``R = 1/d^2 sum_{i,j} |rho_ij|`` over all pairs of feature dimensions, i = j included,
  rho the Pearson correlation over the pretraining images. Between 1/d (no two correlate) and 1 (all are copies).

Centres are of L2-normalised features by default: phi then compares directions, and methods whose features have other
lengths are on one scale (phi does not change with a common factor, but it does with each image's own). The redundancy
is always of raw features: the correlation already ignores each dimension's scale, and dividing every image by its
length would correlate the dimensions.

Handling: classes without images are left out; D_intra needs a class of two images and leaves out classes of one, whose
variation is unknown, not zero. D_intra has a floor of 1e-12 in phi. A dimension whose standard deviation is below 1e-6
of its root mean square is constant: it has no correlation, is left out of R and counted in
``class_geometry/constant_dims``; R is 1 if all are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaluation.feature_blocks import (
    as_tensor,
    centred_scatter,
    float64_blocks,
    inverse_norms,
    mean_row,
    row_norms,
    warn_of_zero_rows,
)
from evaluation.metric import ClassCounts, EvaluationContext, Features, Metric, Phase, get_features

__all__ = [
    "ClassCentres",
    "ClassGeometryConfig",
    "check",
    "class_centres",
    "evaluate",
    "feature_redundancy",
    "inter_class_distance",
    "metric_names",
    "mixtureness",
    "protocol",
    "splits",
]

UNSEEN = {"val": "val_classes", "test": "novel_classes"}
INTRA_FLOOR = 1e-12
CONSTANT = 1e-6


@dataclass(frozen=True)
class ClassGeometryConfig:
    """Discriminative ratio, mixtureness and redundancy.

    Attributes:
        num_neighbors: k, nearest centres that the mixtureness looks at; less than the number of classes in both splits.
        normalize: scale each feature vector to unit length before class centres are formed; the redundancy is always
            of raw features.
    """

    num_neighbors: int = 5
    normalize: bool = True


def metric_names(config: ClassGeometryConfig) -> tuple[str, ...]:
    """Names of the main metrics; the parts of the ratio and the number of constant dimensions are yielded too."""
    return ("class_geometry/discriminative_ratio", "class_geometry/mixtureness", "class_geometry/redundancy")


def splits(config: ClassGeometryConfig, phase: Phase) -> tuple[str, ...]:
    """Splits that the evaluation reads."""
    return ("train", UNSEEN[phase])


def protocol(config: ClassGeometryConfig, phase: Phase) -> dict:
    """Everything needed to reproduce the numbers, as JSON data."""
    kind = "L2-normalised (a zero vector stays zero)" if config.normalize else "raw"
    return {
        "name": "geometry of classes: discriminative ratio, feature mixtureness, feature redundancy",
        "source": "names and directions: Wang et al., CVPR 2022 (SL-MLP); the formulas are ours",
        "phase": phase,
        "split": "train",
        "unseen_classes": UNSEEN[phase],
        "features": f"pooled backbone output, one view per image, {kind}; raw for the redundancy",
        "metric": (
            "discriminative_ratio: mean squared distance of different class centres / mean over classes of the mean "
            f"squared distance to the centre, floor {INTRA_FLOOR:g}; mixtureness: 1 - mean over centres of |share of "
            f"unseen classes among the {config.num_neighbors} nearest other centres - share of unseen classes among "
            "all|; redundancy: mean |Pearson correlation| over all pairs of dimensions including each with itself"
        ),
        "guards": (
            "classes of one image are left out of intra_class; of equal distances each takes its part of the "
            f"remaining places; dimensions with standard deviation below {CONSTANT:g} of their root mean square are "
            "left out of the redundancy and counted in class_geometry/constant_dims"
        ),
        "interval": "none: one number of the whole set",
        "config": asdict(config),
    }


def check(config: ClassGeometryConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError where the options or the data do not allow the evaluation; call it before any long work."""
    present = {split: sum(count > 0 for count in class_counts.get(split, ())) for split in splits(config, phase)}
    for split, count in present.items():
        if count == 0:
            found = ", ".join(name for name in class_counts if sum(class_counts[name])) or "none"
            raise ValueError(
                f"class_geometry needs images in split {split!r}; the data has: {found}. Name the split in the data "
                f"URIs ({split}=...) or let the seeded class split make it."
            )
    if present["train"] < 2 or max(class_counts["train"]) < 2:
        raise ValueError(
            f"class_geometry: split 'train' has {present['train']} classes, the largest of "
            f"{max(class_counts['train'])} images; the discriminative ratio needs at least 2 classes, one of them with "
            "2 images. Give train=URI with more classes or images."
        )
    total = sum(present.values())
    if not 1 <= config.num_neighbors < total:
        raise ValueError(
            f"class_geometry got num_neighbors={config.num_neighbors}; allowed: 1 to {total - 1}, since a centre has "
            f"{total - 1} others ({present['train']} pretraining and {present[UNSEEN[phase]]} unseen classes)."
        )


def evaluate(config: ClassGeometryConfig, context: EvaluationContext) -> Iterator[Metric]:
    """Yield the three measures, the parts of the ratio, and the number of constant dimensions."""
    train, unseen = (get_features(context, split) for split in splits(config, context.phase))
    check(config, context.phase, {"train": train.class_counts, UNSEEN[context.phase]: unseen.class_counts})
    base = class_centres(train, "train", normalize=config.normalize)
    other = class_centres(unseen, UNSEEN[context.phase], normalize=config.normalize)
    n = len(train.labels)
    inter, intra = inter_class_distance(base.centres), base.variation
    yield Metric("class_geometry/discriminative_ratio", inter / max(intra, INTRA_FLOOR), n=n)
    num_centres = len(base.centres) + len(other.centres)
    mixed = mixtureness(base.centres, other.centres, config.num_neighbors)
    yield Metric("class_geometry/mixtureness", mixed, n=num_centres)
    redundancy, num_constant = feature_redundancy(train.features, context.device)
    yield Metric("class_geometry/redundancy", redundancy, n=n)
    yield Metric("class_geometry/inter_class", inter, n=len(base.centres))
    yield Metric("class_geometry/intra_class", intra, n=n)
    yield Metric("class_geometry/constant_dims", float(num_constant))


class ClassCentres(NamedTuple):
    """Classes of a split that have images.

    Attributes:
        centres: means, float64 (C, D), in label order.
        variation: mean over classes, those of one image left out, of the mean squared distance to the centre; 0 where
            no class has two images.
    """

    centres: Tensor
    variation: float


def class_centres(features: Features, split: str, *, normalize: bool) -> ClassCentres:
    """Centres and variation of the classes of a split, from two passes over blocks of float64 rows.

    Args:
        features: of the split.
        split: its name, for warnings.
        normalize: of the rows at unit length; a zero row stays zero and is warned about.
    """
    rows = as_tensor(features.features)
    scales = None
    if normalize:
        norms = row_norms(rows)
        warn_of_zero_rows(norms, split, stacklevel=2)
        scales = inverse_norms(norms)
    present, positions, counts = np.unique(features.labels, return_inverse=True, return_counts=True)
    labels, sizes = torch.from_numpy(positions), torch.from_numpy(counts)
    centres = torch.zeros(len(present), rows.shape[1], dtype=torch.float64)
    start = 0
    for block in float64_blocks(rows, scales=scales):
        centres.index_add_(0, labels[start : start + len(block)], block)
        start += len(block)
    centres /= sizes[:, None]
    squares = torch.zeros(len(present), dtype=torch.float64)
    start = 0
    for block in float64_blocks(rows, scales=scales):
        mine = labels[start : start + len(block)]
        squares.index_add_(0, mine, block.sub_(centres[mine]).square().sum(dim=1))
        start += len(block)
    several = sizes > 1
    variation = float((squares / sizes)[several].mean()) if bool(several.any()) else 0.0
    return ClassCentres(centres, variation)


def inter_class_distance(centres: Tensor) -> float:
    """Mean squared distance of different centres (C, D): twice the summed variance around their mean, C / (C - 1)."""
    count = len(centres)
    return float(2 * (centres - centres.mean(dim=0)).square().sum() / (count - 1))


def mixtureness(base: Tensor, unseen: Tensor, num_neighbors: int) -> float:
    """Pi of centres (C_pre, D) and (C_eval, D); the k-th place is shared by all centres at that distance."""
    centres = torch.cat([base, unseen])
    is_unseen = torch.cat([torch.zeros(len(base)), torch.ones(len(unseen))]).double()
    distances = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(float("inf"))
    last = distances.kthvalue(num_neighbors, dim=1, keepdim=True).values
    # Rounding must not order centres that lie equally far, such as those of a collapsed backbone.
    margin = 1e-12 * (last + centres.norm(dim=1, keepdim=True))
    closer = (distances < last - margin).double()
    tied = ((distances - last).abs() <= margin).double()
    places = num_neighbors - closer.sum(dim=1)
    found = closer @ is_unseen + places * (tied @ is_unseen) / tied.sum(dim=1)
    return 1.0 - float((found / num_neighbors - is_unseen.mean()).abs().mean())


def feature_redundancy(x: np.ndarray, device: str = "cpu") -> tuple[float, int]:
    """R of features (N, D), and the number of constant dimensions, which are left out of it; R is 1 if all are."""
    rows = as_tensor(x)
    mean = mean_row(rows, device)
    scatter = centred_scatter(rows, mean, device)
    variance = scatter.diagonal() / len(rows)
    varies = variance.sqrt() > CONSTANT * (variance + mean.square()).sqrt()
    num_constant = int((~varies).sum())
    if num_constant == len(varies):
        return 1.0, num_constant
    scatter = scatter[varies][:, varies]
    scale = scatter.diagonal().rsqrt()
    correlation = scatter.mul_(scale[:, None]).mul_(scale).abs_().clamp_(max=1)
    return float(correlation.mean()), num_constant
