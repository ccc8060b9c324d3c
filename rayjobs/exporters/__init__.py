"""Backbones for other libraries: one file per target, and the table of them.

A new target is one module with a ``Format`` and one line here.
"""

from __future__ import annotations

from rayjobs.exporters.contracts import Format
from rayjobs.exporters.detectron2_format import DETECTRON2
from rayjobs.exporters.huggingface_format import HUGGINGFACE
from rayjobs.exporters.onnx_format import ONNX
from rayjobs.exporters.timm_format import TIMM
from rayjobs.exporters.torchvision_format import TORCHVISION

__all__ = ["FORMATS"]

FORMATS: dict[str, Format] = {
    "torchvision": TORCHVISION,
    "timm": TIMM,
    "detectron2": DETECTRON2,
    "huggingface": HUGGINGFACE,
    "onnx": ONNX,
}
