"""Vessels and towers. Lengths are arbitrary: ``Shape.finish`` normalises them."""

from __future__ import annotations

import math

from image_data.rendered.draws import Draws
from image_data.rendered.shapes import DARK, LIGHT, SHADED, Shape

__all__ = ["TOWERS", "VESSELS"]


def _vessel_marks(s: Shape, r: float, widest: float, top: float) -> None:
    """Landmarks of a vessel: foot, front and back of the opening (radius r), left and right of the belly's height."""
    s.mark((0, 0, 0), (r, 0, top), (-r, 0, top), (0, r, widest), (0, -r, widest))


def _profile(s: Shape, rings: list[tuple[float, float]], open_top: bool = True, tint: float = 1.0) -> None:
    """A surface of revolution through (height, radius) rings; the first ring is closed by a floor."""
    for k in range(len(rings) - 1):
        (z0, r0), (z1, r1) = rings[k], rings[k + 1]
        last = k == len(rings) - 2
        s.tube((0, 0, z0), (0, 0, z1), r0, r1, caps=(k == 0, last and not open_top), tint=tint)


def _mug(d: Draws, s: Shape) -> None:
    r, tall = d.uniform(1.5, 2.0), d.uniform(3.2, 4.2)
    top = r * d.uniform(0.95, 1.15)
    _profile(s, [(0, r), (tall, top)])
    s.ring((0, 0, tall), (0, 0, 1), top, 0.13, tint=LIGHT)
    size = d.uniform(0.28, 0.36) * tall
    turn = d.uniform(0.5, 1.2)  # the handle points to the left of the camera
    side = (math.cos(turn), math.sin(turn), 0.0)
    s.ring((side[0] * r, side[1] * r, 0.52 * tall), (-side[1], side[0], 0), size, 0.25, half=side, tint=SHADED)
    s.tube((0, 0, 0.7 * tall), (0, 0, 0.8 * tall), 0.98 * r, tint=DARK)
    _vessel_marks(s, top, 0.5 * tall, tall)


def _goblet(d: Draws, s: Shape) -> None:
    r, bowl, stem = d.uniform(1.6, 2.1), d.uniform(2.2, 3.2), d.uniform(2.0, 3.2)
    s.tube((0, 0, 0), (0, 0, 0.35), d.uniform(1.2, 1.6), 0.5, tint=SHADED)
    s.tube((0, 0, 0.2), (0, 0, stem + 0.3), 0.3)
    s.ball((0, 0, 0.5 * stem), 0.5, tint=LIGHT)
    cut = d.uniform(0.15, 0.5)
    s.ball((0, 0, stem + bowl / 1.4), (r, r, bowl / 1.4), cut=(-1.0, cut), closed=False)
    s.tube((0, 0, stem + 0.8 * bowl / 1.4), (0, 0, stem + 0.85 * bowl / 1.4), 0.93 * r, tint=DARK)
    top = stem + (1 + cut) * bowl / 1.4
    _vessel_marks(s, r * math.sqrt(1 - cut * cut), stem + bowl / 1.4, top)


def _vase(d: Draws, s: Shape) -> None:
    foot, belly, neck, lip = d.uniform(0.8, 1.1), d.uniform(1.6, 2.1), d.uniform(0.5, 0.8), d.uniform(1.0, 1.4)
    low, tall = d.uniform(1.8, 2.8), d.uniform(5.6, 7.0)
    throat = tall - d.uniform(1.0, 1.5)
    steps = 5
    rings = [(0.0, foot)]
    for k in range(1, steps + 1):
        f = 0.5 - 0.5 * math.cos(math.pi * k / steps)
        rings.append((low * k / steps, foot + (belly - foot) * f))
    for k in range(1, steps + 1):
        f = 0.5 - 0.5 * math.cos(math.pi * k / steps)
        rings.append((low + (throat - low) * k / steps, belly + (neck - belly) * f))
    rings += [(0.5 * (throat + tall), neck + 0.3 * (lip - neck)), (tall, lip)]
    _profile(s, rings)
    _vessel_marks(s, lip, low, tall)


def _teapot(d: Draws, s: Shape) -> None:
    r, tall = d.uniform(1.9, 2.3), d.uniform(1.5, 2.0)
    s.ball((0, 0, tall), (r, r, tall))
    s.tube((0, 0, 0), (0, 0, 0.4), 0.7 * r, 0.6 * r, tint=SHADED)
    s.ball((0, 0, 1.75 * tall), (0.6 * r, 0.6 * r, 0.5), cut=(0.0, 1.0), tint=LIGHT)
    s.ball((0, 0, 1.75 * tall + 0.65), 0.32, tint=SHADED)
    turn = d.uniform(-1.4, -0.6)  # the spout points to the right of the camera, the handle to the left
    c, e = math.cos(turn), math.sin(turn)
    reach, high = d.uniform(1.55, 1.85) * r, d.uniform(1.6, 2.0) * tall
    s.tube((0.75 * r * c, 0.75 * r * e, 0.7 * tall), (reach * c, reach * e, high), 0.55, 0.25, tint=0.85)
    s.ring((-0.95 * r * c, -0.95 * r * e, 1.05 * tall), (-e, c, 0), 0.62 * tall, 0.22, half=(-c, -e, 0), tint=SHADED)
    s.mark((0, 0, 0), (reach * c, reach * e, high), (-1.4 * r * c, -1.4 * r * e, tall), (0, 0, 1.75 * tall + 0.9),
           (r, 0, tall))  # fmt: skip


