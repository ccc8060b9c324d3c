"""Airplanes, boats and cars. Lengths are arbitrary: ``Shape.finish`` normalises them. Noses point along +x."""

from __future__ import annotations

from image_data.rendered.draws import Draws
from image_data.rendered.shapes import DARK, LIGHT, SHADED, Shape

__all__ = ["AIRPLANES", "BOATS", "CARS"]


def _wings(
    s: Shape, x: float, z: float, span: float, chord: float, thick: float, *, sweep: float = 0.0,
    taper: float = 0.6, rise: float = 0.0, tint: float = 1.0,
) -> None:  # fmt: skip
    """A left and a right wing from the axis; ``sweep`` moves the tips backwards."""
    for j in (-1, 1):
        s.plate((x, 0, z), (x - sweep, j * span, z + rise), (chord, 0, 0), thick, taper, tint)


def _fuselage(s: Shape, length: float, r: float, tail: float = 0.4) -> None:
    """A tube with a round nose (at +length) and a cone to the tail (at -length)."""
    s.tube((-0.2 * length, 0, 0), (0.75 * length, 0, 0), r)
    s.ball((0.75 * length, 0, 0), (0.25 * length, r, r))
    s.tube((-0.2 * length, 0, 0), (-length, 0, 0.3 * r), r, tail * r)


def _plane_marks(s: Shape, length: float, span: float, x: float, z: float, fin: float) -> None:
    """Landmarks of an airplane: nose, tail, left tip, right tip, top of the fin."""
    s.mark((length, 0, 0), (-length, 0, 0), (x, span, z), (x, -span, z), (-length, 0, fin))


def _airliner(d: Draws, s: Shape) -> None:
    length, r, span = d.uniform(4.2, 5.0), d.uniform(0.7, 0.88), d.uniform(3.9, 4.6)
    sweep, fin = d.uniform(1.4, 2.2), d.uniform(1.8, 2.3)
    _fuselage(s, length, r)
    _wings(s, 0.3, -0.3 * r, span, 2.1, 0.32, sweep=sweep, taper=0.35, rise=0.4, tint=0.8)
    _wings(s, -0.85 * length, 0.2, 1.7, 1.1, 0.22, sweep=0.7, taper=0.5)
    s.plate((-0.82 * length, 0, 0), (-length, 0, fin), (1.6, 0, 0), 0.24, 0.5, SHADED)
    engines = (0.35,) if d.uniform() < 0.6 else (0.3, 0.58)
    for j in (-1, 1):
        for f in engines:
            x = 0.9 - sweep * f
            s.tube((x - 0.7, j * f * span, -0.75), (x + 0.7, j * f * span, -0.75), 0.34, 0.42, tint=LIGHT)
    _plane_marks(s, length, span, 0.3 - sweep, 0.4 - 0.3 * r, fin)


def _biplane(d: Draws, s: Shape) -> None:
    length, r, span = d.uniform(3.0, 3.6), d.uniform(0.6, 0.75), d.uniform(3.4, 4.2)
    gap, fin, chord = d.uniform(1.7, 2.2), d.uniform(1.3, 1.7), d.uniform(1.2, 1.6)
    s.tube((0.3 * length, 0, 0), (0.9 * length, 0, 0), r, 0.85 * r)
    s.tube((0.3 * length, 0, 0), (-length, 0, 0.2), r, 0.25 * r)
    s.ball((0.92 * length, 0, 0), 0.3, tint=LIGHT)
    s.block((0.97 * length, 0, 0), (0.1, 0.3, d.uniform(2.2, 2.8)), euler=(d.uniform(0, 180), 0, 0), tint=DARK)
    for z in (-0.5 * gap + 0.3, 0.5 * gap + 0.3):
        s.block((0.45 * length, 0, z), (chord, 2 * span, 0.22))
    for j in (-1, 1):
        for x in (0.3, 0.6):
            start, end = (x * length, 0.75 * j * span, 0.3 - 0.5 * gap), (x * length, 0.75 * j * span, 0.3 + 0.5 * gap)
            s.tube(start, end, 0.1, tint=SHADED)
        s.tube((0.5 * length, 0.8 * j - 0.15, -1.4), (0.5 * length, 0.8 * j + 0.15, -1.4), 0.45, tint=DARK)
        s.tube((0.45 * length, 0.3 * j, -0.4), (0.5 * length, 0.8 * j, -1.4), 0.1, tint=SHADED)
    _wings(s, -0.85 * length, 0.2, 1.3, 0.9, 0.18)
    s.plate((-0.85 * length, 0, 0), (-length, 0, fin), (1.1, 0, 0), 0.18, 0.6, SHADED)
    _plane_marks(s, length, span, 0.45 * length, 0.5 * gap + 0.3, fin)


