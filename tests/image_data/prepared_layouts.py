"""What the tests of layouts read off prepared data."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from image_data.prepare import DataConfig, PreparedData, prepare

__all__ = ["classes", "labels", "make", "rows"]


def make(tmp_path: Path, *data: str, **options) -> PreparedData:
    return prepare(DataConfig(data=data, cache=str(tmp_path / "cache"), **options), lambda _: None, threads=1)


def rows(prepared: PreparedData, split: str) -> list[dict]:
    return [row for file in prepared.split(split).files for row in pq.read_table(file).to_pylist()]


def classes(prepared: PreparedData) -> dict[str, set[str]]:
    return {name: set(info.class_names) for name, info in prepared.splits.items()}


def labels(prepared: PreparedData, split: str) -> dict[str, str]:
    """Name of the image, without the split's -> name of its class."""
    names = prepared.split(split).class_names
    return {row["name"].split("/", 1)[-1]: names[row["label"]] for row in rows(prepared, split)}
