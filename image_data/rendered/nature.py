"""Animals and plants. Lengths are arbitrary: ``Shape.finish`` normalises them. Heads point along +x."""

from __future__ import annotations

import math

from image_data.rendered.draws import Draws
from image_data.rendered.shapes import DARK, LIGHT, SHADED, Shape

__all__ = ["ANIMALS", "PLANTS"]


def _animal_legs(s: Shape, front: float, rear: float, y: float, top: float, radius: float, stride: float) -> None:
    """Four legs to z = 0; ``stride`` moves diagonal pairs forward and back."""
    for x, sign in ((front, 1), (rear, -1)):
        for j in (-1, 1):
            foot = x + sign * j * stride
            s.tube((x, j * y, top), (foot, j * y, 0.1), radius, 0.75 * radius, tint=0.8)
            s.ball((foot + 0.15, j * y, 0.15), (1.2 * radius, radius, 0.25), tint=SHADED)


def _dog(d: Draws, s: Shape) -> None:
    length, leg, r = d.uniform(1.9, 2.6), d.uniform(1.6, 2.4), d.uniform(0.75, 1.0)
    back = leg + 0.4
    s.ball((0, 0, back), (length, r, r))
    _animal_legs(s, 0.7 * length, -0.7 * length, 0.6 * r, back, 0.28, d.uniform(-0.5, 0.5))
    x, z = length + d.uniform(0.3, 0.7), back + d.uniform(1.0, 1.5)
    s.tube((0.75 * length, 0, back + 0.2), (x, 0, z), 0.55, 0.45)
    s.ball((x, 0, z), (0.75, 0.62, 0.65))
    snout = d.uniform(0.7, 1.1)
    s.tube((x + 0.3, 0, z - 0.12), (x + 0.5 + snout, 0, z - 0.2), 0.42, 0.28, tint=0.85)
    s.ball((x + 0.55 + snout, 0, z - 0.12), 0.18, tint=DARK)
    for j in (-1, 1):
        s.ball((x - 0.15, j * 0.55, z + 0.45), (0.25, 0.14, 0.6), euler=(-25 * j, -20, 0), tint=SHADED)
        s.ball((x + 0.55, j * 0.35, z + 0.25), 0.13, tint=DARK)
    tail = (-length - d.uniform(0.7, 1.3), 0, back + d.uniform(0.4, 1.6))
    s.tube((-0.9 * length, 0, back + 0.2), tail, 0.22, 0.1)
    s.mark((x + 0.5 + snout, 0, z), tail, (0.7 * length, 0.6 * r, 0.2), (0.7 * length, -0.6 * r, 0.2), (x, 0, z + 0.6))


def _giraffe(d: Draws, s: Shape) -> None:
    length, leg, neck = d.uniform(1.6, 2.0), d.uniform(2.8, 3.6), d.uniform(3.2, 4.2)
    s.ball((0, 0, leg + 0.4), (length, 0.95, 1.05), euler=(0, -12, 0))
    _animal_legs(s, 0.7 * length, -0.7 * length, 0.5, leg + 0.3, 0.32, d.uniform(-0.5, 0.5))
    x, z = 0.8 * length + d.uniform(0.8, 1.6), leg + neck
    s.tube((0.65 * length, 0, leg + 0.5), (x, 0, z), 0.7, 0.4)
    s.ball((x + 0.35, 0, z + 0.1), (0.95, 0.46, 0.5), euler=(0, 20, 0))
    for j in (-1, 1):
        s.tube((x, j * 0.2, z + 0.3), (x - 0.1, j * 0.25, z + 0.95), 0.1, tint=SHADED)
        s.ball((x - 0.1, j * 0.55, z + 0.3), (0.14, 0.35, 0.14), tint=SHADED)
    tail = (-length - 0.3, 0, leg - 0.9)
    s.tube((-0.95 * length, 0, leg + 0.5), tail, 0.1, tint=SHADED)
    s.mark((x + 1.1, 0, z), tail, (0.7 * length, 0.45, 0.2), (0.7 * length, -0.45, 0.2), (x, 0, z + 0.4))


