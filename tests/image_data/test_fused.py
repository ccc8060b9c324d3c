"""The fused kernel against torchvision and Pillow, pixel by pixel, on the same drawn parameters."""

import itertools

import numpy as np
import pytest
import torch
from numba import types
from PIL import Image
from torchvision.transforms import functional as V1

from image_data import fused
from image_data.contracts import ImageBuffer
from image_data.draws import (
    BLUR,
    BRIGHTNESS,
    CONTRAST,
    GRAY,
    HUE,
    NOTHING,
    SATURATION,
    SOLARIZE,
    ViewParameters,
    blur_radius,
    center_crop_boxes,
    padded_crop_boxes,
)
from image_data.fused import fused_views
from image_data.random_numbers import image_keys
from image_data.recipes import RandomCrop
from image_data.reference import reference_views
from image_data.views import RECIPES, ViewMaker

JITTER = {BRIGHTNESS: 1.35, CONTRAST: 0.7, SATURATION: 1.3, HUE: -0.08}


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours, edges and noise, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float64)
    smooth[height // 3 : height // 2, : width // 2] = (250, 10, 30)
    return (smooth + rng.normal(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8)


def buffer(*images: np.ndarray) -> ImageBuffer:
    sizes = [image.size for image in images]
    return ImageBuffer(
        np.concatenate([image.ravel() for image in images]),
        np.cumsum([0, *sizes[:-1]]).astype(np.int64),
        np.array([image.shape[0] for image in images], np.int32),
        np.array([image.shape[1] for image in images], np.int32),
    )


def program(box, operations=(), flip=False, crop_first=True) -> ViewParameters:
    """Parameters of a batch of one image."""
    codes, arguments = [code for code, _ in operations], [argument for _, argument in operations]
    return ViewParameters(
        np.array([box], np.float64),
        crop_first,
        np.array([codes], np.uint8).reshape(1, -1),
        np.array([arguments], np.float32).reshape(1, -1),
        np.array([flip]),
    )


def render(image, parameters, size, renderer=fused_views) -> np.ndarray:
    out = np.full((1, 3, size, size), 77, np.uint8)
    renderer(buffer(image), parameters, out, 0, 1)
    return out[0]


def differences(image, parameters, size) -> np.ndarray:
    ours, reference = render(image, parameters, size), render(image, parameters, size, reference_views)
    return np.abs(ours.astype(int) - reference.astype(int))


CROPS = [
    (picture(375, 500), (30, 60, 290, 390), 224),  # the usual downscaling
    (picture(375, 500), (0, 0, 375, 500), 32),  # far downscaling, whole image
    (picture(300, 70), (11, 3, 280, 67), 84),  # tall: down in one axis, up in the other
    (picture(40, 52), (5, 9, 21, 30), 64),  # upscaling
    (picture(64, 64), (0, 0, 64, 64), 64),  # identity
    (picture(33, 47), (32, 46, 1, 1), 32),  # one pixel in the last corner
    (picture(1, 1), (0, 0, 1, 1), 84),
    (picture(2, 3), (0, 1, 2, 2), 7),
    (picture(5, 400), (1, 0, 3, 400), 32),
]


@pytest.mark.parametrize(("image", "box", "size"), CROPS)
def test_crop_resize_matches_torchvision_and_pillow(image, box, size):
    parameters = program(box)
    error = differences(image, parameters, size)
    assert error.max() <= 1
    # Ties are rounded either way; 2 of the 147 values of the smallest case are one.
    assert error.mean() < 0.02
    top, left, height, width = box
    cropped = Image.fromarray(image).crop((left, top, left + width, top + height))
    pillow = np.asarray(cropped.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.abs(render(image, parameters, size).astype(int) - pillow).max() <= 1


def test_identity_crop_copies_the_pixels():
    image = picture(50, 60)
    view = render(image, program((8, 20, 32, 32)), 32)
    np.testing.assert_array_equal(view, image[8:40, 20:52].transpose(2, 0, 1))


@pytest.mark.parametrize(("height", "width", "size"), [(92, 92, 84), (375, 500, 224), (500, 131, 32), (20, 31, 64)])
def test_resize_then_crop_matches_torchvision_and_pillow(height, width, size):
    image = picture(height, width)
    box = center_crop_boxes(np.array([height]), np.array([width]), size, 92 / 84)[0]
    parameters = program(box, crop_first=False)
    assert differences(image, parameters, size).max() <= 1
    view = render(image, parameters, size).astype(int)
    top, left, box_height, box_width = box
    edges = (left, top, left + box_width, top + box_height)
    pillow = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box=edges)
    assert np.abs(view - np.asarray(pillow).transpose(2, 0, 1)).max() <= 1
    # The two calls of the published test transform, on a Pillow image.
    usual = V1.center_crop(V1.resize(Image.fromarray(image), [round(size * 92 / 84)]), [size, size])
    assert np.abs(view - np.asarray(usual).transpose(2, 0, 1)).max() <= 1


@pytest.mark.parametrize("backend", [fused_views, reference_views])
@pytest.mark.parametrize(
    ("height", "width", "size", "padding"),
    [(84, 84, 84, 8 / 84), (32, 32, 32, 4 / 32), (64, 32, 32, 0.25), (375, 500, 84, 8 / 84), (9, 20, 33, 0.5)],
)
def test_random_crop_matches_torchvisions_resize_pad_and_crop(height, width, size, padding, backend):
    image, border = picture(height, width), round(padding * size)
    tensor = torch.from_numpy(image).permute(2, 0, 1).float() / 255.0
    padded = V1.pad(V1.resize(tensor, [size, size], antialias=True), [border])
    keys = image_keys(0, 0, 0, np.arange(12))
    heights, widths = np.full(12, height), np.full(12, width)
    boxes = padded_crop_boxes(RandomCrop(padding), heights, widths, size, keys)
    extremes = [[y * height / size, x * width / size, height, width] for y in (-border, border) for x in (-border, 0)]
    for box in [*boxes, *np.array(extremes)]:
        top, left = round(box[0] * size / height) + border, round(box[1] * size / width) + border
        expected = V1.crop(padded, top, left, size, size)
        for flip in (False, True):
            view = render(image, program(box, flip=flip, crop_first=False), size, backend).astype(int)
            view = view[:, :, ::-1] if flip else view
            black = (V1.crop(V1.pad(torch.ones(1, size, size), [border]), top, left, size, size) == 0)[0].numpy()
            assert (view[:, black] == 0).all()
            assert np.abs(view - expected.numpy() * 255.0).max() < 0.51


@pytest.mark.parametrize(("height", "width", "size"), [(84, 84, 84), (64, 128, 32), (16, 16, 64), (70, 90, 84)])
def test_inside_a_random_crop_the_pixels_are_those_of_the_resized_image(height, width, size):
    image = picture(height, width)
    whole = render(image, program((0, 0, height, width), crop_first=False), size)
    for top, left in [(-8, 5), (3, -8), (8, 8), (-1, 0)]:
        box = (top * height / size, left * width / size, height, width)
        view = render(image, program(box, crop_first=False), size)
        shifted = np.zeros((3, size + 16, size + 16), np.uint8)
        shifted[:, 8 : 8 + size, 8 : 8 + size] = whole
        expected = shifted[:, 8 + top : 8 + top + size, 8 + left : 8 + left + size]
        np.testing.assert_array_equal(view, expected)


def test_colour_operations_see_the_black_border():
    """As with RandomCrop before ColorJitter and blur: the border counts in the mean and bleeds inwards."""
    operations = [(CONTRAST, 0.6), (BRIGHTNESS, 1.2), (BLUR, 1.5), (SOLARIZE, 0.5)]
    parameters = program((-8, 5, 84, 84), operations, crop_first=False)
    error = differences(picture(84, 84), parameters, 84)
    assert error.max() <= 1
    assert error.mean() < 0.01


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.25, 0.5, 0.9, 1.0])
def test_solarize_matches_torchvision_and_pillow(threshold):
    """On unscaled images, because a value within a rounding error of another threshold than 0.5 jumps."""
    image = picture(64, 64)
    image[:8, :32] = np.arange(256, dtype=np.uint8).reshape(8, 32)[:, :, None]  # every value, thresholds included
    parameters = program((0, 0, 64, 64), [(SOLARIZE, threshold)])
    view = render(image, parameters, 64)
    assert differences(image, parameters, 64).max() == 0
    pillow = V1.solarize(Image.fromarray(image), threshold * 255.0)
    np.testing.assert_array_equal(view, np.asarray(pillow).transpose(2, 0, 1))


