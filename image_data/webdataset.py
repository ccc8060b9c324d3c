"""``webdataset:PATTERN?image=&label=&coarse=&group=``: tar shards in WebDataset's layout, read by ``tarfile`` alone.

Members with the same path up to the first dot of the file name make one sample, for example ``0001.jpg`` and
``0001.cls`` or ``0001.json``. The label is the text of the member ``.cls``, else the key ``label`` of ``.json``; with
``label=x`` it is the member ``.x``, else the key ``x`` of ``.json``. Nothing is unpickled.
"""

from __future__ import annotations

import json
import posixpath
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from image_data.contracts import DataError
from image_data.decode import IMAGE_EXTENSIONS
from image_data.sources import Row, SourceIndex, build_index
from image_data.uri import SCHEMES, DataUri, FileInfo, Files

__all__ = ["WebDatasetSource", "expand_braces"]

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^(\d+)\.\.(\d+)$")


@dataclass
class _Sample:
    """Members of one sample; of images and texts only those that were asked for are loaded."""

    key: str
    images: dict[str, bytes] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)

    def value(self, name: str) -> Any:
        """The text of the member ``.name``, else the key ``name`` of ``.json``, else None."""
        if name in self.texts:
            return self.texts[name].decode("utf-8").strip()
        record = json.loads(self.texts["json"]) if "json" in self.texts else {}
        return record.get(name) if isinstance(record, dict) else None

    def extensions(self) -> str:
        """What the sample has, for errors."""
        return ", ".join("." + name for name in (*self.images, *self.texts)) or "no image and no label"


class WebDatasetSource:
    """Tar shards named by a path, a glob pattern, or braces: ``train-{000..012}.tar``, ``{train,extra}.tar``."""

    def __init__(self, uri: DataUri) -> None:
        uri.check_keys(("image", "label", "coarse", "group"))
        self._uri = uri
        self._infos: list[FileInfo] = []
        paths = expand_braces(uri.path)
        self._files = Files(paths[0])
        for path in paths:
            found = self._files.glob(Files(path).root)
            if not found:
                raise DataError(f"{uri.text}: there is no tar shard {path}; write {SCHEMES['webdataset']}.")
            self._infos += found
        query = uri.query
        self._label_keys = [query["label"]] if "label" in query else ["cls", "label"]
        self._text_names = {"json", *self._label_keys, *(query[k] for k in ("coarse", "group") if k in query)}

    def listing(self) -> list[str]:
        return [f"{info.name}\t{info.size}\t{info.stamp}" for info in self._infos]

    def index(self) -> SourceIndex:
        names: list[str] = []
        columns: dict[str, list[Any]] = {key: [] for key in ("label", "coarse", "group")}
        for info in self._infos:
            for sample in self._samples(info, None):
                name = f"{info.name}/{sample.key}"
                self._image(sample, name)
                names.append(name)
                columns["label"].append(self._value(sample, name, self._label_keys, "label"))
                for key in ("coarse", "group"):
                    if key in self._uri.query:
                        columns[key].append(self._value(sample, name, [self._uri.query[key]], key))
        coarse, groups = (columns[key] if key in self._uri.query else None for key in ("coarse", "group"))
        return build_index(self._uri, names, columns["label"], coarse, groups)

    def read(self, wanted: np.ndarray) -> Iterator[Row]:
        start = 0
        for info in self._infos:
            count = 0
            for count, sample in enumerate(self._samples(info, wanted[start:]), 1):
                if wanted[start + count - 1]:
                    yield Row(start + count - 1, self._image(sample, sample.key))
            start += count

    def _samples(self, info: FileInfo, wanted: np.ndarray | None) -> Iterator[_Sample]:
        """Samples of one shard, read front to back: the texts (wanted is None), or the images of the wanted ones."""
        sample: _Sample | None = None
        number = -1
        try:
            with self._files.open(info.path) as file, tarfile.open(fileobj=file, mode="r:*") as tar:
                for member in tar:
                    key, name = _split_name(member.name)
                    if not member.isfile() or not key:
                        continue
                    if sample is None or sample.key != key:
                        if sample is not None:
                            yield sample
                        sample, number = _Sample(key), number + 1
                    self._add(tar, member, name, sample, None if wanted is None else bool(wanted[number]))
                if sample is not None:
                    yield sample
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise DataError(f"{self._uri.text}: the shard {info.name} is not a readable tar file: {error}") from error

    def _add(
        self, tar: tarfile.TarFile, member: tarfile.TarInfo, name: str, sample: _Sample, load_image: bool | None
    ) -> None:
        """Adds a member to its sample; load_image is None in the pass over the texts."""
        chosen = self._uri.query.get("image")
        if name == chosen or (chosen is None and f".{name}" in IMAGE_EXTENSIONS):
            sample.images[name] = _content(tar, member) if load_image else b""
        elif name in self._text_names and load_image is None:
            sample.texts[name] = _content(tar, member)

    def _image(self, sample: _Sample, name: str) -> bytes:
        if len(sample.images) == 1:
            return next(iter(sample.images.values()))
        problem = "several images" if sample.images else "no image"
        raise DataError(
            f"{self._uri.text}: the sample {name} has {problem} (found: {sample.extensions()}). Name the image's "
            "extension with ?image=, for example image=jpg."
        )

    def _value(self, sample: _Sample, name: str, keys: Sequence[str], what: str) -> Any:
        for key in keys:
            try:
                value = sample.value(key)
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise DataError(f"{self._uri.text}: the sample {name} has an unreadable {what}: {error}") from error
            if value is not None:
                return value
        raise DataError(
            f"{self._uri.text}: the sample {name} has no {what}: neither a member .{keys[0]} nor a key {keys[-1]!r} in "
            f".json (found: {sample.extensions()}). Name it with ?{what}=."
        )


def expand_braces(pattern: str) -> list[str]:
    """``a-{08..10}.tar`` -> a-08.tar, a-09.tar, a-10.tar; ``{a,b}.tar`` -> a.tar, b.tar."""
    parts = _BRACES.split(pattern)
    choices = [_choices(part) if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*choices)]


def _choices(inside: str) -> list[str]:
    match = _RANGE.match(inside)
    if not match:
        return inside.split(",")
    first, last = match.groups()
    if int(last) < int(first):
        raise DataError(f"{{{inside}}}: the range runs backwards; write {{{last}..{first}}}.")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def _split_name(path: str) -> tuple[str, str]:
    """(key, extension in lower case): the name is cut at the first dot of its last part."""
    folder, name = posixpath.split(path)
    stem, _, extension = name.partition(".")
    return posixpath.join(folder, stem) if stem else "", extension.lower()


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # only files are offered
    return file.read()
