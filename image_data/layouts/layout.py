"""What a data set's own on-disk layout is to the rest: a named scheme that opens a folder as its splits.

A layout module states facts (which files, which lists, which labels) and builds ``ListedSource`` (image files) or
``ArraySource`` (pixels inside archives) from them; everything after that is as for any other source.
"""

from __future__ import annotations

import io
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from image_data.contracts import DataError
from image_data.decode import IMAGE_EXTENSIONS
from image_data.sources import Row, RowSource, SourceIndex, build_index, read_files
from image_data.uri import DataUri, FileInfo, Files, available_cpus, map_ahead, some

__all__ = [
    "ArraySource",
    "Arrays",
    "Layout",
    "ListedSource",
    "class_images",
    "describe_folder",
    "find_images",
    "layout_error",
    "list_images",
    "read_text",
]

_ENCODED_AHEAD = 256  # small images per task: encoding one costs about as much as a task


@dataclass(frozen=True)
class Layout:
    """How one data set lies on disk.

    Attributes:
        name: the scheme of its URI, as in ``name:DIR``.
        summary: the data set in one line.
        tree: the expected files, shown in every error about the layout.
        source: where the facts are from.
        open: makes the sources of its splits, keyed by names of ``contracts.SPLITS``, from the URI and the file system
            of its folder. What it lacks of val and test is later taken from train by the seeded rule.
        options: query key to meaning.
    """

    name: str
    summary: str
    tree: str
    source: str
    open: Callable[[DataUri, Files], Mapping[str, RowSource]]
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def example(self) -> str:
        """A URI of it, with its options."""
        query = "&".join(f"{key}={meaning.split(':')[0]}" for key, meaning in self.options.items())
        return f"{self.name}:DIR" + (f"  (options ?{query})" if query else "") + f"  ({self.summary})"


def layout_error(layout: Layout, uri: DataUri, what: str) -> DataError:
    """An error that says what is missing or wrong, and shows the expected files.

    Args:
        layout: the expected one.
        uri: the user's.
        what: the finding, a sentence.
    """
    tree = "\n".join(f"  {line}" for line in layout.tree.strip("\n").splitlines())
    return DataError(f"{uri.text}: {what}\n{layout.name}: expects ({layout.source}):\n{tree}")


def read_text(layout: Layout, uri: DataUri, files: Files, name: str) -> str:
    """A text file of the layout, by its name relative to the folder.

    Raises:
        DataError: it is not there, or not UTF-8.
    """
    path = posixpath.join(files.root, name)
    if not files.exists(path) or files.is_dir(path):
        raise layout_error(layout, uri, f"there is no file {name} (found: {describe_folder(files)}).")
    try:
        return files.read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise layout_error(layout, uri, f"{name} is not UTF-8 text ({error}).") from error


def list_images(layout: Layout, uri: DataUri, files: Files, folder: str) -> list[FileInfo]:
    """The image files anywhere under a folder of the layout; names are relative to that folder. Only lists.

    Raises:
        DataError: the folder is not there or holds no image.
    """
    path = posixpath.join(files.root, folder) if folder else files.root
    if not files.is_dir(path):
        raise layout_error(layout, uri, f"there is no folder {folder or uri.path} (found: {describe_folder(files)}).")
    listed = files.walk(path)[0]
    infos = [info for info in listed if posixpath.splitext(info.name)[1].lower() in IMAGE_EXTENSIONS]
    if not infos:
        found = some((info.name for info in listed), 5) or "nothing"
        raise layout_error(layout, uri, f"no image in {folder or uri.path} (found: {found}).")
    return infos


def class_images(layout: Layout, uri: DataUri, files: Files, folder: str, classes: Sequence[str]) -> list[FileInfo]:
    """The images of some class folders under a folder, named <class>/<image>; no other folder is listed."""
    path = posixpath.join(files.root, folder) if folder else files.root
    present = set(files.names(path))
    missing = [label for label in classes if label not in present]
    if missing:
        raise layout_error(
            layout, uri, f"{folder or files.root} has no folder {some(missing, 5)} (found: {some(sorted(present), 5)})."
        )
    result: list[FileInfo] = []
    for label in classes:
        relative = posixpath.join(folder, label)
        for info in list_images(layout, uri, files, relative):
            result.append(FileInfo(info.path, f"{label}/{info.name}", info.size, info.stamp))
    return result


def find_images(files: Files, names: Sequence[str]) -> list[FileInfo | None]:
    """The files of given names relative to the layout's folder; None for one that is not there."""
    if not files.is_local:
        known = {info.name: info for info in files.walk()[0]}
        return [known.get(posixpath.normpath(name)) for name in names]
    return [_local_info(os.path.join(files.root, name), name) for name in names]


def _local_info(path: str, name: str) -> FileInfo | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return FileInfo(path, name, status.st_size, str(status.st_mtime_ns))


def describe_folder(files: Files) -> str:
    """What lies directly in the layout's folder, for errors."""
    if not files.is_dir():
        return "no such folder"
    return some(files.names(), 10) or "nothing"


