"""Class geometry against loops and numpy's correlation, and against planted truths."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from evaluation import Features, Phase, class_geometry, feature_blocks
from evaluation.class_geometry import ClassGeometryConfig, class_centres, feature_redundancy, mixtureness
from tests.evaluation.synthetic import clusters, context_of, five_splits

RAW = ClassGeometryConfig(normalize=False)


def values(config: ClassGeometryConfig, splits: dict[str, Features], phase: Phase = "val") -> dict[str, float]:
    metrics = class_geometry.evaluate(config, context_of(splits, phase))
    return {metric.name.removeprefix("class_geometry/"): metric.value for metric in metrics}


def unit(x: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    return x / np.where(norms == 0, 1, norms)


def naive_distances(x: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """D_inter and D_intra, pair by pair and image by image."""
    classes = np.unique(labels)
    centres = {c: x[labels == c].astype(np.float64).mean(axis=0) for c in classes}
    inter = [((centres[j] - centres[k]) ** 2).sum() for j in classes for k in classes if j != k]
    intra = [
        np.mean([((row - centres[c]) ** 2).sum() for row in x[labels == c].astype(np.float64)])
        for c in classes
        if (labels == c).sum() > 1
    ]
    return float(np.mean(inter)), float(np.mean(intra))


def naive_mixtureness(base: np.ndarray, unseen: np.ndarray, k: int) -> float:
    centres = np.concatenate([base, unseen])
    deviations = []
    for c in range(len(centres)):
        others = sorted((float(np.linalg.norm(centres[c] - centres[o])), o) for o in range(len(centres)) if o != c)
        n_c = sum(o >= len(base) for _, o in others[:k])
        deviations.append(abs(n_c / k - len(unseen) / len(centres)))
    return 1 - float(np.mean(deviations))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("phase", ["val", "test"])
def test_equals_the_naive_formulas(normalize: bool, phase: Phase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_blocks, "BLOCK", 13)
    splits = five_splits(num_classes=5, per_class=9, dim=8)
    found = values(ClassGeometryConfig(num_neighbors=3, normalize=normalize), splits, phase)
    train, unseen = splits["train"], splits[{"val": "val_classes", "test": "novel_classes"}[phase]]
    x, y = (unit(f.features) if normalize else f.features.astype(np.float64) for f in (train, unseen))
    inter, intra = naive_distances(x, train.labels)
    assert found["inter_class"] == pytest.approx(inter, rel=1e-9)
    assert found["intra_class"] == pytest.approx(intra, rel=1e-9)
    assert found["discriminative_ratio"] == pytest.approx(inter / intra, rel=1e-9)
    centres = [
        np.stack([z[labels == c].mean(axis=0) for c in range(5)])
        for z, labels in ((x, train.labels), (y, unseen.labels))
    ]
    assert found["mixtureness"] == pytest.approx(naive_mixtureness(centres[0], centres[1], 3), abs=1e-9)
    expected = np.abs(np.corrcoef(train.features.astype(np.float64), rowvar=False)).mean()
    assert found["redundancy"] == pytest.approx(expected, rel=1e-9)
    assert found["constant_dims"] == 0


def test_planted_discriminative_ratio() -> None:
    """Centres 6 apart (D_inter 36); images 1 and 2 to each side of them (D_intra (1 + 4) / 2)."""
    x = np.array([[0, 1], [0, -1], [6, 2], [6, -2]], np.float32)
    splits = {
        "train": Features(x, np.array([0, 0, 1, 1]), ("a", "b")),
        "val_classes": clusters(2, 3, 2, spread=1, seed=0),
    }
    found = values(ClassGeometryConfig(num_neighbors=1, normalize=False), splits)
    assert (found["inter_class"], found["intra_class"]) == pytest.approx((36, 2.5))
    assert found["discriminative_ratio"] == pytest.approx(36 / 2.5)


def test_more_spread_lowers_the_ratio_and_scale_does_not_matter() -> None:
    ratios = []
    for spread in (0.3, 1.0):
        for scale in (1.0, 50.0):
            train = clusters(6, 20, 16, spread=spread, seed=0, scale=scale)
            ratios.append(values(RAW, {**five_splits(), "train": train})["discriminative_ratio"])
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-5)
    assert ratios[0] > 3 * ratios[2]


def on_circle(kinds: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres evenly on a circle, in the order of the letters: p for pretraining, e for evaluation."""
    angles = 2 * np.pi * np.arange(len(kinds)) / len(kinds)
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    chosen = np.array(list(kinds)) == "e"
    return torch.from_numpy(points[~chosen]), torch.from_numpy(points[chosen])


