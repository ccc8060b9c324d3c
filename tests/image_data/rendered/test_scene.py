"""Factors, pose rule, materials and the PNG writer."""

from __future__ import annotations

import io
import itertools
import math

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from image_data.rendered.classes import build_solid
from image_data.rendered.draws import Draws
from image_data.rendered.png import encode_png
from image_data.rendered.scene import DEPTH_SCALE, DISTANCE, Factors, Picture, pose_bin, render
from image_data.rendered.shading import MATERIAL_SIZE, NUM_TEXTURES, shade
from image_data.rendered.shapes import Shape, Solid

KEY = (7, 3, 11, 0)


def picture(class_id: int = 5, key: tuple[int, ...] = KEY, size: int = 48, **factors: bool) -> Picture:
    return render(build_solid(class_id, 0, 1), class_id, key, Factors(**factors), size)


@pytest.mark.parametrize("others", list(itertools.product([False, True], repeat=3)))
def test_each_switch_changes_only_its_own_factor(others):
    names = ("texture", "colour", "viewpoint", "lighting")
    for position, name in enumerate(names):
        rest = dict(zip([n for n in names if n != name], others, strict=True))
        off, on = (picture(**rest, **{name: value}) for value in (False, True))
        assert not np.array_equal(off.image, on.image), f"{name} has no effect"
        same_geometry = np.array_equal(off.depth, on.depth) and np.array_equal(off.landmarks, on.landmarks)
        assert same_geometry == (name != "viewpoint")
        assert (off.rotation == on.rotation) == (name != "viewpoint"), position


def ball() -> Solid:
    shape = Shape()
    shape.ball((0, 0, 0), 1.0)
    shape.mark(*[(0.0, 0.0, 0.0)] * 5)
    return shape.finish()


def light_angle(lighting: bool, key: int) -> float:
    """Where on a ball it is brightest, as an angle from the top, clockwise."""
    p = render(ball(), 0, (1, key), Factors(False, True, False, lighting), 64)
    rows, columns = np.nonzero(p.depth > 0)
    weight = p.image[rows, columns].sum(1).astype(float)
    weight -= np.quantile(weight, 0.7)
    bright = weight > 0
    x, y = (np.average(v[bright], weights=weight[bright]) - v.mean() for v in (columns, rows))
    return math.atan2(x, -y)


def test_light_is_fixed_or_turns_around_the_viewing_axis():
    fixed = [light_angle(False, key) for key in range(12)]
    assert np.mean(fixed) == pytest.approx(-0.5, abs=0.15)  # the scale warp moves the brightest place of each
    assert fixed == pytest.approx([-0.5] * 12, abs=0.45)
    turned = np.array([light_angle(True, key) for key in range(24)])
    assert abs(np.exp(1j * turned).mean()) < 0.6  # 2 N(0, 1) rad: exp(-2) = 0.14 in the mean


def test_viewpoint_is_gaussian_with_half_a_radian_and_fixed_otherwise():
    solid = build_solid(30, 0, 0)
    angles = np.array([render(solid, 30, (2, k), Factors(), 32).rotation for k in range(400)])
    assert np.abs(angles.mean(0)).max() < 0.1
    assert angles.std(0) == pytest.approx(0.5, abs=0.07)
    assert picture(viewpoint=False).rotation == (0.0, 0.0, 0.0)


def test_pose_bin_follows_the_published_rule():
    rng = np.random.default_rng(0)
    seen = set()
    for a, b, c in rng.normal(0, 0.7, (400, 3)):
        x, y, z = (Rotation.from_euler("xyz", [a, b, c - math.pi / 6])).as_matrix()[:, 1 + 1]
        polar, azimuth = math.acos(z), math.degrees(math.atan2(x, y))
        if polar < math.pi / 8:
            expected = 0
        elif azimuth < -135 or azimuth >= 135:
            expected = 1
        elif azimuth < -45:
            expected = 2
        elif azimuth < 45:
            expected = 3
        else:
            expected = 4
        assert pose_bin((a, b, c)) == expected
        seen.add(expected)
    assert seen == {0, 1, 2, 3, 4}
    assert pose_bin((0.0, 0.0, 0.0)) == 0


