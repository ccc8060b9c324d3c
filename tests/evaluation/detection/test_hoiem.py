"""The diagnosis of false positives on cases counted by hand, and against the toolbox's many passes written out."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from matplotlib import image as mpimg

from evaluation.detection.hoiem import (
    COCO_CLASSES,
    KINDS,
    Diagnosis,
    class_groups,
    diagnose,
    diagnosis_outputs,
    shares,
    similar_matrix,
    similar_sets,
)
from evaluation.detection.objects import VOC_CLASSES, Objects
from evaluation.metric import Artifact, Metric, Samples
from image_data.rendered.classes import COARSE_NAMES
from tests.evaluation.detection.scenes import detections, image, random_scene

# Classes of the hand-made cases: a dog is similar to a cat, and neither is to a bus.
NAMES = ("dog", "cat", "bus")
DOG, CAT, BUS = range(3)
SIMILAR = similar_matrix(NAMES, [("dog", "cat")])
BOX = (10, 10, 50, 50)
THIRD = (10, 10, 50, 26)  # IoU 0.4 with BOX
TENTH = (10, 10, 50, 14)  # IoU 0.1 with BOX
TWENTIETH = (10, 10, 50, 12)  # IoU 0.05 with BOX
FAR = (60, 60, 90, 90)


def dogs(found: np.ndarray, objects: list[Objects], **options: int) -> dict[str, int]:
    """Kinds of the detections of dogs that occur."""
    counts = diagnose(found, objects, SIMILAR, **options).counts[DOG]
    return {kind: int(count) for kind, count in zip(KINDS, counts, strict=True) if count}


@pytest.mark.parametrize(
    ("box", "objects", "kind"),
    [
        (BOX, [(DOG, *BOX)], "cor"),
        ((10, 10, 50, 30), [(DOG, *BOX)], "cor"),  # IoU 0.5 itself
        (THIRD, [(DOG, *BOX)], "loc"),
        (TENTH, [(DOG, *BOX)], "loc"),  # IoU 0.1 itself
        (TWENTIETH, [(DOG, *BOX)], "bg"),
        (BOX, [(DOG, *FAR), (CAT, *BOX)], "sim"),
        (TENTH, [(DOG, *FAR), (CAT, *BOX)], "sim"),
        (BOX, [(DOG, *FAR), (BUS, *BOX)], "oth"),
        (TWENTIETH, [(DOG, *FAR), (BUS, *BOX)], "bg"),
        (BOX, [(DOG, *FAR)], "bg"),
        # the order of decisions
        (BOX, [(DOG, *BOX), (CAT, *BOX)], "cor"),
        (THIRD, [(DOG, *BOX), (CAT, *THIRD)], "loc"),
        (BOX, [(DOG, *FAR), (CAT, *THIRD), (BUS, *BOX)], "oth"),
        (BOX, [(DOG, *FAR), (BUS, *THIRD), (CAT, *BOX)], "sim"),
        (BOX, [(DOG, *FAR), (BUS, *BOX), (CAT, *BOX)], "sim"),  # a tie: the first class
    ],
)
def test_one_detection(box: tuple, objects: list[tuple], kind: str) -> None:
    assert dogs(detections((0, DOG, 0.9, *box)), [image(*objects)]) == {kind: 1}


def test_a_tie_between_classes_goes_to_the_first() -> None:
    for names, kind in ((("dog", "bus", "cat"), "oth"), (("dog", "cat", "bus"), "sim")):
        similar = similar_matrix(names, [("dog", "cat")])
        result = diagnose(detections((0, 0, 0.9, *BOX)), [image((2, *BOX), (1, *BOX), (0, *FAR))], similar)
        assert result.counts[0, KINDS.index(kind)] == 1
        assert result.confused[0, 1] == 1


def test_duplicates_are_errors_of_location() -> None:
    objects = [image((DOG, *BOX), (DOG, *FAR))]
    assert dogs(detections((0, DOG, 0.8, *BOX), (0, DOG, 0.9, *BOX)), objects) == {"cor": 1, "loc": 1}
    # The second is next to a cat as well, which does not matter; in another image it is nowhere.
    objects = [image((DOG, *BOX), (DOG, *FAR), (CAT, *BOX)), image()]
    assert dogs(detections((0, DOG, 0.8, *BOX), (0, DOG, 0.9, *BOX)), objects) == {"cor": 1, "loc": 1}
    assert dogs(detections((1, DOG, 0.8, *BOX), (0, DOG, 0.9, *BOX)), objects) == {"cor": 1, "bg": 1}


def test_a_detection_takes_the_next_object_where_its_nearest_is_taken() -> None:
    # Two dogs that overlap by more than half: unlike VOC's rule, the second detection of one is correct for the other.
    objects = [image((DOG, 0, 0, 40, 40), (DOG, 0, 0, 40, 36))]
    found = detections((0, DOG, 0.9, 0, 0, 40, 40), (0, DOG, 0.8, 0, 0, 40, 40))
    assert dogs(found, objects) == {"cor": 2}


def test_scores_decide_who_is_correct() -> None:
    objects = [image((DOG, *BOX), (DOG, *FAR))]
    # The weaker match comes first, so it is correct and the perfect one is a duplicate.
    found = detections((0, DOG, 0.5, *BOX), (0, DOG, 0.9, 10, 10, 50, 40), (0, DOG, 0.4, *FAR))
    assert dogs(found, objects) == {"cor": 1, "loc": 1}  # and the third is beyond the two objects


def test_looks_at_as_many_detections_as_there_are_objects() -> None:
    objects = [image((DOG, *BOX), (DOG, *FAR), (DOG, 0, 0, 5, 5), difficult=[1])]
    found = detections(*((0, DOG, 0.9 - 0.1 * i, 70, 0, 80, 5) for i in range(5)))
    result = diagnose(found, objects, SIMILAR)
    assert result.num_objects.tolist() == [2, 0, 0]
    assert result.counts.tolist() == [[0, 0, 0, 0, 2], [0] * 5, [0] * 5]
    fewer = diagnose(found[:1], objects, SIMILAR)
    assert fewer.counts[DOG].sum() == 1
    assert shares(fewer.counts)[DOG].sum() == pytest.approx(100)


def test_difficult_objects_are_not_wrong_but_not_counted() -> None:
    objects = [image((DOG, *BOX), (DOG, *FAR), difficult=[0])]
    assert dogs(detections((0, DOG, 0.9, *BOX)), objects) == {"cor": 1}
    assert dogs(detections((0, DOG, 0.9, *BOX), (0, DOG, 0.8, *FAR)), objects) == {"cor": 1}  # N = 1
    # A difficult object is taken once, as any other is, and overlapping one weakly is an error of location.
    objects = [image((DOG, *BOX), (DOG, *FAR), (DOG, 0, 60, 20, 90), difficult=[0])]
    assert dogs(detections((0, DOG, 0.9, *BOX), (0, DOG, 0.8, *BOX)), objects) == {"cor": 1, "loc": 1}
    assert dogs(detections((0, DOG, 0.9, *THIRD)), objects) == {"loc": 1}
    # So is a difficult object of another class.
    objects = [image((DOG, *FAR), (CAT, *BOX), difficult=[1])]
    assert dogs(detections((0, DOG, 0.9, *BOX)), objects) == {"sim": 1}


def test_crowds_are_treated_as_difficult() -> None:
    objects = [image((DOG, *BOX), (DOG, *FAR), crowd=[0])]
    result = diagnose(detections((0, DOG, 0.9, *BOX), (0, DOG, 0.8, *FAR)), objects, SIMILAR)
    assert (result.num_objects[DOG], result.counts[DOG].tolist()) == (1, [1, 0, 0, 0, 0])


def test_first_false_positives() -> None:
    objects = [image((DOG, *BOX))]
    wrong = [(0, DOG, 0.8 - 0.1 * i, *FAR) for i in range(4)]
    found = detections((0, DOG, 0.9, *BOX), *wrong, (0, CAT, 0.9, *BOX))
    assert dogs(found, objects) == {"cor": 1}
    assert dogs(found, objects, first_false_positives=2) == {"cor": 1, "bg": 2}
    assert dogs(found, objects, first_false_positives=100) == {"cor": 1, "bg": 4}
    assert diagnose(found, objects, SIMILAR, 100).counts[CAT].tolist() == [0, 0, 1, 0, 0]  # though there is no cat


def toolbox_match(found: np.ndarray, objects: list[Objects], c: int, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """One pass of the toolbox, in pixels with ends included: label of each detection (-1: false) and its overlap."""
    label, overlap, duplicate = -np.ones(len(found)), np.zeros(len(found)), np.zeros(len(found), bool)
    detected = set()
    for d, (row, _, _, x0, y0, x1, y1) in enumerate(found.tolist()):
        best, best_free = (0.0, -1), (0.0, -1)
        for j in np.flatnonzero(objects[int(row)].classes == c).tolist():
            a0, b0, a1, b1 = objects[int(row)].boxes[j].tolist()
            w = min(x1 - 1, a1 - 1) - max(x0, a0) + 1
            h = min(y1 - 1, b1 - 1) - max(y0, b0) + 1
            if w <= 0 or h <= 0:
                continue
            iou = w * h / ((x1 - x0) * (y1 - y0) + (a1 - a0) * (b1 - b0) - w * h)
            best = max(best, (iou, -j))
            if (row, j) not in detected:
                best_free = max(best_free, (iou, -j))
        if best_free[0] >= threshold:
            j = -best_free[1]
            detected.add((row, j))
            overlap[d], label[d] = best_free[0], 0 if objects[int(row)].difficult[j] else 1
        else:
            overlap[d], duplicate[d] = best[0], best[0] >= threshold
    if threshold == 0.1:
        label[duplicate] = 0
    return label, overlap


def toolbox_counts(found: np.ndarray, objects: list[Objects], similar: np.ndarray, c: int) -> list[int]:
    """Counts of one class as the toolbox makes them, by one pass for each class."""
    mine = found[found[:, 1] == c]
    n = sum(int((~one.difficult[one.classes == c]).sum()) for one in objects)
    mine = mine[np.argsort(-mine[:, 2])][:n]
    correct = toolbox_match(mine, objects, c, 0.5)[0] >= 0
    location = (toolbox_match(mine, objects, c, 0.1)[0] >= 0) & ~correct
    overlaps = np.zeros((len(mine), len(similar)))
    for k in set(range(len(similar))) - {c}:
        label, overlap = toolbox_match(mine, objects, k, 0.1)
        overlaps[:, k] = np.where((label >= 0) & ~location & ~correct, overlap, 0)
    other = overlaps.any(axis=1)
    alike = other & similar[c][overlaps.argmax(axis=1)]
    background = ~correct & ~location & ~other
    return [int(kind.sum()) for kind in (correct, location, alike, other & ~alike, background)]


def test_equals_the_passes_of_the_toolbox() -> None:
    similar = np.zeros((4, 4), bool)
    similar[0, 1] = similar[1, 0] = similar[1, 2] = similar[2, 1] = True
    total = np.zeros(5, np.int64)
    for seed in range(12):
        found, objects = random_scene(seed, num_images=25)
        result = diagnose(found, objects, similar)
        for c in range(4):
            assert result.counts[c].tolist() == toolbox_counts(found, objects, similar, c)
        np.testing.assert_array_equal(result.confused.sum(1), result.counts[:, 2:4].sum(1))
        total += result.counts.sum(axis=0)
    assert (total > 20).all()


def test_similar_classes_of_voc() -> None:
    similar = similar_matrix(VOC_CLASSES, similar_sets(VOC_CLASSES))
    sets = {name: {VOC_CLASSES[k] for k in np.flatnonzero(row)} for name, row in zip(VOC_CLASSES, similar, strict=True)}
    animals = {"bird", "cat", "cow", "dog", "horse", "sheep", "person"}
    vehicles = {"aeroplane", "bicycle", "boat", "bus", "car", "motorbike", "train"}
    assert sets["person"] == animals - {"person"}
    assert sets["bird"] == animals - {"bird"} | {"aeroplane"}
    assert sets["aeroplane"] == vehicles - {"aeroplane"} | {"bird"}
    assert sets["motorbike"] == vehicles - {"motorbike"}
    assert sets["sofa"] == {"chair", "diningtable"}
    assert sets["bottle"] == sets["pottedplant"] == sets["tvmonitor"] == set()
    np.testing.assert_array_equal(similar, similar.T)
    groups = class_groups(VOC_CLASSES)
    assert list(groups) == ["animals", "vehicles", "furniture"]
    assert set(groups["animals"]) == animals - {"person"}


def test_similar_classes_of_other_data() -> None:
    rendered = similar_matrix(COARSE_NAMES, similar_sets(COARSE_NAMES))
    assert rendered.sum() == 3 * 2 + 3 * 2 + 2
    assert rendered[COARSE_NAMES.index("boat"), COARSE_NAMES.index("car")]
    assert not rendered[COARSE_NAMES.index("vessel")].any()
    assert len(COCO_CLASSES) == len(set(COCO_CLASSES)) == 80
    assert not similar_matrix(COCO_CLASSES, similar_sets(COCO_CLASSES))[COCO_CLASSES.index("person")].any()
    assert similar_sets(("dog", "zebra")) == (("dog", "zebra"),)  # of COCO, and the rest is not there
    assert similar_sets(("dog", "unicorn")) == ()
    assert class_groups(("dog", "unicorn")) == {}
    with pytest.raises(ValueError, match="no class 'unicorn'; there are dog, cat"):
        similar_matrix(("dog", "cat"), [("dog", "unicorn")])


def test_both_denominators() -> None:
    counts = np.array([[6, 1, 2, 0, 1], [0, 0, 0, 0, 0], [3, 0, 0, 0, 0]])
    np.testing.assert_allclose(shares(counts)[0], [60, 10, 20, 0, 10])
    np.testing.assert_allclose(shares(counts, false_positives=True)[0], [25, 50, 0, 25])
    assert np.isnan(shares(counts)[1]).all()
    np.testing.assert_allclose(shares(counts)[2], [100, 0, 0, 0, 0])
    assert np.isnan(shares(counts, false_positives=True)[2]).all()


def outputs(*arguments, **options) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, bytes]]:
    found = list(diagnosis_outputs("detection", *arguments, **options))
    metrics = {output.name: output.value for output in found if isinstance(output, Metric)}
    samples = {output.name: output.values for output in found if isinstance(output, Samples)}
    return metrics, samples, {output.name: output.data for output in found if isinstance(output, Artifact)}


def test_outputs() -> None:
    found, objects = random_scene(5, num_images=25, num_classes=3)
    metrics, samples, files = outputs(found, objects, NAMES)
    counts = samples["detection/false_positive_counts"]
    expected = diagnose(found, objects, similar_matrix(NAMES, [("dog", "cat")]))
    assert not expected.counts[:, 3].all()
    # Without given sets: these names are VOC's, whose animals are similar.
    np.testing.assert_array_equal(counts, expected.counts)
    pooled = counts.sum(axis=0)
    for k, kind in enumerate(KINDS):
        assert metrics[f"detection/top_{kind}"] == pytest.approx(100 * pooled[k] / pooled.sum())
    for k, kind in enumerate(KINDS[1:], start=1):
        assert metrics[f"detection/fp_{kind}"] == pytest.approx(100 * pooled[k] / pooled[1:].sum())
        mean = (100 * counts[:, k] / counts[:, 1:].sum(axis=1)).mean()
        assert metrics[f"detection/fp_{kind}_mean"] == pytest.approx(mean)
    assert len(metrics) == 13
    for what in ("top_{}", "fp_{}", "fp_{}_mean"):
        parts = [metrics.get(f"detection/{what.format(kind)}", 0) for kind in KINDS]
        assert sum(parts) == pytest.approx(100)

    data = json.loads(files["detection/false_positives.json"])
    assert list(data["groups"]) == ["all classes", "animals", "vehicles"]
    assert list(data["classes"]["dog"]["counts"].values()) == counts[DOG].tolist()
    assert data["classes"]["dog"]["similar"] == ["cat"]
    assert sum(data["classes"]["dog"]["confused_with"].values()) == counts[DOG, 2:4].sum()
    assert data["groups"]["vehicles"]["counts"] == data["classes"]["bus"]["counts"]
    height, width, _ = mpimg.imread(io.BytesIO(files["detection/false_positives.png"])).shape
    assert min(height, width) > 500


def test_outputs_with_given_sets_and_mode() -> None:
    found = detections((0, DOG, 0.9, *BOX), (0, DOG, 0.8, *BOX), (0, DOG, 0.7, *FAR))
    objects = [image((BUS, *BOX), (DOG, 0, 60, 20, 90))]
    metrics, samples, files = outputs(found, objects, NAMES, similar=[("dog", "bus")], first_false_positives=2)
    assert samples["detection/false_positive_counts"][DOG].tolist() == [0, 0, 2, 0, 0]
    assert metrics["detection/fp_sim"] == 100
    assert "up to its false positive number 2" in json.loads(files["detection/false_positives.json"])["detections"]


def test_outputs_without_false_positives_or_detections() -> None:
    objects = [image((DOG, *BOX))]
    metrics, _, files = outputs(detections((0, DOG, 0.9, *BOX)), objects, NAMES)
    assert metrics == {f"detection/top_{kind}": 100.0 * (kind == "cor") for kind in KINDS}
    assert len(files) == 2
    metrics, samples, files = outputs(detections(), objects, NAMES)
    assert metrics == {}
    assert samples["detection/false_positive_counts"].sum() == 0
    assert json.loads(files["detection/false_positives.json"])["groups"]["all classes"]["percent_of_detections"] == {}


def test_malformed() -> None:
    with pytest.raises(ValueError, match="contain NaN"):
        diagnose(detections((0, DOG, 0.9, np.nan, 0, 1, 1)), [image()], SIMILAR)
    assert isinstance(diagnose(detections(), [image()], SIMILAR), Diagnosis)
