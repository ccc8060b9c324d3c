"""Alignment: how near the features of a positive pair lie, for two views of an image and for two images of a class.

Wang & Isola, ICML 2020 (``SsnL/align_uniform: align_loss``): ``E |f(x) - f(y)|^alpha`` over positive pairs, alpha = 2,
features at unit length; smaller is more aligned, 0 where the pair always coincides. At alpha = 2 it is
``2 - 2 E cos``, so independent features on the whole sphere give 2. The positive pairs of contrastive pretraining are
two augmented views of one image (``alignment/views``); those of supervised pretraining are different images of one
class (``alignment/same_class``: for an image drawn uniformly, another image of its class drawn uniformly, one view
each). Both are measured for every model, whatever it was pretrained with: the two numbers tell apart what a model
ignores.

What we do differently: the exact mean over all images, and over all pairs of a class, instead of batches. The paper
measures with its training augmentation; here the recipe is an option and the same for all models.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch

from evaluation.feature_blocks import as_tensor
from evaluation.metric import (
    ClassCounts,
    EvaluationContext,
    FeatureBatch,
    Metric,
    Phase,
    mean_interval,
)
from image_data.recipes import RECIPES

__all__ = ["AlignmentConfig", "check", "evaluate", "metric_names", "protocol", "same_class_alignment", "splits"]

BLOCK = 512  # images of a class whose distances are held at once


@dataclass(frozen=True)
class AlignmentConfig:
    """Alignment of positive pairs.

    Attributes:
        alpha: exponent of the distance.
        recipe: name of the view recipe that both views of an image are drawn with.
        same_class: also measure pairs of different images of a class; turn it off where classes mean nothing.
    """

    alpha: float = 2.0
    recipe: str = "moco_v2"
    same_class: bool = True


def metric_names(config: AlignmentConfig) -> tuple[str, ...]:
    """Names of the metrics, in the order in which they are yielded."""
    return ("alignment/views", "alignment/same_class") if config.same_class else ("alignment/views",)


def splits(config: AlignmentConfig, phase: Phase) -> tuple[str, ...]:
    """Splits that the evaluation reads: the pretraining set in both phases, as for the uniformity."""
    return ("train",)


def protocol(config: AlignmentConfig, phase: Phase) -> dict:
    """Everything needed to reproduce the numbers, as JSON data."""
    return {
        "name": "alignment of positive pairs",
        "source": "Wang & Isola, ICML 2020; SsnL/align_uniform: align_loss",
        "phase": phase,
        "split": "train",
        "features": "pooled backbone output of augmented views, L2-normalised (a zero vector stays zero)",
        "views": RECIPES[config.recipe].to_json() if config.recipe in RECIPES else None,
        "metric": f"mean |f(x) - f(y)|^{config.alpha:g} over positive pairs; smaller is more aligned",
        "pairs": (
            "views: two independent views of each image (epochs 0 and 1 of the seed); same_class: first views of all "
            "pairs of different images of a class, every image with the same weight, images without a partner left out"
        ),
        "interval": "views: mean +- 1.96 s / sqrt(images), s with ddof = 1; same_class: none, pairs share images",
        "config": asdict(config),
    }


def check(config: AlignmentConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError where the options or the data do not allow the evaluation; call it before any long work."""
    if not 0 < config.alpha < float("inf") or config.recipe not in RECIPES:
        raise ValueError(
            f"alignment got alpha={config.alpha}, recipe={config.recipe!r}; allowed: alpha positive (the paper uses "
            f"2), recipe one of {', '.join(RECIPES)}."
        )
    counts = class_counts.get("train", ())
    if sum(counts) < 2:
        raise ValueError("alignment needs at least 2 images in split 'train'; give train=URI with more images.")
    if config.same_class and max(counts) < 2:
        raise ValueError(
            "alignment: no class of split 'train' has 2 images, so no pair is of one class; set same_class=False to "
            "measure augmented views only."
        )


