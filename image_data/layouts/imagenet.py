"""ImageNet-1k (ILSVRC 2012) as folders of classes, whole or as one of the two parts that studies of data size use.

Only names, sizes and times are read from the file system, never an image's header.
"""

from __future__ import annotations

import io
import posixpath
import re
from collections.abc import Sequence

import numpy as np

from image_data.contracts import DataError
from image_data.decode import IMAGE_EXTENSIONS
from image_data.layouts.layout import Layout, ListedSource, class_images, describe_folder, layout_error
from image_data.sources import RowSource
from image_data.splits import seeded_order
from image_data.subset import SubsetConfig, choose_images
from image_data.uri import DataUri, FileInfo, Files, some

__all__ = ["IMAGENET_LAYOUTS"]

_PARTS = ("10percent", "100")
_NUM_CLASSES = 100  # of ImageNet-100
_FLAT = re.compile(r"ILSVRC2012_val_([0-9]{8})\.")
_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"


def _open_imagenet(uri: DataUri, files: Files) -> dict[str, RowSource]:
    seed = _check_options(uri)
    for folder in ("train", "val"):
        if folder not in files.names():
            raise layout_error(_IMAGENET, uri, f"there is no folder {folder} (found: {describe_folder(files)}).")
    classes = _choose_classes(uri, files, seed)
    infos = class_images(_IMAGENET, uri, files, "train", classes)
    origin = "from the folder train"
    if len(classes) < len(_class_folders(files, "train")):
        origin += f", {len(classes)} classes ({'listed' if 'classes' in uri.query else f'seed {seed}'})"
    if uri.query.get("part") == "10percent":
        infos = _tenth(infos, seed)
        origin += f", a tenth of the images of every class (seed {seed})"
    train = ListedSource(uri, files, infos, [info.name for info in infos], _labels(infos), origin=origin)
    return {"train": train, "test": _open_val(uri, files, classes)}


def _check_options(uri: DataUri) -> int:
    """The seed; refuses values that the options do not have, and combinations without effect."""
    part, seed = uri.query.get("part"), uri.query.get("seed", "0")
    if part is not None and part not in _PARTS:
        raise DataError(f"{uri.text}: part={part}: choose {' or '.join(_PARTS)}, or leave it out for all of ImageNet.")
    if not re.fullmatch(r"-?[0-9]+", seed):
        raise DataError(f"{uri.text}: seed={seed}: give a whole number.")
    if "seed" in uri.query and (part is None or (part == "100" and "classes" in uri.query)):
        raise DataError(f"{uri.text}: seed={seed} has no effect: nothing is drawn. Leave it out, or give part= alone.")
    return int(seed)


def _class_folders(files: Files, folder: str) -> list[str]:
    path = posixpath.join(files.root, folder)
    names = files.names(path)
    return [name for name in names if posixpath.splitext(name)[1].lower() not in IMAGE_EXTENSIONS]


def _choose_classes(uri: DataUri, files: Files, seed: int) -> list[str]:
    """The classes that both splits have, in order of their names."""
    present = _class_folders(files, "train")
    if not present:
        raise layout_error(_IMAGENET, uri, f"train holds no folders of classes (found: {describe_folder(files)}).")
    chosen = present
    if "classes" in uri.query:
        chosen = _listed_classes(uri, present)
    if uri.query.get("part") == "100":
        if len(chosen) < _NUM_CLASSES or ("classes" in uri.query and len(chosen) != _NUM_CLASSES):
            where = uri.query.get("classes", "train")
            raise DataError(
                f"{uri.text}: part=100 needs {_NUM_CLASSES} classes, {where} has {len(chosen)}. Leave part= out to use "
                "the classes of classes=FILE, whatever their number."
            )
        # The order of subset.num_classes, so that both ways to ask for 100 classes choose the same.
        chosen = [chosen[i] for i in seeded_order(chosen, seed, "subset_classes")[:_NUM_CLASSES]]
    return sorted(chosen)


def _listed_classes(uri: DataUri, present: Sequence[str]) -> list[str]:
    path = uri.query["classes"]
    files = Files(path)
    if not files.exists() or files.is_dir():
        raise DataError(f"{uri.text}: classes={path}: there is no such file; give one class (n01440764) per line.")
    words = [line.split() for line in files.read(files.root).decode("utf-8-sig").splitlines()]
    listed = list(dict.fromkeys(line[0] for line in words if line))  # some lists name the class after its number
    unknown = [name for name in listed if name not in set(present)]
    if not listed:
        raise DataError(f"{uri.text}: {path} lists no class; give one (n01440764) per line.")
    if unknown:
        raise DataError(f"{uri.text}: {path} lists {some(unknown, 5)}, which train has no folder for.")
    return listed


