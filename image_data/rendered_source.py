"""``rendered:?key=value``: the procedural data set as sources, one per split, since it divides itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from image_data.contracts import SPLITS, DataError
from image_data.sources import Row, SourceIndex
from image_data.uri import SCHEMES, DataUri, map_ahead

if TYPE_CHECKING:
    from image_data.rendered.dataset import RenderedOptions

__all__ = ["RenderedSource", "open_rendered"]

_OWN_COLUMNS = ("name", "image", "label", "coarse", "height", "width")  # the other keys of a row are further targets
_ORIGIN = "from the renderer (no shape instance in two splits, no held-out class in train)"


def open_rendered(uri: DataUri, split: str, threads: int) -> dict[str, RenderedSource]:
    """Sources of a rendered data set, by split.

    Args:
        uri: with the scheme ``rendered``.
        split: the split that the user named; "" for all of them. "train" brings its val and test along: dividing its
            images would put images of one object into several splits.
        threads: for rendering.
    """
    from image_data.rendered.dataset import parse_options

    if uri.path:
        raise DataError(f"{uri.text}: rendered: has no path, only options; write {SCHEMES['rendered']}.")
    options = parse_options(uri.query)
    names = {"": SPLITS, "train": SPLITS[:3]}.get(split, (split,))
    return {name: RenderedSource(options, name, threads) for name in names}


class RenderedSource:
    """One split of the rendered data set; an image is rendered when it is read."""

    def __init__(self, options: RenderedOptions, split: str, threads: int) -> None:
        self._options, self._split, self._threads = options, split, threads

    def listing(self) -> list[str]:
        """The options and the renderer's code: images of another version must not be found in the cache."""
        code = hashlib.sha256()
        for path in sorted((Path(__file__).parent / "rendered").glob("*.py")):
            code.update(path.read_bytes())
        return [f"{self._split}\t{self._options}\t{code.hexdigest()}"]

    def index(self) -> SourceIndex:
        from image_data.rendered.dataset import COARSE_NAMES, split_class_names, split_size

        class_names = split_class_names(self._options, self._split)
        per_class = split_size(self._options, self._split) // len(class_names)
        per_instance = self._options.images_per_instance
        names = [
            f"{class_name}/{self._split}-{i // per_instance:05d}-{i % per_instance:03d}"
            for class_name in class_names
            for i in range(per_class)
        ]
        coarse = [COARSE_NAMES.index(class_name.partition("/")[0]) for class_name in class_names]
        labels = np.repeat(np.arange(len(class_names)), per_class)
        return SourceIndex(names, labels, class_names, np.array(coarse)[labels], COARSE_NAMES, origin=_ORIGIN)

    def read(self, wanted: np.ndarray) -> Iterator[Row]:
        """Renders the wanted images, all of an instance in one task: they share its geometry."""
        index = self.index()
        positions = np.flatnonzero(wanted)
        instances = np.split(positions, np.flatnonzero(np.diff(positions // self._options.images_per_instance)) + 1)
        for row in chain.from_iterable(map_ahead(self._render, instances, self._threads, 4 * self._threads)):
            expected = (index.names[row.position], index.labels[row.position])
            assert (row.extra.pop("name"), row.extra.pop("label")) == expected  # the renderer's order
            yield row

    def _render(self, positions: np.ndarray) -> list[Row]:
        from image_data.rendered.dataset import rendered_rows

        if not len(positions):
            return []
        start, wanted = int(positions[0]), set(positions.tolist())
        rows = rendered_rows(self._options, self._split, start=start, stop=int(positions[-1]) + 1)
        return [_row(position, row) for position, row in enumerate(rows, start) if position in wanted]


def _row(position: int, row: dict[str, Any]) -> Row:
    kept = {key: value for key, value in row.items() if key in ("name", "label") or key not in _OWN_COLUMNS}
    return Row(position, row["image"], kept)
