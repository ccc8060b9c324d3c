"""Layer freezing: accuracy of a fine-tuned model against the number of stages of the backbone that stay frozen.

Newell & Deng (CVPR 2020): fine-tune with the first k stages frozen, for every k from none to all, at several label
counts; what a frozen stage has learnt then shows without the rescue of fine-tuning. Problem, head and schedule are
those of the tasks ``classification`` and ``pose``, so k = 0 is their result and k = all trains a linear head alone.

k counts entries of ``backbone.stages``, of which the stem is the first. The reference (``princeton-vl/selfstudy:
models/resnet.py, freeze_at_k``) cuts the gradient after its stage i, counted from 0 after the stem, which is k = i + 2
here; k = 1 (the stem alone) it does not have. Its BatchNorm statistics move in frozen stages: ``batchnorm=train``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from evaluation import classification, pose
from evaluation.classification import (
    ClassificationConfig,
    ClassificationProblem,
    class_protocol,
    main_value,
)
from evaluation.fine_tuning import Freezing, Predictions, Run, task_splits, train_splits, train_table
from evaluation.fine_tuning_runs import Recipe, check_options, check_recipe, over_seeds
from evaluation.intervals import mean_and_half_width
from evaluation.metric import (
    Artifact,
    ClassCounts,
    EvaluationContext,
    Metric,
    Output,
    Phase,
    Samples,
    accuracy_metric,
    mean_interval,
)
from evaluation.pose import PoseConfig, check_poses
from image_data.prepared import PreparedData

__all__ = [
    "LayerFreezingConfig",
    "check",
    "check_data",
    "evaluate",
    "metric_names",
    "problem",
    "protocol",
    "splits",
]

TASK = "layer_freezing"

FrozenTarget = Literal["classification", "pose"]
BatchNormMode = Literal["train", "eval"]
Cell = tuple[int, int]  # number of frozen stages, label count


@dataclass(frozen=True)
class LayerFreezingConfig:
    """Fine-tuning with more and more of the backbone frozen.

    Attributes:
        target: whose problem is trained: "classification" (the coarse class where the data have one) or "pose".
        batchnorm: of frozen stages: "train" normalises by the batch and lets the running statistics move, as the
            reference does; "eval" keeps the pretrained statistics, so that a frozen stage does not change at all.
        labels: label counts, each of which is a line of the plot; 0 uses all training images.
        seeds: runs per number of frozen stages and label count, reported as for classification.
        recipe: as for classification.
        iterations: optimiser steps; 0 is the recipe's number.
        batch_size: images per step, over all workers; 0 is the recipe's. Another one scales learning rate and
            iterations linearly.
        learning_rate: peak; 0 is the recipe's.
        image_size: side in pixels of the central square; 0 leaves the images as they are stored.
    """

    target: FrozenTarget = "classification"
    batchnorm: BatchNormMode = "train"
    labels: tuple[int, ...] = (0,)
    seeds: int = 1
    recipe: Recipe = "rendered"
    iterations: int = 0
    batch_size: int = 0
    learning_rate: float = 0.0
    image_size: int = 0


def problem(config: LayerFreezingConfig, stages: int = 0, num_labels: int = 0) -> ClassificationProblem:
    """What is trained with the first ``stages`` stages frozen, on ``num_labels`` images (0: all)."""
    options = _options(config, stages, num_labels)
    return pose.problem(options) if isinstance(options, PoseConfig) else classification.problem(options)


def _options(config: LayerFreezingConfig, stages: int, num_labels: int) -> ClassificationConfig | PoseConfig:
    kind = PoseConfig if config.target == "pose" else ClassificationConfig
    return kind(
        recipe=config.recipe,
        iterations=config.iterations,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        image_size=config.image_size,
        seeds=config.seeds,
        num_labels=num_labels,
        freezing=Freezing(stages, config.batchnorm),
    )


def _most(labels: Sequence[int]) -> int:
    """The largest label count; 0 stands for all."""
    return 0 if 0 in labels else max(labels)


def metric_names(config: LayerFreezingConfig) -> tuple[str, ...]:
    """Names of the main metrics, at the largest label count; the same for every backbone.

    ``drop_all``, which is better when small, is yielded too but is no objective: a bad model has little to lose.
    """
    return (f"{TASK}/top1_none", f"{TASK}/top1_all")


def splits(config: LayerFreezingConfig, phase: Phase) -> tuple[str, ...]:
    """Splits that the evaluation reads."""
    return task_splits(phase)


def protocol(config: LayerFreezingConfig, phase: Phase) -> dict:
    """Everything needed to reproduce the numbers, as JSON data."""
    most = problem(config, 0, _most(config.labels))
    bn = {
        "train": "frozen stages normalise by the batch and their running statistics move, as in the reference",
        "eval": "frozen stages keep the pretrained statistics",
    }[config.batchnorm]
    return {
        "name": f"fine-tuning for {config.target} with the first k stages frozen, k = 0 to all",
        **class_protocol(most, config, phase),
        "source": "Newell & Deng, CVPR 2020; princeton-vl/selfstudy: models/resnet.py (freeze_at_k), tasks/classify.py",
        "labels": [n or "all" for n in config.labels],
        "schedule": most.schedule.to_json(),
        "schedule_by_labels": {str(n or "all"): problem(config, 0, n).schedule.to_json() for n in config.labels},
        "batchnorm": f"{config.batchnorm}: {bn}",
        "frozen": "the first k entries of backbone.stages, of which the stem is the first; all: linear head alone",
        "metric": "top-1 in percent per k and label count; none: k = 0, all: every stage frozen, drop_all: their "
        "difference, these three at the largest label count",
        "interval": "one seed: larger side of Wilson's 95 % score interval over images, for the drop 1.96 s / sqrt(n) "
        "of the paired differences of images (none where no two differ); more seeds: Student's over seeds, the drop "
        "paired by seed",
        "config": asdict(config),
    }


def check(config: LayerFreezingConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError where the options or the data do not allow the evaluation."""
    for name, allowed in (("target", get_args(FrozenTarget)), ("batchnorm", get_args(BatchNormMode))):
        if (given := getattr(config, name)) not in allowed:
            raise ValueError(f"{TASK} got {name}={given!r}; allowed: {', '.join(allowed)}.")
    check_recipe(TASK, config.recipe)
    check_options(TASK, _options(config, 0, 0), phase, class_counts)
    available = sum(sum(class_counts[split]) for split in train_splits(phase))
    wrong = [n for n in config.labels if not 0 <= n <= available]
    if wrong or not config.labels:
        raise ValueError(
            f"{TASK} got labels={config.labels}, but there are {available:,} training images; give at least one label "
            f"count, each 0 (all) to {available:,}."
        )
    resolved = [n or available for n in config.labels]
    if len(set(resolved)) < len(resolved):
        raise ValueError(
            f"{TASK} got labels={config.labels}, where a label count is given twice (0 is all {available:,} images); "
            "name each once."
        )


