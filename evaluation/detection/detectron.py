"""The one door to detectron2, which only the detection task needs: everything of it that we use is imported here.

Works with release 0.6 and with the main branch, with or without their C++ part: ROIAlign and non-maximum suppression
come from torchvision in both, and we use neither rotated boxes nor deformable convolutions. Import this module inside
functions: where detectron2 is missing, the import itself raises ValueError with the command that installs it.
"""

from __future__ import annotations

import sys
import types
import warnings
from typing import Any

import numpy as np
from PIL import Image

INSTALL = "python -m pip install 'git+https://github.com/facebookresearch/detectron2.git' --no-build-isolation"


def _add_lost_aliases() -> None:
    """Names that release 0.6 uses and that newer packages dropped."""
    if not hasattr(Image, "LINEAR"):  # Pillow 10 dropped it; an argument's default in detectron2/data/transforms
        Image.LINEAR = Image.Resampling.BILINEAR  # type: ignore[attr-defined]
    if not hasattr(np, "bool"):  # numpy 1.24 dropped it, numpy 2 has it again; detectron2/structures/masks.py
        np.bool = np.bool_  # type: ignore[misc]


def _add_empty_extension() -> None:
    """Release 0.6 imports its C++ part as soon as ``detectron2.layers`` is; nothing that we use calls it."""
    import detectron2  # type: ignore[import-not-found]

    try:
        import detectron2.layers  # type: ignore[import-not-found]
    except ImportError as error:
        if "_C" not in str(error):
            raise
        extension = types.ModuleType("detectron2._C")
        sys.modules[extension.__name__] = extension
        setattr(detectron2, "_C", extension)  # noqa: B010  # no such attribute is annotated


try:
    _add_lost_aliases()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # torch 2.15 says at each use that torch.jit.script is deprecated
        _add_empty_extension()
        from detectron2 import config, layers, modeling, structures  # type: ignore[import-not-found]
        from detectron2.modeling import backbone, matcher, poolers, roi_heads  # type: ignore[import-not-found]
        from detectron2.modeling.backbone import fpn  # type: ignore[import-not-found]
        from detectron2.modeling.proposal_generator import rpn  # type: ignore[import-not-found]
        from detectron2.modeling.roi_heads import fast_rcnn, mask_head  # type: ignore[import-not-found]
        from detectron2.utils import events  # type: ignore[import-not-found]
except ImportError as error:
    raise ValueError(
        f"The detection task needs the package detectron2 ({error}). Install it with:\n  {INSTALL}"
    ) from error

# Release 0.6 calls it without the argument that torch has asked for since 1.10.
warnings.filterwarnings("ignore", "torch.meshgrid: in an upcoming release", UserWarning)

# Any, because these constructors take a config or keyword arguments, which detectron2's annotations do not say.
Backbone: Any = backbone.Backbone
BasicStem: Any = backbone.BasicStem
BitMasks: Any = structures.BitMasks
Boxes: Any = structures.Boxes
EventStorage: Any = events.EventStorage
FPN: Any = backbone.FPN
FastRCNNOutputLayers: Any = fast_rcnn.FastRCNNOutputLayers
GeneralizedRCNN: Any = modeling.GeneralizedRCNN
Instances: Any = structures.Instances
LastLevelMaxPool: Any = fpn.LastLevelMaxPool
MaskRCNNConvUpsampleHead: Any = mask_head.MaskRCNNConvUpsampleHead
Matcher: Any = matcher.Matcher
PolygonMasks: Any = structures.PolygonMasks
ROIPooler: Any = poolers.ROIPooler
RPN: Any = rpn.RPN
Res5ROIHeads: Any = roi_heads.Res5ROIHeads
ResNet: Any = backbone.ResNet
ShapeSpec: Any = layers.ShapeSpec
StandardROIHeads: Any = roi_heads.StandardROIHeads
get_cfg: Any = config.get_cfg

__all__ = [
    "FPN",
    "INSTALL",
    "RPN",
    "Backbone",
    "BasicStem",
    "BitMasks",
    "Boxes",
    "EventStorage",
    "FastRCNNOutputLayers",
    "GeneralizedRCNN",
    "Instances",
    "LastLevelMaxPool",
    "MaskRCNNConvUpsampleHead",
    "Matcher",
    "PolygonMasks",
    "ROIPooler",
    "Res5ROIHeads",
    "ResNet",
    "ShapeSpec",
    "StandardROIHeads",
    "get_cfg",
]
