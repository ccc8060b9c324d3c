"""The memory stream, the windowed order, the Arrow blocks and the device step, all without Ray."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from image_data.blocks import BlockMaker, read_block
from image_data.contracts import IMAGENET_MEAN, IMAGENET_STD, DataError, ImageBatch
from image_data.store import DecodedStore
from image_data.stream import MemoryStream, Prefetcher, num_steps, to_device
from image_data.views import RECIPES, ViewMaker
from image_data.windows import Sizes, epoch_windows, list_row_groups, read_window
from tests.packed import write_split

NUM_IMAGES = 110
VIEWS = (RECIPES["moco_v2"], RECIPES["moco_v2"])


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory):
    return write_split(str(tmp_path_factory.mktemp("packed")), NUM_IMAGES)


@pytest.fixture(scope="module")
def store(packed) -> DecodedStore:
    return DecodedStore.open(packed[0], str(Path(packed[0].files[0]).parent))


def make_stream(store: DecodedStore, **settings) -> MemoryStream:
    views = settings.pop("views", VIEWS)
    return MemoryStream(store, views, **{"image_size": 16, "batch_size": 8, "seed": 3} | settings)


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "image-prefetch"]


def assert_equal(one: ImageBatch, other: ImageBatch) -> None:
    for a, b in zip(one.views, other.views, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(one.labels, other.labels)
    np.testing.assert_array_equal(one.index, other.index)
    assert one.epoch == other.epoch


def test_batches_have_the_contract_shapes(store):
    stream = make_stream(store)
    assert (stream.num_images, stream.steps_per_epoch) == (NUM_IMAGES, 13)
    batches = list(stream.epoch(2))
    assert len(batches) == 13
    for batch in batches:
        assert [view.shape for view in batch.views] == [(8, 3, 16, 16)] * 2
        assert all(view.dtype == np.uint8 and view.flags.c_contiguous for view in batch.views)
        assert (batch.labels.dtype, batch.index.dtype, batch.epoch) == (np.int64, np.int64, 2)


def test_views_are_those_of_the_view_maker(store, packed):
    _, images, labels = packed
    batch = next(make_stream(store).epoch(1))
    maker = ViewMaker(VIEWS, 16, seed=3)
    for i, index in enumerate(batch.index):
        image = images[index]
        alone = store.buffer(np.array([index]))
        np.testing.assert_array_equal(
            alone.pixels[alone.offsets[0] :][: image.size], image.reshape(-1), "the store's rows follow the index"
        )
        for view, expected in zip(batch.views, maker(alone, 1, np.array([index])), strict=True):
            np.testing.assert_array_equal(view[i], expected[0])
        assert batch.labels[i] == labels[index]


def test_each_epoch_is_a_new_permutation_with_new_views(store):
    stream = make_stream(store)
    epochs = [list(stream.epoch(e)) for e in (0, 1)]
    orders = [np.concatenate([batch.index for batch in batches]) for batches in epochs]
    for order in orders:
        assert len(np.unique(order)) == len(order) == 104, "no image twice in an epoch"
    assert not np.array_equal(*orders)
    shared = np.intersect1d(epochs[0][0].index, orders[1])[0]
    first, second = (next(b.views[0][b.index == shared][0] for b in batches if shared in b.index) for batches in epochs)
    assert not np.array_equal(first, second), "fresh augmentation"


def test_two_runs_are_identical_and_another_seed_is_not(store):
    one, two = (list(make_stream(store, threads=threads, prefetch=4).epoch(5)) for threads in (1, 3))
    for a, b in zip(one, two, strict=True):
        assert_equal(a, b)
    other = next(make_stream(store, seed=4).epoch(5))
    assert not np.array_equal(other.index, one[0].index)


def test_any_number_of_workers_sees_the_same_global_batches(store):
    single = list(make_stream(store, batch_size=24).epoch(1))
    workers = [list(make_stream(store, batch_size=8, rank=r, world_size=3).epoch(1)) for r in range(3)]
    assert [len(batches) for batches in workers] == [len(single)] * 3
    for step, whole in enumerate(single):
        parts = [batches[step] for batches in workers]
        joined = ImageBatch(
            [np.concatenate([part.views[v] for part in parts]) for v in range(2)],
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.index for part in parts]),
            1,
        )
        assert_equal(joined, whole)


def test_start_step_continues_in_the_middle(store):
    stream = make_stream(store)
    for a, b in zip(list(stream.epoch(1))[9:], stream.epoch(1, start_step=9), strict=True):
        assert_equal(a, b)


def test_evaluation_keeps_order_and_the_last_batch(store, packed):
    stream = make_stream(store, views=(RECIPES["evaluation"],), shuffle=False, drop_last=False)
    batches = list(stream.epoch(0))
    assert stream.steps_per_epoch == len(batches) == 14
    assert len(batches[-1].index) == 110 - 13 * 8
    np.testing.assert_array_equal(np.concatenate([batch.index for batch in batches]), np.arange(NUM_IMAGES))
    np.testing.assert_array_equal(np.concatenate([batch.labels for batch in batches]), packed[2])


def test_leaving_early_stops_the_thread(store):
    stream = make_stream(store)
    for _ in stream.epoch(0):
        break
    iterator = stream.epoch(1)
    next(iterator)
    assert prefetch_threads()
    iterator.close()
    list(stream.epoch(2))
    assert not prefetch_threads()


def test_an_error_of_the_producer_reaches_the_consumer(store, monkeypatch):
    stream = make_stream(store)
    buffer = store.buffer
    calls = []

    def fails_at_the_third(rows):
        calls.append(rows)
        if len(calls) == 3:
            raise OSError("the disk is gone")
        return buffer(rows)

    monkeypatch.setattr(store, "buffer", fails_at_the_third)
    batches = stream.epoch(0)
    assert len({int(next(batches).index[0]) for _ in range(2)}) == 2, "the batches before the error arrive"
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert not prefetch_threads()


def test_prefetch_is_bounded():
    made = []

    def items():
        for i in range(100):
            made.append(i)
            yield i

    prefetcher = Prefetcher(items(), depth=3)
    deadline = time.monotonic() + 10
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(made) == 3
    assert [next(prefetcher) for _ in range(50)] == list(range(50))
    time.sleep(0.1)
    assert len(made) <= 53
    prefetcher.close()
    assert not prefetch_threads()


def test_wait_seconds_counts_the_consumers_waiting(store, monkeypatch):
    stream = make_stream(store)
    buffer = store.buffer

    def slow(rows):
        time.sleep(0.02)
        return buffer(rows)

    monkeypatch.setattr(store, "buffer", slow)
    list(stream.epoch(0))
    waited = stream.wait_seconds
    assert waited >= 13 * 0.015
    list(stream.epoch(1))
    assert stream.wait_seconds > waited, "it only grows"


def test_impossible_settings_are_refused(store):
    with pytest.raises(DataError, match="110 images but one global batch takes 128"):
        make_stream(store, batch_size=64, world_size=2)
    with pytest.raises(DataError, match="rank is 2"):
        make_stream(store, rank=2, world_size=2)
    with pytest.raises(DataError, match="drop_last=False with 2 workers"):
        make_stream(store, world_size=2, drop_last=False)
    with pytest.raises(DataError, match="at least 1"):
        num_steps(10, 0, 1, True)
    assert num_steps(100, 8, 3, True) == 4


@pytest.mark.parametrize("channels_last", [True, False])
def test_to_device_normalises_like_torchvision(store, channels_last):
    batch = next(make_stream(store).epoch(0))
    views, labels, index = to_device(batch, "cpu", channels_last=channels_last)
    for view, pixels in zip(views, batch.views, strict=True):
        floats = F.to_dtype(torch.from_numpy(pixels), torch.float32, scale=True)
        expected = F.normalize(floats, list(IMAGENET_MEAN), list(IMAGENET_STD))
        torch.testing.assert_close(view, expected, rtol=0, atol=2e-6)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert view.is_contiguous(memory_format=layout)
    assert labels.tolist() == batch.labels.tolist()
    assert index.tolist() == batch.index.tolist()
    assert labels.dtype == index.dtype == torch.int64


def test_to_device_rounds_once_to_other_types(store):
    batch = next(make_stream(store).epoch(0))
    exact, _, _ = to_device(batch, "cpu")
    half, _, _ = to_device(batch, "cpu", dtype=torch.bfloat16)
    assert torch.equal(half[0], exact[0].bfloat16())


def test_to_device_owns_its_memory(store):
    batch = next(make_stream(store).epoch(0))
    for array in (*batch.views, batch.labels, batch.index):
        array.flags.writeable = False  # as a batch from shared memory is
    views, labels, _ = to_device(batch, "cpu")
    views[0].zero_()
    labels.zero_()
    assert batch.views[0].any()
    assert batch.labels.any()


SIZES = Sizes(global_batch=12, pool=48, window=24)


def windows_of(split, epoch: int, sizes: Sizes = SIZES, **settings):
    return epoch_windows(list_row_groups(split.files), epoch, sizes=sizes, **{"seed": 3} | settings)


def index_of(window) -> np.ndarray:
    table, order = read_window(window, ("index",))
    return table["index"].to_numpy()[order]


def test_windows_hold_each_image_at_most_once_and_reshuffle(packed):
    split = packed[0]
    orders = [np.concatenate([index_of(w) for w in windows_of(split, e)]) for e in (0, 1, 0)]
    for order in orders:
        assert len(np.unique(order)) == len(order) == 108, "nine global batches of 12 out of 110 images"
    np.testing.assert_array_equal(orders[0], orders[2])
    assert not np.array_equal(orders[0], orders[1])
    dropped = [set(range(NUM_IMAGES)) - set(order.tolist()) for order in orders[:2]]
    assert dropped[0] != dropped[1], "the dropped images change from epoch to epoch"


def test_windows_are_aligned_to_global_batches(packed):
    position = 0
    for window in windows_of(packed[0], 0):
        assert window.first_row == position
        assert window.num_rows % 12 == 0
        position += window.num_rows
    assert position == 108


def test_a_pool_is_permuted_as_a_whole(packed):
    first, second = windows_of(packed[0], 0)[:2]
    assert first.pieces == second.pieces, "both windows read the same pool"
    pool = np.concatenate([index_of(first), index_of(second)])
    assert len(np.unique(pool)) == 48
    assert not np.array_equal(pool, np.sort(pool))
    assert len(set(pool[:12] // 16)) >= 3, "one batch draws from several row groups of the pool"


def test_a_small_split_is_permuted_globally(packed):
    sizes = Sizes.choose(NUM_IMAGES, packed[0].num_bytes, global_batch=10)
    assert sizes.pool >= NUM_IMAGES
    first = index_of(windows_of(packed[0], 0, sizes)[0])
    assert np.ptp(first[:10]) > 60


def test_unshuffled_windows_keep_the_order_of_storage(packed):
    windows = windows_of(packed[0], 7, shuffle=False, drop_last=False)
    np.testing.assert_array_equal(np.concatenate([index_of(w) for w in windows]), np.arange(NUM_IMAGES))


def test_sizes_are_multiples_of_the_global_batch():
    assert Sizes.choose(100_000, 100_000 * 3_000, 256) == Sizes(256, 8192, 2048)
    assert Sizes.choose(1_300_000, 1_300_000 * 110_000, 256) == Sizes(256, 512, 512), "64 MiB of large images"
    assert Sizes.choose(1_300_000, 1_300_000 * 110_000, 4096) == Sizes(4096, 4096, 4096), "at least one global batch"
    assert Sizes.choose(3_000, 3_000 * 3_000, 64) == Sizes(64, 8192, 192), "a small split still gives many tasks"
    assert Sizes.choose(3_000, 3_000 * 3_000, 64, shuffle=False) == Sizes(64, 192, 192)


def test_blocks_hold_the_pixels_of_the_memory_stream(packed, store):
    """The same (seed, epoch, index) gives the same pixels, whichever stream made them."""
    maker = BlockMaker(ViewMaker(VIEWS, 16, seed=3), batch_size=6)
    reference = {int(i): b.views[1][k] for b in make_stream(store).epoch(1) for k, i in enumerate(b.index)}
    number = 0
    for window in windows_of(packed[0], 1):
        for table in maker.blocks(window, epochs_left=4):
            block = read_block(table, (16, 16))
            assert (block.number, block.epochs_left, block.batch.epoch) == (number, 4, 1)
            assert table.num_rows == 6
            np.testing.assert_array_equal(block.batch.labels, packed[2][block.batch.index])
            for k, index in enumerate(block.batch.index):
                if int(index) in reference:
                    np.testing.assert_array_equal(block.batch.views[1][k], reference[int(index)])
            number += 1
    assert number == 18


def test_blocks_decode_in_pieces_without_a_difference(packed, monkeypatch):
    import image_data.blocks

    maker = BlockMaker(ViewMaker(VIEWS, 16, seed=3), batch_size=24)
    window = windows_of(packed[0], 0)[0]
    whole = [read_block(table, (16, 16)).batch for table in maker.blocks(window, 0)]
    monkeypatch.setattr(image_data.blocks, "_DECODED_BYTES", 9000)
    for a, b in zip(whole, maker.blocks(window, 0), strict=True):
        assert_equal(a, read_block(b, (16, 16)).batch)


def test_a_block_is_read_in_place_also_from_a_slice(packed):
    maker = BlockMaker(ViewMaker((RECIPES["light"],), 16, seed=3), batch_size=24)
    table = next(maker.blocks(windows_of(packed[0], 0)[0], 0))
    whole, part = read_block(table, (16,)).batch, read_block(table.slice(5, 7), (16,)).batch
    np.testing.assert_array_equal(part.views[0], whole.views[0][5:12])
    assert np.shares_memory(part.views[0], whole.views[0])
    assert table.nbytes == 24 * maker.row_bytes
