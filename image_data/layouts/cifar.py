"""CIFAR-10 and CIFAR-100 from their Python pickles, read without running what a pickle may contain."""

from __future__ import annotations

import io
import pickle
import posixpath
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from image_data.layouts.layout import Arrays, ArraySource, Layout, layout_error
from image_data.sources import RowSource
from image_data.uri import DataUri, FileInfo, Files, some

__all__ = ["CIFAR_LAYOUTS", "read_pickle"]

_SIZE = 32
_TRAIN10 = tuple(f"data_batch_{i}" for i in range(1, 6))
# What a damaged or foreign pickle raises besides UnpicklingError; the format has no common error.
_PICKLE_ERRORS = (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError)


def _text_to_bytes(text: str, encoding: str) -> bytes:
    """How Python 3 pickles bytes in protocol 2; the only use of ``_codecs.encode`` in an array's pickle."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode("latin1")


def _allowed() -> dict[tuple[str, str], Callable[..., Any]]:
    """The four names that an array's pickle needs, under NumPy 1's and NumPy 2's module names."""
    reconstruct = np.zeros(0).__reduce__()[0]
    assert callable(reconstruct)
    return {
        ("numpy.core.multiarray", "_reconstruct"): reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _text_to_bytes,
    }


class _ArrayUnpickler(pickle.Unpickler):
    """Knows numbers, text, lists, dicts and NumPy arrays, and no other name: nothing of the file's choice is called."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        known = _allowed()
        if (module_name, global_name) not in known:
            raise pickle.UnpicklingError(f"it wants {module_name}.{global_name}, which no CIFAR file needs")
        return known[module_name, global_name]


def read_pickle(data: bytes) -> Any:
    """Reads a pickle of numbers, text, lists, dicts and arrays.

    Args:
        data: the file's content; strings of Python 2 become text.

    Raises:
        pickle.UnpicklingError: it needs any other class or function, or is damaged.
    """
    try:
        return _ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()
    except _PICKLE_ERRORS as error:
        raise pickle.UnpicklingError(str(error) or type(error).__name__) from error


def _open_cifar10(uri: DataUri, files: Files) -> dict[str, RowSource]:
    folder = _folder(_CIFAR10, uri, files, "cifar-10-batches-py", (*_TRAIN10, "test_batch", "batches.meta"))
    return {
        "train": _source(_CIFAR10, uri, files, folder, _TRAIN10, "batches.meta"),
        "test": _source(_CIFAR10, uri, files, folder, ("test_batch",), "batches.meta"),
    }


def _open_cifar100(uri: DataUri, files: Files) -> dict[str, RowSource]:
    folder = _folder(_CIFAR100, uri, files, "cifar-100-python", ("train", "test", "meta"))
    return {part: _source(_CIFAR100, uri, files, folder, (part,), "meta") for part in ("train", "test")}


def _folder(layout: Layout, uri: DataUri, files: Files, inner: str, needed: Sequence[str]) -> str:
    """The folder of the batches: DIR itself, or the one that the archive makes in it."""
    found = files.names()
    folder = posixpath.join(files.root, inner) if inner in found else files.root
    found = files.names(folder)
    missing = [name for name in needed if name not in found]
    if missing:
        raise layout_error(layout, uri, f"missing: {', '.join(missing)} (found: {some(found, 10) or 'nothing'}).")
    return folder


def _source(layout: Layout, uri: DataUri, files: Files, folder: str, batches: Sequence[str], meta: str) -> ArraySource:
    infos = [files.info(posixpath.join(folder, name)) for name in (*batches, meta)]
    return ArraySource(uri, infos, partial(_load, layout, uri, files, infos), origin="as in the archive")


def _load(layout: Layout, uri: DataUri, files: Files, infos: Sequence[FileInfo]) -> Arrays:
    """Pixels and labels of some batches; the last file holds the names of the classes."""
    prefix = "fine_" if layout is _CIFAR100 else ""
    *batches, names = (_read(layout, uri, files, info) for info in infos)
    class_names = _entry(layout, uri, infos[-1], names, f"{prefix}label_names")
    pixels, labels, coarse, image_names = [], [], [], []
    for info, batch in zip(infos, batches, strict=False):
        pixels.append(_pixels(layout, uri, info, _entry(layout, uri, info, batch, "data")))
        own = _entry(layout, uri, info, batch, f"{prefix}labels")
        if len(own) != len(pixels[-1]):
            raise layout_error(layout, uri, f"{info.name} has {len(pixels[-1])} images and {len(own)} labels.")
        labels += own
        if prefix:
            coarse += _entry(layout, uri, info, batch, "coarse_labels")
        image_names += [f"{info.name}/{i:05d}" for i in range(len(own))]
    if not prefix:
        return Arrays(np.concatenate(pixels), image_names, labels, class_names)
    coarse_names = _entry(layout, uri, infos[-1], names, "coarse_label_names")
    return Arrays(np.concatenate(pixels), image_names, labels, class_names, [coarse_names[i] for i in coarse])


def _read(layout: Layout, uri: DataUri, files: Files, info: FileInfo) -> dict[str, Any]:
    try:
        content = read_pickle(files.read(info.path))
    except pickle.UnpicklingError as error:
        raise layout_error(layout, uri, f"{info.name} is not a CIFAR pickle: {error}.") from error
    if not isinstance(content, dict):
        raise layout_error(layout, uri, f"{info.name} holds a {type(content).__name__}, not a dict.")
    return content


def _entry(layout: Layout, uri: DataUri, info: FileInfo, content: dict[str, Any], key: str) -> Any:
    if key not in content:
        raise layout_error(layout, uri, f"{info.name} has no {key!r}; it has {some(map(repr, content), 10)}.")
    return content[key]


def _pixels(layout: Layout, uri: DataUri, info: FileInfo, data: Any) -> np.ndarray:
    """uint8 (N, 32, 32, 3) from rows of 1024 red, 1024 green and 1024 blue values."""
    size = 3 * _SIZE * _SIZE
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != size:
        raise layout_error(layout, uri, f"'data' of {info.name} is not a uint8 array of N x {size}.")
    return np.ascontiguousarray(data.reshape(-1, 3, _SIZE, _SIZE).transpose(0, 2, 3, 1))


_CIFAR10 = Layout(
    name="cifar10",
    summary="CIFAR-10, the Python version: 50,000 training and 10,000 test images of 10 classes",
    tree="""
DIR/cifar-10-batches-py/data_batch_1 ... data_batch_5     (or these files in DIR itself)
DIR/cifar-10-batches-py/test_batch
DIR/cifar-10-batches-py/batches.meta
""",
    source="cifar-10-python.tar.gz of cs.toronto.edu/~kriz/cifar.html",
    open=_open_cifar10,
)
_CIFAR100 = Layout(
    name="cifar100",
    summary="CIFAR-100, the Python version: 50,000 training and 10,000 test images of 100 classes, 20 coarse ones",
    tree="""
DIR/cifar-100-python/train     (or these files in DIR itself)
DIR/cifar-100-python/test
DIR/cifar-100-python/meta
""",
    source="cifar-100-python.tar.gz of cs.toronto.edu/~kriz/cifar.html",
    open=_open_cifar100,
)
CIFAR_LAYOUTS = {layout.name: layout for layout in (_CIFAR10, _CIFAR100)}