def _delta_jet(d: Draws, s: Shape) -> None:
    length, r, span = d.uniform(3.8, 4.4), d.uniform(0.6, 0.75), d.uniform(3.0, 3.7)
    fin = d.uniform(1.6, 2.1)
    s.tube((-0.9 * length, 0, 0), (0.45 * length, 0, 0), r * 0.9, r)
    s.tube((0.45 * length, 0, 0), (length, 0, -0.1), r, 0.05)
    for j in (-1, 1):
        s.plate((-1.4, 0, -0.1), (-3.2, j * span, -0.1), (d.uniform(5.0, 6.0), 0, 0), 0.28, 0.12, 0.8)
        s.plate((-0.75 * length, j * 0.5, 0.2), (-length, j * 1.0, fin), (1.7, 0, 0), 0.16, 0.45, SHADED)
        s.soft((-0.6, j * 0.75 * r - j * 0.05, -0.15), (3.2, 0.7, 0.7), 0.2, tint=SHADED)
    s.ball((0.4 * length, 0, 0.75 * r), (1.1, 0.35, 0.4), tint=DARK)
    _plane_marks(s, length, span, -3.2, -0.1, fin)


def _glider(d: Draws, s: Shape) -> None:
    length, span = d.uniform(2.8, 3.3), d.uniform(3.7, 4.4)
    fin = d.uniform(1.5, 1.9)
    s.ball((0.55 * length, 0, 0), (0.5 * length, 0.68, 0.75))
    s.tube((0.5 * length, 0, 0), (-length, 0, 0.3), 0.62, 0.22)
    s.ball((0.75 * length, 0, 0.25), (0.8, 0.5, 0.55), tint=DARK)
    _wings(s, 0.45 * length, 0.45, span, d.uniform(1.3, 1.6), 0.3, sweep=0.2, taper=0.45, rise=d.uniform(0.2, 0.8))
    s.plate((-0.92 * length, 0, 0), (-length, 0, fin), (1.0, 0, 0), 0.2, 0.8, SHADED)
    _wings(s, -length, fin, 1.5, 0.85, 0.18, taper=0.7)
    _plane_marks(s, length, span, 0.4 * length, 0.9, fin)


