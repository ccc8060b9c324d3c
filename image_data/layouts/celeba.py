"""CelebA, aligned and cropped: identities as classes, five landmarks as a further target; and MAFL, a part of it."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Sequence

import numpy as np

from image_data.contracts import DataError
from image_data.layouts.layout import Layout, ListedSource, describe_folder, find_images, layout_error, read_text
from image_data.sources import RowSource
from image_data.uri import DataUri, Files, some

__all__ = ["CELEBA_LAYOUTS"]

_PARTITION, _IDENTITY = "list_eval_partition.txt", "identity_CelebA.txt"
_LANDMARKS = "list_landmarks_align_celeba.txt"
_POINTS = ["lefteye", "righteye", "nose", "leftmouth", "rightmouth"]
_HEADER = [f"{point}_{axis}" for point in _POINTS for axis in "xy"]
# As downloaded in one folder (torchvision), or in the folders of the authors' archive.
_FOLDERS = ("", "Anno", "Eval")
_IMAGES = ("img_align_celeba", "Img/img_align_celeba")
_MAFL_LISTS, _MAFL_FOLDERS = ("training.txt", "testing.txt"), ("MAFL", "")
# Identities are disjoint between the three partitions, so with them as labels only the first one has base classes.
_SPLITS = {
    "identity": {0: "train", 1: "val_classes", 2: "novel_classes"},
    "none": {0: "train", 1: "val", 2: "test"},
}


def _open_celeba(uri: DataUri, files: Files) -> dict[str, RowSource]:
    labels_by = uri.query.get("labels", "identity")
    if labels_by not in _SPLITS:
        raise DataError(f"{uri.text}: labels={labels_by}: choose {' or '.join(_SPLITS)}.")
    partition = {name: int(values[0]) for name, values in _table(_CELEBA, uri, files, _PARTITION, 1).items()}
    strange = sorted(set(partition.values()) - {0, 1, 2})
    if strange:
        raise layout_error(_CELEBA, uri, f"{_PARTITION} has the partitions {strange}; there are 0, 1 and 2.")
    points = _table(_CELEBA, uri, files, _LANDMARKS, len(_HEADER), header=_HEADER)
    identity = _identities(uri, files, partition) if labels_by == "identity" else dict.fromkeys(partition, "face")
    for what, known in ((_LANDMARKS, points), (_IDENTITY, identity)):
        lacking = [name for name in partition if name not in known]
        if lacking:
            raise layout_error(_CELEBA, uri, f"{what} lacks {len(lacking)} images: {some(lacking, 5)}.")
    excluded = _excluded(uri, partition)
    without = f" without {uri.query['exclude']}" if "exclude" in uri.query else ""
    sources: dict[str, RowSource] = {}
    for number, split in _SPLITS[labels_by].items():
        names = [name for name, own in partition.items() if own == number and name not in excluded]
        if names:
            labels = [identity[name] for name in names]
            origin = f"partition {number} of {_PARTITION}{without}"
            sources[split] = _source(_CELEBA, uri, files, names, labels, points, origin)
    return sources


def _open_mafl(uri: DataUri, files: Files) -> dict[str, RowSource]:
    share = _val_share(uri)
    points = _table(_MAFL, uri, files, _LANDMARKS, len(_HEADER), header=_HEADER)
    training, testing = (_mafl_list(uri, files, name, points) for name in _MAFL_LISTS)
    both = sorted(training & testing)
    if both:
        raise layout_error(_MAFL, uri, f"{len(both)} images are in training.txt and in testing.txt: {some(both, 5)}.")
    # In CelebA's order, whatever that of the list, as the validation images of IMM are.
    train = [name for name in points if name in training]
    num_val = round(share * len(train))
    parts = {
        "train": (train[: len(train) - num_val], "from the list training.txt of MAFL"),
        "val": (train[len(train) - num_val :], f"the last {num_val} of training.txt"),
        "test": ([name for name in points if name in testing], "from the list testing.txt of MAFL"),
    }
    if not parts["train"][0]:
        raise DataError(f"{uri.text}: val={share:g} leaves none of the {len(train)} images to train on.")
    return {
        split: _source(_MAFL, uri, files, names, ["face"] * len(names), points, origin)
        for split, (names, origin) in parts.items()
        if names
    }


def _val_share(uri: DataUri) -> float:
    text = uri.query.get("val", "0.1")
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise DataError(f"{uri.text}: val={text}: give a share from 0 to less than 1 of training.txt.")
    return share


def _mafl_list(uri: DataUri, files: Files, name: str, points: dict[str, list[str]]) -> set[str]:
    """The images of one list."""
    folder = next((f for f in _MAFL_FOLDERS if files.exists(posixpath.join(files.root, f, name))), _MAFL_FOLDERS[0])
    path = posixpath.join(folder, name)
    listed = [line.strip() for line in read_text(_MAFL, uri, files, path).splitlines() if line.strip()]
    if not listed:
        raise layout_error(_MAFL, uri, f"{path} lists no image.")
    unknown = [image for image in listed if image not in points]
    if unknown:
        raise layout_error(
            _MAFL, uri, f"{path} lists {len(unknown)} images that {_LANDMARKS} lacks: {some(unknown, 5)}."
        )
    if len(set(listed)) < len(listed):
        twice = [image for image, count in Counter(listed).items() if count > 1]
        raise layout_error(_MAFL, uri, f"{path} lists twice: {some(twice, 5)}.")
    return set(listed)


def _source(
    layout: Layout,
    uri: DataUri,
    files: Files,
    names: Sequence[str],
    labels: Sequence[str],
    points: dict[str, list[str]],
    origin: str,
) -> ListedSource:
    """One part, with the landmarks in pixels and in the form of ``rendered:``'s, all of them visible."""
    folder = next((folder for folder in _IMAGES if files.is_dir(posixpath.join(files.root, folder))), None)
    if folder is None:
        raise layout_error(layout, uri, f"there is no folder img_align_celeba (found: {describe_folder(files)}).")
    infos = find_images(files, [f"{folder}/{name}" for name in names])
    if not any(infos):
        raise layout_error(layout, uri, f"none of the {len(names)} listed images is in {folder}/, e.g. {names[0]}.")
    landmarks = np.ones((len(names), len(_POINTS), 3), np.float32)
    landmarks[:, :, :2] = np.array([points[name] for name in names], np.float32).reshape(len(names), -1, 2)
    return ListedSource(uri, files, infos, names, labels, extra={"landmarks": landmarks}, origin=origin)