def _bowl(d: Draws, s: Shape) -> None:
    r, tall = d.uniform(2.2, 2.8), d.uniform(1.4, 2.2)
    s.ball((0, 0, tall + 0.3), (r, r, tall), cut=(-1.0, 0.0), closed=False)
    s.ring((0, 0, tall + 0.3), (0, 0, 1), r, d.uniform(0.1, 0.2), tint=LIGHT)
    s.tube((0, 0, 0), (0, 0, 0.6), 0.45 * r, 0.4 * r, tint=SHADED)
    for k in range(d.integer(2, 4)):
        a = 2.1 * k + d.uniform(0, 1)
        size = d.uniform(0.6, 0.8)
        s.ball((0.45 * r * math.cos(a), 0.45 * r * math.sin(a), tall + 0.2), size, tint=d.choice((DARK, 1.6, SHADED)))
    _vessel_marks(s, r, tall + 0.3, tall + 0.3)


def _bottle(d: Draws, s: Shape) -> None:
    r, body, neck = d.uniform(1.1, 1.5), d.uniform(4.0, 5.2), d.uniform(0.38, 0.5)
    shoulder, tall = body + d.uniform(0.8, 1.4), body + d.uniform(2.4, 3.2)
    _profile(s, [(0, r), (body, r), (0.5 * (body + shoulder), 0.5 * (1.25 * r + neck)), (shoulder, neck), (tall, neck)])
    s.tube((0, 0, tall), (0, 0, tall + 0.4), 1.2 * neck, tint=DARK)
    s.tube((0, 0, 0.25 * body), (0, 0, 0.75 * body), 1.02 * r, caps=(False, False), tint=LIGHT)
    s.mark((0, 0, 0), (r, 0, 0.5 * body), (0, r, body), (0, -r, body), (0, 0, tall + 0.4))


def _tower_marks(s: Shape, x: float, y: float, top: float) -> None:
    """Landmarks of a tower: foot corners (front left, front right, back left, back right) and the top."""
    s.mark((x, y, 0), (x, -y, 0), (-x, y, 0), (-x, -y, 0), (0, 0, top))


def _skyscraper(d: Draws, s: Shape) -> None:
    x, y, z = d.uniform(1.6, 2.1), d.uniform(1.6, 2.1), 0.0
    foot = (x, y)
    for _ in range(3):
        tall = d.uniform(2.2, 3.4)
        s.block((0, 0, z + 0.5 * tall), (2 * x, 2 * y, tall))
        for k in (-1, 0, 1):  # window columns
            s.block((x, 0.55 * k * y, z + 0.5 * tall), (0.08, 0.3 * y, 0.8 * tall), tint=DARK)
            s.block((0.55 * k * x, -y, z + 0.5 * tall), (0.3 * x, 0.08, 0.8 * tall), tint=DARK)
        z += tall
        x, y = x * d.uniform(0.62, 0.78), y * d.uniform(0.62, 0.78)
    s.tube((0, 0, z), (0, 0, z + d.uniform(1.6, 2.6)), 0.2, 0.06, tint=SHADED)
    _tower_marks(s, *foot, z + 1.5)


def _church(d: Draws, s: Shape) -> None:
    w, nave, wall = d.uniform(1.3, 1.6), d.uniform(2.4, 3.2), d.uniform(2.0, 2.6)
    roof, bell, spire = d.uniform(1.4, 2.0), d.uniform(4.2, 5.4), d.uniform(2.4, 3.6)
    s.block((-0.5 * nave, 0, 0.5 * wall), (2 * nave, 2 * w, wall))
    s.block((-0.5 * nave, 0, wall + 0.5 * roof), (2.05 * nave, 2.3 * w, roof), taper=(1.0, 0.02), tint=SHADED)
    front = 0.5 * nave + 0.7
    s.block((front, 0, 0.5 * bell), (1.7, 1.7, bell))
    s.block((front, 0, bell + 0.5 * spire), (1.95, 1.95, spire), taper=(0.02, 0.02), tint=SHADED)
    s.block((front + 0.86, 0, 0.7), (0.1, 0.7, 1.4), tint=DARK)
    s.tube((front + 0.8, 0, 0.75 * bell), (front + 0.92, 0, 0.75 * bell), 0.42, tint=DARK)
    for k in range(3):
        s.block((-0.5 * nave + (k - 1) * 0.6 * nave, -w, 0.55 * wall), (0.4, 0.1, 0.5 * wall), tint=DARK)
    s.mark((front + 0.85, 0.85, 0), (front + 0.85, -0.85, 0), (-1.5 * nave, w, 0), (-1.5 * nave, -w, 0),
           (front, 0, bell + spire))  # fmt: skip


