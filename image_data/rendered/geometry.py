"""Which surface each pixel sees, and how it is lit: numba kernels, one image per call, without the GIL.

Every primitive is a unit solid under an affine map, so a ray is intersected in the solid's own frame and keeps its
parameter t. Rays are ``t * (x, y, 1)`` in camera coordinates (x right, y down, z forward): t is the depth.
Blocks, balls and cones have closed forms; tori and soft boxes are marched along their signed distance.

All kernels are in one file because numba's disk cache does not notice a change in a callee of another file. Only
+ - * / sqrt and comparisons are used, in a fixed order and without fastmath: IEEE results are the same everywhere.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

__all__ = ["BALL", "BLOCK", "CONE", "MARK_TOLERANCE", "SOFT", "TORUS", "light_fragments", "see_points", "trace"]

BLOCK, BALL, CONE, TORUS, SOFT = 0, 1, 2, 3, 4
_MARCH_STEPS = 48
_MARCH_TOLERANCE = 4e-4  # in the solid's own length unit
_SHADOW_START = 4e-3  # a shadow ray starts this far off its surface; the object's radius is 1
_FAR = 1e30
MARK_TOLERANCE = 0.12  # a landmark inside the solid still counts as seen this far behind the first surface
_AMBIENT, _FILL, _KEY, _GLOSS = 0.34, 0.26, 0.62, 0.22

# numpy's error model: a division by zero is an IEEE infinity, not a branch to an exception
kernel = njit(cache=True, nogil=True, error_model="numpy")


@kernel
def _hit_block(p, k, ox, oy, oz, dx, dy, dz, start):
    """Slab test of |x - p2 z| <= 1 + (p0 - 1) z, |y - p3 z| <= 1 + (p1 - 1) z, 0 <= z <= 1 (a sheared frustum)."""
    near, far = -_FAR, _FAR
    for axis in range(3):
        if axis == 0:
            go, gd, wo, wd = ox - p[k, 2] * oz, dx - p[k, 2] * dz, 1.0 + (p[k, 0] - 1.0) * oz, (p[k, 0] - 1.0) * dz
        elif axis == 1:
            go, gd, wo, wd = oy - p[k, 3] * oz, dy - p[k, 3] * dz, 1.0 + (p[k, 1] - 1.0) * oz, (p[k, 1] - 1.0) * dz
        else:
            go, gd, wo, wd = 2.0 * oz - 1.0, 2.0 * dz, 1.0, 0.0
        for sign in (-1.0, 1.0):
            g, slope = sign * go - wo, sign * gd - wd  # inside where g + t slope <= 0
            if slope > 0.0:
                far = min(far, -g / slope)
            elif slope < 0.0:
                near = max(near, -g / slope)
            elif g > 0.0:
                return _FAR
        if near > far:
            return _FAR
    if near > start:
        return near
    return far if far > start else _FAR


@kernel
def _hit_disc(z, radius2, best, ox, oy, oz, dx, dy, dz, start):
    t = (z - oz) / dz
    x, y = ox + t * dx, oy + t * dy
    return t if start < t < best and x * x + y * y <= radius2 else best


@kernel
def _hit_ball(p, k, ox, oy, oz, dx, dy, dz, start):
    """Unit sphere between z = p0 and p1; the cuts are closed by discs when p2 > 0, else the shell is open."""
    a = dx * dx + dy * dy + dz * dz
    b = ox * dx + oy * dy + oz * dz
    c = ox * ox + oy * oy + oz * oz - 1.0
    root = b * b - a * c
    if root < 0.0:
        return _FAR
    root = math.sqrt(root)
    best = _FAR
    for sign in (-1.0, 1.0):
        t = (-b + sign * root) / a
        if start < t < best and p[k, 0] <= oz + t * dz <= p[k, 1]:
            best = t
    if p[k, 2] > 0.0:
        if p[k, 0] > -1.0:
            best = _hit_disc(p[k, 0], 1.0 - p[k, 0] * p[k, 0], best, ox, oy, oz, dx, dy, dz, start)
        if p[k, 1] < 1.0:
            best = _hit_disc(p[k, 1], 1.0 - p[k, 1] * p[k, 1], best, ox, oy, oz, dx, dy, dz, start)
    return best


@kernel
def _hit_cone(p, k, ox, oy, oz, dx, dy, dz, start):
    """Cone of radius 1 at z = 0 and p0 at z = 1; p1 > 0 closes the bottom, p2 > 0 the top."""
    m = p[k, 0] - 1.0
    w = 1.0 + m * oz
    a = dx * dx + dy * dy - m * m * dz * dz
    b = ox * dx + oy * dy - m * dz * w
    c = ox * ox + oy * oy - w * w
    best = _FAR
    root = b * b - a * c
    if root >= 0.0:
        root = math.sqrt(root)
        for sign in (-1.0, 1.0):
            # a = 0 (a ray along the side) gives an infinity or NaN here and only leaves one of its two points out
            t = (-b + sign * root) / a
            if start < t < best and 0.0 <= oz + t * dz <= 1.0:
                best = t
    if p[k, 1] > 0.0:
        best = _hit_disc(0.0, 1.0, best, ox, oy, oz, dx, dy, dz, start)
    if p[k, 2] > 0.0:
        best = _hit_disc(1.0, p[k, 0] * p[k, 0], best, ox, oy, oz, dx, dy, dz, start)
    return best


@kernel
def _distance(kind, p, k, x, y, z):
    """Signed distance. Torus: radii 1 and p0, kept where y >= p1. Soft box: core half sizes p0..p2, rounding p3."""
    if kind == TORUS:
        q = math.sqrt(x * x + y * y) - 1.0
        return max(math.sqrt(q * q + z * z) - p[k, 0], p[k, 1] - y)
    qx, qy, qz = abs(x) - p[k, 0], abs(y) - p[k, 1], abs(z) - p[k, 2]
    inside = min(max(qx, qy, qz), 0.0)
    qx, qy, qz = max(qx, 0.0), max(qy, 0.0), max(qz, 0.0)
    return math.sqrt(qx * qx + qy * qy + qz * qz) + inside - p[k, 3]


@kernel
def _hit_march(kind, p, bounds, k, ox, oy, oz, dx, dy, dz, start):
    """Sphere tracing from where the ray enters the solid's bounding box."""
    near, far = start, _FAR
    for axis in range(3):
        o, d = (ox, dx) if axis == 0 else ((oy, dy) if axis == 1 else (oz, dz))
        if d == 0.0:
            if o < bounds[k, 0, axis] or o > bounds[k, 1, axis]:
                return _FAR
            continue
        t0, t1 = (bounds[k, 0, axis] - o) / d, (bounds[k, 1, axis] - o) / d
        near, far = max(near, min(t0, t1)), min(far, max(t0, t1))
    if near > far:
        return _FAR
    speed = math.sqrt(dx * dx + dy * dy + dz * dz)
    t = near
    for _ in range(_MARCH_STEPS):
        step = _distance(kind, p, k, ox + t * dx, oy + t * dy, oz + t * dz)
        if step < _MARCH_TOLERANCE:
            return t if t > start else _FAR
        t += step / speed
        if t > far:
            return _FAR
    return _FAR


