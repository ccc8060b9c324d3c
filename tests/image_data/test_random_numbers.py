"""The hash behind every view: right function, uniform, independent, a pure function of its address."""

import numpy as np
import pytest
from scipy import stats

from image_data.random_numbers import image_keys, uniforms


def test_matches_the_published_splitmix64_stream():
    # First outputs of SplitMix64 seeded with 0, as in the test vectors of its reference implementation.
    expected = np.array([0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F], dtype=np.uint64)
    numbers = uniforms(np.zeros(1, np.uint64), (0, 1, 2))[:, 0]
    np.testing.assert_array_equal(numbers, (expected >> np.uint64(11)) / 2.0**53)


def test_every_slot_is_uniform():
    numbers = uniforms(image_keys(0, 0, 0, np.arange(20_000)), range(40))
    assert numbers.shape == (40, 20_000)
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    p_values = [stats.kstest(row, "uniform").pvalue for row in numbers]
    assert min(p_values) > 1e-4
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3  # neither too bad nor too good


@pytest.mark.parametrize("part", ["slot", "index", "epoch", "view", "seed"])
def test_neighbouring_addresses_are_independent(part):
    index = np.arange(20_000)
    first = uniforms(image_keys(7, 3, 1, index), (5,))[0]
    second = {
        "slot": uniforms(image_keys(7, 3, 1, index), (6,))[0],
        "index": uniforms(image_keys(7, 3, 1, index + 1), (5,))[0],
        "epoch": uniforms(image_keys(7, 4, 1, index), (5,))[0],
        "view": uniforms(image_keys(7, 3, 2, index), (5,))[0],
        "seed": uniforms(image_keys(8, 3, 1, index), (5,))[0],
    }[part]
    cells = np.histogram2d(first, second, bins=10, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(cells.ravel()).pvalue > 1e-3
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(len(index))


def test_parts_of_the_address_are_not_interchangeable():
    addresses = [(seed, epoch, view) for seed in range(4) for epoch in range(4) for view in range(4)]
    keys = np.concatenate([image_keys(*address, np.arange(100)) for address in addresses])
    assert len(np.unique(keys)) == len(keys)


def test_numbers_depend_on_the_image_and_not_on_the_batch():
    index = np.array([9, 4, 4, 1_000_000_007])
    together = uniforms(image_keys(1, 2, 0, index), range(8))
    alone = [uniforms(image_keys(1, 2, 0, index[i : i + 1]), range(8))[:, 0] for i in range(4)]
    np.testing.assert_array_equal(together, np.stack(alone, axis=1))
    np.testing.assert_array_equal(together[3:5], uniforms(image_keys(1, 2, 0, index), (3, 4)))


def test_any_integers_are_accepted_and_the_index_is_left_alone():
    index = np.array([3, 5], dtype=np.int32)
    keys = image_keys(-1, 2**70 + 5, 0, index)
    assert keys.dtype == np.uint64
    np.testing.assert_array_equal(index, [3, 5])
    assert not np.array_equal(keys, image_keys(1, 2**70 + 5, 0, index))
