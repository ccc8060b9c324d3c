"""Images whose annotations lie in files of their own (boxes, masks): read when the data is prepared, and checked then.

The images have one class, "image", for the classification contract: pretraining on them is possible, without labels.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from image_data.contracts import DataError
from image_data.layouts.layout import Layout, layout_error
from image_data.sources import Row, SourceIndex, read_files
from image_data.uri import DataUri, FileInfo, Files, map_ahead

__all__ = [
    "PICTURE_ERRORS",
    "Annotated",
    "AnnotatedSource",
    "AnnotationError",
    "clip_box",
    "image_size",
    "known_files",
    "problems_error",
    "size_problem",
]

_CLASS = "image"
_SHOWN = 5  # problems that an error lists
_THREADS = {True: 8, False: 32}  # by "is local": remote storage answers late, but many at a time
_TOLERANCE = 1.0  # pixels that a box may lie outside of its image: rounding, which COCO's boxes show
# What Pillow raises for damaged images; its decoders have no common error.
PICTURE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class AnnotationError(ValueError):
    """What is wrong with one annotation; the caller adds the file."""


@dataclass(frozen=True)
class Annotated:
    """The images of one split and what becomes of each when it is read.

    Attributes:
        names: of the image files, relative to the layout's folder; unique.
        infos: of the image files; None for one that is not there, which counts as unreadable.
        finish: a read row -> the row with its targets, or with the error of what does not fit; called in threads.
        groups: images of one group stay in one split.
        origin: how this split was made, for the record.
    """

    names: Sequence[str]
    infos: Sequence[FileInfo | None]
    finish: Callable[[Row], Row]
    groups: Sequence[str] | None = None
    origin: str = ""


class AnnotatedSource:
    """One split of an annotated data set."""

    def __init__(
        self, files: Files, listed: Sequence[tuple[str, FileInfo | None]], load: Callable[[], Annotated]
    ) -> None:
        """Reads no annotation yet: data that is prepared already needs only the listing.

        Args:
            files: opens the images.
            listed: name and file of every image and annotation file of the split; None for one that is not there.
            load: reads the annotations; called once.
        """
        self._files, self._listed, self._load = files, listed, load
        self._loaded: Annotated | None = None

    def annotated(self) -> Annotated:
        """The images, with their annotations read.

        Raises:
            DataError: from ``load``: annotations that are malformed.
        """
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def listing(self) -> list[str]:
        """Name, size and time of change of the image and annotation files."""
        return [
            f"{name}\tmissing" if info is None else f"{name}\t{info.size}\t{info.stamp}" for name, info in self._listed
        ]

    def index(self) -> SourceIndex:
        """Names and groups; one class."""
        own = self.annotated()
        return SourceIndex(
            own.names, np.zeros(len(own.names), np.int64), (_CLASS,), groups=own.groups, origin=own.origin
        )

    def read(self, wanted: np.ndarray) -> Iterator[Row]:
        """The wanted files with their targets."""
        own = self.annotated()
        threads = _THREADS[self._files.is_local]

        def finish(row: Row) -> Row:
            return row if row.error else own.finish(row)

        return map_ahead(finish, read_files(self._files, own.infos, wanted), threads, 2 * threads)


def known_files(layout: Layout, uri: DataUri, files: Files, folder: str) -> dict[str, FileInfo]:
    """Every file under a folder of the layout, by its name relative to the layout's folder.

    Raises:
        DataError: there is no such folder.
    """
    path = f"{files.root.rstrip('/')}/{folder}"
    if not files.is_dir(path):
        raise layout_error(layout, uri, f"there is no folder {folder}.")
    return {f"{folder}/{info.name}": replace(info, name=f"{folder}/{info.name}") for info in files.walk(path)[0]}


def problems_error(layout: Layout, uri: DataUri, what: str, problems: Sequence[tuple[str, str]]) -> DataError:
    """An error that lists the first few of some problems, each with where it is."""
    lines = "".join(f"\n  {where}: {problem}" for where, problem in problems[:_SHOWN])
    more = f"\n  and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
    return layout_error(layout, uri, f"{what}:{lines}{more}")


def clip_box(box: Sequence[float], size: tuple[int, int]) -> list[float]:
    """A box inside its image, whole numbers kept as such.

    Args:
        box: x0, y0, x1, y1 in pixels, ends excluded.
        size: (width, height) of the image.

    Raises:
        AnnotationError: the box is empty or inverted, or lies outside of the image by more than a pixel.
    """
    x0, y0, x1, y1 = box
    width, height = size
    text = f"the box from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g})"
    if not (x0 < x1 and y0 < y1):  # of NaN neither is true
        raise AnnotationError(f"{text} is empty or inverted")
    overshoot = max(-x0, -y0, x1 - width, y1 - height)
    if overshoot > _TOLERANCE:
        raise AnnotationError(f"{text} is outside of the image of {width} x {height} pixels")
    if overshoot <= 0:
        return list(box)
    clipped = [max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)]
    if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        raise AnnotationError(f"{text} is outside of the image of {width} x {height} pixels")
    return clipped


def image_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) from an image's header; None for what is no image, which is left to the decoder to say."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except PICTURE_ERRORS:
        return None


def size_problem(data: bytes, size: tuple[int, int], said_by: str) -> str:
    """Why an image is not of the size that its annotation says; "" where it is.

    Args:
        data: the encoded image.
        size: (width, height).
        said_by: what says so.
    """
    found = image_size(data)
    if found is None or found == size:
        return ""
    return f"the image has {found[0]} x {found[1]} pixels, {said_by} says {size[0]} x {size[1]}"
