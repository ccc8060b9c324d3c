"""CelebA, aligned and cropped: identities as classes, five landmarks as a further target."""

from __future__ import annotations

import posixpath
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
# Identities are disjoint between the three partitions, so with them as labels only the first one has base classes.
_SPLITS = {
    "identity": {0: "train", 1: "val_classes", 2: "novel_classes"},
    "none": {0: "train", 1: "val", 2: "test"},
}


def _open_celeba(uri: DataUri, files: Files) -> dict[str, RowSource]:
    labels_by = uri.query.get("labels", "identity")
    if labels_by not in _SPLITS:
        raise DataError(f"{uri.text}: labels={labels_by}: choose {' or '.join(_SPLITS)}.")
    partition = {name: int(values[0]) for name, values in _table(uri, files, _PARTITION, 1).items()}
    strange = sorted(set(partition.values()) - {0, 1, 2})
    if strange:
        raise layout_error(_CELEBA, uri, f"{_PARTITION} has the partitions {strange}; there are 0, 1 and 2.")
    points = _table(uri, files, _LANDMARKS, len(_HEADER), header=_HEADER)
    identity = _identities(uri, files, partition) if labels_by == "identity" else dict.fromkeys(partition, "face")
    for what, known in ((_LANDMARKS, points), (_IDENTITY, identity)):
        lacking = [name for name in partition if name not in known]
        if lacking:
            raise layout_error(_CELEBA, uri, f"{what} lacks {len(lacking)} images: {some(lacking, 5)}.")
    folder = next((folder for folder in _IMAGES if files.is_dir(posixpath.join(files.root, folder))), None)
    if folder is None:
        raise layout_error(_CELEBA, uri, f"there is no folder img_align_celeba (found: {describe_folder(files)}).")
    excluded = _excluded(uri, partition)
    sources: dict[str, RowSource] = {}
    for number, split in _SPLITS[labels_by].items():
        names = [name for name, own in partition.items() if own == number and name not in excluded]
        if names:
            labels = [identity[name] for name in names]
            sources[split] = _source(uri, files, folder, names, labels, points, number)
    return sources


def _source(
    uri: DataUri,
    files: Files,
    folder: str,
    names: Sequence[str],
    labels: Sequence[str],
    points: dict[str, list[str]],
    number: int,
) -> ListedSource:
    """One partition, with the landmarks in pixels and in the form of ``rendered:``'s, all of them visible."""
    infos = find_images(files, [f"{folder}/{name}" for name in names])
    if not any(infos):
        raise layout_error(_CELEBA, uri, f"none of the {len(names)} listed images is in {folder}/, e.g. {names[0]}.")
    landmarks = np.ones((len(names), len(_POINTS), 3), np.float32)
    landmarks[:, :, :2] = np.array([points[name] for name in names], np.float32).reshape(len(names), -1, 2)
    origin = f"partition {number} of {_PARTITION}" + (
        f" without {uri.query['exclude']}" if "exclude" in uri.query else ""
    )
    return ListedSource(uri, files, infos, names, labels, extra={"landmarks": landmarks}, origin=origin)


def _identities(uri: DataUri, files: Files, partition: dict[str, int]) -> dict[str, str]:
    """Identity of each image; no person may be in two partitions."""
    identity = {name: values[0] for name, values in _table(uri, files, _IDENTITY, 1).items()}
    home: dict[str, int] = {}
    for name, number in partition.items():
        person = identity.get(name)
        if person is not None and home.setdefault(person, number) != number:
            raise layout_error(
                _CELEBA, uri, f"identity {person} is in the partitions {home[person]} and {number} ({name})."
            )
    return identity


def _table(uri: DataUri, files: Files, name: str, width: int, header: list[str] | None = None) -> dict[str, list[str]]:
    """Image -> whole numbers, from lines of words; before a header, the first line counts them."""
    folder = next((f for f in _FOLDERS if files.exists(posixpath.join(files.root, f, name))), "")
    lines = [line.split() for line in read_text(_CELEBA, uri, files, posixpath.join(folder, name)).splitlines()]
    if header is not None:
        if len(lines) < 2 or lines[1] != header:
            raise layout_error(_CELEBA, uri, f"the second line of {name} must be {' '.join(header)}.")
        lines = lines[2:]
    rows: dict[str, list[str]] = {}
    for words in lines:
        if not words:
            continue
        if len(words) != width + 1 or not all(word.removeprefix("-").isdecimal() for word in words[1:]):
            raise layout_error(
                _CELEBA, uri, f"{name}: {' '.join(words)!r} is not an image and {width} whole number(s)."
            )
        if words[0] in rows:
            raise layout_error(_CELEBA, uri, f"{name} lists {words[0]} twice.")
        rows[words[0]] = words[1:]
    if not rows:
        raise layout_error(_CELEBA, uri, f"{name} lists no image.")
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
CELEBA_LAYOUTS = {_CELEBA.name: _CELEBA}