SINGLE = [
    *[(BRIGHTNESS, factor) for factor in (0.0, 0.6, 1.4)],
    *[(CONTRAST, factor) for factor in (0.0, 0.6, 1.4)],
    *[(SATURATION, factor) for factor in (0.0, 0.6, 1.4)],
    *[(HUE, shift) for shift in (-0.5, -0.4, -0.01, 0.0, 0.1, 0.5)],
    (GRAY, 0.0),
    *[(BLUR, sigma) for sigma in (0.1, 0.5, 1.0, 1.4, 2.0, 5.0)],
    (SOLARIZE, 0.5),
    (NOTHING, 0.0),
]


@pytest.mark.parametrize(("code", "argument"), SINGLE)
@pytest.mark.parametrize("size", [32, 84])
def test_single_operations_match_torchvision(code, argument, size):
    error = differences(picture(90, 120), program((4, 7, 70, 100), [(code, argument)]), size)
    assert error.max() <= 1
    assert error.mean() < 0.01


@pytest.mark.parametrize("order", list(itertools.permutations(JITTER)))
def test_jitter_in_every_order_matches_torchvision(order):
    operations = [(code, JITTER[code]) for code in order]
    error = differences(picture(60, 60), program((0, 0, 60, 60), operations), 48)
    assert error.max() <= 1
    assert error.mean() < 0.01


