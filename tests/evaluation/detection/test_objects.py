"""Objects from both sources, and what detections must be."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from evaluation.detection.objects import VOC_CLASSES, box_iou, has_objects, read_classes, read_objects
from image_data.contracts import DataError
from image_data.prepared import SplitInfo
from image_data.tables import ImageTable, open_table, target_columns
from tests.evaluation.fine_tuning.samples import rendered_data


def table(*images: list[dict[str, Any]]) -> ImageTable:
    """Images that are nothing but their objects."""
    columns = {
        "label": [0] * len(images),
        "name": [f"image-{row}" for row in range(len(images))],
        "objects": [json.dumps(entries).encode() for entries in images],
    }
    return ImageTable([pa.table(columns)], info())


def info() -> SplitInfo:
    return SplitInfo("train", (), 1, ("one",), (1,), 1, 1, coarse_names=("near", "far"))


def entry(name: str, *box: float, **more: Any) -> dict[str, Any]:
    return {"box": list(box) or [0, 0, 4, 4], "class": name, **more}


def test_reads_boxes_and_flags() -> None:
    square = [[1.0, 1.0, 5.0, 1.0, 5.0, 7.0, 1.0, 7.0]]
    runs = {"size": [3, 2], "counts": [2, 3, 1]}
    images = table(
        [entry("dog", 1, 2, 3.5, 8, difficult=True), entry("cat", 0, 0, 4, 5, crowd=True, area=7.5)],
        [],
        [entry("cat", mask=square), entry("dog", mask=runs)],
    )
    classes = ("cat", "dog")
    one = read_objects(images, 0, classes)
    np.testing.assert_array_equal(one.boxes, np.array([[1, 2, 3.5, 8], [0, 0, 4, 5]], np.float32))
    np.testing.assert_array_equal(one.classes, [1, 0])
    np.testing.assert_array_equal(one.difficult, [True, False])
    np.testing.assert_array_equal(one.crowd, [False, True])
    np.testing.assert_array_equal(one.areas, [15, 7.5])
    assert one.masks == ()
    types = (one.boxes.dtype, one.classes.dtype, one.difficult.dtype, one.crowd.dtype, one.areas.dtype)
    assert types == (np.float32, np.int64, bool, bool, np.float32)
    none = read_objects(images, 1, classes)
    assert [getattr(none, name).shape for name in ("boxes", "classes", "areas")] == [(0, 4), (0,), (0,)]
    polygon, compressed = read_objects(images, 2, classes).masks
    assert polygon == square
    np.testing.assert_array_equal(coco_mask.decode(compressed), [[0, 1], [0, 1], [1, 0]])


def test_class_order() -> None:
    assert read_classes([table([entry("dog"), entry("person")])]) == VOC_CLASSES
    with_ids = table([entry("zebra", id=3), entry("dog", id=18)], [entry("apple", id=7)])
    assert read_classes([with_ids, table([entry("dog", id=18)])]) == ("zebra", "apple", "dog")
    assert read_classes([table([entry("zebra"), entry("dog")])]) == ("dog", "zebra")


def test_voc_classes_are_in_the_order_of_the_toolboxes() -> None:
    assert len(VOC_CLASSES) == 20
    assert [VOC_CLASSES.index(name) for name in ("aeroplane", "bottle", "person", "tvmonitor")] == [0, 4, 14, 19]
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)


def test_classes_that_cannot_be_learned_are_named() -> None:
    with pytest.raises(DataError, match="objects of 'cow', of which the training images have none"):
        read_classes([table([entry("dog")]), table([entry("cow"), entry("dog")])])
    with pytest.raises(DataError, match="the training images have no object"):
        read_classes([table([]), table([entry("dog")])])
    with pytest.raises(DataError, match="the scored images have no object"):
        read_classes([table([entry("dog")]), table([])])
    bare = ImageTable([pa.table({"label": [0], "name": ["a"]})], info())
    with pytest.raises(DataError, match="no objects to detect; their columns are label, name"):
        read_classes([bare])
    with pytest.raises(DataError, match="'image-0' has an object of class 'cow'; known are dog"):
        read_objects(table([entry("cow")]), 0, ("dog",))
    with pytest.raises(DataError, match="'image-0' has masks for 1 of its 2 objects"):
        read_objects(table([entry("dog"), entry("dog", mask=[[0, 0, 1, 0, 1, 1]])]), 0, ("dog",))


def test_rendered_objects_fit_their_masks() -> None:
    data = rendered_data()
    assert has_objects(target_columns(data, "train"))
    train, test = open_table(data, ["train"]), open_table(data, ["test"])
    classes = read_classes([train, test])
    assert classes == train.coarse_names
    for row in (0, 7, 23):
        one = read_objects(train, row, classes)
        assert classes[one.classes[0]] == train.class_names[train.labels[row]].split("/")[0]
        mask = coco_mask.decode(one.masks[0])
        assert one.areas[0] == mask.sum() > 0
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        expected = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        np.testing.assert_array_equal(one.boxes, np.array([expected], np.float32))
        assert not one.difficult.any() | one.crowd.any()


def test_rendered_object_out_of_sight() -> None:
    buffer = io.BytesIO()
    Image.new("L", (8, 6)).save(buffer, "PNG")
    columns = {"label": [0], "name": ["a"], "box": [[0, 0, 0, 0]], "coarse": [1], "mask": [buffer.getvalue()]}
    one = read_objects(ImageTable([pa.table(columns)], info()), 0, ("near", "far"))
    assert one.boxes.shape == (0, 4)
    assert (len(one.classes), len(one.areas), one.masks) == (0, 0, ())


def test_has_objects() -> None:
    assert has_objects(("label", "objects"))
    assert not has_objects(("box", "landmarks"))


def test_overlap_of_inclusive_boxes() -> None:
    # Inclusive pixels 1..10 x 1..10 and 6..15 x 1..10 share 5 x 10 of 150.
    iou = box_iou(np.array([[0, 0, 10, 10]], np.float32), np.array([[5, 0, 15, 10], [10, 0, 20, 10], [3, 3, 3, 9]]))
    np.testing.assert_allclose(iou, [[50 / 150, 0, 0]])
    assert box_iou(np.zeros((0, 4)), np.zeros((2, 4))).shape == (0, 2)
    np.testing.assert_array_equal(box_iou(np.zeros((1, 4)), np.zeros((1, 4))), [[0]])
