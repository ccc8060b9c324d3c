"""The files of an evaluation: plots and tables as they are, the values behind the metrics as one ``samples.npz``."""

from __future__ import annotations

import io
import posixpath
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import Artifact
from image_data.uri import Files
from rayjobs.transfer import TransferResult

__all__ = ["SAMPLES", "copy_files", "read_samples", "write_files", "write_phases"]

SAMPLES = "samples.npz"


def write_phases(results: Mapping[str, TransferResult], folder: str) -> dict[str, str]:
    """Write the files of each phase into a folder of its own; returns phase -> where they are, where there are any."""
    places = {}
    for phase, result in results.items():
        if result.artifacts or result.samples:
            places[phase] = f"{folder}/{phase}"
            write_files(places[phase], result.artifacts, result.samples)
    return places


def write_files(folder: str | Path, artifacts: Iterable[Artifact], samples: Mapping[str, np.ndarray]) -> None:
    """Write into a local folder or a URI, which is made where it is missing."""
    contents = {artifact.name: artifact.data for artifact in artifacts}
    if samples:
        buffer = io.BytesIO()
        # Names hold "/", which a zip archive would read as folders: one array names them all.
        arrays: dict[str, Any] = {f"array_{i}": values for i, values in enumerate(samples.values())}
        np.savez_compressed(buffer, names=np.array(list(samples)), **arrays)
        contents[SAMPLES] = buffer.getvalue()
    for name, data in contents.items():
        _write(str(folder), name, data)


def _write(folder: str, name: str, data: bytes) -> None:
    if "://" not in folder:
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return
    from pyarrow.fs import FileSystem

    filesystem, root = FileSystem.from_uri(folder)
    path = posixpath.join(root, name)
    filesystem.create_dir(posixpath.dirname(path), recursive=True)
    with filesystem.open_output_stream(path) as stream:
        stream.write(data)


def read_samples(folder: str | Path) -> dict[str, np.ndarray]:
    """Samples of a folder or URI; empty where none were written."""
    files = Files(str(folder))
    path = posixpath.join(files.root, SAMPLES)
    if not files.exists(path):
        return {}
    with np.load(io.BytesIO(files.read(path))) as stored:
        return {str(name): stored[f"array_{i}"] for i, name in enumerate(stored["names"])}


def copy_files(folder: str, target: Path) -> list[Path]:
    """Copy everything of a folder or URI into a local folder; returns the copies."""
    files = Files(folder)
    if not files.is_dir():
        return []
    copies = []
    for info in files.walk()[0]:
        path = target / info.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files.read(info.path))
        copies.append(path)
    return copies
