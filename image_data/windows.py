"""The order in which an epoch visits the packed shards: a shuffle that reads each row group a bounded number of times.

A global permutation needs random access to every image, which row groups of a Parquet shard do not give. Here an epoch
is

1. the row groups of all shards in a random order of (seed, epoch),
2. cut into pools of a fixed number of rows (a multiple of the global batch), each permuted by (seed, epoch, pool); a
   split of less than a pool is thus permuted as a whole,
3. each pool cut into windows, one per task, and these into batches.

So the order depends on (seed, epoch, global batch size) and on the packed shards, and not on the number of workers or
on which task reads what. The rows of the shards are already shuffled over the whole split when they are written, so a
pool is a random sample of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from image_data.contracts import DataError
from image_data.uri import Files

__all__ = [
    "Piece",
    "RowGroup",
    "Sizes",
    "Window",
    "epoch_windows",
    "list_row_groups",
    "open_shard",
    "read_window",
]

# A pool is read by every task that works on it: its bytes bound a task's memory and the bytes read per image.
POOL_ROWS = 8192
POOL_BYTES = 64 * 2**20
# A task: large enough to hide its overhead of about 10 ms, small enough that many can work on one epoch.
TASK_ROWS = 2048
MIN_TASKS = 16  # of an epoch, where the batches allow it
_GROUP_ORDER, _ROW_ORDER = 1, 2  # keep the two kinds of draws of one (seed, epoch) apart


@dataclass(frozen=True)
class RowGroup:
    """One row group of a packed shard."""

    file: str
    group: int
    num_rows: int


@dataclass(frozen=True)
class Piece:
    """Rows ``start`` to ``stop`` of a row group."""

    file: str
    group: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """Consecutive rows of an epoch, delivered by one task.

    Attributes:
        epoch: the epoch.
        first_row: position of its first row in the epoch.
        num_rows: rows that it delivers.
        pieces: the rows of its pool, in the order of storage.
        first_in_pool: position of its first row in the permuted pool.
        shuffle_seed: seed of the pool's permutation; empty keeps the order of storage.
    """

    epoch: int
    first_row: int
    num_rows: int
    pieces: tuple[Piece, ...]
    first_in_pool: int
    shuffle_seed: tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """How an epoch is cut, in rows.

    Attributes:
        global_batch: batch size times number of workers.
        pool: rows that are permuted together, a multiple of the global batch.
        window: rows of a task, likewise.
    """

    global_batch: int
    pool: int
    window: int

    @classmethod
    def choose(cls, num_images: int, num_bytes: int, global_batch: int, shuffle: bool = True) -> Sizes:
        """The multiples of the global batch nearest to what the constants of this module allow.

        Args:
            num_images: images of the split.
            num_bytes: their encoded bytes.
            global_batch: batch size times number of workers.
            shuffle: without it a pool is one window.
        """

        def multiple(rows: int) -> int:
            return max(1, round(rows / global_batch)) * global_batch

        bytes_per_image = max(1, num_bytes // max(1, num_images))
        pool = multiple(min(POOL_ROWS, POOL_BYTES // bytes_per_image))
        window = min(pool, multiple(min(TASK_ROWS, num_images // MIN_TASKS)))
        return cls(global_batch, pool if shuffle else window, window)


def list_row_groups(files: Sequence[str]) -> tuple[RowGroup, ...]:
    """The row groups of packed shards (local paths or URIs), in the order of storage; reads the footers only."""
    groups = []
    for file in files:
        with open_shard(file) as shard:
            metadata = shard.metadata
            groups += [RowGroup(file, g, metadata.row_group(g).num_rows) for g in range(metadata.num_row_groups)]
    return tuple(group for group in groups if group.num_rows > 0)


def epoch_windows(
    groups: Sequence[RowGroup], epoch: int, *, seed: int, sizes: Sizes, shuffle: bool = True, drop_last: bool = True
) -> list[Window]:
    """Cut one epoch into windows; together they hold every row exactly once, less the dropped incomplete batch.

    Args:
        groups: the row groups of the split, in the order of storage.
        epoch: which epoch.
        seed: of the run.
        sizes: of pools and windows.
        shuffle: False keeps the order of storage.
        drop_last: leave out the last, incomplete global batch.
    """
    if shuffle:
        order = np.random.default_rng((seed, epoch, _GROUP_ORDER)).permutation(len(groups))
        groups = [groups[i] for i in order]
    ends = np.cumsum([group.num_rows for group in groups], dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    usable = total - total % sizes.global_batch if drop_last else total
    windows = []
    for number, pool in enumerate(range(0, usable, sizes.pool)):
        pieces = _pieces(groups, ends, pool, min(pool + sizes.pool, total))
        shuffle_seed = (seed, epoch, _ROW_ORDER, number) if shuffle else ()
        end = min(pool + sizes.pool, usable)
        for first in range(pool, end, sizes.window):
            num_rows = min(sizes.window, end - first)
            windows.append(Window(epoch, first, num_rows, pieces, first - pool, shuffle_seed))
    return windows


def read_window(window: Window, columns: Sequence[str]) -> tuple[pa.Table, np.ndarray]:
    """Read the pool of a window.

    Args:
        window: which.
        columns: names of the columns to read.

    Returns:
        The pool as a table in the order of storage, and int64 (num_rows,): which row the window delivers at each
        position.
    """
    parts = []
    for piece in window.pieces:
        with open_shard(piece.file) as shard:
            rows = shard.read_row_group(piece.group, columns=list(columns), use_threads=False)
        parts.append(rows.slice(piece.start, piece.stop - piece.start))
    table = pa.concat_tables(parts)
    order = np.arange(table.num_rows)
    if window.shuffle_seed:
        order = np.random.default_rng(window.shuffle_seed).permutation(table.num_rows)
    return table, order[window.first_in_pool : window.first_in_pool + window.num_rows]


def _pieces(groups: Sequence[RowGroup], ends: np.ndarray, first: int, last: int) -> tuple[Piece, ...]:
    """The parts of the groups that lie between positions ``first`` and ``last`` of their concatenation."""
    pieces = []
    i = int(np.searchsorted(ends, first, side="right"))
    while first < last:
        group, end = groups[i], int(ends[i])
        begin = end - group.num_rows
        pieces.append(Piece(group.file, group.group, first - begin, min(last, end) - begin))
        first, i = min(last, end), i + 1
    return tuple(pieces)


def open_shard(file: str) -> pq.ParquetFile:
    """Open a packed shard, a local path or a URI (s3://, gs://, whatever fsspec knows)."""
    try:
        if "://" not in file:
            return pq.ParquetFile(file, memory_map=True)
        storage = Files(file)
        return pq.ParquetFile(storage.open(storage.root))
    except FileNotFoundError as error:
        raise DataError(
            f"The packed shard {file} is missing on this node. Prepare the data again, or keep the cache on storage "
            "that every node of the cluster sees."
        ) from error