def _identities(uri: DataUri, files: Files, partition: dict[str, int]) -> dict[str, str]:
    """Identity of each image; no person may be in two partitions."""
    identity = {name: values[0] for name, values in _table(_CELEBA, uri, files, _IDENTITY, 1).items()}
    home: dict[str, int] = {}
    for name, number in partition.items():
        person = identity.get(name)
        if person is not None and home.setdefault(person, number) != number:
            raise layout_error(
                _CELEBA, uri, f"identity {person} is in the partitions {home[person]} and {number} ({name})."
            )
    return identity


def _table(
    layout: Layout, uri: DataUri, files: Files, name: str, width: int, header: list[str] | None = None
) -> dict[str, list[str]]:
    """Image -> whole numbers, from lines of words; before a header, the first line counts them."""
    folder = next((f for f in _FOLDERS if files.exists(posixpath.join(files.root, f, name))), "")
    lines = [line.split() for line in read_text(layout, uri, files, posixpath.join(folder, name)).splitlines()]
    if header is not None:
        if len(lines) < 2 or lines[1] != header:
            raise layout_error(layout, uri, f"the second line of {name} must be {' '.join(header)}.")
        lines = lines[2:]
    rows: dict[str, list[str]] = {}
    for words in lines:
        if not words:
            continue
        if len(words) != width + 1 or not all(word.removeprefix("-").isdecimal() for word in words[1:]):
            raise layout_error(layout, uri, f"{name}: {' '.join(words)!r} is not an image and {width} whole number(s).")
        if words[0] in rows:
            raise layout_error(layout, uri, f"{name} lists {words[0]} twice.")
        rows[words[0]] = words[1:]
    if not rows:
        raise layout_error(layout, uri, f"{name} lists no image.")
    return rows


def _excluded(uri: DataUri, partition: dict[str, int]) -> set[str]:
    """Images to leave out, such as those that landmarks are later tested on."""
    path = uri.query.get("exclude")
    if path is None:
        return set()
    files = Files(path)
    if not files.exists() or files.is_dir():
        raise DataError(f"{uri.text}: exclude={path}: there is no such file; give one image (000001.jpg) per line.")
    listed = {line.strip() for line in files.read(files.root).decode("utf-8-sig").splitlines() if line.strip()}
    unknown = sorted(listed - set(partition))
    if not listed:
        raise DataError(f"{uri.text}: {path} lists no image; give one (000001.jpg) per line, or leave exclude= out.")
    if unknown:
        raise DataError(f"{uri.text}: {path} lists {some(unknown, 5)}, which is not in {_PARTITION}.")
    return listed


_CELEBA = Layout(
    name="celeba",
    summary="CelebA, aligned: 8,192 identities to train on, 985 and 1,000 others held out; 5 landmarks",
    tree="""
DIR/img_align_celeba/000001.jpg           (or DIR/Img/img_align_celeba)
DIR/list_eval_partition.txt               (or DIR/Eval) lines 000001.jpg 0: 0 train, 1 validation, 2 test
DIR/identity_CelebA.txt                   (or DIR/Anno) lines 000001.jpg 2880
DIR/list_landmarks_align_celeba.txt       (or DIR/Anno) a line with the number of images, a line
    lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x leftmouth_y rightmouth_x rightmouth_y
                                          and lines 000001.jpg 69 109 106 113 77 142 73 152 108 154
""",
    source="mmlab.ie.cuhk.edu.hk/projects/CelebA.html; the file names are those of torchvision's CelebA too",
    open=_open_celeba,
    options={
        "labels": "identity: classes are people, and the held-out partitions are val_classes and novel_classes; or "
        "none: one class, and the partitions are train, val and test",
        "exclude": "FILE: images to leave out, one per line, such as MAFL/testing.txt",
    },
)
_MAFL = Layout(
    name="mafl",
    summary="MAFL: landmarks of 19,000 training images of CelebA, the last tenth of them val, and of 1,000 test images",
    tree="""
DIR/img_align_celeba/000001.jpg           (or DIR/Img/img_align_celeba)
DIR/list_landmarks_align_celeba.txt       (or DIR/Anno) as for celeba:
DIR/MAFL/training.txt                     (or DIR) lines 000001.jpg
DIR/MAFL/testing.txt                      (or DIR)
""",
    source="the lists of zhzhanp/TCDCN-face-alignment's MAFL; validation images as in tomasjakab/imm, "
    "imm/datasets/celeba_dataset.py",
    open=_open_mafl,
    options={
        "val": "0.1: share of training.txt, its last images, that is val; with 0 val is taken from train by the seeded "
        "rule, unless its share is 0"
    },
)
CELEBA_LAYOUTS = {_CELEBA.name: _CELEBA, _MAFL.name: _MAFL}
