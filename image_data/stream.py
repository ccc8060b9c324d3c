"""Batches of augmented views: the stream over decoded images in memory, and the last step onto the device.

All streams share one interface (``ImageStream``) and one rule of randomness: the pixels of a view depend on (seed,
epoch, index of the image, number of the view) only, so they are the same whatever stream, batch size or number of
workers delivers them.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from image_data.contracts import IMAGENET_MEAN, IMAGENET_STD, DataError, ImageBatch
from image_data.views import ViewMaker, ViewRecipe

if TYPE_CHECKING:
    import torch

    from image_data.store import DecodedStore

__all__ = ["ImageStream", "MemoryStream", "Prefetcher", "num_steps", "to_device"]

T = TypeVar("T")

_EPOCH_ORDER = 0  # the third seed of an epoch's permutation; windows.py uses other ones


class ImageStream(Protocol):
    """What a train loop sees of a stream; one per worker.

    Attributes:
        num_images: images of the whole split.
        batch_size: images per batch of this worker.
        steps_per_epoch: batches per epoch, the same on every worker.
        wait_seconds: time that consumers have waited for batches since the stream was made; it only grows, so a train
            loop takes differences. The first wait contains the start of the pipeline.
    """

    num_images: int
    batch_size: int
    steps_per_epoch: int
    wait_seconds: float

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[ImageBatch]: ...

    def close(self) -> None: ...


def num_steps(num_images: int, batch_size: int, world_size: int, drop_last: bool) -> int:
    """Batches per worker and epoch.

    Raises:
        DataError: not a single global batch, or an incomplete batch that the workers cannot share equally.
    """
    global_batch = batch_size * world_size
    if batch_size < 1 or world_size < 1:
        raise DataError(f"batch_size is {batch_size} and world_size {world_size}; both must be at least 1.")
    if not drop_last and world_size > 1:
        raise DataError(
            f"drop_last=False with {world_size} workers would give them different numbers of images. Read with one "
            "worker or drop the last batch."
        )
    if num_images < (global_batch if drop_last else 1):
        raise DataError(
            f"The split has {num_images} images but one global batch takes {global_batch} "
            f"({batch_size} on each of {world_size} workers). Lower the batch size or use more data."
        )
    return num_images // global_batch if drop_last else -(-num_images // global_batch)


class _End(NamedTuple):
    """The last item of a prefetcher's queue."""

    error: BaseException | None