def _helicopter(d: Draws, s: Shape) -> None:
    length, r, span = d.uniform(3.2, 3.8), d.uniform(1.3, 1.6), d.uniform(2.9, 3.4)
    s.ball((0.3 * length, 0, 0), (0.42 * length, r, r))
    s.ball((0.48 * length, 0, 0.15), (0.27 * length, 0.85 * r, 0.85 * r), tint=DARK)
    s.tube((0, 0, 0.3), (-length, 0, 0.7), 0.55 * r, 0.2)
    s.plate((-0.92 * length, 0, 0.6), (-length, 0, 1.9), (0.9, 0, 0), 0.16, 0.6, SHADED)
    s.tube((-length, 0.25, 0.9), (-length, 0.35, 0.9), 0.75, tint=LIGHT)
    s.tube((0.3 * length, 0, r - 0.1), (0.3 * length, 0, r + 0.6), 0.28, tint=SHADED)
    turn = d.uniform(0, 90)
    for k in range(2):
        s.block((0.3 * length, 0, r + 0.6), (2 * span, 0.36, 0.12), euler=(0, 0, turn + 90 * k), tint=SHADED)
    for j in (-1, 1):
        s.tube((-0.1 * length, j * r, -r - 0.5), (0.75 * length, j * r, -r - 0.5), 0.13, tint=SHADED)
        for x in (0.12, 0.5):
            s.tube((x * length, 0.5 * j * r, -0.7 * r), (x * length, j * r, -r - 0.5), 0.12, tint=SHADED)
    s.mark((0.72 * length, 0, 0), (-length, 0, 0.7), (0.3 * length, r, 0), (0.3 * length, -r, 0), (-length, 0, 1.9))


def _seaplane(d: Draws, s: Shape) -> None:
    length, r, span = d.uniform(3.4, 4.0), d.uniform(0.6, 0.75), d.uniform(3.8, 4.6)
    fin, low = d.uniform(1.5, 1.9), -d.uniform(1.7, 2.1)
    _fuselage(s, length, r, 0.3)
    _wings(s, 0.35 * length, 0.8 * r, span, 1.5, 0.28, taper=0.8)
    _wings(s, -0.85 * length, 0.3, 1.5, 1.0, 0.2)
    s.plate((-0.82 * length, 0, 0), (-length, 0, fin), (1.3, 0, 0), 0.2, 0.6, SHADED)
    s.block((1.02 * length, 0, 0), (0.1, 0.28, 2.2), euler=(d.uniform(0, 180), 0, 0), tint=DARK)
    for j in (-1, 1):
        b = j * d.uniform(1.2, 1.4)
        s.ball((0.3 * length, b, low), (0.62 * length, 0.38, 0.42), tint=LIGHT)
        for x in (0.15, 0.5):
            s.tube((x * length, 0.3 * j, -0.3), (x * length, b, low), 0.11, tint=SHADED)
    _plane_marks(s, length, span, 0.35 * length, 0.8 * r, fin)


def _hull(s: Shape, length: float, beam: float, depth: float, *, bow: float = 0.35, tint: float = 1.0) -> None:
    """A solid hull with its deck at z = 0: a box narrowing to the keel and a wedge for the bow (at +length)."""
    start = length * (1 - 2 * bow)
    middle = 0.5 * (start - length)
    s.block(
        (middle, 0, -0.5 * depth), (length + start, 2 * beam, depth), taper=(0.9, 0.7), euler=(180, 0, 0), tint=tint
    )
    # the bow lies on its side: its local z is the boat's x, so that its width tapers to the stem
    s.block((0.5 * (start + length), 0, -0.5 * depth), (depth, 2 * beam, length - start),
            taper=(0.55, 0.05), shift=(-0.225 * depth, 0), euler=(0, 90, 0), tint=tint)  # fmt: skip


def _boat_marks(s: Shape, length: float, beam: float, top: tuple[float, float]) -> None:
    """Landmarks of a boat: bow, stern, left side, right side, highest point (x, z)."""
    s.mark((length, 0, 0), (-length, 0, 0), (0, beam, 0), (0, -beam, 0), (top[0], 0, top[1]))


def _sailboat(d: Draws, s: Shape) -> None:
    length, beam, mast = d.uniform(3.4, 4.2), d.uniform(0.95, 1.25), d.uniform(6.5, 8.0)
    _hull(s, length, beam, d.uniform(0.9, 1.2), tint=SHADED)
    s.soft((-0.3 * length, 0, 0.2), (1.8, 1.2 * beam, 0.6), 0.2)
    foot, swing = 0.2 * length, d.uniform(-0.9, 0.9)
    s.tube((foot, 0, 0), (foot, 0, mast), 0.15, tint=DARK)
    s.plate((foot - 1.9, 0.5 * swing, 0.8), (foot - 0.1, 0, 0.98 * mast), (3.6, -swing, 0), 0.12, 0.04, LIGHT)
    s.plate((foot + 1.2, 0, 0.4), (foot + 0.25, 0, 0.85 * mast), (2.0, 0.3, 0), 0.1, 0.04, LIGHT)
    _boat_marks(s, length, beam, (foot, mast))


