"""The kernels against slow oracles: dense steps along each ray through implicit functions written out here."""

from __future__ import annotations

import numpy as np
import pytest

from image_data.rendered.classes import build_solid
from image_data.rendered.geometry import MARK_TOLERANCE, light_fragments, see_points, trace
from image_data.rendered.samples import group_samples
from image_data.rendered.shapes import Shape, Solid

DISTANCE, TANGENT, SIZE = 4.0, 0.3, 10
CAMERA = np.array([[[0.9, 0.1, 0.2], [-0.2, 0.3, -0.95], [-0.1, -1.1, 0.3]]])  # any invertible map


def finish(shape: Shape) -> Solid:
    shape.mark(*[(0.0, 0.0, 0.0)] * 5)
    return shape.finish()


def block() -> tuple[Solid, object]:
    shape = Shape()
    shape.block((0.1, 0.2, 0.0), (1.0, 0.8, 1.4), taper=(0.5, 0.2), shift=(0.3, -0.2), euler=(20, 30, 40))
    # shift is in object units; half sides 0.5 and 0.4
    return finish(
        shape
    ), lambda x, y, z: (np.abs(x - 0.6 * z) <= 1 - 0.5 * z) & (np.abs(y + 0.5 * z) <= 1 - 0.8 * z) & (z >= 0) & (z <= 1)


def ball() -> tuple[Solid, object]:
    shape = Shape()
    shape.ball((0, 0, 0.1), (0.9, 0.5, 0.7), cut=(-0.6, 0.4), euler=(10, 50, -20))
    return finish(shape), lambda x, y, z: (x * x + y * y + z * z <= 1) & (z >= -0.6) & (z <= 0.4)


def cone() -> tuple[Solid, object]:
    shape = Shape()
    shape.tube((0.2, 0.1, -0.4), (-0.1, 0.5, 0.6), 0.6, 0.2, flat=0.7)
    return finish(shape), lambda x, y, z: (x * x + y * y <= (1 - 2 / 3 * z) ** 2) & (z >= 0) & (z <= 1)


def ring() -> tuple[Solid, object]:
    shape = Shape()
    shape.ring((0, 0, 0), (0.3, 0.8, 0.4), 0.8, 0.24, half=(0, 0, 1), stretch=0.8)
    return finish(shape), lambda x, y, z: ((np.hypot(x, y) - 1) ** 2 + z * z <= 0.09) & (y >= 0)


def soft() -> tuple[Solid, object]:
    shape = Shape()
    shape.soft((0, 0, 0), (1.6, 1.0, 0.6), 0.2, euler=(30, 0, 60))  # unit 0.8: core 0.75, 0.375, 0.125, rounding 0.25

    def inside(x, y, z):
        gaps = [np.maximum(np.abs(v) - h, 0) for v, h in ((x, 0.75), (y, 0.375), (z, 0.125))]
        return sum(g * g for g in gaps) <= 0.25**2

    return finish(shape), inside


@pytest.mark.parametrize("make", [block, ball, cone, ring, soft])
def test_depth_matches_dense_steps_through_the_implicit_function(make):
    solid, inside = make()
    depth, owner, _ = trace(solid.kinds, solid.params, solid.maps, solid.bounds, CAMERA, DISTANCE, SIZE, TANGENT)
    forward = CAMERA[0] @ solid.maps[0, :, :3]
    offset = CAMERA[0] @ solid.maps[0, :, 3] + [0, 0, DISTANCE]
    steps = np.linspace(2.0, 6.0, 8001)
    tolerance = 1.5e-2 if make in (ring, soft) else 2e-3  # a marched ray stops 4e-4 before a surface it may graze
    centres = ((np.arange(2 * SIZE) + 0.5) / SIZE - 1) * TANGENT
    hits = 0
    for row, v in enumerate(centres):
        for column, u in enumerate(centres):
            points = np.linalg.solve(forward, steps * np.array([[u], [v], [1.0]]) - offset[:, None])
            found = np.flatnonzero(inside(*points))
            if len(found):
                hits += 1
                assert owner[row, column] == 0
                assert depth[row, column] == pytest.approx(steps[found[0]], abs=tolerance)
            elif owner[row, column] == 0:  # a graze shorter than one step
                middle = np.array([u, v, 1.0]) * depth[row, column]
                near = np.linalg.solve(forward, middle - offset)[:, None] + np.linspace(-0.03, 0.03, 7)
                assert inside(*np.meshgrid(*near, indexing="ij")).any()
    assert 20 < hits < 380


def test_open_shell_shows_its_inside_and_closed_one_does_not():
    straight_down = np.array([[[1.0, 0, 0], [0, 1.0, 0], [0, 0, -1.0]]])  # object z towards the camera
    depths = []
    for caps in ((True, False), (True, True)):
        shape = Shape()
        shape.tube((0, 0, 0), (0, 0, 1), 1.0, caps=caps)
        solid = finish(shape)
        depth, _, _ = trace(solid.kinds, solid.params, solid.maps, solid.bounds, straight_down, DISTANCE, 8, TANGENT)
        depths.append(depth[8, 8])
    tall = 2 * np.sqrt(1 / 9)  # height over bounding diameter: 1 over 3 by the corners of its box
    assert depths[1] == pytest.approx(DISTANCE - tall / 2, abs=1e-6)
    assert depths[0] == pytest.approx(DISTANCE + tall / 2, abs=1e-6)


def lit(solid: Solid, light: np.ndarray, size: int = 16):
    camera, up = np.eye(3)[None], np.array([0.0, -1.0, 0.0])
    samples, owners, solids = trace(
        solid.kinds, solid.params, solid.maps, solid.bounds, camera, DISTANCE, size, TANGENT
    )
    pixel, owner, values, depth = group_samples(samples, owners)
    light_fragments(solids, solid.maps, samples, pixel, owner, values, light, up, 5.6, TANGENT)
    return pixel, owner, values, depth, samples, owners


