"""Few-shot protocol B: a linear classifier trained by SGD on the support images, learning rate chosen per model.

Zhao et al., ICLR 2021 (Table 4) after Chen et al., ICLR 2019 (``wyharveychen/CloserLookFewShot:
methods/baselinefinetune.py, test.py``): 600 tasks of novel classes, 15 queries; on the frozen, raw features (no
normalisation, no BatchNorm: there are as few as 5 images) a linear layer with PyTorch's random start is trained for 100
rounds over the support set, batches of 4 in a new order each round, SGD with momentum 0.9, dampening 0.9 and weight
decay 0.001; +- 1.96 s / sqrt(600) with s of ddof 0. Chen's learning rate is 0.01; Zhao et al. choose it for each model
on the validation classes, because the norms of features differ widely between methods.

All tasks and learning rates are trained together (``few_shot_sgd``), with the updates of one ``torch.optim.SGD`` per
task. Starts and orders are drawn per task from the seed; models of the same width share them.

The rate is chosen for each number of shots on tasks of "val_classes", from a logarithmic grid that grows by three rates
where the best is at its edge, at most twice. These tasks are a list of their own in both phases, with other draws than
the list that is reported:

    phase "val":  reported on "val_classes", so the same images chose the rate (in other tasks): slightly optimistic,
                  alike for all models.
    phase "test": reported on "novel_classes".

Zhao's base accuracy is that of a linear layer on held-out images of the base classes; their split ratio and settings
are not stated. Here it is the task "linear" with its defaults (cached, standardised features, rate chosen on validation
images), with the train, val and test splits of the data.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from evaluation import linear
from evaluation.episodes import check_episode_options, check_episodes, draw_episodes
from evaluation.few_shot_sgd import SgdSettings, correct_queries
from evaluation.intervals import IntervalName, accuracy_outputs, check_interval, interval_record
from evaluation.metric import (
    Artifact,
    ClassCounts,
    EvaluationContext,
    Metric,
    ModelResult,
    Output,
    Phase,
    Samples,
    get_features,
)
from evaluation.paired import compare_samples
from evaluation.paired_images import compare_images

__all__ = ["FewShotFinetuneConfig", "check", "choose_rate", "compare", "evaluate", "metric_names", "protocol", "splits"]

REPORT_SPLITS = {"val": "val_classes", "test": "novel_classes"}
SEARCH_SPLIT, SEARCH_STREAM = "val_classes", 1  # the list of tasks that chooses the rate; 0 is the reported list
GRID_GROWTH = 3  # rates added at an edge at once
MAX_GROWTHS = 2
BASE_ACCURACY = "few_shot_finetune/base_acc"


@dataclass(frozen=True)
class FewShotFinetuneConfig:
    """Few-shot protocol B.

    Attributes:
        num_ways: classes per task.
        shots: support images per class; one metric and one chosen learning rate for each entry.
        num_queries: query images per class.
        num_tasks: tasks; fewer are a prefix of the same list.
        num_search_tasks: further tasks of validation classes that choose the learning rate.
        learning_rates: the grid, ascending and log-spaced (each about the same multiple of the one before).
        epochs: rounds over the support images.
        batch_size: support images per step.
        momentum: momentum of SGD.
        dampening: dampening of the momentum.
        weight_decay: weight decay of weights and bias.
        interval: formula of the half width: "closer_look" (1.96, ddof 0), "camtrast" (1.96, ddof 1) or "rfs"
            (Student's t, ddof 1).
        base_accuracy: also report a linear layer's accuracy on held-out images of the base classes.
    """

    num_ways: int = 5
    shots: tuple[int, ...] = (1, 5)
    num_queries: int = 15
    num_tasks: int = 600
    num_search_tasks: int = 300
    learning_rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    epochs: int = 100
    batch_size: int = 4
    momentum: float = 0.9
    dampening: float = 0.9
    weight_decay: float = 0.001
    interval: IntervalName = "closer_look"
    base_accuracy: bool = True

    @property
    def sgd(self) -> SgdSettings:
        """The part that is the training of one classifier."""
        return SgdSettings(self.epochs, self.batch_size, self.momentum, self.dampening, self.weight_decay)


def metric_names(config: FewShotFinetuneConfig) -> tuple[str, ...]:
    """Names of the main metrics; ``few_shot_finetune/learning_rate_<K>shot``, the chosen rates, are yielded too."""
    return _few_shot_names(config) + ((BASE_ACCURACY,) if config.base_accuracy else ())


def _few_shot_names(config: FewShotFinetuneConfig) -> tuple[str, ...]:
    return tuple(f"few_shot_finetune/{config.num_ways}way_{num_shots}shot_acc" for num_shots in config.shots)


def splits(config: FewShotFinetuneConfig, phase: Phase) -> tuple[str, ...]:
    """Splits that the evaluation reads."""
    few_shot = dict.fromkeys((SEARCH_SPLIT, REPORT_SPLITS[phase]))
    return (*few_shot, *(linear.splits(linear.LinearConfig(), phase) if config.base_accuracy else ()))


def protocol(config: FewShotFinetuneConfig, phase: Phase) -> dict:
    """Everything needed to reproduce the numbers, as JSON data."""
    return {
        "name": "few-shot protocol B: linear classifier trained by SGD on frozen features",
        "source": (
            "Zhao et al., ICLR 2021, Table 4, after Chen et al., ICLR 2019; wyharveychen/CloserLookFewShot: "
            "methods/baselinefinetune.py, test.py"
        ),
        "phase": phase,
        "split": REPORT_SPLITS[phase],
        "features": "pooled backbone output, one view per image, neither normalised nor standardised",
        "classifier": (
            f"linear layer, uniform start in +- 1 / sqrt(width); SGD, {config.epochs} rounds over the support images, "
            f"batch {config.batch_size}, momentum {config.momentum:g}, dampening {config.dampening:g}, weight decay "
            f"{config.weight_decay:g}, constant learning rate"
        ),
        "learning_rate": (
            f"per number of shots, the highest mean accuracy on {config.num_search_tasks} other tasks of "
            f"{SEARCH_SPLIT} (of equals the middle one); a best rate at an edge adds {GRID_GROWTH} rates there, at "
            f"most {MAX_GROWTHS} times; the chosen rates are metrics"
        ),
        "tasks": (
            f"{config.num_tasks} tasks, {config.num_ways} ways, {config.num_queries} queries per class; list drawn by "
            "numpy PCG64 from SeedSequence([seed, ways, shots, queries]) and the class sizes alone; the list that "
            f"chooses the rate from SeedSequence([..., {SEARCH_STREAM}]); start and orders of a task from "
            "SeedSequence([seed, ways, shots, queries, list, task])"
        ),
        "metric": "mean accuracy over tasks in percent",
        "interval": interval_record(config.interval),
        "base_accuracy": linear.protocol(linear.LinearConfig(), phase) if config.base_accuracy else None,
        "config": asdict(config),
    }


def check(config: FewShotFinetuneConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError where the options or the data do not allow the tasks; call it before any long work."""
    _check_options(config)
    for split in dict.fromkeys((SEARCH_SPLIT, REPORT_SPLITS[phase])):
        check_episodes("few_shot_finetune", config, split, class_counts)
    if config.base_accuracy:
        try:
            linear.check(linear.LinearConfig(), phase, class_counts)
        except ValueError as error:
            raise ValueError(
                f"few_shot_finetune measures the base accuracy by the task linear: {error} Or set base_accuracy to "
                "False."
            ) from error


def _check_options(config: FewShotFinetuneConfig) -> None:
    """ValueError for values outside their range."""
    check_episode_options("few_shot_finetune", config)
    check_interval("few_shot_finetune", config.interval)
    rates = config.learning_rates
    if len(rates) < 2 or rates[0] <= 0 or list(rates) != sorted(set(rates)) or math.isinf(rates[-1]):
        raise ValueError(
            f"few_shot_finetune learning_rates are {rates}; allowed: at least two positive numbers, ascending."
        )
    if config.num_search_tasks < 1 or config.epochs < 1 or config.batch_size < 1:
        raise ValueError(
            f"few_shot_finetune got num_search_tasks={config.num_search_tasks}, epochs={config.epochs}, "
            f"batch_size={config.batch_size}; allowed: each at least 1."
        )
    if not 0 <= config.momentum < 1 or not 0 <= config.dampening < 1 or not 0 <= config.weight_decay < 1:
        raise ValueError(
            f"few_shot_finetune got momentum={config.momentum}, dampening={config.dampening}, "
            f"weight_decay={config.weight_decay}; allowed: each in [0, 1)."
        )


def evaluate(config: FewShotFinetuneConfig, context: EvaluationContext) -> Iterator[Output]:
    """Yield per number of shots the mean accuracy in percent, every task's, and the rate; then the base accuracy."""
    report_split = REPORT_SPLITS[context.phase]
    found = {split: get_features(context, split) for split in splits(config, context.phase)}
    check(config, context.phase, {split: features.class_counts for split, features in found.items()})
    features = {
        split: torch.tensor(found[split].features, device=context.device) for split in (SEARCH_SPLIT, report_split)
    }

    def correct(split: str, num_shots: int, num_tasks: int, stream: int, rates: tuple[float, ...]) -> np.ndarray:
        episodes = draw_episodes(config, num_shots, found[split], context.seed, stream, num_tasks)
        key = (context.seed, config.num_ways, num_shots, config.num_queries, stream)
        return correct_queries(features[split], episodes, rates, config.sgd, key)

    for name, num_shots in zip(_few_shot_names(config), config.shots, strict=True):
        rate = choose_rate(
            lambda rates, shots=num_shots: correct(SEARCH_SPLIT, shots, config.num_search_tasks, SEARCH_STREAM, rates),
            config.learning_rates,
            f"few_shot_finetune, {num_shots} shot",
        )
        right = correct(report_split, num_shots, config.num_tasks, 0, (rate,))[:, 0]
        # A task that diverged although the rate suited the validation classes has no answer: none of it is right.
        yield from accuracy_outputs(
            name, np.maximum(right, 0) / (config.num_ways * config.num_queries), config.interval
        )
        yield Metric(f"few_shot_finetune/learning_rate_{num_shots}shot", rate)
    if config.base_accuracy:
        yield from _base_accuracy(context)


def _base_accuracy(context: EvaluationContext) -> Iterator[Metric | Samples]:
    """What the task "linear" yields, under this task's names."""
    names = {"linear/top1": BASE_ACCURACY, "linear/learning_rate": "few_shot_finetune/base_learning_rate"}
    for output in linear.evaluate(linear.LinearConfig(), context):
        if isinstance(output, Metric | Samples) and output.name in names:
            yield output._replace(name=names[output.name])


def choose_rate(correct: Callable[[tuple[float, ...]], np.ndarray], grid: tuple[float, ...], name: str) -> float:
    """The learning rate with the most correct queries; the grid grows where the best is at its edge.

    Args:
        correct: rates (R,) -> correct queries (T, R), negative where a task diverged, which counts as none.
        grid: ascending.
        name: for messages.

    Raises:
        ValueError: every task diverged at every rate.

    Warns:
        RuntimeWarning: the best rate is at the edge of the grid after its last growth.
    """
    tried: dict[float, int] = {}
    new = grid
    for growth in range(MAX_GROWTHS + 1):
        counts = correct(new)
        totals = np.where((counts < 0).all(axis=0), -1, np.maximum(counts, 0).sum(axis=0))
        tried |= dict(zip(new, totals.tolist(), strict=True))
        rates = sorted(tried)
        highest = max(tried.values())
        equals = [rate for rate in rates if tried[rate] == highest]
        best = equals[(len(equals) - 1) // 2] if highest >= 0 else rates[0]
        if best not in (rates[0], rates[-1]):
            return best
        if growth < MAX_GROWTHS:
            ratio = (rates[-1] / rates[0]) ** (1 / (len(rates) - 1))
            powers = range(1, GRID_GROWTH + 1) if best == rates[-1] else range(-GRID_GROWTH, 0)
            new = tuple(best * ratio**power for power in powers)
    if highest < 0:
        raise ValueError(f"{name}: training diverged at every learning rate of {rates}; use smaller learning_rates.")
    warnings.warn(
        f"{name}: the best learning rate {best:g} is at the edge of the extended grid {rates[0]:g} to {rates[-1]:g}; "
        "set learning_rates so that the best lies inside",
        RuntimeWarning,
        stacklevel=2,
    )
    return best


def compare(config: FewShotFinetuneConfig, models: Sequence[ModelResult]) -> Iterator[Metric | Artifact]:
    """Yield the models' differences on the same tasks (``paired``) and the same images (``paired_images``)."""
    yield from compare_samples("few_shot_finetune", _few_shot_names(config), models)
    if config.base_accuracy:
        yield from compare_images(BASE_ACCURACY, models)
