"""One batch of views as one Arrow table: how Ray Data's tasks hand batches to the training process without copies.

The table has a column ``view0``, ``view1``, ... of fixed-size binary, one value (3 * S * S bytes) per image, and the
int64 columns of ``NUMBERS``. Arrow keeps both as flat buffers, which NumPy reads in place out of shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from image_data.contracts import ImageBatch, ImageBuffer
from image_data.decode import decode_image
from image_data.views import ViewMaker
from image_data.windows import Window, read_window

__all__ = ["NUMBERS", "Block", "BlockMaker", "read_block"]

# batch is the number of the batch in its epoch over all workers; epochs_left is how many epochs follow in the same
# execution.
NUMBERS = ("label", "index", "epoch", "batch", "epochs_left")

# Images decoded before their views are made: few enough that the pixels stay near the core, enough for one kernel call
# a batch.
_DECODED_BYTES = 8 * 2**20


class Block(NamedTuple):
    """A batch and its place."""

    batch: ImageBatch
    number: int
    epochs_left: int


@dataclass(frozen=True)
class BlockMaker:
    """Makes the blocks of a window; picklable, holds no data.

    Attributes:
        maker: the views.
        batch_size: rows of a block.
    """

    maker: ViewMaker
    batch_size: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of a block."""
        return sum(3 * size**2 for size in self.maker.sizes) + 8 * len(NUMBERS)

    def blocks(self, window: Window, epochs_left: int) -> Iterator[pa.Table]:
        """Read, decode and augment a window, one block per batch; the last one of an epoch may be smaller.

        Args:
            window: the rows.
            epochs_left: epochs that follow in the same execution.
        """
        table, order = read_window(window, ("image", "label", "index", "height", "width"))
        for first in range(0, window.num_rows, self.batch_size):
            rows = table.take(pa.array(order[first : first + self.batch_size]))
            index = rows["index"].to_numpy()
            views = self._views(rows, window.epoch, index)
            place = (window.epoch, (window.first_row + first) // self.batch_size, epochs_left)
            numbers = (rows["label"].to_numpy(), index, *(np.full(len(index), value, np.int64) for value in place))
            columns = {f"view{i}": _fixed_size_binary(view) for i, view in enumerate(views)}
            yield pa.table(columns | dict(zip(NUMBERS, numbers, strict=True)))

    def _views(self, rows: pa.Table, epoch: int, index: np.ndarray) -> list[np.ndarray]:
        """The views of one batch, decoded in pieces of ``_DECODED_BYTES``."""
        views = [np.empty((len(index), 3, size, size), np.uint8) for size in self.maker.sizes]
        sizes = 3 * rows["height"].to_numpy().astype(np.int64) * rows["width"].to_numpy()
        piece = np.cumsum(sizes) // _DECODED_BYTES
        bounds = [0, *(np.flatnonzero(np.diff(piece)) + 1).tolist(), len(index)]
        encoded = rows["image"]
        for first, last in pairwise(bounds):
            images = [decode_image(encoded[i].as_py(), f"with index {index[i]}") for i in range(first, last)]
            self.maker(_pack(images), epoch, index[first:last], out=[view[first:last] for view in views])
        return views


def read_block(table: pa.Table, sizes: tuple[int, ...]) -> Block:
    """A block as the batch that it holds; the arrays are read-only and share the table's memory.

    Args:
        table: a block of ``BlockMaker``.
        sizes: side of each view in pixels.
    """
    columns = {name: _contiguous(table[name]) for name in table.column_names}
    num_rows = table.num_rows
    views = []
    for i, size in enumerate(sizes):
        column, width = columns[f"view{i}"], 3 * size**2
        pixels = np.frombuffer(column.buffers()[1], np.uint8, num_rows * width, column.offset * width)
        views.append(pixels.reshape(num_rows, 3, size, size))
    label, index, epoch, number, epochs_left = (columns[name].to_numpy() for name in NUMBERS)
    for values in (epoch, number, epochs_left):
        assert values[0] == values[-1], "a block holds rows of one batch"
    return Block(ImageBatch(views, label, index, int(epoch[0])), int(number[0]), int(epochs_left[0]))


def _contiguous(column: pa.ChunkedArray) -> pa.Array:
    # combine_chunks copies even a single chunk
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _fixed_size_binary(view: np.ndarray) -> pa.Array:
    width = view[0].size
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(view), [None, pa.py_buffer(view)])


def _pack(images: list[np.ndarray]) -> ImageBuffer:
    """Decoded images in one flat buffer."""
    sizes = np.array([image.size for image in images], np.int64)
    heights, widths = (np.array([image.shape[axis] for image in images], np.int32) for axis in (0, 1))
    return ImageBuffer(
        np.concatenate([image.reshape(-1) for image in images]), np.cumsum(sizes) - sizes, heights, widths
    )
