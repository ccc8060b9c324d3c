"""The record that every evaluation yields, the context it works in, and the intervals and feature checks they share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from torch import nn

if TYPE_CHECKING:
    from evaluation.fine_tuning import FineTuning

__all__ = [
    "REPORT_SPLITS",
    "Artifact",
    "ClassCounts",
    "EvaluationContext",
    "FeatureBatch",
    "Features",
    "ImageReader",
    "Metric",
    "ModelResult",
    "Output",
    "Phase",
    "Samples",
    "ViewFeatures",
    "accuracy_metric",
    "check_image_splits",
    "check_split",
    "get_features",
    "l2_normalize",
    "mean_interval",
    "wilson_half_width",
]

Phase = Literal["val", "test"]

# Split name -> images per class, in label order. A split that the data does not have is absent.
ClassCounts = dict[str, tuple[int, ...]]

# What only the final report may read.
REPORT_SPLITS = ("test", "novel_classes")

FINITE_BLOCK = 16_384  # rows

Z95 = 1.959963984540054  # 97.5 % point of the standard normal distribution


class Metric(NamedTuple):
    """One number of one evaluation.

    Attributes:
        name: ``<task>/<metric>``, lower case and stable.
        value: accuracies are percentages, 0 to 100.
        ci95: half width of a 95 % interval, in the unit of the value.
        n: sample count of the interval (images or tasks).
    """

    name: str
    value: float
    ci95: float | None = None
    n: int | None = None


class Artifact(NamedTuple):
    """A file of one evaluation: a plot, a grid of images, a table.

    Attributes:
        name: ``<task>/<file>`` with extension, its path in the output folder and in MLflow.
        data: the file's bytes.
    """

    name: str
    data: bytes


class Samples(NamedTuple):
    """What stands behind a metric, one entry per task, image or class; models are compared by it entry by entry.

    Attributes:
        name: ``<task>/<quantity>``; where it belongs to one metric, that metric's name.
        values: array of any shape; the first axis is the entries, in an order that all models share.
    """

    name: str
    values: np.ndarray


Output = Metric | Artifact | Samples  # what an evaluation yields


@dataclass(frozen=True)
class ModelResult:
    """One evaluated model, as a task's ``compare`` sees it.

    Attributes:
        name: shown in tables and plots; unique among the models that are compared.
        method: name of the pretraining method; "random_init" for an untrained backbone.
        num_classes: classes of the pretraining data.
        metrics: by name, of all tasks.
        samples: values by name, of all tasks.
    """

    name: str
    method: str
    num_classes: int
    metrics: Mapping[str, Metric]
    samples: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Features:
    """Frozen features of one split, rows in the order of the images' stable index.

    The order matters: task lists name rows, and only with one order do two models see the same tasks.

    Attributes:
        features: float32 (N, D), pooled backbone output, not normalised.
        labels: int64 (N,), 0..len(class_names)-1.
        class_names: names in label order.
    """

    features: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    @property
    def class_counts(self) -> tuple[int, ...]:
        """Images per class, in label order."""
        return tuple(int(count) for count in np.bincount(self.labels, minlength=len(self.class_names)))


class FeatureBatch(NamedTuple):
    """Features of one augmented view of each image of a batch.

    Attributes:
        features: float32 (B, D).
        labels: int64 (B,).
        index: int64 (B,), stable id of the image in its split.
    """

    features: np.ndarray
    labels: np.ndarray
    index: np.ndarray


class ViewFeatures(Protocol):
    """One pass of the frozen backbone over augmented views of a split."""

    def __call__(
        self, split: str, recipe: str, *, epoch: int = 0, shuffle: bool = False, batch_size: int = 256
    ) -> Iterator[FeatureBatch]:
        """Every image once.

        Args:
            split: its name.
            recipe: name of a view recipe in ``image_data.RECIPES`` that makes one view.
            epoch: numbers the pass: another epoch draws other views (and, shuffled, another order).
            shuffle: in random order; else by the images' index.
            batch_size: images per batch; the last one may be smaller.
        """
        ...


class ImageReader(Protocol):
    """Chosen images of a split as the backbone sees them in evaluation."""

    def __call__(self, split: str, rows: Sequence[int], image_size: int = 0) -> np.ndarray:
        """RGB, uint8 (n, 3, S, S), resized and centre-cropped.

        Args:
            split: its name.
            rows: rows of ``Features`` of the split, in any order; the images come in the same order.
            image_size: S in pixels; 0 is the evaluation's own.
        """
        ...


@dataclass(frozen=True)
class EvaluationContext:
    """What an evaluation may ask for.

    Attributes:
        features: split name -> Features; one streamed pass per split, cached. Splits: "train", "val", "test" (images of
            the base classes) and "val_classes", "novel_classes" (classes never seen in pretraining).
        phase: "val" while hyperparameters are still being chosen (test data is never touched), "test" for the report.
        seed: seed of task lists and solvers; the same for all models, so that comparisons are paired.
        device: torch device that the solvers of the frozen tasks run on.
        backbone: the frozen backbone, on ``device``, for tasks that look inside it; None where only features are given.
        view_features: passes over augmented views; None where only features are given.
        images: pictures of chosen rows; None where only features are given.
        domains: further data sets, by name, as split -> Features; splits "train" and "test".
        info: what is known of the pretraining ("method", "num_classes", "labels_used": bool), for protocols and titles.
        fine_tuning: training of the backbone on a task's own data; None where only features are given.
    """

    features: Callable[[str], Features]
    phase: Phase
    seed: int = 0
    device: str = "cpu"
    backbone: nn.Module | None = None
    view_features: ViewFeatures | None = None
    images: ImageReader | None = None
    domains: Mapping[str, Callable[[str], Features]] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    fine_tuning: FineTuning | None = None


def check_split(phase: Phase, split: str) -> None:
    """ValueError when a phase may not read a split."""
    if phase == "val" and split in REPORT_SPLITS:
        raise ValueError(
            f"split {split!r} was asked for in phase 'val'; while hyperparameters are being chosen only 'train', 'val' "
            "and 'val_classes' may be read. Run the evaluation with phase='test' for the report."
        )


def get_features(context: EvaluationContext, split: str) -> Features:
    """Features of a split after the checks that every frozen task needs.

    Raises:
        ValueError: the phase may not read this split; arrays of the wrong shape; NaN or infinite features.

    Warns:
        RuntimeWarning: every feature vector is the same (a collapsed backbone). The metrics then stand at chance or at
            zero: a result that a sweep must see, so not an error.
    """
    check_split(context.phase, split)
    found = context.features(split)
    x = found.features
    if x.ndim != 2 or found.labels.shape != (len(x),) or 0 in x.shape:
        raise ValueError(
            f"features of split {split!r} have shape {x.shape} with labels {found.labels.shape}; expected (N, D) with "
            "(N,), N and D at least 1."
        )
    bad_rows = _not_finite(x)
    if len(bad_rows):
        raise ValueError(
            f"{len(bad_rows):,} of {len(x):,} feature vectors of split {split!r} contain NaN or infinity (first: row "
            f"{bad_rows[0]}): pretraining diverged or the checkpoint is damaged. Look at the pretraining loss, lower "
            "the learning rate, or evaluate an earlier checkpoint."
        )
    if len(x) > 1 and bool((x == x[0]).all()):
        message = f"all {len(x):,} feature vectors of split {split!r} are identical: the backbone has collapsed"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return found


def _not_finite(x: np.ndarray) -> np.ndarray:
    """Rows of ``x`` with NaN or infinity, found block by block: a mask of a million features would take gigabytes."""
    blocks = range(0, len(x), FINITE_BLOCK)
    return np.concatenate([i + np.flatnonzero(~np.isfinite(x[i : i + FINITE_BLOCK]).all(axis=1)) for i in blocks])


def l2_normalize(x: np.ndarray, split: str) -> np.ndarray:
    """Rows of ``x`` (N, D) at unit length; a zero row stays zero (papers divide by 0 here) and is warned about."""
    norms = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    num_zero = int((norms == 0).sum())
    if num_zero:
        message = f"{num_zero:,} of {len(x):,} feature vectors of split {split!r} are zero and stay zero"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return (x / np.where(norms == 0, 1.0, norms)).astype(np.float32)


def check_image_splits(task: str, counts: ClassCounts, needed: tuple[str, ...]) -> None:
    """ValueError unless every needed split has images and knows no class that "train" lacks."""
    for split in needed:
        if sum(counts.get(split, ())) == 0:
            present = ", ".join(name for name in counts if sum(counts[name])) or "none"
            raise ValueError(
                f"{task} needs images in split {split!r}; the data has: {present}. Name the split in the data URIs "
                f"({split}=...) or let the seeded split rule make it."
            )
    train = counts["train"]
    for split in needed:
        unknown = [c for c, count in enumerate(counts[split]) if count and (c >= len(train) or train[c] == 0)]
        if unknown:
            raise ValueError(
                f"{task}: split {split!r} has images of classes {_few(unknown)} (label numbers), of which split "
                "'train' has none, so they can never be predicted. Use a split that is stratified by class or drop the "
                "classes."
            )


def _few(items: list[int]) -> str:
    """The first items of a list, for messages."""
    return ", ".join(map(str, items[:8])) + (f" and {len(items) - 8} more" if len(items) > 8 else "")


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and half width 1.96 s / sqrt(n), s with ddof = 1: the formula of the CAMtrast test script."""
    return float(values.mean()), float(1.96 * values.std(ddof=1) / math.sqrt(len(values)))


def wilson_half_width(correct: int, n: int) -> float:
    """Half width of a symmetric interval around ``correct / n`` that covers Wilson's 95 % score interval.

    Wilson's interval is not centred on the proportion; the larger of its two sides is taken. Unlike the normal
    approximation it does not shrink to nothing at 0 and 100 %.
    """
    p = correct / n
    shrink = 1 + Z95**2 / n
    centre = (p + Z95**2 / (2 * n)) / shrink
    half = Z95 / shrink * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return max(p - (centre - half), centre + half - p)


def accuracy_metric(name: str, predicted: np.ndarray, labels: np.ndarray) -> Metric:
    """Percentage of equal entries of two integer arrays (N,), with its Wilson half width."""
    n = len(labels)
    correct = int((predicted == labels).sum())
    return Metric(name, 100.0 * correct / n, 100.0 * wilson_half_width(correct, n), n)
