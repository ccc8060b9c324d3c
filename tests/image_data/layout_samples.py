"""Tiny data sets in the layouts in which the published ones are unpacked."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import scipy.io

from tests.image_data.samples import encode, picture


def jpeg(seed: int) -> bytes:
    return encode(np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8), "JPEG")


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def write_miniimagenet(root: Path, parts: Mapping[str, Mapping[str, int]]) -> dict[str, bytes]:
    """images/ and a list per part, from part -> class -> number of images; returns file name -> bytes."""
    images: dict[str, bytes] = {}
    for part, classes in parts.items():
        rows = [(f"{label}{i:08d}.jpg", label) for label, count in classes.items() for i in range(count)]
        for name, _ in rows:
            images[name] = jpeg(len(images))
            write(root / "images" / name, images[name])
        write(root / f"{part}.csv", "".join(f"{a},{b}\n" for a, b in [("filename", "label"), *rows]))
    return images


def write_tieredimagenet(root: Path, parts: Mapping[str, Mapping[str, str]], each: int = 3) -> None:
    """A folder per class and a list per part, from part -> class -> category."""
    for part, classes in parts.items():
        for number, label in enumerate(classes):
            for i in range(each):
                write(root / part / label / f"{label}{i:08d}.jpg", jpeg(100 * number + i))
        write(root / f"{part}.csv", "".join(f"{a},{b}\n" for a, b in classes.items()) + "\n")


def write_cifar_fs(root: Path, parts: Mapping[str, Sequence[str]], each: int = 4) -> None:
    for part, classes in parts.items():
        for label in classes:
            for i in range(each):
                write(root / "data" / label / f"{label}_s_{i:06d}.png", picture(i))
        write(root / "splits" / "bertinetto" / f"{part}.txt", "".join(f"{label}\n" for label in classes))


def cifar_pixels(seed: int, count: int) -> np.ndarray:
    """uint8 (N, 32, 32, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def cifar_rows(pixels: np.ndarray) -> np.ndarray:
    """As CIFAR keeps them: all red, then all green, then all blue values of an image."""
    return np.stack([np.concatenate([image[:, :, c].ravel() for c in range(3)]) for image in pixels])


_PurePickler: Any = pickle._Pickler  # its opcodes can be chosen; untyped, as it is not public


class _Python2Pickler(_PurePickler):
    """Writes text and bytes alike as byte strings, which is what they were in Python 2."""

    dispatch: ClassVar = dict(_PurePickler.dispatch)

    def _save_string(self, value: str | bytes) -> None:
        data = value.encode("latin1") if isinstance(value, str) else value
        size = len(data).to_bytes(1, "little") if len(data) < 256 else len(data).to_bytes(4, "little")
        self.write((pickle.SHORT_BINSTRING if len(data) < 256 else pickle.BINSTRING) + size + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = _save_string


def python2_pickle(content: Mapping[str, object]) -> bytes:
    """As Python 2 and NumPy 1 wrote the archives: byte strings, protocol 2, module numpy.core."""
    buffer = io.BytesIO()
    _Python2Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def write_cifar10(root: Path, each: int = 10) -> dict[str, np.ndarray]:
    folder = root / "cifar-10-batches-py"
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    pixels = {name: cifar_pixels(seed, each) for seed, name in enumerate(names)}
    for name, own in pixels.items():
        content = {
            "data": cifar_rows(own),
            "labels": [i % 2 for i in range(each)],
            "filenames": [],
            "batch_label": name,
        }
        write(folder / name, python2_pickle(content))
    write(folder / "batches.meta", python2_pickle({"label_names": ["ship", "cat"], "num_vis": 3072}))
    return pixels


def write_cifar100(root: Path, each: int = 24) -> dict[str, np.ndarray]:
    folder = root / "cifar-100-python"
    pixels = {"train": cifar_pixels(0, each), "test": cifar_pixels(1, each)}
    for name, own in pixels.items():
        fine = [i % 4 for i in range(each)]
        content = {"data": cifar_rows(own), "fine_labels": fine, "coarse_labels": [label // 2 for label in fine]}
        write(folder / name, python2_pickle(content))
    fine_names, coarse_names = ["trout", "apple", "bear", "bee"], ["fish and fruit", "animals"]
    write(folder / "meta", python2_pickle({"fine_label_names": fine_names, "coarse_label_names": coarse_names}))
    return pixels


def write_imagenet(root: Path, num_classes: int = 3, train: int = 20, val: int = 2) -> list[str]:
    """Folders of classes for both parts; returns the classes."""
    classes = [f"n{10_000_000 + 7 * i:08d}" for i in range(num_classes)]
    for c, label in enumerate(classes):
        for i in range(train):
            write(root / "train" / label / f"{label}_{i}.JPEG", jpeg(1000 * c + i))
        for i in range(val):
            write(root / "val" / label / f"ILSVRC2012_val_{c * val + i + 1:08d}.JPEG", jpeg(1000 * c + 500 + i))
    return classes


def write_devkit(root: Path, classes: Sequence[str], val_labels: Sequence[str]) -> None:
    """The ground truth and meta.mat, whose numbers are in another order than the names and start at 1."""
    number = {label: len(classes) - i for i, label in enumerate(classes)}
    synsets = np.zeros(len(classes) + 1, [("ILSVRC2012_ID", object), ("WNID", object), ("num_children", object)])
    synsets[:-1] = [(number[label], label, 0) for label in classes]
    synsets[-1] = (len(classes) + 1, "n00001740", 2)  # meta.mat has inner nodes of WordNet too
    (root / "data").mkdir(parents=True)
    scipy.io.savemat(root / "data" / "meta.mat", {"synsets": synsets})
    truth = "".join(f"{number[label]}\n" for label in val_labels)
    write(root / "data" / "ILSVRC2012_validation_ground_truth.txt", truth)


def write_places_lists(root: Path, each: int = 10) -> list[str]:
    """The file lists; returns the classes' names."""
    categories = ["/a/airfield", "/b/bus_station/indoor", "/b/bus_station/outdoor"]
    write(root / "categories_places365.txt", "".join(f"{name} {i}\n" for i, name in enumerate(categories)))
    train = [(f"{name}/{i:08d}.jpg", c) for c, name in enumerate(categories) for i in range(each)]
    val = [(f"Places365_val_{i:08d}.jpg", i % 3) for i in range(6)]
    for seed, (name, _) in enumerate(train):
        write(root / "data_256" / name[1:], jpeg(seed))
    for seed, (name, _) in enumerate(val):
        write(root / "val_256" / name, jpeg(1000 + seed))
    for name, rows in (("places365_train_standard.txt", train), ("places365_val.txt", val)):
        write(root / name, "".join(f"{image} {label}\n" for image, label in rows))
    return ["airfield", "bus_station-indoor", "bus_station-outdoor"]


LANDMARK_HEADER = (
    "lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x leftmouth_y rightmouth_x rightmouth_y"
)


def write_celeba(root: Path, anno: str = "", evaluation: str = "", images: str = "img_align_celeba") -> dict[str, int]:
    """40 images: identities 1 and 2 to train on (12 images each), 3 for validation, 4 for test; image -> identity."""
    identity = {f"{i + 1:06d}.jpg": 1 + i % 2 if i < 24 else 3 + (i >= 32) for i in range(40)}
    for seed, name in enumerate(identity):
        write(root / images / name, jpeg(seed))
    partition = {1: 0, 2: 0, 3: 1, 4: 2}
    lines = [f"{name}  " + " ".join(f"{10 * i + j:3d}" for j in range(10)) for i, name in enumerate(identity)]
    write(
        root / anno / "list_landmarks_align_celeba.txt", "\n".join([str(len(identity)), LANDMARK_HEADER, *lines]) + "\n"
    )
    write(root / anno / "identity_CelebA.txt", "".join(f"{name} {person}\n" for name, person in identity.items()))
    rows = "".join(f"{name} {partition[person]}\n" for name, person in identity.items())
    write(root / evaluation / "list_eval_partition.txt", rows)
    return identity
