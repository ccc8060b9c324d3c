"""Downstream evaluation of a backbone: one pass over each split that a task asks for, shared by all tasks."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from evaluation import TASKS, Artifact, EvaluationContext, Features, Metric, ModelResult, Output, Phase
from evaluation.features import FeatureCache, extract_features, feature_batches, frozen
from evaluation.metric import ViewFeatures
from image_data.prepared import PreparedData, SplitInfo
from methods import METHODS
from rayjobs.checkpoint import load_backbone
from rayjobs.configs import PretrainConfig, TrainConfig
from rayjobs.split_reader import SplitReader, evaluation_view

if TYPE_CHECKING:
    from evaluation.fine_tuning import FineTuning
    from rayjobs.task_data import TaskData

__all__ = [
    "FeatureAccess",
    "TaskConfigs",
    "TransferResult",
    "check_task",
    "check_tasks",
    "compare_models",
    "evaluate_backbone",
    "evaluate_checkpoint",
    "local_features",
    "pretraining_info",
    "split_key",
    "task_configs",
    "task_of",
]

TaskConfigs = Mapping[str, Any]  # task name -> its frozen config


@dataclass(frozen=True)
class TransferResult:
    """What one evaluation of a checkpoint gave.

    Attributes:
        metrics: in the order of the tasks.
        protocol: task -> how its metrics were computed; and phase, image size and view.
        artifacts: files.
        samples: values per task, image or class, by name.
    """

    metrics: list[Metric]
    protocol: dict[str, Any]
    artifacts: list[Artifact] = field(default_factory=list)
    samples: dict[str, np.ndarray] = field(default_factory=dict)

    def value(self, name: str) -> float:
        """A metric's value by name."""
        return next(metric.value for metric in self.metrics if metric.name == name)

    def to_json(self) -> dict[str, Any]:
        """``{"metrics": {name: {"value", "ci95", "n"}}, "protocol": {...}}``."""
        metrics = {m.name: {"value": m.value, "ci95": m.ci95, "n": m.n} for m in self.metrics}
        return {"metrics": metrics, "protocol": self.protocol}


@dataclass(frozen=True)
class FeatureAccess:
    """How an evaluation gets at the frozen features: computed in this process, or by a pool of Ray actors.

    Attributes:
        features: split -> features of the evaluation view.
        view_features: passes over augmented views.
        domains: further data sets: name -> split -> features.
    """

    features: Callable[[str], Features]
    view_features: ViewFeatures
    domains: Mapping[str, Callable[[str], Features]] = field(default_factory=dict)


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


def task_of(metric: str, options: Any = None) -> str:
    """The task that yields a metric.

    Args:
        metric: its name.
        options: a ``TaskOptions`` with which the tasks run; default: their default configurations.

    Raises:
        ValueError: no task yields it; lists the metrics.
    """
    yielded = {
        name: spec.metrics if options is None else spec.metric_names(getattr(options, name))
        for name, spec in TASKS.items()
    }
    for name, metrics in yielded.items():
        if metric in metrics:
            return name
    known = ", ".join(m for metrics in yielded.values() for m in metrics)
    raise ValueError(f"Unknown metric {metric!r}. Known metrics: {known}.")


def check_tasks(tasks: TaskConfigs, phase: Phase, data: PreparedData) -> None:
    """Raise ValueError before any long work when the data cannot support a task."""
    for name, config in tasks.items():
        check_task(name, config, phase, data)


def check_task(name: str, config: Any, phase: Phase, data: PreparedData, num_workers: int = 1) -> None:
    """Raise ValueError before any long work when the data cannot support one task.

    Args:
        name: of the task.
        config: its options.
        phase: what is scored.
        data: that it reads.
        num_workers: that one fine-tuning run is divided over.
    """
    spec = TASKS[name]
    spec.check(config, phase, {split: info.class_counts for split, info in data.splits.items()})
    if num_workers > 1 and spec.needs == "fine_tuning" and not spec.grid:
        batch = spec.protocol(config, phase)["schedule"]["batch_size"]
        if batch % num_workers:
            raise ValueError(
                f"{name}: a batch of {batch} images does not divide over {num_workers} workers. Give "
                f"--{name.replace('_', '-')}.batch-size a multiple of {num_workers} (learning rate and iterations are "
                "scaled with it), or another number of workers."
            )
    if spec.check_data is not None:
        for split in spec.splits(config, phase):
            data.split(split)
        spec.check_data(config, phase, data)


def pretraining_info(config: PretrainConfig, record: Mapping[str, Any]) -> dict[str, Any]:
    """What tasks and plots may know of a checkpoint's pretraining; an untrained backbone has seen no class."""
    trained = config.train.epochs > 0
    return {
        "method": config.method if trained else "random_init",
        "num_classes": record["data"]["splits"]["train"]["classes"] if trained else 0,
        "labels_used": trained and METHODS[config.method].uses_labels,
        "seed": config.train.seed,
    }


def local_features(
    backbone: nn.Module, data: PreparedData, settings: TrainConfig, phase: Phase, seed: int, device: torch.device
) -> FeatureAccess:
    """Features computed in this process."""
    reader = SplitReader(data, settings, phase, seed)

    def features(split: str) -> Features:
        return extract_features(backbone, reader.batches(split), data.split(split).class_names, device)

    def view_features(split: str, recipe: str, **options: Any) -> Any:
        return feature_batches(backbone, reader.views(split, recipe, **options), device)

    return FeatureAccess(features, view_features)


