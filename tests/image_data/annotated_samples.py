"""Tiny annotated data sets in the layouts of VOC, COCO, Cityscapes and CelebA with MAFL.

The pictures can be learnt from: coloured discs, boxes and triangles, street scenes, and faces of few strokes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.image_data.layout_samples import LANDMARK_HEADER, write
from tests.image_data.samples import encode

__all__ = [
    "COCO_CATEGORIES",
    "SHAPE_CLASSES",
    "Shape",
    "draw_shapes",
    "voc_xml",
    "write_celeba_mafl",
    "write_cityscapes",
    "write_coco",
    "write_voc",
]

SHAPE_CLASSES = ("car", "cat", "bottle")  # box, disc, triangle under names of VOC's
_COLOURS = ((210, 60, 50), (60, 110, 220), (240, 190, 40))
COCO_CATEGORIES = {3: "car", 17: "cat", 38: "kite"}  # the same shapes; COCO's ids have gaps


@dataclass(frozen=True)
class Shape:
    """One object of a picture.

    Attributes:
        name: one of ``SHAPE_CLASSES``.
        polygon: its corners, float (K, 2), x and y in pixels (pixel i covers [i, i + 1)).
        mask: bool (H, W), the pixels whose centre is inside.
    """

    name: str
    polygon: np.ndarray
    mask: np.ndarray

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1), ends excluded."""
        (x0, y0), (x1, y1) = self.polygon.min(0), self.polygon.max(0)
        return float(x0), float(y0), float(x1), float(y1)


def draw_shapes(seed: int, size: tuple[int, int] = (64, 48)) -> tuple[np.ndarray, list[Shape]]:
    """A picture of one to three shapes side by side, and the shapes; ``size`` is (width, height)."""
    rng = np.random.default_rng(seed)
    width, height = size
    y, x = np.mgrid[:height, :width] + 0.5
    pixels = 110 + 30 * np.sin(x / 9 + rng.uniform(0, 6)) + rng.normal(0, 8, (height, width))
    pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    count = int(rng.integers(1, 4))
    shapes = []
    for i in range(count):
        kind = int(rng.integers(3))
        half = np.floor(rng.uniform(0.3, 0.48, 2) * (width / count, 0.7 * height))
        room = np.array([width / count, height]) - 2 * half
        center = half + np.floor([i * width / count, 0] + rng.uniform(0, 1, 2) * room)
        polygon = center + half * _OUTLINES[kind]
        mask = _inside(polygon, x, y)
        pixels[mask] = np.array(_COLOURS[kind]) + rng.normal(0, 8, (int(mask.sum()), 3))
        shapes.append(Shape(SHAPE_CLASSES[kind], polygon, mask))
    return pixels.clip(0, 255).astype(np.uint8), shapes


_ANGLES = np.arange(0, 2 * np.pi, np.pi / 8)
_OUTLINES = (  # within [-1, 1] x [-1, 1], clockwise on the screen
    np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float),
    np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1).round(6),
    np.array([(0, -1), (1, 1), (-1, 1)], float),
)