def _tenth(infos: Sequence[FileInfo], seed: int) -> list[FileInfo]:
    """A tenth of every class's images, rounded up, by the rule of subset.fraction: nested for equal seeds."""
    class_names = list(dict.fromkeys(_labels(infos)))
    numbers = {name: i for i, name in enumerate(class_names)}
    labels = np.array([numbers[label] for label in _labels(infos)], np.int64)
    config = SubsetConfig(fraction=0.1, seed=seed)
    chosen = choose_images([info.name for info in infos], labels, class_names, config)
    return [info for info, taken in zip(infos, chosen, strict=True) if taken]


def _labels(infos: Sequence[FileInfo]) -> list[str]:
    return [info.name.split("/", 1)[0] for info in infos]


def _open_val(uri: DataUri, files: Files, classes: Sequence[str]) -> ListedSource:
    """The 50,000 validation images, which every published number is reported on: here the split "test"."""
    if "devkit" not in uri.query and _class_folders(files, "val"):
        infos = class_images(_IMAGENET, uri, files, "val", classes)
        names, labels, origin = [info.name for info in infos], _labels(infos), "from the folder val"
        return ListedSource(uri, files, infos, names, labels, origin=origin)
    flat = [info for info in files.walk(posixpath.join(files.root, "val"))[0] if _FLAT.match(info.name)]
    if not flat:
        raise layout_error(_IMAGENET, uri, "val holds neither folders of classes nor ILSVRC2012_val_*.JPEG.")
    if "devkit" not in uri.query:
        raise layout_error(
            _IMAGENET,
            uri,
            f"val holds {len(flat)} images without folders of classes. Name the unpacked devkit, which holds their "
            "classes: ?devkit=ILSVRC2012_devkit_t12; or sort them into val/<class>/.",
        )
    truth = _ground_truth(uri)
    numbers = [int(match.group(1)) for info in flat if (match := _FLAT.match(info.name))]
    if max(numbers) > len(truth):
        raise DataError(f"{uri.text}: val has image {max(numbers)}, but {_TRUTH} has {len(truth)} lines.")
    wanted, labels = set(classes), [truth[number - 1] for number in numbers]
    rows = [(info, label) for info, label in zip(flat, labels, strict=True) if label in wanted]
    names = [f"{label}/{info.name}" for info, label in rows]  # as in the folder form
    own = [info for info, _ in rows]
    return ListedSource(uri, files, own, names, [label for _, label in rows], origin="from the folder val")


def _ground_truth(uri: DataUri) -> list[str]:
    """Class of every validation image, in order of their numbers."""
    import scipy.io

    devkit = Files(uri.query["devkit"])
    contents = []
    for name in (_TRUTH, "data/meta.mat"):
        path = posixpath.join(devkit.root, name)
        if not devkit.exists(path):
            raise layout_error(_IMAGENET, uri, f"devkit={uri.query['devkit']} has no file {name}.")
        contents.append(devkit.read(path))
    synsets = scipy.io.loadmat(io.BytesIO(contents[1]), squeeze_me=True)["synsets"]
    class_of = {int(number): str(wnid) for number, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
    numbers = [int(line) for line in contents[0].decode().split()]
    unknown = sorted(set(numbers) - set(class_of))
    if unknown:
        raise DataError(f"{uri.text}: {_TRUTH} has the classes {some(map(str, unknown), 5)}, which meta.mat has not.")
    return [class_of[number] for number in numbers]


_IMAGENET = Layout(
    name="imagenet",
    summary="ImageNet-1k: its 50,000 validation images are test, val is taken from train",
    tree="""
DIR/train/n01440764/n01440764_10026.JPEG     one folder per class
DIR/val/n01440764/ILSVRC2012_val_00000293.JPEG
                                             or DIR/val/ILSVRC2012_val_00000293.JPEG with ?devkit=DEVKIT, where
DEVKIT/data/ILSVRC2012_validation_ground_truth.txt and DEVKIT/data/meta.mat give the classes
""",
    source="ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz of image-net.org",
    open=_open_imagenet,
    options={
        "part": "10percent: a tenth of every class's training images; or 100: 100 whole classes",
        "classes": "FILE: only the classes that it names, one per line",
        "seed": "0: of what part= draws",
        "devkit": "FOLDER: the unpacked devkit, for a val without folders of classes",
    },
)
IMAGENET_LAYOUTS = {_IMAGENET.name: _IMAGENET}
