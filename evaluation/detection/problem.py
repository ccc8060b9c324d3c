"""Detection as a fine-tuning problem: the config, and what it resolves to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from evaluation.detection.recipes import RECIPES, HeadKind, MetricStyle, Recipe, RecipeName
from evaluation.fine_tuning import Freezing, Schedule, Trainee, scored_table, train_table
from evaluation.metric import Phase
from image_data.prepared import PreparedData

__all__ = ["DetectionConfig", "DetectionProblem", "detection_problem", "resolved_recipe"]


@dataclass(frozen=True)
class DetectionConfig:
    """Object detection with detectron2, fine-tuned from the checkpoint.

    Attributes:
        recipe: rendered (ours, a minute), voc07 (Zhao et al.: Faster R-CNN C4, 9k iterations), voc0712 (24k), coco_c4
            (Mask R-CNN C4, 90k), coco_c4_2x (180k), coco_fpn (Mask R-CNN FPN, 90k), camtrast (Sun et al.: Adam, 100
            epochs of VOC 07+12).
        iterations: 0 is the recipe's; another number stretches its schedule.
        batch_size: images of a global batch; 0 is the recipe's, another one scales its learning rate and iterations
            linearly.
        learning_rate: at the batch size in use; 0 is the recipe's.
        head: c4 or fpn instead of the recipe's.
        masks: predict masks too: the recipe's choice, yes or no.
        metric_style: coco (101 recall points) or voc (11 points) instead of the recipe's.
        short_side: of training and scored images in pixels; 0 is the recipe's. Anchors scale along.
        precise_bn_iterations: training batches over which BatchNorm's statistics are averaged before scoring; -1 is the
            recipe's (200 in the papers), 0 keeps the running averages.
        head_batchnorm: BatchNorm in the new layers too, as in MoCo: after the last stage on regions, in the pyramid.
        curve_points: score at that many evenly spaced iterations, for curves over fine-tuning; 0 scores the last one.
        diagnosis: explain false positives (Hoiem et al. 2012).
        seeds: runs per model.
        freezing: stages that are not trained.
    """

    recipe: RecipeName = "rendered"
    iterations: int = 0
    batch_size: int = 0
    learning_rate: float = 0.0
    head: Literal["recipe", "c4", "fpn"] = "recipe"
    masks: Literal["recipe", "yes", "no"] = "recipe"
    metric_style: Literal["recipe", "coco", "voc"] = "recipe"
    short_side: int = 0
    precise_bn_iterations: int = -1
    head_batchnorm: bool = True
    curve_points: int = 0
    diagnosis: bool = True
    seeds: int = 1
    freezing: Freezing = Freezing()  # noqa: RUF009


def resolved_recipe(config: DetectionConfig) -> Recipe:
    """The recipe with what the config changes.

    Raises:
        ValueError: an unknown recipe.
    """
    if config.recipe not in RECIPES:
        raise ValueError(f"detection got recipe={config.recipe!r}; allowed: {', '.join(RECIPES)}.")
    recipe = RECIPES[config.recipe]
    schedule = recipe.schedule
    if config.batch_size:
        schedule = schedule.with_batch_size(config.batch_size)
    if config.iterations:
        schedule = schedule.with_iterations(config.iterations)
    if config.learning_rate:
        schedule = replace(schedule, learning_rate=config.learning_rate)
    if config.short_side:
        recipe = recipe.with_side(config.short_side)
    if config.head != "recipe":
        head: HeadKind = config.head
        recipe = recipe.with_head(head)
    metric: MetricStyle = recipe.metric if config.metric_style == "recipe" else config.metric_style
    masks = recipe.masks if config.masks == "recipe" else config.masks == "yes"
    precise = recipe.precise_bn_iterations if config.precise_bn_iterations < 0 else config.precise_bn_iterations
    return replace(recipe, schedule=schedule, metric=metric, masks=masks, precise_bn_iterations=precise)


def detection_problem(config: DetectionConfig) -> DetectionProblem:
    """What is trained."""
    recipe = resolved_recipe(config)
    total = recipe.schedule.iterations
    points = tuple(sorted({max(1, round(total * i / config.curve_points)) for i in range(1, config.curve_points + 1)}))
    return DetectionProblem(recipe, points, config.freezing, config.head_batchnorm)


@dataclass(frozen=True)
class DetectionProblem:
    """A detector and its training.

    Attributes:
        recipe: with everything that the config changes.
        evaluate_at: iterations that are scored besides the last.
        freezing: of the backbone.
        head_batchnorm: see ``DetectionConfig``.
    """

    recipe: Recipe
    evaluate_at: tuple[int, ...] = ()
    freezing: Freezing = Freezing()  # noqa: RUF009
    head_batchnorm: bool = True

    @property
    def schedule(self) -> Schedule:
        """The recipe's."""
        return self.recipe.schedule

    def build(self, backbone: Any, data: PreparedData, phase: Phase, seed: int, device: torch.device) -> Trainee:
        """See ``fine_tuning.Problem``."""
        from evaluation.detection.trainee import DetectionTrainee  # imports detectron2, which may be missing

        return DetectionTrainee(self, backbone, train_table(data, phase), scored_table(data, phase))
