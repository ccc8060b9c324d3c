"""The few-shot data sets: base, validation and novel classes as their authors' lists divide them.

What the papers call "val" and "test" are other classes than "train" has: here ``val_classes`` and ``novel_classes``.
The images of the base classes are then divided into train, val and test by the seeded rule (``image_split``): the
protocols ask for unseen images of base classes too, but no list of them was ever published.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from image_data.layouts.layout import (
    Layout,
    ListedSource,
    class_images,
    describe_folder,
    find_images,
    layout_error,
    list_images,
    read_text,
)
from image_data.sources import RowSource
from image_data.uri import DataUri, FileInfo, Files, some

__all__ = ["FEW_SHOT_LAYOUTS"]

# The authors' name of a part -> the split that it is here.
_PARTS = {"train": "train", "val": "val_classes", "test": "novel_classes"}


def _open_miniimagenet(uri: DataUri, files: Files) -> dict[str, RowSource]:
    lists = {part: _read_csv(uri, files, f"{part}.csv") for part in _PARTS}
    _check_disjoint(_MINIIMAGENET, uri, "image", {part: [name for name, _ in rows] for part, rows in lists.items()})
    _check_disjoint(_MINIIMAGENET, uri, "class", {part: [label for _, label in rows] for part, rows in lists.items()})
    if "images" not in files.names():
        raise layout_error(_MINIIMAGENET, uri, f"there is no folder images (found: {describe_folder(files)}).")
    sources: dict[str, RowSource] = {}
    for part, rows in lists.items():
        names, labels = [name for name, _ in rows], [label for _, label in rows]
        infos = find_images(files, [f"images/{name}" for name in names])
        if not any(infos):
            raise layout_error(
                _MINIIMAGENET,
                uri,
                f"none of the {len(names)} images that {part}.csv lists is in images/, e.g. {names[0]}.",
            )
        sources[_PARTS[part]] = ListedSource(uri, files, infos, names, labels, origin=f"from the list {part}.csv")
    return sources


def _read_csv(uri: DataUri, files: Files, name: str) -> list[tuple[str, str]]:
    """(image, class) rows of a list with the header ``filename,label``."""
    reader = csv.DictReader(io.StringIO(read_text(_MINIIMAGENET, uri, files, name)), skipinitialspace=True)
    columns = list(reader.fieldnames or [])
    if not {"filename", "label"} <= set(columns):
        raise layout_error(
            _MINIIMAGENET,
            uri,
            f"the first line of {name} must be filename,label; it is {','.join(columns) or 'empty'}.",
        )
    rows = [((row["filename"] or "").strip(), (row["label"] or "").strip()) for row in reader]
    if not rows:
        raise layout_error(_MINIIMAGENET, uri, f"{name} lists no image.")
    seen: set[str] = set()
    repeated = [image for image, _ in rows if image in seen or seen.add(image)]
    if repeated:
        raise layout_error(_MINIIMAGENET, uri, f"{name} lists images more than once: {some(repeated, 5)}.")
    return rows


def _check_disjoint(layout: Layout, uri: DataUri, what: str, parts: Mapping[str, Sequence[str]]) -> None:
    """Nothing of one part may be in another: the novel classes would not be novel."""
    home: dict[str, str] = {}
    for part, items in parts.items():
        leaked = [item for item in dict.fromkeys(items) if home.setdefault(item, part) != part]
        if leaked:
            raise layout_error(
                layout, uri, f"{len(leaked)} {what}(s) of {home[leaked[0]]} are in {part} too: {some(leaked, 5)}."
            )


_MINIIMAGENET = Layout(
    name="miniimagenet",
    summary="miniImageNet: 64 base, 16 validation and 20 novel classes, 600 images each",
    tree="""
