"""Semantic segmentation by fine-tuning: Cityscapes with DeepLab v3 or v3+, or the rendered images.

Recipe ``deeplab_v3`` is the setting of Zhao et al. (ICLR 2021): crops of 512 x 1024, 40,000 iterations of 8 images,
learning rate 0.01 with polynomial decay. These numbers and the names of the metrics are those of mmsegmentation's 40k
schedule, from which the rest is taken (inferred): SGD 0.9, weight decay 5e-4, output stride 8, ASPP rates 1/12/24/36,
an auxiliary FCN head of weight 0.4, scale 0.5 to 2, photometric distortion. Its default backbone has a stem of three
convolutions, ours the plain 7x7 one that MoCo-style weights need; its loss divides by all pixels, ours by the labelled.

Recipe ``deeplab_v3plus`` is that of Sun et al. (AAAI 2022, supplement): crops of 768 x 768, 30,000 iterations of 8
images, learning rate 0.01, weight decay 1e-4; scale, crop, flip. What is open is taken from
``VainF/DeepLabV3Plus-Pytorch: main.py``, whose defaults these are (inferred): output stride 16, a tenth of the learning
rate and BatchNorm momentum 0.01 for the backbone.

Recipe ``rendered`` is ours, a minute or two on two CPU cores. It also serves label efficiency, whose accuracy is Newell
& Deng's: pixels at the resolution of the network's output, against the nearest pixel of the mask.

Whole images are scored at one scale, after the last iteration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

from evaluation.fine_tuning import (
    FineTuneResult,
    Freezing,
    Predictions,
    Run,
    scored_table,
    task_splits,
    train_splits,
    train_table,
)
from evaluation.fine_tuning_labels import label_subset
from evaluation.intervals import mean_and_half_width
from evaluation.metric import Artifact, ClassCounts, EvaluationContext, Metric, ModelResult, Output, Phase, Samples
from evaluation.paired import compare_samples
from evaluation.segmentation.figures import Example, curve_plot, example_grid
from evaluation.segmentation.metric import Scores, bootstrap_half_widths, score
from evaluation.segmentation.problem import (
    AUXILIARY_WEIGHT,
    RECIPES,
    SegmentationProblem,
    example_rows,
    example_size,
    read_classes,
    read_mask,
)
from image_data.contracts import DataError
from image_data.prepared import PreparedData
from image_data.tables import ImageTable, target_columns

__all__ = [
    "SegmentationConfig",
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

TASK = "segmentation"
CHECKED_MASKS = 64  # of each table, before any training


@dataclass(frozen=True)
class SegmentationConfig:
    """Semantic segmentation by fine-tuning.

    Attributes:
        recipe: "rendered" (small images), "deeplab_v3" (Zhao et al., Cityscapes) or "deeplab_v3plus" (Sun et al.).
        iterations: of training; 0 is the recipe's (rendered 300, deeplab_v3 40,000, deeplab_v3plus 30,000).
        batch_size: over all workers; 0 is the recipe's (16, 8, 8). Another one scales the recipe's learning rate and
            iterations linearly.
        learning_rate: peak; 0 is the recipe's (0.002 of Adam, 0.01 and 0.01 of SGD).
        image_size: short side that images are resized to, in pixels; 0 keeps the stored size. Crops shrink with it.
        num_labels: training images, a seeded subset; 0 takes all.
        freezing: which stages of the backbone are not trained.
        curve_points: how often the scored images are predicted during training, the last iteration included; 0 is once,
            at the end.
        seeds: runs per model; from 2 on the interval is over them.
    """

    recipe: Literal["rendered", "deeplab_v3", "deeplab_v3plus"] = "rendered"
    iterations: int = 0
    batch_size: int = 0
    learning_rate: float = 0.0
    image_size: int = 0
    num_labels: int = 0
    freezing: Freezing = Freezing()  # noqa: RUF009
    curve_points: int = 0
    seeds: int = 1


def metric_names(config: SegmentationConfig) -> tuple[str, ...]:
    """Names of the main metrics."""
    return tuple(f"{TASK}/{name}" for name in _NAMES)


_NAMES = ("miou", "macc", "aacc", "pixel_accuracy")


def splits(config: SegmentationConfig, phase: Phase) -> tuple[str, ...]:
    """Splits that the evaluation reads."""
    return task_splits(phase)


def problem(config: SegmentationConfig) -> SegmentationProblem:
    """What a worker trains."""
    recipe = RECIPES[config.recipe]
    schedule = recipe.schedule
    if config.batch_size:
        schedule = schedule.with_batch_size(config.batch_size)
    if config.iterations:
        schedule = schedule.with_iterations(config.iterations)
    if config.learning_rate:
        floor = schedule.min_learning_rate * config.learning_rate / schedule.learning_rate
        schedule = replace(schedule, learning_rate=config.learning_rate, min_learning_rate=floor)
    points = range(1, config.curve_points)
    return SegmentationProblem(
        recipe=recipe,
        schedule=schedule,
        image_size=config.image_size,
        num_labels=config.num_labels,
        evaluate_at=tuple(round(schedule.iterations * i / config.curve_points) for i in points),
        freezing=config.freezing,
    )


def protocol(config: SegmentationConfig, phase: Phase) -> dict:
    """Everything needed to reproduce the numbers, as JSON data."""
    built = problem(config)
    return {
        "name": "semantic segmentation by fine-tuning",
        "source": built.recipe.source,
        "phase": phase,
        "split": phase,
        "trained_on": list(train_splits(phase)),
        "training_images": f"{config.num_labels:,}, drawn by seed" if config.num_labels else "all",
        "schedule": built.schedule.to_json(),
        "network": {name: value for name, value in asdict(built.recipe).items() if name != "schedule"},
        "loss": "cross-entropy, mean over the labelled pixels of the global batch, logits upsampled to the mask"
        + (f"; auxiliary head: times {AUXILIARY_WEIGHT}" if built.recipe.auxiliary_width else ""),
        "scoring": "whole images at one scale, logits upsampled to the mask (bilinear), pixels of 255 left out",
        "metric": {
            "miou": "mean IoU in percent, pixels of all images pooled; a class that is predicted but never true counts "
            "0, one that is neither is left out (mmsegmentation); their number is segmentation/absent_classes",
            "macc": "mean over the classes of the truth of the share of their pixels that are right",
            "aacc": "share of all pixels that are right",
            "pixel_accuracy": "the same at the resolution of the network's output, masks by their nearest pixel "
            "(princeton-vl/selfstudy: tasks/classify.py)",
        },
        "reported": "the last iteration",
        "interval": _interval_text(config),
        "config": asdict(config),
    }


def _interval_text(config: SegmentationConfig) -> str:
    if config.seeds > 1:
        return f"Student's t over {config.seeds} fine-tuning seeds of one checkpoint"
    return "1.96 standard deviations of 1,000 bootstrap resamples of the images; not over seeds"


def check(config: SegmentationConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError where the options or the data do not allow the evaluation; call it before any long work."""
    if config.recipe not in RECIPES:
        raise ValueError(f"segmentation got recipe={config.recipe!r}; allowed: {', '.join(RECIPES)}.")
    counts = ("iterations", "batch_size", "learning_rate", "image_size", "num_labels", "curve_points")
    negative = [f"{name}={getattr(config, name)}" for name in counts if not 0 <= getattr(config, name) < math.inf]
    if negative or config.seeds < 1:
        raise ValueError(
            f"segmentation got {', '.join(negative) or f'seeds={config.seeds}'}; allowed: 0 (the recipe's, or all) or "
            "more, and seeds at least 1."
        )
    schedule = problem(config).schedule
    if schedule.batch_size < 2:
        raise ValueError(
            f"segmentation got batch_size={config.batch_size}; the head normalises one value per image and channel, "
            "which needs at least 2 images."
        )
    if config.curve_points > schedule.iterations:
        raise ValueError(
            f"segmentation got curve_points={config.curve_points} for {schedule.iterations} iterations; at most one "
            "point per iteration."
        )
    for split in splits(config, phase):
        if sum(class_counts.get(split, ())) == 0:
            present = ", ".join(name for name in class_counts if sum(class_counts[name])) or "none"
            raise ValueError(
                f"segmentation needs images in split {split!r}; the data has: {present}. Name the split in the data "
                f"URIs ({split}=...) or let the seeded split rule make it."
            )


