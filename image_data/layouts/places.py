"""Places365-Standard, as folders of classes or with the file lists of its authors."""

from __future__ import annotations

import posixpath

from image_data.layouts.layout import (
    Layout,
    ListedSource,
    class_images,
    describe_folder,
    find_images,
    layout_error,
    read_text,
)
from image_data.sources import RowSource
from image_data.uri import DataUri, Files, some

__all__ = ["PLACES_LAYOUTS"]

_CATEGORIES = "categories_places365.txt"
_LISTS = {"train": "places365_train_standard.txt", "test": "places365_val.txt"}
# Where the archives of 256 x 256 and of large images unpack to, and how torchvision then renames the first.
_IMAGES = {
    "train": ("data_256", "data_256_standard", "data_large", "data_large_standard"),
    "test": ("val_256", "val_large"),
}


def _open_places(uri: DataUri, files: Files) -> dict[str, RowSource]:
    found = set(files.names())
    if _CATEGORIES in found:
        return _open_lists(uri, files, found)
    if not {"train", "val"} <= found:
        raise layout_error(
            _PLACES, uri, f"neither {_CATEGORIES} nor the folders train and val (found: {describe_folder(files)})."
        )
    classes = {folder: files.names(posixpath.join(files.root, folder)) for folder in ("train", "val")}
    alone = sorted(set(classes["train"]) ^ set(classes["val"]))
    if alone:
        raise layout_error(_PLACES, uri, f"not in both of train and val: the classes {some(alone, 5)}.")
    sources: dict[str, RowSource] = {}
    for folder, split in (("train", "train"), ("val", "test")):
        infos = class_images(_PLACES, uri, files, folder, classes[folder])
        labels = [info.name.split("/", 1)[0] for info in infos]
        names = [info.name for info in infos]
        sources[split] = ListedSource(uri, files, infos, names, labels, origin=f"from the folder {folder}")
    return sources


def _open_lists(uri: DataUri, files: Files, found: set[str]) -> dict[str, RowSource]:
    """The form of the file lists: lines <image> <number of its class>."""
    # "/b/bus_station/indoor" is the folder "bus_station-indoor" of the other form.
    rows = _rows(uri, files, _CATEGORIES)
    class_names = [name.split("/", 2)[-1].replace("/", "-") for name, _ in rows]
    if [number for _, number in rows] != list(range(len(rows))):
        raise layout_error(_PLACES, uri, f"{_CATEGORIES} does not number its classes 0, 1, 2 ...")
    sources: dict[str, RowSource] = {}
    for split, name in _LISTS.items():
        rows = _rows(uri, files, name)
        folder = next((folder for folder in _IMAGES[split] if folder in found), None)
        if folder is None:
            raise layout_error(_PLACES, uri, f"none of the folders {', '.join(_IMAGES[split])} is there.")
        names = [image.lstrip("/") for image, _ in rows]
        labels = [number for _, number in rows]
        infos = find_images(files, [f"{folder}/{image}" for image in names])
        if not any(infos):
            raise layout_error(_PLACES, uri, f"none of the images that {name} lists is in {folder}/, e.g. {names[0]}.")
        origin = f"from the list {name}"
        sources[split] = ListedSource(uri, files, infos, names, labels, class_names=class_names, origin=origin)
    return sources


def _rows(uri: DataUri, files: Files, name: str) -> list[tuple[str, int]]:
    rows = []
    for number, line in enumerate(read_text(_PLACES, uri, files, name).splitlines(), 1):
        words = line.split()
        if len(words) == 2 and words[1].isdecimal():
            rows.append((words[0], int(words[1])))
        elif words:
            raise layout_error(_PLACES, uri, f"line {number} of {name} must be a name and a number; it is {line!r}.")
    if not rows:
        raise layout_error(_PLACES, uri, f"{name} is empty.")
    return rows


_PLACES = Layout(
    name="places",
    summary="Places365-Standard: 365 scenes; its validation images are test, val is taken from train",
    tree="""
either the "easy format":
  DIR/train/airfield/00000001.jpg     one folder per class
  DIR/val/airfield/Places365_val_00000435.jpg
or the file lists:
  DIR/categories_places365.txt        lines /a/airfield 0
  DIR/places365_train_standard.txt    lines /a/airfield/00000001.jpg 0
  DIR/places365_val.txt               lines Places365_val_00000001.jpg 165
  DIR/data_256/a/airfield/00000001.jpg     or data_256_standard, data_large, data_large_standard
  DIR/val_256/Places365_val_00000001.jpg   or val_large
""",
    source="places2.csail.mit.edu/download.html, CSAILVision/places365",
    open=_open_places,
)
PLACES_LAYOUTS = {_PLACES.name: _PLACES}
