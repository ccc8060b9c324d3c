"""A detectron2 detector around one of our backbones.

resnet18/34/50 with the imagenet stem become detectron2's own ResNet, with converted weights that are checked. Every
other backbone keeps its own modules, with a thin layer that tells detectron2 their channels and strides: for C4 all
stages but the last are the trunk and the last one runs on the regions; for FPN the last stage of every stride from 4 on
is a level.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from evaluation.detection.convert import load_backbone, resnet_depth, verify_features
from evaluation.detection.detectron import (
    FPN,
    Backbone,
    BasicStem,
    EventStorage,
    GeneralizedRCNN,
    LastLevelMaxPool,
    Matcher,
    ResNet,
    ROIPooler,
    ShapeSpec,
    get_cfg,
)
from evaluation.detection.heads import C4Heads, MaskHead, Outputs, PyramidHeads, SeededRPN
from evaluation.detection.recipes import HeadKind, Recipe
from evaluation.fine_tuning.freezing import Freezing
from image_data.contracts import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["Detector", "StageTrunk", "build_detector", "detector_config"]

PROBE_SIDE = 128  # pixels of the image that finds the stages' channels and strides
SMALLEST_LEVEL_STRIDE = 4  # of a feature pyramid, as in Lin et al. 2017


class Detector(nn.Module):
    """A detector that takes its random numbers with each image.

    Called on a training batch it returns {name: loss}; ``detect`` returns what it finds.
    """

    def __init__(self, rcnn: Any, frozen: Sequence[nn.Module], freezing: Freezing) -> None:
        """Args: frozen: the modules of the frozen stages."""
        super().__init__()
        self.rcnn = rcnn
        self._kept_in_eval = tuple(frozen) if freezing.batchnorm == "eval" else ()

    def train(self, mode: bool = True) -> Detector:
        """Training mode, with BatchNorm of frozen stages in the mode that was asked for."""
        super().train(mode)
        for stage in self._kept_in_eval:
            for module in stage.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Losses of a batch: {"image": uint8 (3, H, W), "instances": ..., "seed": of the sampling} per image."""
        generators = [torch.Generator().manual_seed(image["seed"]) for image in batch]
        self.rcnn.proposal_generator.seed(generators)
        self.rcnn.roi_heads.seed(generators)
        try:
            with EventStorage():  # detectron2 logs into it and fails without one
                return self.rcnn(batch)
        except FloatingPointError:  # what detectron2 says to NaN boxes; the training loop knows a NaN loss
            return {"loss": torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum() * float("nan")}

    def detect(self, images: list[dict[str, Any]]) -> list[Any]:
        """What is in each {"image": uint8 (3, H, W), "height", "width": of the original}, in the original's pixels."""
        return [found["instances"] for found in self.rcnn.inference(images)]


