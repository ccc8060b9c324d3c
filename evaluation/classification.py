"""Fine-tuning a classifier: backbone and a linear layer on the pooled feature, trained together.

Task "classify" of Newell & Deng (CVPR 2020; ``princeton-vl/selfstudy: tasks/classify.py, models/wrapper.py``): cross
entropy, top-1 of the linear head, the last iteration. What is predicted is the coarse class where the data has one (the
ten categories of the rendered data, as in the paper), else the class. ``pose.py`` is the same problem with another
target. The recipe "newell_deng" keeps the paper's schedule, batch and augmentations; network and colour space are the
checkpoint's. Labels are thinned out evenly over classes (``fine_tuning_labels.py``), not from the start of a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
from evaluation.fine_tuning_images import Augmentation, augment, check_same_size, load_square, normalized_batch
from evaluation.fine_tuning_labels import label_subset
from evaluation.fine_tuning_runs import (
    BETAS_NOTE,
    FineTuneOptions,
    Recipe,
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
    accuracy_metric,
)
from evaluation.paired import compare_samples
from image_data.contracts import DataError
from image_data.prepared import PreparedData
from image_data.tables import ImageTable

__all__ = [
    "NUM_POSES",
    "ClassificationConfig",
    "ClassificationProblem",
    "Classifier",
    "check",
    "check_data",
    "class_outputs",
    "class_protocol",
    "class_schedule",
    "compare",
    "evaluate",
    "main_value",
    "metric_names",
    "problem",
    "protocol",
    "splits",
]

Target = Literal["auto", "coarse", "label", "pose"]

NUM_POSES = 5  # "top" and four sectors
SCORED_BATCH = 64


@dataclass(frozen=True)
class ClassificationConfig:
    """Fine-tuning a classifier.

    Attributes:
        target: what is predicted: the coarse class, the class ("label"), or "auto": coarse where the data has it.
        recipe: "rendered": Adam 1e-3 with cosine decay, 200 iterations of 32 images, flips and crops: about a
            minute for ResNet-9 with the ImageNet stem at 64 px on two idle cores. "newell_deng": the paper's, for a
            GPU: batches of 512, 4,000 iterations for fewer than 20,000 labels, all of its augmentations.
        iterations: optimiser steps; 0 is the recipe's number.
        batch_size: images per step, over all workers; 0 is the recipe's. Another one scales learning rate and
            iterations linearly.
        learning_rate: peak; 0 is the recipe's.
        image_size: side in pixels of the central square; 0 leaves the images as they are stored.
        seeds: runs, whose mean is reported with an interval over runs when there are two or more.
        num_labels: training images, even over the classes; 0 uses all.
        freezing: stages of the backbone that are not trained.
        curve_points: evenly spaced iterations at which accuracy is measured too; 0 draws no curve.
    """

    target: Literal["auto", "coarse", "label"] = "auto"
    recipe: Recipe = "rendered"
    iterations: int = 0
    batch_size: int = 0
    learning_rate: float = 0.0
    image_size: int = 0
    seeds: int = 1
    num_labels: int = 0
    freezing: Freezing = Freezing()  # noqa: RUF009
    curve_points: int = 0


@dataclass(frozen=True)
class ClassificationProblem:
    """A class of every image.

    Attributes:
        target: the column.
        schedule: see ``Problem``.
        evaluate_at: see there.
        freezing: see there.
        augmentation: of training images.
        image_size: S; 0 is the stored size.
        num_labels: training images; 0 is all.
    """

    target: Target
    schedule: Schedule
    evaluate_at: tuple[int, ...] = ()
    freezing: Freezing = Freezing()  # noqa: RUF009
    augmentation: Augmentation = Augmentation()  # noqa: RUF009
    image_size: int = 0
    num_labels: int = 0

    def build(self, backbone: Any, data: PreparedData, phase: Phase, seed: int, device: torch.device) -> _Trainee:
        """See ``Problem``; the labels that are kept are drawn with the seed."""
        return _Trainee(self, backbone, train_table(data, phase), scored_table(data, phase), seed)


class Classifier(nn.Module):
    """Backbone, global average, one linear layer."""

    def __init__(self, backbone: Any, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.num_features, num_classes)

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, C)."""
        return self.head(self.backbone(images.to(self.head.weight.device)))

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, targets = batch
        return {"cross_entropy": F.cross_entropy(self.logits(images), targets.to(self.head.weight.device))}