class ListedSource:
    """Image files that a layout lists, with their labels."""

    def __init__(
        self,
        uri: DataUri,
        files: Files,
        infos: Sequence[FileInfo | None],
        names: Sequence[str],
        labels: Sequence[Any],
        *,
        class_names: Sequence[str] | None = None,
        coarse: Sequence[Any] | None = None,
        groups: Sequence[Any] | None = None,
        extra: Mapping[str, np.ndarray] | None = None,
        origin: str = "",
    ) -> None:
        """Takes everything in one order.

        Args:
            uri: named in errors.
            files: opens the paths of ``infos``.
            infos: one per image; None for a listed file that is not there, which counts as unreadable.
            names: one per image, unique, independent of where the data set lies.
            labels: class of each image; with ``class_names`` its number among them.
            class_names: in the data set's own order; None puts them in order of value or name.
            coarse: coarse class of each image.
            groups: images of one group stay in one split.
            extra: further targets by column name, one entry per image along the first axis.
            origin: how this split was made, for the record.
        """
        self._uri, self._files, self._infos, self._names = uri, files, infos, names
        self._labels, self._class_names = labels, class_names
        self._coarse, self._groups, self._origin = coarse, groups, origin
        self._extra = dict(extra or {})
        sizes = {
            len(column)
            for column in (infos, names, labels, coarse, groups, *self._extra.values())
            if column is not None
        }
        assert len(sizes) == 1, sizes

    def listing(self) -> list[str]:
        """Names, labels and further targets, with size and time of change of each file."""
        columns = [self._names, self._labels]
        columns += [column for column in (self._coarse, self._groups) if column is not None]
        columns += [np.asarray(column).reshape(len(self._names), -1).tolist() for column in self._extra.values()]
        marks = ("missing" if info is None else f"{info.size}\t{info.stamp}" for info in self._infos)
        rows = zip(marks, *columns, strict=True)
        return [str(self._class_names), *("\t".join(map(str, row)) for row in rows)]

    def index(self) -> SourceIndex:
        """Names, labels, coarse labels and groups as listed."""
        return _index(self._uri, self._names, self._labels, self._class_names, self._coarse, self._groups, self._origin)

    def read(self, wanted: np.ndarray) -> Iterator[Row]:
        """The wanted files with their further targets."""
        for row in read_files(self._files, self._infos, wanted):
            row.extra.update({name: column[row.position] for name, column in self._extra.items()})
            yield row


@dataclass(frozen=True)
class Arrays:
    """Images that a layout keeps as pixels.

    Attributes:
        pixels: uint8 (N, H, W, 3), RGB.
        names: one per image, unique.
        labels: as for ``ListedSource``.
        class_names: likewise.
        coarse: likewise.
        groups: likewise.
        extra: likewise.
    """

    pixels: np.ndarray
    names: Sequence[str]
    labels: Sequence[Any]
    class_names: Sequence[str] | None = None
    coarse: Sequence[Any] | None = None
    groups: Sequence[Any] | None = None
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)


class ArraySource:
    """Images that lie as pixels in few large files; each is encoded as PNG (lossless) when it is read."""

    def __init__(self, uri: DataUri, infos: Sequence[FileInfo], load: Callable[[], Arrays], origin: str = "") -> None:
        """Loads nothing yet: data that is prepared already needs only the listing.

        Args:
            uri: named in errors.
            infos: the files that the arrays come from.
            load: reads them; called once.
            origin: how this split was made, for the record.
        """
        self._uri, self._infos, self._load, self._origin = uri, infos, load, origin
        self._loaded: Arrays | None = None

    def _arrays(self) -> Arrays:
        if self._loaded is None:
            self._loaded = self._load()
            pixels = self._loaded.pixels
            assert (pixels.dtype, pixels.shape[3:]) == (np.uint8, (3,)), (pixels.dtype, pixels.shape)
        return self._loaded

    def listing(self) -> list[str]:
        """Name, size and time of change of the files."""
        return [f"{info.name}\t{info.size}\t{info.stamp}" for info in self._infos]

    def index(self) -> SourceIndex:
        """Names, labels, coarse labels and groups as stored."""
        arrays = self._arrays()
        columns = (arrays.names, arrays.labels, arrays.class_names, arrays.coarse, arrays.groups)
        return _index(self._uri, *columns, self._origin)

    def read(self, wanted: np.ndarray) -> Iterator[Row]:
        """The wanted images as PNG, encoded in threads, in order."""
        arrays = self._arrays()

        def encode(positions: np.ndarray) -> list[Row]:
            return [
                Row(int(i), _png(arrays.pixels[i]), {name: column[i] for name, column in arrays.extra.items()})
                for i in positions
            ]

        positions = np.flatnonzero(wanted)
        chunks = (positions[i : i + _ENCODED_AHEAD] for i in range(0, len(positions), _ENCODED_AHEAD))
        threads = available_cpus()
        for rows in map_ahead(encode, chunks, threads, 2 * threads):
            yield from rows


def _index(
    uri: DataUri,
    names: Sequence[str],
    labels: Sequence[Any],
    class_names: Sequence[str] | None,
    coarse: Sequence[Any] | None,
    groups: Sequence[Any] | None,
    origin: str,
) -> SourceIndex:
    """The index of a split; labels are numbered by value or name, unless the data set has an order of its own."""
    index = build_index(uri, names, labels, coarse, groups)
    ids, ordered = index.labels, index.class_names
    if class_names is not None:
        numbers = np.array([int(name) for name in ordered], np.int64)
        if numbers.min() < 0 or numbers.max() >= len(class_names):
            raise DataError(
                f"{uri.text}: labels from {numbers.min()} to {numbers.max()}, but there are names for 0 to "
                f"{len(class_names) - 1}; the files do not belong together."
            )
        ids, ordered = numbers[ids], tuple(class_names)
    return SourceIndex(index.names, ids, ordered, index.coarse, index.coarse_names, index.groups, origin)


def _png(pixels: np.ndarray) -> bytes:
    """Lossless; level 1 is a third of the time of the default for a few per cent more bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
