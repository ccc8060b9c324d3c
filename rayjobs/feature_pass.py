"""Features of a large split by a Ray Data actor pool: each image is decoded and passed through the backbone once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from evaluation import Features
from evaluation.features import FeatureExtractor, assemble_features
from image_data import RECIPES
from image_data.blocks import read_block
from image_data.prepared import SplitInfo
from rayjobs.checkpoint import load_backbone, local_directory
from rayjobs.configs import TrainConfig

__all__ = ["ray_features"]

BATCH = 256  # images per forward pass


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
    """One streamed pass over a split.

    Args:
        checkpoint: checkpoint folder or URI that every node reaches.
        split: what to read.
        settings: image size; ``num_workers`` actors with ``cpus_per_worker`` CPUs (and a GPU each with ``use_gpu``).
    """
    from ray.data import ActorPoolStrategy

    from image_data.ray_stream import make_train_dataset

    dataset = make_train_dataset(
        split,
        [RECIPES["evaluation"]],
        image_size=settings.image_size,
        batch_size=BATCH,
        world_size=1,
        shuffle=False,
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
    parts = ((b["features"], b["label"], b["index"]) for b in batches)
    return assemble_features(parts, split.class_names)
