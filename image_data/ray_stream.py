"""The Ray Data stream: packed shards in, ready uint8 batches out, for one process or for the workers of Ray Train.

One task reads one window of rows (``windows.py``), decodes each image once, makes all views with the fused kernel and
emits blocks of exactly one batch (``blocks.py``). Nothing is re-batched or shuffled on the training side: a batch is a
view into shared memory. Measured reasons for this structure: bytes in Parquet, no Parquet "Datasource V2" (it starts up
to 32 footer readers per epoch and makes one task of many files), one fused task instead of several operators, uint8
instead of float blocks.

What is deterministic: the pixels of a view depend on (seed, epoch, image index, view number); the images of global
batch s on (seed, epoch, batch_size * world_size); worker r of W gets its r-th part. This needs ``train_data_config``
(preserve_order). Every batch carries its epoch and number, and one that is not the expected one is an error, never
trained on.

Ray Data runs a dataset again and again, one *execution* after the other, and each start costs 1 to 2 s. So one
execution holds as many epochs as fit ``TASKS_PER_EXECUTION``. Its first epoch follows from Ray's own count of
executions, which restarts at 0 when Ray Train restarts the workers: ``make_train_dataset`` therefore takes the epoch
that training resumes at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import ray.data
import ray.train
from ray.data import ExecutionResources
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from image_data.blocks import Block, BlockMaker, read_block
from image_data.contracts import DataError, ImageBatch
from image_data.ray_rest import RestWhenIdle
from image_data.stream import num_steps
from image_data.views import ViewMaker, ViewRecipe
from image_data.windows import Sizes, Window, epoch_windows, list_row_groups

if TYPE_CHECKING:
    from image_data.prepared import SplitInfo

__all__ = ["RayDataStream", "check_data_cpus", "make_train_dataset", "train_data_config"]

TASKS_PER_EXECUTION = 1000  # each costs the planner about 1 ms before the first batch

# Batches made ahead of training may fill this much of the object store (Ray stops at half of the store in any case):
# enough for some tens of tasks whose batches wait for their turn.
AHEAD_BYTES = 8 * 2**30


def make_train_dataset(
    split: SplitInfo,
    views: Sequence[ViewRecipe],
    *,
    image_size: int,
    batch_size: int,
    world_size: int,
    seed: int = 0,
    start_epoch: int = 0,
    num_epochs: int | None = None,
    shuffle: bool = True,
    drop_last: bool = True,
    backend: Literal["fused", "torchvision"] = "fused",
    label_selector: dict[str, str] | None = None,
) -> ray.data.Dataset:
    """The dataset of augmented batches for ``TorchTrainer(datasets={"train": factory})``.

    Call it in the factory, which Ray Train evaluates at every start of the worker group, so that ``start_epoch`` is the
    epoch that training (re)starts at.

    Args:
        split: the prepared split.
        views: one recipe per view.
        image_size: side of the views in pixels, for recipes without a size of their own.
        batch_size: images per batch of one worker.
        world_size: number of workers.
        seed: of order and augmentation.
        start_epoch: first epoch to deliver.
        num_epochs: epochs of the whole run; lets one execution hold several epochs. None: one epoch per execution.
        shuffle: False keeps the order of storage.
        drop_last: False also delivers the last, incomplete batch; one worker only.
        backend: ``fused`` kernel or the slow ``torchvision`` reference.
        label_selector: node labels of where the tasks run, such as {"role": "data"}; None is anywhere.

    Raises:
        DataError: fewer images than one global batch, or a start after the end.
    """
    num_steps(split.num_images, batch_size, world_size, drop_last)
    if num_epochs is not None and start_epoch >= num_epochs:
        raise DataError(
            f"start_epoch is {start_epoch} but the run has {num_epochs} epochs: nothing is left to deliver."
        )
    maker = BlockMaker(ViewMaker(views, image_size, seed, backend), batch_size)
    global_batch = batch_size * world_size
    windows = partial(
        epoch_windows,
        list_row_groups(split.files),
        seed=seed,
        sizes=Sizes.choose(split.num_images, split.num_bytes, global_batch, shuffle),
        shuffle=shuffle,
        drop_last=drop_last,
    )
    source = _ViewSource(maker, windows, start_epoch, num_epochs)
    # Explicit, so that Ray does not split the blocks of a task to reach its own guess of a good parallelism.
    dataset = ray.data.read_datasource(source, override_num_blocks=len(source.get_read_tasks(1)))
    # Ray ends a block where it exceeds this size: just below one batch means one block per batch.
    dataset.context.target_max_block_size = int(0.9 * batch_size * maker.row_bytes)
    dataset.context.custom_execution_callback_classes.append(RestWhenIdle)
    options = dataset.context.execution_options
    options.preserve_order = True
    options.resource_limits = ExecutionResources(object_store_memory=_ahead_bytes(split, maker, global_batch))
    if label_selector:
        options.label_selector = label_selector
    return dataset


def train_data_config(num_workers: int) -> ray.train.DataConfig:
    """How Ray Train must split the dataset: equal shards, each dataset with the options that it was made with.

    Args:
        num_workers: training workers, fixed: an epoch is cut for this number.
    """
    return _StreamDataConfig(num_workers)


def check_data_cpus(cluster_cpus: float, train_cpus: float) -> None:
    """Stop before a run that would hang: Ray Data only runs on CPUs that the training workers have not reserved.

    Args:
        cluster_cpus: CPUs of the cluster, at its largest.
        train_cpus: CPUs reserved by the training workers of all concurrent runs.

    Raises:
        DataError: less than one CPU is left for a data task.
    """
    left = cluster_cpus - train_cpus
    if left < 1:
        raise DataError(
            f"The training workers reserve {train_cpus:g} of the cluster's {cluster_cpus:g} CPUs, which leaves "
            f"{left:g} for Ray Data, whose tasks take 1 each: the run would wait for ever. Lower the number of workers "
            "or their CPUs, start Ray with more (logical) CPUs, or keep the data in memory (stream=memory)."
        )


def _ahead_bytes(split: SplitInfo, maker: BlockMaker, global_batch: int) -> int:
    """Memory for batches made ahead: of a small split two epochs, since what a stopped run has made ahead is wasted."""
    two_epochs = 2 * split.num_images * maker.row_bytes
    return max(4 * global_batch * maker.row_bytes, min(AHEAD_BYTES, two_epochs))


class _StreamDataConfig(ray.train.DataConfig):
    """Splits each dataset with its own options; the base class would replace them by the driver's."""

    def __init__(self, num_workers: int) -> None:
        super().__init__(enable_shard_locality=False)
        self._num_workers = num_workers

    def configure(
        self,
        datasets: dict[str, ray.data.Dataset],
        world_size: int,
        worker_handles: Any,
        worker_node_ids: Any,
        **kwargs: Any,
    ) -> list[dict[str, ray.data.DataIterator]]:
        if world_size != self._num_workers:
            raise DataError(
                f"The data was cut for {self._num_workers} workers but Ray Train started {world_size}. Elastic "
                "training would change the global batch; set a fixed ScalingConfig(num_workers=...)."
            )
        shards: list[dict[str, ray.data.DataIterator]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            dataset.set_name(name)
            for rank, shard in enumerate(dataset.streaming_split(world_size, equal=True)):
                shards[rank][name] = shard
        return shards


class RayDataStream:
    """Augmented batches made by Ray Data tasks anywhere in the cluster; same interface as ``MemoryStream``, read-only
    arrays.

    A process that reads the whole split alone (a trial with one worker, feature extraction) uses the constructor;
    workers of Ray Train use ``from_shard``.
    """

    def __init__(
        self,
        split: SplitInfo,
        views: Sequence[ViewRecipe],
        *,
        image_size: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        num_epochs: int | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        prefetch: int = 2,
        backend: Literal["fused", "torchvision"] = "fused",
        label_selector: dict[str, str] | None = None,
        shard: ray.data.DataIterator | None = None,
    ) -> None:
        """Set up the stream; Ray Data starts with ``epoch``.

        Args:
            split: the prepared split.
            views: one recipe per view.
            image_size: side of the views in pixels, for recipes without a size of their own.
            batch_size: images per batch of this worker.
            rank: this worker's number, from 0.
            world_size: number of workers.
            seed: of order and augmentation.
            num_epochs: epochs that will be asked for; lets Ray work ahead over the end of an epoch. None: one at a
                time.
            shuffle: False keeps the order of storage.
            drop_last: False also delivers the last, incomplete batch; one worker only.
            prefetch: batches fetched into this process ahead of the consumer, beside those that tasks make ahead.
            backend: ``fused`` kernel or the slow ``torchvision`` reference.
            label_selector: node labels of where the tasks of an own dataset run; None is anywhere.
            shard: this worker's shard of ``make_train_dataset``; None makes a dataset of its own.

        Raises:
            DataError: several workers without a shard, or fewer images than one global batch.
        """
        if shard is None and (rank, world_size) != (0, 1):
            raise DataError(
                f"RayDataStream(rank={rank}, world_size={world_size}) without a shard: several workers must share one "
                "dataset. Pass make_train_dataset(...) to TorchTrainer(datasets=...) and use RayDataStream.from_shard "
                "in the workers."
            )
        self.num_images = split.num_images
        self.batch_size = batch_size
        self.steps_per_epoch = num_steps(split.num_images, batch_size, world_size, drop_last)
        self.wait_seconds = 0.0
        self._sizes = tuple(recipe.side(image_size) for recipe in views)
        self._rank, self._world_size, self._prefetch = rank, world_size, prefetch
        self._last_size = batch_size if drop_last else split.num_images - (self.steps_per_epoch - 1) * batch_size
        self._shard = shard
        self._make_dataset: Callable[..., ray.data.Dataset] = partial(
            make_train_dataset,
            split,
            tuple(views),
            image_size=image_size,
            batch_size=batch_size,
            world_size=world_size,
            seed=seed,
            num_epochs=num_epochs,
            shuffle=shuffle,
            drop_last=drop_last,
            backend=backend,
            label_selector=label_selector,
        )
        self._tables: Iterator[pa.Table] | None = None
        self._next = (0, 0)  # epoch and step of the table that self._tables gives next

    @classmethod
    def from_shard(
        cls, shard: ray.data.DataIterator, split: SplitInfo, views: Sequence[ViewRecipe], **settings: Any
    ) -> RayDataStream:
        """The part of one Ray Train worker.

        Args:
            shard: ``ray.train.get_dataset_shard(name)``; every rank must get it, and iterate in step with the others.
            split: as given to ``make_train_dataset``.
            views: likewise.
            settings: the keyword arguments of the constructor; image_size, batch_size and world_size as given to
                ``make_train_dataset``.
        """
        return cls(split, views, shard=shard, **settings)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[ImageBatch]:
        """The batches of one epoch, from ``start_step`` on (those before are made and left out).

        A shard delivers its epochs in order, beginning with ``start_epoch``; the rest of an epoch that was broken off
        is left out. A stream of its own dataset delivers any epoch, without a new start if it is the next one.

        Raises:
            RuntimeError: Ray Data delivered another epoch or another batch than the one asked for.
        """
        began = time.perf_counter()
        self._seek(epoch)
        self.wait_seconds += time.perf_counter() - began
        finished = False
        try:
            for step in range(self.steps_per_epoch):
                began = time.perf_counter()
                block = self._take(epoch, step)
                self.wait_seconds += time.perf_counter() - began
                if step >= start_step:
                    yield block.batch
            finished = True
        finally:
            if not finished and self._shard is None:
                self.close()

    def close(self) -> None:
        """Stop reading; the tasks of an own dataset end, a shard's when every worker has stopped."""
        tables, self._tables = self._tables, None
        if tables is not None:
            tables.close()  # type: ignore[attr-defined] - a generator, whose end shuts Ray's executor down

    def _seek(self, epoch: int) -> None:
        """Bring the tables to the first batch of an epoch."""
        if self._tables is not None and self._next != (epoch, 0):
            if self._shard is None:
                self.close()
            elif self._next[1] > 0:
                for step in range(self._next[1], self.steps_per_epoch):
                    self._take(self._next[0], step)
        if self._tables is None:
            source = self._shard or self._make_dataset(start_epoch=epoch)
            tables = source.iter_batches(
                batch_size=None,  # pyright: ignore[reportArgumentType] - documented: whole blocks
                batch_format="pyarrow",
                prefetch_batches=self._prefetch,
            )
            self._tables = iter(tables)

    def _take(self, epoch: int, step: int) -> Block:
        """The next block, which must be this one; ends the execution after its last block."""
        assert self._tables is not None
        table = next(self._tables, None)
        expected = (epoch, step * self._world_size + self._rank)
        if table is None:
            raise RuntimeError(f"Ray Data ended before {_name(expected)}, with {self._world_size} workers.")
        block = read_block(table, self._sizes)
        found = (block.batch.epoch, block.number)
        size = self._last_size if step + 1 == self.steps_per_epoch else self.batch_size
        if found != expected or len(block.batch.index) != size:
            raise RuntimeError(
                f"Ray Data delivered {_name(found)} with {len(block.batch.index)} images instead of {_name(expected)} "
                f"with {size} (worker {self._rank} of {self._world_size}). Give make_train_dataset the epoch that "
                "training (re)starts at and the same batch_size and world_size as the stream, iterate every epoch on "
                "all workers, and pass dataset_config=train_data_config() to TorchTrainer."
            )
        self._next = (epoch, step + 1)
        if step + 1 == self.steps_per_epoch:
            self._next = (epoch + 1, 0)
            if block.epochs_left == 0:
                self._finish()
        return block

    def _finish(self) -> None:
        """Let an execution that delivered everything come to its end: Ray counts it and frees its resources."""
        assert self._tables is not None
        if next(self._tables, None) is not None:
            raise RuntimeError(
                "Ray Data delivered more batches than the epoch has: make_train_dataset and the stream were given "
                "different batch_size or world_size."
            )
        self._tables = None


def _name(place: tuple[int, int]) -> str:
    return f"batch {place[1]} of epoch {place[0]}"


class _ViewSource(Datasource):
    """The read tasks of one execution: the windows of its epochs, in order."""

    def __init__(
        self, maker: BlockMaker, windows: Callable[..., list[Window]], start_epoch: int, num_epochs: int | None
    ) -> None:
        super().__init__()
        self._maker, self._windows = maker, windows
        self._start_epoch, self._num_epochs = start_epoch, num_epochs
        windows_per_epoch = len(windows(epoch=start_epoch))
        self._epochs_per_execution = 1 if num_epochs is None else max(1, TASKS_PER_EXECUTION // windows_per_epoch)

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: ray.data.DataContext | None = None
    ) -> list[ReadTask]:
        """Called once per execution with the dataset's context, and by Ray's optimiser without one."""
        # Private, but what Ray's own file readers reshuffle by (FileShuffleConfig); a wrong count is caught by the
        # epoch that every batch carries.
        execution = 0 if data_context is None else data_context._execution_idx
        first = self._start_epoch + execution * self._epochs_per_execution
        last = first + self._epochs_per_execution
        if self._num_epochs is not None:
            last = min(last, self._num_epochs)
        tasks = []
        for epoch in range(first, last):
            for window in self._windows(epoch=epoch):
                metadata = BlockMetadata(window.num_rows, window.num_rows * self._maker.row_bytes, None, None)
                tasks.append(ReadTask(partial(self._maker.blocks, window, last - 1 - epoch), metadata))
        return tasks