class StageTrunk(Backbone):
    """Stages of one of our backbones, as detectron2 wants a backbone: maps by name, with channels and strides."""

    def __init__(self, stages: Sequence[nn.Module], shapes: Mapping[int, Any]) -> None:
        """Args: shapes: number of a stage whose map is given out -> its channels and stride."""
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self._shapes = {f"stage{i}": shape for i, shape in shapes.items()}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> the maps."""
        maps = {}
        for i, stage in enumerate(self.stages):
            x = stage(x)
            maps[f"stage{i}"] = x
        return {name: maps[name] for name in self._shapes}

    def output_shape(self) -> dict[str, Any]:
        """Channels and stride of the maps."""
        return dict(self._shapes)


class _Parts(NamedTuple):
    trunk: Any  # detectron2 backbone
    last: nn.Module | None  # the stage that runs on regions; None for FPN
    stages: list[nn.Module]  # as the backbone's, for freezing


def build_detector(
    backbone: Any, recipe: Recipe, num_classes: int, batchnorm: bool, freezing: Freezing, probe: Tensor
) -> Detector:
    """The detector of a recipe around a backbone, on the CPU.

    Args:
        backbone: with its weights; frozen stages have parameters without gradient.
        recipe: which detector.
        num_classes: without background.
        batchnorm: BatchNorm in the new layers: after the last stage on regions (C4), in the pyramid (FPN).
        freezing: says what BatchNorm of frozen stages does.
        probe: normalised images (B, 3, H, W) on which converted weights must give the backbone's features.

    Raises:
        ValueError: weights that do not fit; a backbone whose stages have no pyramid of strides.
    """
    depth = resnet_depth(backbone)
    parts = _converted(backbone, depth, recipe.head, probe) if depth else _wrapped(backbone, recipe.head)
    trunk = parts.trunk if recipe.head == "c4" else _pyramid(parts.trunk, batchnorm)
    shapes = trunk.output_shape()
    config = detector_config(recipe, num_classes, shapes)
    if parts.last is None:
        heads = PyramidHeads(config, shapes)
    else:
        heads = _c4_heads(config, shapes, parts.last, backbone.num_features, batchnorm)
    rcnn = GeneralizedRCNN(
        backbone=trunk,
        proposal_generator=SeededRPN(config, shapes),
        roi_heads=heads,
        pixel_mean=config.MODEL.PIXEL_MEAN,
        pixel_std=config.MODEL.PIXEL_STD,
        input_format=config.INPUT.FORMAT,
    )
    return Detector(rcnn, parts.stages[: freezing.stages], freezing)


def _converted(backbone: Any, depth: int, head: HeadKind, probe: Tensor) -> _Parts:
    """detectron2's ResNet with the backbone's weights."""
    options = {"norm": "BN", **({"stride_in_1x1": False} if depth >= 50 else {})}
    groups = ResNet.make_default_stages(depth, **options)
    stem = BasicStem(3, 64, norm="BN")
    if head == "c4":
        trunk, last = ResNet(stem, groups[:3], out_features=["res4"]), nn.Sequential(*groups[3])
        parts: dict[str, nn.Module] = {"": trunk, "res5.": last}
    else:
        trunk, last = ResNet(stem, groups, out_features=["res2", "res3", "res4", "res5"]), None
        parts = {"": trunk}
    load_backbone(backbone, parts)
    verify_features(backbone, trunk, last, probe)
    return _Parts(trunk, last, [trunk.stem, *trunk.stages, *([last] if last is not None else [])])


def _wrapped(backbone: Any, head: HeadKind) -> _Parts:
    """The backbone's own modules."""
    stages = list(backbone.stages)
    shapes = _measure(stages)
    if head == "c4":
        trunk = StageTrunk(stages[:-1], {len(stages) - 2: shapes[-2]})
        return _Parts(trunk, stages[-1], stages)
    last_of_stride = {shape.stride: i for i, shape in enumerate(shapes)}
    levels = [i for stride, i in sorted(last_of_stride.items()) if stride >= SMALLEST_LEVEL_STRIDE]
    strides = [shapes[i].stride for i in levels]
    if len(levels) < 2 or any(b != 2 * a for a, b in pairwise(strides)):
        raise ValueError(
            f"A feature pyramid needs maps whose strides double from one to the next, at least two of stride "
            f"{SMALLEST_LEVEL_STRIDE} or more; the stages of this {type(backbone).__name__} have strides "
            f"{', '.join(str(shape.stride) for shape in shapes)}. Use the head c4, or another backbone."
        )
    return _Parts(StageTrunk(stages, {i: shapes[i] for i in levels}), None, stages)