def check_data(config: SegmentationConfig, phase: Phase, data: PreparedData) -> None:
    """DataError or ValueError where the masks do not allow the evaluation; call it before any training."""
    source = " ".join(data.source)
    for split in splits(config, phase):
        columns = target_columns(data, split)
        if "mask" not in columns:
            raise DataError(
                f"segmentation needs a mask for every image (target column 'mask'); split {split!r} of {source} has "
                f"the targets {', '.join(columns) or 'none'}. Use rendered: or cityscapes: data."
            )
    train, scored = train_table(data, phase), scored_table(data, phase)
    names = read_classes(train, source)
    if read_classes(scored, source) != names:
        raise DataError(f"the masks of {source} have other classes in split {phase!r} than where they are trained on.")
    label_subset(train.labels, config.num_labels, 0)
    for table in (train, scored):
        for row in range(min(CHECKED_MASKS, table.num_images)):
            read_mask(table, row, len(names))


def main_value(predictions: Predictions) -> float:
    """Percentage of right pixels at the resolution of the network's output, for curves over label counts."""
    right, scored = predictions["output_pixels"].sum(0)
    return 100.0 * float(right) / float(scored) if scored else float("nan")


def evaluate(config: SegmentationConfig, context: EvaluationContext) -> Iterator[Output]:
    """Yield the metrics, IoU per class, accuracy per image, and pictures of predicted maps."""
    fine_tuning = context.fine_tuning
    if fine_tuning is None:
        raise ValueError("segmentation fine-tunes the backbone, but only features were given; evaluate a checkpoint.")
    data, built = fine_tuning.data(TASK), problem(config)
    check_data(config, context.phase, data)
    table = scored_table(data, context.phase)
    names = read_classes(table, " ".join(data.source))
    seeds = range(context.seed, context.seed + config.seeds)
    results = fine_tuning.results([Run(f"seed{seed}", TASK, built, context.phase, seed) for seed in seeds])
    last = [result.last for result in results]
    yield from _metrics([_values(predictions) for predictions in last], _bootstrap(last[0], context.seed))
    scores = [_scores(predictions) for predictions in last]
    yield Metric(f"{TASK}/absent_classes", float(max(found.num_absent for found in scores)))
    yield Samples(f"{TASK}/iou", _nan_mean([found.iou for found in scores]))
    yield Samples(f"{TASK}/class_names", np.array(names))
    yield Samples(f"{TASK}/aacc", np.mean([_image_accuracy(predictions) for predictions in last], axis=0))
    yield Artifact(f"{TASK}/examples.png", example_grid(_examples(table, last[0], len(names)), names))
    if config.curve_points > 1:
        yield from _curve(results)