@pytest.mark.parametrize(
    ("kinds", "k", "expected"),
    [
        ("ppee" * 4, 2, 1.0),  # one neighbour of each kind
        ("pe" * 8, 2, 0.5),  # both neighbours of the other kind
        ("p" * 20 + "e" * 20, 2, 0.5 + 0.5 * 4 / 40),  # separated, but for the 4 at the two borders
        ("ppp" + "e", 1, 1 - (2 * 0.25 + 2 * 0.25) / 4),  # ties: p beside e sees it with half a place
    ],
)
def test_planted_mixtureness(kinds: str, k: int, expected: float) -> None:
    assert mixtureness(*on_circle(kinds), k) == pytest.approx(expected)


def test_separated_sets_of_classes() -> None:
    """Every neighbour is of the own set: |0 - 2/8| for 6 classes, |1 - 2/8| for 2 (of k = 1)."""
    rng = np.random.default_rng(0)
    base, unseen = torch.from_numpy(rng.normal(size=(6, 4))), torch.from_numpy(rng.normal(size=(2, 4)) + 100)
    assert mixtureness(base, unseen, 1) == pytest.approx(1 - (6 * 0.25 + 2 * 0.75) / 8)


def test_planted_redundancy() -> None:
    """Five dimensions without correlation; each of them twice, once with the sign turned; six copies of one."""
    scores = np.random.default_rng(0).normal(size=(200, 5))
    scores = np.linalg.qr(scores - scores.mean(axis=0))[0]
    assert feature_redundancy(scores.astype(np.float32) + 3)[0] == pytest.approx(1 / 5, rel=1e-4)
    doubled = np.concatenate([scores, -7 * scores], axis=1).astype(np.float32)
    assert feature_redundancy(doubled)[0] == pytest.approx(1 / 5, rel=1e-4)  # 2 of 10 entries of each row are 1
    copies = np.repeat(scores[:, :1], 6, axis=1).astype(np.float32)
    assert feature_redundancy(copies)[0] == pytest.approx(1, rel=1e-6)


def test_constant_dimensions_are_left_out_and_counted() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 7)).astype(np.float32)
    expected = np.abs(np.corrcoef(x.astype(np.float64), rowvar=False)).mean()
    wide = np.concatenate([x, np.zeros((90, 2)), np.full((90, 1), 0.1)], axis=1).astype(np.float32)
    redundancy, constant = feature_redundancy(wide)
    assert (redundancy, constant) == (pytest.approx(expected, rel=1e-9), 3)
    assert feature_redundancy(np.full((5, 4), 0.3, np.float32)) == (1.0, 4)


def test_classes_of_one_image_and_without_images() -> None:
    splits = five_splits(num_classes=4, per_class=6, dim=5)
    train = splits["train"]
    few = Features(train.features[:13], np.array([0] * 6 + [2] * 6 + [3]), train.class_names)  # class 1 has none
    found = values(RAW, {**splits, "train": few})
    inter, intra = naive_distances(few.features, few.labels)
    assert (found["inter_class"], found["intra_class"]) == (pytest.approx(inter), pytest.approx(intra))
    assert len(class_centres(few, "train", normalize=False).centres) == 3


def test_zero_vectors_warn_and_collapse_stays_finite() -> None:
    splits = five_splits(num_classes=4, per_class=6, dim=5)
    splits["train"].features[:2] = 0
    with pytest.warns(RuntimeWarning, match="2 of 24 feature vectors of split 'train' are zero"):
        found = values(ClassGeometryConfig(), splits)
    inter, _ = naive_distances(unit(splits["train"].features), splits["train"].labels)
    assert found["inter_class"] == pytest.approx(inter)

    same = {name: dataclasses.replace(f, features=np.full_like(f.features, 0.1)) for name, f in splits.items()}
    with pytest.warns(RuntimeWarning, match="collapsed"):
        found = values(ClassGeometryConfig(num_neighbors=3), same)
    assert found["discriminative_ratio"] == pytest.approx(0, abs=1e-12)
    # Any 3 of the 7 equally near others: 4 / 7 or 3 / 7 of them are unseen, against 1 / 2.
    assert found["mixtureness"] == pytest.approx(1 - 1 / 14)
    assert (found["redundancy"], found["constant_dims"]) == (1.0, 5)


def test_damaged_data_and_wrong_options_are_refused() -> None:
    splits = five_splits(num_classes=4, per_class=6, dim=5)
    splits["val_classes"].features[3] = np.nan
    with pytest.raises(ValueError, match="'val_classes' contain NaN"):
        values(RAW, splits)
    counts = {"train": (5, 5), "val_classes": (5, 0, 5)}
    class_geometry.check(ClassGeometryConfig(num_neighbors=3), "val", counts)
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"num_neighbors={k}; allowed: 1 to 3"):
            class_geometry.check(ClassGeometryConfig(num_neighbors=k), "val", counts)
    with pytest.raises(ValueError, match="split 'novel_classes'; the data has: train, val_classes"):
        class_geometry.check(ClassGeometryConfig(), "test", counts)
    for train in ((9, 0), (1, 1, 1)):
        with pytest.raises(ValueError, match="at least 2 classes, one of them with 2 images"):
            class_geometry.check(ClassGeometryConfig(), "val", {**counts, "train": train})
