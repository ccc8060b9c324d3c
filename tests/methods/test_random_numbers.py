"""The mixer against published values, distributions (Kolmogorov and Smirnov), independence, any split over workers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from methods.random_numbers import random_bits, random_integers, random_normals, splitmix64

SEED = torch.tensor(123456789)
COUNT = 20000
DRAWS = {
    "bits": random_bits,
    "integers": lambda count, seed, counter, first=0: random_integers(count, 25, seed, counter, first),
    "normals": random_normals,
}


def test_splitmix64_has_the_published_values():
    # The first outputs of the reference generator (Vigna's splitmix64.c) for the state 1234567: each call adds the
    # golden ratio to the state and mixes it, so output i is the finaliser of state + i * golden.
    golden = 0x9E3779B97F4A7C15
    states = [(1234567 + i * golden) % 2**64 for i in range(5)]
    signed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in states])
    before = signed.clone()
    outputs = [v % 2**64 for v in splitmix64(signed).tolist()]
    assert outputs == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert torch.equal(signed, before)


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("shares", [(12,), (6, 6), (3, 3, 3, 3), (1, 4, 2, 5)])
def test_any_split_over_workers_gives_the_same_numbers(name, shares):
    draw = DRAWS[name]
    starts = [0, *itertools.accumulate(shares)]
    parts = [draw(share, SEED, 7, first=start) for share, start in zip(shares, starts, strict=False)]
    assert torch.equal(torch.cat(parts), draw(12, SEED, 7))


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_is_a_function_of_seed_and_counter_only(name):
    draw = DRAWS[name]
    state = torch.get_rng_state()
    assert torch.equal(draw(100, SEED, 3), draw(100, SEED.clone(), 3))
    assert torch.equal(torch.get_rng_state(), state)
    same = (draw(100, SEED, 3) == draw(100, SEED, 4)).float().mean()
    assert same < 0.2
    assert (draw(100, SEED, 3) == draw(100, SEED + 1, 3)).float().mean() < 0.2
    assert draw(0, SEED, 3).shape == (0,)


@pytest.mark.parametrize("counter", [0, 1, 10**6])
def test_normals_are_standard_normal(counter):
    x = random_normals(COUNT, SEED, counter)
    assert x.dtype == torch.float32
    assert stats.kstest(x.numpy(), "norm").pvalue > 1e-3
    assert x.mean().abs() < 4 / COUNT**0.5
    assert abs(x.std() - 1) < 4 / (2 * COUNT) ** 0.5


@pytest.mark.parametrize("high", [2, 25, 1000])
def test_integers_are_uniform(high):
    x = random_integers(COUNT, high, SEED, 5)
    assert x.dtype == torch.int64
    assert x.min() >= 0
    assert x.max() < high
    counts = np.bincount(x.numpy(), minlength=high)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_bits_are_fair_and_positions_differ():
    bits = random_bits(COUNT, SEED, 0)
    assert len(bits.unique()) == COUNT
    shares = torch.stack([(bits >> i & 1).float().mean() for i in range(64)])
    assert (shares - 0.5).abs().max() < 4.5 * 0.5 / COUNT**0.5


@pytest.mark.parametrize("shift", [1, 2, 256])
def test_neighbours_in_position_counter_and_seed_are_uncorrelated(shift):
    def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
        return abs(float(np.corrcoef(a.numpy(), b.numpy())[0, 1]))

    x = random_normals(COUNT, SEED, 11)
    assert correlation(x[shift:], x[:-shift]) < 4.5 / COUNT**0.5
    assert correlation(x, random_normals(COUNT, SEED, 11 + shift)) < 4.5 / COUNT**0.5
    assert correlation(x, random_normals(COUNT, SEED + shift, 11)) < 4.5 / COUNT**0.5
    squares = x.square()
    assert correlation(squares[shift:], squares[:-shift]) < 4.5 / COUNT**0.5


def test_one_position_over_many_steps_is_standard_normal():
    # What one latent dimension of one place in the batch sees while training goes on.
    x = torch.cat([random_normals(1, SEED, counter, first=300) for counter in range(3000)])
    assert stats.kstest(x.numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("seed", [0, 2**62 - 1, -1])
def test_extreme_seeds_give_finite_numbers(seed):
    x = random_normals(COUNT, torch.tensor(seed), 0)
    assert x.isfinite().all()
    assert stats.kstest(x.numpy(), "norm").pvalue > 1e-4