def _cargo_ship(d: Draws, s: Shape) -> None:
    length, beam, depth = d.uniform(5.4, 6.2), d.uniform(1.0, 1.25), d.uniform(1.2, 1.5)
    _hull(s, length, beam, depth, bow=0.15, tint=SHADED)
    rows = 4
    for k in range(rows):
        tall = 0.55 * d.integer(1, 3)
        tint = d.choice((1.0, LIGHT, 0.75, 1.2))
        s.block((-0.38 * length + 1.75 * k, 0, 0.5 * tall), (1.6, 1.8 * beam, tall), tint=tint)
    top = d.uniform(2.2, 2.8)
    s.block((-0.82 * length, 0, 0.5 * top), (1.1, 1.7 * beam, top), tint=LIGHT)
    s.block((-0.8 * length, 0, 0.85 * top), (1.3, 2.1 * beam, 0.4), tint=DARK)
    s.tube((-0.9 * length, 0, top), (-0.9 * length, 0, top + 0.8), 0.32, tint=DARK)
    _boat_marks(s, length, beam, (-0.9 * length, top + 0.8))


def _catamaran(d: Draws, s: Shape) -> None:
    length, beam, mast = d.uniform(3.2, 3.8), d.uniform(1.7, 2.1), d.uniform(5.6, 7.0)
    for j in (-1, 1):
        s.ball((0, j * beam, -0.35), (length, 0.46, 0.55), tint=SHADED)
    s.block((-0.2 * length, 0, 0.1), (2.8, 2 * beam, 0.2))
    s.tube((0.45 * length, beam, 0), (0.45 * length, -beam, 0), 0.14, tint=DARK)
    s.soft((-0.2 * length, 0, 0.6), (2.0, 1.5 * beam, 0.9), 0.4, tint=LIGHT)
    s.tube((0.1 * length, 0, 0), (0.1 * length, 0, mast), 0.14, tint=DARK)
    s.plate((0.1 * length - 1.6, 0.2, 1.4), (0.1 * length - 0.6, 0, mast), (3.0, -0.6, 0), 0.12, 0.3, LIGHT)
    _boat_marks(s, length, beam, (0.1 * length, mast))


def _rowboat(d: Draws, s: Shape) -> None:
    length, beam, depth = d.uniform(2.7, 3.2), d.uniform(1.35, 1.7), d.uniform(1.2, 1.5)
    s.ball((0, 0, 0), (length, beam, depth), cut=(-1.0, 0.0), closed=False)
    s.ring((0, 0, 0), (0, 0, 1), length, 0.12, stretch=beam / length, tint=LIGHT)
    for f in (-0.45, 0.05, 0.5):
        wide = 1.8 * beam * (1 - f * f) ** 0.5
        s.block((f * length, 0, -0.25), (0.55, wide, 0.15), tint=SHADED)
    reach = d.uniform(1.3, 1.8)
    for j in (-1, 1):
        inner, blade = (0.3, 0.45 * j * beam, 0.35), (-0.9, j * (beam + reach), -0.6)
        s.tube(inner, blade, 0.11, tint=LIGHT)
        s.ball(blade, (0.25, 0.8, 0.14), euler=(-18 * j, 0, 20 * j), tint=LIGHT)
    _boat_marks(s, length, beam, (0.0, 0.0))