@pytest.mark.parametrize("form", ["ball", "ring", "block"])
def test_light_follows_the_surface_normal(form):
    shape = Shape()
    if form == "ball":
        shape.ball((0, 0, 0), (0.5, 0.8, 0.6), euler=(30, 20, 10))
    elif form == "ring":
        shape.ring((0, 0, 0), (0.2, 0.5, 1.0), 0.7, 0.25)
    else:
        shape.block((0, 0, 0), (0.8, 1.0, 0.7), taper=(0.5, 0.7), euler=(30, 50, 0))
    solid = finish(shape)
    light = np.array([0.0, 0.0, 1.0])  # from behind: no key light, no shadow; what is left depends on the normal
    size = 128
    pixel, owner, values, _, samples, owners = lit(solid, light, size)
    step = TANGENT / size
    centres = ((np.arange(2 * size) + 0.5) / size - 1) * TANGENT
    points = samples[..., None] * np.stack([*np.meshgrid(centres, centres), np.ones((2 * size, 2 * size))], -1)
    checked = 0
    for f in np.flatnonzero(owner >= 0)[::29]:
        row, column = 2 * (pixel[f] // size), 2 * (pixel[f] % size)
        if (owners[row - 1 : row + 2, column - 1 : column + 2] < 0).any():
            continue
        normal = np.cross(
            points[row, column + 1] - points[row, column - 1], points[row + 1, column] - points[row - 1, column]
        )
        second = points[row, column + 1] + points[row, column - 1] - 2 * points[row, column]
        if values[f, 0] < 1 or np.abs(second).max() > 3 * step:  # an edge or a jump between parts
            continue
        normal *= -np.sign(normal[2]) / np.linalg.norm(normal)
        ray = points[row, column] / np.linalg.norm(points[row, column])
        expected = 0.34 * (0.8 - 0.2 * normal[1]) - 0.26 * normal @ ray
        if abs(values[f, 1] - expected) < 0.01:
            checked += 1
        else:
            assert form == "block"  # only the finite difference across a crease may differ
    assert checked > 40


def test_shadow_is_where_a_dense_walk_towards_the_light_meets_the_object():
    shape = Shape()
    shape.ball((0, 0, 0), 0.3)
    shape.ball((0.9, 0.1, 0.4), 0.25)
    solid = finish(shape)
    light = np.array([0.5, -0.3, -0.6])
    light /= np.linalg.norm(light)
    _, owner, values, *_ = lit(solid, light, 24)
    unshadowed = 0.34 * 0.8 + 0.62 * 0.6 / np.linalg.norm([0.5, -0.3, -0.6])
    seen = set()
    for f in np.flatnonzero((owner < 0) & (values[:, 0] == 1)):
        x, y = values[f, 3], values[f, 4]
        walk = np.array([x, y, 5.6])[:, None] + light[:, None] * np.linspace(0, 6, 3000)
        gaps = [
            np.sqrt(((walk - (solid.maps[k, :, 3] + [0, 0, DISTANCE])[:, None]) ** 2).sum(0)).min()
            - np.linalg.norm(solid.maps[k, 0, :3])
            for k in range(2)
        ]
        if abs(min(gaps)) < 0.01:
            continue
        ray = np.array([x, y, 5.6]) / np.linalg.norm([x, y, 5.6])
        bright = unshadowed + 0.26 * ray[2]
        shadow = bool(min(gaps) < 0)
        seen.add(shadow)
        assert values[f, 1] == pytest.approx(bright - (unshadowed - 0.34 * 0.8) * shadow, abs=1e-6)
    assert seen == {True, False}


def test_samples_become_fragments_with_shares_of_the_pixel():
    owners = np.array([[0, 0, 1, -1], [0, 0, 2, -1], [-1, -1, -1, 5], [-1, -1, 5, 5]], np.int32)
    samples = np.where(owners >= 0, 1.0 + np.arange(16).reshape(4, 4), 1e30)
    pixel, owner, values, depth = group_samples(samples, owners)
    assert pixel.tolist() == [0, 1, 1, 1, 2, 3, 3]
    assert owner.tolist() == [0, 1, -1, 2, -1, -1, 5]
    assert values[:, 0].tolist() == [1.0, 0.25, 0.5, 0.25, 1.0, 0.25, 0.75]
    assert depth.tolist() == [[1.0, 3.0], [0.0, 12.0]]


def test_hidden_landmarks_are_those_behind_the_first_surface():
    solid = build_solid(0, 0, 0)
    rng = np.random.default_rng(0)
    points = rng.uniform(-0.8, 0.8, (200, 3))
    size = 256
    depth, _, solids = trace(solid.kinds, solid.params, solid.maps, solid.bounds, CAMERA, DISTANCE, size, TANGENT)
    seen = see_points(solids, CAMERA, DISTANCE, points)
    flags = []
    for point, (u, v, visible) in zip(points, seen, strict=True):
        x, y, z = CAMERA[0] @ point + [0, 0, DISTANCE]
        assert (u, v) == pytest.approx((x / z, y / z))
        column, row = (int((w / TANGENT + 1) * size) for w in (u, v))
        if not (1 <= row < 2 * size - 1 and 1 <= column < 2 * size - 1):
            continue
        around = depth[row - 1 : row + 2, column - 1 : column + 2]
        margin = z - MARK_TOLERANCE - around
        if (margin > 0.01).all() or (margin < -0.01).all():  # away from the object's edges
            assert visible == float((margin < 0).all())
            flags.append(visible)
    assert 0.05 < np.mean(flags) < 0.95
