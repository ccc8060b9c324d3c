"""What a prepared data set is: packed shards per split and the record of how they came about."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from image_data.contracts import SPLITS, DataError
from image_data.uri import Files, some

__all__ = ["MANIFEST", "PreparedData", "SplitInfo"]

MANIFEST = "prepared.json"  # written last: a folder without it is not complete


@dataclass(frozen=True)
class SplitInfo:
    """One split of a prepared data set.

    Attributes:
        name: one of ``SPLITS``.
        files: its Parquet shards, in the order of ``index``.
        num_images: images in all of them.
        class_names: by label; the same for train, val and test.
        class_counts: images per label; 0 where a class of train has none in val or test.
        num_bytes: of all encoded images.
        decoded_bytes: of all images as RGB.
        coarse_names: by value of the column ``coarse``, the same for all splits; empty where there is no such column.
    """

    name: str
    files: tuple[str, ...]
    num_images: int
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    num_bytes: int
    decoded_bytes: int
    coarse_names: tuple[str, ...] = ()

    def sentence(self) -> str:
        """Images, classes and their sizes, for the log."""
        counts = sorted(count for count in self.class_counts if count)
        each = f"{counts[0]:,}" if counts[0] == counts[-1] else f"{counts[0]:,} to {counts[-1]:,}"
        empty = len(self.class_counts) - len(counts)
        without = f"; {empty} classes have none" if empty else ""
        return f"{self.num_images:,} images of {len(counts)} classes, {each} each{without}"


@dataclass(frozen=True)
class PreparedData:
    """A prepared data set.

    Attributes:
        directory: local folder or URI of the shards.
        fingerprint: key of the cache: configuration and listing of the source (names, sizes, times of change).
        content: hash of all names, labels and bytes: equal for the same data on every machine.
        rule: how the splits were made.
        splits: by name, in the order of ``SPLITS``.
        skipped: (name, reason) of the images that could not be read.
        source: the data URIs.
    """

    directory: str
    fingerprint: str
    content: str
    rule: str
    splits: dict[str, SplitInfo]
    skipped: tuple[tuple[str, str], ...]
    source: tuple[str, ...]

    def split(self, name: str) -> SplitInfo:
        """A split by name.

        Raises:
            DataError: there is no such split.
        """
        if name in self.splits:
            return self.splits[name]
        hint = f" Give it as {name}=URI, or let the seeded rule make it." if name in SPLITS else ""
        raise DataError(
            f"{' '.join(self.source)} has no split {name!r}; it has {', '.join(self.splits)}. They were made so: "
            f"{self.rule}.{hint}"
        )

    def to_json(self) -> str:
        """The record, with the names of the files relative to the folder."""
        record = asdict(self)
        del record["directory"]
        for split in record["splits"].values():
            split["files"] = [posixpath.basename(file) for file in split["files"]]
        return json.dumps(record, indent=1)

    @classmethod
    def from_json(cls, text: str, directory: str) -> PreparedData:
        """Inverse of ``to_json`` for a folder that may have moved."""
        record = json.loads(text)
        splits = {}
        for name, split in record.pop("splits").items():
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in split.items()}
            values["files"] = tuple(posixpath.join(directory, file) for file in split["files"])
            splits[name] = SplitInfo(**values)
        skipped = tuple((name, reason) for name, reason in record.pop("skipped"))
        return cls(directory=directory, splits=splits, skipped=skipped, source=tuple(record.pop("source")), **record)

    @classmethod
    def find(cls, directory: str) -> PreparedData | None:
        """The complete data set in a folder or at a URI; None where there is none."""
        files = Files(directory)
        present = {info.name for info in files.walk()[0]} if files.is_dir() else set()
        if MANIFEST not in present:
            return None
        prepared = cls.from_json(files.read(posixpath.join(files.root, MANIFEST)).decode(), directory)
        needed = {posixpath.basename(file) for split in prepared.splits.values() for file in split.files}
        return prepared if needed <= present else None

    @classmethod
    def load(cls, directory: str) -> PreparedData:
        """Opens what ``prepare`` made.

        Raises:
            DataError: nothing complete is there.
        """
        prepared = cls.find(directory)
        if prepared is None:
            raise DataError(f"{directory} holds no complete prepared data. Call prepare() to make it.")
        return prepared

    def report(self, log: Callable[[str], None]) -> None:
        """Tells the splits, the rule and what was left out."""
        log(f"data {' '.join(self.source)} ({self.fingerprint})")
        log(f"  splits: {self.rule}")
        for name, split in self.splits.items():
            log(f"  {name}: {split.sentence()}")
        if self.skipped:
            log(f"  {len(self.skipped)} unreadable images left out: {some(f'{n} ({r})' for n, r in self.skipped)}")
