"""Statistics of all pairs against every pair in float64, and the values that theory gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform
from scipy.special import logsumexp

from evaluation import pair_statistics as module
from evaluation.pair_statistics import pair_statistics


def slow_statistics(x: np.ndarray, t: float = 2.0) -> tuple[float, float, float, float, np.ndarray]:
    """The docstring's formulas over a list of all pairs."""
    x = x.astype(np.float64)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    z = x / np.where(norms == 0, 1, norms)

    def uniformity(points: np.ndarray) -> float:
        exponents = -t * pdist(points, "sqeuclidean")
        return math.log(len(exponents)) - float(logsumexp(exponents))

    distances = squareform(pdist(z))
    np.fill_diagonal(distances, np.inf)
    densities = np.exp(-t * distances**2).sum(axis=1) / (len(x) - 1)
    nearest = distances.min(axis=1)
    return (
        uniformity(z),
        uniformity(x),
        -float(np.log(densities).mean()),
        float(np.log(nearest + 1e-8).mean()),
        nearest,
    )


def gaussian(n: int, dim: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(n).normal(size=(n, dim)) * scale + shift).astype(np.float32)


CASES = {
    "several blocks": gaussian(1100, 24),
    "exactly one block": gaussian(512, 8, 0.3),
    "one image left for the last block": gaussian(513, 8, 0.3),
    "long vectors, far pairs": gaussian(600, 64, 30.0),
    "nearly collapsed, far from the origin": gaussian(300, 32, 0.01, 5.0),
    "short": gaussian(200, 16, 1e-3),
    "two images": gaussian(2, 4),
    "zero vectors": np.concatenate([gaussian(60, 8), np.zeros((4, 8), np.float32)]),
    "pairs of equal long vectors": np.repeat(gaussian(50, 64, 100.0), 2, axis=0),
    "tight groups of near-duplicates": np.repeat(gaussian(6, 64), 100, axis=0) + gaussian(600, 64, 1e-5),
    "products overflow float32": gaussian(40, 8, 1e20),
    "products underflow float32": gaussian(41, 8, 1e-25),
    "lengths of many magnitudes": gaussian(90, 8) * np.logspace(-6, 1, 90, dtype=np.float32)[:, None],
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("t", [2.0, 0.5])
def test_equals_all_pairs_in_float64(name: str, t: float) -> None:
    ours = pair_statistics(CASES[name], t)
    uniformity, raw, vmf_entropy, koleo, nearest = slow_statistics(CASES[name], t)
    assert ours.uniformity == pytest.approx(uniformity, abs=1e-6)
    assert ours.raw_uniformity == pytest.approx(raw, abs=1e-4, rel=1e-6)
    assert ours.vmf_entropy == pytest.approx(vmf_entropy, abs=1e-6)
    assert ours.koleo == pytest.approx(koleo, abs=1e-6)
    np.testing.assert_allclose(ours.nearest, nearest, rtol=1e-5, atol=1e-12)


def test_block_size_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian(100, 8, 3.0)
    whole = pair_statistics(x)
    monkeypatch.setattr(module, "BLOCK", 7)
    blocks = pair_statistics(x)
    assert blocks[:4] == pytest.approx(whole[:4], rel=1e-6)
    np.testing.assert_allclose(blocks.nearest, whole.nearest, rtol=1e-6)


def test_near_duplicates_need_the_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, float32 products cannot tell which of a group's members is nearest."""
    x = CASES["tight groups of near-duplicates"]
    nearest = slow_statistics(x)[-1]
    monkeypatch.setattr(module, "CLOSE", -1.0)
    assert np.abs(pair_statistics(x).nearest / nearest - 1).max() > 0.05


def test_no_copy_of_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of a read-only array (Ray's object store) nor, in float32, of any block of it."""
    x = gaussian(700, 16)
    x.flags.writeable = False
    seen = set()
    multiply = torch.mm

    def record(left: torch.Tensor, right: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        seen.update(tensor.untyped_storage().data_ptr() for tensor in (left, right))
        return multiply(left, right, **options)

    monkeypatch.setattr(torch, "mm", record)
    pair_statistics(x)
    assert seen == {x.ctypes.data}


def test_random_directions_in_2048_dimensions() -> None:
    """Squared distances concentrate at 2 with variance 4 / D: U = 2 t - t^2 (4 / D) / 2 = 3.996."""
    found = pair_statistics(gaussian(700, 2048))
    assert found.uniformity == pytest.approx(4 - 8 / 2048, abs=2e-4)
    assert found.vmf_entropy == pytest.approx(found.uniformity, abs=1e-3)  # every image sees the same density


def test_identical_features_are_zero() -> None:
    found = pair_statistics(np.full((20, 8), 0.7, np.float32))
    assert found[:4] == pytest.approx((0, 0, 0, math.log(1e-8)), abs=1e-6)
    assert found.raw_uniformity == 0.0
    assert not found.nearest.any()


def test_all_zero_vectors() -> None:
    assert pair_statistics(np.zeros((5, 3), np.float32))[:3] == (0.0, 0.0, 0.0)


def test_two_points_and_orthogonal_vectors() -> None:
    """Closed forms: exp(-t d^2) of the one distance there is."""
    angle = 0.4
    pair = np.array([[1, 0], [math.cos(angle), math.sin(angle)]], np.float32) * np.array([[3], [0.5]], np.float32)
    square = 2 - 2 * math.cos(angle)
    found = pair_statistics(pair, t=1.5)
    assert found.uniformity == pytest.approx(1.5 * square, rel=1e-6)
    assert found.vmf_entropy == pytest.approx(1.5 * square, rel=1e-6)
    assert found.raw_uniformity == pytest.approx(1.5 * (9.25 - 3 * math.cos(angle)), rel=1e-6)
    assert found.koleo == pytest.approx(math.log(square) / 2, rel=1e-6)

    found = pair_statistics(5 * np.eye(30, dtype=np.float32))
    assert (found.uniformity, found.raw_uniformity) == pytest.approx((4, 100), rel=1e-6)
    assert (found.vmf_entropy, found.koleo) == pytest.approx((4, math.log(2) / 2), rel=1e-6)


def test_two_opposite_groups() -> None:
    """Of 2 m points, half at e and half at -e, m^2 pairs are at distance 2 |e| and the others at 0."""
    x = np.concatenate([np.ones((5, 1)), -np.ones((5, 1))]).astype(np.float32) * 3
    share = 25 / 45
    found = pair_statistics(x)
    assert found.uniformity == pytest.approx(-math.log((1 - share) + share * math.exp(-8)), rel=1e-6)
    assert found.raw_uniformity == pytest.approx(-math.log(1 - share), rel=1e-6)


def test_vmf_entropy_is_above_uniformity_where_densities_differ() -> None:
    """Jensen. Two groups of 30 and 10: densities (29 + 10 s) / 39 and (9 + 30 s) / 39 with s = e^-4."""
    x = np.repeat(np.eye(2, dtype=np.float32), (30, 10), axis=0)
    s = math.exp(-4)
    densities = np.repeat([(29 + 10 * s) / 39, (9 + 30 * s) / 39], (30, 10))
    found = pair_statistics(x)
    assert found.vmf_entropy == pytest.approx(-float(np.log(densities).mean()), rel=1e-6)
    assert found.uniformity == pytest.approx(-math.log(densities.mean()), rel=1e-6)
    assert found.vmf_entropy > found.uniformity + 0.09
