"""Scores of confusion matrices against torchmetrics, scikit-learn and a loop over pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from sklearn.metrics import confusion_matrix as sklearn_confusion
from torchmetrics.classification import MulticlassJaccardIndex

from evaluation.segmentation.metric import IGNORED, bootstrap_half_widths, confusion_matrix, score

CLASSES = 7


def _maps(seed: int, shape: tuple[int, ...] = (3, 20, 30)) -> tuple[torch.Tensor, torch.Tensor]:
    """Truth with ignored pixels, of classes 0 to 4 and 6; predictions of 0 to 3 and 5, often right. 5 is never true."""
    rng = np.random.default_rng(seed)
    truth = rng.choice([0, 1, 2, 3, 4, 6, IGNORED], shape, p=[0.3, 0.2, 0.15, 0.1, 0.05, 0.1, 0.1])
    predicted = rng.choice([0, 1, 2, 3, 5], shape)
    agree = (rng.random(shape) < 0.5) & (truth < 4)
    predicted[agree] = truth[agree]
    return torch.from_numpy(truth.astype(np.uint8)), torch.from_numpy(predicted)


def test_confusion_matrix_equals_scikit_learn_without_the_ignored_pixels() -> None:
    truth, predicted = _maps(0)
    valid = truth != IGNORED
    expected = sklearn_confusion(truth[valid].numpy(), predicted[valid].numpy(), labels=range(CLASSES))
    found = confusion_matrix(truth, predicted, CLASSES)
    assert found.dtype == torch.int64
    np.testing.assert_array_equal(found.numpy(), expected)
    assert int(found.sum()) == int(valid.sum()) < truth.numel()


def test_iou_equals_torchmetrics() -> None:
    truth, predicted = _maps(1)
    found = score(confusion_matrix(truth, predicted, CLASSES).numpy())
    jaccard = MulticlassJaccardIndex(CLASSES, average="none", ignore_index=IGNORED)
    expected = 100 * jaccard(predicted, truth.long()).numpy()
    np.testing.assert_allclose(found.iou, expected, rtol=1e-5)
    assert found.miou == pytest.approx(expected.mean(), rel=1e-5)
    assert found.iou[5] == 0  # predicted, never true
    assert found.num_absent == 0


def test_mean_and_overall_accuracy_equal_scikit_learn() -> None:
    truth, predicted = _maps(2)
    valid = truth != IGNORED
    found = score(confusion_matrix(truth, predicted, CLASSES).numpy())
    with pytest.warns(UserWarning, match="not in y_true"):
        expected = balanced_accuracy_score(truth[valid].numpy(), predicted[valid].numpy())
    assert found.macc == pytest.approx(100 * expected)
    assert found.aacc == pytest.approx(100 * float((truth == predicted)[valid].float().mean()), rel=1e-6)


def test_scores_equal_a_loop_over_classes_and_pixels() -> None:
    truth, predicted = _maps(3, (2, 9, 8))
    pixels = [(int(t), int(p)) for t, p in zip(truth.flatten(), predicted.flatten(), strict=True) if t != IGNORED]
    ious, accuracies = [], []
    for c in range(CLASSES + 1):
        both = sum(t == c and p == c for t, p in pixels)
        either = sum(t == c or p == c for t, p in pixels)
        true = sum(t == c for t, _ in pixels)
        if either:
            ious.append(both / either)
        if true:
            accuracies.append(both / true)
    found = score(confusion_matrix(truth, predicted, CLASSES + 1).numpy())
    assert found.miou == pytest.approx(100 * sum(ious) / len(ious))
    assert found.macc == pytest.approx(100 * sum(accuracies) / len(accuracies))
    assert found.aacc == pytest.approx(100 * sum(t == p for t, p in pixels) / len(pixels))
    assert found.num_absent == CLASSES + 1 - len(ious)
    assert np.isnan(found.iou[CLASSES])


def test_a_case_by_hand() -> None:
    # 10 pixels of class 0, of which 8 are right; 5 of class 1, of which 3 are right; class 2 takes the rest; no 3.
    confusion = np.array([[8, 1, 1, 0], [1, 3, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    found = score(confusion)
    np.testing.assert_allclose(found.iou, [100 * 8 / 11, 100 * 3 / 6, 0, np.nan])
    assert found.miou == pytest.approx(100 * (8 / 11 + 0.5 + 0) / 3)
    assert found.macc == pytest.approx(100 * (0.8 + 0.6) / 2)
    assert found.aacc == pytest.approx(100 * 11 / 15)
    assert found.num_absent == 1


def test_no_labelled_pixel_gives_nan() -> None:
    found = score(np.zeros((3, 3), np.int64))
    assert all(np.isnan(value) for value in found[:3])
    assert found.num_absent == 3


def test_half_widths_are_those_of_a_mean_where_images_have_equally_many_pixels() -> None:
    rng = np.random.default_rng(0)
    right = rng.binomial(100, 0.8, 60)
    confusion = np.zeros((60, 2, 2), np.int64)
    confusion[:, 0, 0], confusion[:, 0, 1] = right, 100 - right
    widths = bootstrap_half_widths(confusion, np.stack([right, np.full(60, 100)], 1), seed=0)
    expected = 1.96 * right.std() / np.sqrt(60)
    assert widths[2] == pytest.approx(expected, rel=0.1)
    assert widths[3] == pytest.approx(widths[2])
    assert widths == bootstrap_half_widths(confusion, np.stack([right, np.full(60, 100)], 1), seed=0)
