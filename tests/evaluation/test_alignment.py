"""Alignment against align_uniform's formula written out, and against what theory gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest

from evaluation import EvaluationContext, alignment
from evaluation.alignment import AlignmentConfig, same_class_alignment
from evaluation.metric import FeatureBatch
from tests.evaluation.synthetic import ImageSplits, clusters, context_of, image_context


def unit(x: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    return x / np.where(norms == 0, 1, norms)


def naive_views(x: np.ndarray, y: np.ndarray, alpha: float) -> float:
    """(x - y).norm(dim=1).pow(alpha).mean() of unit vectors, one pair at a time."""
    return float(np.mean([np.linalg.norm(a - b) ** alpha for a, b in zip(unit(x), unit(y), strict=True)]))


def naive_same_class(x: np.ndarray, labels: np.ndarray, alpha: float) -> float:
    means = []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i and labels[j] == labels[i]]
        if others:
            means.append(np.mean([np.linalg.norm(x[i] - x[j]) ** alpha for j in others]))
    return float(np.mean(means))


def views_context(passes: list[np.ndarray], labels: np.ndarray, index: np.ndarray | None = None) -> EvaluationContext:
    """Context whose pass number e delivers ``passes[e]`` in batches of 7."""
    index = np.arange(len(labels)) if index is None else index

    def view_features(split: str, recipe: str, *, epoch: int = 0, **_: object) -> Iterator[FeatureBatch]:
        assert (split, recipe) == ("train", "moco_v2")
        for start in range(0, len(passes[epoch]), 7):
            part = slice(start, min(start + 7, len(passes[epoch])))
            yield FeatureBatch(passes[epoch][part], labels[part], index[part])

    return dataclasses.replace(context_of({}, "val"), view_features=view_features)


def two_passes(noise: float = 0.3) -> tuple[list[np.ndarray], np.ndarray]:
    features = clusters(4, 12, 10, spread=0.7, seed=0)
    rng = np.random.default_rng(1)
    passes = [(features.features + noise * rng.normal(size=(48, 10))).astype(np.float32) for _ in range(2)]
    return passes, features.labels


@pytest.mark.parametrize("alpha", [2.0, 1.0, 3.0])
def test_equals_the_naive_formula(alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "BLOCK", 5)
    passes, labels = two_passes()
    views, same_class = alignment.evaluate(AlignmentConfig(alpha=alpha), views_context(passes, labels))
    assert (views.name, same_class.name) == alignment.metric_names(AlignmentConfig())
    assert views.value == pytest.approx(naive_views(passes[0], passes[1], alpha), rel=1e-6)
    distances = np.linalg.norm(unit(passes[0]) - unit(passes[1]), axis=1) ** alpha
    assert views.ci95 == pytest.approx(1.96 * distances.std(ddof=1) / 48**0.5, rel=1e-5)
    assert same_class.value == pytest.approx(naive_same_class(unit(passes[0]), labels, alpha), rel=1e-6)
    assert (views.n, same_class.n, same_class.ci95) == (48, 48, None)


def test_planted_angles() -> None:
    """Second views at 60 degrees from the first: squared distance 1. Classes of two opposite images: 4."""
    first = np.array([[1, 0], [-1, 0], [0, 2], [0, -3]], np.float32)
    turn = np.array([[0.5, np.sqrt(0.75)], [-np.sqrt(0.75), 0.5]])
    context = views_context([first, 5 * (first @ turn).astype(np.float32)], np.array([0, 0, 1, 1]))
    views, same_class = alignment.evaluate(AlignmentConfig(), context)
    assert views.value == pytest.approx(1, rel=1e-6)
    assert same_class.value == pytest.approx(4, rel=1e-6)


def test_equal_views_are_aligned_and_independent_ones_are_at_2() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 60, 500)).astype(np.float32)
    labels = np.zeros(60, np.int64)
    assert next(alignment.evaluate(AlignmentConfig(), views_context([first, 3 * first], labels))).value < 1e-10
    assert next(alignment.evaluate(AlignmentConfig(), views_context([first, second], labels))).value == pytest.approx(
        2, abs=0.05
    )


def test_classes_with_one_image_have_no_pair() -> None:
    x = clusters(3, 6, 5, spread=1.0, seed=0).features
    labels = np.array([0] * 5 + [1] + [2] * 12)
    value, count = same_class_alignment(x, labels, 2.0)
    assert count == 17
    assert value == pytest.approx(naive_same_class(x.astype(np.float64), labels, 2.0), rel=1e-9)


def test_reads_two_different_passes_of_the_backbone() -> None:
    images, asked = ImageSplits(), []
    metrics = list(alignment.evaluate(AlignmentConfig(), image_context(images, "val", asked=asked)))
    assert asked == ["train", "train"]
    assert all(0 < metric.value < 2 for metric in metrics)  # 0 would be one pass compared with itself
    alone = list(alignment.evaluate(AlignmentConfig(same_class=False), image_context(images, "val")))
    assert alone == metrics[:1]


def test_zero_and_identical_vectors() -> None:
    passes, labels = two_passes()
    passes[0][:2] = 0
    with pytest.warns(RuntimeWarning, match="2 of 48 feature vectors of split 'train' are zero"):
        views = next(alignment.evaluate(AlignmentConfig(), views_context(passes, labels)))
    assert views.value == pytest.approx(naive_views(passes[0], passes[1], 2.0), rel=1e-6)
    same = np.ones_like(passes[0])
    with pytest.warns(RuntimeWarning, match="collapsed"):
        metrics = list(alignment.evaluate(AlignmentConfig(), views_context([same, same], labels)))
    assert [m.value for m in metrics] == pytest.approx([0, 0], abs=1e-9)


def test_damaged_passes_are_refused() -> None:
    passes, labels = two_passes()
    broken = passes[1].copy()
    broken[30, 2] = np.nan
    with pytest.raises(ValueError, match="1 images of split 'train' have NaN"):
        list(alignment.evaluate(AlignmentConfig(), views_context([passes[0], broken], labels)))
    with pytest.raises(ValueError, match="gave 40 of 48 images"):
        list(alignment.evaluate(AlignmentConfig(), views_context([passes[0], passes[1][:40]], labels)))
    with pytest.raises(ValueError, match="order of their index"):
        list(alignment.evaluate(AlignmentConfig(), views_context(passes, labels, np.arange(48)[::-1])))
    with pytest.raises(ValueError, match="needs the backbone itself"):
        list(alignment.evaluate(AlignmentConfig(), context_of({}, "val")))


def test_second_pass_in_another_order_is_refused() -> None:
    passes, labels = two_passes()
    context = views_context(passes, labels)
    order = np.argsort(labels, kind="stable")
    other = views_context([passes[0], passes[1][order]], labels[order])

    def view_features(split: str, recipe: str, *, epoch: int = 0, **options: object) -> Iterator[FeatureBatch]:
        source = (context, other)[epoch].view_features
        assert source is not None
        yield from source(split, recipe, epoch=epoch)

    with pytest.raises(ValueError, match="not of the same images"):
        list(alignment.evaluate(AlignmentConfig(), dataclasses.replace(context, view_features=view_features)))


def test_wrong_options_and_data_are_refused() -> None:
    counts = {"train": (5, 5)}
    alignment.check(AlignmentConfig(), "val", counts)
    for changes, message in (({"alpha": 0.0}, "alpha=0.0"), ({"recipe": "mocov2"}, "recipe='mocov2'")):
        with pytest.raises(ValueError, match=message):
            alignment.check(dataclasses.replace(AlignmentConfig(), **changes), "val", counts)
    with pytest.raises(ValueError, match="at least 2 images"):
        alignment.check(AlignmentConfig(), "val", {"train": (1, 0)})
    with pytest.raises(ValueError, match="same_class=False"):
        alignment.check(AlignmentConfig(), "val", {"train": (1, 1, 1)})
    alignment.check(AlignmentConfig(same_class=False), "val", {"train": (1, 1, 1)})
