"""The distribution of a recipe's draws, and views that depend on the image's address only."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision import transforms

from image_data.contracts import DataError, ImageBuffer
from image_data.draws import (
    BLUR,
    BRIGHTNESS,
    CONTRAST,
    GRAY,
    HUE,
    NOTHING,
    SATURATION,
    SOLARIZE,
    center_crop_boxes,
    draw_parameters,
)
from image_data.recipes import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    RandomCrop,
    RandomResizedCrop,
    Solarize,
    ToLab,
    ViewRecipe,
)
from image_data.views import RECIPES, ViewMaker

CROP = RandomResizedCrop(area=(0.2, 1.0))


def random_images(count: int, seed: int = 0) -> ImageBuffer:
    """Noise images of 8 to 40 pixels a side."""
    rng = np.random.default_rng(seed)
    heights, widths = rng.integers(8, 41, (2, count)).astype(np.int32)
    num_bytes = heights.astype(np.int64) * widths * 3
    pixels = rng.integers(0, 256, num_bytes.sum(), dtype=np.uint8)
    return ImageBuffer(pixels, np.cumsum(num_bytes) - num_bytes, heights, widths)


def pick(images: ImageBuffer, rows: np.ndarray) -> ImageBuffer:
    return ImageBuffer(images.pixels, images.offsets[rows], images.heights[rows], images.widths[rows])


def draw(recipe: ViewRecipe, count: int, height: int = 120, width: int = 160, seed: int = 0):
    heights, widths = np.full(count, height), np.full(count, width)
    return draw_parameters(recipe, heights, widths, 64, seed, 0, 0, np.arange(count))


# ---- distributions of the draws


@pytest.mark.parametrize(
    ("height", "width", "step"),
    [
        (120, 160, CROP),
        (375, 500, RandomResizedCrop()),
        (64, 300, RandomResizedCrop((0.5, 1.0))),  # often falls back to the centre crop
        (300, 40, RandomResizedCrop((0.9, 1.0))),  # nearly always
        (6, 5, CROP),  # rounding to whole pixels matters
    ],
)
def test_crop_boxes_are_distributed_as_torchvisions(height, width, step):
    ours = draw(ViewRecipe("x", (step,)), 4000, height, width).boxes
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    get_params = transforms.RandomResizedCrop.get_params
    theirs = np.array([get_params(image, list(step.area), list(step.ratio)) for _ in range(4000)], np.float64)
    # Columns are top, left, height, width; area, ratio and right edge tie them together.
    derive = lambda boxes: np.column_stack(  # noqa: E731
        [boxes, boxes[:, 2] * boxes[:, 3], boxes[:, 3] / boxes[:, 2], boxes[:, 1] + boxes[:, 3]]
    )
    for mine, other in zip(derive(ours).T, derive(theirs).T, strict=True):
        assert stats.ks_2samp(mine, other).pvalue > 1e-3
    assert (ours == np.rint(ours)).all()
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] + ours[:, 2:] <= [height, width]).all()


def test_crop_falls_back_to_the_largest_centre_crop():
    parameters = draw(ViewRecipe("x", (RandomResizedCrop((1.0, 1.0), (1.0, 1.0)),)), 5, 30, 50)
    np.testing.assert_array_equal(parameters.boxes, np.tile([0.0, 10.0, 30.0, 30.0], (5, 1)))


def test_jitter_is_distributed_as_torchvisions():
    count = 6000
    parameters = draw(ViewRecipe("x", (CROP, ColorJitter(0.4, 0.3, 1.2, 0.1))), count)
    torch.manual_seed(0)
    ranges = ([0.6, 1.4], [0.7, 1.3], [0.0, 2.2], [-0.1, 0.1])
    theirs = [transforms.ColorJitter.get_params(*ranges) for _ in range(count)]
    for number, code in enumerate((BRIGHTNESS, CONTRAST, SATURATION, HUE)):
        mine = parameters.arguments[parameters.codes == code]
        assert len(mine) == count  # once per image
        other = np.array([params[1 + number] for params in theirs])
        assert stats.ks_2samp(mine, other).pvalue > 1e-3
    orders, counts = np.unique(parameters.codes, axis=0, return_counts=True)
    assert len(orders) == 24
    assert stats.chisquare(counts).pvalue > 1e-3
    # The factor of an operation does not depend on its place.
    first = parameters.arguments[parameters.codes[:, 0] == BRIGHTNESS, 0]
    last = parameters.arguments[parameters.codes[:, 3] == BRIGHTNESS, 3]
    assert stats.ks_2samp(first, last).pvalue > 1e-3


def test_jitter_of_zero_strength_leaves_the_operation_out():
    parameters = draw(ViewRecipe("x", (CROP, ColorJitter(0.4, 0.4, 0.4, 0.0))), 100)
    assert set(np.unique(parameters.codes)) == {NOTHING, BRIGHTNESS, CONTRAST, SATURATION}
    assert ((parameters.codes == NOTHING).sum(axis=1) == 1).all()


def test_steps_happen_with_their_probability_and_independently():
    count = 20_000
    parameters = draw(RECIPES["moco_v2"], count)
    jitter = (parameters.codes[:, :4] != NOTHING).all(axis=1)
    assert (jitter | (parameters.codes[:, :4] == NOTHING).all(axis=1)).all()
    gray, blur = parameters.codes[:, 4] == GRAY, parameters.codes[:, 5] == BLUR
    happened = np.column_stack([jitter, gray, blur, parameters.flips])
    expected = np.array([0.8, 0.2, 0.5, 0.5])
    assert (np.abs(happened.mean(axis=0) - expected) < 4 * np.sqrt(expected * (1 - expected) / count)).all()
    assert np.abs(np.corrcoef(happened.T) - np.eye(4)).max() < 4 / np.sqrt(count)
    assert stats.kstest(parameters.arguments[blur, 5], stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3


def test_probabilities_zero_and_one_are_exact():
    steps = (CROP, ColorJitter(p=0.0), Grayscale(p=1.0), HorizontalFlip(p=0.0))
    parameters = draw(ViewRecipe("x", steps), 500)
    assert (parameters.codes[:, :4] == NOTHING).all()
    assert (parameters.codes[:, 4] == GRAY).all()
    assert not parameters.flips.any()


def test_operations_follow_the_order_of_the_recipe():
    codes_v1, codes_v2 = draw(RECIPES["moco_v1"], 200).codes, draw(RECIPES["moco_v2"], 200).codes
    assert set(np.unique(codes_v1[:, 0])) == {NOTHING, GRAY}
    assert set(np.unique(codes_v2[:, 4])) == {NOTHING, GRAY}
    assert set(np.unique(codes_v2[:, 5])) == {NOTHING, BLUR}


def test_removing_a_step_keeps_the_draws_of_the_others():
    full = RECIPES["moco_v2"]
    without_gray = replace(full, steps=tuple(step for step in full.steps if not isinstance(step, Grayscale)))
    a, b = draw(full, 300), draw(without_gray, 300)
    np.testing.assert_array_equal(a.boxes, b.boxes)
    np.testing.assert_array_equal(a.flips, b.flips)
    np.testing.assert_array_equal(np.delete(a.codes, 4, axis=1), b.codes)
    np.testing.assert_array_equal(np.delete(a.arguments, 4, axis=1), b.arguments)


@pytest.mark.parametrize("size", [32, 84, 224])
def test_evaluation_boxes_undo_to_torchvisions_pixels(size):
    short = round(size * 92 / 84)
    for height, width in [(92, 92), (375, 500), (501, 333), (84, 84), (20, 300)]:
        box = center_crop_boxes(np.array([height]), np.array([width]), size, 92 / 84)[0]
        resized = transforms.Resize(short)(torch.empty(1, height, width)).shape[1:]
        scale = np.array([resized[0] / height, resized[1] / width] * 2)
        corner = [round((side - size) / 2.0) for side in resized]  # CenterCrop
        np.testing.assert_allclose(box * scale, [*corner, size, size], atol=1e-9)


@pytest.mark.parametrize(("padding", "size"), [(8 / 84, 84), (4 / 32, 32), (8 / 84, 64), (0.0, 32), (0.5, 1)])
def test_random_crops_start_at_every_offset_of_the_padding_alike(padding, size):
    border = round(padding * size)
    heights, widths = np.full(4000, 60), np.full(4000, 90)
    recipe = ViewRecipe("x", (RandomCrop(padding),))
    boxes = draw_parameters(recipe, heights, widths, size, 0, 0, 0, np.arange(4000)).boxes
    np.testing.assert_array_equal(boxes[:, 2:], np.tile([60.0, 90.0], (4000, 1)))
    corners = boxes[:, :2] * size / [60, 90]
    np.testing.assert_allclose(corners, np.rint(corners), atol=1e-9)
    for axis in range(2):
        offsets, counts = np.unique(np.rint(corners[:, axis]), return_counts=True)
        np.testing.assert_array_equal(offsets, np.arange(-border, border + 1))
        assert border == 0 or stats.chisquare(counts).pvalue > 1e-3
    assert border == 0 or abs(np.corrcoef(corners.T)[0, 1]) < 4 / np.sqrt(4000)


def test_solarize_happens_with_its_probability_and_has_a_slot_of_its_own():
    count = 20_000
    crop_and_gray = ViewRecipe("x", (CROP, Grayscale(p=0.3), GaussianBlur(p=0.3)))
    parameters = draw(replace(crop_and_gray, steps=(*crop_and_gray.steps, Solarize(0.25, p=0.3))), count)
    assert set(np.unique(parameters.codes[:, 2])) == {NOTHING, SOLARIZE}
    assert (parameters.arguments[:, 2] == 0.25).all()
    happened = parameters.codes != NOTHING
    assert (np.abs(happened.mean(axis=0) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / count)).all()
    assert np.abs(np.corrcoef(happened.T) - np.eye(3)).max() < 4 / np.sqrt(count)
    np.testing.assert_array_equal(parameters.codes[:, :2], draw(crop_and_gray, count).codes)


def test_a_shared_flip_is_the_same_in_every_view_of_an_image():
    """AMDIM: one flip for both views, everything else independent."""
    maker = ViewMaker([RECIPES["amdim"]] * 3, 16, seed=2)
    images, index = random_images(200), np.arange(200)
    drawn = [maker.draw(images, epoch, index) for epoch in range(2)]
    for views in drawn:
        for view in views[1:]:
            np.testing.assert_array_equal(view.flips, views[0].flips)
            assert not np.array_equal(view.boxes, views[0].boxes)
            assert not np.array_equal(view.codes, views[0].codes)
    assert not np.array_equal(drawn[0][0].flips, drawn[1][0].flips)
    assert 0.4 < drawn[0][0].flips.mean() < 0.6
    # View 0 flips as it would alone; the other views of an unshared flip do not follow it.
    alone = [step if not isinstance(step, HorizontalFlip) else HorizontalFlip() for step in RECIPES["amdim"].steps]
    unshared = ViewMaker([ViewRecipe("x", tuple(alone))] * 2, 16, seed=2).draw(images, 0, index)
    np.testing.assert_array_equal(unshared[0].flips, drawn[0][0].flips)
    assert abs(np.corrcoef(unshared[0].flips, unshared[1].flips)[0, 1]) < 4 / np.sqrt(200)


def test_to_lab_changes_no_pixel():
    """It is a marker: the backbone converts, so that what transfers takes RGB images."""
    images, index = random_images(4), np.arange(4)
    recipe = RECIPES["cmc"]
    rgb = replace(recipe, steps=tuple(step for step in recipe.steps if not isinstance(step, ToLab)))
    views = [ViewMaker([each], 16, seed=0)(images, 0, index)[0] for each in (recipe, rgb)]
    np.testing.assert_array_equal(*views)


# ---- views


@pytest.mark.parametrize("backend", ["fused", "torchvision"])
def test_views_depend_on_the_image_and_not_on_the_batch_or_the_threads(backend):
    images = random_images(7)
    index = np.array([5, 900, 2, 17, 3, 10**12, 0])
    maker = ViewMaker([RECIPES["moco_v2"], RECIPES["moco_v1"]], 24, seed=4, backend=backend)
    together = maker(images, 6, index)
    assert [(view.shape, view.dtype) for view in together] == [((7, 3, 24, 24), np.uint8)] * 2
    assert all(view.flags.c_contiguous for view in together)
    for threads in (2, 3, 16):
        for view, again in zip(together, maker(images, 6, index, threads=threads), strict=True):
            np.testing.assert_array_equal(view, again)
    for rows in (np.array([3]), np.array([6, 1, 0]), np.arange(7)[::-1]):
        for view, part in zip(together, maker(pick(images, rows), 6, index[rows]), strict=True):
            np.testing.assert_array_equal(view[rows], part)


def test_views_change_with_epoch_seed_index_and_view_number():
    images, index = random_images(6), np.arange(6)
    twice = [RECIPES["moco_v2"]] * 2
    first, second = ViewMaker(twice, 16, seed=0)(images, 0, index)
    others = [
        second,
        ViewMaker(twice, 16, seed=0)(images, 1, index)[0],
        ViewMaker(twice, 16, seed=1)(images, 0, index)[0],
        ViewMaker(twice, 16, seed=0)(images, 0, index + 6)[0],
    ]
    for other in others:
        assert all(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    np.testing.assert_array_equal(first, ViewMaker(twice, 16, seed=0)(images, 0, index)[0])


def test_evaluation_views_are_not_random():
    images, index = random_images(4), np.arange(4)
    views = [ViewMaker([RECIPES["evaluation"]], 16, seed=seed)(images, seed, index + seed)[0] for seed in (0, 9)]
    np.testing.assert_array_equal(*views)


def test_a_recipe_may_set_its_own_size():
    recipes = [RECIPES["moco_v2"], replace(RECIPES["moco_v2"], size=12)]
    views = ViewMaker(recipes, 20, seed=0)(random_images(3), 0, np.arange(3))
    assert [view.shape for view in views] == [(3, 3, 20, 20), (3, 3, 12, 12)]


def test_a_recipe_may_set_its_size_relative_to_the_runs():
    maker = ViewMaker([RECIPES["swav_large"], RECIPES["swav_small"]], 84, seed=0)
    views = maker(random_images(3), 0, np.arange(3))
    assert [view.shape for view in views] == [(3, 3, 84, 84), (3, 3, 36, 36)]


def test_given_arrays_are_filled():
    images, index = random_images(3), np.arange(3)
    maker = ViewMaker([RECIPES["light"]], 16, seed=0)
    out = [np.zeros((3, 3, 16, 16), np.uint8)]
    views = maker(images, 0, index, out=out)
    assert views[0] is out[0]
    np.testing.assert_array_equal(out[0], maker(images, 0, index)[0])
    for wrong in (
        np.zeros((3, 3, 16, 8), np.uint8),
        np.zeros((3, 3, 16, 16)),
        np.zeros((3, 3, 16, 32), np.uint8)[..., ::2],
    ):
        with pytest.raises(DataError, match="needs C-contiguous uint8"):
            maker(images, 0, index, out=[wrong])
    with pytest.raises(DataError, match="holds 0 arrays"):
        maker(images, 0, index, out=[])


def test_bad_batches_are_refused():
    images = random_images(3)
    maker = ViewMaker([RECIPES["light"]], 16, seed=0)
    with pytest.raises(DataError, match="3 images and 2 indices"):
        maker(images, 0, np.arange(2))
    empty = ImageBuffer(images.pixels, images.offsets, np.array([5, 0, 5], np.int32), np.array([5, 5, 5], np.int32))
    with pytest.raises(DataError, match="zero height"):
        maker(empty, 0, np.arange(3))


def test_an_empty_batch_gives_empty_views():
    views = ViewMaker([RECIPES["moco_v2"]], 16, seed=0)(random_images(0), 0, np.arange(0), threads=2)
    assert views[0].shape == (0, 3, 16, 16)


def test_makers_travel_between_processes():
    images, index = random_images(3), np.arange(3)
    maker = ViewMaker([RECIPES["moco_v2"]], 16, seed=0)
    views = maker(images, 0, index, threads=2)  # has threads now
    copy = pickle.loads(pickle.dumps(maker))
    np.testing.assert_array_equal(copy(images, 0, index, threads=2)[0], views[0])
