"""A split decoded once into one flat file of pixels that all processes of a machine share through the page cache."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from image_data.contracts import DataError, ImageBuffer
from image_data.decode import decode_image
from image_data.windows import list_row_groups, open_shard

if TYPE_CHECKING:
    from image_data.prepare import SplitInfo

__all__ = ["DecodedStore", "fits_memory"]

_VERSION = 1  # of the layout on disk
_PIXELS, _TABLE, _MANIFEST = "pixels.bin", "table.npz", "manifest.json"
_COLUMNS = ("image", "label", "index", "height", "width")


def fits_memory(split: SplitInfo, limit_bytes: int) -> bool:
    """Whether the decoded pixels of a split take at most ``limit_bytes``."""
    return split.decoded_bytes <= limit_bytes


class DecodedStore:
    """Every image of a split as RGB bytes in a read-only memory map.

    Attributes:
        labels: int64 (N,).
        index: int64 (N,), id of each row's image in the split.
        num_images: N.
        num_bytes: bytes of all pixels.
    """

    def __init__(self, path: str) -> None:
        """Map a complete store; use ``open``, which makes it where it is missing."""
        with np.load(os.path.join(path, _TABLE)) as table:
            self._offsets: np.ndarray = table["offsets"]
            self._heights: np.ndarray = table["heights"]
            self._widths: np.ndarray = table["widths"]
            self.labels: np.ndarray = table["labels"]
            self.index: np.ndarray = table["index"]
        self._pixels: np.ndarray = np.memmap(os.path.join(path, _PIXELS), dtype=np.uint8, mode="r")
        self.num_images = len(self.labels)
        self.num_bytes = len(self._pixels)

    @classmethod
    def open(cls, split: SplitInfo, directory: str, threads: int = 1) -> DecodedStore:
        """Map the decoded split, decoding it first if no process has done so yet.

        Safe under concurrent callers: one decodes under a file lock, the others wait. The store appears by a rename, so
        a killed build leaves nothing that passes for a complete one.

        Args:
            split: the prepared split.
            directory: local folder that receives ``<split name>.decoded``, normally ``PreparedData.directory``.
            threads: decoding threads.

        Raises:
            DataError: ``directory`` is remote, too little disk space, or the shards do not hold what ``split`` says.
        """
        if "://" in directory:
            raise DataError(
                f"A decoded store is memory-mapped, so it cannot be kept at {directory}. Give a local folder."
            )
        root = Path(directory)
        root.mkdir(parents=True, exist_ok=True)
        target = root / f"{split.name}.decoded"
        manifest = _manifest(split)
        if not _is_complete(target, manifest):
            with _locked(root / f".{split.name}.decoded.lock"):
                if not _is_complete(target, manifest):
                    _build(split, target, manifest, threads)
        return cls(str(target))

    def buffer(self, rows: np.ndarray) -> ImageBuffer:
        """The images of some rows, pixels not copied.

        Args:
            rows: int (n,), in any order.
        """
        return ImageBuffer(self._pixels, self._offsets[rows], self._heights[rows], self._widths[rows])


def _manifest(split: SplitInfo) -> dict[str, Any]:
    """What a store was made from: within one cache folder the shards' names and counts identify their content."""
    return {
        "version": _VERSION,
        "shards": [os.path.basename(file) for file in split.files],
        "num_images": split.num_images,
        "num_bytes": split.num_bytes,
        "decoded_bytes": split.decoded_bytes,
    }