@kernel
def _hit(kind, p, bounds, k, ox, oy, oz, dx, dy, dz, start):
    """Smallest t > start at which the ray o + t d meets solid k, or ``_FAR``."""
    if kind == BLOCK:
        return _hit_block(p, k, ox, oy, oz, dx, dy, dz, start)
    if kind == BALL:
        return _hit_ball(p, k, ox, oy, oz, dx, dy, dz, start)
    if kind == CONE:
        return _hit_cone(p, k, ox, oy, oz, dx, dy, dz, start)
    return _hit_march(kind, p, bounds, k, ox, oy, oz, dx, dy, dz, start)


@kernel
def _local_normal(kind, p, k, x, y, z):
    """Normal (not of unit length) of the surface that is nearest to a point found by ``_hit``."""
    if kind == BLOCK:
        kx, ky = p[k, 0] - 1.0, p[k, 1] - 1.0
        across, along = x - p[k, 2] * z, y - p[k, 3] * z
        outside_x, outside_y = abs(across) - 1.0 - kx * z, abs(along) - 1.0 - ky * z
        if abs(2.0 * z - 1.0) - 1.0 > max(outside_x, outside_y):
            return 0.0, 0.0, 1.0 if z > 0.5 else -1.0
        if outside_x > outside_y:
            sign = 1.0 if across > 0.0 else -1.0
            return sign, 0.0, -sign * p[k, 2] - kx
        sign = 1.0 if along > 0.0 else -1.0
        return 0.0, sign, -sign * p[k, 3] - ky
    if kind == BALL:
        if p[k, 2] > 0.0 and (z <= p[k, 0] + 1e-9 or z >= p[k, 1] - 1e-9) and x * x + y * y + z * z < 1.0 - 1e-9:
            return 0.0, 0.0, 1.0 if z >= p[k, 1] - 1e-9 else -1.0
        return x, y, z
    if kind == CONE:
        radius = 1.0 + (p[k, 0] - 1.0) * z
        if (z <= 1e-9 or z >= 1.0 - 1e-9) and x * x + y * y < radius * radius - 1e-9:
            return 0.0, 0.0, 1.0 if z > 0.5 else -1.0
        return x, y, -(p[k, 0] - 1.0) * radius
    h = 1e-4
    return (
        _distance(kind, p, k, x + h, y, z) - _distance(kind, p, k, x - h, y, z),
        _distance(kind, p, k, x, y + h, z) - _distance(kind, p, k, x, y - h, z),
        _distance(kind, p, k, x, y, z + h) - _distance(kind, p, k, x, y, z - h),
    )


