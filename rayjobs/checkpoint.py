"""Checkpoints: one directory with ``state.pt``, ``backbone.safetensors`` and ``config.json``.

``state.pt`` holds everything that training needs to go on exactly (loadable with ``weights_only=True``),
``backbone.safetensors`` the part that transfers, ``config.json`` the whole configuration and run record. A directory
without ``state.pt`` is a checkpoint for evaluation only.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from methods import METHODS
from methods.backbones import build_backbone
from rayjobs.configs import PretrainConfig, from_dict, resolve_stem, to_dict

__all__ = [
    "copy_checkpoint",
    "load_backbone",
    "load_config",
    "load_state",
    "local_directory",
    "save_checkpoint",
    "save_transfer_checkpoint",
]

STATE, BACKBONE, CONFIG = "state.pt", "backbone.safetensors", "config.json"


def save_checkpoint(
    directory: str | Path,
    config: PretrainConfig,
    record: dict[str, Any],
    backbone: nn.Module,
    state: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint into an existing or new local directory; every file appears whole or not at all.

    Args:
        directory: local directory.
        config: configuration of the run.
        record: run record (data fingerprint, versions, seed, hardware, epoch).
        backbone: the part that transfers.
        state: training state; None for a checkpoint that is only evaluated.
    """
    from safetensors.torch import save_file

    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().to("cpu").contiguous() for k, v in backbone.state_dict().items()}
    with _atomic(path / BACKBONE) as target:
        save_file(tensors, target)
    if state is not None:
        with _atomic(path / STATE) as target:
            torch.save(state, target)
    with _atomic(path / CONFIG) as target:
        text = json.dumps({"config": to_dict(config), "record": record}, indent=2)
        Path(target).write_text(text)


@contextmanager
def _atomic(target: Path) -> Iterator[str]:
    """Yield a temporary name in the same directory and rename it when the block succeeded."""
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


@contextmanager
def local_directory(location: str | Path) -> Iterator[Path]:
    """A checkpoint location (local path or any pyarrow/fsspec URI) as a local directory.

    Raises:
        ValueError: nothing is there, or it is not a checkpoint.
    """
    location = str(location)
    if "://" not in location:
        yield _checked(Path(location).expanduser(), location)
        return
    from pyarrow.fs import FileSelector, copy_files

    filesystem, path = _filesystem(location)
    if not filesystem.get_file_info(FileSelector(path, allow_not_found=True)):
        raise ValueError(f"No checkpoint at {location}: the location is empty or missing.")
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as directory:
        copy_files(path, directory, source_filesystem=filesystem)
        yield _checked(Path(directory), location)


def _checked(path: Path, shown: str) -> Path:
    if not path.is_dir():
        raise ValueError(f"No checkpoint at {shown}: the folder does not exist. Give the folder that holds {CONFIG}.")
    missing = [name for name in (CONFIG, BACKBONE) if not (path / name).is_file()]
    if missing:
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise ValueError(f"{shown} is not a checkpoint: {' and '.join(missing)} missing (found: {found}).")
    return path


def _filesystem(location: str) -> tuple[Any, str]:
    from pyarrow.fs import FileSystem

    return FileSystem.from_uri(location)


def copy_checkpoint(source: str | Path, target: str) -> None:
    """Copy a local checkpoint folder into a local folder or URI; each file appears whole, the config last."""
    names = [name for name in (STATE, BACKBONE, CONFIG) if (Path(source) / name).is_file()]
    if "://" in target:
        filesystem, path = _filesystem(target)
        filesystem.create_dir(path, recursive=True)
        for name in names:
            with filesystem.open_output_stream(f"{path}/{name}") as stream:
                stream.write((Path(source) / name).read_bytes())
        return
    Path(target).mkdir(parents=True, exist_ok=True)
    for name in names:
        with _atomic(Path(target) / name) as temporary:
            shutil.copyfile(Path(source) / name, temporary)


def save_transfer_checkpoint(source: str | Path, target: str | Path) -> Path:
    """Copy what evaluation needs (backbone and config, not the training state) of a checkpoint to a local folder."""
    path = Path(target)
    path.mkdir(parents=True, exist_ok=True)
    with local_directory(source) as directory:
        for name in (BACKBONE, CONFIG):
            shutil.copyfile(directory / name, path / name)
    return path


def load_config(directory: str | Path) -> tuple[PretrainConfig, dict[str, Any]]:
    """Configuration and run record of a local checkpoint directory."""
    stored = json.loads((Path(directory) / CONFIG).read_text())
    return from_dict(PretrainConfig, stored["config"]), stored["record"]


def load_state(directory: str | Path) -> dict[str, Any]:
    """Training state of a local checkpoint directory; ValueError if it was saved for evaluation only."""
    path = Path(directory) / STATE
    if not path.is_file():
        raise ValueError(f"{directory} holds no {STATE}: it can be evaluated, but training cannot go on from it.")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_backbone(directory: str | Path) -> tuple[nn.Module, PretrainConfig, dict[str, Any]]:
    """The frozen backbone of a local checkpoint directory, in eval mode, with its configuration and record."""
    from safetensors.torch import load_file

    config, record = load_config(directory)
    color_space = METHODS[config.method].color_space
    backbone = build_backbone(config.train.backbone, resolve_stem(config.train), color_space=color_space)
    backbone.load_state_dict(load_file(Path(directory) / BACKBONE), strict=True)
    return backbone.eval(), config, record