def _submarine(d: Draws, s: Shape) -> None:
    length, r, tower = d.uniform(4.4, 5.2), d.uniform(0.8, 1.05), d.uniform(1.0, 1.5)
    s.tube((-0.4 * length, 0, 0), (0.6 * length, 0, 0), r)
    s.ball((0.6 * length, 0, 0), (0.4 * length, r, r))
    s.tube((-0.4 * length, 0, 0), (-length, 0, 0), r, 0.15)
    x = d.uniform(0.1, 0.35) * length
    s.soft((x, 0, r + 0.4 * tower), (1.9, 0.65, 1.2 * tower), 0.3, tint=SHADED)
    s.tube((x + 0.3, 0, r + 0.8 * tower), (x + 0.3, 0, r + tower + 1.0), 0.1, tint=DARK)
    _wings(s, x, r + 0.5 * tower, 1.1, 0.7, 0.15, tint=SHADED)
    _wings(s, -0.85 * length, 0, 1.3, 0.8, 0.16, tint=SHADED)
    for z in (-1.3, 1.3):
        s.plate((-0.85 * length, 0, 0), (-0.9 * length, 0, z), (0.8, 0, 0), 0.16, 0.6, SHADED)
    s.ring((-length, 0, 0), (1, 0, 0), 0.55, 0.12, tint=LIGHT)
    _boat_marks(s, length, r, (x + 0.3, r + tower + 1.0))


def _steamer(d: Draws, s: Shape) -> None:
    length, beam = d.uniform(4.2, 5.0), d.uniform(1.0, 1.3)
    _hull(s, length, beam, d.uniform(1.1, 1.4), bow=0.22, tint=SHADED)
    z, x = 0.0, -0.1 * length
    for k in range(2):
        tall = d.uniform(0.55, 0.75)
        s.block((x, 0, z + 0.5 * tall), (length * (1.15 - 0.3 * k), beam * (1.7 - 0.3 * k), tall), tint=LIGHT)
        z += tall
    funnels, tall = d.integer(2, 3), d.uniform(1.6, 2.2)
    for k in range(funnels):
        f = x + (k - 0.5 * (funnels - 1)) * 1.15
        s.tube((f, 0, z), (f - 0.3, 0, z + tall), 0.4, tint=1.0)
        s.tube((f - 0.22, 0, z + 0.75 * tall), (f - 0.31, 0, z + tall + 0.05), 0.43, tint=DARK)
    s.tube((0.7 * length, 0, 0), (0.68 * length, 0, 3.2), 0.09, tint=DARK)
    _boat_marks(s, length, beam, (x, z + tall))


def _wheels(
    s: Shape, front: float, rear: float, y: float, radius: float, width: float, rear_radius: float = 0.0
) -> None:
    """Four wheels that stand on z = 0."""
    for x, r in ((front, radius), (rear, rear_radius or radius)):
        for j in (-1, 1):
            s.tube((x, j * (y - width), r), (x, j * y, r), r, tint=DARK)
            s.tube((x, j * y, r), (x, j * (y + 0.05), r), 0.5 * r, tint=LIGHT)


def _car_marks(s: Shape, front: float, rear: float, y: float, r: float, top: tuple[float, float]) -> None:
    """Landmarks of a car: front left, front right, rear left and rear right hub, top of the roof (x, z)."""
    s.mark((front, y, r), (front, -y, r), (rear, y, r), (rear, -y, r), (top[0], 0, top[1]))


def _sedan(d: Draws, s: Shape) -> None:
    length, y, r = d.uniform(3.8, 4.5), d.uniform(1.55, 1.8), d.uniform(0.65, 0.78)
    tall, cabin = d.uniform(1.0, 1.2), d.uniform(1.0, 1.25)
    low = 0.55
    s.soft((0, 0, low + 0.5 * tall), (2 * length, 2 * y, tall), 0.3)
    s.block((-0.4, 0, low + tall + 0.5 * cabin - 0.1), (4.6, 1.85 * y, cabin), taper=(0.58, 0.8), tint=DARK)
    s.block((-0.4, 0, low + tall + cabin - 0.1), (2.6, 1.5 * y, 0.14))
    for j in (-1, 1):
        s.ball((length - 0.1, j * 0.7 * y, low + 0.6 * tall), 0.25, tint=2.0)
    _wheels(s, 0.6 * length, -0.6 * length, y, r, 0.5)
    _car_marks(s, 0.6 * length, -0.6 * length, y, r, (-0.4, low + tall + cabin))