def _bird(d: Draws, s: Shape) -> None:
    length, r, leg = d.uniform(1.5, 1.9), d.uniform(0.95, 1.2), d.uniform(1.2, 2.2)
    z = leg + r
    s.ball((0, 0, z), (length, r, r), euler=(0, -d.uniform(15, 35), 0))
    head = (0.95 * length, 0, z + r * d.uniform(0.95, 1.2))
    s.ball(head, 0.68, tint=LIGHT)
    beak = d.uniform(0.7, 1.4)
    s.tube((head[0] + 0.5, 0, head[2]), (head[0] + 0.55 + beak, 0, head[2] - 0.15), 0.28, 0.03, tint=DARK)
    spread = d.uniform(0.5, 1.0)
    for j in (-1, 1):
        s.ball((-0.35, j * (r - 0.1), z + 0.1), (1.3, 0.25, 0.75), euler=(20 * j, -30 * spread, -15 * j), tint=SHADED)
        s.tube((0.1, 0.4 * j, z - 0.6 * r), (0.25, 0.4 * j, 0.05), 0.13, tint=DARK)
        s.block((0.5, 0.4 * j, 0.08), (0.9, 0.5, 0.14), taper=(0.9, 0.9), tint=DARK)
        s.ball((head[0] + 0.4, 0.42 * j, head[2] + 0.2), 0.14, tint=DARK)
    tail = (-length - d.uniform(0.9, 1.5), 0, z - 0.9)
    s.plate((-0.8 * length, 0, z - 0.4), tail, (0, 0.8, 0), 0.2, 1.5, SHADED)
    s.mark((head[0] + 0.5 + beak, 0, head[2]), tail, (0.4, 0.4, 0.1), (0.4, -0.4, 0.1), (head[0], 0, head[2] + 0.6))


def _turtle(d: Draws, s: Shape) -> None:
    length, wide, tall = d.uniform(2.1, 2.6), d.uniform(1.7, 2.1), d.uniform(1.1, 1.6)
    s.ball((0, 0, 0.7), (length, wide, tall), cut=(0.0, 1.0), tint=SHADED)
    s.ball((0, 0, 0.72), (1.06 * length, 1.06 * wide, 0.42))
    reach = d.uniform(0.8, 1.3)
    s.tube((0.8 * length, 0, 0.7), (length + reach, 0, 1.1), 0.42, 0.38, tint=LIGHT)
    s.ball((length + reach, 0, 1.15), (0.62, 0.5, 0.5), tint=LIGHT)
    for j in (-1, 1):
        s.ball((length + reach + 0.35, 0.35 * j, 1.3), 0.13, tint=DARK)
        for i, turn in ((0.7, 35), (-0.7, -30)):
            s.ball((i * length, j * wide * 0.95, 0.4), (0.8, 0.5, 0.3), euler=(-10 * j, 0, j * turn), tint=LIGHT)
    tail = (-1.35 * length, 0, 0.4)
    s.tube((-0.9 * length, 0, 0.6), tail, 0.3, 0.05, tint=LIGHT)
    left, right = (0.8 * length, wide, 0.4), (0.8 * length, -wide, 0.4)
    s.mark((length + reach + 0.5, 0, 1.1), tail, left, right, (0, 0, 0.7 + tall))


def _fish(d: Draws, s: Shape) -> None:
    length, r, flat = d.uniform(2.2, 2.8), d.uniform(1.1, 1.5), d.uniform(0.5, 0.7)
    s.ball((0, 0, 0), (length, flat, r))
    fork = d.uniform(1.1, 1.6)
    for k in (-1, 1):
        s.plate((-0.85 * length, 0, 0.1 * k), (-length - 1.3, 0, k * fork), (1.1, 0, 0), 0.2, 0.6, SHADED)
    top = r + d.uniform(0.6, 1.1)
    s.plate((0.0, 0, 0.8 * r), (-0.7, 0, top), (d.uniform(1.6, 2.2), 0, 0), 0.16, 0.5, SHADED)
    s.plate((-0.4, 0, -0.8 * r), (-1.0, 0, -r - 0.5), (1.0, 0, 0), 0.14, 0.5, SHADED)
    for j in (-1, 1):
        s.ball((0.72 * length, 0.62 * j * flat, 0.3 * r), 0.24, tint=1.8)
        s.ball((0.76 * length, 0.72 * j * flat, 0.3 * r), 0.16, tint=DARK)
        s.plate((0.25 * length, j * 0.9 * flat, -0.2), (-0.2, j * (flat + 0.9), -0.6), (0.8, 0, 0.2), 0.12, 0.6, SHADED)
    s.mark((length, 0, 0), (-length - 1.3, 0, 0), (0, flat, 0), (0, -flat, 0), (-0.7, 0, top))


