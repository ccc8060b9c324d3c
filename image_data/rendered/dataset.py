"""The rows of the rendered data set: encoded images with aligned targets, in a fixed order.

Every row is a function of (options, split, row number) alone: the same bytes for any thread count, process or range.

Decisions where Newell & Deng leave a choice: colours are real RGB (the released renderer copies red into green and
blue; we do not imitate that); textures are procedural solid textures instead of photographs; parts of an object share
one material at different brightness; the class-tied colour belongs to the fine class.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from image_data.contracts import SPLITS, DataError
from image_data.rendered.classes import CLASS_NAMES, COARSE_NAMES, build_solid, class_split, coarse_of
from image_data.rendered.png import encode_png
from image_data.rendered.scene import DEPTH_SCALE, Factors, pose_bin, render

__all__ = [
    "CLASS_NAMES",
    "COARSE_NAMES",
    "RenderedOptions",
    "parse_options",
    "rendered_rows",
    "split_class_names",
    "split_size",
]

SMALLEST, LARGEST = 32, 224  # pixels
_BUCKETS = {"train": 0, "val": 1, "test": 2, "val_classes": 0, "novel_classes": 0}
_MOST_INSTANCES = 100_000  # per class and bucket, so that instance numbers are unique
_SEED_WORD = 0x52454E44  # keeps these streams apart from others with the same seed


@dataclass(frozen=True)
class RenderedOptions:
    """What ``rendered:`` makes; the defaults give 3,984 images.

    Attributes:
        image_size: side in pixels, 32 to 224.
        instances_per_class: shape instances of each base class in train, val and test (disjoint).
        held_out_instances: shape instances of each validation and novel class.
        images_per_instance: images of each instance (10 consecutive frames in Newell & Deng).
        seed: of everything but the class split.
        factors: texture, colour, viewpoint, lighting (T C V L of Newell & Deng), each 0 or 1. The default varies the
            colour alone, which otherwise gives the class away: shape is what remains to be learned, and a small network
            learns some of it within minutes. 1111 is the hardest set.
        classes: fine classes in all, 10 to 60; a fifth each is held out for validation and novel.
    """

    image_size: int = 64
    instances_per_class: tuple[int, int, int] = (15, 3, 3)
    held_out_instances: int = 10
    images_per_instance: int = 4
    seed: int = 0
    factors: str = "0100"
    classes: int = len(CLASS_NAMES)

    def __post_init__(self) -> None:
        if not SMALLEST <= self.image_size <= LARGEST:
            raise DataError(f"rendered: image_size={self.image_size}; give {SMALLEST} to {LARGEST} pixels")
        if len(self.factors) != 4 or set(self.factors) - {"0", "1"}:
            raise DataError(
                f"rendered: factors={self.factors!r}; give four digits 0 or 1 for texture, colour, viewpoint and "
                "lighting, e.g. factors=1111"
            )
        counts = (*self.instances_per_class, self.held_out_instances, self.images_per_instance)
        if len(counts) != 5 or min(counts) < 1 or max(counts) > _MOST_INSTANCES:
            raise DataError(
                f"rendered: instances={','.join(map(str, self.instances_per_class))}, held_out_instances="
                f"{self.held_out_instances}, images_per_instance={self.images_per_instance}; "
                f"each must be 1 to {_MOST_INSTANCES}, with three values for instances (train,val,test)"
            )
        class_split(self.classes)  # raises for an impossible number


def _whole(key: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise DataError(f"rendered: {key}={text!r} is not a whole number; write for example {key}=64") from None


def parse_options(query: dict[str, str]) -> RenderedOptions:
    """Options from the query of a ``rendered:?key=value&...`` URI.

    Args:
        query: keys are the fields of RenderedOptions, with ``instances=TRAIN,VAL,TEST`` for instances_per_class.
    """
    options = RenderedOptions()
    numbers = ("image_size", "held_out_instances", "images_per_instance", "seed", "classes")
    changes: dict[str, object] = {}
    for key, text in query.items():
        if key in numbers:
            changes[key] = _whole(key, text)
        elif key == "factors":
            changes[key] = text
        elif key == "instances":
            changes["instances_per_class"] = tuple(_whole(key, part) for part in text.split(","))
        else:
            allowed = ", ".join(sorted((*numbers, "factors", "instances")))
            raise DataError(f"rendered: unknown option {key!r}; allowed are {allowed}")
    return replace(options, **changes)  # type: ignore[arg-type]


def _split_classes(options: RenderedOptions, split: str) -> tuple[int, ...]:
    """Global class numbers of a split, in label order."""
    if split not in SPLITS:
        raise DataError(f"rendered: there is no split {split!r}; choose from {', '.join(SPLITS)}")
    pools = class_split(options.classes)
    return pools.get(split, pools["base"])


def _split_instances(options: RenderedOptions, split: str) -> int:
    if split in ("val_classes", "novel_classes"):
        return options.held_out_instances
    return options.instances_per_class[_BUCKETS[split]]


def split_class_names(options: RenderedOptions, split: str) -> tuple[str, ...]:
    """Names ("coarse/fine") of a split's classes, in label order."""
    return tuple(CLASS_NAMES[class_id] for class_id in _split_classes(options, split))


