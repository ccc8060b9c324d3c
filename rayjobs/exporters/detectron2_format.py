"""detectron2: a model-zoo file (.pkl of arrays) for the backbone of any of its detectors."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

from torch import Tensor

from evaluation.detection.convert import detectron_name, to_detectron
from image_data.contracts import IMAGENET_MEAN, IMAGENET_STD
from rayjobs.exporters.contracts import EXACT, Format, Loaded, Source, resnet_refusal

__all__ = ["DETECTRON2"]

AUTHOR = "pretransfer"  # any but "Caffe2", whose names detectron2 would translate

PAGE = """\
Settings of any detector that starts from these weights: the backbone was trained on normalised RGB images, and its
blocks have their stride in the 3x3 convolution.

```python
from detectron2.config import get_cfg

cfg = get_cfg()
cfg.MODEL.WEIGHTS = "{file}"
cfg.INPUT.FORMAT = "RGB"
cfg.MODEL.PIXEL_MEAN = {mean}
cfg.MODEL.PIXEL_STD = {std}
cfg.MODEL.RESNETS.DEPTH = {depth}
cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = {width}
cfg.MODEL.RESNETS.NORM = "BN"  # "SyncBN" on several GPUs; "FrozenBN" (the default) keeps the statistics as they are
cfg.MODEL.BACKBONE.FREEZE_AT = 0  # all layers are fine-tuned; 2 (the default) freezes the stem and res2
```

With a configuration of detectron2 (`cfg.merge_from_file(...)` first, then these lines), `DetectionCheckpointer` finds
the place of every tensor: `backbone.*`, `backbone.bottom_up.*` of an FPN, `roi_heads.res5.*` of a C4 detector. The
backbone by itself, on images that are normalised already:

```python
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone

cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
DetectionCheckpointer(backbone).load(cfg.MODEL.WEIGHTS)
features = backbone(images)["res5"].mean(dim=(2, 3))
```
"""


def _missing() -> str:
    """The door to detectron2 says what is missing, and mends what release 0.6 finds changed in newer packages."""
    try:
        import evaluation.detection.detectron  # noqa: F401
    except ValueError as error:
        return str(error)
    return ""


def _file(source: Source) -> str:
    return f"{source.name}.pkl"


def _settings(source: Source) -> dict[str, Any]:
    return {
        "depth": int(source.name.removeprefix("resnet")),
        "width": source.backbone.num_features // 8,
        "mean": [round(255 * value, 3) for value in IMAGENET_MEAN],
        "std": [round(255 * value, 3) for value in IMAGENET_STD],
    }


def _write(source: Source, folder: Path) -> str:
    arrays = {name: tensor.numpy() for name, tensor in to_detectron(source.backbone.state_dict()).items()}
    # The heuristics match ends of names, so the same file fits a bare backbone and one inside a detector.
    content = {"model": arrays, "__author__": AUTHOR, "matching_heuristics": True, **source.provenance()}
    (folder / _file(source)).write_bytes(pickle.dumps(content))
    return PAGE.format(file=_file(source), **_settings(source))


def _load(folder: Path, source: Source) -> Loaded:
    from evaluation.detection.detectron import ShapeSpec, get_cfg  # before detectron2 itself: it mends release 0.6

    # isort: split
    from detectron2.checkpoint import DetectionCheckpointer  # type: ignore[import-not-found]  # an extra
    from detectron2.modeling.backbone import build_resnet_backbone  # type: ignore[import-not-found]

    settings = _settings(source)
    config = get_cfg()
    config.MODEL.BACKBONE.FREEZE_AT = 0
    config.MODEL.RESNETS.DEPTH = settings["depth"]
    config.MODEL.RESNETS.STRIDE_IN_1X1 = False
    config.MODEL.RESNETS.RES2_OUT_CHANNELS = settings["width"]
    config.MODEL.RESNETS.NORM = "BN"
    config.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    model: Any = build_resnet_backbone(config, ShapeSpec(channels=3)).eval()
    path = folder / _file(source)
    logging.getLogger("fvcore.common.checkpoint").setLevel(logging.ERROR)  # we compare the names ourselves
    DetectionCheckpointer(model).load(str(path))
    theirs = model.state_dict()
    unmatched = set(theirs) ^ set(pickle.loads(path.read_bytes())["model"])
    if unmatched:
        raise ValueError(f"tensors do not fit detectron2's ResNet: {sorted(unmatched)}")

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        features = model(images)["res5"]
        return features, features.mean(dim=(2, 3))

    return Loaded(run, {name: theirs[detectron_name(name)] for name in source.backbone.state_dict()})


DETECTRON2 = Format(
    summary="model-zoo .pkl for the ResNet backbone of any detectron2 detector",
    libraries=("detectron2",),
    missing=_missing,
    tolerance=EXACT,
    refusal=resnet_refusal,
    write=_write,
    load=_load,
)
