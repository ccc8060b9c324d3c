"""COCO's instances: objects with boxes and masks, from one JSON file per part; other data in its format too."""

from __future__ import annotations

import json
import math
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from image_data.contracts import DataError
from image_data.layouts.annotated import (
    Annotated,
    AnnotatedSource,
    AnnotationError,
    clip_box,
    known_files,
    problems_error,
    size_problem,
)
from image_data.layouts.layout import Layout, describe_folder, layout_error
from image_data.sources import Row, RowSource
from image_data.uri import DataUri, FileInfo, Files, some

__all__ = ["COCO_LAYOUTS", "compress_counts"]

_PARTS = {"train": "train2017", "val": "none", "test": "val2017"}
_Size = tuple[int, int]


def _open_coco(uri: DataUri, files: Files) -> dict[str, RowSource]:
    sources: dict[str, RowSource] = {}
    opened: dict[str, list[AnnotatedSource]] = {}
    for split, standard in _PARTS.items():
        part = uri.query.get(split, standard)
        if part == "none" and split != "train":
            continue
        json_name, folder = _places(uri, split, part)
        path = posixpath.join(files.root, json_name)
        if not files.exists(path) or files.is_dir(path):
            raise layout_error(_COCO, uri, f"there is no file {json_name} (found: {describe_folder(files)}).")
        known = known_files(_COCO, uri, files, folder)
        listed = [(json_name, files.info(path)), *known.items()]
        earlier = tuple(opened.setdefault(folder, []))
        source = AnnotatedSource(files, listed, partial(_load, uri, files, json_name, folder, known, earlier))
        opened[folder].append(source)
        sources[split] = source
    return sources


def _places(uri: DataUri, split: str, part: str) -> tuple[str, str]:
    """Annotation file and folder of images of a part, relative to the layout's folder."""
    json_name, comma, folder = part.partition(",")
    if not comma:
        json_name, folder = f"annotations/instances_{part}.json", part
    folder = folder.strip("/")
    if not json_name.endswith(".json") or not folder:
        raise DataError(
            f"{uri.text}: {split}={part}: give a part's name, such as train2017, or an annotation file and a folder of "
            f"images, both relative to DIR, such as {split}=labels.json,images"
            + (", or none." if split != "train" else ".")
        )
    return json_name, folder


def _load(
    uri: DataUri,
    files: Files,
    json_name: str,
    folder: str,
    known: dict[str, FileInfo],
    earlier: Sequence[AnnotatedSource],
) -> Annotated:
    """Reads one annotation file, and refuses an image that an earlier split of the same folder has."""
    fail = partial(_fail, uri, json_name)
    content = _read_json(files, json_name, fail)
    sizes, numbers = _images(content["images"], folder, fail)
    names = list(sizes)
    shared = {name for source in earlier for name in source.annotated().names} & set(names)
    if shared:
        raise fail(f"{len(shared)} of its images are in another split's file too: {some(sorted(shared), 5)}.")
    if not any(name in known for name in names):
        raise layout_error(_COCO, uri, f"none of the {len(names)} images of {json_name} is there: {names[0]}.")
    objects: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    left_out = _fill_objects(uri, json_name, content, {n: (name, sizes[name]) for n, name in numbers.items()}, objects)
    encoded = [json.dumps(objects.pop(name), separators=(",", ":")).encode() for name in names]

    def finish(row: Row) -> Row:
        problem = size_problem(row.data, sizes[names[row.position]], json_name)
        return Row(row.position, row.data, {"objects": encoded[row.position]}, problem)

    notes = "".join(f", without {count} objects of {why}" for why, count in left_out.items())
    return Annotated(names, [known.get(name) for name in names], finish, origin=f"from {json_name}{notes}")


def _fail(uri: DataUri, json_name: str, what: str) -> DataError:
    return layout_error(_COCO, uri, f"{json_name}: {what}")


def _read_json(files: Files, json_name: str, fail: Callable[[str], DataError]) -> dict[str, list[dict[str, Any]]]:
    try:
        content = json.loads(files.read(posixpath.join(files.root, json_name)))
    except ValueError as error:  # of JSON or of UTF-8
        raise fail(f"it is not JSON ({error}).") from error
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise fail(f"it has no list {key!r} of objects.")
    return content


def _images(
    entries: Iterable[dict[str, Any]], folder: str, fail: Callable[[str], DataError]
) -> tuple[dict[str, _Size], dict[int, str]]:
    """Name of the image file -> (width, height), and number of the image -> name, in the order of the numbers."""
    sizes: dict[str, _Size] = {}
    numbers: dict[int, str] = {}
    for entry in entries:
        number, file, width, height = (entry.get(key) for key in ("id", "file_name", "width", "height"))
        if not isinstance(file, str) or not isinstance(number, int):
            raise fail(f"the image {entry} needs a number 'id' and a text 'file_name'.")
        if not (isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0):
            raise fail(f"the image {file} has the size {width} x {height}.")
        name = posixpath.normpath(f"{folder}/{file}")
        if name in sizes or number in numbers:
            raise fail(f"the image {file} or its number {number} is listed twice.")
        sizes[name], numbers[number] = (width, height), name
    if not sizes:
        raise fail("it lists no image.")
    numbers = dict(sorted(numbers.items()))
    return {name: sizes[name] for name in numbers.values()}, numbers