def _pickup(d: Draws, s: Shape) -> None:
    length, y, r = d.uniform(4.0, 4.6), d.uniform(1.6, 1.8), d.uniform(0.8, 0.95)
    low, tall, cabin = 0.8, d.uniform(0.9, 1.1), d.uniform(1.1, 1.4)
    s.block((0, 0, low + 0.2), (2 * length, 1.9 * y, 0.4))
    s.soft((0.72 * length, 0, low + 0.5 * tall), (0.56 * length, 2 * y, tall), 0.2)
    s.block((0.12 * length, 0, low + 0.5 * tall), (0.7 * length, 2 * y, tall))
    s.block((0.1 * length, 0, low + tall + 0.5 * cabin), (2.6, 1.85 * y, cabin), (0.7, 0.85), (-0.2, 0), tint=DARK)
    s.block((0.1 * length - 0.2, 0, low + tall + cabin), (1.9, 1.6 * y, 0.14))
    for j in (-1, 1):
        s.block((-0.6 * length, j * (y - 0.12), low + 0.5 * tall), (0.8 * length, 0.24, tall))
    s.block((-length + 0.12, 0, low + 0.5 * tall), (0.24, 2 * y, tall))
    _wheels(s, 0.62 * length, -0.6 * length, y, r, 0.55)
    _car_marks(s, 0.62 * length, -0.6 * length, y, r, (0, low + tall + cabin))


def _van(d: Draws, s: Shape) -> None:
    length, y, r = d.uniform(3.4, 4.0), d.uniform(1.6, 1.8), d.uniform(0.68, 0.8)
    low, tall = 0.5, d.uniform(2.9, 3.5)
    s.soft((-0.2, 0, low + 0.5 * tall), (2 * length - 0.4, 2 * y, tall), 0.4)
    s.soft((0.8 * length, 0, low + 0.25 * tall), (0.7 * length, 1.95 * y, 0.5 * tall), 0.35)
    s.block((length - 0.36, 0, low + 0.72 * tall), (0.16, 1.7 * y, 0.36 * tall), tint=DARK)
    for j in (-1, 1):
        for k in range(d.integer(2, 3)):
            s.block((0.55 * length - 1.6 * k, j * y, low + 0.7 * tall), (1.2, 0.06, 0.3 * tall), tint=DARK)
        s.ball((1.12 * length, j * 0.65 * y, low + 0.3 * tall), 0.24, tint=2.0)
    _wheels(s, 0.65 * length, -0.62 * length, y, r, 0.5)
    _car_marks(s, 0.65 * length, -0.62 * length, y, r, (-0.2, low + tall))


def _truck(d: Draws, s: Shape) -> None:
    length, y, r = d.uniform(4.8, 5.6), d.uniform(1.45, 1.65), d.uniform(0.7, 0.82)
    cab, box = d.uniform(2.6, 3.1), d.uniform(3.4, 4.2)
    s.block((0, 0, 0.9), (2 * length, 1.2 * y, 0.4), tint=SHADED)
    s.soft((length - 0.9, 0, 0.7 + 0.5 * cab), (1.8, 2 * y, cab), 0.25)
    s.block((length + 0.0, 0, 0.7 + 0.7 * cab), (0.1, 1.7 * y, 0.34 * cab), tint=DARK)
    s.block((-0.22 * length, 0, 1.1 + 0.5 * box), (1.5 * length, 2.1 * y, box), tint=LIGHT)
    for x in (length - 1.0, -0.45 * length, -0.45 * length - 1.75):
        for j in (-1, 1):
            s.tube((x, j * (y - 0.5), r), (x, j * y, r), r, tint=DARK)
            s.tube((x, j * y, r), (x, j * (y + 0.05), r), 0.45 * r, tint=LIGHT)
    _car_marks(s, length - 1.0, -0.45 * length - 1.75, y, r, (-0.22 * length, 1.1 + box))


