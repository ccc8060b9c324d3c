"""Representation entropy against scikit-learn's PCA and spectra that are known beforehand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.decomposition import PCA

from evaluation import Features, entropy
from evaluation.entropy import EntropyConfig, representation_entropy
from tests.evaluation.synthetic import clusters, context_of


def pca_entropy(x: np.ndarray) -> float:
    shares = PCA(svd_solver="full").fit(x.astype(np.float64)).explained_variance_ratio_
    shares = shares[shares > 1e-14]
    return float(-(shares * np.log(shares)).sum())


def known_spectrum(shares: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """Features (N, D) whose covariance has exactly these eigenvalue shares, in a random basis, far from the origin."""
    rng = np.random.default_rng(seed)
    centred = rng.normal(size=(n, len(shares)))
    scores = np.linalg.qr(centred - centred.mean(axis=0))[0]
    basis = np.linalg.qr(rng.normal(size=(len(shares), len(shares))))[0]
    return ((scores * np.sqrt(n * shares)) @ basis.T + 3).astype(np.float32)


@pytest.mark.parametrize(("n", "dim"), [(300, 20), (30, 50), (21, 20), (20, 20)])
def test_equals_pca(n: int, dim: int) -> None:
    x = (np.random.default_rng(n).normal(size=(n, dim)) * np.logspace(0, -2, dim) + 5).astype(np.float32)
    assert representation_entropy(x) == pytest.approx(pca_entropy(x), abs=1e-6)


@pytest.mark.parametrize("shares", [[0.25] * 4, [0.5, 0.25, 0.125, 0.125], [0.97, 0.01, 0.01, 0.01]])
def test_planted_spectrum(shares: list[float]) -> None:
    expected = -sum(p * math.log(p) for p in shares)
    assert representation_entropy(known_spectrum(np.array(shares), 200)) == pytest.approx(expected, abs=1e-5)


def test_isotropic_gaussian_approaches_ln_d() -> None:
    x = np.random.default_rng(0).normal(size=(20_000, 16)).astype(np.float32)
    assert math.log(16) - 0.002 < representation_entropy(x) <= math.log(16)


def test_one_direction_is_zero() -> None:
    x = np.outer(np.arange(10.0), np.ones(6)).astype(np.float32)
    assert representation_entropy(x) == pytest.approx(0, abs=1e-9)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
    whole = representation_entropy(x)
    monkeypatch.setattr(entropy, "BLOCK", 7)
    assert representation_entropy(x) == pytest.approx(whole, abs=1e-12)


def test_scale_rotation_and_shift_do_not_matter() -> None:
    x = known_spectrum(np.array([0.6, 0.3, 0.1]), 50)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0].astype(np.float32)
    assert representation_entropy(100 * x @ rotation + 7) == pytest.approx(representation_entropy(x), abs=1e-4)


def test_metrics_and_normalisation() -> None:
    features = clusters(4, 30, 10, spread=1.0, seed=0)
    context = context_of({"train": features}, "val")
    h_r, bound = entropy.evaluate(EntropyConfig(), context)
    assert (h_r.name, h_r.n, bound.name) == ("entropy/h_r", 120, "entropy/h_r_upper_bound")
    assert h_r.value == pytest.approx(pca_entropy(features.features), abs=1e-6)
    assert bound.value == pytest.approx(math.log(10))
    unit = features.features / np.linalg.norm(features.features, axis=1, keepdims=True)
    normalized, _ = entropy.evaluate(EntropyConfig(normalize=True), context)
    assert normalized.value == pytest.approx(pca_entropy(unit), abs=1e-5)
    assert normalized.value != pytest.approx(h_r.value, abs=1e-3)
    assert "raw" in entropy.protocol(EntropyConfig(), "val")["features"]
    assert "L2-normalised" in entropy.protocol(EntropyConfig(normalize=True), "val")["features"]


def test_few_images_bound_the_entropy_by_their_number() -> None:
    """N images span N - 1 directions around their mean."""
    few = Features(np.eye(5, 40, dtype=np.float32), np.zeros(5, np.int64), ("a",))
    h_r, bound = entropy.evaluate(EntropyConfig(), context_of({"train": few}, "val"))
    assert bound.value == pytest.approx(math.log(4))
    assert h_r.value == pytest.approx(bound.value, abs=1e-9)


def test_collapsed_features_are_zero_with_a_warning() -> None:
    features = Features(np.full((5, 3), 0.1, np.float32), np.zeros(5, np.int64), ("a",))
    with pytest.warns(RuntimeWarning, match="collapsed"):
        h_r, bound = entropy.evaluate(EntropyConfig(), context_of({"train": features}, "val"))
    assert (h_r.value, bound.value) == (0.0, math.log(3))


def test_one_image_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 images"):
        entropy.check(EntropyConfig(), "val", {"train": (1, 0)})
