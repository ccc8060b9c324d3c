"""Recipes as data, the distribution of their draws, and views that depend on the image's address only."""

import json
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
    center_crop_boxes,
    draw_parameters,
)
from image_data.recipes import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    RandomResizedCrop,
    ResizeCenterCrop,
    ViewRecipe,
)
from image_data.views import RECIPES, ViewMaker, find_recipe

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


# ---- recipes


def test_recipes_are_the_published_ones():
    moco_v2 = (
        RandomResizedCrop((0.2, 1.0), (3 / 4, 4 / 3)),
        ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        Grayscale(0.2),
        GaussianBlur((0.1, 2.0), 0.5),
        HorizontalFlip(0.5),
    )
    moco_v1 = (CROP, Grayscale(0.2), ColorJitter(0.4, 0.4, 0.4, 0.4, p=1.0), HorizontalFlip(0.5))
    wide_crop = RandomResizedCrop((0.08, 1.0))
    assert {name: recipe.steps for name, recipe in RECIPES.items()} == {
        "supervised": (wide_crop, *moco_v2[1:]),
        "supervised_basic": (wide_crop, HorizontalFlip(0.5)),
        "moco_v1": moco_v1,
        "moco_v2": moco_v2,
        "light": (CROP, HorizontalFlip(0.5)),
        "evaluation": (ResizeCenterCrop(92 / 84),),
    }
    assert all(name == recipe.name for name, recipe in RECIPES.items())


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_survive_json(name):
    recipe = replace(RECIPES[name], size=96)
    record = json.loads(json.dumps(recipe.to_json()))
    assert ViewRecipe.from_json(record) == recipe


def test_json_shows_every_parameter():
    record = ViewRecipe("mine", (CROP, ColorJitter(0.4, 0.3, 0.2, 0.1, 0.8), GaussianBlur())).to_json()
    assert record == {
        "name": "mine",
        "size": None,
        "steps": [
            {"step": "random_resized_crop", "area": [0.2, 1.0], "ratio": [3 / 4, 4 / 3]},
            {"step": "color_jitter", "brightness": 0.4, "contrast": 0.3, "saturation": 0.2, "hue": 0.1, "p": 0.8},
            {"step": "gaussian_blur", "sigma": [0.1, 2.0], "p": 0.5},
        ],
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomResizedCrop(area=(0.0, 1.0)), r"area is \(0.0, 1.0\).*\(0.0, 1.0\]"),
        (lambda: RandomResizedCrop(area=(0.5, 0.2)), "area"),
        (lambda: RandomResizedCrop(area=(0.5, 1.2)), "area"),
        (lambda: RandomResizedCrop(area=(float("nan"), 1.0)), "area"),
        (lambda: RandomResizedCrop(ratio=(0.0, 1.0)), "ratio"),
        (lambda: ResizeCenterCrop(0.9), "enlarge is 0.9"),
        (lambda: ColorJitter(hue=0.6), "hue is 0.6"),
        (lambda: ColorJitter(brightness=-0.1), "brightness is -0.1"),
        (lambda: ColorJitter(p=1.5), "p is 1.5"),
        (lambda: Grayscale(p=-0.1), "Grayscale p is -0.1"),
        (lambda: GaussianBlur(sigma=(0.0, 1.0)), "sigma"),
        (lambda: GaussianBlur(p=float("nan")), "GaussianBlur p"),
        (lambda: HorizontalFlip(p=2), "HorizontalFlip p"),
        (lambda: ViewRecipe("x", ()), "start with its one crop"),
        (lambda: ViewRecipe("x", (HorizontalFlip(), CROP)), "start with its one crop"),
        (lambda: ViewRecipe("x", (CROP, ResizeCenterCrop())), "start with its one crop"),
        (lambda: ViewRecipe("x", (CROP, Grayscale(), Grayscale())), "repeats.*grayscale"),
        (lambda: ViewRecipe("x", (CROP, "flip")), "'flip'.*horizontal_flip"),
        (lambda: ViewRecipe("x", (CROP,), size=0), "size 0"),
        (lambda: ViewRecipe.from_json({"name": "x"}), "'steps'"),
        (lambda: ViewRecipe.from_json({"name": "x", "steps": [{"step": "solarise"}]}), "'solarise'.*grayscale"),
        (lambda: ViewRecipe.from_json({"steps": [{"step": "grayscale", "q": 1}]}), r"no parameter \['q'\]"),
        (lambda: find_recipe("moco_v3"), "moco_v3.*moco_v2"),
        (lambda: ViewMaker([], 32, 0), "No view recipe"),
        (lambda: ViewMaker([RECIPES["light"]], 0, 0), "image size is 0"),
        (lambda: ViewMaker([RECIPES["light"]], 32, 0, backend="opencv"), "opencv.*torchvision"),
    ],
)
def test_mistakes_are_explained(make, message):
    with pytest.raises(DataError, match=f"(?s){message}"):
        make()


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