@kernel
def _invert(m, out):
    """Inverse of a 3 x 3 matrix by cofactors (LAPACK's last bits depend on the machine)."""
    for i in range(3):
        for j in range(3):
            a, b, c, d = (j + 1) % 3, (j + 2) % 3, (i + 1) % 3, (i + 2) % 3
            out[i, j] = m[a, c] * m[b, d] - m[a, d] * m[b, c]
    determinant = m[0, 0] * out[0, 0] + m[0, 1] * out[1, 0] + m[0, 2] * out[2, 0]
    for i in range(3):
        for j in range(3):
            out[i, j] /= determinant


@kernel
def _apply(m, k, x, y, z):
    """Matrix k of a stack times a vector."""
    return (
        m[k, 0, 0] * x + m[k, 0, 1] * y + m[k, 0, 2] * z,
        m[k, 1, 0] * x + m[k, 1, 1] * y + m[k, 1, 2] * z,
        m[k, 2, 0] * x + m[k, 2, 1] * y + m[k, 2, 2] * z,
    )


@kernel
def _place(maps, camera, distance, bounds, inverse, origin, sphere, corner):
    """Camera-frame placement of every primitive.

    Fills ``inverse`` (P, 3, 3) local from camera, ``origin`` (P, 3) the camera in local coordinates, ``sphere``
    (P + 1, 4) bounding spheres (centre, squared radius; the last is the whole object's), and ``corner`` (P, 5): the
    range of x/z, of y/z (its rectangle in the image) and the least depth.
    """
    forward, shift, whole = np.empty((1, 3, 3)), np.empty(3), 0.0
    for k in range(maps.shape[0]):
        for j in range(3):
            column = _apply(camera, 0, maps[k, 0, j], maps[k, 1, j], maps[k, 2, j])
            forward[0, 0, j], forward[0, 1, j], forward[0, 2, j] = column
        shift[0], shift[1], shift[2] = _apply(camera, 0, maps[k, 0, 3], maps[k, 1, 3], maps[k, 2, 3])
        shift[2] += distance
        _invert(forward[0], inverse[k])
        origin[k, 0], origin[k, 1], origin[k, 2] = _apply(inverse, k, -shift[0], -shift[1], -shift[2])
        low, high = bounds[k, 0], bounds[k, 1]
        middle = _apply(forward, 0, 0.5 * (low[0] + high[0]), 0.5 * (low[1] + high[1]), 0.5 * (low[2] + high[2]))
        left, right, top, bottom, near, radius2 = _FAR, -_FAR, _FAR, -_FAR, _FAR, 0.0
        for c in range(8):
            x, y, z = _apply(forward, 0, bounds[k, c & 1, 0], bounds[k, (c >> 1) & 1, 1], bounds[k, c >> 2, 2])
            dx, dy, dz = x - middle[0], y - middle[1], z - middle[2]
            radius2 = max(radius2, dx * dx + dy * dy + dz * dz)
            x, y, z = x + shift[0], y + shift[1], z + shift[2]
            left, right, near = min(left, x / z), max(right, x / z), min(near, z)
            top, bottom = min(top, y / z), max(bottom, y / z)
        corner[k, 0], corner[k, 1], corner[k, 2], corner[k, 3], corner[k, 4] = left, right, top, bottom, near
        for i in range(3):
            sphere[k, i] = middle[i] + shift[i]
        sphere[k, 3] = radius2
        dx, dy, dz = sphere[k, 0], sphere[k, 1], sphere[k, 2] - distance
        whole = max(whole, math.sqrt(dx * dx + dy * dy + dz * dz) + math.sqrt(radius2))
    last = maps.shape[0]
    sphere[last, 0], sphere[last, 1], sphere[last, 2], sphere[last, 3] = 0.0, 0.0, distance, whole * whole