def _elephant(d: Draws, s: Shape) -> None:
    length, leg, r = d.uniform(1.9, 2.3), d.uniform(1.5, 2.0), d.uniform(1.3, 1.55)
    z = leg + 0.7 * r
    s.ball((0, 0, z), (length, r, r))
    _animal_legs(s, 0.6 * length, -0.6 * length, 0.55 * r, z, 0.52, d.uniform(-0.3, 0.3))
    x, top = length + 0.3, z + d.uniform(0.5, 0.9)
    s.ball((x, 0, top), (0.95, 0.85, 1.0))
    knee = (x + d.uniform(0.9, 1.2), 0, top - 1.3)
    tip = (knee[0] + d.uniform(0.0, 0.8), 0, d.uniform(0.5, 1.2))
    s.tube((x + 0.5, 0, top - 0.2), knee, 0.45, 0.33)
    s.tube(knee, tip, 0.33, 0.2)
    s.ball(knee, 0.33)
    for j in (-1, 1):
        s.ball((x - 0.35, j * 1.05, top + 0.1), (0.25, 0.8, 1.0), euler=(0, 0, 35 * j), tint=SHADED)
        s.tube((x + 0.5, 0.4 * j, top - 0.5), (x + 1.6, 0.55 * j, top - 0.75), 0.15, 0.04, tint=2.0)
        s.ball((x + 0.75, 0.45 * j, top + 0.3), 0.12, tint=DARK)
    tail = (-length - 0.4, 0, z - 1.2)
    s.tube((-0.95 * length, 0, z + 0.2), tail, 0.12, tint=SHADED)
    s.mark(tip, tail, (0.6 * length, 0.55 * r, 0.2), (0.6 * length, -0.55 * r, 0.2), (x, 0, top + 1.0))


def _plant_marks(s: Shape, middle: float, top: float, reach: float) -> None:
    """Landmarks of a plant: foot, top, middle, left and right of the middle."""
    s.mark((0, 0, 0), (0, 0, top), (0, 0, middle), (0, reach, middle), (0, -reach, middle))


def _pine(d: Draws, s: Shape) -> None:
    r, trunk, tall = d.uniform(2.0, 2.6), d.uniform(1.0, 1.6), d.uniform(6.0, 7.4)
    s.tube((0, 0, 0), (0, 0, trunk + 0.5), 0.4, tint=SHADED)
    layers = d.integer(3, 4)
    for k in range(layers):
        f = k / layers
        low, high = trunk + f * tall, trunk + min(f + 1.7 / layers, 1.0) * tall
        s.tube((0, 0, low), (0, 0, high), r * (1 - 0.72 * f), 0.05, tint=1.0 + 0.12 * (k % 2))
    _plant_marks(s, trunk + 0.2 * tall, trunk + tall, 0.7 * r)


def _broadleaf(d: Draws, s: Shape) -> None:
    trunk, r = d.uniform(2.2, 3.2), d.uniform(1.6, 2.0)
    s.tube((0, 0, 0), (0, 0, trunk + 1.0), 0.5, 0.35, tint=SHADED)
    s.ball((0, 0, trunk + r), (r, r, 0.95 * r))
    blobs, turn = d.integer(4, 5), d.uniform(0, 6)
    for k in range(blobs):
        a = turn + 2 * math.pi * k / blobs
        size = r * d.uniform(0.55, 0.8)
        s.ball((0.85 * r * math.cos(a), 0.85 * r * math.sin(a), trunk + 0.65 * r + d.uniform(-0.2, 0.6)), size,
               tint=d.uniform(0.8, 1.15))  # fmt: skip
    s.ball((d.uniform(-0.4, 0.4), d.uniform(-0.4, 0.4), trunk + 1.8 * r), 0.65 * r, tint=1.15)
    _plant_marks(s, trunk + r, trunk + 2.3 * r, 1.4 * r)


def _palm(d: Draws, s: Shape) -> None:
    tall, bend, segments = d.uniform(5.4, 6.8), d.uniform(-1.0, 1.0), 4
    for k in range(segments):
        a, b = k / segments, (k + 1) / segments
        s.tube((0, bend * a * a, tall * a), (0, bend * b * b, tall * b), 0.42 - 0.12 * a, 0.34 - 0.1 * a, tint=SHADED)
    fronds, reach, turn = d.integer(6, 7), d.uniform(2.4, 3.0), d.uniform(0, 1)
    for k in range(fronds):
        a = turn + 2 * math.pi * k / fronds
        c, e = math.cos(a), math.sin(a)
        knee = (0.55 * reach * c, bend + 0.55 * reach * e, tall + 0.65)
        tip = (reach * c, bend + reach * e, tall - d.uniform(0.3, 0.9))
        s.plate((0, bend, tall), knee, (-0.9 * e, 0.9 * c, 0), 0.14, 1.2)
        s.plate(knee, tip, (-1.08 * e, 1.08 * c, 0), 0.14, 0.2, 0.85)
    for k in range(3):
        s.ball((0.4 * math.cos(2.1 * k), bend + 0.4 * math.sin(2.1 * k), tall - 0.2), 0.3, tint=DARK)
    left, right = (0, bend + 0.9 * reach, tall), (0, bend - 0.9 * reach, tall)
    s.mark((0, 0, 0), (0, bend, tall + 0.2), (0, 0.25 * bend, 0.5 * tall), left, right)


