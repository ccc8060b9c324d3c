"""Object detection (and instance masks) as a transfer task: papers.md sections 4.4 and 4.5, and 5.5 for curves.

Faster or Mask R-CNN of detectron2 around the checkpoint's backbone, all layers fine-tuned (unless frozen), BatchNorm
over all workers, precise BatchNorm before scoring; the last iteration is reported. ``recipes.py`` has the settings of
the papers; the default one is ours and takes about a minute on the rendered data.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, get_args

import numpy as np

from evaluation.detection.problem import DetectionConfig, DetectionProblem, detection_problem, resolved_recipe
from evaluation.detection.recipes import HeadKind, MetricStyle
from evaluation.fine_tuning import Run, scored_table, task_splits, train_table
from evaluation.intervals import mean_and_half_width
from evaluation.metric import Artifact, ClassCounts, EvaluationContext, Metric, Output, Phase, Samples
from image_data.contracts import DataError
from image_data.prepared import PreparedData
from image_data.tables import target_columns
from image_data.windows import open_shard

__all__ = ["DetectionConfig", "check", "check_data", "evaluate", "metric_names", "problem", "protocol", "splits"]


def problem(config: DetectionConfig) -> DetectionProblem:
    """What is trained."""
    return detection_problem(config)


def metric_names(config: DetectionConfig) -> tuple[str, ...]:
    """Names of the main metrics."""
    names = ("ap", "ap50", "ap75")
    if resolved_recipe(config).masks:
        names = (*names, *(f"mask_{name}" for name in names))
    return tuple(f"detection/{name}" for name in names)


def splits(config: DetectionConfig, phase: Phase) -> tuple[str, ...]:
    """Splits that the evaluation reads."""
    return task_splits(phase)


def protocol(config: DetectionConfig, phase: Phase) -> dict[str, Any]:
    """Everything needed to reproduce the numbers, as JSON data."""
    recipe = resolved_recipe(config)
    return {
        "name": f"{'Mask' if recipe.masks else 'Faster'} R-CNN {recipe.head.upper()} of detectron2, fine-tuned",
        "source": recipe.source,
        "phase": phase,
        "split": phase,
        "trained_on": list(task_splits(phase)[:-1]),
        "schedule": recipe.schedule.to_json(),
        "weight_decay": "none for the weights of BatchNorm (detectron2's WEIGHT_DECAY_NORM = 0)",
        "batchnorm": (
            "over all workers, none frozen unless asked for; in the new layers too: "
            + (
                "yes (after the last stage on regions as in facebookresearch/moco, in the pyramid's convolutions)"
                if config.head_batchnorm
                else "no"
            )
        ),
        "precise_batchnorm": f"statistics averaged over {recipe.precise_bn_iterations} training batches before scoring",
        "input": "RGB, normalised by ImageNet's mean and deviation; bilinear resize; horizontal flip in training",
        "augmentation": {"short_side": list(recipe.train_sides), "longest": recipe.max_side, "square": recipe.square},
        "test_side": recipe.test_side,
        "initialisation": "resnet18/34/50: detectron2's ResNet with all converted weights; others: their own modules",
        "detections": "score above 0.05, suppression at IoU 0.5, at most 100 per image",
        "metric": _METRICS[recipe.metric] + ("; masks: COCO's average precision" if recipe.masks else ""),
        "reported": "last iteration",
        "interval": "Student's t over seeds" if config.seeds > 1 else "none with one seed",
        "recipe": asdict(recipe),
        "config": asdict(config),
    }


_METRICS: dict[str, str] = {
    "coco": "COCO's average precision: IoU 0.50 to 0.95, 101 recalls, pycocotools",
    "voc": "average precision by VOC2007's 11 points, mean over IoU 0.50 to 0.95, as detectron2 reports it",
}


def check(config: DetectionConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError where the options do not allow the evaluation, or detectron2 is missing."""
    recipe = resolved_recipe(config)
    choices = {
        "head": ("recipe", *get_args(HeadKind)),
        "metric_style": ("recipe", *get_args(MetricStyle)),
        "masks": ("recipe", "yes", "no"),
    }
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"detection got {name}={getattr(config, name)!r}; allowed: {', '.join(allowed)}.")
    for name, least in {
        "iterations": 0, "batch_size": 0, "learning_rate": 0, "short_side": 0, "curve_points": 0, "seeds": 1,
        "precise_bn_iterations": -1,
    }.items():  # fmt: skip
        if getattr(config, name) < least:
            raise ValueError(f"detection got {name}={getattr(config, name)}; it must be at least {least}.")
    if config.curve_points > recipe.schedule.iterations:
        raise ValueError(
            f"detection got curve_points={config.curve_points} for {recipe.schedule.iterations} iterations; ask for at "
            "most as many points."
        )
    importlib.import_module("evaluation.detection.detectron")