def split_size(options: RenderedOptions, split: str) -> int:
    """Number of images of a split."""
    return len(_split_classes(options, split)) * _split_instances(options, split) * options.images_per_instance


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(x0, y0, x1, y1) in pixels, ends excluded; all zero for an object out of sight."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return (0, 0, 0, 0)
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def _instance_rows(options: RenderedOptions, split: str, label: int, number: int, images: range) -> list[dict]:
    """Rows of some images of one instance.

    Args:
        label: in the split. number: of the instance in its class and split.
    """
    class_id = _split_classes(options, split)[label]
    instance = (3 * class_id + _BUCKETS[split]) * _MOST_INSTANCES + number
    solid = build_solid(class_id, options.seed, instance)
    factors = Factors(*(digit == "1" for digit in options.factors))
    coarse, rows = coarse_of(class_id), []
    for image in images:
        key = (_SEED_WORD, options.seed, instance, image)
        picture = render(solid, class_id, key, factors, options.image_size)
        mask = picture.depth > 0
        box = _box(mask)
        landmarks = picture.landmarks
        x, y = landmarks[:, 0], landmarks[:, 1]
        landmarks[:, 2] *= (x >= box[0]) & (x <= box[2]) & (y >= box[1]) & (y <= box[3])
        rows.append(
            {
                "name": f"{CLASS_NAMES[class_id]}/{split}-{number:05d}-{image:03d}",
                "image": encode_png(picture.image),
                "label": label,
                "coarse": coarse,
                "height": options.image_size,
                "width": options.image_size,
                "pose": pose_bin(picture.rotation),
                "rotation": picture.rotation,
                "mask": encode_png(mask * np.uint8(coarse + 1)),
                "depth": encode_png(picture.depth),
                "depth_scale": DEPTH_SCALE,
                "depth_max": float(picture.depth.max()) * DEPTH_SCALE,
                "box": box,
                "landmarks": landmarks.astype(np.float32).tolist(),
                "instance": instance,
            }
        )
    return rows


def rendered_rows(
    options: RenderedOptions, split: str, threads: int = 1, start: int = 0, stop: int | None = None
) -> Iterator[dict]:
    """Rows ``start`` to ``stop`` of a split, ordered by class, instance, image.

    Args:
        split: one of ``contracts.SPLITS``. "val_classes" and "novel_classes" hold classes that no other split has.
        threads: render in this many threads (the kernels run without the GIL); the rows do not depend on it.

    Yields:
        name: str, unique in the data set.
        image: PNG, RGB. label: fine class, 0 to C-1 within the split. coarse: 0 to 9. height, width: pixels.
        pose: 0 to 4 (``scene.pose_bin``). rotation: Euler angles about x, y, z added to the fixed pose, radians.
        mask: PNG, 8-bit gray: coarse + 1 on the object, 0 elsewhere.
        depth: PNG, 16-bit gray: depth along the viewing axis in units of depth_scale; 0 where mask is 0.
        depth_scale: bounding radii per unit. depth_max: the largest depth (Newell & Deng put it in place of 0).
        box: (x0, y0, x1, y1) of the mask in pixels, ends excluded.
        landmarks: 5 x (x, y, visible), pixels; hidden ones (behind the object, outside the box) have visible 0.
        instance: number of the shape instance, unique in the data set.
    """
    total, per = split_size(options, split), options.images_per_instance
    stop = total if stop is None else min(stop, total)
    instances = _split_instances(options, split)

    def job(unit: int) -> list[dict]:
        images = range(max(start - unit * per, 0), min(stop - unit * per, per))
        return _instance_rows(options, split, unit // instances, unit % instances, images)

    units = range(start // per, (stop + per - 1) // per) if start < stop else range(0)
    if threads <= 1:
        for unit in units:
            yield from job(unit)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[list[dict]]] = deque()
        for unit in units:
            waiting.append(pool.submit(job, unit))
            if len(waiting) > 4 * threads:  # bounds what is in memory when the reader is slow
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