def test_class_colour_is_a_hue_of_the_class_only_when_the_colour_factor_is_off():
    def hue_spread(colour: bool) -> float:
        solid, vectors = build_solid(40, 0, 0), []
        for k in range(24):
            p = render(solid, 40, (5, k), Factors(False, colour, False, False), 32)
            r, g, b = np.median(p.image[p.depth > 0], axis=0) / 255.0
            h = math.atan2(math.sqrt(3) * (g - b), 2 * r - g - b)
            vectors.append((math.cos(h), math.sin(h)))
        return 1 - float(np.linalg.norm(np.mean(vectors, 0)))

    assert hue_spread(False) < 0.2
    assert hue_spread(True) > 0.4


def test_scale_warp_is_always_on_and_keeps_the_mean():
    widths = []
    for k in range(60):
        rows = np.flatnonzero(
            (render(build_solid(16, 0, 0), 16, (9, k), Factors(False, False, False, False), 64).depth > 0).any(1)
        )
        widths.append(rows[-1] - rows[0] + 1)
    assert 0.03 < np.std(widths) / np.mean(widths) < 0.15


def test_depth_is_that_of_a_known_ball():
    radius = 1 / math.sqrt(3)  # the corners of its box are at 1
    p = render(ball(), 0, (0, 0), Factors(False, False, False, False), 65)
    nearest = p.depth[p.depth > 0].min() * DEPTH_SCALE
    assert nearest == pytest.approx(DISTANCE - radius, abs=0.15 * radius)  # the warp changes the radius by about 0.1


def test_every_texture_is_bounded_and_varies():
    rng = np.random.default_rng(1)
    points = rng.uniform(-1, 1, (48 * 48, 3))
    pixel = np.arange(48 * 48, dtype=np.int32)
    owner, tints = np.zeros(48 * 48, np.int32), np.ones(1)
    values = np.column_stack([np.ones(48 * 48), np.ones(48 * 48), np.zeros(48 * 48), points])
    for kind in range(NUM_TEXTURES):
        material = np.zeros((2, MATERIAL_SIZE))
        material[0, 0], material[0, 4:7], material[0, 7] = kind, 1.0, 3.0
        material[0, 11:14] = 0.6, 0.0, 0.8
        mix = (shade(pixel, owner, values, tints, material, 48)[..., 0] / 255.0) ** 2
        if kind == 0:
            assert mix.max() == 0
            continue
        assert mix.std() > 0.05, f"texture {kind} is nearly flat"
        assert mix.max() - mix.min() > 0.3


def test_shade_adds_the_fragments_of_a_pixel():
    materials = np.zeros((2, MATERIAL_SIZE))
    materials[0, 1:4], materials[1, 1:4] = (0.5, 0.2, 0.1), (0.1, 0.3, 0.4)
    values = np.array([[0.25, 0.8, 0.1, 0, 0, 0], [0.75, 0.5, 0.0, 0, 0, 0]])
    image = shade(np.zeros(2, np.int32), np.array([0, -1], np.int32), values, np.array([1.5]), materials, 1)
    expected = 0.25 * (np.array([0.5, 0.2, 0.1]) * 1.5 * 0.8 + 0.1) + 0.75 * np.array([0.1, 0.3, 0.4]) * 0.5
    assert image[0, 0].tolist() == np.floor(np.sqrt(expected) * 255 + 0.5).tolist()


@pytest.mark.parametrize(("shape", "dtype"), [((5, 7, 3), np.uint8), ((33, 32), np.uint8), ((6, 9), np.uint16)])
def test_png_is_read_back_by_pillow(shape, dtype):
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)
    read = Image.open(io.BytesIO(encode_png(pixels)))
    assert np.array_equal(np.asarray(read), pixels)


def test_draws_are_uniform_normal_and_keyed():
    draws = Draws(1, 2)
    uniform = np.array([draws.uniform() for _ in range(4000)])
    normal = np.array([draws.normal() for _ in range(4000)])
    assert uniform.mean() == pytest.approx(0.5, abs=0.02)
    assert uniform.std() == pytest.approx(12**-0.5, abs=0.01)
    assert (normal.mean(), normal.std()) == pytest.approx((0, 1), abs=0.05)
    assert {draws.integer(2, 4) for _ in range(60)} == {2, 3, 4}
    assert Draws(1, 2).uniform() == Draws(1, 2).uniform() != Draws(2, 1).uniform()
    assert Draws(1).fork(2).uniform() != Draws(1).fork(3).uniform()
