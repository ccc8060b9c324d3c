"""What classification, pose and depth share: options, the schedule of Newell & Deng, runs and metrics over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, get_args

import numpy as np

from evaluation.fine_tuning import FineTuneResult, Freezing, Run, Schedule, task_splits, train_splits
from evaluation.metric import ClassCounts, EvaluationContext, Metric, Phase, check_image_splits
from image_data.contracts import DataError
from image_data.prepared import PreparedData
from image_data.tables import target_columns

__all__ = [
    "BETAS_NOTE",
    "FineTuneOptions",
    "Recipe",
    "check_column",
    "check_options",
    "check_recipe",
    "chosen_schedule",
    "curve_iterations",
    "newell_deng_schedule",
    "over_seeds",
    "rendered_schedule",
    "run_seeds",
]

Recipe = Literal["rendered", "newell_deng"]

BETAS_NOTE = "Adam's betas are (0.9, 0.999); the reference has (0.8, 0.999)"


class FineTuneOptions(Protocol):
    """The options that all of these tasks have; each task's config documents them."""

    @property
    def iterations(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def image_size(self) -> int: ...
    @property
    def seeds(self) -> int: ...
    @property
    def num_labels(self) -> int: ...
    @property
    def freezing(self) -> Freezing: ...
    @property
    def curve_points(self) -> int: ...


def newell_deng_schedule(num_labels: int, batch_size: int, images_per_epoch: int) -> Schedule:
    """Fine-tuning in the label sweep of Newell & Deng (CVPR 2020).

    Adam, peak 1e-3 after 5 epochs of warm-up from 0, linear decay to 1e-6, weight decay 1e-4; 200 epochs below 20,000
    labels, else 600 (``princeton-vl/selfstudy: config/grid_search.py, config/syn/r9/classify.gin``). An epoch has at
    least 10,000 images, 20,000 for exactly 4,000 labels, because small sets are repeated, and at most
    ``images_per_epoch`` (``datasets/base.py: setup_idxs, max_images``; an incomplete batch counts). Two small
    differences: ``BETAS_NOTE``, and the decay here begins at iteration 0 and is multiplied with the warm-up.

    Args:
        num_labels: training images; 0 stands for more than ``images_per_epoch``, as in the paper's full set.
        batch_size: of the reference, 512 for single objects and 64 for dense tasks.
        images_per_epoch: 50,000 for single objects, 10,000 for dense tasks.
    """
    least = 20_000 if num_labels == 4000 else 10_000
    tiled = num_labels * math.ceil(least / num_labels) if 0 < num_labels < least else num_labels or images_per_epoch
    per_epoch = math.ceil(min(tiled, images_per_epoch) / batch_size)
    epochs = 200 if 0 < num_labels < 20_000 else 600
    return Schedule(
        iterations=epochs * per_epoch,
        batch_size=batch_size,
        learning_rate=1e-3,
        optimizer="adam",
        weight_decay=1e-4,
        warmup_iterations=5 * per_epoch,
        warmup_factor=0.0,
        decay="poly",
        power=1.0,
        min_learning_rate=1e-6,
    )


def rendered_schedule() -> Schedule:
    """Ours, for a thousand small images on two cores: Adam, 1e-3 after a short warm-up, cosine decay."""
    return Schedule(
        iterations=200,
        batch_size=32,
        learning_rate=1e-3,
        optimizer="adam",
        weight_decay=1e-4,
        warmup_iterations=20,
        warmup_factor=0.0,
        decay="cosine",
    )


def chosen_schedule(recipe: Schedule, options: FineTuneOptions) -> Schedule:
    """The recipe's schedule with the batch size (linearly scaled), iterations and learning rate that were given."""
    schedule = recipe
    if options.batch_size:
        schedule = schedule.with_batch_size(options.batch_size)
    if options.iterations:
        schedule = schedule.with_iterations(options.iterations)
    if options.learning_rate:
        floor = schedule.min_learning_rate * options.learning_rate / schedule.learning_rate
        schedule = replace(schedule, learning_rate=options.learning_rate, min_learning_rate=floor)
    return schedule


def curve_iterations(iterations: int, points: int) -> tuple[int, ...]:
    """``points`` evenly spaced iterations, the last of which is the end; none for 0 points."""
    return tuple(sorted({max(1, round(iterations * i / points)) for i in range(1, points + 1)}))


def check_options(task: str, options: FineTuneOptions, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError for options that no data allow, for missing splits, and for more labels than images."""
    counted = ("iterations", "batch_size", "learning_rate", "image_size", "num_labels", "curve_points")
    negative = {name: getattr(options, name) for name in counted if not 0 <= getattr(options, name) < math.inf}
    if negative or options.seeds < 1:
        given = ", ".join(f"{name}={value}" for name, value in {**negative, "seeds": options.seeds}.items())
        raise ValueError(
            f"{task} got {given}; allowed: seeds at least 1, the others finite and at least 0 (0 means the recipe's "
            "value, the stored image size, all labels, no curve)."
        )
    if options.freezing.stages < 0 or options.freezing.batchnorm not in ("train", "eval"):
        raise ValueError(f"{task} got {options.freezing}; allowed: stages at least 0, batchnorm train or eval.")
    check_image_splits(task, class_counts, task_splits(phase))
    available = sum(sum(class_counts[split]) for split in train_splits(phase))
    if options.num_labels > available:
        raise ValueError(
            f"{task} got num_labels={options.num_labels:,}, but there are {available:,} training images; give 0 (all) "
            f"to {available:,}."
        )


def check_recipe(task: str, recipe: str) -> None:
    """ValueError for an unknown recipe."""
    if recipe not in get_args(Recipe):
        raise ValueError(f"{task} got recipe={recipe!r}; allowed: {', '.join(get_args(Recipe))}.")


def check_column(task: str, column: str, data: PreparedData, needed: Sequence[str]) -> None:
    """DataError where a split has no such target."""
    for split in needed:
        found = target_columns(data, split)
        if column not in found:
            raise DataError(
                f"{task} needs a target {column!r}, but the images of split {split!r} have "
                f"{', '.join(found) or 'no targets'} beside their labels. The rendered data (rendered:) has it; leave "
                f"the task {task} out, or give it data of its own."
            )


def run_seeds(task: str, problem: Any, seeds: int, context: EvaluationContext) -> list[FineTuneResult]:
    """One run per seed, ``context.seed`` and the following ones."""
    assert context.fine_tuning is not None, f"{task} needs EvaluationContext.fine_tuning"
    runs = [
        Run(f"seed{seed}", task, problem, context.phase, seed) for seed in range(context.seed, context.seed + seeds)
    ]
    return context.fine_tuning.results(runs)


def over_seeds(name: str, values: Sequence[float], single: Metric) -> Metric:
    """The mean of one value per seed with Student's 95 % half width over the seeds; of one seed ``single``."""
    if len(values) == 1:
        return single
    from evaluation.intervals import mean_and_half_width

    return Metric(name, *mean_and_half_width(np.array(values), "rfs"), len(values))
