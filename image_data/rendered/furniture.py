"""Chairs, tables and lamps. Lengths are in decimetres or so: ``Shape.finish`` normalises them."""

from __future__ import annotations

import math

from image_data.rendered.draws import Draws
from image_data.rendered.shapes import DARK, LIGHT, SHADED, Shape

__all__ = ["CHAIRS", "LAMPS", "TABLES"]


def _legs(s: Shape, x: float, y: float, top: float, radius: float, splay: float = 0.0) -> None:
    """Four round legs under a rectangle of half sides x and y."""
    for i in (-1, 1):
        for j in (-1, 1):
            s.tube((i * x, j * y, top), (i * (x + splay), j * (y + splay), 0.0), radius, 0.75 * radius, tint=SHADED)


def _chair_marks(s: Shape, x: float, y: float, seat: float, top: float, lean: float = 0.0) -> None:
    """Landmarks of a chair: seat corners (front left, front right, back left, back right) and the top of the back."""
    s.mark((x, y, seat), (x, -y, seat), (-x, y, seat), (-x, -y, seat), (-x - lean, 0.0, top))


def _four_leg_chair(d: Draws, s: Shape) -> None:
    x, y, seat, top = d.uniform(1.9, 2.4), d.uniform(1.8, 2.4), d.uniform(3.8, 4.8), d.uniform(8.0, 10.0)
    lean = d.uniform(0.2, 0.8)
    _legs(s, 0.88 * x, 0.88 * y, seat, d.uniform(0.2, 0.34), d.uniform(0.0, 0.4))
    s.soft((0, 0, seat), (2 * x, 2 * y, 0.6), 0.2)
    s.plate((-x + 0.1, 0, seat), (-x - lean, 0, top), (0, 2 * y * d.uniform(0.85, 1.0), 0), 0.45, d.uniform(0.7, 1.0))
    _chair_marks(s, x, y, seat, top, lean)


def _stool(d: Draws, s: Shape) -> None:
    r, seat = d.uniform(1.7, 2.3), d.uniform(4.6, 6.6)
    thick, splay = d.uniform(0.4, 1.0), d.uniform(0.3, 1.1)
    s.tube((0, 0, seat - thick), (0, 0, seat), r * d.uniform(0.85, 1.0), r)
    x = 0.55 * r
    _legs(s, x, x, seat - thick, d.uniform(0.22, 0.36), splay)
    low = d.uniform(0.25, 0.45)
    foot = 1.41 * (x + splay * (1 - low))
    s.ring((0, 0, low * seat), (0, 0, 1), foot, 0.16, tint=LIGHT)
    s.mark((r, 0, seat), (-r, 0, seat), (0, r, seat), (0, -r, seat), (0, 0, seat))


def _armchair(d: Draws, s: Shape) -> None:
    x, y, seat, top = d.uniform(2.2, 2.8), d.uniform(2.0, 2.8), d.uniform(2.4, 3.2), d.uniform(5.6, 7.4)
    arm, wide = seat + d.uniform(1.1, 1.9), d.uniform(0.9, 1.4)
    s.soft((0, 0, 0.5 * seat + 0.3), (2 * x, 2 * y, seat - 0.6), 0.4)
    s.soft((0.2, 0, seat + 0.2), (1.8 * x, 1.9 * y, 0.9), 0.42, tint=LIGHT)
    for j in (-1, 1):
        s.soft((0, j * (y + 0.3 * wide), 0.5 * arm + 0.2), (2 * x, wide, arm - 0.4), 0.4, tint=0.8)
    s.soft((-x, 0, 0.5 * top), (1.2, 2 * y + wide, top - 0.5), 0.5, euler=(0, -d.uniform(4, 12), 0))
    _chair_marks(s, x, y, seat + 0.5, top, 0.4)