def evaluate_backbone(
    backbone: nn.Module,
    tasks: TaskConfigs,
    phase: Phase,
    data: PreparedData,
    settings: TrainConfig,
    device: torch.device,
    seed: int = 0,
    access: FeatureAccess | None = None,
    info: Mapping[str, Any] | None = None,
    on_output: Callable[[Output], None] | None = None,
    fine_tuning: FineTuning | None = None,
) -> TransferResult:
    """Run downstream tasks.

    Args:
        backbone: the network, on ``device``; left as it was (mode, weights, BatchNorm statistics).
        tasks: task name -> config.
        phase: "val" never touches test images or novel classes; "test" is for the report.
        data: prepared data.
        settings: image size and where the images are read from.
        device: where the forward passes run.
        seed: seed of task lists and solvers; the same for all models, so that comparisons are paired.
        access: another way to the features (a Ray Data actor pool, further data sets); default: this process.
        info: of the pretraining, see ``pretraining_info``.
        on_output: called as each metric, file or sample is known.
        fine_tuning: how tasks that train the backbone do it; they get copies of it.
    """
    found = access or local_features(backbone, data, settings, phase, seed, device)
    context = EvaluationContext(
        features=FeatureCache(found.features),
        phase=phase,
        seed=seed,
        device=str(device),
        backbone=backbone,
        view_features=found.view_features,
        images=SplitReader(data, settings, phase, seed).images,
        domains={name: FeatureCache(features) for name, features in found.domains.items()},
        info=info or {},
        fine_tuning=fine_tuning,
    )
    result = TransferResult(
        [], {"phase": phase, "image_size": settings.image_size, "view": evaluation_view().to_json()}
    )
    with frozen(backbone):
        for name, config in tasks.items():
            for output in TASKS[name].evaluate(config, context):
                _keep(result, output)
                if on_output is not None:
                    on_output(output)
            result.protocol[name] = TASKS[name].protocol(config, phase)
    return result


def _keep(result: TransferResult, output: Output) -> None:
    if isinstance(output, Metric):
        result.metrics.append(output)
    elif isinstance(output, Artifact):
        result.artifacts.append(output)
    else:
        result.samples[output.name] = output.values


def evaluate_checkpoint(
    directory: str | Path,
    tasks: TaskConfigs,
    phase: Phase,
    data: PreparedData,
    settings: TrainConfig,
    seed: int = 0,
    task_data: Mapping[str, TaskData] | None = None,
    location: str = "",
    storage: str = "",
) -> TransferResult:
    """Load the backbone of a local checkpoint folder and evaluate it: frozen tasks in this process.

    Args:
        directory: the folder.
        tasks: task name -> config.
        phase: "val" or "test".
        data: prepared data of the run.
        settings: as for ``evaluate_backbone``. With one worker tasks are fine-tuned in this process too, with more as
            Ray jobs of the connected cluster.
        seed: of task lists, solvers and fine-tuning runs.
        task_data: images of single tasks.
        location: folder or URI of the same checkpoint that every node reaches; default: ``directory``.
        storage: folder or URI of the fine-tuning runs' checkpoints; "" keeps none.
    """
    from rayjobs.fine_tuning_runs import RunsPlan, fine_tuning_of, weights_hash
    from rayjobs.job import worker_device
    from rayjobs.task_data import TaskData

    backbone, config, record = load_backbone(directory)
    device = worker_device(settings)
    plan = RunsPlan(
        checkpoint=location or str(directory),
        pretrain=config,
        weights=weights_hash(directory),
        settings=settings,
        data=TaskData(config.data, data),
        task_data=task_data or {},
        storage=storage,
        on_cluster=settings.num_workers > 1,
    )
    info, trained = pretraining_info(config, record), fine_tuning_of(plan)
    return evaluate_backbone(
        backbone.to(device), tasks, phase, data, settings, device, seed, info=info, fine_tuning=trained
    )


def split_key(info: SplitInfo) -> str:
    """Equal for splits of the same images: classes, their sizes and the bytes of all images."""
    record = (info.class_names, info.class_counts, info.num_images, info.num_bytes, info.decoded_bytes)
    return hashlib.sha256(repr(record).encode()).hexdigest()[:16]


def compare_models(
    tasks: TaskConfigs, models: Sequence[ModelResult], same_images: Callable[[str], bool]
) -> tuple[list[Metric], list[Artifact], dict[str, str]]:
    """What tasks have to say about several models together.

    Args:
        tasks: task name -> config.
        models: the evaluated models.
        same_images: task name -> whether all models were scored on the same images, so that entries can be paired.

    Returns:
        Metrics, files, and for each task that was left out the reason.
    """
    metrics: list[Metric] = []
    files: list[Artifact] = []
    left_out: dict[str, str] = {}
    for name, config in tasks.items():
        spec = TASKS[name]
        if spec.compare is None or len(models) < 2:
            continue
        if spec.paired and not same_images(name):
            left_out[name] = "the models were scored on different images, so nothing can be paired"
            continue
        for output in spec.compare(config, models):
            (metrics if isinstance(output, Metric) else files).append(output)  # type: ignore[arg-type]
    return metrics, files, left_out