def evaluate(config: AlignmentConfig, context: EvaluationContext) -> Iterator[Metric]:
    """Yield the alignment of views with its interval, and of images of a class.

    Memory: the first views' features; the second pass is compared with them batch by batch. The passes are one after
    the other: each may be a pool of workers.
    """
    first, labels = _first_views(config, context)
    check(config, context.phase, {"train": tuple(np.bincount(labels).tolist())})
    distances = []
    start = 0
    for batch in _pass(config, context, epoch=1):
        stop = start + len(batch.labels)
        if stop > len(labels) or not np.array_equal(batch.labels, labels[start:stop]):
            raise ValueError(
                f"alignment: second views {start:,} to {stop - 1:,} of split 'train' are not of the same images as the "
                "first; a pass must deliver every image once, in the order of its index."
            )
        difference = first[start:stop].astype(np.float64) - _unit(batch.features)
        distances.append(np.linalg.norm(difference, axis=1) ** config.alpha)
        start = stop
    if start != len(labels):
        raise ValueError(f"alignment: the second pass gave {start:,} of {len(labels):,} images of split 'train'.")
    mean, half_width = mean_interval(np.concatenate(distances))
    yield Metric("alignment/views", mean, half_width, len(labels))
    if config.same_class:
        value, count = same_class_alignment(first, labels, config.alpha, context.device)
        yield Metric("alignment/same_class", value, n=count)


def _first_views(config: AlignmentConfig, context: EvaluationContext) -> tuple[np.ndarray, np.ndarray]:
    """Unit-length features (N, D) of one view of every image, and their labels (N,)."""
    parts = [(_unit(batch.features).astype(np.float32), batch.labels) for batch in _pass(config, context, epoch=0)]
    if not parts:
        raise ValueError("alignment: split 'train' delivered no images; check that it exists and is not empty.")
    features, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    num_zero = int((~features.any(axis=1)).sum())
    if num_zero:
        message = f"{num_zero:,} of {len(features):,} feature vectors of split 'train' are zero and stay zero"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    if len(features) > 1 and bool((features == features[0]).all()):
        message = f"all {len(features):,} feature vectors of split 'train' are identical: the backbone has collapsed"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return features, labels


def _pass(config: AlignmentConfig, context: EvaluationContext, epoch: int) -> Iterator[FeatureBatch]:
    """Batches of one view of every training image, checked.

    Raises:
        ValueError: no backbone; images out of order; NaN or infinite features.
    """
    if context.view_features is None:
        raise ValueError(
            "alignment needs the backbone itself, for augmented views; the context has features only. Evaluate a "
            "checkpoint."
        )
    last = -1
    for batch in context.view_features("train", config.recipe, epoch=epoch):
        if not (np.diff(batch.index, prepend=last) > 0).all():
            raise ValueError(
                f"alignment: the images of pass {epoch} over split 'train' are repeated or not in the order of their "
                "index, so views of one image cannot be paired."
            )
        bad = int((~np.isfinite(batch.features).all(axis=1)).sum())
        if bad:
            raise ValueError(
                f"alignment: augmented views of {bad:,} images of split 'train' have NaN or infinite features: "
                "pretraining diverged or the checkpoint is damaged. Evaluate an earlier checkpoint."
            )
        last = int(batch.index[-1])
        yield batch


def _unit(x: np.ndarray) -> np.ndarray:
    """Rows (B, D) at unit length, float64; a zero row stays zero."""
    norms = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    return x / np.where(norms == 0, 1.0, norms)


def same_class_alignment(x: np.ndarray, labels: np.ndarray, alpha: float, device: str = "cpu") -> tuple[float, int]:
    """Mean over images of their mean ``|x_i - x_j|^alpha`` to the other images of their class.

    Args:
        x: float32 (N, D), used as they are.
        labels: int64 (N,); at least one class has two images.
        alpha: exponent.
        device: where to compute.

    Returns:
        The mean, and the number of images that have a partner.
    """
    rows = as_tensor(x)
    total, count = 0.0, 0
    for label in np.unique(labels):
        members = torch.from_numpy(np.flatnonzero(labels == label))
        if len(members) < 2:
            continue
        class_sum = 0.0
        blocks = [rows[part].to(device).double() for part in members.split(BLOCK)]
        for i, left in enumerate(blocks):
            for j, right in enumerate(blocks[i:], start=i):
                squares = left.square().sum(1)[:, None] + right.square().sum(1) - 2 * (left @ right.T)
                powers = squares.clamp_(min=0).pow_(alpha / 2)
                if i == j:
                    powers.fill_diagonal_(0)
                class_sum += float(powers.sum()) * (1 if i == j else 2)
        total += class_sum / (len(members) - 1)
        count += len(members)
    return total / count, count
