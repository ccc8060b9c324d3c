"""Downstream evaluation of a backbone: one pass over each split that a task asks for, shared by all tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evaluation import TASKS, EvaluationContext, Features, Metric, Phase
from evaluation.features import FeatureCache, make_context
from image_data import RECIPES
from image_data.contracts import ImageBatch
from image_data.prepared import PreparedData
from image_data.store import DecodedStore
from image_data.stream import MemoryStream
from rayjobs.checkpoint import load_backbone
from rayjobs.configs import TrainConfig

__all__ = [
    "TaskConfigs",
    "TransferResult",
    "check_tasks",
    "evaluate_backbone",
    "evaluate_checkpoint",
    "task_configs",
    "task_of",
]

TaskConfigs = Mapping[str, Any]  # task name -> its frozen config
FEATURE_BATCH = 256  # images per forward pass of the frozen backbone


@dataclass(frozen=True)
class TransferResult:
    """Metrics of one checkpoint and, per task, the protocol that produced them."""

    metrics: list[Metric]
    protocol: dict[str, Any]

    def value(self, name: str) -> float:
        """A metric's value by name."""
        return next(metric.value for metric in self.metrics if metric.name == name)

    def to_json(self) -> dict[str, Any]:
        """``{"metrics": {name: {"value", "ci95", "n"}}, "protocol": {...}}``."""
        metrics = {m.name: {"value": m.value, "ci95": m.ci95, "n": m.n} for m in self.metrics}
        return {"metrics": metrics, "protocol": self.protocol}


def task_configs(names: Sequence[str], **overrides: Any) -> dict[str, Any]:
    """The default configurations of tasks; ValueError for an unknown name."""
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise ValueError(f"Unknown task {', '.join(unknown)}. Known tasks: {', '.join(TASKS)}.")
    configs = {}
    for name in names:
        config = TASKS[name].config
        known = {f.name for f in dataclasses.fields(config)}
        configs[name] = dataclasses.replace(config, **{k: v for k, v in overrides.items() if k in known})
    return configs


def task_of(metric: str) -> str:
    """The task that yields a metric.

    Raises:
        ValueError: no task yields it; lists the metrics.
    """
    for name, spec in TASKS.items():
        if metric in spec.metrics:
            return name
    known = ", ".join(m for spec in TASKS.values() for m in spec.metrics)
    raise ValueError(f"Unknown metric {metric!r}. Known metrics: {known}.")


def check_tasks(tasks: TaskConfigs, phase: Phase, data: PreparedData) -> None:
    """Raise ValueError before any long work when the data cannot support a task."""
    counts = {name: info.class_counts for name, info in data.splits.items()}
    for name, config in tasks.items():
        TASKS[name].check(config, phase, counts)


def evaluate_backbone(
    backbone: nn.Module,
    tasks: TaskConfigs,
    phase: Phase,
    data: PreparedData,
    settings: TrainConfig,
    device: torch.device,
    seed: int = 0,
    features: Callable[[str], Features] | None = None,
    on_metric: Callable[[Metric], None] | None = None,
) -> TransferResult:
    """Run frozen tasks.

    Args:
        backbone: the network; left as it was (mode, weights, BatchNorm statistics).
        tasks: task name -> config.
        phase: "val" never touches test images or novel classes; "test" is for the report.
        data: prepared data.
        settings: image size and where the images are read from.
        device: where the forward passes run.
        seed: seed of task lists and solvers; the same for all models, so that comparisons are paired.
        features: another way to get a split's features (a Ray Data actor pool); default: this process.
        on_metric: called as each metric is known.
    """
    if features is None:
        batches = partial(feature_batches, data=data, settings=settings)
        context = make_context(
            backbone, batches, lambda split: data.split(split).class_names, phase, seed, str(device), autocast=False
        )
    else:
        context = EvaluationContext(FeatureCache(features), phase, seed, str(device))
    metrics: list[Metric] = []
    protocol: dict[str, Any] = {
        "phase": phase,
        "image_size": settings.image_size,
        "view": RECIPES["evaluation"].to_json(),
    }
    for name, config in tasks.items():
        for metric in TASKS[name].evaluate(config, context):
            metrics.append(metric)
            if on_metric is not None:
                on_metric(metric)
        protocol[name] = TASKS[name].protocol(config, phase)
    return TransferResult(metrics, protocol)


def evaluate_checkpoint(
    directory: str | Path,
    tasks: TaskConfigs,
    phase: Phase,
    data: PreparedData,
    settings: TrainConfig,
    device: torch.device | None = None,
    seed: int = 0,
) -> TransferResult:
    """Load the backbone of a local checkpoint folder and evaluate it in this process."""
    from rayjobs.job import worker_device

    backbone, _, _ = load_backbone(directory)
    where = device or worker_device(settings)
    return evaluate_backbone(backbone.to(where), tasks, phase, data, settings, where, seed)


def feature_batches(split: str, data: PreparedData, settings: TrainConfig) -> Iterator[ImageBatch]:
    """Every image of a split once, resized and centre-cropped."""
    from rayjobs.job import uses_memory

    info = data.split(split)
    recipe = [RECIPES["evaluation"]]
    threads = max(1, int(settings.cpus_per_worker))
    order: dict[str, Any] = dict(
        image_size=settings.image_size, batch_size=FEATURE_BATCH, shuffle=False, drop_last=False
    )
    if uses_memory(settings, data, split):
        store = DecodedStore.open(info, data.directory, threads=threads)
        stream: Any = MemoryStream(store, recipe, threads=threads, **order)
    else:
        from image_data.ray_stream import RayDataStream

        stream = RayDataStream(info, recipe, **order)
    return stream.epoch(0)
