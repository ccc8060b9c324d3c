"""Representation entropy and ranks against scikit-learn's PCA, numpy's SVD and spectra that are known beforehand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from evaluation import Features, Metric, ModelResult, entropy, feature_blocks
from evaluation.entropy import EntropyConfig, feature_spectrum, numerical_rank, rankme, representation_entropy
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


@pytest.mark.parametrize("n", [100, 30])  # above and below the dimension
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    x = np.random.default_rng(0).normal(size=(n, 40)).astype(np.float32)
    whole = feature_spectrum(x, normalize=True)
    monkeypatch.setattr(feature_blocks, "BLOCK", 7)
    blocks = feature_spectrum(x, normalize=True)
    torch.testing.assert_close(blocks.variances, whole.variances, rtol=0, atol=1e-12)
    torch.testing.assert_close(blocks.singular_values, whole.singular_values, rtol=1e-9, atol=1e-6)


def test_scale_rotation_and_shift_do_not_matter() -> None:
    x = known_spectrum(np.array([0.6, 0.3, 0.1]), 50)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0].astype(np.float32)
    assert representation_entropy(100 * x @ rotation + 7) == pytest.approx(representation_entropy(x), abs=1e-4)


@pytest.mark.parametrize(("n", "dim", "true_rank"), [(300, 24, 24), (300, 24, 5), (20, 40, 19), (20, 40, 3)])
def test_rank_equals_torchs(n: int, dim: int, true_rank: int) -> None:
    """Centring takes one direction away where there are fewer images than dimensions."""
    rng = np.random.default_rng(n + true_rank)
    x = (rng.normal(size=(n, true_rank)) @ rng.normal(size=(true_rank, dim))).astype(np.float32)
    centred = torch.from_numpy(x.astype(np.float64) - x.mean(axis=0, dtype=np.float64))
    expected = int(torch.linalg.matrix_rank(centred, rtol=dim * torch.finfo(torch.float32).eps))
    assert numerical_rank(feature_spectrum(x).variances, dim) == expected == true_rank


@pytest.mark.parametrize(("n", "dim"), [(200, 24), (24, 60)])
@pytest.mark.parametrize("shift", [0.0, 4.0])
def test_rankme_equals_its_formula_on_an_svd(n: int, dim: int, shift: float) -> None:
    x = (np.random.default_rng(n).normal(size=(n, dim)) * np.logspace(0, -2, dim) + shift).astype(np.float32)
    singular = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    p = singular / singular.sum() + 1e-7
    assert rankme(feature_spectrum(x).singular_values) == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), rel=1e-6)


def test_rankme_of_orthogonal_rows_is_their_number() -> None:
    assert rankme(feature_spectrum(3 * np.eye(12, 20, dtype=np.float32)).singular_values) == pytest.approx(12, rel=1e-4)


def test_metrics_and_normalisation() -> None:
    features = clusters(4, 30, 10, spread=1.0, seed=0)
    context = context_of({"train": features}, "val")
    h_r, bound, effective_rank, rank, rank_me = entropy.evaluate(EntropyConfig(), context)
    assert (h_r.name, h_r.n, bound.name) == ("entropy/h_r", 120, "entropy/h_r_upper_bound")
    assert h_r.value == pytest.approx(pca_entropy(features.features), abs=1e-6)
    assert bound.value == pytest.approx(math.log(10))
    assert effective_rank == Metric("entropy/effective_rank", math.exp(h_r.value), n=120)
    assert rank == Metric("entropy/rank", 10.0, n=120)
    assert rank_me.name == "entropy/rankme"
    assert effective_rank.value < rank_me.value < 10  # standard deviations are closer to equal than variances
    unit = features.features / np.linalg.norm(features.features, axis=1, keepdims=True)
    normalized = next(entropy.evaluate(EntropyConfig(normalize=True), context))
    assert normalized.value == pytest.approx(pca_entropy(unit), abs=1e-5)
    assert normalized.value != pytest.approx(h_r.value, abs=1e-3)
    assert "raw" in entropy.protocol(EntropyConfig(), "val")["features"]
    assert "L2-normalised" in entropy.protocol(EntropyConfig(normalize=True), "val")["features"]


def test_few_images_bound_the_entropy_by_their_number() -> None:
    """N images span N - 1 directions around their mean, N from the origin."""
    few = Features(np.eye(5, 40, dtype=np.float32), np.zeros(5, np.int64), ("a",))
    h_r, bound, _, rank, rank_me = entropy.evaluate(EntropyConfig(), context_of({"train": few}, "val"))
    assert bound.value == pytest.approx(math.log(4))
    assert h_r.value == pytest.approx(bound.value, abs=1e-9)
    assert rank.value == 4
    assert rank_me.value == pytest.approx(5, rel=1e-4)


@pytest.mark.parametrize("normalize", [False, True])
def test_collapsed_features_are_zero_with_a_warning(normalize: bool) -> None:
    features = Features(np.full((5, 3), 0.1, np.float32), np.zeros(5, np.int64), ("a",))
    with pytest.warns(RuntimeWarning, match="collapsed"):
        metrics = list(entropy.evaluate(EntropyConfig(normalize), context_of({"train": features}, "val")))
    assert [m.value for m in metrics[:4]] == [0.0, math.log(3), 1.0, 0.0]
    assert metrics[4].value == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("n", [7, 90])
def test_rounding_of_equal_rows_is_no_variance(n: int) -> None:
    row = np.random.default_rng(0).normal(size=(1, 40)).astype(np.float32)
    assert not feature_spectrum(np.repeat(row, n, axis=0), normalize=True).variances.any()
    other = np.repeat(row, n, axis=0)
    other[3, 5] = np.nextafter(other[3, 5], np.float32(9))  # the least difference there is
    assert feature_spectrum(other, normalize=True).variances.any()


def test_zero_vectors_and_constant_dimensions() -> None:
    x = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    x[:, 2] = 5
    x[:3] = 0
    features = Features(x, np.zeros(40, np.int64), ("a",))
    with pytest.warns(RuntimeWarning, match="3 of 40 feature vectors of split 'train' are zero"):
        metrics = list(entropy.evaluate(EntropyConfig(normalize=True), context_of({"train": features}, "val")))
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    assert metrics[0].value == pytest.approx(pca_entropy(x / np.where(norms == 0, 1, norms)), abs=1e-6)

    constant = Features(x[3:], np.zeros(37, np.int64), ("a",))
    values = {m.name: m.value for m in entropy.evaluate(EntropyConfig(), context_of({"train": constant}, "val"))}
    assert values["entropy/rank"] == 5

    nothing = Features(np.zeros((4, 3), np.float32), np.zeros(4, np.int64), ("a",))
    with pytest.warns(RuntimeWarning, match="collapsed"):
        metrics = list(entropy.evaluate(EntropyConfig(), context_of({"train": nothing}, "val")))
    assert [m.value for m in metrics] == [0.0, math.log(3), 1.0, 0.0, 0.0]


def test_nan_and_one_image_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 images"):
        entropy.check(EntropyConfig(), "val", {"train": (1, 0)})
    broken = Features(np.full((4, 3), np.nan, np.float32), np.zeros(4, np.int64), ("a",))
    with pytest.raises(ValueError, match="NaN"):
        list(entropy.evaluate(EntropyConfig(), context_of({"train": broken}, "val")))


def test_comparison_draws_class_counts() -> None:
    metrics = {"entropy/h_r": Metric("entropy/h_r", 4.0)}
    models = [ModelResult(f"run {c}", "supervised", c, metrics, {}) for c in (8, 16)]
    (figure,) = entropy.compare(EntropyConfig(), models)
    assert figure.name == "entropy/by_num_classes.png"
    assert list(entropy.compare(EntropyConfig(), models[:1])) == []
