"""A small packed split as ``image_data.prepare`` writes it, made without it: streams are tested on their own."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


@dataclass(frozen=True)
class PackedSplit:
    """The fields of ``SplitInfo`` that a stream reads."""

    name: str
    files: tuple[str, ...]
    num_images: int
    num_bytes: int
    decoded_bytes: int


def write_split(
    directory: str,
    num_images: int,
    *,
    name: str = "train",
    num_shards: int = 4,
    rows_per_group: int = 16,
    sides: tuple[int, int] = (24, 48),
    seed: int = 0,
    kind: str = "PNG",
) -> tuple[PackedSplit, list[np.ndarray], np.ndarray]:
    """Write random images to shards.

    Returns:
        The split, the decoded images in the order of their index, and int64 (num_images,) labels.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 7, num_images)
    images, encoded = [], []
    for _ in range(num_images):
        height, width = rng.integers(*sides, 2, endpoint=True)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(buffer, kind)
        encoded.append(buffer.getvalue())
        images.append(np.array(Image.open(buffer).convert("RGB")))
    files = []
    for shard, rows in enumerate(np.array_split(np.arange(num_images), num_shards)):
        columns = {
            "image": pa.array([encoded[i] for i in rows], pa.binary()),
            "label": pa.array(labels[rows], pa.int64()),
            "index": pa.array(rows, pa.int64()),
            "name": pa.array([f"image {i}" for i in rows]),
            "height": pa.array([images[i].shape[0] for i in rows], pa.int32()),
            "width": pa.array([images[i].shape[1] for i in rows], pa.int32()),
        }
        files.append(os.path.join(directory, f"{name}-{shard:05d}.parquet"))
        pq.write_table(pa.table(columns), files[-1], row_group_size=rows_per_group, compression="none")
    split = PackedSplit(name, tuple(files), num_images, sum(map(len, encoded)), sum(image.size for image in images))
    return split, images, labels