def _swivel_chair(d: Draws, s: Shape) -> None:
    x, y, seat, top = d.uniform(1.9, 2.4), d.uniform(1.9, 2.4), d.uniform(4.2, 5.2), d.uniform(8.4, 10.0)
    s.soft((0, 0, seat), (2 * x, 2 * y, 0.9), 0.4)
    s.tube((0, 0, 0.8), (0, 0, seat), d.uniform(0.25, 0.4), tint=SHADED)
    reach = d.uniform(2.1, 2.7)
    for k in range(5):
        a = 2 * math.pi * (k + 0.3) / 5
        tip = (reach * math.cos(a), reach * math.sin(a), 0.45)
        s.tube((0, 0, 1.1), tip, 0.3, 0.2, tint=SHADED)
        s.ball((tip[0], tip[1], 0.3), 0.36, tint=DARK)
    s.tube((-x, 0, seat), (-x - 0.5, 0, seat + 2.2), 0.25, tint=SHADED)
    s.soft((-x - 0.5, 0, 0.5 * (seat + top) + 0.7), (0.6, 1.9 * y, top - seat - 1.2), 0.3, euler=(0, -6, 0))
    _chair_marks(s, x, y, seat, top, 0.6)


def _rocking_chair(d: Draws, s: Shape) -> None:
    x, y, seat, top = d.uniform(1.9, 2.3), d.uniform(1.8, 2.2), d.uniform(3.4, 4.2), d.uniform(8.6, 10.4)
    radius, lean = d.uniform(3.6, 4.4), d.uniform(0.9, 1.5)
    for j in (-1, 1):
        s.ring((-0.3, j * 0.9 * y, 0.62 * radius), (0, 1, 0), radius, 0.24, half=(0, 0, -1), stretch=0.62)
        for i in (-1, 1):
            s.tube((i * 0.85 * x, j * 0.9 * y, seat), (i * 1.05 * x, j * 0.9 * y, 0.4), 0.24, tint=SHADED)
        s.tube((0.8 * x, j * y, seat), (0.8 * x, j * y, seat + 1.8), 0.18, tint=SHADED)
        s.block((-0.2, j * y, seat + 1.9), (2.2 * x, 0.5, 0.3))
    s.soft((0, 0, seat), (2 * x, 2 * y, 0.5), 0.2)
    bars = d.integer(4, 5)
    for k in range(bars):
        b = y * (1.7 * k / (bars - 1) - 0.85)
        s.tube((-0.9 * x, b, seat), (-x - lean, b, top), 0.2, tint=LIGHT)
    s.block((-x - lean, 0, top), (0.4, 2.1 * y, 0.8), euler=(0, -10, 0))
    _chair_marks(s, x, y, seat, top, lean)


def _ladder_chair(d: Draws, s: Shape) -> None:
    x, y, seat, top = d.uniform(1.6, 2.0), d.uniform(1.5, 1.9), d.uniform(4.2, 5.0), d.uniform(11.0, 13.5)
    r, lean = d.uniform(0.2, 0.3), d.uniform(0.0, 0.5)
    for j in (-1, 1):
        s.tube((0.85 * x, 0.85 * j * y, 0), (0.85 * x, 0.85 * j * y, seat), r, tint=SHADED)
        s.tube((-0.9 * x, 0.9 * j * y, 0), (-0.9 * x - lean, 0.9 * j * y, top), r)
        s.ball((-0.9 * x - lean, 0.9 * j * y, top), 1.5 * r)
    s.block((0, 0, seat), (2 * x, 2 * y, 0.4))
    rungs = d.integer(3, 4)
    for k in range(rungs):
        f = (k + 1) / (rungs + 0.3)
        s.block((-0.9 * x - lean * (seat + f * (top - seat)) / top, 0, seat + f * (top - seat)), (0.3, 1.8 * y, 0.85))
    s.tube((0.85 * x, 0.85 * y, 0.4 * seat), (0.85 * x, -0.85 * y, 0.4 * seat), 0.7 * r)
    _chair_marks(s, x, y, seat, top, lean - 0.1 * x)


def _table_marks(s: Shape, x: float, y: float, top: float) -> None:
    """Landmarks of a table: front, back, left and right of the top, and its centre."""
    s.mark((x, 0, top), (-x, 0, top), (0, y, top), (0, -y, top), (0, 0, top))


