"""Writing packed shards: images arrive in storage order, leave in shuffled order, and memory stays bounded.

Bytes go to one spool file as they come; what is small (names, labels, sizes, poses) is kept in memory. A split's shards
are then written in its own order by random reads from the spool.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from image_data.contracts import DataError
from image_data.decode import UnreadableImage, decode_image
from image_data.plan import Images
from image_data.sources import Row
from image_data.splits import seeded_order
from image_data.uri import map_ahead

__all__ = ["PackedSplit", "Spool", "Verified", "verify", "write_split"]

SHARD_BYTES = 32 * 2**20  # 16 to 64 MB suit Ray Data's block size
MIN_SHARDS = 8  # so that several workers share even a small split
MIN_SHARDED_IMAGES = 512  # below, one shard
ROW_GROUP_ROWS = 1024
ROW_GROUP_BYTES = 16 * 2**20
_CHUNK = 16  # images per task of the verifying threads: a task costs about as much as decoding a small image


@dataclass(frozen=True)
class _Blob:
    """Where a value's bytes lie in the spool."""

    offset: int
    size: int


@dataclass
class Verified:
    """A row that was decoded once: its size, or why it could not be read."""

    row: Row
    height: int = 0
    width: int = 0
    error: str = ""


def verify(rows: Iterator[Row], threads: int) -> Iterator[Verified]:
    """Decodes every image once, in threads, in order."""

    def check(chunk: list[Row]) -> list[Verified]:
        return [_verify_one(row) for row in chunk]

    for chunk in map_ahead(check, _chunks(rows), threads, 2 * threads + 2):
        yield from chunk


def _verify_one(row: Row) -> Verified:
    if row.error:
        return Verified(row, error=row.error)
    try:
        height, width, _ = decode_image(row.data).shape
    except UnreadableImage as error:
        return Verified(row, error=error.reason)
    return Verified(row, height, width)


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


class Spool:
    """The good images of one source: bytes in a file, the rest in memory.

    Attributes:
        height: int32 (rows of the index,), 0 where there is no good image.
        width: likewise.
        sizes: int64 (rows of the index,), encoded bytes of each image.
        types: Arrow type of each further target.
    """

    def __init__(self, path: Path, num_rows: int) -> None:
        """Makes an empty spool for the rows of an index."""
        self._file = open(path, "w+b")  # noqa: SIM115 - closed by close()
        self._end = 0
        self._offsets = np.zeros(num_rows, np.int64)
        self._extras: dict[int, dict[str, Any]] = {}
        self.sizes = np.zeros(num_rows, np.int64)
        self.height = np.zeros(num_rows, np.int32)
        self.width = np.zeros(num_rows, np.int32)
        self.types: dict[str, pa.DataType | None] = {}

    def add(self, verified: Verified) -> None:
        """Keeps one good image."""
        row = verified.row
        image = self._append(row.data)
        self._offsets[row.position], self.sizes[row.position] = image.offset, image.size
        self.height[row.position], self.width[row.position] = verified.height, verified.width
        if row.extra:
            for name, value in row.extra.items():
                self.types[name] = _joint_type(name, self.types.get(name), _arrow_type(value))
            self._extras[row.position] = {
                name: self._append(value) if isinstance(value, bytes) else value for name, value in row.extra.items()
            }

    def image(self, position: int) -> bytes:
        """An image's encoded bytes."""
        return self._load(_Blob(int(self._offsets[position]), int(self.sizes[position])))

    def target(self, position: int, name: str) -> Any:
        """A further target of an image; None where it has none."""
        value = self._extras.get(position, {}).get(name)
        if isinstance(value, np.ndarray):
            return value.tolist()
        return self._load(value) if isinstance(value, _Blob) else value

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _append(self, data: bytes) -> _Blob:
        blob = _Blob(self._end, len(data))
        self._file.write(data)
        self._end += len(data)
        return blob

    def _load(self, blob: _Blob) -> bytes:
        self._file.flush()
        return os.pread(self._file.fileno(), blob.size, blob.offset)


def _arrow_type(value: Any) -> pa.DataType | None:
    """Bytes are binary, whole numbers int64, numbers float32, arrays (nested) lists of these; None has no type."""
    if value is None:
        return None
    if isinstance(value, bytes):
        return pa.binary()
    array = np.asarray(value)
    kinds = {"U": pa.string(), "b": pa.bool_(), "i": pa.int64(), "u": pa.int64(), "f": pa.float32()}
    kind = kinds[array.dtype.kind]
    for _ in range(array.ndim):
        kind = pa.list_(kind)
    return kind


def _joint_type(name: str, known: pa.DataType | None, new: pa.DataType | None) -> pa.DataType | None:
    if known is None or new is None or known == new:
        return new if known is None else known
    if {str(known), str(new)} == {"int64", "float"}:
        return pa.float32()
    raise DataError(f"the target {name} has values of different types: {known} and {new}.")


@dataclass
class PackedSplit:
    """What was written of one split: file names, sums over its images, and a hash of names, labels, bytes, targets."""

    files: list[str] = field(default_factory=list)
    num_images: int = 0
    num_bytes: int = 0
    decoded_bytes: int = 0
    class_counts: tuple[int, ...] = ()
    content: str = ""


