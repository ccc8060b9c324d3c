"""Networks that predict a depth for every pixel, and their loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.segmentation.deeplab import map_shapes, stage_maps

__all__ = ["HEADS", "DepthBatch", "DepthModel", "Head"]

Head = Literal["linear", "mlp", "skips"]

HEADS: dict[str, str] = {
    "linear": "one 1x1 convolution on the last map",
    "mlp": "1x1 convolution, BatchNorm, ReLU, 1x1 convolution on the last map",
    "skips": "1x1 convolution to 128 channels and BatchNorm on the last map of every stride from 4 on, added at the "
    "finest of them, ReLU, 1x1 convolution",
}
FINEST_STRIDE = 4
SKIP_WIDTH = 128  # channels


class DepthBatch(NamedTuple):
    """Normalised images (B, 3, S, S) and depths (B, S, S) in units of the largest one; background is 1."""

    images: Tensor
    depths: Tensor


class DepthModel(nn.Module):
    """Backbone and 1x1 convolutions on its map or maps."""

    def __init__(self, backbone: Any, head: Head, resolution: Literal["image", "map"]) -> None:
        """See ``depth.DepthProblem``."""
        super().__init__()
        self.backbone, self.resolution = backbone, resolution
        width = backbone.num_features
        shapes = map_shapes(backbone) if head == "skips" else []
        self._maps = _used_maps([stride for _, stride in shapes])
        if head == "skips":
            self.hidden, width = _Skips([shapes[i][0] for i in self._maps]), SKIP_WIDTH
        elif head == "mlp":
            conv = nn.Conv2d(width, width, kernel_size=1, bias=False)
            self.hidden = nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())
        else:
            self.hidden = nn.Identity()
        self.last = nn.Conv2d(width, 1, kernel_size=1)
        assert self.last.bias is not None
        nn.init.ones_(self.last.bias)  # ours: start from an empty scene; most pixels are background

    def outputs(self, batch: DepthBatch) -> tuple[Tensor, Tensor]:
        """Predicted and true depths (B, h, w), at the resolution that counts."""
        device = self.last.weight.device
        predicted = self.last(self._features(batch.images.to(device)))
        depths = batch.depths.to(device)[:, None]
        if self.resolution == "map":
            depths = F.interpolate(depths, size=predicted.shape[-2:], mode="nearest")
        else:
            predicted = F.interpolate(predicted, size=depths.shape[-2:], mode="bilinear", align_corners=False)
        return predicted[:, 0], depths[:, 0]

    def forward(self, batch: DepthBatch) -> dict[str, Tensor]:
        return {"l1": F.l1_loss(*self.outputs(batch))}  # every image has as many pixels, so a plain mean will do

    def _features(self, images: Tensor) -> Tensor:
        if not self._maps:
            return self.hidden(self.backbone.forward_features(images))
        maps = stage_maps(self.backbone, images)
        return self.hidden([maps[i] for i in self._maps])


def _used_maps(strides: Sequence[int]) -> list[int]:
    """The last stage of every stride from ``FINEST_STRIDE`` on, the finest first; the last stage is among them."""
    if not strides:
        return []
    deepest = {stride: i for i, stride in enumerate(strides) if stride >= FINEST_STRIDE}
    return sorted({*deepest.values(), len(strides) - 1})


class _Skips(nn.Module):
    """Maps of several strides, the finest first, each with its own convolution, added at the finest."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(own, SKIP_WIDTH, kernel_size=1, bias=False), nn.BatchNorm2d(SKIP_WIDTH))
            for own in channels
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        size = maps[0].shape[-2:]
        projected = [project(one) for project, one in zip(self.projections, maps, strict=True)]
        resized = [F.interpolate(one, size=size, mode="bilinear", align_corners=False) for one in projected[1:]]
        return torch.stack([projected[0], *resized]).sum(0).relu()