def test_jitter_stays_close_to_the_8_bit_operations_of_pillow():
    """Pillow rounds after every operation and so is the coarser one."""
    image = picture(64, 64)
    view = render(image, program((0, 0, 64, 64), list(JITTER.items())), 64).astype(int)
    pillow = Image.fromarray(image)
    for code, function in ((BRIGHTNESS, V1.adjust_brightness), (CONTRAST, V1.adjust_contrast)):
        pillow = function(pillow, JITTER[code])
    pillow = V1.adjust_hue(V1.adjust_saturation(pillow, JITTER[SATURATION]), JITTER[HUE])
    error = np.abs(view - np.asarray(pillow).transpose(2, 0, 1))
    assert error.max() <= 12
    assert error.mean() < 2.0


@pytest.mark.parametrize(
    "operations",
    [
        [(GRAY, 0.0), *JITTER.items()],
        [*JITTER.items(), (GRAY, 0.0), (BLUR, 1.7)],
        [(BLUR, 1.2), *JITTER.items()],  # an order that no recipe of ours has yet
        [(CONTRAST, 1.3), (BLUR, 0.8), (CONTRAST, 0.6), (HUE, 0.2)],
        [(CONTRAST, 1.3), (CONTRAST, 0.6), (BLUR, 2.0), (CONTRAST, 1.4)],
        [(NOTHING, 0.0), (BLUR, 2.0), (NOTHING, 0.0)],
        [*JITTER.items(), (GRAY, 0.0), (BLUR, 1.7), (SOLARIZE, 0.5)],  # BYOL's second view
        [(SOLARIZE, 0.5), (CONTRAST, 0.7), (BLUR, 0.8)],
    ],
)
@pytest.mark.parametrize("size", [13, 40])
def test_any_program_matches_torchvision(operations, size):
    error = differences(picture(50, 64), program((2, 1, 45, 60), operations), size)
    assert error.max() <= 1
    assert error.mean() < 0.01