@kernel
def _near(sphere, k, px, py, pz, dx, dy, dz):
    """Whether a ray meets a sphere (centre, squared radius)."""
    cx, cy, cz = sphere[k, 0] - px, sphere[k, 1] - py, sphere[k, 2] - pz
    along = cx * dx + cy * dy + cz * dz
    square = cx * cx + cy * cy + cz * cz
    return square - along * along <= sphere[k, 3] and (along >= 0.0 or square <= sphere[k, 3])


@kernel
def _blocked(solids, px, py, pz, dx, dy, dz, start, stop):
    """Whether the ray p + t d (d of unit length) meets a primitive at start < t < stop."""
    kinds, params, bounds, inverse, shift, sphere = solids
    if not _near(sphere, kinds.shape[0], px, py, pz, dx, dy, dz):
        return False
    for k in range(kinds.shape[0]):
        if not _near(sphere, k, px, py, pz, dx, dy, dz):
            continue
        ox, oy, oz = _apply(inverse, k, px, py, pz)
        lx, ly, lz = _apply(inverse, k, dx, dy, dz)
        ox, oy, oz = ox + shift[k, 0], oy + shift[k, 1], oz + shift[k, 2]
        if _hit(kinds[k], params, bounds, k, ox, oy, oz, lx, ly, lz, start) < stop:
            return True
    return False


@kernel
def _fill(kinds, params, bounds, inverse, origin, corner, size, tangent, depth, owner):
    """Fills the 2 x 2 supersampled depth and primitive-number buffers, primitive by primitive."""
    step = 2.0 * tangent / size
    for k in range(kinds.shape[0]):
        x0 = max(math.floor((corner[k, 0] + tangent) / step), 0)
        x1 = min(math.ceil((corner[k, 1] + tangent) / step), size)
        y0 = max(math.floor((corner[k, 2] + tangent) / step), 0)
        y1 = min(math.ceil((corner[k, 3] + tangent) / step), size)
        ox, oy, oz = origin[k, 0], origin[k, 1], origin[k, 2]
        kind = kinds[k]
        for row in range(y0, y1):
            v = (row + 0.5) * step - tangent
            ax, ay, az = _apply(inverse, k, 0.0, v, 1.0)
            for column in range(x0, x1):
                if depth[row, column] <= corner[k, 4]:
                    continue
                u = (column + 0.5) * step - tangent
                dx, dy, dz = ax + inverse[k, 0, 0] * u, ay + inverse[k, 1, 0] * u, az + inverse[k, 2, 0] * u
                t = _hit(kind, params, bounds, k, ox, oy, oz, dx, dy, dz, 0.0)
                if t < depth[row, column]:
                    depth[row, column] = t
                    owner[row, column] = k


@kernel
def _light(solids, light, up, normal, x, y, z):
    """(diffuse, gloss) at a camera-frame point with a unit normal that faces the camera."""
    nx, ny, nz = normal
    key = nx * light[0] + ny * light[1] + nz * light[2]
    length = math.sqrt(x * x + y * y + z * z)
    facing = -(nx * x + ny * y + nz * z) / length
    diffuse = _AMBIENT * (0.8 + 0.2 * (nx * up[0] + ny * up[1] + nz * up[2])) + _FILL * facing
    if key <= 0.0:
        return diffuse, 0.0
    px, py, pz = x + _SHADOW_START * nx, y + _SHADOW_START * ny, z + _SHADOW_START * nz
    if _blocked(solids, px, py, pz, light[0], light[1], light[2], 1e-6, _FAR):
        return diffuse, 0.0
    hx, hy, hz = light[0] - x / length, light[1] - y / length, light[2] - z / length
    shine = (nx * hx + ny * hy + nz * hz) / math.sqrt(hx * hx + hy * hy + hz * hz)
    shine *= shine
    shine *= shine
    shine *= shine
    return diffuse + _KEY * key, _GLOSS * shine * shine


