"""Images and targets of a detector: they are moved together, and as detectron2 moves them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from evaluation.detection.inputs import network_size, scored_input, training_input
from evaluation.detection.objects import Objects
from evaluation.detection.recipes import RECIPES


def painted(height: int = 40, width: int = 64) -> tuple[np.ndarray, Objects]:
    """A white rectangle on black, its box, and its mask as polygon."""
    image = np.zeros((height, width, 3), np.uint8)
    image[8:24, 20:52] = 255
    box = np.array([[20, 8, 52, 24]], np.float32)
    polygon = [[20.0, 8.0, 52.0, 8.0, 52.0, 24.0, 20.0, 24.0]]
    no = np.zeros(1, bool)
    return image, Objects(box, np.array([2]), no, no, np.array([512.0], np.float32), (polygon,))


def box_of(image: torch.Tensor) -> list[int]:
    """Of the bright pixels of (3, H, W)."""
    rows, columns = np.nonzero(image[0].numpy() > 127)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize("kind", ["polygon", "rle"])
def test_box_and_mask_follow_the_image(kind: str) -> None:
    image, objects = painted()
    if kind == "rle":
        objects = replace(objects, masks=(coco_mask.encode(np.asfortranarray(image[:, :, 0] // 255)),))
    recipe = replace(RECIPES["coco_c4"], train_sides=(40, 60, 80), max_side=1000)
    flips, sides = set(), set()
    for seed in range(16):
        found = training_input(image, objects, recipe, np.random.default_rng(seed))
        box = found["instances"].gt_boxes.tensor[0].tolist()
        assert box == pytest.approx(box_of(found["image"]), abs=1)
        height, width = found["image"].shape[1:]
        assert found["instances"].image_size == (height, width)
        mask = found["instances"].gt_masks.crop_and_resize(torch.tensor([[0.0, 0.0, width, height]]), 28)[0]
        x, y = (mask.nonzero().flip(1).float() + 0.5).mean(0) / 28
        assert x * width == pytest.approx((box[0] + box[2]) / 2, abs=width / 28)
        assert y * height == pytest.approx((box[1] + box[3]) / 2, abs=height / 28)
        assert mask.float().mean() == pytest.approx(0.2, abs=0.03)
        flips.add(box[0] < width - box[2])
        sides.add(height)
    assert (flips, sides) == ({True, False}, {40, 60, 80})


def test_polygons_and_boxes_of_a_mirrored_and_stretched_image_are_exact() -> None:
    """A square side stretches the axes differently; no pixel is lost by mirroring."""
    image, objects = painted()
    recipe = replace(RECIPES["coco_c4"], train_sides=(80,), square=True)
    flips = set()
    for seed in range(8):
        targets = training_input(image, objects, recipe, np.random.default_rng(seed))["instances"]
        box = targets.gt_boxes.tensor[0].tolist()
        flips.add(box == [15.0, 16.0, 55.0, 48.0])
        assert box in ([25.0, 16.0, 65.0, 48.0], [15.0, 16.0, 55.0, 48.0])
        assert targets.gt_masks.get_bounding_boxes().tensor[0].tolist() == box
    assert flips == {True, False}


def test_crowds_and_objects_cut_away_are_no_targets_but_difficult_ones_are() -> None:
    image, one = painted()
    boxes = np.array([[20, 8, 52, 24], [0, 0, 9, 9], [3, 3, 30, 30]], np.float32)
    three = Objects(
        boxes, np.array([2, 0, 1]), np.array([1, 0, 0], bool), np.array([0, 1, 0], bool), np.ones(3, np.float32)
    )
    found = training_input(image, three, RECIPES["voc07"], np.random.default_rng(0))["instances"]
    assert found.gt_classes.tolist() == [2, 1]
    assert not found.has("gt_masks")
    assert training_input(image, one, RECIPES["coco_c4"], np.random.default_rng(0))["instances"].has("gt_masks")


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (100, 900), (480, 480), (37, 52)])
def test_sizes_are_those_of_detectron2(shape: tuple[int, int]) -> None:
    from detectron2.data.transforms import ResizeShortestEdge  # importable once our door to it was opened

    image = np.zeros((*shape, 3), np.uint8)
    for side in (480, 800):
        theirs = ResizeShortestEdge(side, 1333).get_transform(image)
        assert network_size(*shape, side, RECIPES["voc07"]) == (theirs.new_h, theirs.new_w)
    assert network_size(*shape, 800, RECIPES["camtrast"]) == (800, 800)


def test_scored_images_are_resized_as_detectron2_does() -> None:
    from detectron2.data.transforms import ResizeShortestEdge

    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    recipe = RECIPES["voc07"].with_side(100)
    found = scored_input(image, recipe)
    expected = ResizeShortestEdge(100, recipe.max_side).get_transform(image).apply_image(image)
    assert np.array_equal(found["image"].numpy(), expected.transpose(2, 0, 1))
    assert (found["height"], found["width"]) == (48, 64)