def _inside(polygon: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points are inside a convex polygon, which runs clockwise on the screen."""
    inside = np.ones(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        inside &= (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) >= 0
    return inside


# ---- VOC

_OBJECT = """
  <object>
    <name>{name}</name>
    <pose>Unspecified</pose>
    <truncated>0</truncated>
    <difficult>{difficult}</difficult>
    <bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>
  </object>"""


def voc_xml(name: str, size: tuple[int, int], objects: Sequence[tuple[str, Sequence[float], int]]) -> str:
    """An annotation file; boxes are xmin, ymin, xmax, ymax as VOC counts: from 1, ends included."""
    listed = "".join(_OBJECT.format(name=label, box=box, difficult=difficult) for label, box, difficult in objects)
    width, height = size
    return (
        f"<annotation>\n  <folder>VOC</folder>\n  <filename>{name}.jpg</filename>\n"
        f"  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>{listed}\n</annotation>\n"
    )


def write_voc(
    folder: Path,
    years: Sequence[str] = ("2007",),
    counts: Mapping[str, int] | None = None,
    size: tuple[int, int] = (64, 48),
) -> dict[str, list[dict[str, Any]]]:
    """A VOCdevkit; the second object of every third image is marked as difficult.

    Args:
        folder: becomes DIR.
        years: of 2007 and 2012; 2012 has no test images.
        counts: images per list.
        size: (width, height).

    Returns:
        Image id -> its objects as the layout gives them.
    """
    counts = counts or {"train": 8, "val": 4, "test": 6}
    truth: dict[str, list[dict[str, Any]]] = {}
    for year in years:
        root = folder / f"VOC{year}"
        for part, count in counts.items():
            if part == "test" and year != "2007":
                continue
            start = len(truth)
            ids = [f"{i + 1:06d}" if year == "2007" else f"2008_{i + 1:06d}" for i in range(start, start + count)]
            write(root / "ImageSets" / "Main" / f"{part}.txt", "".join(f"{i}\n" for i in ids))
            for number, name in enumerate(ids, start):
                pixels, shapes = draw_shapes(number, size)
                write(root / "JPEGImages" / f"{name}.jpg", encode(pixels, "JPEG", quality=95))
                truth[name] = [
                    {**_object(s.name, _whole(s.box)), "difficult": number % 3 == 0 and i == 1}
                    for i, s in enumerate(shapes)
                ]
                objects = [
                    (o["class"], [o["box"][0] + 1, o["box"][1] + 1, *o["box"][2:]], int(o["difficult"]))
                    for o in truth[name]
                ]
                write(root / "Annotations" / f"{name}.xml", voc_xml(name, size, objects))
    return truth


def _whole(box: Sequence[float]) -> list[int]:
    return [int(np.floor(box[0])), int(np.floor(box[1])), int(np.ceil(box[2])), int(np.ceil(box[3]))]


def _object(name: str, box: Sequence[float]) -> dict[str, Any]:
    area = (box[2] - box[0]) * (box[3] - box[1])
    return {"box": list(box), "class": name, "difficult": False, "crowd": False, "area": area}


# ---- COCO


def write_coco(
    folder: Path,
    counts: Mapping[str, int] | None = None,
    size: tuple[int, int] = (64, 48),
    crowd: bool = True,
) -> dict[str, dict[str, Any]]:
    """Annotations and images of train2017 and val2017; the last image of each has no object.

    Args:
        folder: becomes DIR.
        counts: images per part.
        size: (width, height).
        crowd: the first image of each part has its first object as a crowd, whose mask is an uncompressed RLE.

    Returns:
        Part -> what its JSON file holds.
    """
    ids: dict[str, int] = dict(zip(SHAPE_CLASSES, COCO_CATEGORIES, strict=True))
    content: dict[str, dict[str, Any]] = {}
    for offset, (part, count) in enumerate((counts or {"train2017": 10, "val2017": 6}).items()):
        images, annotations = [], []
        for i in range(count):
            image_id = 1000 * (offset + 1) + 7 * i
            pixels, shapes = draw_shapes(100 * offset + i + 1, size)
            if i == count - 1:
                pixels, shapes = _background(size), []
            file = f"{image_id:012d}.jpg"
            write(folder / part / file, encode(pixels, "JPEG", quality=95))
            images.append({"id": image_id, "file_name": file, "width": size[0], "height": size[1]})
            for number, shape in enumerate(shapes):
                is_crowd = crowd and i == 0 and number == 0
                x0, y0, x1, y1 = shape.box
                annotations.append(
                    {
                        "id": 10 * image_id + number,
                        "image_id": image_id,
                        "category_id": ids[shape.name],
                        "iscrowd": int(is_crowd),
                        "area": float(shape.mask.sum()),
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "segmentation": _rle(shape.mask) if is_crowd else [shape.polygon.ravel().tolist()],
                    }
                )
        categories = [{"id": number, "name": name} for number, name in COCO_CATEGORIES.items()]
        content[part] = {"images": images, "annotations": annotations, "categories": categories}
        write(folder / "annotations" / f"instances_{part}.json", json.dumps(content[part]))
    return content


def _background(size: tuple[int, int]) -> np.ndarray:
    return np.full((size[1], size[0], 3), 120, np.uint8)


def _rle(mask: np.ndarray) -> dict[str, Any]:
    """Run lengths column by column, of zeros first."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], changes, [len(flat)]])).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


# ---- Cityscapes

# Label id and colour of what the scenes show.
_STREET = {
    "ego vehicle": (1, (30, 30, 35)),
    "road": (7, (128, 100, 128)),
    "sidewalk": (8, (220, 120, 200)),
    "building": (11, (120, 90, 70)),
    "vegetation": (21, (90, 150, 50)),
    "sky": (23, (120, 180, 240)),
    "person": (24, (220, 40, 60)),
    "car": (26, (20, 30, 170)),
}
_CITIES = {"train": ("aachen", "bochum", "bremen", "ulm"), "val": ("frankfurt", "munster")}


def write_cityscapes(
    folder: Path,
    each: int = 3,
    size: tuple[int, int] = (64, 48),
    cities: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, np.ndarray]:
    """Street scenes of four training and two validation cities.

    Args:
        folder: becomes DIR.
        each: images per city.
        size: (width, height).
        cities: by part.

    Returns:
        <city>/<name>_leftImg8bit.png -> label ids, uint8 (H, W).
    """
    truth: dict[str, np.ndarray] = {}
    for part, names in (cities or _CITIES).items():
        for city in names:
            for i in range(each):
                pixels, ids = _street(len(truth), size)
                stem = f"{city}_{i:06d}_000019"
                write(folder / "leftImg8bit" / part / city / f"{stem}_leftImg8bit.png", encode(pixels))
                write(folder / "gtFine" / part / city / f"{stem}_gtFine_labelIds.png", encode(ids))
                write(folder / "gtFine" / part / city / f"{stem}_gtFine_color.png", encode(pixels))
                write(folder / "gtFine" / part / city / f"{stem}_gtFine_polygons.json", "{}")
                truth[f"{city}/{stem}_leftImg8bit.png"] = ids
    return truth


def _street(seed: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(picture, label ids) of a street: sky, houses and trees, road and pavement, cars and people, the own bonnet."""
    rng = np.random.default_rng(seed)
    width, height = size
    ids, pixels = np.zeros((height, width), np.uint8), np.zeros((height, width, 3))

    def fill(name: str, x: float, y: float, x1: float, y1: float) -> None:
        area = np.s_[int(y * height) : int(y1 * height), int(x * width) : int(x1 * width)]
        ids[area], pixels[area] = _STREET[name]

    horizon = rng.uniform(0.45, 0.55)
    fill("sky", 0, 0, 1, horizon)
    for left in np.arange(0, 1, 0.25):
        kind = "building" if rng.random() < 0.6 else "vegetation"
        fill(kind, left, horizon - rng.uniform(0.1, 0.4), left + 0.25, horizon)
    fill("road", 0, horizon, 1, 1)
    fill("sidewalk", 0, horizon, rng.uniform(0.1, 0.25), 1)
    for _ in range(int(rng.integers(1, 3))):
        left, top = rng.uniform(0.25, 0.7), rng.uniform(horizon - 0.05, 0.65)
        fill("car", left, top, left + 0.28, top + 0.2)
    left = rng.uniform(0.02, 0.9)
    fill("person", left, horizon - 0.05, left + 0.08, horizon + 0.25)
    fill("ego vehicle", 0, 0.92, 1, 1)
    noisy = pixels + rng.normal(0, 10, (*ids.shape, 3))
    return noisy.clip(0, 255).astype(np.uint8), ids


# ---- CelebA with MAFL

_FACE_SIZE = (44, 54)  # (width, height): a quarter of CelebA's 178 x 218


def write_celeba_mafl(
    folder: Path, training: int = 16, testing: int = 6, others: int = 14, size: tuple[int, int] = _FACE_SIZE
) -> dict[str, np.ndarray]:
    """CelebA's files and MAFL's two lists; MAFL's images are the first ones of CelebA, training before test ones.

    People have four images each. Three quarters of the people are in CelebA's training partition, so that some of
    MAFL's test images are among them where ``others`` is not small.

    Args:
        folder: becomes DIR.
        training: images of MAFL's training list.
        testing: of its test list.
        others: further images of CelebA.
        size: (width, height).

    Returns:
        Image -> landmarks, int64 (5, 2): x and y in pixels.
    """
    count = training + testing + others
    names = [f"{i + 1:06d}.jpg" for i in range(count)]
    people = -(-count // 4)
    partition = [0 if 4 * p < 3 * people else 1 if 8 * p < 7 * people else 2 for p in range(people)]
    truth: dict[str, np.ndarray] = {}
    for i, name in enumerate(names):
        pixels, truth[name] = _face(i // 4, i, size)
        write(folder / "img_align_celeba" / name, encode(pixels, "JPEG", quality=95))
    lines = [f"{name} " + " ".join(map(str, points.ravel())) for name, points in truth.items()]
    write(folder / "list_landmarks_align_celeba.txt", "\n".join([str(count), LANDMARK_HEADER, *lines]) + "\n")
    write(folder / "identity_CelebA.txt", "".join(f"{name} {i // 4 + 1}\n" for i, name in enumerate(names)))
    rows = "".join(f"{name} {partition[i // 4]}\n" for i, name in enumerate(names))
    write(folder / "list_eval_partition.txt", rows)
    write(folder / "MAFL" / "training.txt", "".join(f"{name}\n" for name in names[:training]))
    write(folder / "MAFL" / "testing.txt", "".join(f"{name}\n" for name in names[training : training + testing]))
    return truth


def _face(person: int, seed: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(picture, landmarks): an oval with eyes, nose and mouth; a person has one skin and one background."""
    rng = np.random.default_rng(seed)
    own = np.random.default_rng([person, 1])
    width, height = size
    y, x = np.mgrid[:height, :width] + 0.5
    pixels = np.zeros((height, width, 3)) + own.uniform(0, 255, 3)
    center = np.array([width / 2, height / 2]) + rng.uniform(-0.06, 0.06, 2) * size
    half = np.array([0.33, 0.42]) * size * rng.uniform(0.85, 1.1)
    pixels[((x - center[0]) / half[0]) ** 2 + ((y - center[1]) / half[1]) ** 2 < 1] = own.uniform(150, 230, 3)
    offsets = np.array([(-0.4, -0.25), (0.4, -0.25), (0, 0.1), (-0.35, 0.45), (0.35, 0.45)])
    offsets = offsets + rng.uniform(-0.06, 0.06, offsets.shape)
    points = np.round(center + half * offsets).astype(np.int64)
    radius = max(1.5, 0.06 * width)
    for (px, py), colour in zip(points, ((20, 20, 90), (20, 20, 90), (170, 90, 60), *[(190, 20, 40)] * 2), strict=True):
        pixels[(x - px) ** 2 + (y - py) ** 2 < radius**2] = colour
    ends = points[3:].astype(float)
    for t in np.linspace(0, 1, 2 * width):  # the mouth, from corner to corner
        px, py = (1 - t) * ends[0] + t * ends[1]
        pixels[(x - px) ** 2 + (y - py) ** 2 < (0.5 * radius) ** 2] = (190, 20, 40)
    noisy = pixels + rng.normal(0, 5, pixels.shape)
    return noisy.clip(0, 255).astype(np.uint8), points