def check_data(config: LayerFreezingConfig, phase: Phase, data: PreparedData) -> None:
    """DataError where the data have no such target."""
    if config.target == "pose":  # classification takes the class where there is no coarse one
        check_poses(TASK, phase, data)


def evaluate(config: LayerFreezingConfig, context: EvaluationContext) -> Iterator[Output]:
    """Yield top-1 in percent per number of frozen stages and label count, each as soon as its last seed is known.

    Then the samples ``layer_freezing/top1``, (K, L, seeds) with k on the first axis and the label counts in the order
    of the config, and the plot.
    """
    assert context.fine_tuning is not None, f"{TASK} needs EvaluationContext.fine_tuning"
    stages = len(context.fine_tuning.backbone("checkpoint", context.seed).stages)
    keys = [
        (k, n, seed)
        for n in config.labels
        for k in range(stages + 1)
        for seed in range(context.seed, context.seed + config.seeds)
    ]
    runs = [Run(f"k{k}-n{n}-seed{seed}", TASK, problem(config, k, n), context.phase, seed) for k, n, seed in keys]
    found: dict[Cell, dict[int, Predictions]] = {}
    for position, result in context.fine_tuning.run(runs, spread=True):
        k, n, seed = keys[position]
        cell = found.setdefault((k, n), {})
        cell[seed] = result.last
        if len(cell) == config.seeds:
            yield from _cell_metrics(config, (k, n), stages, found)
    values = np.array([[_values(found[k, n]) for n in config.labels] for k in range(stages + 1)])
    yield Samples(f"{TASK}/top1", values)
    available = train_table(context.fine_tuning.data(TASK), context.phase).num_images
    yield Artifact(f"{TASK}/frozen_stages.png", _plot(config, values, available))


