"""Building one object from primitives: object coordinates are x forward (to the camera), y left, z up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from image_data.rendered.geometry import BALL, BLOCK, CONE, SOFT, TORUS

__all__ = ["DARK", "LIGHT", "NUM_LANDMARKS", "PLAIN", "SHADED", "Shape", "Solid"]

Vector = Sequence[float]

NUM_LANDMARKS = 5
PLAIN, SHADED, LIGHT, DARK = 1.0, 0.55, 1.45, 0.2  # brightness of a part relative to the object's material


@dataclass(frozen=True)
class Solid:
    """One finished object, centred, with bounding radius 1 (arrays as ``geometry.trace`` takes them).

    Attributes:
        kinds: int64 (P,). params: (P, 4). maps: (P, 3, 4) object from local. bounds: (P, 2, 3). tints: (P,).
        landmarks: (NUM_LANDMARKS, 3) object coordinates.
    """

    kinds: np.ndarray
    params: np.ndarray
    maps: np.ndarray
    bounds: np.ndarray
    tints: np.ndarray
    landmarks: np.ndarray


def _rotation(euler: Vector) -> list[list[float]]:
    """Rz(c) Ry(b) Rx(a) for angles (a, b, c) in degrees, as rows."""
    (sa, ca), (sb, cb), (sc, cc) = ((math.sin(math.radians(v)), math.cos(math.radians(v))) for v in euler)
    return [
        [cc * cb, cc * sb * sa - sc * ca, cc * sb * ca + sc * sa],
        [sc * cb, sc * sb * sa + cc * ca, sc * sb * ca - cc * sa],
        [-sb, cb * sa, cb * ca],
    ]


def _frame(along: Vector, side: Vector = (0.0, 0.0, 1.0)) -> tuple[list[list[float]], float]:
    """Rotation (as rows) whose third column is ``along`` and whose second is as near to ``side`` as it can; length."""
    length = math.sqrt(sum(v * v for v in along))
    z = [v / length for v in along]
    if abs(sum(a * b for a, b in zip(z, side, strict=True))) > 0.999 * math.sqrt(sum(v * v for v in side)):
        side = (0.0, 1.0, 0.0) if abs(z[1]) < 0.9 else (1.0, 0.0, 0.0)
    x = [side[1] * z[2] - side[2] * z[1], side[2] * z[0] - side[0] * z[2], side[0] * z[1] - side[1] * z[0]]
    norm = math.sqrt(sum(v * v for v in x))
    x = [v / norm for v in x]
    y = [z[1] * x[2] - z[2] * x[1], z[2] * x[0] - z[0] * x[2], z[0] * x[1] - z[1] * x[0]]
    return [[x[i], y[i], z[i]] for i in range(3)], length


class Shape:
    """Collects primitives in any unit of length; ``finish`` centres and scales them."""

    def __init__(self) -> None:
        self._kinds: list[int] = []
        self._params: list[tuple[float, ...]] = []
        self._maps: list[list[list[float]]] = []
        self._bounds: list[tuple[Vector, Vector]] = []
        self._tints: list[float] = []
        self._marks: list[Vector] = []

    def _add(
        self, kind: int, params: Vector, rotation: list[list[float]], scale: Vector, centre: Vector, tint: float
    ) -> None:
        self._kinds.append(kind)
        self._params.append((*params, *(0.0,) * (4 - len(params))))
        self._maps.append([[*(rotation[i][j] * scale[j] for j in range(3)), centre[i]] for i in range(3)])
        self._tints.append(tint)

    def block(
        self,
        centre: Vector,
        size: Vector,
        taper: Vector = (1.0, 1.0),
        shift: Vector = (0.0, 0.0),
        euler: Vector = (0.0, 0.0, 0.0),
        tint: float = PLAIN,
    ) -> None:
        """A box, or a frustum: ``taper`` scales its top face, ``shift`` moves it (both along local x and y)."""
        rotation = _rotation(euler)
        half = [0.5 * v for v in size]
        base = [centre[i] - rotation[i][2] * half[2] for i in range(3)]
        shear = (shift[0] / half[0], shift[1] / half[1])
        self._add(BLOCK, (*taper, *shear), rotation, (half[0], half[1], size[2]), base, tint)
        top = [(s - t, s + t) for s, t in zip(shear, taper, strict=True)]
        lo, hi = [min(-1.0, low) for low, _ in top], [max(1.0, high) for _, high in top]
        self._bounds.append(((*lo, 0.0), (*hi, 1.0)))

    def plate(
        self, base: Vector, tip: Vector, chord: Vector, thickness: float, taper: float = 1.0, tint: float = PLAIN
    ) -> None:
        """A wing, fin or sail: ``chord`` is the whole root chord centred on ``base``; ``taper`` is tip over root."""
        along = [b - a for a, b in zip(base, tip, strict=True)]
        flat = [
            chord[1] * along[2] - chord[2] * along[1],
            chord[2] * along[0] - chord[0] * along[2],
            chord[0] * along[1] - chord[1] * along[0],
        ]
        norm = 0.5 * thickness / math.sqrt(sum(v * v for v in flat))
        columns = [[0.5 * chord[i], flat[i] * norm, along[i]] for i in range(3)]
        self._add(BLOCK, (taper, 0.7), columns, (1.0, 1.0, 1.0), base, tint)
        wide = max(1.0, taper)
        self._bounds.append(((-wide, -1.0, 0.0), (wide, 1.0, 1.0)))

    def ball(
        self,
        centre: Vector,
        radii: Vector | float,
        cut: Vector = (-1.0, 1.0),
        closed: bool = True,
        euler: Vector = (0.0, 0.0, 0.0),
        tint: float = PLAIN,
    ) -> None:
        """An ellipsoid between the local heights ``cut`` (in radii); ``closed`` puts discs on the cuts."""
        scale = (radii,) * 3 if isinstance(radii, float | int) else radii
        self._add(BALL, (cut[0], cut[1], float(closed)), _rotation(euler), scale, centre, tint)
        self._bounds.append(((-1.0, -1.0, cut[0]), (1.0, 1.0, cut[1])))

    def tube(
        self,
        start: Vector,
        end: Vector,
        radius: float,
        end_radius: float | None = None,
        caps: tuple[bool, bool] = (True, True),
        flat: float = 1.0,
        tint: float = PLAIN,
    ) -> None:
        """A cylinder or cone frustum between two points; ``flat`` scales its local y radius; open without caps."""
        rotation, length = _frame([b - a for a, b in zip(start, end, strict=True)])
        ratio = 1.0 if end_radius is None else end_radius / radius
        self._add(CONE, (ratio, float(caps[0]), float(caps[1])), rotation, (radius, radius * flat, length), start, tint)
        wide = max(1.0, ratio)
        self._bounds.append(((-wide, -wide, 0.0), (wide, wide, 1.0)))

    def ring(
        self,
        centre: Vector,
        axis: Vector,
        radius: float,
        thickness: float,
        half: Vector | None = None,
        stretch: float = 1.0,
        tint: float = PLAIN,
    ) -> None:
        """A torus around ``axis`` with tube radius ``thickness``; ``half`` keeps only the half on that side."""
        rotation, _ = _frame(axis, half if half is not None else (0.0, 0.0, 1.0))
        tube = thickness / radius
        low = -1.0 - tube if half is None else 0.0
        self._add(TORUS, (tube, low), rotation, (radius, radius * stretch, radius), centre, tint)
        self._bounds.append(((-1.0 - tube, low, -tube), (1.0 + tube, 1.0 + tube, tube)))

    def soft(
        self, centre: Vector, size: Vector, rounding: float, euler: Vector = (0.0, 0.0, 0.0), tint: float = PLAIN
    ) -> None:
        """A box of outer ``size`` with edges rounded by the radius ``rounding`` (at most half the least side)."""
        unit = 0.5 * max(size)  # marching tolerances are relative to the local unit
        rounding = min(rounding, 0.5 * min(size)) / unit
        core = [0.5 * v / unit - rounding for v in size]
        self._add(SOFT, (*core, rounding), _rotation(euler), (unit,) * 3, centre, tint)
        outer = [v + rounding for v in core]
        self._bounds.append(([-v for v in outer], outer))

    def mark(self, *points: Vector) -> None:
        """Adds landmarks."""
        self._marks.extend(points)

    def finish(self) -> Solid:
        """Centres the bounding box at the origin, scales the bounding radius to 1 and rounds to stable digits."""
        assert len(self._marks) == NUM_LANDMARKS, f"{len(self._marks)} landmarks, expected {NUM_LANDMARKS}"
        maps, bounds = np.array(self._maps), np.array(self._bounds, np.float64)
        corners = np.array([[bounds[:, c & 1, 0], bounds[:, c >> 1 & 1, 1], bounds[:, c >> 2, 2]] for c in range(8)])
        points = np.einsum("pij,cjp->pci", maps[:, :, :3], corners) + maps[:, None, :, 3]
        middle = (points.min((0, 1)) + points.max((0, 1))) / 2
        radius = np.sqrt(((points - middle) ** 2).sum(-1).max())
        maps[:, :, 3] -= middle
        return Solid(
            kinds=np.array(self._kinds, np.int64),
            params=np.round(self._params, 9),
            maps=np.round(maps / radius, 9),
            bounds=np.round(bounds, 9),
            tints=np.array(self._tints),
            landmarks=np.round((np.array(self._marks) - middle) / radius, 9),
        )