@kernel
def _surface(solids, maps, k, u, v, t):
    """Unit normal towards the camera, and object coordinates, of the point t (u, v, 1) on primitive k."""
    kinds, params, _, inverse, origin, _ = solids
    x, y, z = _apply(inverse, k, t * u, t * v, t)
    x, y, z = x + origin[k, 0], y + origin[k, 1], z + origin[k, 2]
    a, b, c = _local_normal(kinds[k], params, k, x, y, z)
    nx = inverse[k, 0, 0] * a + inverse[k, 1, 0] * b + inverse[k, 2, 0] * c
    ny = inverse[k, 0, 1] * a + inverse[k, 1, 1] * b + inverse[k, 2, 1] * c
    nz = inverse[k, 0, 2] * a + inverse[k, 1, 2] * b + inverse[k, 2, 2] * c
    scale = 1.0 / math.sqrt(nx * nx + ny * ny + nz * nz)
    if nx * u + ny * v + nz > 0.0:  # the inside of an open shell
        scale = -scale
    x, y, z = _apply(maps, k, x, y, z)
    return (nx * scale, ny * scale, nz * scale), x + maps[k, 0, 3], y + maps[k, 1, 3], z + maps[k, 2, 3]


@kernel
def trace(kinds, params, maps, bounds, camera, distance, size, tangent):
    """First surfaces of one object at 2 x 2 samples per pixel.

    Args:
        kinds: int64 (P,). params: (P, 4). maps: (P, 3, 4) object from local. bounds: (P, 2, 3) local boxes.
        camera: (1, 3, 3) camera from object (rotation and warp). distance: of the object's centre from the camera.
        size: image side in pixels. tangent: of half the field of view.

    Returns:
        depth: (2 size, 2 size), large where no primitive is met. owner: int32, the primitive there, else -1.
        solids: what ``light_fragments`` and ``see_points`` need to cast rays.
    """
    count, fine = kinds.shape[0], 2 * size
    inverse, origin = np.empty((count, 3, 3)), np.empty((count, 3))
    sphere, corner = np.empty((count + 1, 4)), np.empty((count, 5))
    _place(maps, camera, distance, bounds, inverse, origin, sphere, corner)
    depth = np.full((fine, fine), _FAR)
    owner = np.full((fine, fine), -1, np.int32)
    _fill(kinds, params, bounds, inverse, origin, corner, fine, tangent, depth, owner)
    return depth, owner, (kinds, params, bounds, inverse, origin, sphere)


@kernel
def light_fragments(solids, maps, samples, pixel, owner, values, light, up, wall, tangent):
    """Adds light and texture points to the fragments of ``samples.group_samples``.

    Args:
        samples: the depths of ``trace``. pixel, owner: int32 (F,). values: (F, 6); columns 1 to 5 are overwritten
            by diffuse light, gloss and the texture point (object coordinates; on the wall x, y, 0).
        light: (3,) unit vector to the light. up: (3,) world up; both in camera coordinates. wall: depth of the wall.
    """
    fine = samples.shape[0]
    size, step = fine // 2, 2.0 * tangent / fine
    for f in range(pixel.shape[0]):
        sample = int(values[f, 1])
        row, column = 2 * (pixel[f] // size) + sample // 2, 2 * (pixel[f] % size) + sample % 2
        u, v = (column + 0.5) * step - tangent, (row + 0.5) * step - tangent
        if owner[f] < 0:
            t, normal = wall, (0.0, 0.0, -1.0)
            values[f, 3], values[f, 4], values[f, 5] = t * u, t * v, 0.0
        else:
            t = samples[row, column]
            normal, values[f, 3], values[f, 4], values[f, 5] = _surface(solids, maps, owner[f], u, v, t)
        values[f, 1], values[f, 2] = _light(solids, light, up, normal, t * u, t * v, t)


@kernel
def see_points(solids, camera, distance, points):
    """Projects landmarks (K, 3) in object coordinates: x/z, y/z and 1 (the camera sees it) or 0 (hidden)."""
    out = np.empty((points.shape[0], 3))
    for k in range(points.shape[0]):
        x, y, z = _apply(camera, 0, points[k, 0], points[k, 1], points[k, 2])
        z += distance
        r = math.sqrt(x * x + y * y + z * z)
        hidden = _blocked(solids, 0.0, 0.0, 0.0, x / r, y / r, z / r, 0.0, r - MARK_TOLERANCE)
        out[k, 0], out[k, 1], out[k, 2] = x / z, y / z, 0.0 if hidden else 1.0
    return out
