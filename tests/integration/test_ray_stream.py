"""The Ray Data stream on a real cluster: pixels, order, epochs, back-pressure, and two ranks of a real TorchTrainer."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

import image_data.windows
from image_data import ray_stream
from image_data.blocks import BlockMaker
from image_data.contracts import DataError, ImageBatch
from image_data.ray_rest import LONGEST_REST_SECONDS, RestWhenIdle
from image_data.ray_stream import RayDataStream, check_data_cpus, make_train_dataset, train_data_config
from image_data.store import DecodedStore
from image_data.stream import MemoryStream
from image_data.views import RECIPES
from tests.packed import write_split

VIEWS = (RECIPES["moco_v2"], RECIPES["light"])
SETTINGS: dict[str, Any] = {"image_size": 16, "seed": 3}
NUM_IMAGES, BATCH = 150, 16


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory):
    return write_split(str(tmp_path_factory.mktemp("packed")), NUM_IMAGES, rows_per_group=16)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Three tasks per epoch, in two pools."""
    set_small_windows(monkeypatch.setattr)


def set_small_windows(set_attribute) -> None:
    set_attribute(image_data.windows, "POOL_ROWS", 96)
    set_attribute(image_data.windows, "TASK_ROWS", 48)
    set_attribute(image_data.windows, "MIN_TASKS", 1)


def signature(batch: ImageBatch) -> list:
    """What identifies a batch bit by bit, as JSON."""
    import hashlib

    pixels = hashlib.sha256(b"".join(view.tobytes() for view in batch.views)).hexdigest()
    return [batch.epoch, batch.index.tolist(), batch.labels.tolist(), pixels]


def make_stream(packed, **settings) -> RayDataStream:
    return RayDataStream(packed[0], settings.pop("views", VIEWS), **SETTINGS | {"batch_size": BATCH} | settings)


def test_pixels_are_those_of_the_memory_stream(ray_cluster, packed):
    split, _, labels = packed
    store = DecodedStore.open(split, str(Path(split.files[0]).parent))
    memory = MemoryStream(store, VIEWS, batch_size=BATCH, **SETTINGS)
    stream = make_stream(packed, num_epochs=3)
    assert stream.steps_per_epoch == memory.steps_per_epoch == 9
    orders = []
    for epoch in range(3):
        expected = {int(i): [view[k] for view in b.views] for b in memory.epoch(epoch) for k, i in enumerate(b.index)}
        batches = list(stream.epoch(epoch))
        orders.append(np.concatenate([batch.index for batch in batches]))
        assert len(np.unique(orders[-1])) == len(orders[-1]) == 9 * BATCH, "no image twice in an epoch"
        compared = 0
        for batch in batches:
            np.testing.assert_array_equal(batch.labels, labels[batch.index])
            assert batch.epoch == epoch
            for k, index in enumerate(batch.index.tolist()):
                for view, pixels in zip(batch.views, expected.get(index, batch.views), strict=True):
                    if index in expected:
                        np.testing.assert_array_equal(view[k], pixels)
                        compared += 1
        assert compared > 200
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[1], orders[2])


def test_runs_are_identical_however_the_epochs_are_executed(ray_cluster, packed):
    ahead, single = make_stream(packed, num_epochs=3), make_stream(packed)
    first = [[signature(batch) for batch in ahead.epoch(epoch)] for epoch in range(3)]
    assert [[signature(batch) for batch in single.epoch(epoch)] for epoch in range(3)] == first
    resumed = make_stream(packed, num_epochs=3)
    assert [signature(batch) for batch in resumed.epoch(2)] == first[2]
    assert [signature(batch) for batch in resumed.epoch(1, start_step=5)] == first[1][5:]
    assert resumed.wait_seconds > 0


def test_leaving_early_stops_ray(ray_cluster, packed):
    stream = make_stream(packed, num_epochs=50)
    before = signature(next(stream.epoch(0)))
    assert executor_threads() == 0
    for batch in stream.epoch(0):
        assert signature(batch) == before
        break
    assert executor_threads() == 0
    assert len(list(stream.epoch(4))) == 9
    stream.close()
    assert executor_threads() == 0