def _dining_table(d: Draws, s: Shape) -> None:
    x, y, top = d.uniform(2.6, 3.4), d.uniform(4.0, 5.6), d.uniform(4.2, 5.4)
    s.block((0, 0, top), (2 * x, 2 * y, d.uniform(0.4, 0.7)))
    r = d.uniform(0.3, 0.5)
    for i in (-1, 1):
        for j in (-1, 1):
            centre = (i * (x - 2 * r), j * (y - 2 * r), 0.5 * top)
            s.block(centre, (2 * r, 2 * r, top), euler=(180, 0, 0), taper=(0.6, 0.6), tint=SHADED)
    s.block((0, 0, top - 0.7), (2 * x - 4 * r, 2 * y - 4 * r, 0.8), tint=0.75)
    _table_marks(s, x, y, top)


def _pedestal_table(d: Draws, s: Shape) -> None:
    r, top = d.uniform(3.0, 4.0), d.uniform(4.6, 6.2)
    s.tube((0, 0, top - d.uniform(0.35, 0.6)), (0, 0, top), 0.95 * r, r)
    s.tube((0, 0, 0.5), (0, 0, top - 0.3), d.uniform(0.5, 0.9), d.uniform(0.35, 0.6), tint=SHADED)
    s.ball((0, 0, 0.45 * top), (0.95, 0.95, 0.7), tint=SHADED)
    s.ball((0, 0, 0), (r * d.uniform(0.5, 0.68),) * 2 + (1.0,), cut=(0.0, 1.0), tint=SHADED)
    _table_marks(s, r, r, top)


def _trestle_table(d: Draws, s: Shape) -> None:
    x, y, top = d.uniform(2.4, 3.0), d.uniform(4.2, 5.6), d.uniform(4.6, 5.6)
    planks = 4
    for k in range(planks):
        s.block(((2 * k + 1 - planks) * x / planks, 0, top), (1.85 * x / planks, 2 * y, 0.45))
    for j in (-1, 1):
        b = j * (y - d.uniform(0.8, 1.3))
        for i in (-1, 1):
            s.plate((i * 0.8 * x, b, top - 0.1), (-i * 0.9 * x, b, 0), (0, 0.5, 0), 0.55, tint=SHADED)
    s.tube((0, y - 1, 0.5 * top), (0, 1 - y, 0.5 * top), 0.22, tint=SHADED)
    _table_marks(s, x, y, top)


def _coffee_table(d: Draws, s: Shape) -> None:
    x, y, top = d.uniform(2.4, 3.0), d.uniform(3.8, 5.0), d.uniform(2.0, 2.8)
    rounding = d.uniform(0.1, 0.3)
    s.soft((0, 0, top), (2 * x, 2 * y, 0.65), rounding)
    shelf = top * d.uniform(0.25, 0.4)
    s.block((0, 0, shelf), (1.8 * x, 1.85 * y, 0.3), tint=LIGHT)
    for i in (-1, 1):
        for j in (-1, 1):
            s.block((i * 0.87 * x, j * 0.92 * y, 0.5 * top), (0.6, 0.6, top), tint=SHADED)
    s.soft((d.uniform(-1, 1), d.uniform(-2, 2), top + 0.5), (1.2, 1.7, 0.5), 0.05, (0, 0, d.uniform(-40, 40)), LIGHT)
    _table_marks(s, x, y, top)