def check_data(config: DetectionConfig, phase: Phase, data: PreparedData) -> None:
    """DataError where the images have no boxes (or masks) to learn, before anything is trained."""
    for split in splits(config, phase):
        columns = target_columns(data, split)
        if "objects" not in columns and not {"box", "mask"} <= set(columns):
            raise DataError(
                f"detection needs images with objects, but split {split!r} has "
                f"{', '.join(columns) or 'no targets'} beside its labels. Use voc:, coco: or rendered: data, for this "
                "task with --task-data."
            )
        if resolved_recipe(config).masks and "objects" in columns and not _first_object(data, split).get("mask"):
            raise DataError(
                f"detection is to predict masks, but the objects of split {split!r} have none (VOC's never do). Set "
                "masks to 'no', or use coco: or rendered: data."
            )


def _first_object(data: PreparedData, split: str) -> dict[str, Any]:
    """The first object of a split, read from as little of it as possible; {"mask": True} where there is none."""
    for file in data.split(split).files:
        with open_shard(file) as shard:
            for batch in shard.iter_batches(batch_size=16, columns=["objects"]):
                for entries in map(json.loads, batch.column(0).to_pylist()):
                    if entries:
                        return entries[0]
    return {"mask": True}


def evaluate(config: DetectionConfig, context: EvaluationContext) -> Iterator[Output]:
    """Yield average precisions in percent, AP per class, curves over fine-tuning, and what the false positives are."""
    from evaluation.detection.objects import read_classes
    from evaluation.detection.scoring import score, scored_objects

    assert context.fine_tuning is not None
    check(config, context.phase, {})
    data = context.fine_tuning.data("detection")
    check_data(config, context.phase, data)
    built = problem(config)
    recipe, table = built.recipe, scored_table(data, context.phase)
    classes = read_classes([train_table(data, context.phase), table])
    objects, sizes = scored_objects(table, classes)
    runs = [
        Run(f"seed{context.seed + i}", "detection", built, context.phase, context.seed + i) for i in range(config.seeds)
    ]
    results = context.fine_tuning.results(runs)
    at = sorted(results[0].predictions)
    scored = [[score(result.predictions[i], objects, sizes, len(classes), recipe) for i in at] for result in results]
    for name in scored[0][-1].values:
        yield _mean(f"detection/{name}", np.array([points[-1].values[name] for points in scored]))
    per_class = np.array([points[-1].per_class for points in scored]).mean(axis=0)
    yield Samples("detection/ap", per_class[~np.isnan(per_class)])
    if len(at) > 1:
        curves = {
            name: np.array([[p.values[name] for p in points] for points in scored]) for name in scored[0][0].values
        }
        yield from _curves(at, curves)
    if config.diagnosis:
        yield from _diagnosis(results[0].last["detections"], objects, classes)


def _mean(name: str, values: np.ndarray) -> Metric:
    if len(values) == 1:
        return Metric(name, float(values[0]))
    mean, half = mean_and_half_width(values, "rfs")  # the formula with Student's t
    return Metric(name, mean, half, len(values))


def _curves(at: list[int], curves: dict[str, np.ndarray]) -> Iterator[Samples | Artifact]:
    """Average precision over fine-tuning iterations (papers.md section 5.5), mean over seeds."""
    from evaluation.detection.scoring import curve_plot

    yield Samples("detection/iterations", np.array(at))
    for name, values in curves.items():
        yield Samples(f"detection/{name}_by_iteration", values.mean(axis=0))
    titles = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "mask_ap": "mask AP"}
    shown = {title: curves[name] for name, title in titles.items() if name in curves}
    yield Artifact("detection/iterations.png", curve_plot(at, shown, len(curves["ap"])))


def _diagnosis(detections: np.ndarray, objects: Any, classes: tuple[str, ...]) -> Iterator[Output]:
    """What the false positives of the first run are."""
    from evaluation.detection.hoiem import diagnosis_outputs

    yield from diagnosis_outputs("detection", detections, objects, classes)
