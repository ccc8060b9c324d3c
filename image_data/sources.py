"""Where images come from: one streaming interface over every supported layout.

A source is used in two passes, so that splits and subsets are decided before an image is loaded: ``index()`` reads
names and labels, ``read(wanted)`` then delivers the encoded bytes of the wanted rows in storage order, with bounded
memory.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from image_data.contracts import DataError
from image_data.decode import IMAGE_EXTENSIONS
from image_data.uri import SCHEMES, DataUri, FileInfo, Files, map_ahead, parse_uri, scheme_example, some

__all__ = ["CsvSource", "FolderSource", "Row", "RowSource", "SourceIndex", "build_index", "open_rows", "read_files"]

# Folders that hold splits, not classes: ImageNet's and most others' names for them.
_SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "test", "testing"}

_NUMBER = re.compile(r"-?[0-9]+")
_READ_THREADS = {True: 8, False: 32}  # by "is local": remote storage answers late, but many at a time


@dataclass(frozen=True)
class SourceIndex:
    """What is known of a source's images without loading them, in storage order.

    Attributes:
        names: one per image, independent of where the source lies.
        labels: int64 (N,), indices into ``class_names``.
        class_names: in order: numbers by value, else by name.
        coarse: int64 (N,), indices into ``coarse_names``; None where the source has none.
        coarse_names: names of the coarse labels.
        groups: images of one group must not be divided between splits; None where the source has none.
        origin: how the source itself made its split, where it did; "" otherwise.
    """

    names: Sequence[str]
    labels: np.ndarray
    class_names: tuple[str, ...]
    coarse: np.ndarray | None = None
    coarse_names: tuple[str, ...] = ()
    groups: Sequence[str] | None = None
    origin: str = ""


@dataclass(frozen=True)
class Row:
    """One image as stored.

    Attributes:
        position: in the source's index.
        data: encoded bytes.
        extra: further targets, column name to value.
        error: why there are no bytes; "" when there are.
    """

    position: int
    data: bytes
    extra: dict[str, Any] = field(default_factory=dict)
    error: str = ""


class RowSource(Protocol):
    """What every source offers."""

    def listing(self) -> list[str]:
        """Lines that change whenever the content does, and do not tell where the source lies."""
        ...

    def index(self) -> SourceIndex:
        """Names, labels and groups of all images."""
        ...

    def read(self, wanted: np.ndarray) -> Iterator[Row]:
        """The rows whose entry in ``wanted``, bool (N,), is true, in storage order."""
        ...


def open_rows(uri: str | DataUri) -> RowSource:
    """Opens a source of a general scheme.

    What divides itself has its own door: ``rendered:`` in ``image_data.rendered_source``, the data sets with a layout
    of their own in ``image_data.layouts``.

    Raises:
        DataError: unknown scheme or option, nothing there, or a layout that does not fit the scheme.
    """
    from image_data.parquet_source import ParquetSource
    from image_data.webdataset import WebDatasetSource

    uri = parse_uri(uri) if isinstance(uri, str) else uri
    opener = {"folder": FolderSource, "csv": CsvSource, "parquet": ParquetSource, "webdataset": WebDatasetSource}
    return opener[uri.scheme](uri)


def build_index(
    uri: DataUri,
    names: Sequence[str],
    labels: Sequence[Any],
    coarse: Sequence[Any] | None = None,
    groups: Sequence[Any] | None = None,
) -> SourceIndex:
    """Numbers the labels of a source.

    Args:
        uri: named in errors.
        names: one per image.
        labels: class of each image: text, whole numbers or booleans.
        coarse: coarse class of each image.
        groups: group of each image.

    Raises:
        DataError: no images, or an image without a label.
    """
    if not names:
        raise DataError(f"{uri.text}: no images found; expected {scheme_example(uri.scheme)}.")
    label_ids, class_names = _number(uri, names, labels, "label")
    coarse_ids, coarse_names = (None, ()) if coarse is None else _number(uri, names, coarse, "coarse label")
    group_names = (
        None if groups is None else [_label_text(uri, n, g, "group") for n, g in zip(names, groups, strict=True)]
    )
    return SourceIndex(names, label_ids, class_names, coarse_ids, coarse_names, group_names)


def _number(uri: DataUri, names: Sequence[str], values: Sequence[Any], what: str) -> tuple[np.ndarray, tuple[str, ...]]:
    texts = [_label_text(uri, name, value, what) for name, value in zip(names, values, strict=True)]
    distinct = set(texts)
    numeric = all(_NUMBER.fullmatch(text) for text in distinct)
    ordered = tuple(sorted(distinct, key=(lambda text: (int(text), text)) if numeric else None))
    ids = {text: i for i, text in enumerate(ordered)}
    return np.fromiter((ids[text] for text in texts), np.int64, len(texts)), ordered


def _label_text(uri: DataUri, name: str, value: Any, what: str) -> str:
    if isinstance(value, (list, dict, float, bytes)):
        raise DataError(
            f"{uri.text}: the {what} of {name} is {value!r}; a {what} must be text or a whole number, one per image."
        )
    text = "" if value is None else str(value).strip()
    if not text:
        raise DataError(f"{uri.text}: {name} has no {what}; give it one or leave the image out.")
    return text


def read_files(files: Files, infos: Sequence[FileInfo | None], wanted: np.ndarray) -> Iterator[Row]:
    """Reads whole files in threads, in order, a bounded number ahead; None stands for a file that is not there."""

    def read(position: int) -> Row:
        info = infos[position]
        if info is None:
            return Row(position, b"", error="no such file")
        try:
            return Row(position, files.read(info.path))
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            return Row(position, b"", error=error.strerror or type(error).__name__)

    threads = _READ_THREADS[files.is_local]
    return map_ahead(read, (int(i) for i in np.flatnonzero(wanted)), threads, 4 * threads)


class FolderSource:
    """``folder:PATH``: PATH/<class>/**/<image>, as torchvision's ImageFolder."""

    def __init__(self, uri: DataUri) -> None:
        uri.check_keys(())
        self._uri = uri
        self._files = Files(uri.path)
        if not self._files.is_dir():
            problem = "is a file, not a folder" if self._files.exists() else "does not exist"
            raise DataError(f"{uri.text}: the folder {uri.path} {problem}. {_TREE}")
        infos, folders = self._files.walk()
        self._infos = [info for info in infos if posixpath.splitext(info.name)[1].lower() in IMAGE_EXTENSIONS]
        self._check_layout(infos, sorted({name for name in folders if "/" not in name}))

    def _check_layout(self, infos: Sequence[FileInfo], classes: Sequence[str]) -> None:
        uri, found = self._uri, some(info.name for info in infos)
        if not classes:
            raise DataError(f"{uri.text}: no class folders in {uri.path} (found: {found or 'nothing'}). {_TREE}")
        loose = [info.name for info in self._infos if "/" not in info.name]
        if loose:
            raise DataError(f"{uri.text}: images outside of any class folder: {some(loose, 5)}. {_TREE}")
        if set(map(str.lower, classes)) <= _SPLIT_FOLDERS:
            parts = " ".join(f"SPLIT=folder:{posixpath.join(uri.path, name)}" for name in classes)
            raise DataError(
                f"{uri.text}: {uri.path} holds folders of splits ({', '.join(classes)}), not of classes. Name them: "
                f"{parts}, where SPLIT is train, val, test, val_classes or novel_classes."
            )
        filled = {info.name.split("/", 1)[0] for info in self._infos}
        empty = [name for name in classes if name not in filled]
        if empty:
            raise DataError(
                f"{uri.text}: class folders without an image: {some(empty)}. Put images ("
                f"{' '.join(sorted(IMAGE_EXTENSIONS))}) there or remove the folders."
            )

    def listing(self) -> list[str]:
        return _listing(self._infos)

    def index(self) -> SourceIndex:
        names = [info.name for info in self._infos]
        return build_index(self._uri, names, [name.split("/", 1)[0] for name in names])

    def read(self, wanted: np.ndarray) -> Iterator[Row]:
        return read_files(self._files, self._infos, wanted)


