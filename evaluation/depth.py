"""Fine-tuning for depth: one number per pixel, L1, and the share of pixels within a factor of 1.25.

Task "depth" of Newell & Deng (CVPR 2020; ``princeton-vl/selfstudy: tasks/depth.py, models/wrapper.py,
config/dense/r50/depth.gin``): 1x1 convolutions on the feature map, L1 on the scaled depth, pixels of no object at the
largest depth. Choices where the reference is unclear, or not to be followed:

- Scale and background are the largest depth of all training images: the reference divides by 25 and takes the largest
  depth of the batch, which depends on what else is in it.
- The recipe "newell_deng" has the linear head. The reference trains a linear and an MLP head; ``tasks/depth.py`` reads
  an entry of the output that the released model does not return, so it cannot say which of them was reported.
- The recipe "rendered" adds maps of finer stages. The paper's network is dilated to stride 8; a map of 2 x 2, which is
  what a network of stride 32 leaves of 64 px, cannot say where the object is.
- A prediction of 0 or less is wrong; in the reference two negative ratios count as right.
- The reference scores at the map's resolution (recipe "newell_deng", ``resolution`` "map"); by default predictions are
  upsampled and scored on all pixels.

Background dominates, so the metrics are also given on object pixels alone. In the rendered data an object's depths
differ by a factor of at most 1.6, so a constant is right on nearly all of its pixels within 1.25: there,
``within_1_1_object`` tells models apart.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from evaluation.depth_figures import example_sheet
from evaluation.depth_metrics import SHARES, Ratio, depth_sums, main_value, rmse, share
from evaluation.depth_model import HEADS, DepthBatch, DepthModel, Head
from evaluation.fine_tuning import (
    Draw,
    Freezing,
    Predictions,
    Schedule,
    scored_table,
    task_splits,
    train_splits,
    train_table,
)
from evaluation.fine_tuning_curves import curve_outputs
from evaluation.fine_tuning_images import Augmentation, augment, check_same_size, load_square, normalized_batch, square
from evaluation.fine_tuning_labels import label_subset
from evaluation.fine_tuning_runs import (
    BETAS_NOTE,
    Recipe,
    check_column,
    check_options,
    check_recipe,
    chosen_schedule,
    curve_iterations,
    newell_deng_schedule,
    over_seeds,
    rendered_schedule,
    run_seeds,
)
from evaluation.metric import (
    Artifact,
    ClassCounts,
    EvaluationContext,
    Metric,
    ModelResult,
    Output,
    Phase,
    Samples,
)
from evaluation.paired import compare_samples
from image_data.contracts import DataError
from image_data.prepared import PreparedData
from image_data.tables import ImageTable

__all__ = [
    "DepthConfig",
    "DepthProblem",
    "check",
    "check_data",
    "compare",
    "evaluate",
    "main_value",
    "metric_names",
    "problem",
    "protocol",
    "splits",
]

COLUMNS = ("depth", "depth_scale", "depth_max")
SCORED_BATCH = 32
NUM_EXAMPLES = 6  # images whose predictions are drawn


@dataclass(frozen=True)
class DepthConfig:
    """Fine-tuning for depth.

    Attributes:
        recipe: "rendered": Adam 1e-3 with cosine decay, 200 iterations of 32 images, flips: about a minute for
            ResNet-9 with the ImageNet stem at 64 px on two idle cores. "newell_deng": the paper's, for a GPU: batches
            of 64, 31,400 iterations for fewer than 20,000 labels, flips, colour jitter and grayscale, scored at the
            map's resolution.
        head: linear (one 1x1 convolution), mlp (1x1 convolution, BatchNorm, ReLU, 1x1 convolution), skips (the mlp on
            the maps of all strides from 4 on, added at the finest), or "auto", the recipe's: skips for "rendered",
            linear for "newell_deng".
        resolution: where loss and metrics are taken: "image" (predictions upsampled bilinearly), "map" (depths of the
            pixels that nearest-neighbour sampling picks), or "auto", the recipe's.
        iterations: optimiser steps; 0 is the recipe's number.
        batch_size: images per step, over all workers; 0 is the recipe's. Another one scales learning rate and
            iterations linearly.
        learning_rate: peak; 0 is the recipe's.
        image_size: side in pixels of the central square; 0 leaves the images as they are stored.
        seeds: runs, whose mean is reported with an interval over runs when there are two or more.
        num_labels: training images, even over the classes; 0 uses all.
        freezing: stages of the backbone that are not trained.
        curve_points: evenly spaced iterations at which within_1_25 is measured too; 0 draws no curve.
    """

    recipe: Recipe = "rendered"
    head: Literal["auto", "linear", "mlp", "skips"] = "auto"
    resolution: Literal["auto", "image", "map"] = "auto"
    iterations: int = 0
    batch_size: int = 0
    learning_rate: float = 0.0
    image_size: int = 0
    seeds: int = 1
    num_labels: int = 0
    freezing: Freezing = Freezing()  # noqa: RUF009
    curve_points: int = 0


@dataclass(frozen=True)
class DepthProblem:
    """The depth of every pixel.

    Attributes:
        schedule: see ``Problem``.
        evaluate_at: see there.
        freezing: see there.
        augmentation: of training images; must not crop, which targets do not follow.
        head: see ``DepthConfig``.
        resolution: see there; "image" or "map".
        image_size: S; 0 is the stored size.
        num_labels: training images; 0 is all.
    """

    schedule: Schedule
    evaluate_at: tuple[int, ...] = ()
    freezing: Freezing = Freezing()  # noqa: RUF009
    augmentation: Augmentation = Augmentation()  # noqa: RUF009
    head: Head = "linear"
    resolution: Literal["image", "map"] = "image"
    image_size: int = 0
    num_labels: int = 0

    def build(self, backbone: Any, data: PreparedData, phase: Phase, seed: int, device: torch.device) -> _Trainee:
        """See ``Problem``; the labels that are kept are drawn with the seed."""
        return _Trainee(self, backbone, train_table(data, phase), scored_table(data, phase), seed)


class _Trainee:
    """See ``Trainee``."""

    def __init__(self, problem: DepthProblem, backbone: Any, table: ImageTable, scored: ImageTable, seed: int) -> None:
        assert not problem.augmentation.crop, "targets do not follow crops"
        for one in (table, scored):
            check_same_size("depth", one, problem.image_size)
        self._problem, self._table, self._scored = problem, table, scored
        self._rows = label_subset(table.labels, problem.num_labels, seed)
        self.largest = float(np.max(table.column("depth_max")))
        if not 0 < self.largest < math.inf:
            raise DataError(f"depth_max of the training images is {self.largest}; the images show no object.")
        self.model = DepthModel(backbone, problem.head, problem.resolution)
        self.num_images, self.num_scored = len(self._rows), scored.num_images

    def load(self, draws: Sequence[Draw]) -> DepthBatch:
        images, depths = [], []
        for draw in draws:
            row = int(self._rows[draw.row])
            image = load_square(self._table, row, self._problem.image_size)
            image, flipped = augment(image, self._problem.augmentation, draw.rng)
            depth = self._depth(self._table, row)
            images.append(image)
            depths.append(depth[:, ::-1] if flipped else depth)
        return DepthBatch(normalized_batch(images), torch.from_numpy(np.stack(depths)))

    def _depth(self, table: ImageTable, row: int) -> np.ndarray:
        """Depths of an image in units of the largest one, background 1, float32 (S, S)."""
        stored = np.asarray(Image.open(io.BytesIO(table.value(row, "depth"))))
        image_shape = (table.value(row, "height"), table.value(row, "width"))
        if stored.shape != image_shape:
            name = table.value(row, "name")
            raise DataError(f"depth of image {name!r} has shape {stored.shape}; the image has {image_shape}.")
        values = square(stored, self._problem.image_size, nearest=True)
        scaled = values * np.float32(table.value(row, "depth_scale") / self.largest)
        return np.where(values == 0, np.float32(1), scaled.astype(np.float32))

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [p for p in self.model.parameters() if p.requires_grad]}]

    def before_predict(self, batches: Iterator[Any]) -> None:
        pass

    def predict(self, rows: Sequence[int]) -> Predictions:
        parts = [self._predict(rows[start : start + SCORED_BATCH]) for start in range(0, len(rows), SCORED_BATCH)]
        parts = parts or [self._predict([0], keep=0)]  # a worker without images still has to give its arrays
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _predict(self, rows: Sequence[int], keep: int | None = None) -> Predictions:
        images = normalized_batch([load_square(self._scored, row, self._problem.image_size) for row in rows])
        stored = np.stack([self._depth(self._scored, row) for row in rows])
        predicted, depths = self.model.outputs(DepthBatch(images, torch.from_numpy(stored)))
        found = depth_sums(predicted.cpu().numpy(), depths.cpu().numpy(), self.largest)
        found["examples"] = predicted.cpu().numpy()[: sum(row < NUM_EXAMPLES for row in rows)]
        found["example_depths"] = depths.cpu().numpy()[: len(found["examples"])]
        return {name: values[:keep] for name, values in found.items()}


def problem(config: DepthConfig) -> DepthProblem:
    """What is trained."""
    is_paper = config.recipe == "newell_deng"
    recipe = newell_deng_schedule(config.num_labels, 64, 10_000) if is_paper else rendered_schedule()
    schedule = chosen_schedule(recipe, config)
    head = config.head if config.head != "auto" else "linear" if is_paper else "skips"
    resolution = config.resolution if config.resolution != "auto" else "map" if is_paper else "image"
    return DepthProblem(
        schedule,
        curve_iterations(schedule.iterations, config.curve_points),
        config.freezing,
        Augmentation(flip=True, color_jitter=0.8, grayscale=0.25) if is_paper else Augmentation(flip=True),
        head,
        resolution,
        config.image_size,
        config.num_labels,
    )


def metric_names(config: DepthConfig) -> tuple[str, ...]:
    """Names of the main metrics; ``depth/rmse`` and ``depth/rmse_object``, where less is better, are yielded too."""
    return tuple(f"depth/{name}" for name in SHARES)


def splits(config: DepthConfig, phase: Phase) -> tuple[str, ...]:
    """Splits that the evaluation reads."""
    return task_splits(phase)


def protocol(config: DepthConfig, phase: Phase) -> dict:
    """Everything needed to reproduce the numbers, as JSON data."""
    made = problem(config)
    return {
        "name": "fine-tuned depth of every pixel",
        "source": "Newell & Deng, CVPR 2020; princeton-vl/selfstudy: tasks/depth.py, models/wrapper.py, "
        "config/dense/r50/depth.gin, config/grid_search.py",
        "phase": phase,
        "split": phase,
        "trained_on": list(train_splits(phase)),
        "target": "depth / largest depth of the training images; pixels of no object are 1",
        "head": f"{made.head}: {HEADS[made.head]}; the last bias starts at 1",
        "loss": "L1, mean over pixels",
        "resolution": made.resolution,
        "input": "central square, RGB normalised with ImageNet's mean and deviation",
        "augmentation": asdict(made.augmentation),
        "labels": "all images" if not made.num_labels else f"{made.num_labels} images, even over classes",
        "schedule": made.schedule.to_json(),
        "schedule_note": BETAS_NOTE if config.recipe == "newell_deng" else "ours, for small data on few cores",
        "reported": "last iteration",
        "metric": "percentage of pixels of all images with max(predicted / true, true / predicted) below 1.25 or 1.1; "
        "predictions of 0 or less are wrong; rmse in the data's unit; *_object on object pixels alone",
        "interval": "one seed: 1.96 standard errors of the ratio of sums over images; more: Student's over seeds",
        "config": asdict(config),
    }


def check(config: DepthConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError where the options or the data do not allow the evaluation."""
    check_recipe("depth", config.recipe)
    if config.head not in ("auto", *HEADS) or config.resolution not in ("auto", "image", "map"):
        raise ValueError(
            f"depth got head={config.head!r}, resolution={config.resolution!r}; allowed: head "
            f"{', '.join(('auto', *HEADS))}, resolution auto, image or map."
        )
    check_options("depth", config, phase, class_counts)