def _desk(d: Draws, s: Shape) -> None:
    x, y, top = d.uniform(2.3, 2.8), d.uniform(3.8, 4.8), d.uniform(4.4, 5.2)
    s.block((0, 0, top), (2 * x, 2 * y, 0.4))
    wide = d.uniform(2.0, 2.8)
    s.block((-0.1, y - 0.5 * wide - 0.2, 0.5 * top), (1.8 * x, wide, top), tint=0.8)
    for k in range(3):
        z = top * (k + 0.55) / 3.1
        s.block((0.9 * x, y - 0.5 * wide - 0.2, z), (0.25, 0.85 * wide, 0.25 * top), tint=LIGHT)
        s.ball((0.9 * x + 0.2, y - 0.5 * wide - 0.2, z), 0.2, tint=DARK)
    s.block((-0.1, 0.3 - y, 0.5 * top), (1.8 * x, 0.4, top), tint=SHADED)
    s.block((-0.8 * x, -0.5 * wide, 0.62 * top), (0.25, 2 * y - wide, 0.7 * top), tint=SHADED)
    s.block((-0.6 * x, d.uniform(-1.5, 0.5), top + 1.3), (0.3, 2.6, 1.8), euler=(0, -8, 0), tint=DARK)
    _table_marks(s, x, y, top)


def _tripod_table(d: Draws, s: Shape) -> None:
    r, top = d.uniform(1.7, 2.4), d.uniform(5.4, 7.0)
    s.tube((0, 0, top - 0.4), (0, 0, top), r)
    s.ring((0, 0, top), (0, 0, 1), r, 0.22, tint=LIGHT)
    turn, knee = d.uniform(0.3, 0.8), d.uniform(0.35, 0.55) * top
    for k in range(3):
        a = turn + 2 * math.pi * k / 3
        c, e = math.cos(a), math.sin(a)
        s.tube((0.8 * r * c, 0.8 * r * e, top - 0.4), (0.25 * c, 0.25 * e, knee), 0.24, tint=SHADED)
        s.tube((0.25 * c, 0.25 * e, knee), (1.05 * r * c, 1.05 * r * e, 0), 0.26, tint=SHADED)
    s.ball((0, 0, knee), 0.55)
    _table_marks(s, r, r, top)


def _lamp_marks(s: Shape, light: float, top: float, reach: float, x: float = 0.0) -> None:
    """Landmarks of a lamp: foot, light, top, left and right of the shade (all on the axis at ``x`` but the foot)."""
    s.mark((0, 0, 0), (x, 0, light), (x, 0, top), (x, reach, light), (x, -reach, light))


def _shade_lamp(d: Draws, s: Shape) -> None:
    body, r, shade = d.uniform(1.1, 1.7), d.uniform(2.2, 3.0), d.uniform(2.4, 3.4)
    low = d.uniform(3.6, 4.6)
    s.tube((0, 0, 0), (0, 0, 0.4), body, tint=SHADED)
    s.ball((0, 0, 1.7), (body, body, d.uniform(1.4, 1.9)))
    s.tube((0, 0, 2.5), (0, 0, low + 0.5), 0.3, tint=SHADED)
    s.tube((0, 0, low), (0, 0, low + shade), r, r * d.uniform(0.45, 0.7), caps=(False, False), tint=LIGHT)
    s.ball((0, 0, low + 0.4 * shade), 0.7, tint=2.0)
    _lamp_marks(s, low, low + shade, r)


def _floor_lamp(d: Draws, s: Shape) -> None:
    r, shade, low = d.uniform(1.9, 2.5), d.uniform(2.0, 2.6), d.uniform(8.0, 10.0)
    s.tube((0, 0, 0), (0, 0, 0.5), d.uniform(1.6, 2.2), 1.4, tint=SHADED)
    s.tube((0, 0, 0), (0, 0, low + 0.3), 0.34, tint=SHADED)
    s.tube((0, 0, low), (0, 0, low + shade), r, caps=(False, False), tint=LIGHT)
    s.ball((0, 0, low + 0.5 * shade), 0.7, tint=2.0)
    _lamp_marks(s, low, low + shade, r)