@torch.no_grad()
def _measure(stages: Sequence[nn.Module]) -> list[Any]:
    """Channels and stride of each stage's map, found on one image."""
    modes = [{module: module.training for module in stage.modules()} for stage in stages]
    x, shapes = torch.zeros(1, 3, PROBE_SIDE, PROBE_SIDE), []
    for stage in stages:
        x = stage.eval()(x)
        if x.dim() != 4 or PROBE_SIDE % x.shape[-1]:
            raise ValueError(
                f"A stage of the backbone turns an image of {PROBE_SIDE} x {PROBE_SIDE} pixels into {tuple(x.shape)}; "
                "detection needs maps (B, C, H, W) whose strides are whole numbers. Use resnet9, 18, 34 or 50."
            )
        shapes.append(ShapeSpec(channels=x.shape[1], stride=PROBE_SIDE // x.shape[-1]))
    for mode in modes:
        for module, training in mode.items():
            module.training = training
    return shapes


def _pyramid(trunk: Any, batchnorm: bool) -> Any:
    """A feature pyramid of 256 channels (Lin et al. 2017), with one more level by subsampling the last."""
    shapes = trunk.output_shape()
    top = LastLevelMaxPool()
    top.in_feature = f"p{int(math.log2(max(shape.stride for shape in shapes.values())))}"
    return FPN(trunk, list(shapes), 256, norm="BN" if batchnorm else "", top_block=top)


def detector_config(recipe: Recipe, num_classes: int, shapes: Mapping[str, Any]) -> Any:
    """detectron2's configuration of a detector on feature maps.

    Args:
        recipe: which detector.
        num_classes: without background.
        shapes: name -> channels and stride of each map that the backbone gives (for FPN: of the pyramid).
    """
    config = get_cfg()
    model, names = config.MODEL, list(shapes)
    model.PIXEL_MEAN = [255 * value for value in IMAGENET_MEAN]
    model.PIXEL_STD = [255 * value for value in IMAGENET_STD]
    model.BACKBONE.FREEZE_AT = 0
    model.RESNETS.NORM = "BN"  # the training loop makes it synchronised; SyncBatchNorm does not run on CPUs
    model.RESNETS.STRIDE_IN_1X1 = False
    model.MASK_ON = recipe.masks
    model.ANCHOR_GENERATOR.SIZES = [list(recipe.anchors)]
    model.RPN.IN_FEATURES = model.ROI_HEADS.IN_FEATURES = names
    model.RPN.BATCH_SIZE_PER_IMAGE = recipe.rpn_samples
    model.RPN.PRE_NMS_TOPK_TRAIN, model.RPN.PRE_NMS_TOPK_TEST = recipe.pre_nms
    model.RPN.POST_NMS_TOPK_TRAIN, model.RPN.POST_NMS_TOPK_TEST = recipe.post_nms
    model.ROI_HEADS.NUM_CLASSES = num_classes
    model.ROI_HEADS.BATCH_SIZE_PER_IMAGE = recipe.roi_samples
    model.ROI_HEADS.SCORE_THRESH_TEST, model.ROI_HEADS.NMS_THRESH_TEST = 0.05, 0.5
    model.ROI_BOX_HEAD.POOLER_RESOLUTION = recipe.pooler_side
    if recipe.head == "fpn":
        model.ANCHOR_GENERATOR.SIZES = [[8 * shape.stride] for shape in shapes.values()]
        model.ROI_HEADS.NAME, model.ROI_HEADS.IN_FEATURES = "StandardROIHeads", names[:-1]
        model.ROI_BOX_HEAD.NAME, model.ROI_BOX_HEAD.NUM_FC = "FastRCNNConvFCHead", 2
        model.ROI_MASK_HEAD.NUM_CONV = 4
        model.ROI_MASK_HEAD.POOLER_RESOLUTION = 14
    config.INPUT.FORMAT = "RGB"
    config.INPUT.MIN_SIZE_TRAIN, config.INPUT.MIN_SIZE_TEST = recipe.train_sides, recipe.test_side
    config.INPUT.MAX_SIZE_TRAIN = config.INPUT.MAX_SIZE_TEST = recipe.max_side
    config.TEST.DETECTIONS_PER_IMAGE = 100
    return config


def _c4_heads(config: Any, shapes: Mapping[str, Any], last: nn.Module, channels: int, batchnorm: bool) -> Any:
    """The last stage on every region, then (MoCo) BatchNorm, then class and box, and the mask."""
    model = config.MODEL
    (name, shape) = next(iter(shapes.items()))
    side = model.ROI_BOX_HEAD.POOLER_RESOLUTION
    region = nn.Sequential(OrderedDict(stage=last))
    if batchnorm:
        region.add_module("norm", nn.BatchNorm2d(channels))
    mask_shape = ShapeSpec(channels=channels, height=side, width=side)
    return C4Heads(
        in_features=[name],
        pooler=ROIPooler(
            output_size=side,
            scales=(1.0 / shape.stride,),
            sampling_ratio=model.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO,
            pooler_type=model.ROI_BOX_HEAD.POOLER_TYPE,
        ),
        res5=region,
        box_predictor=Outputs(config, ShapeSpec(channels=channels, height=1, width=1)),
        mask_head=MaskHead(config, mask_shape) if model.MASK_ON else None,
        num_classes=model.ROI_HEADS.NUM_CLASSES,
        batch_size_per_image=model.ROI_HEADS.BATCH_SIZE_PER_IMAGE,
        positive_fraction=model.ROI_HEADS.POSITIVE_FRACTION,
        proposal_matcher=Matcher(
            model.ROI_HEADS.IOU_THRESHOLDS, model.ROI_HEADS.IOU_LABELS, allow_low_quality_matches=False
        ),
    )