def check_data(config: DepthConfig, phase: Phase, data: PreparedData) -> None:
    """DataError where the data has no depths."""
    for column in COLUMNS:
        check_column("depth", column, data, splits(config, phase))


def evaluate(config: DepthConfig, context: EvaluationContext) -> Iterator[Output]:
    """Yield the metrics, what each image adds to them, predictions of some images, and on request the curve."""
    results = run_seeds("depth", problem(config), config.seeds, context)
    lasts = [result.last for result in results]
    for name in SHARES:
        yield from _outputs(f"depth/{name}", [share(last, name) for last in lasts])
    for suffix in ("", "_object"):
        roots = [rmse(last, suffix) for last in lasts]
        single = Metric(f"depth/rmse{suffix}", *roots[0], len(lasts[0]["pixels"]))
        yield over_seeds(single.name, [value for value, _ in roots], single)
    assert context.fine_tuning is not None
    table = scored_table(context.fine_tuning.data("depth"), context.phase)
    shown = [square(table.image(row), config.image_size) for row in range(len(lasts[0]["examples"]))]
    yield Artifact("depth/examples.png", example_sheet(shown, lasts[0]["example_depths"], lasts[0]["examples"]))
    if config.curve_points:
        at = sorted(results[0].predictions)
        values = np.array([[main_value(result.predictions[i]) for i in at] for result in results])
        yield from curve_outputs("depth", "pixels within a factor of 1.25 (%)", at, values)


def _outputs(name: str, ratios: Sequence[Ratio]) -> Iterator[Output]:
    """Metric and samples of one share."""
    first = ratios[0]
    single = Metric(name, first.value, first.half_width, len(first.parts))
    yield over_seeds(name, [one.value for one in ratios], single)
    yield Samples(name, np.stack([one.parts for one in ratios]).mean(0))


def compare(config: DepthConfig, models: Sequence[ModelResult]) -> Iterator[Metric | Artifact]:
    """Models compared on the same images."""
    yield from compare_samples("depth", metric_names(config), models)
