"""Landmarks: a backbone and a two-layer head, fine-tuned to regress five points (Zhao et al., ICLR 2021, Table 5).

Recipe ``mafl``, the paper's: all layers are fine-tuned for 200 epochs at learning rate 0.02 and batch 128 on MAFL, five
points of a face: eyes, nose, mouth corners. The head is "1x1 conv and FC, interleaved with LeakyReLU and BN"
(``landmark_head``). The paper states neither loss, image size, optimiser, decay nor augmentation; ours (inferred):
mean squared error of coordinates in [0, 1], 224 px, SGD with momentum 0.9 and weight decay 1e-4, 5 epochs of linear
warm-up (random weights are near the edge of divergence), cosine decay, no augmentation. Recipe ``rendered`` is a
minute's worth for ``rendered:`` data.

The error of an image is the mean over its visible points of the Euclidean distance between predicted and true point in
pixels of the stored image, divided by a length of the image (``normalizer``), in percent; the metric is its mean over
the images. Where all points are visible, as on faces, that is the mean over images and points.

    eyes  the distance of the two true eye points (points 0 and 1), as in ``tomasjakab/imm: scripts/test.py``. That code
          measures in an image that was stretched to a square first, ours in the image as it is.
    box   the diagonal of the object's box (column ``box``): rendered objects have no eyes. Images whose object is out
          of sight or has no visible point are left out and counted.

``tomasjakab/imm: imm/datasets/celeba_dataset.py`` shows the network the central 80 % of height and width (``crop``
0.8); Zhao et al. say nothing of a crop, so the default is the whole image. Points outside a crop are still trained and
scored.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, NamedTuple, get_args

import numpy as np

from evaluation.fine_tuning import Freezing, Run, Schedule, scored_table, task_splits, train_splits
from evaluation.intervals import mean_and_half_width
from evaluation.landmark_figures import Picture, landmark_grid
from evaluation.landmark_head import LandmarkProblem, points_of
from evaluation.metric import (
    Artifact,
    ClassCounts,
    EvaluationContext,
    Metric,
    ModelResult,
    Output,
    Phase,
    Samples,
    mean_interval,
)
from evaluation.paired import compare_samples
from image_data.contracts import DataError
from image_data.prepared import PreparedData
from image_data.tables import ImageTable, target_columns

__all__ = [
    "LandmarksConfig",
    "check",
    "check_data",
    "compare",
    "evaluate",
    "metric_names",
    "problem",
    "protocol",
    "relative_errors",
    "splits",
]

Normalizer = Literal["eyes", "box"]
NAMED = 5  # images that a message names
EYES = (0, 1)  # points


class Recipe(NamedTuple):
    """Settings that belong together.

    Attributes:
        schedule: counted in iterations or, where ``in_epochs``, in passes over the training images.
        in_epochs: see there.
        image_size: pixels.
        normalizer: see the module.
        source: of all these.
    """

    schedule: Schedule
    in_epochs: bool
    image_size: int
    normalizer: Normalizer
    source: str


RECIPES: dict[str, Recipe] = {
    "rendered": Recipe(
        Schedule(200, 32, 1e-3, "adam", weight_decay=1e-4, warmup_iterations=20, warmup_factor=0.0, decay="cosine"),
        False,
        64,
        "box",
        "ours: a minute on two CPU cores with ResNet-9 and the ImageNet stem",
    ),
    "mafl": Recipe(
        Schedule(200, 128, 0.02, weight_decay=1e-4, warmup_iterations=5, decay="cosine"),
        True,
        224,
        "eyes",
        "Zhao et al., ICLR 2021: 200 epochs, learning rate 0.02, batch 128, all layers; squared error, 224 px, SGD "
        "with momentum 0.9 and weight decay 1e-4, 5 epochs of warm-up, cosine decay and no augmentation are inferred",
    ),
}


@dataclass(frozen=True)
class LandmarksConfig:
    """Landmark regression by fine-tuning.

    Attributes:
        recipe: settings that the fields below change where they are not 0: "rendered" (200 iterations of Adam with 32
            images of 64 px, errors relative to the object's box) or "mafl" (Zhao et al.: 200 epochs of SGD, batch 128,
            224 px, errors relative to the distance of the eyes).
        epochs: passes over the training images.
        iterations: optimiser steps, instead of epochs.
        batch_size: images per step; without other fields the learning rate grows and the iterations shrink with it.
        learning_rate: peak.
        image_size: side of the square that the network sees, in pixels.
        crop: share of the image's height and width that is kept, from the centre; 0.8 in tomasjakab/imm.
        flip: mirror half of the training images, the left and right points exchanged: only for faces.
        normalizer: what an error is divided by: "eyes" (the distance of points 0 and 1), "box" (the diagonal of the
            object's box) or the "recipe"'s.
        freezing: stages of the backbone that are not fine-tuned.
        seeds: runs, with seeds that follow each other; from 2 on the interval is over them.
        num_pictures: scored images in the picture of predicted points.
    """

    recipe: Literal["rendered", "mafl"] = "rendered"
    epochs: int = 0
    iterations: int = 0
    batch_size: int = 0
    learning_rate: float = 0.0
    image_size: int = 0
    crop: float = 1.0
    flip: bool = False
    normalizer: Literal["recipe", "eyes", "box"] = "recipe"
    freezing: Freezing = Freezing()  # noqa: RUF009
    seeds: int = 1
    num_pictures: int = 16


def metric_names(config: LandmarksConfig) -> tuple[str, ...]:
    """The error; lower is better."""
    return ("landmarks/error",)


def splits(config: LandmarksConfig, phase: Phase) -> tuple[str, ...]:
    """Splits that the evaluation reads."""
    return task_splits(phase)


def protocol(config: LandmarksConfig, phase: Phase) -> dict:
    """Everything needed to reproduce the numbers, as JSON data."""
    recipe, epochs = RECIPES[config.recipe], _epochs(config)
    normalizer = {"eyes": "distance of the true points 0 and 1 (the eyes)", "box": "diagonal of the object's box"}
    # As many images as a batch: an iteration is an epoch.
    schedule = problem(config, config.batch_size or recipe.schedule.batch_size).schedule
    counted = {"counted_in": "passes over the training images" if epochs else "iterations"}
    return {
        "name": "landmarks by fine-tuning",
        "source": recipe.source,
        "phase": phase,
        "split": phase,
        "train": list(train_splits(phase)),
        "head": "last feature map, 1x1 convolution to 128, BatchNorm, LeakyReLU(0.01), flatten, linear layer",
        "loss": "mean over coordinates of visible points of the squared error, in sides of the crop",
        "schedule": {**schedule.to_json(), **counted},
        "image_size": problem(config, 1).image_size,
        "input": f"central {100 * config.crop:g} % of height and width, resized to a square (bilinear)",
        "augmentation": "mirrored with probability 0.5, left and right points exchanged" if config.flip else "none",
        "metric": "mean over images of the mean over visible points of distance / normaliser, in percent; lower is "
        "better",
        "normalizer": normalizer[_normalizer(config)],
        "reported": "the last iteration",
        "interval": _interval_text(config),
        "config": asdict(config),
    }


def _interval_text(config: LandmarksConfig) -> str:
    if config.seeds > 1:
        return f"Student's t over {config.seeds} fine-tuning runs of one checkpoint"
    return "1.96 s / sqrt(n) over images, s with ddof = 1: not over seeds"


def check(config: LandmarksConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError where the options or the data do not allow the evaluation; call it before any long work."""
    if config.recipe not in RECIPES:
        raise ValueError(f"landmarks got recipe={config.recipe!r}; allowed: {', '.join(RECIPES)}.")
    allowed = ("recipe", *get_args(Normalizer))
    if config.normalizer not in allowed:
        raise ValueError(f"landmarks got normalizer={config.normalizer!r}; allowed: {', '.join(allowed)}.")
    numbers = ("epochs", "iterations", "batch_size", "learning_rate", "image_size", "num_pictures")
    negative = [f"{name}={getattr(config, name)}" for name in numbers if not getattr(config, name) >= 0]
    if negative or config.seeds < 1 or not 0 < config.crop <= 1:
        raise ValueError(
            f"landmarks got {', '.join([*negative, f'seeds={config.seeds}', f'crop={config.crop}'])}; allowed: seeds "
            "at least 1, crop above 0 and at most 1, everything else 0 (the recipe's) or more."
        )
    if config.freezing.stages < 0 or config.freezing.batchnorm not in ("train", "eval"):
        raise ValueError(f"landmarks got {config.freezing}; allowed: stages at least 0, batchnorm train or eval.")
    if config.epochs and config.iterations:
        raise ValueError(f"landmarks got epochs={config.epochs} and iterations={config.iterations}; give one of them.")
    if config.flip and _normalizer(config) != "eyes":
        raise ValueError(
            "landmarks got flip for data without left and right: only the points of faces have partners to exchange. "
            "Leave flip out, or use recipe mafl."
        )
    for split in splits(config, phase):
        if sum(class_counts.get(split, ())) == 0:
            present = ", ".join(name for name in class_counts if sum(class_counts[name])) or "none"
            raise ValueError(
                f"landmarks needs images in split {split!r}; the data has: {present}. Name the split in the data URIs "
                f"({split}=...) or let the seeded split rule make it."
            )


def check_data(config: LandmarksConfig, phase: Phase, data: PreparedData) -> None:
    """The targets are there and can be scored.

    Raises:
        DataError: a split has no landmarks (or, relative to the box, no boxes); a face without eyes, named.
    """
    needed = ("landmarks", "box") if _normalizer(config) == "box" else ("landmarks",)
    for split in splits(config, phase):
        present = target_columns(data, split)
        lacking = [name for name in needed if name not in present]
        if lacking:
            raise DataError(
                f"landmarks needs the target {' and '.join(map(repr, lacking))} in split {split!r} of "
                f"{' '.join(data.source)}, which has: {', '.join(present) or 'no targets'}. Use rendered: data, or "
                "faces (mafl:DIR, celeba:DIR) with recipe mafl."
            )
    _truth(scored_table(data, phase), _normalizer(config))


def problem(config: LandmarksConfig, num_images: int) -> LandmarkProblem:
    """What is trained.

    Args:
        config: options.
        num_images: training images, which turn epochs into iterations.
    """
    recipe, epochs = RECIPES[config.recipe], _epochs(config)
    schedule = recipe.schedule
    if epochs:
        schedule = schedule.with_iterations(max(1, round(epochs * num_images / schedule.batch_size)))
    if config.batch_size:
        schedule = schedule.with_batch_size(config.batch_size)
    if config.iterations:
        schedule = schedule.with_iterations(config.iterations)
    if config.learning_rate:
        schedule = replace(schedule, learning_rate=config.learning_rate)
    image_size = config.image_size or recipe.image_size
    return LandmarkProblem(schedule, image_size, config.crop, config.flip, freezing=config.freezing)


def _epochs(config: LandmarksConfig) -> int:
    """0 where iterations are counted."""
    if config.iterations:
        return 0
    recipe = RECIPES[config.recipe]
    return config.epochs or (recipe.schedule.iterations if recipe.in_epochs else 0)


def _normalizer(config: LandmarksConfig) -> Normalizer:
    return RECIPES[config.recipe].normalizer if config.normalizer == "recipe" else config.normalizer


def evaluate(config: LandmarksConfig, context: EvaluationContext) -> Iterator[Output]:
    """Yield the error in percent, the number of images left out, each image's error, and a picture of the points."""
    tuning, phase = context.fine_tuning, context.phase
    if tuning is None:
        raise ValueError("landmarks fine-tunes the backbone, but only features were given; evaluate a checkpoint.")
    data = tuning.data("landmarks")
    check_data(config, phase, data)
    task = problem(config, sum(data.split(split).num_images for split in train_splits(phase)))
    seeds = [context.seed + i for i in range(config.seeds)]
    results = tuning.results([Run(f"seed{seed}", "landmarks", task, phase, seed) for seed in seeds])
    table = scored_table(data, phase)
    truth = _truth(table, _normalizer(config))
    errors = np.stack([relative_errors(result.last["points"][truth.rows], *truth[1:]) for result in results])
    yield _metric(errors)
    left_out = table.num_images - len(truth.rows)
    if left_out:
        message = (
            f"landmarks: {left_out:,} of {table.num_images:,} images show no point or no object; they are left out"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    yield Metric("landmarks/left_out", float(left_out))
    yield Samples("landmarks/error", errors.mean(axis=0))
    if config.num_pictures:
        yield _grid(config, table, truth, results[0].last["points"], errors[0])


def _metric(errors: np.ndarray) -> Metric:
    """The mean of (runs, images), with its interval over runs, or over the images of one run."""
    if len(errors) > 1:
        return Metric("landmarks/error", *mean_and_half_width(errors.mean(axis=1), "rfs"), len(errors))
    if errors.shape[1] > 1:
        return Metric("landmarks/error", *mean_interval(errors[0]), errors.shape[1])
    return Metric("landmarks/error", float(errors.mean()), None, 1)


def compare(config: LandmarksConfig, models: Sequence[ModelResult]) -> Iterator[Metric | Artifact]:
    """Models compared on the same images; a negative difference is in favour of the first."""
    yield from compare_samples("landmarks", metric_names(config), models)


class _Truth(NamedTuple):
    """What the n images that can be scored are scored against.

    Attributes:
        rows: of the scored table (n,).
        points: (n, K, 2) in pixels.
        visible: bool (n, K).
        lengths: the normaliser, in pixels (n,).
    """

    rows: np.ndarray
    points: np.ndarray
    visible: np.ndarray
    lengths: np.ndarray


def _truth(table: ImageTable, normalizer: Normalizer) -> _Truth:
    """Raises DataError for a face without two eyes apart, and where no image can be scored."""
    points, visible = points_of(table)
    if normalizer == "eyes":
        lengths = _eye_distances(table, points, visible)
    else:
        boxes = np.array(table.column("box"), np.float64).reshape(-1, 4)
        lengths = np.hypot(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
    rows = np.flatnonzero((lengths > 0) & visible.any(1))
    if not len(rows):
        raise DataError("landmarks: no scored image has a visible point and an object's box; check the annotations.")
    return _Truth(rows, points[rows], visible[rows], lengths[rows])


def _eye_distances(table: ImageTable, points: np.ndarray, visible: np.ndarray) -> np.ndarray:
    if points.shape[1] <= max(EYES):
        raise DataError(f"landmarks: images have {points.shape[1]} points; the points 0 and 1 must be the eyes.")
    lengths = np.linalg.norm(points[:, EYES[0]] - points[:, EYES[1]], axis=1)
    bad = np.flatnonzero(~(visible[:, list(EYES)].all(1) & (lengths > 0)))
    if len(bad):
        names = ", ".join(str(table.value(int(row), "name")) for row in bad[:NAMED])
        raise DataError(
            f"landmarks: {len(bad):,} images have no distance of the eyes to divide by, because an eye is hidden or "
            f"both are in one place: {names}{', ...' if len(bad) > NAMED else ''}. Correct or remove them, or use "
            "normalizer box where the data has boxes."
        )
    return lengths


def relative_errors(predicted: np.ndarray, points: np.ndarray, visible: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Mean distance of each image's visible points over a length of the image, in percent (N,).

    Args:
        predicted: (N, K, 2), pixels.
        points: (N, K, 2), pixels; hidden ones have no influence.
        visible: bool (N, K), at least one per image.
        lengths: (N,), pixels, above 0.
    """
    distances = np.linalg.norm(predicted.astype(np.float64) - points, axis=2)
    mean = np.where(visible, distances, 0.0).sum(axis=1) / visible.sum(axis=1)
    return 100.0 * mean / lengths


def _grid(
    config: LandmarksConfig, table: ImageTable, truth: _Truth, predicted: np.ndarray, errors: np.ndarray
) -> Artifact:
    """Images evenly spread over the scored ones: the same for all models."""
    chosen = np.unique(np.linspace(0, len(truth.rows) - 1, config.num_pictures).round().astype(int))
    pictures = [
        Picture(table.image(int(row)), truth.points[i], truth.visible[i], predicted[row], float(errors[i]))
        for i, row in zip(chosen, truth.rows[chosen], strict=True)
    ]
    unit = {"eyes": "of the distance of the eyes", "box": "of the box's diagonal"}[_normalizer(config)]
    title = f"Landmarks after fine-tuning: mean error {errors.mean():.1f} % {unit} ({len(errors):,} images)"
    return Artifact("landmarks/points.png", landmark_grid(pictures, title))