def _fill_objects(
    uri: DataUri,
    json_name: str,
    content: dict[str, list[dict[str, Any]]],
    images: dict[int, tuple[str, _Size]],
    objects: dict[str, list[dict[str, Any]]],
) -> Counter[str]:
    """Adds every annotation to its image's objects; returns how many were left out, by reason."""
    classes = {entry.get("id"): entry.get("name") for entry in content["categories"]}
    if len(classes) < len(content["categories"]) or len(set(classes.values())) < len(classes) or None in classes:
        raise _fail(uri, json_name, "its categories need an 'id' and a 'name' each, no two the same.")
    left_out: Counter[str] = Counter()
    problems: list[tuple[str, str]] = []
    seen: set[Any] = set()
    for entry in content["annotations"]:
        number = entry.get("id")
        name, size = images.get(entry.get("image_id", -1), ("", (0, 0)))
        try:
            if not name:
                raise AnnotationError(f"there is no image with the id {entry.get('image_id')}")
            if number in seen:
                raise AnnotationError("there are two annotations with this id")
            seen.add(number)
            made = _object(entry, classes, size)
        except AnnotationError as error:
            problems.append((f"annotation {number} of {name or 'no image'}", str(error)))
            continue
        if isinstance(made, str):
            left_out[made] += 1
        else:
            objects[name].append(made)
    if problems:
        raise problems_error(_COCO, uri, f"{json_name}: {len(problems)} annotations are malformed", problems)
    return left_out


def _object(entry: dict[str, Any], classes: dict[Any, Any], size: _Size) -> dict[str, Any] | str:
    """One object, or why it is left out: its box or its mask is empty, as a few of COCO's own are.

    detectron2 leaves the same ones out: polygons of less than three points in ``load_coco_json``, empty boxes in
    ``filter_empty_instances``.
    """
    number, box, area = entry.get("category_id"), entry.get("bbox"), entry.get("area")
    if number not in classes:
        raise AnnotationError(f"category_id {number} is not among the categories")
    if not isinstance(box, list) or len(box) != 4 or not _are_numbers(box):
        raise AnnotationError(f"bbox is {box}, not four numbers x, y, width, height")
    if box[2] == 0 or box[3] == 0:
        return "an empty box"
    made: dict[str, Any] = {
        "box": clip_box((box[0], box[1], box[0] + box[2], box[1] + box[3]), size),
        "class": classes[number],
        "id": number,
        "difficult": False,
        "crowd": bool(entry.get("iscrowd", 0)),
        "area": area if area is not None and _are_numbers([area]) else box[2] * box[3],
    }
    segmentation = entry.get("segmentation")
    if segmentation:
        mask = _mask(segmentation, size)
        if not mask:
            return "a mask of less than three points"
        made["mask"] = mask
    return made


def _are_numbers(values: Sequence[Any]) -> bool:
    """Whether all are finite numbers; without a loop of Python's, as COCO's polygons have tens of millions."""
    return {*map(type, values)} <= {int, float} and math.isfinite(sum(values))


def _mask(segmentation: Any, size: _Size) -> Any:
    """Polygons of three points or more, or run lengths as text; empty where no polygon is left."""
    width, height = size
    if isinstance(segmentation, list):
        if not all(isinstance(polygon, list) and _are_numbers(polygon) for polygon in segmentation):
            raise AnnotationError("segmentation is not a list of polygons, each a list of numbers")
        return [polygon for polygon in segmentation if len(polygon) % 2 == 0 and len(polygon) >= 6]
    counts = segmentation.get("counts") if isinstance(segmentation, dict) else None
    if not isinstance(counts, (list, str)):
        raise AnnotationError("segmentation is neither a list of polygons nor run lengths {size, counts}")
    if segmentation.get("size") != [height, width]:
        raise AnnotationError(f"the mask has the size {segmentation.get('size')}, its image [{height}, {width}]")
    if isinstance(counts, list):
        if not all(isinstance(run, int) and run >= 0 for run in counts) or sum(counts) != width * height:
            raise AnnotationError(f"the mask's run lengths do not add up to {width} x {height} pixels")
        counts = compress_counts(counts)
    return {"size": [height, width], "counts": counts}


def compress_counts(counts: Sequence[int]) -> str:
    """Run lengths in COCO's text form: each run from the fourth on as its difference to the one two before.

    A number is cut into groups of 5 bits, the lowest first, each with a sixth bit that says whether another group
    follows; plus 48 they are characters. The last group's highest bit is the number's sign (``rleToString`` of
    ``cocodataset/cocoapi: common/maskApi.c``).

    Args:
        counts: pixels of 0, of 1, of 0 and so on, column by column.
    """
    characters = []
    for place, run in enumerate(counts):
        left = run - counts[place - 2] if place > 2 else run
        more = True
        while more:
            group = left & 0x1F
            left >>= 5
            more = left != (-1 if group & 0x10 else 0)
            characters.append(chr(48 + (group | 0x20 if more else group)))
    return "".join(characters)


_COCO = Layout(
    name="coco",
    summary="COCO 2017: objects of 80 classes with boxes and masks; val2017 is test, val is taken from train",
    tree="""
DIR/annotations/instances_train2017.json     also instances_val2017.json
DIR/train2017/000000000009.jpg
DIR/val2017/000000000139.jpg
""",
    source="annotations_trainval2017.zip, train2017.zip and val2017.zip of cocodataset.org",
    open=_open_coco,
    options={
        "train": "train2017: the part to train on, annotations/instances_train2017.json with the images of train2017; "
        "or FILE.json,FOLDER of any data in COCO's format",
        "val": "none: likewise, for a validation set of its own",
        "test": "val2017: likewise; none takes test from train",
    },
)
COCO_LAYOUTS = {_COCO.name: _COCO}
