"""One exported folder: written aside, read back, compared with the backbone, and only then put in its place."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from image_data.contracts import IMAGENET_MEAN, IMAGENET_STD
from rayjobs.exporters.contracts import Format, Loaded, Source

__all__ = ["PAGE", "ExportError", "Exported", "difference", "export_folder"]

PAGE = "how_to_load.md"
SEED = 0


class ExportError(RuntimeError):
    """What was written is not the backbone; nothing of it is left on disk."""


@dataclass(frozen=True)
class Exported:
    """A verified folder.

    Attributes:
        folder: where it is.
        difference: largest difference of a feature from the backbone's, relative to the largest feature.
        num_bytes: size of all files.
    """

    folder: Path
    difference: float
    num_bytes: int


def export_folder(name: str, form: Format, source: Source, folder: Path) -> Exported:
    """Write one format and prove that the target library gives the backbone's features.

    Args:
        name: of the format, in errors.
        form: the format.
        source: the checkpoint.
        folder: the result; one that exists is replaced after the new one has been verified.

    Raises:
        ExportError: the files cannot be read back or give other tensors or features.
    """
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir(parents=True)
    try:
        try:
            page = form.write(source, partial)
            loaded = form.load(partial, source)
        except Exception as error:
            kind = type(error).__name__
            raise ExportError(f"{name}: the files could not be written and read back: {kind}: {error}") from error
        found = difference(loaded, source, name)
        if not found <= form.tolerance:  # also when it is not a number
            raise ExportError(
                f"{name}: the features that were read back differ from the backbone's by {found:.2g} of the largest "
                f"one; allowed is {form.tolerance:g}. Nothing was kept."
            )
        (partial / PAGE).write_text(_page(name, form, source, page, found))
        num_bytes = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(folder, found, num_bytes)


@torch.no_grad()
def difference(loaded: Loaded, source: Source, name: str) -> float:
    """Largest difference of map and pooled features over seeded images of two batch sizes, and two image sizes if any.

    Features alone would not notice a wrong tensor that a zero behind it hides (the last norm of a block that starts at
    zero), so where the library keeps tensors these must be equal bit by bit.

    Raises:
        ExportError: a tensor is missing, left over or changed.
    """
    if loaded.tensors is not None:
        _compare_tensors(loaded, source, name)
    side = source.image_size
    first, second = ((side, side), (side + 32, side)) if loaded.sides is None else (loaded.sides, loaded.sides)
    generator = torch.Generator().manual_seed(SEED)
    gaps = []
    for batch, sides in ((2, first), (3, second)):
        images = torch.randn(batch, 3, *sides, generator=generator)
        ours = source.backbone.forward_features(images), source.backbone(images)
        for expected, found in zip(ours, loaded.run(images), strict=True):
            if expected.shape != found.shape:
                raise ExportError(
                    f"{name}: features of shape {tuple(found.shape)} were read back; the backbone's have "
                    f"{tuple(expected.shape)}. Nothing was kept."
                )
            gaps.append(_relative(expected, found))
    return float(np.max(gaps))  # not a number if one is not


def _relative(expected: Tensor, found: Tensor) -> float:
    gap = float((found - expected).abs().max())
    return gap and gap / float(expected.abs().max().clamp_min(1e-30))


def _compare_tensors(loaded: Loaded, source: Source, name: str) -> None:
    assert loaded.tensors is not None
    ours = source.backbone.state_dict()
    unmatched = sorted(set(ours) ^ set(loaded.tensors))
    changed = sorted(key for key in set(ours) & set(loaded.tensors) if not torch.equal(ours[key], loaded.tensors[key]))
    for kind, names in (("missing or left over", unmatched), ("changed", changed)):
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise ExportError(f"{name}: {len(names)} of {len(ours)} tensors are {kind}: {shown}. Nothing was kept.")


def _page(name: str, form: Format, source: Source, body: str, found: float) -> str:
    """How to load the files, what they are, and the proof."""
    facts = "".join(f"| {key} | {value} |\n" for key, value in source.provenance().items())
    versions = ", ".join(f"{library} {sys.modules[library].__version__}" for library in ("torch", *form.libraries))
    return (
        f"# {source.name} pretrained with {source.config.method}, for {name}\n\n"
        f"`images` below: float32 (B, 3, H, W), RGB from 0 to 1, minus {IMAGENET_MEAN}, divided by {IMAGENET_STD}.\n"
        f"Pretraining saw {source.image_size} x {source.image_size} pixels. `features`: pooled, "
        f"(B, {source.backbone.num_features}).\n\n{body}\n"
        f"## Origin\n\n| | |\n|---|---|\n{facts}\n"
        f"Read back and compared with the original on seeded images: largest difference of a feature {found:.1e}, "
        f"relative\nto the largest feature. Written with {versions}.\n"
    )
