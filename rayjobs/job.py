"""One pretraining job as any worker process runs it: find the data, build the stream, train, probe the transfer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from image_data import RECIPES
from image_data.prepare import DataConfig, prepare
from image_data.prepared import PreparedData
from image_data.store import DecodedStore
from image_data.stream import MemoryStream
from methods import METHODS
from rayjobs.capacity import Placement
from rayjobs.configs import PretrainConfig, TrainConfig, resolve_stem
from rayjobs.train_loop import Reporter, Stream, Worker, feature_map_side, method_context, train
from rayjobs.transfer import TaskConfigs, evaluate_backbone

__all__ = ["Job", "local_data", "run_job", "set_threads", "uses_memory", "view_recipes", "worker_device"]


@dataclass(frozen=True)
class Job:
    """A pretraining run and its transfer probe, picklable.

    Attributes:
        config: the run.
        record: its run record.
        data: the prepared data set as the driver sees it.
        probe_tasks: cheap downstream tasks measured on validation data at ``probe_epochs``.
        probe_epochs: epochs (from 1) after which the probe runs.
        probe_metric: which of the probe's metrics is reported as ``proxy``.
        placement: node labels of where the work runs.
    """

    config: PretrainConfig
    record: dict[str, Any]
    data: PreparedData
    probe_tasks: TaskConfigs
    probe_epochs: tuple[int, ...] = ()
    probe_metric: str = ""
    placement: Placement = Placement()  # noqa: RUF009 - frozen


def run_job(job: Job, worker: Worker, reporter: Reporter, shard: Any = None) -> PreparedData:
    """Train this worker's share; returns the data as this node sees it.

    Args:
        job: what to train.
        worker: this process's place.
        reporter: where metrics and checkpoints go.
        shard: this worker's Ray Data shard under Ray Train; None reads the data in this process.
    """
    set_threads(job.config.train)
    data = local_data(job.data, job.config.data)
    info = data.split("train")
    context = method_context(job.config, len(info.class_names), info.num_images)
    stream = _stream(job, data, worker, shard)

    def probe(backbone: nn.Module, epoch: int) -> dict[str, float]:
        result = evaluate_backbone(
            backbone, job.probe_tasks, "val", data, job.config.train, worker.device, seed=job.config.train.seed
        )
        values = {metric.name: metric.value for metric in result.metrics}
        return {"proxy": values[job.probe_metric], **{f"probe/{name}": v for name, v in values.items()}}

    train(job.config, job.record, context, stream, worker, reporter, probe, job.probe_epochs)
    return data


def set_threads(config: TrainConfig) -> None:
    """Give this process its share of the cores: two workers with all cores each would fight for them."""
    torch.set_num_threads(max(1, int(config.cpus_per_worker)))


def worker_device(config: TrainConfig) -> torch.device:
    """The device of a process that runs outside Ray Train.

    Raises:
        ValueError: a GPU was asked for and this process sees none.
    """
    if not config.use_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--use-gpu was given but this process sees no CUDA device. Drop the flag or fix the driver.")
    return torch.device("cuda", 0)


def local_data(data: PreparedData, config: DataConfig) -> PreparedData:
    """The prepared data as this node sees it: the driver's folder when it is shared, else prepared here.

    Preparing is deterministic, so every node that does it gets the same bytes; the contents are compared.

    Raises:
        RuntimeError: this node prepared other data than the driver (the source differs between the nodes).
    """
    if "://" in data.directory or os.path.isdir(data.directory):
        return data
    mine = prepare(config, log=lambda _: None)
    if mine.content != data.content:
        raise RuntimeError(
            f"Node {os.uname().nodename} sees other data than the driver (content {mine.content} instead of "
            f"{data.content}). Put the source or --cache on storage that all nodes share."
        )
    return mine


def view_recipes(config: PretrainConfig) -> list[Any]:
    """The view recipes of a run: the method's own unless the user named others.

    Raises:
        ValueError: an unknown recipe, a number of views that the method cannot take, a colour space that its backbone
            does not expect, or a view too small for the backbone.
    """
    names = config.train.views or METHODS[config.method].views
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        raise ValueError(f"Unknown view recipe {', '.join(unknown)}. Known recipes: {', '.join(RECIPES)}.")
    recipes = [RECIPES[name] for name in names]
    _check_views(config, recipes)
    return recipes


def _check_views(config: PretrainConfig, recipes: list[Any]) -> None:
    spec, settings = METHODS[config.method], config.train
    allowed = range(len(spec.views), len(spec.views) + 1)
    if hasattr(spec.method, "num_views"):
        allowed = spec.method.num_views(config.method_config)
    if len(recipes) not in allowed:
        number = str(allowed.start) if len(allowed) == 1 else f"at least {allowed.start}"
        raise ValueError(
            f"{config.method} takes {number} view(s) per image with these settings, got {len(recipes)} "
            f"({' '.join(recipe.name for recipe in recipes)}). Name one recipe per view with --views, for example "
            f"--views {' '.join([recipes[0].name] * allowed.start)}."
        )
    wrong = [recipe.name for recipe in recipes if recipe.color_space != spec.color_space]
    if wrong:
        rule = "end with the step to_lab" if spec.color_space == "lab" else "not contain the step to_lab"
        fitting = [name for name, recipe in RECIPES.items() if recipe.color_space == spec.color_space]
        raise ValueError(
            f"{config.method} works on {spec.color_space} colours, so its view recipes must {rule}; "
            f"{', '.join(wrong)} does not fit. Recipes that do: {', '.join(fitting)}."
        )
    for side in sorted({recipe.side(settings.image_size) for recipe in recipes}):
        feature_map_side(settings.backbone, resolve_stem(settings), side)


def uses_memory(config: TrainConfig, data: PreparedData, split: str = "train") -> bool:
    """Whether a split is decoded once and kept in memory, by the user's choice or by its size."""
    if config.stream != "auto":
        return config.stream == "memory"
    return data.split(split).decoded_bytes <= config.memory_limit_gb * 2**30


def _stream(job: Job, data: PreparedData, worker: Worker, shard: Any) -> Stream:
    config, settings = job.config, job.config.train
    info = data.split("train")
    common: dict[str, Any] = dict(
        image_size=settings.image_size,
        batch_size=settings.batch_size // worker.world_size,
        rank=worker.rank,
        world_size=worker.world_size,
        seed=settings.seed,
        backend=settings.augmentation,
    )
    if uses_memory(settings, data):
        threads = max(1, int(settings.cpus_per_worker))
        store = DecodedStore.open(info, data.directory, threads=threads)
        return MemoryStream(store, view_recipes(config), threads=threads, **common)
    from image_data.ray_stream import RayDataStream

    if shard is not None:
        return RayDataStream.from_shard(shard, info, view_recipes(config), **common)
    selector = job.placement.data
    return RayDataStream(
        info, view_recipes(config), num_epochs=settings.epochs or None, label_selector=selector, **common
    )
