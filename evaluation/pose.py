"""Fine-tuning for pose: which of five directions the object's up axis points to.

Task "pose" of Newell & Deng (CVPR 2020; ``princeton-vl/selfstudy: tasks/classify.py, util/helper.py:
get_pose_class_idx``): classification of "top" and four 90-degree sectors, the column ``pose``. Images are **not**
mirrored, because a mirror image has another pose; the reference mirrors them and keeps the label
(``config/syn/r9/pose.gin``: flip = True without transform_targets), which tells the network that left is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from evaluation.classification import (
    ClassificationProblem,
    class_outputs,
    class_protocol,
    class_schedule,
    main_value,
)
from evaluation.fine_tuning import Freezing, scored_table, task_splits, train_splits, train_table
from evaluation.fine_tuning_images import Augmentation
from evaluation.fine_tuning_runs import Recipe, check_column, check_options, check_recipe, curve_iterations
from evaluation.metric import Artifact, ClassCounts, EvaluationContext, Metric, ModelResult, Output, Phase
from evaluation.paired import compare_samples
from image_data.contracts import DataError
from image_data.prepared import PreparedData

__all__ = [
    "PoseConfig",
    "check",
    "check_data",
    "check_poses",
    "compare",
    "evaluate",
    "main_value",
    "metric_names",
    "problem",
    "protocol",
    "splits",
]


@dataclass(frozen=True)
class PoseConfig:
    """Fine-tuning for pose.

    Attributes:
        recipe: as for classification, but images are never mirrored.
        iterations: optimiser steps; 0 is the recipe's number.
        batch_size: images per step, over all workers; 0 is the recipe's. Another one scales learning rate and
            iterations linearly.
        learning_rate: peak; 0 is the recipe's.
        image_size: side in pixels of the central square; 0 leaves the images as they are stored.
        seeds: runs, whose mean is reported with an interval over runs when there are two or more.
        num_labels: training images, even over the poses; 0 uses all.
        freezing: stages of the backbone that are not trained.
        curve_points: evenly spaced iterations at which accuracy is measured too; 0 draws no curve.
    """

    recipe: Recipe = "rendered"
    iterations: int = 0
    batch_size: int = 0
    learning_rate: float = 0.0
    image_size: int = 0
    seeds: int = 1
    num_labels: int = 0
    freezing: Freezing = Freezing()  # noqa: RUF009
    curve_points: int = 0


def problem(config: PoseConfig) -> ClassificationProblem:
    """What is trained."""
    schedule = class_schedule(config, config.recipe)
    everything = Augmentation(crop=True, cutout=True, color_jitter=0.8, grayscale=0.25)
    return ClassificationProblem(
        "pose",
        schedule,
        curve_iterations(schedule.iterations, config.curve_points),
        config.freezing,
        everything if config.recipe == "newell_deng" else Augmentation(crop=True),
        config.image_size,
        config.num_labels,
    )


def metric_names(config: PoseConfig) -> tuple[str, ...]:
    """Names of the main metrics."""
    return ("pose/top1",)


def splits(config: PoseConfig, phase: Phase) -> tuple[str, ...]:
    """Splits that the evaluation reads."""
    return task_splits(phase)


def protocol(config: PoseConfig, phase: Phase) -> dict:
    """Everything needed to reproduce the numbers, as JSON data."""
    note = "never mirrored: a mirror image has another pose. The reference mirrors and keeps the label"
    return {
        "name": "fine-tuned classifier of five poses",
        **class_protocol(problem(config), config, phase),
        "augmentation_note": note,
    }


def check(config: PoseConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError where the options or the data do not allow the evaluation."""
    check_recipe("pose", config.recipe)
    check_options("pose", config, phase, class_counts)


def check_data(config: PoseConfig, phase: Phase, data: PreparedData) -> None:
    """DataError where the data has no poses, or one pose only."""
    check_poses("pose", phase, data)


def check_poses(task: str, phase: Phase, data: PreparedData) -> None:
    """DataError where the data has no poses, or where any model is right because all are the same.

    Args:
        task: named in the message.
        phase: of the task.
        data: that it trains on and scores.
    """
    check_column(task, "pose", data, task_splits(phase))
    trained = " and ".join(train_splits(phase))
    for split, table in ((trained, train_table(data, phase)), (phase, scored_table(data, phase))):
        poses = table.column("pose")
        if len(set(poses)) == 1:
            raise DataError(
                f"{task}: all {len(poses):,} images of {split} have the same pose, so that any model is right. "
                "Rendered images vary in pose where the third of their factors is 1: give --task-data "
                f"'{task}=rendered:?factors=0110', or leave the task {task} out."
            )


def evaluate(config: PoseConfig, context: EvaluationContext) -> Iterator[Output]:
    """Yield top-1 in percent, which images are right and, on request, the curve over iterations."""
    yield from class_outputs("pose", problem(config), config.seeds, config.curve_points, context)


def compare(config: PoseConfig, models: Sequence[ModelResult]) -> Iterator[Metric | Artifact]:
    """Models compared on the same images."""
    yield from compare_samples("pose", metric_names(config), models)