def compare(config: SegmentationConfig, models: Sequence[ModelResult]) -> Iterator[Metric | Artifact]:
    """Models compared on the same images by their accuracy per image, in which all images count alike."""
    yield from compare_samples(TASK, (f"{TASK}/aacc",), models)


def _scores(predictions: Predictions) -> Scores:
    return score(predictions["confusion"].sum(0))


def _values(predictions: Predictions) -> dict[str, float]:
    """The main metrics of one run."""
    found = _scores(predictions)
    return dict(zip(_NAMES, (found.miou, found.macc, found.aacc, main_value(predictions)), strict=True))


def _bootstrap(predictions: Predictions, seed: int) -> tuple[dict[str, float], int]:
    """Half widths over images, and the number of images."""
    confusion, output_pixels = predictions["confusion"], predictions["output_pixels"]
    widths = bootstrap_half_widths(confusion, output_pixels, seed)
    return dict(zip(_NAMES, widths, strict=True)), len(confusion)


def _metrics(runs: Sequence[dict[str, float]], over_images: tuple[dict[str, float], int]) -> Iterator[Metric]:
    """Mean over runs with the interval over them; of a single run that over images."""
    for name in _NAMES:
        values = np.array([run[name] for run in runs])
        if len(values) > 1:
            yield Metric(f"{TASK}/{name}", *mean_and_half_width(values, "rfs"), len(values))
        else:
            yield Metric(f"{TASK}/{name}", float(values[0]), over_images[0][name], over_images[1])


def _image_accuracy(predictions: Predictions) -> np.ndarray:
    """Percentage of right pixels of every image that has labelled pixels; for all models the same images."""
    confusion = predictions["confusion"]
    right, total = np.trace(confusion, axis1=1, axis2=2), confusion.sum((1, 2))
    return 100.0 * right[total > 0] / total[total > 0]


def _nan_mean(values: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over runs; NaN only where every run has NaN."""
    stacked = np.stack(values)
    known = (~np.isnan(stacked)).sum(0)
    return np.divide(np.nansum(stacked, 0), known, out=np.full(stacked.shape[1:], np.nan), where=known > 0)


def _examples(table: ImageTable, predictions: Predictions, num_classes: int) -> list[Example]:
    rows, size = example_rows(table.num_images), example_size(table)
    return [
        Example.resized(table.image(int(row)), read_mask(table, int(row), num_classes), predicted, size)
        for row, predicted in zip(rows, predictions["examples"], strict=True)
    ]


def _curve(results: Sequence[FineTuneResult]) -> Iterator[Output]:
    """mIoU after more and more iterations: a table of all runs and a plot."""
    iterations = sorted(results[0].predictions)
    miou = np.array([[_values(result.predictions[at])["miou"] for at in iterations] for result in results])
    yield Samples(f"{TASK}/curve", np.stack([np.array(iterations, np.float64), *miou], axis=1))
    yield Artifact(f"{TASK}/curve.png", curve_plot(np.array(iterations), miou))
