"""DeepLab v3, v3+ and an FCN around any backbone: dilation in place of stride, ASPP, decoder, auxiliary head.

Chen et al., "Rethinking Atrous Convolution" (arXiv 1706.05587) and "Encoder-Decoder with Atrous Separable Convolution"
(ECCV 2018). Sizes as in ``open-mmlab/mmsegmentation: configs/_base_/models/deeplabv3_r50-d8.py`` (v3) and in
``VainF/DeepLabV3Plus-Pytorch: network/_deeplab.py`` (v3+, plain convolutions).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.backbones import BasicBlock, Bottleneck, ResNet, TimmBackbone

__all__ = ["DeepLab", "HeadKind", "dilate", "map_shapes", "stage_maps"]

# One map of every stride from 4 on, added; ASPP on the last map; ASPP and an early map.
HeadKind = Literal["fcn", "v3", "v3plus"]

LOW_LEVEL_STRIDE = 4  # of the map that the v3+ decoder adds, and of the finest one that "fcn" takes
LOW_LEVEL_CHANNELS = 48
PROBE = 128  # pixels; side of the image that finds channels and strides, a multiple of every usual stride


def dilate(backbone: nn.Module, output_stride: int) -> None:
    """Replace the strides of the last stages of every ResNet in a backbone by dilation, in place.

    All parameters stay the same objects. Every second (fourth, ...) value of the denser map is a value of the old one:
    a convolution that loses its stride keeps its own dilation, those after it get it times the stride (torchvision's
    ``replace_stride_with_dilation``). Other networks, and those whose stride is no larger, stay as they are.

    Args:
        backbone: of ``methods.backbones``.
        output_stride: largest stride that is allowed; a stem alone may have more.
    """
    for network in backbone.modules():
        if isinstance(network, ResNet):
            _dilate_resnet(network, output_stride)


def _dilate_resnet(network: ResNet, output_stride: int) -> None:
    stem: Any = network.conv1
    stride, dilation = stem.stride[0] * getattr(network.maxpool, "stride", 1), 1  # the small stem pools by nn.Identity
    stages: list[Any] = [network.layer1, network.layer2, network.layer3, network.layer4]
    for stage in stages:
        first = stage[0]
        own, before = _strided(first).stride[0], dilation
        if stride * own > output_stride:
            dilation *= own
            _strided(first).stride = (1, 1)
            if first.downsample is not None:
                first.downsample[0].stride = (1, 1)
        else:
            stride *= own
        for i, block in enumerate(stage if dilation > 1 else ()):
            _set_dilation(block, before if i == 0 else dilation, dilation)


def _strided(block: Any) -> nn.Conv2d:
    """The convolution that carries a block's stride."""
    assert isinstance(block, BasicBlock | Bottleneck)
    return block.conv2 if isinstance(block, Bottleneck) else block.conv1


def _set_dilation(block: Any, first: int, rest: int) -> None:
    """Dilation of the 3x3 convolution that carries the stride, and of the one after it."""
    convs = [block.conv2] if isinstance(block, Bottleneck) else [block.conv1, block.conv2]
    for conv, dilation in zip(convs, (first, rest), strict=False):
        conv.dilation = conv.padding = (dilation, dilation)


def stage_maps(backbone: Any, images: Tensor) -> list[Tensor]:
    """Maps after each stage; the last one is ``forward_features``.

    Args:
        backbone: of ``methods.backbones``.
        images: float (B, 3, H, W).

    Returns:
        One (B, C_i, h_i, w_i) per stage.
    """
    if isinstance(backbone, TimmBackbone):
        return _hooked_maps(backbone, images)
    maps = []
    for stage in backbone.stages:
        images = stage(images)
        maps.append(images)
    return maps


def _hooked_maps(backbone: TimmBackbone, images: Tensor) -> list[Tensor]:
    """The maps of a timm model: between its stages it may call modules without parameters (ReLU, pooling)."""
    maps: list[Any] = []
    hooks = [
        stage.register_forward_hook(lambda module, inputs, output: maps.append(output)) for stage in backbone.stages
    ]
    try:
        last = backbone.forward_features(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [*maps[:-1], last]


@torch.no_grad()
def map_shapes(backbone: Any) -> list[tuple[int, int]]:
    """(channels, stride) of the map after each stage, found by running one small image."""
    was_training = [module for module in backbone.modules() if module.training]
    backbone.eval()
    parameter = next(backbone.parameters())
    maps = stage_maps(backbone, torch.zeros(1, 3, PROBE, PROBE, device=parameter.device))
    for module in was_training:
        module.training = True
    return [(found.shape[1], round(PROBE / found.shape[3])) for found in maps]


def _conv(
    in_channels: int, out_channels: int, kernel: int, dilation: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.ReLU]:
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=False)
    return conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)


