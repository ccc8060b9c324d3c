"""Tiny images and data sets in every supported layout."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encode(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    """An image as a file's bytes."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(seed: int, height: int = 8, width: int = 10) -> bytes:
    """A PNG that differs for every seed."""
    return encode(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def table(classes: Mapping[str, int], start: int = 0) -> list[tuple[str, str, bytes]]:
    """(name, class, bytes) rows, as many per class as given."""
    rows = [(f"{label}-{i:03d}.png", label) for label, count in classes.items() for i in range(count)]
    return [(name, label, picture(start + i)) for i, (name, label) in enumerate(rows)]


def write_folder(root: Path, rows: Sequence[tuple[str, str, bytes]]) -> str:
    for name, label, data in rows:
        (root / label).mkdir(parents=True, exist_ok=True)
        (root / label / name).write_bytes(data)
    return f"folder:{root}"


def write_csv(root: Path, rows: Sequence[tuple[str, str, bytes]], name: str = "train.csv") -> str:
    """miniImageNet's layout: ``filename,label`` and a folder ``images``."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    with open(root / name, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filename", "label"])
        for image, label, data in rows:
            (root / "images" / image).write_bytes(data)
            writer.writerow([image, label])
    return f"csv:{root / name}"


def write_parquet(root: Path, rows: Sequence[tuple[str, str, bytes]], files: int = 2, **extra: Sequence) -> str:
    root.mkdir(parents=True, exist_ok=True)
    names, labels, images = zip(*rows, strict=True)
    whole = pa.table({"image": list(images), "label": list(labels), "file": list(names), **extra})
    bounds = np.linspace(0, len(rows), files + 1).astype(int)
    for i in range(files):
        part = whole.slice(bounds[i], bounds[i + 1] - bounds[i])
        pq.write_table(part, root / f"part-{i}.parquet", row_group_size=5)
    return f"parquet:{root}?name=file"


def write_tars(root: Path, rows: Sequence[tuple[str, str, bytes]], shards: int = 2, use_json: bool = False) -> str:
    root.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(root / f"shard-{shard:03d}.tar", "w") as tar:
            for name, label, data in rows[shard::shards]:
                key = name.removesuffix(".png")
                text = json.dumps({"label": label, "kind": label[0]}).encode() if use_json else label.encode()
                for member, content in ((f"{key}.png", data), (f"{key}.{'json' if use_json else 'cls'}", text)):
                    info = tarfile.TarInfo(f"set/{member}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return f"webdataset:{root}/shard-{{000..{shards - 1:03d}}}.tar"