def _pagoda(d: Draws, s: Shape) -> None:
    w, z = d.uniform(1.7, 2.2), 0.0
    foot, floors = w, d.integer(3, 4)
    for _ in range(floors):
        tall, eave = d.uniform(1.0, 1.3), d.uniform(0.55, 0.7)
        s.block((0, 0, z + 0.5 * tall), (1.5 * w, 1.5 * w, tall), tint=LIGHT)
        s.block((0, 0, z + tall + 0.5 * eave), (2.9 * w, 2.9 * w, eave), taper=(0.4, 0.4), tint=SHADED)
        z += tall + 0.8 * eave
        w *= d.uniform(0.78, 0.86)
    s.tube((0, 0, z), (0, 0, z + d.uniform(1.4, 2.2)), 0.22, 0.05)
    _tower_marks(s, 0.75 * foot, 0.75 * foot, z + 1.4)


def _lighthouse(d: Draws, s: Shape) -> None:
    r, tall, top = d.uniform(1.4, 1.8), d.uniform(6.0, 7.6), d.uniform(0.75, 0.95)
    bands = 5
    s.tube((0, 0, -0.5), (0, 0, 0), 1.5 * r, 1.4 * r, tint=SHADED)
    for k in range(bands):
        lower, upper = r + (top - r) * k / bands, r + (top - r) * (k + 1) / bands
        s.tube((0, 0, tall * k / bands), (0, 0, tall * (k + 1) / bands), lower, upper, tint=(1.0, 1.7)[k % 2])
    s.tube((0, 0, tall), (0, 0, tall + 0.25), 1.5 * top, tint=SHADED)
    s.tube((0, 0, tall + 0.2), (0, 0, tall + 1.3), 0.6 * top, tint=2.0)
    s.ball((0, 0, tall + 1.3), (0.85 * top, 0.85 * top, d.uniform(0.7, 1.0)), cut=(0.0, 1.0), tint=DARK)
    _tower_marks(s, 0.9 * r, 0.9 * r, tall + 2.1)


def _castle(d: Draws, s: Shape) -> None:
    w, wall, tall = d.uniform(2.2, 2.7), d.uniform(2.4, 3.2), d.uniform(3.6, 4.6)
    r, roof = d.uniform(0.7, 0.95), d.uniform(1.6, 2.4)
    s.block((0, 0, 0.5 * wall), (2 * w, 2 * w, wall))
    s.block((-0.2 * w, 0, 0.6 * tall), (1.1 * w, 1.1 * w, 1.3 * tall), tint=0.8)
    for i in (-1, 1):
        for j in (-1, 1):
            s.tube((i * w, j * w, 0), (i * w, j * w, tall), r)
            s.tube((i * w, j * w, tall), (i * w, j * w, tall + roof), 1.25 * r, 0.0, tint=SHADED)
    s.block((w, 0, 0.3 * wall), (0.12, 1.2, 0.6 * wall), tint=DARK)
    for k in range(-1, 2):
        s.block((w - 0.2, 0.6 * k * w, wall + 0.2), (0.4, 0.3 * w, 0.5))
        s.block((0.6 * k * w, 0.2 - w, wall + 0.2), (0.3 * w, 0.4, 0.5))
    _tower_marks(s, w, w, 1.25 * tall)


def _water_tower(d: Draws, s: Shape) -> None:
    r, leg, tank = d.uniform(1.7, 2.2), d.uniform(3.6, 4.8), d.uniform(2.0, 2.8)
    x = d.uniform(1.3, 1.7)
    for i in (-1, 1):
        for j in (-1, 1):
            s.tube((i * x, j * x, 0), (i * 0.65 * x, j * 0.65 * x, leg), 0.22, tint=SHADED)
    for f in (0.35, 0.7):
        w = x * (1 - 0.35 * f)
        for i in (-1, 1):
            s.block((i * w, 0, f * leg), (0.18, 2 * w, 0.18), tint=SHADED)
            s.block((0, i * w, f * leg), (2 * w, 0.18, 0.18), tint=SHADED)
    s.tube((0, 0, 0), (0, 0, leg), 0.25, tint=DARK)
    s.ball((0, 0, leg + 0.3), (r, r, 0.9), cut=(-1.0, 0.0), tint=0.8)
    s.tube((0, 0, leg + 0.3), (0, 0, leg + 0.3 + tank), r)
    s.tube((0, 0, leg + 0.3 + tank), (0, 0, leg + 0.3 + tank + d.uniform(0.8, 1.4)), 1.1 * r, 0.1, tint=SHADED)
    _tower_marks(s, x, x, leg + tank + 1.2)


VESSELS = {
    "mug": _mug,
    "goblet": _goblet,
    "vase": _vase,
    "teapot": _teapot,
    "bowl": _bowl,
    "bottle": _bottle,
}
TOWERS = {
    "skyscraper": _skyscraper,
    "church": _church,
    "pagoda": _pagoda,
    "lighthouse": _lighthouse,
    "castle": _castle,
    "water_tower": _water_tower,
}