class _Aspp(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1 and dilated 3x3 convolutions and the global average, side by side."""

    def __init__(self, in_channels: int, width: int, rates: Sequence[int]) -> None:
        super().__init__()
        branches = [_conv(in_channels, width, 1 if rate == 1 else 3, rate) for rate in rates]
        self.branches = nn.ModuleList(nn.Sequential(*branch) for branch in branches)
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_conv(in_channels, width, 1))
        self.out_channels = width * (len(rates) + 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooled(x).expand(-1, -1, *x.shape[2:])  # bilinear resizing of one value is that value
        return torch.cat([pooled, *(branch(x) for branch in self.branches)], dim=1)


class _Decoder(nn.Module):
    """The head of v3+: ASPP, brought to the size of an early map, which is joined with few channels."""

    def __init__(
        self, in_channels: int, low_channels: int, width: int, rates: Sequence[int], dropout: float, num_classes: int
    ) -> None:
        super().__init__()
        aspp = _Aspp(in_channels, width, rates)
        self.context = nn.Sequential(aspp, *_conv(aspp.out_channels, width, 1), nn.Dropout(dropout))
        self.low_level = nn.Sequential(*_conv(low_channels, LOW_LEVEL_CHANNELS, 1))
        self.classifier = nn.Sequential(*_conv(width + LOW_LEVEL_CHANNELS, width, 3), nn.Conv2d(width, num_classes, 1))

    def forward(self, low: Tensor, x: Tensor) -> Tensor:
        low = self.low_level(low)
        context = F.interpolate(self.context(x), size=low.shape[2:], mode="bilinear", align_corners=False)
        return self.classifier(torch.cat([low, context], dim=1))


class _SkipFcn(nn.Module):
    """Maps of several strides, brought to the finest, added, classified (FCN-8s of Long et al., CVPR 2015).

    Unlike there, maps are added before the classifier, so that one convolution sees all of them.
    """

    def __init__(self, channels: Sequence[int], width: int, dropout: float, num_classes: int) -> None:
        """Args: channels: of the maps, the finest first."""
        super().__init__()
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(own, width, 1, bias=False), nn.BatchNorm2d(width)) for own in channels
        )
        self.classifier = nn.Sequential(nn.ReLU(), _fcn(width, width, dropout, num_classes))

    def forward(self, *maps: Tensor) -> Tensor:
        projected = [project(found) for project, found in zip(self.projections, maps, strict=True)]
        size = projected[0].shape[2:]
        resized = [F.interpolate(found, size=size, mode="bilinear", align_corners=False) for found in projected[1:]]
        return self.classifier(torch.stack([projected[0], *resized]).sum(0))


def _fcn(in_channels: int, width: int, dropout: float, num_classes: int) -> nn.Sequential:
    """One 3x3 convolution and a classifier (Long et al. 2015; mmsegmentation's FCNHead with one convolution)."""
    return nn.Sequential(*_conv(in_channels, width, 3), nn.Dropout2d(dropout), nn.Conv2d(width, num_classes, 1))


def _v3(in_channels: int, width: int, rates: Sequence[int], dropout: float, num_classes: int) -> nn.Sequential:
    aspp = _Aspp(in_channels, width, rates)
    classifier = nn.Conv2d(width, num_classes, 1)
    return nn.Sequential(aspp, *_conv(aspp.out_channels, width, 3), nn.Dropout2d(dropout), classifier)


class DeepLab(nn.Module):
    """A backbone with a segmentation head; its strides are replaced by dilation in place.

    Attributes:
        output_stride: of the logits.
    """

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        *,
        head: HeadKind,
        output_stride: int,
        width: int,
        rates: Sequence[int] = (),
        dropout: float = 0.0,
        auxiliary_width: int = 0,
    ) -> None:
        """The heads are new, the backbone's parameters stay.

        Args:
            backbone: of ``methods.backbones``; changed in place.
            num_classes: C.
            head: see ``HeadKind``.
            output_stride: largest stride of the last map, see ``dilate``.
            width: channels in the head.
            rates: of ASPP; "fcn" has none.
            dropout: before the classifiers.
            auxiliary_width: channels of an FCN head on the map before the last stage; 0 for none.
        """
        super().__init__()
        dilate(backbone, output_stride)
        self.backbone = backbone
        shapes = map_shapes(backbone)
        self._used = _used_maps(head, [stride for _, stride in shapes])
        channels = [shapes[i][0] for i in self._used]
        self.output_stride = shapes[self._used[0]][1]
        if head == "fcn":
            self.head = _SkipFcn(channels, width, dropout, num_classes)
        elif head == "v3":
            self.head = _v3(channels[0], width, rates, dropout, num_classes)
        else:
            self.head = _Decoder(channels[-1], channels[0], width, rates, dropout, num_classes)
        self._before_last = max(len(shapes) - 2, 0)
        before_last = shapes[self._before_last][0]
        self.auxiliary = _fcn(before_last, auxiliary_width, dropout, num_classes) if auxiliary_width else None
        for added in (self.head, self.auxiliary):
            if added is not None:
                _initialize(added)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits at the network's own resolution, and those of the auxiliary head in training mode.

        Args:
            images: float (B, 3, H, W), ImageNet-normalised.
        """
        maps = stage_maps(self.backbone, images)
        logits = self.head(*(maps[i] for i in self._used))
        if self.auxiliary is None or not self.training:
            return logits, None
        return logits, self.auxiliary(maps[self._before_last])


def _used_maps(head: HeadKind, strides: Sequence[int]) -> list[int]:
    """Stages whose maps the head takes, the finest first."""
    last = len(strides) - 1
    if head == "v3":
        return [last]
    if head == "v3plus":
        return [max((i for i, stride in enumerate(strides) if stride <= LOW_LEVEL_STRIDE), default=0), last]
    deepest = {stride: i for i, stride in enumerate(strides) if stride >= LOW_LEVEL_STRIDE}
    return sorted(deepest.values()) or [last]


def _initialize(head: nn.Module) -> None:
    """He-normal convolutions, classifiers from N(0, 0.01) with zero bias (mmsegmentation's)."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