def _cactus(d: Draws, s: Shape) -> None:
    r, tall, pot = d.uniform(0.75, 1.0), d.uniform(4.6, 6.0), d.uniform(1.2, 1.6)
    s.tube((0, 0, 0), (0, 0, pot), 1.1, 1.5, tint=SHADED)
    s.tube((0, 0, pot), (0, 0, pot + tall - r), r, 0.9 * r)
    s.ball((0, 0, pot + tall - r), (0.9 * r, 0.9 * r, r))
    for j in (-1, 1):
        z, out, up = pot + tall * d.uniform(0.3, 0.5), r + d.uniform(0.8, 1.1), d.uniform(1.2, 2.2)
        s.tube((0, 0, z), (0, j * out, z), 0.45)
        s.ball((0, j * out, z), 0.45)
        s.tube((0, j * out, z), (0, j * out, z + up), 0.45, 0.4)
        s.ball((0, j * out, z + up), 0.4)
    s.ball((0, 0, pot + tall), 0.4, tint=2.0)
    _plant_marks(s, pot + 0.4 * tall, pot + tall, r)


def _flower(d: Draws, s: Shape) -> None:
    pot, stem, tilt = d.uniform(1.4, 1.8), d.uniform(3.0, 4.2), d.uniform(0.5, 1.1)
    s.tube((0, 0, 0), (0, 0, pot), 0.9, 1.3, tint=SHADED)
    z = pot + stem
    s.tube((0, 0, pot - 0.1), (0, 0, z), 0.17, tint=0.7)
    petals, r = d.integer(6, 8), d.uniform(1.1, 1.4)
    c, e = math.cos(tilt), math.sin(tilt)  # the flower's axis is (e, 0, c)
    for k in range(petals):
        u, v = math.cos(2 * math.pi * k / petals), math.sin(2 * math.pi * k / petals)
        tip = (1.7 * r * c * u, 1.7 * r * v, z - 1.7 * r * e * u)
        wide = 4.4 * r / petals
        s.plate((0, 0, z), tip, (-wide * c * v, wide * u, wide * e * v), 0.16, 1.25, (LIGHT, 1.15)[k % 2])
    s.ball((0.12 * e, 0, z + 0.12 * c), (0.62 * r, 0.62 * r, 0.4), euler=(0, math.degrees(tilt), 0), tint=DARK)
    for j in (-1, 1):
        s.ball((0, 0.75 * j, pot + d.uniform(0.25, 0.5) * stem), (0.35, 0.85, 0.12), euler=(25 * j, 0, 0), tint=0.7)
    _plant_marks(s, pot + 0.5 * stem, z, 0.8)


def _mushroom(d: Draws, s: Shape) -> None:
    r, stem, cap = d.uniform(2.2, 2.8), d.uniform(2.2, 3.2), d.uniform(1.2, 1.8)
    s.tube((0, 0, 0), (0, 0, stem + 0.2), d.uniform(0.75, 1.0), 0.6, tint=LIGHT)
    s.ball((0, 0, stem), (r, r, cap), cut=(0.0, 1.0))
    s.ring((0, 0, 0.65 * stem), (0, 0, 1), 0.85, 0.2, tint=LIGHT)
    turn = d.uniform(0, 6)
    for k in range(7):
        a, h = turn + 2.4 * k, 0.2 + 0.75 * k / 7
        w = math.sqrt(1 - h * h)
        s.ball((r * w * math.cos(a), r * w * math.sin(a), stem + cap * h), d.uniform(0.16, 0.26), tint=1.9)
    _plant_marks(s, 0.5 * stem, stem + cap, 0.7)


ANIMALS = {
    "dog": _dog,
    "giraffe": _giraffe,
    "bird": _bird,
    "turtle": _turtle,
    "fish": _fish,
    "elephant": _elephant,
}
PLANTS = {
    "pine": _pine,
    "broadleaf": _broadleaf,
    "palm": _palm,
    "cactus": _cactus,
    "flower": _flower,
    "mushroom": _mushroom,
}
