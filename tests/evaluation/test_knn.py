"""Weighted kNN against loops over every pair in float64, scikit-learn, lightly and faiss."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightly.utils.benchmarking import knn_predict as lightly_predict
from sklearn.neighbors import KNeighborsClassifier

from evaluation import EvaluationContext, Features, Metric, ModelResult, Samples, knn, neighbors
from evaluation.knn import KnnConfig, knn_predict
from evaluation.metric import l2_normalize
from evaluation.neighbors import DeviceBest, HostBest, UnitRows, faiss_neighbors, nearest_neighbors
from tests.evaluation.synthetic import clusters, context_of, five_splits, with_labels

BACKENDS = ("blocks", "faiss")


def slow_predict(bank: Features, queries: Features, k: int, temperature: float) -> np.ndarray:
    """One query at a time in float64."""
    unit = [f.features / np.linalg.norm(f.features.astype(np.float64), axis=1, keepdims=True) for f in (bank, queries)]
    predicted = []
    for query in unit[1]:
        similarity = unit[0] @ query
        votes = np.zeros(bank.labels.max() + 1)
        for i in np.argsort(-similarity)[:k]:
            votes[bank.labels[i]] += np.exp((similarity[i] - 1) / temperature)  # the largest vote is e^0
        predicted.append(votes.argmax())
    return np.array(predicted)


def two_splits(spread: float = 2.5) -> tuple[Features, Features]:
    return clusters(7, 40, 24, spread=spread, seed=0), clusters(7, 20, 24, spread=spread, seed=1)


def predict(bank: Features, queries: Features, k: int, temperature: float = 0.07, **options) -> np.ndarray:
    return knn_predict(
        UnitRows(bank.features, "train"),
        bank.labels,
        UnitRows(queries.features, "val"),
        num_classes=len(bank.class_names),
        num_neighbors=k,
        temperature=temperature,
        **options,
    )


def evaluated(config: KnnConfig, context: EvaluationContext) -> tuple[Metric, Metric, np.ndarray]:
    """Top-1, k, and which images are right."""
    top1, k, right = knn.evaluate(config, context)
    assert isinstance(top1, Metric)
    assert isinstance(k, Metric)
    assert isinstance(right, Samples)
    assert (top1.name, k.name, right.name) == ("knn/top1", "knn/num_neighbors", "knn/top1")
    assert 100 * right.values.mean() == pytest.approx(top1.value)
    return top1, k, right.values


def small_blocks(monkeypatch: pytest.MonkeyPatch, query_chunk: int, query_block: int, bank_block: int) -> None:
    monkeypatch.setattr(neighbors, "HOST_BLOCKS", neighbors.Blocks(query_chunk, query_block, bank_block))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (200, 0.07), (280, 0.5), (50, 0.001)])
def test_predictions_equal_a_loop(k: int, temperature: float, backend: str) -> None:
    bank, queries = two_splits()
    ours = predict(bank, queries, k, temperature, backend=backend)
    np.testing.assert_array_equal(ours, slow_predict(bank, queries, k, temperature))


def test_predictions_equal_scikit_learn() -> None:
    bank, queries = two_splits()
    votes: Any = lambda distance: np.exp((1 - distance) / 0.07)  # noqa: E731 - scikit-learn's types know names only
    model = KNeighborsClassifier(30, weights=votes, metric="cosine", algorithm="brute")
    expected = model.fit(bank.features, bank.labels).predict(queries.features)
    np.testing.assert_array_equal(predict(bank, queries, 30), expected)


@pytest.mark.parametrize("k", [5, 200])
def test_predictions_equal_lightly(k: int) -> None:
    bank, queries = two_splits()
    unit = [torch.from_numpy(l2_normalize(f.features, "")) for f in (queries, bank)]
    expected = lightly_predict(unit[0], unit[1].T, torch.from_numpy(bank.labels), 7, knn_k=k, knn_t=0.07)[:, 0]
    np.testing.assert_array_equal(predict(bank, queries, k), expected.numpy())


# Blocks below k (a query's room fills over several blocks), one row, sizes that do not divide, and groups cut short.
@pytest.mark.parametrize("sizes", [(1000, 13, 17), (50, 50, 1), (64, 7, 33), (3, 3, 279), (140, 140, 280)])
def test_blocks_change_nothing(sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    bank, queries = two_splits()
    small_blocks(monkeypatch, *sizes)
    np.testing.assert_array_equal(predict(bank, queries, 40), slow_predict(bank, queries, 40, 0.07))
    np.testing.assert_array_equal(predict(bank, queries, 40, backend="faiss"), predict(bank, queries, 40))


@pytest.mark.parametrize("k", [1, 7, 32, 299])
def test_host_and_device_find_the_same_neighbours_as_sorting(k: int) -> None:
    products = torch.from_numpy(np.random.default_rng(k).normal(size=(50, 300)).astype(np.float32))
    expected = products.sort(dim=1, descending=True)
    for best in (HostBest(50, k), DeviceBest(50, k, "cpu")):
        for query in (0, 30):
            for row in range(0, 300, 45):
                best.offer(products[query : query + 30, row : row + 45].contiguous(), query, row)
        similarity, rows = best.result()
        order = similarity.argsort(dim=1, descending=True)
        torch.testing.assert_close(similarity.gather(1, order), expected.values[:, :k], rtol=0, atol=0)
        torch.testing.assert_close(rows.gather(1, order), expected.indices[:, :k], rtol=0, atol=0)


def test_several_threads_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, queries = two_splits()
    expected = predict(bank, queries, 40)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    np.testing.assert_array_equal(predict(bank, queries, 40), expected)


def test_of_equal_similarities_the_first_rows_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 8, 8, 16)
    rng = np.random.default_rng(0)
    distinct = np.eye(4, dtype=np.float32)  # similarities are exactly 0 or 1
    kind = rng.integers(0, 4, 200)
    bank, queries = UnitRows(distinct[kind], "train"), UnitRows(distinct, "val")
    for k in (3, 20, 120):
        (found,) = nearest_neighbors(bank, queries, k)
        for q in range(4):
            expected = np.argsort(kind != q, kind="stable")[:k]
            np.testing.assert_array_equal(np.sort(found.rows[q].numpy()), np.sort(expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_duplicates_vote_each_and_equal_sums_go_to_the_smallest_label(backend: str) -> None:
    x = np.repeat(np.eye(3, 8, dtype=np.float32), (4, 4, 2), axis=0)
    bank = Features(x, np.array([1, 1, 0, 0, 2, 2, 2, 1, 0, 1]), ("a", "b", "c"))
    queries = Features(5 * np.eye(3, 8, dtype=np.float32), np.zeros(3, np.int64), bank.class_names)
    np.testing.assert_array_equal(predict(bank, queries, 4, backend=backend)[:2], [0, 2])


def test_scale_of_the_features_does_not_matter_and_nothing_is_written() -> None:
    bank, queries = two_splits()
    rng = np.random.default_rng(0)
    scaled = dataclasses.replace(bank, features=bank.features * rng.uniform(1e-18, 1e18, (280, 1)).astype(np.float32))
    before = scaled.features.copy()
    scaled.features.flags.writeable = False  # as Ray's object store gives them; no warning may come of it
    np.testing.assert_array_equal(predict(scaled, queries, 40), predict(bank, queries, 40))
    np.testing.assert_array_equal(scaled.features, before)


def test_features_may_lie_on_disk(tmp_path: Path) -> None:
    bank, queries = two_splits()
    bank.features.tofile(tmp_path / "bank")
    mapped = np.memmap(tmp_path / "bank", np.float32, "r", shape=bank.features.shape)
    np.testing.assert_array_equal(
        predict(dataclasses.replace(bank, features=mapped), queries, 40), predict(bank, queries, 40)
    )


def test_zero_vectors_are_warned_about_and_are_far_from_everything() -> None:
    bank, queries = two_splits(spread=0.1)
    bank.features[::40] = 0
    with pytest.warns(RuntimeWarning, match="7 of 280 feature vectors of split 'train' are zero"):
        predicted = predict(bank, queries, 5)
    np.testing.assert_array_equal(predicted, queries.labels)


@pytest.mark.parametrize("phase", ["val", "test"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_separable_classes_reach_100(phase, backend) -> None:
    splits = five_splits(spread=0.05, num_classes=10)
    top1, k, right = evaluated(KnnConfig(backend=backend), context_of(splits, phase))
    assert (top1.value, top1.n) == (100.0, len(splits[phase].labels))
    assert top1.ci95 is not None
    assert 0 < top1.ci95 < 5
    assert k.value == 200
    np.testing.assert_array_equal(right, np.ones(len(splits[phase].labels)))


def test_random_labels_give_chance() -> None:
    splits = {name: clusters(4, 100, 16, spread=1.0, seed=i) for i, name in enumerate(("train", "val"))}
    rng = np.random.default_rng(0)
    shuffled = {name: with_labels(f, rng.permutation(f.labels)) for name, f in splits.items()}
    top1, _, _ = evaluated(KnnConfig(), context_of(shuffled, "val"))
    assert top1.value == pytest.approx(25, abs=9)  # 4 standard errors


def test_more_neighbours_than_images_warns_and_reports_the_k_used() -> None:
    splits = five_splits(num_classes=5, per_class=10, spread=0.1)
    with pytest.warns(RuntimeWarning, match="num_neighbors=200 exceeds the 50 training images"):
        top1, k, _ = evaluated(KnnConfig(), context_of(splits, "val"))
    assert (top1.value, k.value) == (100.0, 50)


def test_models_are_compared_on_the_same_images() -> None:
    right = {"good": np.ones(50), "bad": np.arange(50) < 20}
    models = [ModelResult(name, "simsiam", 5, {}, {"knn/top1": r.astype(np.uint8)}) for name, r in right.items()]
    found = {m.name: m.value for m in knn.compare(KnnConfig(), models) if isinstance(m, Metric)}
    assert found["knn/top1/bad_minus_good"] == pytest.approx(-60)


def test_corrupt_features_are_refused() -> None:
    splits = five_splits()
    splits["train"].features[3, 2] = np.nan
    with pytest.raises(ValueError, match=r"1 of 180 feature vectors of split 'train' contain NaN or infinity"):
        list(knn.evaluate(KnnConfig(), context_of(splits, "val")))


def test_faiss_that_is_not_installed_is_an_error_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    bank, queries = two_splits()
    with pytest.raises(ValueError, match="pip install faiss-cpu"):
        list(faiss_neighbors(UnitRows(bank.features, "train"), UnitRows(queries.features, "val"), 5))


def test_wrong_options_and_data_are_refused() -> None:
    counts = {"train": (5, 5), "val": (5, 5)}
    wrong = (
        ({"num_neighbors": 0}, "num_neighbors=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"backend": "annoy"}, "backend='annoy'; allowed: blocks, faiss"),
    )
    for changes, message in wrong:
        with pytest.raises(ValueError, match=message):
            knn.check(dataclasses.replace(KnnConfig(), **changes), "val", counts)
    with pytest.raises(ValueError, match="split 'test'"):
        knn.check(KnnConfig(), "test", counts)
    knn.check(KnnConfig(), "val", counts)
