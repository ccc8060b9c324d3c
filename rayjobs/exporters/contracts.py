"""What every export format is: how it is refused, written and read back.

A format is a set of functions, listed in ``rayjobs.exporters.FORMATS``. Each writes files that the target library
loads without any code of this project, and reads them back through that library, so that the result can be compared
with the backbone it came from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from image_data.recipes import RECIPES
from image_data.view_steps import ResizeCenterCrop
from methods import METHODS
from methods.backbones import TIMM_PREFIX, ColorSpace, Stem
from rayjobs.configs import PretrainConfig, config_hash, resolve_stem

__all__ = ["EXACT", "Format", "Loaded", "Source", "needs", "resnet_refusal", "save_tensors"]

# Largest difference of a feature, relative to the largest feature: the same operations in the same precision. What is
# compiled into another graph (ONNX: BatchNorm folded into convolutions) gets ten times as much.
EXACT = 1e-5

RESNETS = ("resnet18", "resnet34", "resnet50")


@dataclass(frozen=True)
class Source:
    """A checkpoint as the formats see it.

    Attributes:
        backbone: a ``methods.backbones.Backbone`` in eval mode, float32, on the CPU.
        config: how it was pretrained.
        record: run record of its pretraining.
    """

    backbone: Any
    config: PretrainConfig
    record: Mapping[str, Any]

    @property
    def name(self) -> str:
        """resnet9, resnet18, resnet34, resnet50 or ``timm:NAME``."""
        return self.config.train.backbone

    @property
    def stem(self) -> Stem:
        """The stem that the backbone was built with."""
        return resolve_stem(self.config.train)

    @property
    def color_space(self) -> ColorSpace:
        """lab for the pair of encoders of CMC."""
        return METHODS[self.config.method].color_space

    @property
    def image_size(self) -> int:
        """Side of the images that the backbone saw in pretraining, in pixels."""
        return self.config.train.image_size

    @property
    def resize(self) -> int:
        """Pixels that the short side of a test image is resized to before the central square is cut out."""
        (step,) = RECIPES["evaluation"].steps
        assert isinstance(step, ResizeCenterCrop)
        return round(self.image_size * step.enlarge)

    def provenance(self) -> dict[str, str]:
        """Where the weights come from, without paths: stored beside the weights and as tags in the model registry."""
        return {
            "method": self.config.method,
            "backbone": self.name,
            "stem": self.stem,
            "image_size": str(self.image_size),
            "epochs": str(self.record.get("epoch", self.config.train.epochs)),
            "config_hash": config_hash(self.config),
        }


@dataclass(frozen=True)
class Loaded:
    """What the target library made of the files.

    Attributes:
        run: ImageNet-normalised RGB (B, 3, H, W) -> last feature map (B, C, h, w), pooled features (B, C).
        tensors: the loaded model's tensors under the names of our backbone; None where the format does not keep them.
        sides: the only image height and width that it takes; None takes any.
    """

    run: Callable[[Tensor], tuple[Tensor, Tensor]]
    tensors: Mapping[str, Tensor] | None
    sides: tuple[int, int] | None = None


@dataclass(frozen=True)
class Format:
    """One target.

    Attributes:
        summary: what is written, one line.
        libraries: what reads it, by import names; their versions are noted beside the files.
        missing: what must be installed before it can be written and read back, empty if nothing.
        tolerance: largest difference of features, relative to the largest feature.
        refusal: why the backbone cannot be expressed, empty if it can.
        write: writes the files into an empty folder; returns a page (Markdown) on how to load them, whose Python blocks
            run inside that folder and make ``features``, the pooled features (B, C), of ``images``.
        load: reads the files back through the target library; any exception means that they cannot be read.
    """

    summary: str
    libraries: tuple[str, ...]
    missing: Callable[[], str]
    tolerance: float
    refusal: Callable[[Source], str]
    write: Callable[[Source, Path], str]
    load: Callable[[Path, Source], Loaded]


def needs(*packages: str) -> Callable[[], str]:
    """``Format.missing`` of packages whose import and installation names are the same."""

    def missing() -> str:
        absent = [name for name in packages if find_spec(name) is None]
        return f"it needs {' and '.join(absent)}: install with `pip install {' '.join(absent)}`" if absent else ""

    return missing


def resnet_refusal(source: Source) -> str:
    """Why a library's own ResNet-18/34/50 is not this backbone, empty if it is."""
    if source.color_space != "rgb":
        return f"the backbone of {source.config.method} is a pair of half-width encoders of L and ab"
    if source.name.startswith(TIMM_PREFIX):
        return f"{source.name} is a model of timm"
    if source.name not in RESNETS:
        return f"{source.name} is not one of {', '.join(RESNETS)}"
    if source.stem != "imagenet":
        return "it has no ResNet with the small stem (3x3 convolution, no max-pool)"
    return ""


def save_tensors(tensors: Mapping[str, Tensor], path: Path, source: Source) -> None:
    """A safetensors file with the provenance in its header.

    ``format: pt`` is what Hugging Face's loaders ask for.
    """
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"format": "pt", **source.provenance()})
