"""Weighted kNN against loops over every pair and against scikit-learn."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from evaluation import knn
from evaluation.knn import KnnConfig, knn_predict
from evaluation.metric import l2_normalize
from tests.evaluation.synthetic import clusters, context_of, five_splits, with_labels


def slow_predict(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, k: int, temperature: float) -> np.ndarray:
    """One query at a time in float64."""
    predicted = []
    for query in queries.astype(np.float64):
        similarity = bank.astype(np.float64) @ query
        votes = np.zeros(labels.max() + 1)
        for i in np.argsort(-similarity)[:k]:
            votes[labels[i]] += np.exp((similarity[i] - 1) / temperature)  # the largest vote is e^0
        predicted.append(votes.argmax())
    return np.array(predicted)


def unit_splits(spread: float = 2.5) -> tuple:
    bank, query = clusters(7, 40, 24, spread=spread, seed=0), clusters(7, 20, 24, spread=spread, seed=1)
    return l2_normalize(bank.features, "train"), bank.labels, l2_normalize(query.features, "val"), query.labels


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (200, 0.07), (280, 0.5), (50, 0.001)])
def test_predictions_equal_a_loop(k: int, temperature: float) -> None:
    bank, labels, query, _ = unit_splits()
    tensors = (torch.from_numpy(bank), torch.from_numpy(labels), torch.from_numpy(query))
    ours = knn_predict(*tensors, num_classes=7, num_neighbors=k, temperature=temperature)
    np.testing.assert_array_equal(ours, slow_predict(bank, labels, query, k, temperature))


def test_predictions_equal_scikit_learn() -> None:
    bank, labels, query, _ = unit_splits()
    model = KNeighborsClassifier(30, weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine", algorithm="brute")
    expected = model.fit(bank, labels).predict(query)
    tensors = (torch.from_numpy(bank), torch.from_numpy(labels), torch.from_numpy(query))
    ours = knn_predict(*tensors, num_classes=7, num_neighbors=30, temperature=0.07)
    np.testing.assert_array_equal(ours, expected)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, labels, query, _ = unit_splits()
    monkeypatch.setattr(knn, "QUERY_BLOCK", 13)
    monkeypatch.setattr(knn, "BANK_BLOCK", 17)  # smaller than k: the running top-k first has to fill
    tensors = (torch.from_numpy(bank), torch.from_numpy(labels), torch.from_numpy(query))
    ours = knn_predict(*tensors, num_classes=7, num_neighbors=40, temperature=0.07)
    np.testing.assert_array_equal(ours, slow_predict(bank, labels, query, 40, 0.07))


@pytest.mark.parametrize("phase", ["val", "test"])
def test_separable_classes_reach_100(phase) -> None:
    splits = five_splits(spread=0.05, num_classes=10)
    top1, k = knn.evaluate(KnnConfig(), context_of(splits, phase))
    assert (top1.name, top1.value, top1.n) == ("knn/top1", 100.0, len(splits[phase].labels))
    assert top1.ci95 is not None
    assert 0 < top1.ci95 < 5
    assert (k.name, k.value) == ("knn/num_neighbors", 200)


def test_random_labels_give_chance() -> None:
    splits = {name: clusters(4, 100, 16, spread=1.0, seed=i) for i, name in enumerate(("train", "val"))}
    rng = np.random.default_rng(0)
    shuffled = {name: with_labels(f, rng.permutation(f.labels)) for name, f in splits.items()}
    top1, _ = knn.evaluate(KnnConfig(), context_of(shuffled, "val"))
    assert top1.value == pytest.approx(25, abs=9)  # 4 standard errors


def test_more_neighbours_than_images_warns_and_reports_the_k_used() -> None:
    splits = five_splits(num_classes=5, per_class=10, spread=0.1)
    with pytest.warns(RuntimeWarning, match="num_neighbors=200 exceeds the 50 training images"):
        top1, k = knn.evaluate(KnnConfig(), context_of(splits, "val"))
    assert (top1.value, k.value) == (100.0, 50)


def test_wrong_options_and_data_are_refused() -> None:
    counts = {"train": (5, 5), "val": (5, 5)}
    for changes, message in (({"num_neighbors": 0}, "num_neighbors=0"), ({"temperature": 0.0}, "temperature=0.0")):
        with pytest.raises(ValueError, match=message):
            knn.check(dataclasses.replace(KnnConfig(), **changes), "val", counts)
    with pytest.raises(ValueError, match="split 'test'"):
        knn.check(KnnConfig(), "test", counts)
    knn.check(KnnConfig(), "val", counts)