def test_blur_is_close_to_the_official_recipes():
    image = picture(96, 96)
    for sigma in (0.7, 2.0):
        view = render(image, program((0, 0, 96, 96), [(BLUR, sigma)]), 96).astype(int)
        tensor = torch.from_numpy(image).permute(2, 0, 1).float()
        wide = V1.gaussian_blur(tensor, [31, 31], [sigma, sigma])  # nothing truncated
        assert np.abs(view - wide.numpy()).max() < 1.5
    assert [blur_radius(sigma, 224) for sigma in (0.1, 0.5, 1.0, 2.0)] == [1, 2, 3, 6]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_blur_of_tiny_views_keeps_its_kernel_inside(size):
    assert differences(picture(9, 9), program((0, 0, 9, 9), [(BLUR, 2.0)]), size).max() <= 1


@pytest.mark.parametrize("operations", [[], [*JITTER.items(), (BLUR, 1.1)], [(GRAY, 0.0), *JITTER.items()]])
@pytest.mark.parametrize("size", [32, 51])
def test_flip_is_the_exact_mirror_image(operations, size):
    image = picture(70, 90)
    upright = render(image, program((3, 5, 60, 77), operations), size)
    flipped = render(image, program((3, 5, 60, 77), operations, flip=True), size)
    np.testing.assert_array_equal(flipped, upright[:, :, ::-1])
    assert not np.array_equal(flipped, upright)


@pytest.mark.parametrize("name", list(RECIPES))
@pytest.mark.parametrize("size", [32, 64, 84, 224])
def test_whole_recipes_match_torchvision(name, size):
    count = 3 if size == 224 else 6
    sides = [(75, 100), (180, 64), (33, 40), (300, 260), (1, 7), (64, 64)][:count]
    images = buffer(*[picture(height, width, seed) for seed, (height, width) in enumerate(sides)])
    ours = ViewMaker([RECIPES[name]], size, seed=3)(images, 2, np.arange(count))[0]
    reference = ViewMaker([RECIPES[name]], size, seed=3, backend="torchvision")(images, 2, np.arange(count))[0]
    error = np.abs(ours.astype(int) - reference)
    assert error.max() <= 1
    assert error.mean() < 0.01


def test_a_slice_leaves_the_other_rows_alone():
    images = buffer(*[picture(40, 40, seed) for seed in range(4)])
    maker = ViewMaker([RECIPES["moco_v2"]], 32, seed=0)
    whole = maker(images, 0, np.arange(4))[0]
    out = np.full((4, 3, 32, 32), 77, np.uint8)
    fused_views(images, maker.draw(images, 0, np.arange(4))[0], out, 1, 3)
    np.testing.assert_array_equal(out[1:3], whole[1:3])
    assert (out[[0, 3]] == 77).all()
    fused_views(images, maker.draw(images, 0, np.arange(4))[0], out, 2, 2)


def test_two_blurs_are_refused():
    with pytest.raises(AssertionError, match="one blur"):
        render(picture(8, 8), program((0, 0, 8, 8), [(BLUR, 0.6), (BLUR, 2.0)]), 8)


def test_one_compiled_version_serves_every_kind_of_buffer(tmp_path):
    images = buffer(picture(40, 40))
    parameters = program((0, 0, 40, 40), [(BRIGHTNESS, 1.2)])
    images.pixels.tofile(tmp_path / "pixels")
    mapped = np.memmap(tmp_path / "pixels", np.uint8, mode="r")
    frozen = [images.offsets.copy(), images.heights.astype(np.int64), images.widths.astype(np.int64)]
    for array in frozen:
        array.flags.writeable = False
    outs = [np.zeros((1, 3, 32, 32), np.uint8) for _ in range(2)]
    fused_views(images, parameters, outs[0], 0, 1)
    fused_views(ImageBuffer(mapped, *frozen), parameters, outs[1], 0, 1)
    np.testing.assert_array_equal(*outs)
    assert images.pixels.flags.writeable
    assert len(fused.render_views.signatures) == 1


def test_the_compile_cache_knows_the_source_of_all_parts():
    """numba hashes one file; the digest of the others is part of the signature, which is part of the cache's key."""
    render(picture(8, 8), program((0, 0, 8, 8)), 8)
    (signature,) = fused.render_views.signatures
    assert isinstance(signature[-1], types.Omitted)
    assert signature[-1].value == fused.SOURCE_DIGEST
