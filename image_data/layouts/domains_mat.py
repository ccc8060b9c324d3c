"""Those of the twelve domains whose labels are MATLAB files: SVHN (pixels too) and Flowers102."""

from __future__ import annotations

import io
import posixpath
import zlib
from functools import partial
from typing import Any

import numpy as np

from image_data.layouts.domains_common import VAL_OPTION, Rows, find_folder, listed_sources
from image_data.layouts.layout import Arrays, ArraySource, Layout, describe_folder, layout_error
from image_data.sources import RowSource
from image_data.uri import DataUri, FileInfo, Files

__all__ = ["MAT_LAYOUTS"]

_FLOWER_SETS = {"train": "trnid", "val": "valid", "test": "tstid"}


def _open_flowers102(uri: DataUri, files: Files) -> dict[str, RowSource]:
    root = find_folder(_FLOWERS102, uri, files, ("flowers-102", "102flowers"), inside="jpg")
    labels = _integers(_FLOWERS102, uri, files, posixpath.join(root, "imagelabels.mat"), "labels")
    rows: Rows = {}
    for split, key in _FLOWER_SETS.items():
        numbers = _integers(_FLOWERS102, uri, files, posixpath.join(root, "setid.mat"), key)
        if numbers.size and (numbers.min() < 1 or numbers.max() > len(labels)):
            raise layout_error(
                _FLOWERS102,
                uri,
                f"{key} of setid.mat names the images {numbers.min()} to {numbers.max()}; imagelabels.mat has labels "
                f"of 1 to {len(labels)}.",
            )
        rows[split] = [(f"image_{number:05d}.jpg", str(labels[number - 1])) for number in numbers]
    return listed_sources(_FLOWERS102, uri, files, posixpath.join(root, "jpg"), rows, "the sets of setid.mat")


def _open_svhn(uri: DataUri, files: Files) -> dict[str, RowSource]:
    sources: dict[str, RowSource] = {}
    for split in ("train", "test"):
        info = _info(_SVHN, uri, files, f"{split}_32x32.mat")
        sources[split] = ArraySource(uri, [info], partial(_load_svhn, uri, files, info), origin=f"from {info.name}")
    return sources


def _load_svhn(uri: DataUri, files: Files, info: FileInfo) -> Arrays:
    """Pixels and digits of one part; the file has the class 10 for the digit 0."""
    content = _read_mat(_SVHN, uri, files, info)
    pixels, labels = content.get("X"), content.get("y")
    if pixels is None or labels is None or pixels.dtype != np.uint8 or pixels.shape[:3] != (32, 32, 3):
        raise layout_error(_SVHN, uri, f"{info.name} must hold X, uint8 32 x 32 x 3 x N, and y.")
    digits = labels.astype(np.int64).ravel() % 10
    if pixels.ndim != 4 or len(digits) != pixels.shape[3]:
        raise layout_error(_SVHN, uri, f"{info.name} has X of shape {pixels.shape} and {len(digits)} labels.")
    names = [f"{info.name}/{i:06d}" for i in range(len(digits))]
    return Arrays(pixels.transpose(3, 0, 1, 2), names, digits.tolist())


def _integers(layout: Layout, uri: DataUri, files: Files, name: str, key: str) -> np.ndarray:
    """One variable of a MATLAB file, int64 (N,)."""
    content = _read_mat(layout, uri, files, _info(layout, uri, files, name))
    if key not in content or not np.issubdtype(content[key].dtype, np.number):
        known = ", ".join(found for found in content if not found.startswith("__")) or "nothing"
        raise layout_error(layout, uri, f"{name} has no numbers {key!r}; it has {known}.")
    return content[key].astype(np.int64).ravel()


def _info(layout: Layout, uri: DataUri, files: Files, name: str) -> FileInfo:
    path = posixpath.join(files.root, name)
    if not files.exists(path) or files.is_dir(path):
        raise layout_error(layout, uri, f"there is no file {name} (found: {describe_folder(files)}).")
    return files.info(path)


def _read_mat(layout: Layout, uri: DataUri, files: Files, info: FileInfo) -> dict[str, Any]:
    """Variables of a MATLAB 5 file."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    data = files.read(info.path)
    if data[126:128] not in (b"IM", b"MI"):  # the end of its header; scipy does not check the length of a short file
        raise layout_error(layout, uri, f"{info.name} is not a readable MATLAB 5 file ({len(data):,} bytes).")
    try:
        return loadmat(io.BytesIO(data))
    except (MatReadError, ValueError, TypeError, NotImplementedError, OSError, zlib.error) as error:
        raise layout_error(layout, uri, f"{info.name} is not a readable MATLAB 5 file ({error}).") from error


_FLOWERS102 = Layout(
    name="flowers102",
    summary="Oxford Flowers: 102 flowers, 1,020 images each in train and val, 6,149 in test",
    tree="""
DIR/jpg/image_00001.jpg     (or all of this in DIR/flowers-102 or DIR/102flowers)
DIR/imagelabels.mat         labels: class 1 to 102 of image 1, 2, 3 ...
DIR/setid.mat               trnid, valid, tstid: numbers of images
""",
    source="102flowers.tgz, imagelabels.mat and setid.mat of robots.ox.ac.uk/~vgg/data/flowers/102",
    open=_open_flowers102,
    options=VAL_OPTION,
)
_SVHN = Layout(
    name="svhn",
    summary="Street View House Numbers, cropped digits: 73,257 training and 26,032 test images",
    tree="""
DIR/train_32x32.mat     X: uint8 32 x 32 x 3 x N; y: 1 to 10, 10 for the digit 0
DIR/test_32x32.mat
""",
    source="ufldl.stanford.edu/housenumbers, format 2",
    open=_open_svhn,
)
MAT_LAYOUTS = {layout.name: layout for layout in (_FLOWERS102, _SVHN)}
