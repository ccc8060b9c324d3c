"""Training views: crops of resized pictures, masks that follow, padding, colours against colorsys."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from evaluation.segmentation.augment import (
    HUE,
    View,
    _cut_image,
    _cut_mask,
    augment,
    distort_colors,
    normalize,
    resize_short_side,
    scaled_size,
)
from evaluation.segmentation.metric import IGNORED
from image_data.contracts import IMAGENET_MEAN, IMAGENET_STD


class _Fixed:
    """A generator that gives what it is told."""

    def __init__(self, uniform: list[float], integers: list[int], random: list[Any]) -> None:
        self._values = {"uniform": uniform, "integers": integers, "random": random}

    def uniform(self, low: float, high: float) -> float:
        value = self._values["uniform"].pop(0)
        assert low <= value <= high
        return value

    def integers(self, stop: int) -> int:
        value = self._values["integers"].pop(0)
        assert 0 <= value < stop
        return value

    def random(self, size: int = 0) -> Any:
        return self._values["random"].pop(0)


def _picture(height: int = 40, width: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """An image whose red tells its class in the mask: 20 times the class."""
    rng = np.random.default_rng(0)
    mask = np.kron(rng.integers(0, 8, (height // 10, width // 10)), np.ones((10, 10))).astype(np.uint8)
    image = np.stack([20 * mask, np.full_like(mask, 90), rng.integers(0, 255, mask.shape)], axis=2).astype(np.uint8)
    return image, mask


@pytest.mark.parametrize("scaled", [(31, 47), (40, 60), (73, 110)])
def test_a_cut_is_a_crop_of_the_resized_picture(scaled: tuple[int, int]) -> None:
    image, mask = _picture()
    resized = Image.fromarray(image).resize((scaled[1], scaled[0]), Image.Resampling.BILINEAR)
    nearest = F.interpolate(torch.from_numpy(mask)[None, None], size=scaled, mode="nearest-exact")[0, 0].numpy()
    for top, left, height, width in ((0, 0, 20, 30), (5, 9, 24, 33), (scaled[0] - 20, scaled[1] - 31, 20, 31)):
        crop = slice(top, top + height), slice(left, left + width)
        cut = _cut_image(image, scaled, (top, left), (height, width)).astype(int)
        assert cut.shape == (height, width, 3)
        assert np.abs(cut - np.asarray(resized).astype(int)[crop]).max() <= 1
        np.testing.assert_array_equal(_cut_mask(mask, scaled, (top, left), (height, width)), nearest[crop])


def test_image_and_mask_stay_together_under_scale_crop_and_flip() -> None:
    image, mask = _picture()
    rng = np.random.default_rng(1)
    for _ in range(30):
        pixels, labels = augment(image, mask, View((24, 36), scale=(0.8, 2.0)), rng)
        red = (pixels[0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]) * 255
        labelled = labels != IGNORED
        assert labelled.mean() > 0.8
        agree = np.abs(red - 20.0 * labels)[labelled] < 8  # edges of the classes are blurred in the image
        assert agree.mean() > 0.75


def test_a_view_by_hand() -> None:
    image, mask = _picture()
    rng: Any = _Fixed([1.0], [3, 7], [0.2])  # scale, corner, flip
    pixels, labels = augment(image, mask, View((16, 20)), rng)
    np.testing.assert_array_equal(labels, mask[3:19, 7:27][:, ::-1])
    np.testing.assert_array_equal(pixels, normalize(image[3:19, 7:27][:, ::-1]))
    rng = _Fixed([1.0], [3, 7], [0.7])
    np.testing.assert_array_equal(augment(image, mask, View((16, 20)), rng)[1], mask[3:19, 7:27])


def test_what_a_crop_lacks_is_ignored_and_has_the_mean_colour() -> None:
    image, mask = _picture()
    rng: Any = _Fixed([0.5], [0, 0], [0.9])
    pixels, labels = augment(image, mask, View((30, 30)), rng)
    assert (labels[:20] != IGNORED).all()
    assert (labels[20:] == IGNORED).all()
    assert (pixels[:, 20:] == 0).all()
    assert (pixels[:, :20] != 0).any()


def test_crops_of_one_class_are_drawn_again_ten_times() -> None:
    mask = np.zeros((20, 40), np.uint8)
    mask[:, 30:] = 1
    image = np.zeros((20, 40, 3), np.uint8)
    view = View((20, 20), max_class_share=0.75)
    rng: Any = _Fixed([1.0], [0, 0, 0, 5, 0, 18], [0.9])
    assert augment(image, mask, view, rng)[1].mean() == pytest.approx(0.4)
    corners = [0, 3] * 11
    rng = _Fixed([1.0], corners, [0.9])
    augment(image, mask, view, rng)
    assert corners == []
    mask[:, 5:] = IGNORED  # one labelled class is no better, however few pixels it has
    rng = _Fixed([1.0], [0, 0] * 11, [0.9])
    augment(image, mask, view, rng)


def test_short_sides() -> None:
    assert scaled_size((1024, 2048), 0, 0.5) == (512, 1024)
    assert scaled_size((1024, 2048), 128) == (128, 256)
    assert scaled_size((90, 60), 30, 2.0) == (90, 60)
    image, _ = _picture()
    assert resize_short_side(image, 20).shape == (20, 30, 3)
    assert resize_short_side(image, 40) is image
    assert resize_short_side(image, 0) is image


def test_normalize_is_torchvisions() -> None:
    from torchvision.transforms import functional as tv

    image, _ = _picture()
    expected = tv.normalize(tv.to_tensor(image), list(IMAGENET_MEAN), list(IMAGENET_STD))
    np.testing.assert_allclose(normalize(image), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("contrast_first", [True, False])
def test_colours_equal_colorsys(contrast_first: bool) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(20, 235, (6, 7, 3)).astype(np.uint8)
    shift, hue, contrast, saturation = 20.0, 0.08, 0.7, 1.3
    fixed: Any = _Fixed([shift, hue, contrast, saturation], [], [np.zeros(4), 0.1 if contrast_first else 0.9])
    found = distort_colors(image, fixed).astype(float)
    expected = np.clip(image + shift, 0, 255)
    if contrast_first:
        expected = expected * contrast
    flat = []
    for red, green, blue in expected.reshape(-1, 3) / 255:
        h, s, v = colorsys.rgb_to_hsv(red, green, blue)
        flat.append(colorsys.hsv_to_rgb((h + hue) % 1, min(1.0, s * saturation), v))
    expected = 255 * np.array(flat).reshape(image.shape)
    if not contrast_first:
        expected = expected * contrast
    assert np.abs(found - expected).mean() < 1.5  # all steps are rounded to 8 bits, hue to 1.4 degrees
    assert np.abs(found - expected).max() < 12


def test_each_colour_step_happens_half_of_the_time() -> None:
    image = np.full((1, 1, 3), 100, np.uint8)  # gray: only brightness and contrast show
    rng = np.random.default_rng(0)
    values = np.array([distort_colors(image, rng)[0, 0, 0] for _ in range(2000)]).astype(float)
    assert 0.21 < (values == 100).mean() < 0.31
    assert values.min() < 50
    assert values.max() > 160
    assert pytest.approx(0.1) == HUE  # 18 of OpenCV's 180


def test_views_depend_on_the_generator_alone() -> None:
    image, mask = _picture()
    view = View((16, 16), 30, max_class_share=0.75, distort=True)
    first, again = (augment(image, mask, view, np.random.default_rng(5)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    other = augment(image, mask, view, np.random.default_rng(6))
    assert not np.array_equal(first[0], other[0])
    assert first[0].dtype == np.float32
    assert first[1].dtype == np.uint8
