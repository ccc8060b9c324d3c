"""The COCO metric against torchmetrics, whose older implementation needs no pycocotools, and against planted cases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.detection import MeanAveragePrecision
from torchmetrics.detection._mean_ap import MeanAveragePrecision as TorchMeanAveragePrecision

from evaluation.detection.coco_metric import coco_ap
from evaluation.detection.objects import Objects, join_masks, split_masks
from tests.evaluation.detection.scenes import SIDE, box_mask, detections, image, random_scene

BOX = (10, 10, 50, 50)
FAR = (60, 60, 90, 90)


def sizes(n: int) -> np.ndarray:
    return np.full((n, 2), SIDE)


def masks_of(found: np.ndarray) -> list[bytes]:
    return [box_mask(row[3:])["counts"] for row in found]


def as_tensors(found: np.ndarray, objects: list[Objects]) -> tuple[list[dict], list[dict]]:
    """What torchmetrics takes."""
    predicted, targets = [], []
    for row, one in enumerate(objects):
        mine = torch.from_numpy(found[found[:, 0] == row])
        predicted.append({"boxes": mine[:, 3:], "labels": mine[:, 1].long(), "scores": mine[:, 2]})
        extra = {"iscrowd": torch.from_numpy(one.crowd.astype(int)), "area": torch.from_numpy(one.areas)}
        targets.append({"boxes": torch.from_numpy(one.boxes), "labels": torch.from_numpy(one.classes), **extra})
    return predicted, targets


@pytest.mark.parametrize("seed", [0, 1])
def test_boxes_equal_an_implementation_without_pycocotools(seed: int) -> None:
    found, objects = random_scene(seed)
    objects = [image(*np.column_stack([one.classes, one.boxes]).tolist()) for one in objects]  # none difficult
    reference = TorchMeanAveragePrecision(class_metrics=True)
    reference.update(*as_tensors(found, objects))
    expected = reference.compute()
    score = coco_ap(found, objects, sizes(len(objects)), 4)
    for name, value in {"map": score.ap, "map_50": score.ap50, "map_75": score.ap75}.items():
        assert value == pytest.approx(100 * float(expected[name]), abs=1e-4), name
    np.testing.assert_allclose(score.per_class.mean(axis=1), 100 * expected["map_per_class"].numpy(), atol=1e-4)


def test_crowds_and_areas_equal_torchmetrics() -> None:
    found, objects = random_scene(2)
    objects = [replace(one, crowd=one.difficult, difficult=one.difficult & False) for one in objects]
    # its own thresholds are float32, which decides ties differently
    overlaps, recalls = np.linspace(0.5, 0.95, 10).tolist(), np.linspace(0, 1, 101).tolist()
    reference = MeanAveragePrecision(backend="pycocotools", iou_thresholds=overlaps, rec_thresholds=recalls)
    reference.update(*as_tensors(found, objects))
    expected = reference.compute()
    score = coco_ap(found, objects, sizes(len(objects)), 4)
    names = {"map": score.ap, "map_small": score.ap_small, "map_medium": score.ap_medium}
    for name, value in names.items():
        assert value == pytest.approx(100 * float(expected[name]), abs=1e-4), name
    assert np.isnan(score.ap_large)  # there is no such object


def test_masks_that_fill_their_boxes_score_as_boxes_do() -> None:
    found, objects = random_scene(3)
    boxes = coco_ap(found, objects, sizes(len(objects)), 4)
    masks = coco_ap(found, objects, sizes(len(objects)), 4, "segm", masks_of(found))
    np.testing.assert_allclose(masks.per_class, boxes.per_class)
    assert masks.ap_small == pytest.approx(boxes.ap_small)


def test_masks_and_not_boxes_are_compared() -> None:
    objects = [image((0, *BOX))]
    found = detections((0, 0, 0.9, *BOX))
    half = [box_mask((10, 10, 50, 34))["counts"]]  # IoU 0.6
    assert coco_ap(found, objects, sizes(1), 1).ap == pytest.approx(100)
    score = coco_ap(found, objects, sizes(1), 1, "segm", half)
    assert (score.ap50, score.ap75) == pytest.approx((100, 0))


def test_polygons_and_their_image_size() -> None:
    one = image((0, *BOX))
    polygon = [[10.0, 10.0, 50.0, 10.0, 50.0, 50.0, 10.0, 50.0]]
    objects = [replace(one, masks=(polygon,))]
    masks = masks_of(detections((0, 0, 0.9, *BOX)))
    assert coco_ap(detections((0, 0, 0.9, *BOX)), objects, sizes(1), 1, "segm", masks).ap == pytest.approx(100)
    assert objects[0].masks == (polygon,)  # not replaced


def test_perfect_and_no_detections(capsys: pytest.CaptureFixture[str]) -> None:
    objects = [image((0, *BOX), (1, *FAR)), image((1, *BOX)), image()]
    found = detections((0, 0, 0.9, *BOX), (0, 1, 0.8, *FAR), (1, 1, 0.7, *BOX))
    perfect = coco_ap(found, objects, sizes(3), 3)
    assert (perfect.ap, perfect.ap50, perfect.ap75) == pytest.approx((100, 100, 100))
    assert (perfect.ap_small, perfect.ap_medium) == pytest.approx((100, 100))
    assert perfect.per_class.shape == (3, 10)
    assert np.isnan(perfect.per_class[2]).all()
    for kind, masks in (("bbox", None), ("segm", [])):
        nothing = coco_ap(detections(), objects, sizes(3), 3, kind, masks)
        assert (nothing.ap, nothing.ap50, nothing.ap75) == (0, 0, 0)
    assert capsys.readouterr().out == ""


def test_crowds_and_difficult_objects_are_ignored() -> None:
    found = detections((0, 0, 0.9, 60, 60, 70, 70), (0, 0, 0.8, 70, 70, 80, 80), (0, 0, 0.7, *BOX))
    for kind in ("bbox", "segm"):
        scored = (sizes(1), 1, kind, masks_of(found))
        # Both boxes inside the crowd are forgiven; inside a difficult object they overlap too little and are wrong.
        assert coco_ap(found, [image((0, *BOX), (0, *FAR), crowd=[1])], *scored).ap == pytest.approx(100)
        assert coco_ap(found, [image((0, *BOX), (0, *FAR), difficult=[1])], *scored).ap == pytest.approx(100 / 3)
    exact = detections((0, 0, 0.9, *FAR), (0, 0, 0.7, *BOX))
    assert coco_ap(exact, [image((0, *BOX), (0, *FAR), difficult=[1])], sizes(1), 1).ap == pytest.approx(100)
    assert coco_ap(exact, [image((0, *BOX))], sizes(1), 1).ap == pytest.approx(50)


def test_malformed() -> None:
    objects, found = [image((0, *BOX))], detections((0, 0, 0.9, *BOX))
    with pytest.raises(ValueError, match="give one for each of the 1 detections, not none"):
        coco_ap(found, objects, sizes(1), 1, "segm")
    with pytest.raises(ValueError, match="some objects have none"):
        coco_ap(found, [replace(objects[0], masks=())], sizes(1), 1, "segm", masks_of(found))
    with pytest.raises(ValueError, match="no object that counts"):
        coco_ap(found, [image((0, *BOX), crowd=[0])], sizes(1), 1)
    with pytest.raises(ValueError, match=r"shape \(1, 5\)"):
        coco_ap(found[:, :5], objects, sizes(1), 1)


def test_joined_masks() -> None:
    masks = masks_of(detections((0, 0, 0.9, *BOX), (0, 0, 0.8, *FAR), (0, 0, 0.8, 0, 0, 0, 0)))
    joined, lengths = join_masks(masks)
    assert (joined.dtype, lengths.dtype) == (np.uint8, np.int64)
    assert split_masks(joined, lengths) == masks
    assert split_masks(*join_masks([])) == []
