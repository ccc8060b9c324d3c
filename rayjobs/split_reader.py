"""Images of a prepared split for an evaluation: the plain evaluation view, augmented views, chosen pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.metric import Phase, check_split
from image_data import RECIPES
from image_data.contracts import ImageBatch
from image_data.prepared import PreparedData
from image_data.store import DecodedStore
from image_data.stream import MemoryStream
from image_data.views import ViewMaker, ViewRecipe, find_recipe
from rayjobs.configs import TrainConfig

__all__ = ["FEATURE_BATCH", "SplitReader", "evaluation_view"]

FEATURE_BATCH = 256  # images per forward pass of the frozen backbone


def evaluation_view() -> ViewRecipe:
    """The view in which backbones are judged: resized and centre-cropped."""
    return RECIPES["evaluation"]


@dataclass(frozen=True)
class SplitReader:
    """Reads splits in this process: from memory where the decoded split fits, else streamed by Ray Data.

    Attributes:
        data: prepared data.
        settings: image size, threads, and where images are read from.
        phase: refuses the report's splits while hyperparameters are being chosen.
        seed: of augmented views and of shuffling.
    """

    data: PreparedData
    settings: TrainConfig
    phase: Phase
    seed: int = 0

    def batches(self, split: str) -> Iterator[ImageBatch]:
        """Every image of a split once, in the evaluation view, by index."""
        return self._stream(split, evaluation_view(), FEATURE_BATCH, shuffle=False).epoch(0)

    def views(
        self, split: str, recipe: str, *, epoch: int = 0, shuffle: bool = False, batch_size: int = FEATURE_BATCH
    ) -> Iterator[ImageBatch]:
        """Every image of a split once, in an augmented view; the arguments of ``evaluation.metric.ViewFeatures``."""
        check_split(self.phase, split)
        return self._stream(split, find_recipe(recipe), batch_size, shuffle).epoch(epoch)

    def images(self, split: str, rows: Sequence[int], image_size: int = 0) -> np.ndarray:
        """Chosen images in the evaluation view; see ``evaluation.metric.ImageReader``."""
        check_split(self.phase, split)
        side = image_size or self.settings.image_size
        wanted = np.asarray(rows, np.int64)
        info = self.data.split(split)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < info.num_images:
            raise ValueError(
                f"rows {wanted.min()} to {wanted.max()} of split {split!r} were asked for; it has {info.num_images}."
            )
        if self._in_memory(split):
            store = self._store(split)
            maker = ViewMaker([evaluation_view()], side, self.seed)
            return maker(store.buffer(wanted), 0, store.index[wanted], threads=self._threads)[0]
        found: dict[int, np.ndarray] = {}
        needed = set(wanted.tolist())
        for batch in self._stream(split, evaluation_view(), FEATURE_BATCH, shuffle=False, image_size=side).epoch(0):
            found |= {
                int(i): view.copy() for i, view in zip(batch.index, batch.views[0], strict=True) if int(i) in needed
            }
            if len(found) == len(needed):
                break
        return np.stack([found[int(i)] for i in wanted])

    def _stream(self, split: str, recipe: ViewRecipe, batch_size: int, shuffle: bool, image_size: int = 0) -> Any:
        options: dict[str, Any] = dict(
            image_size=image_size or self.settings.image_size,
            batch_size=min(batch_size, self.data.split(split).num_images),
            shuffle=shuffle,
            drop_last=False,
            seed=self.seed,
        )
        if self._in_memory(split):
            return MemoryStream(self._store(split), [recipe], threads=self._threads, **options)
        from image_data.ray_stream import RayDataStream

        return RayDataStream(self.data.split(split), [recipe], **options)

    def _store(self, split: str) -> DecodedStore:
        return DecodedStore.open(self.data.split(split), self.data.directory, threads=self._threads)

    def _in_memory(self, split: str) -> bool:
        from rayjobs.job import uses_memory

        return uses_memory(self.settings, self.data, split)

    @property
    def _threads(self) -> int:
        return max(1, int(self.settings.cpus_per_worker))
