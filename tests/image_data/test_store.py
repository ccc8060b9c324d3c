"""The decoded store: right pixels, built once, never half."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from image_data import store as store_module
from image_data.contracts import DataError
from image_data.store import DecodedStore, fits_memory
from tests.packed import write_split


@pytest.fixture
def packed(tmp_path: Path):
    return write_split(str(tmp_path), 45, num_shards=3)


def image_of(buffer, i: int) -> np.ndarray:
    start, height, width = buffer.offsets[i], buffer.heights[i], buffer.widths[i]
    return buffer.pixels[start : start + 3 * height * width].reshape(height, width, 3)


@pytest.mark.parametrize("threads", [1, 3])
def test_every_pixel_and_label_is_right(packed, tmp_path, threads):
    split, images, labels = packed
    store = DecodedStore.open(split, str(tmp_path), threads=threads)
    assert (store.num_images, store.num_bytes) == (45, split.decoded_bytes)
    np.testing.assert_array_equal(store.labels, labels)
    np.testing.assert_array_equal(store.index, np.arange(45))
    rows = np.random.default_rng(1).permutation(45)[:20]
    buffer = store.buffer(rows)
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(image_of(buffer, i), images[row])


def test_buffer_shares_the_read_only_map(packed, tmp_path):
    store = DecodedStore.open(packed[0], str(tmp_path))
    first, second = store.buffer(np.array([3, 1])), store.buffer(np.array([2]))
    assert np.shares_memory(first.pixels, second.pixels)
    assert not first.pixels.flags.writeable


def test_a_second_open_decodes_nothing(packed, tmp_path, monkeypatch):
    DecodedStore.open(packed[0], str(tmp_path))
    monkeypatch.setattr(store_module, "decode_image", lambda *_: pytest.fail("decoded again"))
    assert DecodedStore.open(packed[0], str(tmp_path)).num_images == 45


def test_a_killed_build_is_not_taken_for_complete(packed, tmp_path, monkeypatch):
    split, images, _ = packed
    calls = []

    def dies_midway(data: bytes, name: str) -> np.ndarray:
        calls.append(name)
        if len(calls) > 20:
            raise KeyboardInterrupt
        return images[0]

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_decode_into", lambda p, s, shape, data, name: dies_midway(data, name))
        patch.setattr(store_module.shutil, "rmtree", lambda *_, **__: None)  # SIGKILL leaves the folder behind
        with pytest.raises(KeyboardInterrupt):
            DecodedStore.open(split, str(tmp_path))
    assert list(tmp_path.glob(".train.decoded.building-*")), "the killed build left its folder"
    store = DecodedStore.open(split, str(tmp_path))
    np.testing.assert_array_equal(image_of(store.buffer(np.array([44])), 0), images[44])
    assert not list(tmp_path.glob(".train.decoded.building-*")), "the leftover is removed"


def test_another_preparation_is_decoded_again(packed, tmp_path):
    DecodedStore.open(packed[0], str(tmp_path))
    other, images, _ = write_split(str(tmp_path), 30, num_shards=3, seed=5)
    store = DecodedStore.open(other, str(tmp_path))
    np.testing.assert_array_equal(image_of(store.buffer(np.array([29])), 0), images[29])


def _open_in_process(split, directory: str, log: str) -> None:
    build = store_module._build

    def counted(*args) -> None:
        with open(log, "a") as file:
            file.write("built\n")
        build(*args)

    store_module._build = counted
    DecodedStore.open(split, directory)


def test_concurrent_callers_build_once(packed, tmp_path):
    log = str(tmp_path / "log")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_open_in_process, args=(packed[0], str(tmp_path), log)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert Path(log).read_text() == "built\n"


def test_shards_that_do_not_match_their_description_are_refused(packed, tmp_path):
    split = packed[0]
    with pytest.raises(DataError, match="45 images"):
        DecodedStore.open(replace(split, num_images=46), str(tmp_path))
    with pytest.raises(DataError, match="bytes of pixels"):
        DecodedStore.open(replace(split, decoded_bytes=split.decoded_bytes + 3), str(tmp_path))
    with pytest.raises(DataError, match="more than"):
        DecodedStore.open(replace(split, decoded_bytes=split.decoded_bytes - 3), str(tmp_path))
    assert not (tmp_path / "train.decoded").exists()


def test_clear_errors(packed, tmp_path, monkeypatch):
    split = packed[0]
    with pytest.raises(DataError, match="local folder"):
        DecodedStore.open(split, "s3://bucket/cache")
    with pytest.raises(DataError, match="is missing on this node"):
        DecodedStore.open(replace(split, files=(str(tmp_path / "gone.parquet"),)), str(tmp_path / "other"))

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(DataError, match=r"No space left.*Free disk space"):
        DecodedStore.open(split, str(tmp_path))


def test_manifest_names_what_was_decoded(packed, tmp_path):
    DecodedStore.open(packed[0], str(tmp_path))
    manifest = json.loads((tmp_path / "train.decoded" / "manifest.json").read_text())
    assert manifest["num_images"] == 45
    assert manifest["shards"] == [os.path.basename(file) for file in packed[0].files]


def test_fits_memory(packed):
    split = packed[0]
    assert fits_memory(split, split.decoded_bytes)
    assert not fits_memory(split, split.decoded_bytes - 1)
