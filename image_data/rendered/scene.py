"""One image of one object: the four complexity factors, the camera, and the targets.

World coordinates are x towards the camera, y to the right of the image, z up. As in Newell & Deng the fixed pose is a
yaw of -30 degrees, the viewpoint factor adds N(0, 0.5) rad to all three Euler angles, the lighting factor turns the
light by -0.5 + 2 N(0, 1) rad in the plane that faces the camera (-0.5 when off), and every image has a scale warp.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import numpy as np

from image_data.rendered.draws import Draws, stable
from image_data.rendered.geometry import light_fragments, see_points, trace
from image_data.rendered.samples import group_samples
from image_data.rendered.shading import MATERIAL_SIZE, NUM_TEXTURES, shade
from image_data.rendered.shapes import Solid

__all__ = ["DEPTH_SCALE", "DISTANCE", "TANGENT", "Factors", "Picture", "pose_bin", "render"]

DISTANCE = 4.0  # camera to object centre, in bounding radii of the object
TANGENT = 0.255  # of half the field of view: an object's bounding sphere fills the image
WALL = 5.6  # depth of the background plane
ELEVATION = math.atan(0.4)  # of the camera: Newell & Deng's stands at (1, 0, 0.4)
YAW = -math.pi / 6
DEPTH_SCALE = 1.0 / 8192.0  # 16-bit depth target: depth = value * DEPTH_SCALE, up to 8 bounding radii; 0 = background

_WARP, _VIEW, _LIGHT, _COLOUR, _TEXTURE, _WALL_COLOUR, _WALL_TEXTURE = range(1, 8)  # stream names: switches cannot mix


@dataclass(frozen=True)
class Factors:
    """The four binary complexity factors of Newell & Deng (CVPR 2020)."""

    texture: bool = True
    colour: bool = True
    viewpoint: bool = True
    lighting: bool = True


@dataclass(frozen=True)
class Picture:
    """One rendered image with its geometric targets.

    Attributes:
        image: uint8 (S, S, 3) RGB. depth: uint16 (S, S), 0 is background. rotation: Euler angles in radians.
        landmarks: (K, 3): x and y in pixels (pixel i covers [i, i + 1)), 1 if visible else 0.
    """

    image: np.ndarray
    depth: np.ndarray
    rotation: tuple[float, float, float]
    landmarks: np.ndarray


def _rotation_matrix(angles: tuple[float, float, float]) -> np.ndarray:
    """World from object, Rz(YAW + c) Ry(b) Rx(a)."""
    a, b, c = angles
    (sa, ca), (sb, cb), (sc, cc) = ((math.sin(v), math.cos(v)) for v in (a, b, c + YAW))
    return np.array(
        [
            [cc * cb, cc * sb * sa - sc * ca, cc * sb * ca + sc * sa],
            [sc * cb, sc * sb * sa + cc * ca, sc * sb * ca - cc * sa],
            [-sb, cb * sa, cb * ca],
        ]
    )


def pose_bin(rotation: tuple[float, float, float]) -> int:
    """The pose class of Newell & Deng from the object's up axis r in the world.

    Returns:
        0 ("top") when the polar angle of r is below pi/8, else 1 to 4: the 90-degree sector of atan2(r_x, r_y),
        numbered as in the reference: 1 around pi, 2 around -pi/2, 3 around 0, 4 around pi/2.
    """
    x, y, z = _rotation_matrix(rotation)[:, 2]
    if math.atan2(math.hypot(x, y), z) < math.pi / 8:
        return 0
    sector = math.floor((math.atan2(x, y) + 5 * math.pi / 4) / (math.pi / 2))  # 0 and 4 both straddle pi
    return 1 + sector % 4


def _camera_matrix() -> np.ndarray:
    """Camera (right, down, forward) from world."""
    s, c = math.sin(ELEVATION), math.cos(ELEVATION)
    return np.array([[0.0, 1.0, 0.0], [s, 0.0, -c], [-c, 0.0, -s]])


def _random_colour(draws: Draws) -> tuple[float, float, float]:
    return (draws.uniform(), draws.uniform(), draws.uniform())


def _class_colour(class_id: int, draws: Draws) -> tuple[float, float, float]:
    """A colour around the class's hue: hue jitter 0.2 x 0.3, other channels 0.2 (Newell & Deng)."""
    own = Draws(0x434F4C, class_id)
    hue = class_id * 0.6180339887498949 % 1.0 + 0.06 * draws.normal()
    saturation = 0.2 + 0.8 * own.uniform() + 0.2 * draws.normal()
    value = 0.6 + 0.4 * own.uniform() + 0.2 * draws.normal()
    return colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))


