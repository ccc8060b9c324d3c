"""Features of a large split by a Ray Data actor pool: each image is decoded and passed through the backbone once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from evaluation import Features
from evaluation.features import FeatureExtractor, assemble_features
from evaluation.metric import FeatureBatch
from image_data.blocks import read_block
from image_data.prepared import SplitInfo
from image_data.views import ViewRecipe, find_recipe
from rayjobs.checkpoint import load_backbone, local_directory
from rayjobs.configs import TrainConfig
from rayjobs.split_reader import FEATURE_BATCH, evaluation_view

__all__ = ["ray_features", "ray_view_features"]


class _FeatureActor:
    """One actor of the pool: keeps the frozen backbone on its device."""

    def __init__(self, checkpoint: str, image_size: int, cpus: int) -> None:
        import torch

        torch.set_num_threads(cpus)
        with local_directory(checkpoint) as directory:
            backbone, _, _ = load_backbone(directory)
        self._extractor = FeatureExtractor(backbone, "cuda" if torch.cuda.is_available() else "cpu")
        self._sizes = (image_size,)

    def __call__(self, table: pa.Table) -> dict[str, np.ndarray]:
        batch = read_block(table, self._sizes).batch
        features = self._extractor(np.array(batch.views[0]))  # copied: the block is read-only shared memory
        return {"features": features, "label": batch.labels, "index": batch.index}


def ray_features(checkpoint: str, split: SplitInfo, settings: TrainConfig) -> Features:
    """One streamed pass over a split in the evaluation view.

    Args:
        checkpoint: checkpoint folder or URI that every node reaches.
        split: what to read.
        settings: image size; ``num_workers`` actors with ``cpus_per_worker`` CPUs (and a GPU each with ``use_gpu``).
    """
    passed = _pass(checkpoint, split, settings, evaluation_view())
    return assemble_features(((b.features, b.labels, b.index) for b in passed), split.class_names)


def ray_view_features(
    checkpoint: str,
    split: SplitInfo,
    settings: TrainConfig,
    recipe: str,
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = False,
    batch_size: int = FEATURE_BATCH,
) -> Iterator[FeatureBatch]:
    """One streamed pass over augmented views; the last arguments are those of ``evaluation.metric.ViewFeatures``.

    The batches come in the order that a pass in this process would have.
    """
    return _pass(checkpoint, split, settings, find_recipe(recipe), seed, epoch, shuffle, batch_size)


def _pass(
    checkpoint: str,
    split: SplitInfo,
    settings: TrainConfig,
    recipe: ViewRecipe,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = False,
    batch_size: int = FEATURE_BATCH,
) -> Iterator[FeatureBatch]:
    """Batches of an actor pool, in order: the dataset of ``make_train_dataset`` preserves it."""
    from ray.data import ActorPoolStrategy

    from image_data.ray_stream import make_train_dataset

    dataset = make_train_dataset(
        split,
        [recipe],
        image_size=settings.image_size,
        batch_size=min(batch_size, split.num_images),
        world_size=1,
        seed=seed,
        start_epoch=epoch,
        shuffle=shuffle,
        drop_last=False,
    )
    resources: dict[str, Any] = {"num_cpus": settings.cpus_per_worker}
    if settings.use_gpu:
        resources["num_gpus"] = 1
    passed = dataset.map_batches(
        _FeatureActor,
        fn_constructor_args=(checkpoint, settings.image_size, max(1, int(settings.cpus_per_worker))),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=settings.num_workers),
        **resources,
    )
    batches: Any = passed.iter_batches(batch_size=None, batch_format="numpy")
    for batch in batches:
        yield FeatureBatch(batch["features"], batch["label"], batch["index"])