def write_split(directory: Path, name: str, images: Images, spools: Sequence[Spool], seed: int) -> PackedSplit:
    """Writes the shards of one split, its images in an order that depends on the seed and their names only.

    Args:
        directory: receives ``<name>-00000.parquet`` and so on.
        name: of the split.
        images: its images; those that no spool holds are left out.
        spools: by number of the source.
        seed: of the order.

    Raises:
        DataError: no image of the split could be read.
    """
    images = images.take(_gather(images, [spool.height for spool in spools]) > 0)
    if not images.names:
        raise DataError(f"no image of {name} could be read.")
    images = images.take(seeded_order(images.names, seed, f"shuffle {name}"))
    num_images = len(images.names)
    num_bytes = int(_gather(images, [spool.sizes for spool in spools]).sum())
    num_shards = max(1, -(-num_bytes // SHARD_BYTES), MIN_SHARDS if num_images >= MIN_SHARDED_IMAGES else 1)
    packed = PackedSplit(num_images=num_images, num_bytes=num_bytes)
    packed.class_counts = tuple(np.bincount(images.labels, minlength=len(images.class_names)).tolist())
    types = _target_types([spools[s] for s in np.unique(images.source)])
    content = hashlib.sha256()
    group_rows = max(1, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES // max(1, num_bytes // num_images)))
    for shard, rows in enumerate(np.array_split(np.arange(num_images), min(num_shards, num_images))):
        file = f"{name}-{shard:05d}.parquet"
        groups = (rows[i : i + group_rows] for i in range(0, len(rows), group_rows))
        packed.decoded_bytes += _write_shard(directory / file, images, spools, types, groups, content)
        packed.files.append(file)
    packed.content = content.hexdigest()
    return packed


def _target_types(spools: Sequence[Spool]) -> dict[str, pa.DataType | None]:
    """Types of the further targets of one split's sources."""
    types: dict[str, pa.DataType | None] = {}
    for spool in spools:
        for name, kind in spool.types.items():
            types[name] = _joint_type(name, types.get(name), kind)
    return types


def _write_shard(
    path: Path,
    images: Images,
    spools: Sequence[Spool],
    types: dict[str, pa.DataType | None],
    groups: Iterator[np.ndarray],
    content: hashlib._Hash,
) -> int:
    """Writes one shard, adding to the hash of the content; returns the bytes of its images as RGB."""
    decoded, writer = 0, None
    try:
        for rows in groups:
            table = _table(images, spools, types, rows)
            content.update(_digest(table, sorted(types)))
            if writer is None:
                writer = _open_writer(path, table.schema)
            writer.write_table(table, row_group_size=len(rows))
            height, width = (table[c].to_numpy().astype(np.int64) for c in ("height", "width"))
            decoded += int((3 * height * width).sum())
    finally:
        if writer is not None:
            writer.close()
    return decoded


def _open_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Images are compressed already and all different: no codec, dictionary or statistics for bytes."""
    blobs = [field.name for field in schema if pa.types.is_binary(field.type)]
    others = [field.name for field in schema if field.name not in blobs]
    compression = {name: "none" for name in blobs} | {name: "zstd" for name in others}
    flat = [name for name in others if not pa.types.is_nested(schema.field(name).type)]
    options: dict[str, Any] = {"compression": compression, "use_dictionary": False, "write_statistics": flat}
    return pq.ParquetWriter(path, schema, **options)


def _digest(table: pa.Table, targets: Sequence[str]) -> bytes:
    """Hash of names, labels, encoded images and further targets, whatever the file format does around them."""
    digest = hashlib.sha256()
    for name, label, image in zip(*(table[column] for column in ("name", "label", "image")), strict=True):
        digest.update(f"{name.as_py()}\0{label.as_py()}\0{len(image.as_buffer())}\0".encode())
        digest.update(image.as_buffer())
    for target in targets:
        for value in table[target].to_pylist():
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            digest.update(f"{target}\0{len(data)}\0".encode())
            digest.update(data)
    return digest.digest()


def _table(images: Images, spools: Sequence[Spool], types: dict[str, pa.DataType | None], rows: np.ndarray) -> pa.Table:
    """The rows of one row group."""
    own = images.take(rows)
    places = list(zip((spools[s] for s in own.source), own.position.tolist(), strict=True))
    columns: dict[str, pa.Array] = {
        "image": pa.array([spool.image(position) for spool, position in places], pa.binary()),
        "label": pa.array(own.labels, pa.int64()),
        "index": pa.array(rows, pa.int64()),
        "name": pa.array(own.names, pa.string()),
        "height": pa.array(_gather(own, [spool.height for spool in spools]), pa.int32()),
        "width": pa.array(_gather(own, [spool.width for spool in spools]), pa.int32()),
    }
    if own.coarse_names:
        columns["coarse"] = pa.array(own.coarse, pa.int64())
    for name, kind in types.items():
        columns[name] = pa.array([spool.target(position, name) for spool, position in places], kind or pa.null())
    return pa.table(columns)


def _gather(images: Images, per_source: Sequence[np.ndarray]) -> np.ndarray:
    """One value per image from arrays over the rows of each source."""
    result = np.zeros(len(images.names), per_source[0].dtype)
    for source in np.unique(images.source):
        own = images.source == source
        result[own] = per_source[source][images.position[own]]
    return result