def _racer(d: Draws, s: Shape) -> None:
    length, y, r = d.uniform(4.2, 4.8), d.uniform(1.7, 2.0), d.uniform(0.7, 0.82)
    s.tube((-0.6 * length, 0, 0.8), (length, 0, 0.55), 0.72, 0.25)
    s.soft((-0.25 * length, 0, 0.75), (0.8 * length, 1.2 * y, 0.8), 0.3, tint=0.8)
    s.ball((-0.05 * length, 0, 1.35), 0.48, tint=LIGHT)
    s.block((-0.42 * length, 0, 1.4), (1.5, 0.6, 1.0), taper=(0.4, 0.5), shift=(0.3, 0))
    s.block((-length + 0.2, 0, d.uniform(1.9, 2.3)), (0.9, 1.7 * y, 0.16), euler=(0, 12, 0), tint=SHADED)
    for j in (-1, 1):
        s.block((-length + 0.2, 0.8 * j * y, 1.45), (0.8, 0.12, 1.3), tint=SHADED)
    s.block((length - 0.1, 0, 0.35), (0.9, 1.8 * y, 0.14), tint=SHADED)
    for x in (0.62 * length, -0.72 * length):
        s.tube((x, y, r), (x, -y, r), 0.12, tint=SHADED)
    _wheels(s, 0.62 * length, -0.72 * length, y, r, 0.7, 1.15 * r)
    _car_marks(s, 0.62 * length, -0.72 * length, y, r, (-0.42 * length, 1.9))


def _tractor(d: Draws, s: Shape) -> None:
    y, front, rear = d.uniform(1.4, 1.6), d.uniform(0.75, 0.95), d.uniform(1.55, 1.9)
    hood = d.uniform(2.6, 3.2)
    s.soft((0.5 * hood + 0.2, 0, 1.95), (hood, 1.4, 1.3), 0.25)
    s.block((-0.9, 0, 1.7), (2.2, 1.5, 0.9), tint=SHADED)
    cab = d.uniform(1.9, 2.3)
    for i in (-1.7, 0.1):
        for j in (-0.8, 0.8):
            s.tube((i, j, 2.0), (i, j, 2.2 + cab), 0.12, tint=SHADED)
    s.block((-0.8, 0, 2.3 + cab), (2.4, 2.1, 0.3))
    s.soft((-1.0, 0, 2.5), (0.9, 0.9, 0.5), 0.2, tint=DARK)
    s.tube((0.6 * hood, 0.4, 2.5), (0.6 * hood, 0.4, d.uniform(3.8, 4.6)), 0.15, tint=DARK)
    _wheels(s, hood - 0.3, -1.2, y + 0.2, front, 0.6, rear)
    _car_marks(s, hood - 0.3, -1.2, y, front, (-0.8, 2.4 + cab))


AIRPLANES = {
    "airliner": _airliner,
    "biplane": _biplane,
    "delta_jet": _delta_jet,
    "glider": _glider,
    "helicopter": _helicopter,
    "seaplane": _seaplane,
}
BOATS = {
    "sailboat": _sailboat,
    "cargo_ship": _cargo_ship,
    "catamaran": _catamaran,
    "rowboat": _rowboat,
    "submarine": _submarine,
    "steamer": _steamer,
}
CARS = {
    "sedan": _sedan,
    "pickup": _pickup,
    "van": _van,
    "truck": _truck,
    "racer": _racer,
    "tractor": _tractor,
}