class _Trainee:
    """See ``Trainee``."""

    def __init__(
        self, problem: ClassificationProblem, backbone: Any, table: ImageTable, scored: ImageTable, seed: int
    ) -> None:
        for one in (table, scored):
            check_same_size(problem.target, one, problem.image_size)
        targets, num_classes = _targets(problem.target, table)
        self._problem, self._table, self._scored = problem, table, scored
        self._rows = label_subset(targets, problem.num_labels, seed)
        self._train_targets, self._scored_targets = targets, _targets(problem.target, scored)[0]
        self.model = Classifier(backbone, num_classes)
        self.num_images, self.num_scored = len(self._rows), scored.num_images

    def load(self, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        size, augmentation = self._problem.image_size, self._problem.augmentation
        rows = self._rows[[draw.row for draw in draws]]
        images = [
            augment(load_square(self._table, int(row), size), augmentation, draw.rng)[0]
            for row, draw in zip(rows, draws, strict=True)
        ]
        return normalized_batch(images), torch.from_numpy(self._train_targets[rows])

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [p for p in self.model.parameters() if p.requires_grad]}]

    def before_predict(self, batches: Iterator[Any]) -> None:
        pass

    def predict(self, rows: Sequence[int]) -> Predictions:
        predicted = [np.zeros(0, np.int64)]
        for start in range(0, len(rows), SCORED_BATCH):
            part = rows[start : start + SCORED_BATCH]
            images = normalized_batch([load_square(self._scored, row, self._problem.image_size) for row in part])
            predicted.append(self.model.logits(images).argmax(1).cpu().numpy())
        truth = self._scored_targets[np.asarray(rows, np.int64)]
        return {"predicted": np.concatenate(predicted), "truth": truth}


def _targets(target: Target, table: ImageTable) -> tuple[np.ndarray, int]:
    """Class of every image, int64 (N,), and the number of classes.

    Raises:
        DataError: no such column, or a value that is no class.
    """
    if target == "auto":
        target = "coarse" if table.coarse_names else "label"
    num_classes = {"coarse": len(table.coarse_names), "label": len(table.class_names), "pose": NUM_POSES}[target]
    values = table.labels if target == "label" else np.array(table.column(target))
    wrong = np.flatnonzero((values < 0) | (values >= num_classes))
    if len(wrong):
        name = table.value(int(wrong[0]), "name")
        raise DataError(f"{target} of image {name!r} is {values[wrong[0]]}; allowed: 0 to {num_classes - 1}.")
    return values.astype(np.int64), num_classes


def class_schedule(options: FineTuneOptions, recipe: Recipe) -> Schedule:
    """Schedule of classification and pose."""
    if recipe == "newell_deng":
        return chosen_schedule(newell_deng_schedule(options.num_labels, 512, 50_000), options)
    return chosen_schedule(rendered_schedule(), options)


def problem(config: ClassificationConfig) -> ClassificationProblem:
    """What is trained."""
    schedule = class_schedule(config, config.recipe)
    everything = Augmentation(flip=True, crop=True, cutout=True, color_jitter=0.8, grayscale=0.25)
    return ClassificationProblem(
        config.target,
        schedule,
        curve_iterations(schedule.iterations, config.curve_points),
        config.freezing,
        everything if config.recipe == "newell_deng" else Augmentation(flip=True, crop=True),
        config.image_size,
        config.num_labels,
    )