class Prefetcher(Generic[T]):
    """Runs an iterator in a background thread, at most ``depth`` items ahead of its consumer.

    An exception of the iterator is raised in the consumer, after the items before it. ``close`` stops and joins the
    thread.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._queue: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
        self._room = threading.Semaphore(max(1, depth))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._produce, args=(items,), name="image-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item = self._queue.get()
        if isinstance(item, _End):
            self._queue.put(_End(None))  # a further call ends too
            if item.error is not None:
                raise item.error
            raise StopIteration
        self._room.release()
        return item

    def close(self) -> None:
        """Stop the producer after the item in work; may be called again."""
        self._stopped.set()
        self._room.release()
        self._thread.join()

    def _produce(self, items: Iterator[T]) -> None:
        error = None
        try:
            self._room.acquire()
            for item in items:
                self._queue.put(item)
                self._room.acquire()
                if self._stopped.is_set():
                    break
        except BaseException as raised:  # not handled here: the consumer raises it
            error = raised
        self._queue.put(_End(error))


class MemoryStream:
    """Augmented batches from a decoded store, made by background threads.

    Every epoch permutes the whole split by (seed, epoch). A global batch is the next ``batch_size * world_size`` images
    and worker r takes its r-th part, so any number of workers sees the same global batches.
    """

    def __init__(
        self,
        store: DecodedStore,
        views: Sequence[ViewRecipe],
        *,
        image_size: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        threads: int = 1,
        prefetch: int = 2,
        backend: Literal["fused", "torchvision"] = "fused",
    ) -> None:
        """Set up the stream; threads start with ``epoch``.

        Args:
            store: the decoded split.
            views: one recipe per view.
            image_size: side of the views in pixels, for recipes without a size of their own.
            batch_size: images per batch of this worker.
            rank: this worker's number, from 0.
            world_size: number of workers.
            seed: of order and augmentation.
            shuffle: False keeps the order of storage, for feature extraction.
            drop_last: False also delivers the last, incomplete batch; one worker only.
            threads: threads that make the views of one batch.
            prefetch: batches made ahead of the consumer.
            backend: ``fused`` kernel or the slow ``torchvision`` reference.

        Raises:
            DataError: a rank outside the workers, or fewer images than one global batch.
        """
        if not 0 <= rank < world_size:
            raise DataError(f"rank is {rank}; with {world_size} workers it must be in 0..{world_size - 1}.")
        self.num_images = store.num_images
        self.batch_size = batch_size
        self.steps_per_epoch = num_steps(store.num_images, batch_size, world_size, drop_last)
        self.wait_seconds = 0.0
        self._store, self._maker = store, ViewMaker(views, image_size, seed, backend)
        self._rank, self._world_size, self._seed, self._shuffle = rank, world_size, seed, shuffle
        self._threads, self._prefetch = threads, prefetch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[ImageBatch]:
        """The batches of one epoch, from ``start_step`` on.

        Ending the loop early (or closing the generator) stops the background thread.
        """
        prefetcher = Prefetcher(self._make(epoch, start_step), self._prefetch)
        try:
            for _ in range(start_step, self.steps_per_epoch):
                began = time.perf_counter()
                batch = next(prefetcher)
                self.wait_seconds += time.perf_counter() - began
                yield batch
        finally:
            prefetcher.close()

    def close(self) -> None:
        """Nothing to release: an epoch's thread ends with its iterator."""

    def rows(self, epoch: int, step: int) -> np.ndarray:
        """Rows of the store in this worker's batch."""
        return self._batch_rows(self._order(epoch), step)

    def _make(self, epoch: int, start_step: int) -> Iterator[ImageBatch]:
        order = self._order(epoch)
        for step in range(start_step, self.steps_per_epoch):
            rows = self._batch_rows(order, step)
            index = self._store.index[rows]
            views = self._maker(self._store.buffer(rows), epoch, index, threads=self._threads)
            yield ImageBatch(views, self._store.labels[rows], index, epoch)

    def _order(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(self.num_images)
        return np.random.default_rng((self._seed, epoch, _EPOCH_ORDER)).permutation(self.num_images)

    def _batch_rows(self, order: np.ndarray, step: int) -> np.ndarray:
        first = (step * self._world_size + self._rank) * self.batch_size
        return order[first : first + self.batch_size]


def to_device(
    batch: ImageBatch,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    channels_last: bool = True,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Copy a batch to the training device as bytes (a quarter of float's traffic) and normalise it there.

    Args:
        batch: what a stream delivered.
        device: CPU, or CUDA: copied from pinned memory without blocking.
        dtype: of the views; None is float32. The arithmetic is float32 in any case.
        channels_last: memory format of the views.
        mean: per channel, for pixels in [0, 1].
        std: likewise.

    Returns:
        Views (B, 3, H, W), (pixel / 255 - mean) / std; labels int64 (B,); index int64 (B,).
    """
    import torch

    target = torch.device(device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    scale, shift = _affine(target, tuple(mean), tuple(std))
    views = []
    for view in batch.views:
        pixels = _copy(view, target).to(torch.float32, memory_format=layout)
        views.append(pixels.mul_(scale).add_(shift).to(dtype or torch.float32))
    return views, _copy(batch.labels, target), _copy(batch.index, target)


@lru_cache(maxsize=8)
def _affine(device: torch.device, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift (1, 3, 1, 1) that normalise bytes, kept on the device."""
    import torch

    center, spread = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (mean, std))
    return (1 / (255 * spread)).float().to(device), (-center / spread).float().to(device)


def _copy(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A tensor of its own memory on the device."""
    import torch

    if device.type != "cuda":
        return torch.tensor(array, device=device)
    pinned = torch.empty(array.shape, dtype=torch.uint8 if array.dtype == np.uint8 else torch.int64, pin_memory=True)
    np.copyto(pinned.numpy(), array)
    return pinned.to(device, non_blocking=True)