def _in_order(by_seed: Mapping[int, Predictions]) -> list[Predictions]:
    """Predictions in the order of the seeds, whichever finished first."""
    return [by_seed[seed] for seed in sorted(by_seed)]


def _values(by_seed: Mapping[int, Predictions]) -> list[float]:
    return [main_value(one) for one in _in_order(by_seed)]


def _cell_metrics(
    config: LayerFreezingConfig, cell: Cell, stages: int, found: Mapping[Cell, Mapping[int, Predictions]]
) -> Iterator[Metric]:
    """The metrics that a finished cell completes: its own and, at the largest label count, the main ones."""
    k, n = cell
    own = f"k{k}" if len(config.labels) == 1 else f"n{n}_k{k}"
    yield _top1(f"{TASK}/top1_{own}", found[cell])
    if n != _most(config.labels) or k not in (0, stages):
        return
    yield _top1(f"{TASK}/top1_{'none' if k == 0 else 'all'}", found[cell])
    none, everything = found.get((0, n), {}), found.get((stages, n), {})
    if len(none) == len(everything) == config.seeds:
        yield _drop(f"{TASK}/drop_all", _in_order(none), _in_order(everything))


def _top1(name: str, by_seed: Mapping[int, Predictions]) -> Metric:
    first = _in_order(by_seed)[0]
    return over_seeds(name, _values(by_seed), accuracy_metric(name, first["predicted"], first["truth"]))


def _drop(name: str, none: Sequence[Predictions], everything: Sequence[Predictions]) -> Metric:
    """Percentage points that are lost when every stage is frozen, paired by seed, or of one seed by image."""
    right = [100.0 * (one["predicted"] == one["truth"]) for one in (none[0], everything[0])]
    lost = right[0] - right[1]
    half = mean_interval(lost)[1] if len(np.unique(lost)) > 1 else None
    values = [main_value(a) - main_value(b) for a, b in zip(none, everything, strict=True)]
    return over_seeds(name, values, Metric(name, values[0], half, len(lost)))


def _plot(config: LayerFreezingConfig, values: np.ndarray, available: int) -> bytes:
    """Top-1 (K, L, seeds) against k, one line per label count, as PNG."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    num_k, _, seeds = values.shape
    figure, axis = plt.subplots(figsize=(max(5.6, 1.1 * num_k), 4.0), layout="constrained")
    order = sorted(range(len(config.labels)), key=lambda i: -(config.labels[i] or available))
    colours = plt.get_cmap("viridis")(np.linspace(0.1, 0.8, len(order))) if len(order) > 1 else ["C0"]
    for i, colour in zip(order, colours, strict=True):
        _line(axis, values[:, i], config.labels[i], available, colour)
    axis.set_xticks(range(num_k), _tick_labels(num_k))
    axis.set(xlabel="frozen up to and including", ylabel="top-1 accuracy (%)")
    note = f"mean and 95 % t-interval over {seeds} seeds" if seeds > 1 else "one seed"
    axis.set_title(
        f"{config.target}: fine-tuning with the first stages frozen\n"
        f"{note}; BatchNorm of those in {config.batchnorm} mode",
        fontsize="small",
    )
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(4, len(order)), frameon=False, fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    plt.close(figure)
    return buffer.getvalue()


def _line(axis: Any, values: np.ndarray, labels: int, available: int, colour: Any) -> None:
    """One label count, (K, seeds)."""
    at, mean = np.arange(len(values)), values.mean(1)
    if values.shape[1] > 1:
        half = np.array([mean_and_half_width(one, "rfs")[1] for one in values])
        axis.fill_between(at, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
    name = f"all {available:,} labels" if not labels else f"{labels:,} labels"
    axis.plot(at, mean, marker="o", markersize=5, color=colour, label=name)


def _tick_labels(num_k: int) -> list[str]:
    names = ["nothing", "stem", *(f"stage {i}" for i in range(1, num_k - 1))]
    return [*names[:-1], f"{names[-1]}\n(head alone)"]