DIR/images/n0153282900000005.jpg ...   all images in one folder
DIR/train.csv                          header filename,label, then n0153282900000005.jpg,n01532829
DIR/val.csv                            the same for the validation classes -> val_classes
DIR/test.csv                           the same for the novel classes      -> novel_classes
""",
    source="the lists of Ravi & Larochelle, twitter-research/meta-learning-lstm: data/miniImagenet",
    open=_open_miniimagenet,
)


def _open_tieredimagenet(uri: DataUri, files: Files) -> dict[str, RowSource]:
    pickles = [name for name in files.names() if name.endswith("_images_png.pkl")]
    if pickles:
        raise layout_error(
            _TIEREDIMAGENET,
            uri,
            f"{', '.join(pickles)}: pickles are not read; unpack their images to folders of classes.",
        )
    categories = {part: _read_categories(uri, files, f"{part}.csv") for part in _PARTS}
    _check_disjoint(_TIEREDIMAGENET, uri, "class", {part: list(rows) for part, rows in categories.items()})
    _check_disjoint(_TIEREDIMAGENET, uri, "category", {part: list(rows.values()) for part, rows in categories.items()})
    sources: dict[str, RowSource] = {}
    for part, category in categories.items():
        own, infos = _tiered_images(uri, files, part, list(category))
        labels = [info.name.split("/", 1)[0] for info in infos]
        coarse = [category[label] for label in labels]
        names = [info.name for info in infos]
        origin = f"from the list {part}.csv"
        sources[_PARTS[part]] = ListedSource(uri, own, infos, names, labels, coarse=coarse, origin=origin)
    return sources


def _read_categories(uri: DataUri, files: Files, name: str) -> dict[str, str]:
    """Class -> category, from lines ``n02099267,n02098550`` without a header."""
    category: dict[str, str] = {}
    for number, row in enumerate(csv.reader(io.StringIO(read_text(_TIEREDIMAGENET, uri, files, name))), 1):
        if not row:  # the original lists end in an empty line
            continue
        if len(row) != 2 or not all(cell.strip() for cell in row):
            raise layout_error(
                _TIEREDIMAGENET, uri, f"line {number} of {name} must be class,category; it is {','.join(row)!r}."
            )
        label, own = (cell.strip() for cell in row)
        if category.setdefault(label, own) != own:
            raise layout_error(_TIEREDIMAGENET, uri, f"{name} puts {label} into {category[label]} and into {own}.")
    if not category:
        raise layout_error(_TIEREDIMAGENET, uri, f"{name} lists no class.")
    return category


def _tiered_images(uri: DataUri, files: Files, part: str, classes: Sequence[str]) -> tuple[Files, list[FileInfo]]:
    """The images of a part's classes, named <class>/<image>, and what opens them."""
    outside = uri.query.get("images")
    if outside is None:
        infos = list_images(_TIEREDIMAGENET, uri, files, part)
        own, where = files, part
    else:  # ImageNet's own training folder, which holds the classes of all parts and others
        own, where = Files(outside), outside
        if not own.is_dir():
            raise layout_error(_TIEREDIMAGENET, uri, f"images={outside}: there is no such folder.")
        infos = class_images(_TIEREDIMAGENET, uri, own, "", classes)
    found = {info.name.split("/", 1)[0] for info in infos}
    missing = [label for label in classes if label not in found]
    if missing:
        raise layout_error(
            _TIEREDIMAGENET, uri, f"{where} has no images of {some(missing, 5)}, which {part}.csv lists."
        )
    strange = sorted(found - set(classes))
    if strange:
        raise layout_error(_TIEREDIMAGENET, uri, f"{part}/ holds {some(strange, 5)}, which {part}.csv does not list.")
    return own, infos


_TIEREDIMAGENET = Layout(
    name="tieredimagenet",
    summary="tieredImageNet: 351 base, 97 validation and 160 novel classes of 20, 6 and 8 categories (coarse labels)",
    tree="""
DIR/train.csv                 lines n02099267,n02098550: class, category
DIR/val.csv                   the same for the validation classes -> val_classes
DIR/test.csv                  the same for the novel classes      -> novel_classes
DIR/train/n02099267/*.jpg     one folder per class, likewise in val and test;
                              or all of them in ImageNet's training folder, named by ?images=IMAGENET/train
""",
    source="the lists of renmengye/few-shot-ssl-public: tiered_imagenet_split",
    open=_open_tieredimagenet,
    options={"images": "FOLDER: holds a folder for every class of all three lists"},
)


def _open_cifar_fs(uri: DataUri, files: Files) -> dict[str, RowSource]:
    classes: dict[str, list[str]] = {}
    for part in _PARTS:
        name = f"splits/bertinetto/{part}.txt"
        lines = [line.strip() for line in read_text(_CIFAR_FS, uri, files, name).splitlines()]
        classes[part] = [line for line in lines if line]
        if not classes[part]:
            raise layout_error(_CIFAR_FS, uri, f"{name} lists no class.")
    _check_disjoint(_CIFAR_FS, uri, "class", classes)
    if "data" not in files.names():
        raise layout_error(_CIFAR_FS, uri, f"there is no folder data (found: {describe_folder(files)}).")
    sources: dict[str, RowSource] = {}
    for part, own in classes.items():
        infos = class_images(_CIFAR_FS, uri, files, "data", own)
        names = [info.name for info in infos]
        labels = [name.split("/", 1)[0] for name in names]
        origin = f"from the list splits/bertinetto/{part}.txt"
        sources[_PARTS[part]] = ListedSource(uri, files, infos, names, labels, origin=origin)
    return sources


_CIFAR_FS = Layout(
    name="cifar_fs",
    summary="CIFAR-FS: 64 base, 16 validation and 20 novel classes of CIFAR-100, 600 images each",
    tree="""
DIR/data/apple/*.png                  one folder per class
DIR/splits/bertinetto/train.txt       one class per line
DIR/splits/bertinetto/val.txt         the validation classes -> val_classes
DIR/splits/bertinetto/test.txt        the novel classes      -> novel_classes
""",
    source="the archive of bertinetto/r2d2",
    open=_open_cifar_fs,
)

FEW_SHOT_LAYOUTS = {layout.name: layout for layout in (_MINIIMAGENET, _TIEREDIMAGENET, _CIFAR_FS)}
