"""Random access to the images and targets of prepared splits, for training that draws its own images.

Parquet shards are read in row groups, which a loader that wants row 17 and then row 90,000 cannot afford. So a split is
copied once into one uncompressed Arrow file, which is memory-mapped: all processes of a machine share its pages, and a
row costs no more than its bytes.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from image_data.contracts import DataError
from image_data.decode import decode_image
from image_data.prepared import PreparedData, SplitInfo
from image_data.windows import open_shard

__all__ = ["ImageTable", "open_table", "target_columns"]

_ROWS = 256  # of a record batch
_OWN_COLUMNS = ("image", "label", "index", "name", "height", "width", "coarse")


class ImageTable:
    """Images of one or more splits by row; every column of the shards by row or as a whole.

    Attributes:
        num_images: N.
        class_names: of the classification labels.
        coarse_names: of the column ``coarse``; empty where there is none.
        labels: int64 (N,).
    """

    def __init__(self, tables: Sequence[pa.Table], info: SplitInfo) -> None:
        """Use ``open_table``."""
        columns = [name for name in tables[0].column_names if all(name in t.column_names for t in tables)]
        self._table = pa.concat_tables([table.select(columns) for table in tables], promote_options="permissive")
        self._starts = {
            name: np.cumsum([0, *(len(chunk) for chunk in self._table[name].chunks)])
            for name in self._table.schema.names
        }
        self.num_images = len(self._table)
        self.class_names, self.coarse_names = info.class_names, info.coarse_names
        self.labels = self._table["label"].to_numpy()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns."""
        return tuple(self._table.column_names)

    def image(self, row: int) -> np.ndarray:
        """An image as RGB, uint8 (H, W, 3)."""
        return decode_image(self.value(row, "image"), str(self.value(row, "name")))

    def value(self, row: int, column: str) -> Any:
        """One value: bytes as bytes, lists as lists.

        Raises:
            DataError: there is no such column.
        """
        if column not in self._starts:
            raise DataError(f"the images have no target {column!r}; they have {', '.join(self.columns)}.")
        starts = self._starts[column]
        chunk = int(np.searchsorted(starts, row, side="right")) - 1
        return self._table[column].chunk(chunk)[int(row - starts[chunk])].as_py()

    def column(self, name: str) -> list[Any]:
        """A whole column; not meant for images.

        Raises:
            DataError: there is no such column.
        """
        if name not in self._starts:
            raise DataError(f"the images have no target {name!r}; they have {', '.join(self.columns)}.")
        return self._table[name].to_pylist()


def target_columns(data: PreparedData, split: str) -> tuple[str, ...]:
    """The further targets of a split (masks, boxes, landmarks ...), from the schema alone."""
    with open_shard(data.split(split).files[0]) as shard:
        return tuple(name for name in shard.schema_arrow.names if name not in _OWN_COLUMNS)


def open_table(data: PreparedData, splits: Sequence[str]) -> ImageTable:
    """The rows of some splits, one after the other, each in the order of its ``index``.

    Safe under concurrent callers: one copies, the others wait.

    Args:
        data: prepared data; where its folder is remote, the copy is made in the local cache.
        splits: names; more than one must share their classes (train and val).

    Raises:
        DataError: a split is missing.
    """
    infos = [data.split(name) for name in splits]
    return ImageTable([_open_file(_arrow_file(data, info)) for info in infos], infos[0])


def _open_file(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _arrow_file(data: PreparedData, info: SplitInfo) -> Path:
    """The Arrow file of a split, made where it is missing."""
    folder = Path(data.directory)
    if "://" in data.directory:
        from image_data.prepare import DataConfig, cache_directory

        folder = Path(cache_directory(DataConfig())) / data.fingerprint
        folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{info.name}.arrow"
    if target.is_file():
        return target
    with open(folder / f".{info.name}.arrow.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel drops it when the process dies
        if not target.is_file():
            _copy(info, target)
    return target


def _copy(info: SplitInfo, target: Path) -> None:
    """Copies all shards into one file, which appears by a rename."""
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        writer = None
        for file in info.files:
            with open_shard(file) as shard:
                for batch in shard.iter_batches(batch_size=_ROWS):
                    writer = writer or pa.ipc.new_file(temporary, batch.schema)
                    writer.write_batch(batch)
        assert writer is not None, info.files
        writer.close()
        os.replace(temporary, target)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