_TREE = "Expected:\n  PATH/cat/001.jpg\n  PATH/cat/002.png\n  PATH/dog/003.jpg"


class CsvSource:
    """``csv:FILE?root=DIR&image=filename&label=label&coarse=&group=``: a table with a header, beside the image files.

    ``root`` is by default the folder ``images`` next to the table where there is one (so miniImageNet ships), else the
    table's folder. A table that ends in .tsv is separated by tabs.
    """

    def __init__(self, uri: DataUri) -> None:
        uri.check_keys(("root", "image", "label", "coarse", "group"))
        self._uri = uri
        table_files = Files(uri.path)
        if not table_files.exists() or table_files.is_dir():
            raise DataError(f"{uri.text}: there is no file {uri.path}; write {SCHEMES['csv']}.")
        self._content = table_files.read(table_files.root)
        self._columns = self._read_columns()
        self._files = Files(uri.query.get("root") or _default_root(uri.path))
        if not self._files.is_dir():
            raise DataError(f"{uri.text}: the folder of images {uri.query.get('root')} does not exist; check root=.")
        self._names: list[str] = self._columns[uri.query.get("image", "filename")]
        repeated = _repeated(self._names)
        if repeated:
            raise DataError(
                f"{uri.text}: listed more than once: {some(repeated, 5)}. An image may have one row only, or it would "
                "get into several splits."
            )
        self._infos = self._find_files()

    def _read_columns(self) -> dict[str, list[str]]:
        uri, query = self._uri, self._uri.query
        try:
            text = self._content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{uri.text}: the table is not UTF-8 text ({error}). Save it as UTF-8.") from error
        delimiter = "\t" if uri.path.lower().endswith(".tsv") else ","
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        wanted = [query.get("image", "filename"), query.get("label", "label")]
        wanted += [query[key] for key in ("coarse", "group") if key in query]
        found = list(reader.fieldnames or [])
        missing = [column for column in wanted if column not in found]
        if missing:
            raise DataError(
                f"{uri.text}: no column {', '.join(missing)} in the table; its first line has: "
                f"{', '.join(found) or 'nothing'}. Name the columns: csv:FILE?image=COLUMN&label=COLUMN."
            )
        rows = list(reader)
        return {column: [row[column] or "" for row in rows] for column in wanted}

    def _find_files(self) -> list[FileInfo | None]:
        if not self._files.is_local:
            known = {info.name: info for info in self._files.walk()[0]}
            return [known.get(posixpath.normpath(name)) for name in self._names]
        return [_local_info(os.path.join(self._files.root, name), name) for name in self._names]

    def listing(self) -> list[str]:
        table = f"table\t{hashlib.sha256(self._content).hexdigest()}"
        return [table, *_listing(info for info in self._infos if info)]

    def index(self) -> SourceIndex:
        query = self._uri.query
        coarse, groups = (self._columns[query[key]] if key in query else None for key in ("coarse", "group"))
        return build_index(self._uri, self._names, self._columns[query.get("label", "label")], coarse, groups)

    def read(self, wanted: np.ndarray) -> Iterator[Row]:
        return read_files(self._files, self._infos, wanted)


def _default_root(table: str) -> str:
    folder = posixpath.dirname(table) or "."
    images = posixpath.join(folder, "images")
    return images if Files(images).is_dir() else folder


def _local_info(path: str, name: str) -> FileInfo | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return FileInfo(path, name, status.st_size, str(status.st_mtime_ns))


def _repeated(names: Iterable[str]) -> list[str]:
    seen: set[str] = set()
    return [name for name in names if name in seen or seen.add(name)]


def _listing(infos: Iterable[FileInfo]) -> list[str]:
    return [f"{info.name}\t{info.size}\t{info.stamp}" for info in infos]