def _is_complete(target: Path, manifest: dict[str, Any]) -> bool:
    file = target / _MANIFEST
    return file.is_file() and json.loads(file.read_text()) == manifest


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the kernel drops it when the process dies."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(split: SplitInfo, target: Path, manifest: dict[str, Any], threads: int) -> None:
    prefix = f".{target.name}.building-"
    for leftover in target.parent.glob(f"{prefix}*"):  # of a killed build: we hold the lock, so nobody writes there
        shutil.rmtree(leftover)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        table = _decode_split(split, work / _PIXELS, threads)
        with open(work / _TABLE, "wb") as file:
            np.savez(file, allow_pickle=False, **table)
        (work / _MANIFEST).write_text(json.dumps(manifest))
        if target.exists():
            shutil.rmtree(target)
        os.rename(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _decode_split(split: SplitInfo, pixel_file: Path, threads: int) -> dict[str, np.ndarray]:
    """Write the pixels of all rows; returns the columns of the table."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("labels", "index", "heights", "widths")}
    pixels = _reserve(pixel_file, split.decoded_bytes)
    position = 0
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        for group in list_row_groups(split.files):
            with open_shard(group.file) as shard:
                rows = shard.read_row_group(group.group, columns=list(_COLUMNS))
            heights, widths = (rows[name].to_numpy().astype(np.int32) for name in ("height", "width"))
            sizes = 3 * heights.astype(np.int64) * widths
            starts = position + np.cumsum(sizes) - sizes
            position += int(sizes.sum())
            if position > len(pixels):
                raise DataError(_mismatch(split, f"more than {len(pixels)} bytes of pixels"))
            names = [f"{group.file} row group {group.group} row {i}" for i in range(len(rows))]
            shapes = zip(heights.tolist(), widths.tolist(), strict=True)
            data = (value.as_py() for value in rows["image"])
            list(pool.map(_decode_into, repeat(pixels), starts.tolist(), shapes, data, names))
            columns["labels"].append(rows["label"].to_numpy())
            columns["index"].append(rows["index"].to_numpy())
            columns["heights"].append(heights)
            columns["widths"].append(widths)
    pixels.flush()
    return _checked_table(split, columns, position)


def _reserve(file: Path, num_bytes: int) -> np.memmap:
    """A writable map of a new file, allocated on disk now: a disk full later would end the process by SIGBUS."""
    if num_bytes <= 0:
        raise DataError("The split holds no pixels to decode. Check that it has images.")
    with open(file, "wb") as handle:
        try:
            os.posix_fallocate(handle.fileno(), 0, num_bytes)
        except OSError as error:
            raise DataError(
                f"Cannot reserve {num_bytes / 2**20:.0f} MiB for decoded images in {file.parent.parent}: "
                f"{error.strerror}. Free disk space, set another cache folder, or read the data through Ray Data "
                "(stream=ray)."
            ) from error
    return np.memmap(file, dtype=np.uint8, mode="r+")


def _decode_into(pixels: np.ndarray, start: int, shape: tuple[int, int], data: bytes, name: str) -> None:
    image = decode_image(data, name)
    if image.shape[:2] != shape:
        raise DataError(
            f"{name} decodes to {image.shape[:2]} but its height and width columns say {shape}. Prepare again."
        )
    pixels[start : start + image.size] = image.reshape(-1)


def _checked_table(
    split: SplitInfo, columns: Mapping[str, Sequence[np.ndarray]], num_bytes: int
) -> dict[str, np.ndarray]:
    """The columns of all row groups joined, compared with what the split says of itself."""
    table = {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in columns.items()}
    table = {
        name: values.astype(np.int32 if name in ("heights", "widths") else np.int64) for name, values in table.items()
    }
    if len(table["labels"]) != split.num_images:
        raise DataError(_mismatch(split, f"{len(table['labels'])} images"))
    if num_bytes != split.decoded_bytes:
        raise DataError(_mismatch(split, f"{num_bytes} bytes of pixels"))
    sizes = 3 * table["heights"].astype(np.int64) * table["widths"]
    return table | {"offsets": np.cumsum(sizes) - sizes}


def _mismatch(split: SplitInfo, found: str) -> str:
    return (
        f"The shards of split {split.name!r} hold {found} but its description says {split.num_images} images and "
        f"{split.decoded_bytes} bytes. Delete the cache folder of this data and prepare it again."
    )
