"""Uniformity against every pair in float64, and the values that theory gives."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy.spatial.distance import pdist
from scipy.special import logsumexp

from evaluation import Features, uniformity
from evaluation.uniformity import UniformityConfig, pairwise_uniformity
from tests.evaluation.synthetic import clusters, context_of


def slow_uniformity(x: np.ndarray, t: float) -> float:
    exponents = -t * pdist(x.astype(np.float64), "sqeuclidean")
    return math.log(len(exponents)) - float(logsumexp(exponents))


def slow_pair(x: np.ndarray, t: float = 2.0) -> tuple[float, float]:
    norms = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    return slow_uniformity(x / np.where(norms == 0, 1, norms), t), slow_uniformity(x, t)


def gaussian(n: int, dim: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(n).normal(size=(n, dim)) * scale + shift).astype(np.float32)


CASES = {
    "several blocks": gaussian(1100, 24),
    "exactly one block": gaussian(512, 8, 0.3),
    "long vectors, far pairs": gaussian(600, 64, 30.0),
    "nearly collapsed, far from the origin": gaussian(300, 32, 0.01, 5.0),
    "short": gaussian(200, 16, 1e-3),
    "two images": gaussian(2, 4),
    "zero vectors": np.concatenate([gaussian(60, 8), np.zeros((4, 8), np.float32)]),
    "pairs of equal long vectors": np.repeat(gaussian(50, 64, 100.0), 2, axis=0),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("t", [2.0, 0.5])
def test_equals_all_pairs_in_float64(name: str, t: float) -> None:
    normalized, raw = pairwise_uniformity(CASES[name], t)
    expected_normalized, expected_raw = slow_pair(CASES[name], t)
    assert normalized == pytest.approx(expected_normalized, abs=1e-5)
    assert raw == pytest.approx(expected_raw, abs=1e-3, rel=1e-5)


def test_block_size_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian(100, 8, 3.0)
    whole = pairwise_uniformity(x)
    monkeypatch.setattr(uniformity, "BLOCK", 7)
    assert pairwise_uniformity(x) == pytest.approx(whole, rel=1e-5)


def test_random_directions_in_2048_dimensions() -> None:
    """Squared distances concentrate at 2 with variance 4 / D: U = 2 t - t^2 (4 / D) / 2 = 3.996."""
    normalized, _ = pairwise_uniformity(gaussian(700, 2048))
    assert normalized == pytest.approx(4 - 8 / 2048, abs=2e-4)


def test_identical_features_are_zero() -> None:
    normalized, raw = pairwise_uniformity(np.full((20, 8), 0.7, np.float32))
    assert normalized == pytest.approx(0, abs=1e-6)
    assert raw == 0.0


def test_two_opposite_points() -> None:
    """Of 2 m points, half at e and half at -e, m^2 pairs are at distance 2 |e| and the others at 0."""
    x = np.concatenate([np.ones((5, 1)), -np.ones((5, 1))]).astype(np.float32) * 3
    share = 25 / 45
    normalized, raw = pairwise_uniformity(x)
    assert normalized == pytest.approx(-math.log((1 - share) + share * math.exp(-8)), rel=1e-6)
    assert raw == pytest.approx(-math.log(1 - share), rel=1e-6)


def test_metrics_and_sample() -> None:
    features = clusters(5, 20, 12, spread=1.0, seed=0)
    context = context_of({"train": features}, "test", seed=4)
    normalized, raw = uniformity.evaluate(UniformityConfig(), context)
    assert (normalized.name, raw.name) == uniformity.metric_names(UniformityConfig())
    assert (normalized.value, raw.value) == pytest.approx(slow_pair(features.features), abs=1e-4)
    assert (normalized.n, raw.n) == (100, 100)

    few = UniformityConfig(max_images=30)
    sampled, again = (next(uniformity.evaluate(few, context)) for _ in range(2))
    assert sampled == again
    assert sampled.n == 30
    other = next(uniformity.evaluate(few, dataclasses.replace(context, seed=5)))
    assert other.value != sampled.value
    all_of_them = next(uniformity.evaluate(UniformityConfig(max_images=100), context))
    assert all_of_them == normalized


def test_collapse_warns() -> None:
    features = Features(np.ones((6, 3), np.float32), np.zeros(6, np.int64), ("a",))
    with pytest.warns(RuntimeWarning, match="collapsed"):
        values = [m.value for m in uniformity.evaluate(UniformityConfig(), context_of({"train": features}, "val"))]
    assert values == pytest.approx([0, 0], abs=1e-6)


def test_wrong_options_and_data_are_refused() -> None:
    for changes, message in (({"t": 0.0}, "t=0.0"), ({"max_images": 1}, "max_images=1")):
        with pytest.raises(ValueError, match=message):
            uniformity.check(dataclasses.replace(UniformityConfig(), **changes), "val", {"train": (5, 5)})
    with pytest.raises(ValueError, match="at least 2 images"):
        uniformity.check(UniformityConfig(), "val", {"train": (1,)})