def _material(texture: Draws | None, colour: Draws, class_id: int | None, repeats: tuple[float, float]) -> np.ndarray:
    """A row for ``shading.shade``.

    Args:
        texture: draws of the procedural texture; None for a flat material.
        colour: draws of the colours. class_id: ties the colour to this class; None leaves it random.
        repeats: range of the texture's frequency.
    """
    row = np.zeros(MATERIAL_SIZE)
    tied = None if class_id is None else np.array(_class_colour(class_id, colour))
    first, second = np.array(_random_colour(colour)), np.array(_random_colour(colour))
    if texture is None:
        first = first if tied is None else tied
        row[1:7] = np.tile(first * first, 2)  # linear light; shade() takes the root again
        return row
    if tied is not None:  # the texture keeps its own colours, the class colour is mixed in with intensity 0.4
        first, second = 0.6 * first + 0.4 * tied, 0.6 * second + 0.4 * tied
    row[0] = texture.integer(1, NUM_TEXTURES - 1)
    row[1:4], row[4:7] = first * first, second * second
    row[7] = texture.uniform(*repeats)
    row[8:11] = [texture.uniform(-40.0, 40.0) for _ in range(3)]
    axis = np.array([texture.normal() for _ in range(3)])
    row[11:14] = axis / math.sqrt(float((axis * axis).sum()) + 1e-12)
    return np.round(row, 9)


def _materials(draws: Draws, class_id: int, factors: Factors) -> np.ndarray:
    tied = None if factors.colour else class_id
    thing = _material(draws.fork(_TEXTURE) if factors.texture else None, draws.fork(_COLOUR), tied, (2.0, 4.5))
    wall_texture = draws.fork(_WALL_TEXTURE) if factors.texture else None
    return np.stack([thing, _material(wall_texture, draws.fork(_WALL_COLOUR), None, (1.2, 4.0))])


def _warp(draws: Draws) -> np.ndarray:
    """Scale factors of the three axes: N(1, 0.1) around a constant mean, clipped as in the reference."""
    shift = np.array([draws.normal() for _ in range(3)])
    return np.clip(1.0 + 0.1 * (shift - shift.sum() / 3.0), 0.5, 1.5)


def render(solid: Solid, class_id: int, key: tuple[int, ...], factors: Factors, size: int) -> Picture:
    """Renders image ``key`` of an object.

    Args:
        solid: the shape instance. class_id: ties the hue when the colour factor is off.
        key: integers that name the image; every random number is a function of them.
        size: image side in pixels.
    """
    draws = Draws(*key)
    view, light = draws.fork(_VIEW), draws.fork(_LIGHT)
    angles = tuple(0.5 * view.normal() if factors.viewpoint else 0.0 for _ in range(3))
    rotation = (angles[0], angles[1], angles[2])
    world = np.round(_rotation_matrix(rotation), 9) * _warp(draws.fork(_WARP))
    to_camera = np.round(_camera_matrix(), 9)
    turn = -0.5 + (2.0 * light.normal() if factors.lighting else 0.0)
    # the light stands in front of the object as well, so that its shadow falls on the wall
    direction = np.array([stable(math.sin(turn)), stable(-math.cos(turn)), -0.9])
    direction /= math.sqrt(1.0 + 0.9 * 0.9)
    camera = np.round(to_camera @ world, 9)[None]
    samples, owners, solids = trace(
        solid.kinds, solid.params, solid.maps, solid.bounds, camera, DISTANCE, size, TANGENT
    )
    pixel, owner, values, depth = group_samples(samples, owners)
    up = np.ascontiguousarray(to_camera[:, 2])
    light_fragments(solids, solid.maps, samples, pixel, owner, values, np.round(direction, 9), up, WALL, TANGENT)
    image = shade(pixel, owner, values, solid.tints, _materials(draws, class_id, factors), size)
    landmarks = see_points(solids, camera, DISTANCE, solid.landmarks)
    landmarks[:, :2] = (landmarks[:, :2] / TANGENT + 1.0) * (0.5 * size)
    return Picture(image, np.floor(depth / DEPTH_SCALE + 0.5).astype(np.uint16), rotation, landmarks)
