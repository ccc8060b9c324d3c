"""Pascal VOC 2007 and 2012: objects with boxes, from one XML file per image."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Sequence
from functools import partial
from typing import Any
from xml.etree import ElementTree

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
from image_data.layouts.layout import Layout, describe_folder, layout_error, read_text
from image_data.sources import Row, RowSource
from image_data.uri import DataUri, FileInfo, Files, map_ahead, some

__all__ = ["VOC_CLASSES", "VOC_LAYOUTS"]

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

_YEARS = ("2007", "2012")
_THREADS = {True: 8, False: 32}  # by "is local": many small files
_Size = tuple[int, int]


def _open_voc(uri: DataUri, files: Files) -> dict[str, RowSource]:
    years = _chosen_years(uri)
    if "VOCdevkit" in files.names():
        files = Files(posixpath.join(uri.path, "VOCdevkit"))
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    known: dict[str, FileInfo] = {}
    for year in years:
        folder = f"VOC{year}"
        if not files.is_dir(posixpath.join(files.root, folder)):
            raise layout_error(_VOC, uri, f"there is no folder {folder} (found: {describe_folder(files)}).")
        for part in ("train", "val", "test") if year == "2007" else ("train", "val"):
            lists[part] += [f"{folder}/JPEGImages/{name}.jpg" for name in _listed(uri, files, folder, part)]
        for own in ("JPEGImages", "Annotations"):
            known |= known_files(_VOC, uri, files, f"{folder}/{own}")
    _check_lists(uri, lists, known)
    return {part: _source(uri, files, names, known, part, years) for part, names in lists.items() if names}


def _chosen_years(uri: DataUri) -> list[str]:
    given = uri.query.get("years", "2007")
    years = given.split(",")
    if not set(years) <= set(_YEARS) or len(set(years)) != len(years):
        raise DataError(f"{uri.text}: years={given}: choose 2007 or 2012 or 2007,2012.")
    return sorted(years)


def _listed(uri: DataUri, files: Files, folder: str, part: str) -> list[str]:
    """Names of the images in one list, without .jpg."""
    path = f"{folder}/ImageSets/Main/{part}.txt"
    names = [line.strip() for line in read_text(_VOC, uri, files, path).splitlines() if line.strip()]
    if not names:
        raise layout_error(_VOC, uri, f"{path} lists no image.")
    strange = [name for name in names if len(name.split()) > 1]
    if strange:
        raise layout_error(_VOC, uri, f"{path}: {strange[0]!r} is not the name of one image.")
    return names


def _check_lists(uri: DataUri, lists: dict[str, list[str]], known: dict[str, FileInfo]) -> None:
    """Every image is listed once, and has its annotations."""
    home: dict[str, str] = {}
    for part, names in lists.items():
        for name in names:
            if name in home:
                where = f"twice in {part}.txt" if home[name] == part else f"in {home[name]}.txt and in {part}.txt"
                raise layout_error(_VOC, uri, f"{name} is listed {where}.")
            home[name] = part
    lacking = [xml for name in home if (xml := _annotation_of(name)) not in known]
    if lacking:
        raise layout_error(_VOC, uri, f"{len(lacking)} annotation files are missing: {some(lacking, 5)}.")
    if not any(name in known for name in home):
        raise layout_error(_VOC, uri, f"none of the {len(home)} listed images is there: {some(home, 1)}.")


def _annotation_of(image: str) -> str:
    folder, name = image.split("/JPEGImages/")
    return f"{folder}/Annotations/{name.removesuffix('.jpg')}.xml"


def _source(
    uri: DataUri, files: Files, names: Sequence[str], known: dict[str, FileInfo], part: str, years: Sequence[str]
) -> AnnotatedSource:
    listed = [(name, known.get(name)) for name in (*names, *map(_annotation_of, names))]
    of_years = " and ".join(f"VOC{year}" for year in years if part != "test" or year == "2007")
    origin = f"from the list {part}.txt of {of_years}"
    return AnnotatedSource(files, listed, partial(_load, uri, files, names, known, origin))


def _load(uri: DataUri, files: Files, names: Sequence[str], known: dict[str, FileInfo], origin: str) -> Annotated:
    """Reads the annotation files of some images, in threads."""

    def read(name: str) -> tuple[_Size, bytes] | str:
        try:
            size, objects = _parse(files.read(known[_annotation_of(name)].path))
        except AnnotationError as error:
            return str(error)
        return size, json.dumps(objects, separators=(",", ":")).encode()

    threads = _THREADS[files.is_local]
    found: list[tuple[_Size, bytes]] = []
    problems: list[tuple[str, str]] = []
    for name, result in zip(names, map_ahead(read, names, threads, 4 * threads), strict=True):
        if isinstance(result, str):
            problems.append((_annotation_of(name), result))
        else:
            found.append(result)
    if problems:
        raise problems_error(_VOC, uri, f"{len(problems)} annotation files are malformed", problems)

    def finish(row: Row) -> Row:
        size, objects = found[row.position]
        problem = size_problem(row.data, size, _annotation_of(names[row.position]))
        return Row(row.position, row.data, {"objects": objects}, problem)

    return Annotated(names, [known.get(name) for name in names], finish, origin=origin)


def _parse(data: bytes) -> tuple[_Size, list[dict[str, Any]]]:
    """Size of the image, and its objects with boxes in continuous coordinates.

    VOC counts pixels from 1 and includes the last one, so that a box over the whole image is (1, 1, width, height):
    without its first coordinates' 1 it is in the coordinates in which pixel i covers [i, i + 1), as detectron2's
    ``load_voc_instances`` has it. A few boxes of 2011 have fractions.

    Raises:
        AnnotationError: not XML, something missing, an unknown class or an impossible box.
    """
    try:
        tree = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise AnnotationError(f"it is not XML ({error})") from error
    width, height = (_number(tree, f"size/{side}") for side in ("width", "height"))
    if not (width >= 1 and height >= 1 and width == int(width) and height == int(height)):
        raise AnnotationError(f"the image's size is {width:g} x {height:g}")
    size = (int(width), int(height))
    return size, [_object(entry, number, size) for number, entry in enumerate(tree.findall("object"), 1)]


def _object(entry: ElementTree.Element, number: int, size: _Size) -> dict[str, Any]:
    """One object; its parts (head, hands) have boxes of their own, which are not read."""
    name = (entry.findtext("name") or "").strip()
    if name not in VOC_CLASSES:
        raise AnnotationError(f"object {number} has the unknown class {name!r}; VOC's are {', '.join(VOC_CLASSES)}")
    x0, y0, x1, y1 = (_number(entry, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
    try:
        box = clip_box((x0 - 1, y0 - 1, x1, y1), size)
    except AnnotationError as error:
        raise AnnotationError(f"object {number} ({name}): {error}") from error
    return {
        "box": box,
        "class": name,
        "difficult": (entry.findtext("difficult") or "0").strip() == "1",
        "crowd": False,
        "area": (box[2] - box[0]) * (box[3] - box[1]),
    }


def _number(element: ElementTree.Element, path: str) -> float:
    text = (element.findtext(path) or "").strip()
    try:
        number = float(text)
    except ValueError:
        raise AnnotationError(f"<{path.replace('/', '><')}> is {text!r}, not a number") from None
    return int(number) if number.is_integer() else number


_VOC = Layout(
    name="voc",
    summary="Pascal VOC: objects of 20 classes with boxes; train and val of the years, test of 2007",
    tree="""
DIR/VOC2007/JPEGImages/000005.jpg          DIR is VOCdevkit, or the folder that holds it
DIR/VOC2007/Annotations/000005.xml
DIR/VOC2007/ImageSets/Main/train.txt       lines 000005; also val.txt, and test.txt of VOCtest_06-Nov-2007.tar
DIR/VOC2012/...                            with years=2012 or years=2007,2012: the same, without test.txt
""",
    source="host.robots.ox.ac.uk/pascal/VOC",
    open=_open_voc,
    options={
        "years": "2007: or 2012, or 2007,2012; 2012 has no test images, so that alone its test is taken from train"
    },
)
VOC_LAYOUTS = {_VOC.name: _VOC}