def _desk_lamp(d: Draws, s: Shape) -> None:
    s.tube((0, 0, 0), (0, 0, 0.5), d.uniform(1.5, 2.0), 1.3, tint=SHADED)
    elbow = (-d.uniform(1.2, 2.4), 0, d.uniform(3.2, 4.4))
    head = (d.uniform(1.2, 2.4), 0, d.uniform(5.6, 7.0))
    s.tube((0, 0, 0.4), elbow, 0.26)
    s.tube(elbow, head, 0.26)
    s.ball(elbow, 0.45, tint=SHADED)
    drop = d.uniform(1.6, 2.2)
    s.tube(head, (head[0] + 0.9, 0, head[2] - drop), 0.5, d.uniform(1.5, 1.9), caps=(True, False), tint=LIGHT)
    s.ball((head[0] + 0.6, 0, head[2] - 0.65 * drop), 0.6, tint=2.0)
    _lamp_marks(s, head[2] - drop, head[2], 1.6, head[0])


def _lantern(d: Draws, s: Shape) -> None:
    w, tall = d.uniform(1.5, 2.1), d.uniform(3.6, 5.0)
    s.block((0, 0, 0.3), (2.3 * w, 2.3 * w, 0.6), tint=SHADED)
    for i in (-1, 1):
        for j in (-1, 1):
            s.block((i * w * 0.92, j * w * 0.92, 0.5 + 0.5 * tall), (0.35, 0.35, tall), tint=SHADED)
    s.tube((0, 0, 0.5), (0, 0, 0.6 * tall), 0.75, tint=LIGHT)
    s.ball((0, 0, 0.6 * tall + 0.5), (0.4, 0.4, 0.8), tint=2.0)
    roof = d.uniform(1.2, 2.0)
    s.block((0, 0, 0.5 + tall + 0.5 * roof), (2.5 * w, 2.5 * w, roof), taper=(0.25, 0.25))
    s.ring((0, 0, 0.9 + tall + roof), (1, 0, 0), d.uniform(0.7, 1.0), 0.16, tint=SHADED)
    _lamp_marks(s, 0.6 * tall, 1.4 + tall + roof, w)


def _globe_lamp(d: Draws, s: Shape) -> None:
    r, neck = d.uniform(2.0, 2.7), d.uniform(1.2, 3.4)
    s.tube((0, 0, 0), (0, 0, 0.8), d.uniform(1.4, 1.9), 0.6, tint=SHADED)
    s.tube((0, 0, 0.6), (0, 0, neck + 0.4), 0.45, tint=SHADED)
    s.tube((0, 0, neck), (0, 0, neck + 0.6), 0.8, 1.1, tint=SHADED)
    s.ball((0, 0, neck + 0.3 + r), r, tint=LIGHT)
    _lamp_marks(s, neck + r, neck + 2 * r, r)


def _pendant_lamp(d: Draws, s: Shape) -> None:
    r, cable, tall = d.uniform(2.4, 3.2), d.uniform(3.0, 4.6), d.uniform(1.8, 2.6)
    s.ball((0, 0, 0.7), 0.8, tint=2.0)
    s.ball((0, 0, 0), (r, r, tall), cut=(0.0, 1.0), closed=False, tint=LIGHT)
    s.ring((0, 0, 0.05), (0, 0, 1), r, 0.14, tint=SHADED)
    s.tube((0, 0, tall - 0.1), (0, 0, tall + cable), 0.16, tint=DARK)
    s.tube((0, 0, tall + cable - 0.5), (0, 0, tall + cable), 0.7, 1.2, tint=SHADED)
    _lamp_marks(s, 0.3 * tall, tall + cable, r)


CHAIRS = {
    "four_leg": _four_leg_chair,
    "stool": _stool,
    "armchair": _armchair,
    "swivel": _swivel_chair,
    "rocking": _rocking_chair,
    "ladder_back": _ladder_chair,
}
TABLES = {
    "dining": _dining_table,
    "pedestal": _pedestal_table,
    "trestle": _trestle_table,
    "coffee": _coffee_table,
    "desk": _desk,
    "tripod": _tripod_table,
}
LAMPS = {
    "shade": _shade_lamp,
    "floor": _floor_lamp,
    "desk_arm": _desk_lamp,
    "lantern": _lantern,
    "globe": _globe_lamp,
    "pendant": _pendant_lamp,
}