def executor_threads() -> int:
    deadline = time.monotonic() + 10
    while (alive := count_executors()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return alive


def count_executors() -> int:
    return sum("StreamingExecutor" in thread.name for thread in threading.enumerate())


def test_evaluation_order_and_last_batch(ray_cluster, packed):
    settings = {"views": (RECIPES["evaluation"],), "shuffle": False, "drop_last": False}
    stream = make_stream(packed, num_epochs=2, **settings)
    for epoch in range(2):
        batches = list(stream.epoch(epoch))
        assert [len(batch.index) for batch in batches] == [16] * 9 + [6]
        np.testing.assert_array_equal(np.concatenate([batch.index for batch in batches]), np.arange(NUM_IMAGES))


@dataclass(frozen=True)
class LoggingMaker(BlockMaker):
    """Leaves one byte in a file per block that a task has made."""

    log: str = ""

    def blocks(self, window, epochs_left):
        for table in super().blocks(window, epochs_left):
            with open(self.log, "a") as file:
                file.write(".")
            yield table


class CountingRest(RestWhenIdle):
    """Counts the steps of Ray's scheduling loop in this process."""

    steps = 0

    def on_execution_step(self, executor):
        CountingRest.steps += 1
        super().on_execution_step(executor)


def test_a_slow_consumer_holds_the_tasks_back(ray_cluster, packed, tmp_path, monkeypatch):
    log = tmp_path / "blocks"
    log.touch()
    monkeypatch.setattr(ray_stream, "BlockMaker", partial(LoggingMaker, log=str(log)))
    monkeypatch.setattr(ray_stream, "RestWhenIdle", CountingRest)
    stream = make_stream(packed, num_epochs=40)
    batches = stream.epoch(0)
    next(batches)
    before = CountingRest.steps
    time.sleep(4)
    made, steps = len(log.read_text()), CountingRest.steps - before
    batches.close()
    assert steps <= 10 + 4.5 / LONGEST_REST_SECONDS, f"the scheduling loop ran {steps} times in 4 s"
    assert 3 <= made <= 60, f"{made} of 360 batches were made for a consumer that took one"


def read_shards(packed, dataset, batch_size: int, plan) -> list[Any]:
    """Consume the shards of a dataset in threads, as ranks of Ray Train would; plan(stream) gives each one's result."""
    shards = dataset.streaming_split(2, equal=True)
    settings = SETTINGS | {"batch_size": batch_size, "world_size": 2}
    streams = [RayDataStream.from_shard(s, packed[0], VIEWS, rank=r, **settings) for r, s in enumerate(shards)]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(plan, stream) for stream in streams]
        try:
            return [run.result() for run in runs]
        finally:
            for run, stream in zip(runs, streams, strict=True):
                if run.done():
                    stream.close()  # while the coordinator lives: an iterator that ends later would start a Ray
            ray.kill(shards[0]._coord_actor)  # type: ignore[attr-defined] - what the end of its workers does in a run


def dataset_for_two(packed, **settings):
    return make_train_dataset(packed[0], VIEWS, **SETTINGS | {"batch_size": BATCH // 2, "world_size": 2} | settings)


def test_one_epoch_per_execution_continues_also_after_a_break(ray_cluster, packed):
    def plan(stream):
        seen = []
        for epoch in (2, 3, 4):
            for batch in stream.epoch(epoch):
                seen.append(signature(batch))
                if epoch == 3 and len(seen) == 12:
                    break
        return seen

    ranks = read_shards(packed, dataset_for_two(packed, start_epoch=2), BATCH // 2, plan)
    assert [len(rank) for rank in ranks] == [9 + 3 + 9] * 2
    whole = make_stream(packed)
    expected = [batch.index.tolist() for epoch in (2, 3, 4) for batch in whole.epoch(epoch)]
    expected = expected[:12] + expected[18:]
    assert [a[1] + b[1] for a, b in zip(*ranks, strict=True)] == expected, "two ranks see the batches of one process"


def test_a_wrong_epoch_or_size_is_an_error(ray_cluster, packed):
    def failure(stream) -> str:
        with pytest.raises(RuntimeError) as error:
            next(stream.epoch(1))
        return str(error.value)

    for message in read_shards(packed, dataset_for_two(packed, num_epochs=3), BATCH // 2, failure):
        assert "of epoch 0 with" in message
        assert "start_epoch" in message or "(re)starts" in message
    one_worker = dataset_for_two(packed, world_size=1, batch_size=BATCH, start_epoch=1)
    for message in read_shards(packed, one_worker, BATCH // 2, failure):
        assert f"with {BATCH} images instead of" in message


def test_clear_errors(packed):
    with pytest.raises(DataError, match="from_shard in the workers"):
        make_stream(packed, rank=1, world_size=2)
    with pytest.raises(DataError, match="one global batch takes 256"):
        make_train_dataset(packed[0], VIEWS, batch_size=128, world_size=2, **SETTINGS)
    with pytest.raises(DataError, match="nothing is left to deliver"):
        make_train_dataset(packed[0], VIEWS, batch_size=8, world_size=1, start_epoch=3, num_epochs=3, **SETTINGS)
    with pytest.raises(DataError, match="cut for 2 workers but Ray Train started 3"):
        train_data_config(2).configure({}, 3, None, None)


def test_data_needs_cpus_that_train_has_not_reserved():
    check_data_cpus(4, 3)
    with pytest.raises(DataError, match=r"reserve 2 of the cluster's 2 CPUs.*wait for ever"):
        check_data_cpus(2, 2)
