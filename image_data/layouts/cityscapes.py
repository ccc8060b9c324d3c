"""Cityscapes: street scenes with a class per pixel, of which 19 are trained on."""

from __future__ import annotations

import io
import posixpath
from collections.abc import Sequence
from functools import partial

import numpy as np
from PIL import Image

from image_data.layouts.annotated import (
    PICTURE_ERRORS,
    Annotated,
    AnnotatedSource,
    AnnotationError,
    known_files,
    size_problem,
)
from image_data.layouts.layout import Layout, describe_folder, layout_error
from image_data.sources import Row, RowSource
from image_data.uri import DataUri, FileInfo, Files, some

__all__ = ["CITYSCAPES_CLASSES", "CITYSCAPES_IGNORE", "CITYSCAPES_LAYOUTS"]

CITYSCAPES_CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
CITYSCAPES_IGNORE = 255  # pixels of other classes and of none

# Label ids of the 19 classes, in their order; the others of 0 to 33 are ignored in training and evaluation.
_LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_NUM_LABEL_IDS = 34
_IMAGE, _PARTS = "_leftImg8bit.png", {"train": "train", "val": "test"}  # the true test labels are not public
# Suffix of the mask -> how its values become train ids; the first that is there counts. Users write the second kind
# with createTrainIdLabelImgs.py, and may have changed its table.
_MASKS = ("_gtFine_labelIds.png", "_gtFine_labelTrainIds.png")


def _train_ids(suffix: str) -> np.ndarray:
    """int16 (256,): value in the file -> train id; -1 for a value that no label has."""
    table = np.full(256, -1, np.int16)
    if suffix == _MASKS[0]:
        table[:_NUM_LABEL_IDS] = CITYSCAPES_IGNORE
        table[list(_LABEL_IDS)] = np.arange(len(_LABEL_IDS))
    else:
        table[: len(CITYSCAPES_CLASSES)] = np.arange(len(CITYSCAPES_CLASSES))
        table[CITYSCAPES_IGNORE] = CITYSCAPES_IGNORE
    return table


def _open_cityscapes(uri: DataUri, files: Files) -> dict[str, RowSource]:
    for folder in ("leftImg8bit", "gtFine"):
        if not files.is_dir(posixpath.join(files.root, folder)):
            raise layout_error(_CITYSCAPES, uri, f"there is no folder {folder} (found: {describe_folder(files)}).")
    return {split: _source(uri, files, part) for part, split in _PARTS.items()}


def _source(uri: DataUri, files: Files, part: str) -> AnnotatedSource:
    """The images of one part, each with the file of its mask."""
    folder = f"leftImg8bit/{part}"
    known = known_files(_CITYSCAPES, uri, files, folder)
    images = sorted(name for name in known if name.endswith(_IMAGE))
    if not images:
        raise layout_error(_CITYSCAPES, uri, f"no *{_IMAGE} in {folder} (found: {some(known, 5) or 'nothing'}).")
    loose = [name for name in images if name.count("/") != 3]
    if loose:
        raise layout_error(_CITYSCAPES, uri, f"not in the folder of a city: {some(loose, 5)}.")
    labels = known_files(_CITYSCAPES, uri, files, f"gtFine/{part}")
    masks = [_mask_of(name, labels) for name in images]
    lacking = [_stem(name) + _MASKS[0] for name, mask in zip(images, masks, strict=True) if mask is None]
    if lacking:
        raise layout_error(_CITYSCAPES, uri, f"{len(lacking)} masks are missing: {some(lacking, 5)}.")
    stems = {_stem(name) for name in images}
    alone = sorted(name for name in labels if name.endswith(_MASKS[0]) and name.removesuffix(_MASKS[0]) not in stems)
    if alone:
        raise layout_error(_CITYSCAPES, uri, f"{len(alone)} masks are without an image: {some(alone, 5)}.")
    found = [mask for mask in masks if mask is not None]
    infos = [known[name] for name in images]
    listed = [(info.name, info) for info in (*infos, *found)]
    return AnnotatedSource(files, listed, partial(_load, files, infos, found, f"from {folder}"))


def _stem(image: str) -> str:
    """gtFine/train/aachen/aachen_000000_000019 of an image."""
    return "gtFine" + image.removeprefix("leftImg8bit").removesuffix(_IMAGE)


def _mask_of(image: str, labels: dict[str, FileInfo]) -> FileInfo | None:
    return next((labels[_stem(image) + suffix] for suffix in _MASKS if _stem(image) + suffix in labels), None)


def _load(files: Files, infos: Sequence[FileInfo], masks: Sequence[FileInfo], origin: str) -> Annotated:
    def finish(row: Row) -> Row:
        mask = masks[row.position]
        try:
            extra = {"mask": _convert(row.data, files.read(mask.path), mask.name), "mask_kind": "cityscapes"}
        except (AnnotationError, *PICTURE_ERRORS) as error:
            return Row(row.position, row.data, error=f"{mask.name}: {error}")
        return Row(row.position, row.data, extra)

    names = [info.name for info in infos]
    # A city's images are alike: one that is in train and in val would make val's numbers too good.
    return Annotated(names, infos, finish, groups=[name.split("/")[2] for name in names], origin=origin)


def _convert(image: bytes, mask: bytes, name: str) -> bytes:
    """A mask with train ids, as PNG of 8-bit gray.

    Raises:
        AnnotationError: it is not of 8 bits, not of the image's size, or has a value that no label has.
    """
    with Image.open(io.BytesIO(mask)) as picture:
        if picture.mode not in ("L", "P"):
            raise AnnotationError(f"the mask is not 8-bit gray but {picture.mode}")
        values = np.asarray(picture)
    problem = size_problem(image, (values.shape[1], values.shape[0]), "its mask")
    if problem:
        raise AnnotationError(problem)
    table = _train_ids(next(suffix for suffix in _MASKS if name.endswith(suffix)))
    train_ids = table[values]
    if (train_ids < 0).any():
        strange = np.unique(values[train_ids < 0]).tolist()
        allowed = [int(value) for value in np.flatnonzero(table >= 0)]
        raise AnnotationError(
            f"the mask has the values {some(map(str, strange), 5)}; labels are {allowed[0]} to {allowed[-1]}"
        )
    buffer = io.BytesIO()
    Image.fromarray(train_ids.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


_CITYSCAPES = Layout(
    name="cityscapes",
    summary="Cityscapes: a class per pixel, 19 of them; its validation cities are test, val is cities of train",
    tree="""
DIR/leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png
DIR/leftImg8bit/val/frankfurt/...
DIR/gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png      or ..._gtFine_labelTrainIds.png
DIR/gtFine/val/frankfurt/...
""",
    source="leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of cityscapes-dataset.com; label ids of "
    "mcordts/cityscapesScripts, cityscapesscripts/helpers/labels.py",
    open=_open_cityscapes,
)
CITYSCAPES_LAYOUTS = {_CITYSCAPES.name: _CITYSCAPES}