def main_value(predictions: Predictions) -> float:
    """Top-1 in percent."""
    return 100.0 * float((predictions["predicted"] == predictions["truth"]).mean())


def metric_names(config: ClassificationConfig) -> tuple[str, ...]:
    """Names of the main metrics."""
    return ("classification/top1",)


def splits(config: ClassificationConfig, phase: Phase) -> tuple[str, ...]:
    """Splits that the evaluation reads."""
    return task_splits(phase)


def class_protocol(problem: ClassificationProblem, config: Any, phase: Phase) -> dict:
    """What classification and pose have in common, as JSON data."""
    return {
        "source": "Newell & Deng, CVPR 2020; princeton-vl/selfstudy: tasks/classify.py, models/wrapper.py, "
        "config/grid_search.py, config/syn/r9/*.gin",
        "phase": phase,
        "split": phase,
        "trained_on": list(train_splits(phase)),
        "target": problem.target,
        "head": "one linear layer with bias on the globally averaged feature map, trained with the backbone",
        "loss": "cross entropy",
        "input": "central square, RGB normalised with ImageNet's mean and deviation",
        "augmentation": asdict(problem.augmentation),
        "labels": "all images" if not problem.num_labels else f"{problem.num_labels} images, even over classes",
        "schedule": problem.schedule.to_json(),
        "schedule_note": BETAS_NOTE if config.recipe == "newell_deng" else "ours, for small data on few cores",
        "reported": "last iteration",
        "metric": "top-1 in percent",
        "interval": "one seed: larger side of Wilson's 95 % score interval over images; more: Student's over seeds",
        "config": asdict(config),
    }


def protocol(config: ClassificationConfig, phase: Phase) -> dict:
    """Everything needed to reproduce the numbers, as JSON data."""
    return {"name": "fine-tuned classifier", **class_protocol(problem(config), config, phase)}


def check(config: ClassificationConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError where the options or the data do not allow the evaluation."""
    if config.target not in (allowed := ("auto", "coarse", "label")):
        raise ValueError(f"classification got target={config.target!r}; allowed: {', '.join(allowed)}.")
    check_recipe("classification", config.recipe)
    check_options("classification", config, phase, class_counts)


def check_data(config: ClassificationConfig, phase: Phase, data: PreparedData) -> None:
    """DataError where the data has no such target."""
    if config.target == "coarse":
        for split in splits(config, phase):
            if not data.split(split).coarse_names:
                raise DataError(
                    f"classification got target=coarse, but the images of split {split!r} have no coarse classes; use "
                    "target=label (or auto)."
                )


def evaluate(config: ClassificationConfig, context: EvaluationContext) -> Iterator[Output]:
    """Yield top-1 in percent, which images are right and, on request, the curve over iterations."""
    yield from class_outputs("classification", problem(config), config.seeds, config.curve_points, context)


def class_outputs(
    task: str, problem: ClassificationProblem, seeds: int, curve_points: int, context: EvaluationContext
) -> Iterator[Output]:
    """Train, and yield ``<task>/top1``: the metric, per image the percentage of seeds that are right, the curve."""
    results = run_seeds(task, problem, seeds, context)
    name, first = f"{task}/top1", results[0].last
    single = accuracy_metric(name, first["predicted"], first["truth"])
    yield over_seeds(name, [main_value(result.last) for result in results], single)
    correct = np.stack([result.last["predicted"] == result.last["truth"] for result in results])
    yield Samples(name, 100.0 * correct.mean(0))
    if curve_points:
        at = sorted(results[0].predictions)
        values = np.array([[main_value(result.predictions[i]) for i in at] for result in results])
        yield from curve_outputs(task, "top-1 accuracy (%)", at, values)


def compare(config: ClassificationConfig, models: Sequence[ModelResult]) -> Iterator[Metric | Artifact]:
    """Models compared on the same images."""
    yield from compare_samples("classification", metric_names(config), models)
