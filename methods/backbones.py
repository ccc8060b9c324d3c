"""The networks that transfer: ResNet-9 of Newell & Deng, ResNet-18/34/50, named as in torchvision, and timm models.

Every backbone has the same contract (class ``Backbone``): a map of features, its global average, and its stages in
order. Nothing of a method (projector, classifier) lives here, so what a checkpoint stores is exactly what transfers.
"""

from __future__ import annotations

import difflib
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from methods.lab import normalized_lab

__all__ = [
    "BACKBONES",
    "Backbone",
    "ColorSpace",
    "LabBackbone",
    "ResNet",
    "ResNet9",
    "Stem",
    "TimmBackbone",
    "build_backbone",
]

Stem = Literal["imagenet", "small"]
ColorSpace = Literal["rgb", "lab"]

TIMM_PREFIX = "timm:"
BACKBONES = ("resnet9", "resnet18", "resnet34", "resnet50")


@runtime_checkable
class Backbone(Protocol):
    """What methods and evaluations may rely on.

    Attributes:
        num_features: C, width of the feature map and of the pooled feature.
        stages: stem, stage 1, stage 2, ...; applying them one after the other is ``forward_features``. They share
            their parameters with the backbone, so freezing a stage freezes that part of the backbone.
    """

    num_features: int

    @property
    def stages(self) -> list[nn.Module]: ...

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> last feature map (B, C, h, w)."""
        ...

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> global average of the feature map (B, C)."""
        ...


def _pool(features_BChw: Tensor) -> Tensor:
    return features_BChw.mean(dim=(2, 3))


def _init_resnet(network: nn.Module, zero_init_residual: bool) -> None:
    """torchvision's initialisation: He-normal convolutions; on request the last norm of each block starts at zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual and isinstance(module, BasicBlock | Bottleneck):
            nn.init.zeros_((module.bn3 if isinstance(module, Bottleneck) else module.bn2).weight)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al., CVPR 2016), parameters named as in torchvision."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut, the stride in the 3x3 one ("v1.5"), named as in torchvision."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + shortcut)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """Projection where the block changes the shape; otherwise the identity."""
    if stride == 1 and in_channels == out_channels:
        return None
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


def _stage(
    block: type[BasicBlock | Bottleneck], in_channels: int, width: int, depth: int, stride: int
) -> nn.Sequential:
    """``depth`` blocks, the first with the stride."""
    rest = [block(width * block.expansion, width) for _ in range(depth - 1)]
    return nn.Sequential(block(in_channels, width, stride), *rest)


def _stem(kind: Stem, in_channels: int, width: int) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    """Convolution to `width` channels, BatchNorm, ReLU and pooling: what precedes the first stage."""
    is_small = kind == "small"
    kernel, stride = (3, 1) if is_small else (7, 2)
    convolution = nn.Conv2d(in_channels, width, kernel_size=kernel, stride=stride, padding=kernel // 2, bias=False)
    pool = nn.Identity() if is_small else nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    return convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True), pool


class ResNet(nn.Module):
    """ResNet without the classifier; torchvision's state dict without ``fc.*`` loads strictly.

    Our own modules because torchvision's import costs every worker process seconds (it loads torch's compiler).

    The small stem is the usual one for 32 px images: 3x3 convolution of stride 1, no max-pool.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: tuple[int, int, int, int],
        stem: Stem = "imagenet",
        zero_init_residual: bool = False,
        in_channels: int = 3,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu, self.maxpool = _stem(stem, in_channels, width)
        wide = width * block.expansion
        self.layer1 = _stage(block, width, width, layers[0], stride=1)
        self.layer2 = _stage(block, wide, 2 * width, layers[1], stride=2)
        self.layer3 = _stage(block, 2 * wide, 4 * width, layers[2], stride=2)
        self.layer4 = _stage(block, 4 * wide, 8 * width, layers[3], stride=2)
        self.num_features = 8 * wide
        _init_resnet(self, zero_init_residual)

    @property
    def stages(self) -> list[nn.Module]:
        stem = nn.Sequential(self.conv1, self.bn1, self.relu, self.maxpool)
        return [stem, self.layer1, self.layer2, self.layer3, self.layer4]

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return _pool(self.forward_features(x))


class _ConvBlock(nn.Module):
    """3x3 convolution, 2x2 max-pool, BatchNorm, CELU(0.075): pooled before the norm, as in the authors' code."""

    def __init__(self, in_channels: int, out_channels: int, ceil_mode: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2, ceil_mode=ceil_mode)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.CELU(alpha=0.075, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.pool(self.conv1(x))))


class _PixelLinear(nn.Linear):
    """Linear layer at every location of a map (B, C, h, w); without a copy when the map is channels_last."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResNet9(nn.Module):
    """ResNet-9 of Newell & Deng (CVPR 2020; ``princeton-vl/selfstudy: models/resnet.py``), 256 features.

    conv3x3(64)-BN-ReLU; stage 1: conv3x3(128)-pool-BN-CELU, residual block; stage 2: conv3x3(256)-pool-BN-CELU;
    stage 3: conv3x3(512)-pool-BN-CELU, residual block, Linear(512, 256) per location. Stride 8.

    ``stem="small"`` is this network, which the paper trains at 64 px. ``stem="imagenet"`` is our addition for large
    images: torchvision's stem (7x7 stride 2, BN, ReLU, 3x3 max-pool of stride 2) before the same stages, whose pools
    round odd sides up; stride 32.
    """

    def __init__(
        self, stem: Stem = "small", zero_init_residual: bool = False, in_channels: int = 3, width: int = 64
    ) -> None:
        super().__init__()
        self.num_features = 4 * width
        self.conv1, self.bn1, self.relu, self.maxpool = _stem(stem, in_channels, width)
        rounds_up = stem == "imagenet"  # so that small crops (SwAV) keep a location, as ResNet's strides do
        self.layer1 = nn.Sequential(_ConvBlock(width, 2 * width, rounds_up), BasicBlock(2 * width, 2 * width))
        self.layer2 = nn.Sequential(_ConvBlock(2 * width, 4 * width, rounds_up))
        self.layer3 = nn.Sequential(_ConvBlock(4 * width, 8 * width, rounds_up), BasicBlock(8 * width, 8 * width))
        self.fc = _PixelLinear(8 * width, self.num_features)
        _init_resnet(self, zero_init_residual)

    @property
    def stages(self) -> list[nn.Module]:
        stem = nn.Sequential(self.conv1, self.bn1, self.relu, self.maxpool)
        return [stem, self.layer1, self.layer2, nn.Sequential(self.layer3, self.fc)]

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        # A linear layer commutes with the average over locations, so it is applied to the pooled feature only.
        pooled = _pool(self.layer3(self.layer2(self.layer1(x))))
        return nn.functional.linear(pooled, self.fc.weight, self.fc.bias)


# Block and number of blocks in layer1..layer4.
_RESNETS: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


class LabBackbone(nn.Module):
    """CMC's pair of encoders (Tian et al., ECCV 2020): one of half width sees L, the other ab; features side by side.

    It takes RGB views like every backbone (ImageNet-normalised) and turns them into Lab itself, on the device and in
    float32, so that evaluation and detection need to know nothing of the colour space. ``encoder_l`` and ``encoder_ab``
    have the same architecture ("v1" of ``HobbitLong/CMC: models/resnet.py``: half the channels everywhere).
    """

    def __init__(self, encoder_l: Any, encoder_ab: Any) -> None:
        super().__init__()
        self.encoder_l, self.encoder_ab = encoder_l, encoder_ab
        self.num_features = encoder_l.num_features + encoder_ab.num_features

    @property
    def stages(self) -> list[nn.Module]:
        """Stage i of both encoders: a module that maps what stage i - 1 returned (the first: RGB views)."""
        pairs = zip(self.encoder_l.stages, self.encoder_ab.stages, strict=True)
        return [_LabStage(low, ab, is_first=i == 0) for i, (low, ab) in enumerate(pairs)]

    def split_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features of L and of ab: (B, 3, H, W) -> two of (B, C / 2)."""
        lab = normalized_lab(x)
        return self.encoder_l(lab[:, :1]), self.encoder_ab(lab[:, 1:])

    def forward_features(self, x: Tensor) -> Tensor:
        lab = normalized_lab(x)
        maps = self.encoder_l.forward_features(lab[:, :1]), self.encoder_ab.forward_features(lab[:, 1:])
        return torch.cat(maps, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.split_features(x), dim=1)


class _LabStage(nn.Module):
    """One stage of both encoders of a ``LabBackbone``; between stages their maps stand side by side."""

    def __init__(self, stage_l: nn.Module, stage_ab: nn.Module, is_first: bool) -> None:
        super().__init__()
        self.stage_l, self.stage_ab, self.is_first = stage_l, stage_ab, is_first

    def forward(self, x: Tensor) -> Tensor:
        if self.is_first:
            lab = normalized_lab(x)
            x_l, x_ab = lab[:, :1], lab[:, 1:]
        else:
            x_l, x_ab = x.chunk(2, dim=1)
        return torch.cat([self.stage_l(x_l), self.stage_ab(x_ab)], dim=1)


class TimmBackbone(nn.Module):
    """A timm model that ends in a feature map (convolutional networks), without its classifier.

    It keeps timm's own stem and initialisation. ``forward`` is the plain average of the map, whatever pooling the
    model itself uses, because class activation maps and dense tasks rest on that identity. Parameters that the map
    does not depend on (a norm in the head) are frozen: they would wait for gradients that never come.
    """

    def __init__(self, name: str, model: Any) -> None:
        super().__init__()
        self.model = model
        self.num_features = int(model.num_features)
        size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 64, 64))
        was_training = model.training
        features = model.eval().forward_features(torch.zeros(1, *size))
        model.train(was_training)
        if features.dim() != 4 or features.shape[1] != self.num_features:
            raise ValueError(
                f"timm model {name!r} gives features of shape {tuple(features.shape)} for one {size[1]} px image, but "
                "a backbone must give a map (B, C, h, w). Choose a convolutional network, e.g. timm:convnext_atto."
            )
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)
        self._stage_names = [
            child_name
            for child_name, child in model.named_children()
            if any(p.requires_grad for p in child.parameters())
        ]

    @property
    def stages(self) -> list[nn.Module]:
        """The top-level modules that the map depends on, in order (timm has no common notion of a stage)."""
        return [self.model.get_submodule(name) for name in self._stage_names]

    def forward_features(self, x: Tensor) -> Tensor:
        return self.model.forward_features(x)

    def forward(self, x: Tensor) -> Tensor:
        return _pool(self.forward_features(x))


def _build_timm(name: str, stem: Stem) -> TimmBackbone:
    if stem != "imagenet":
        raise ValueError(f"timm:{name} brings its own stem, so stem={stem!r} cannot apply. Set stem to 'imagenet'.")
    try:
        import timm  # type: ignore[import-not-found]  # an extra that only these backbones need
    except ImportError as error:
        raise ValueError(f"Backbone timm:{name} needs the package timm: install it with `pip install timm`.") from error
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=5)
        raise ValueError(
            f"timm has no model {name!r}. Close names: {', '.join(close) or 'none'}. "
            "`python -c 'import timm; print(timm.list_models())'` lists all."
        )
    return TimmBackbone(name, timm.create_model(name, pretrained=False, num_classes=0))


def build_backbone(
    name: str, stem: Stem = "imagenet", zero_init_residual: bool = False, color_space: ColorSpace = "rgb"
) -> Any:
    """A backbone with random weights from torch's global generator.

    Args:
        name: resnet9, resnet18, resnet34, resnet50, or ``timm:NAME``.
        stem: imagenet (7x7 stride 2 and max-pool) or small (3x3 stride 1, no pooling).
        zero_init_residual: start every residual block as the identity (SimSiam); timm models keep their own
            initialisation.
        color_space: rgb, or lab for the two half-width encoders of CMC (``LabBackbone``).

    Returns:
        A module that fulfils ``Backbone``.

    Raises:
        ValueError: unknown name or stem, or a timm model that is not installed or gives no feature map.
    """
    if stem not in get_args(Stem):
        raise ValueError(f"Unknown stem {stem!r}. Choose one of: {', '.join(get_args(Stem))}.")
    if name.startswith(TIMM_PREFIX):
        if color_space != "rgb":
            raise ValueError(
                f"{name} cannot be split into two half-width encoders of L and ab, as cmc needs. Choose one of: "
                f"{', '.join(BACKBONES)}."
            )
        return _build_timm(name.removeprefix(TIMM_PREFIX), stem)
    if color_space == "lab":
        encoders = (_build_resnet(name, stem, zero_init_residual, channels, 32) for channels in (1, 2))
        return LabBackbone(*encoders)
    return _build_resnet(name, stem, zero_init_residual)


def _build_resnet(
    name: str, stem: Stem, zero_init_residual: bool, in_channels: int = 3, width: int = 64
) -> ResNet | ResNet9:
    if name == "resnet9":
        return ResNet9(stem, zero_init_residual, in_channels, width)
    if name not in _RESNETS:
        raise ValueError(f"Unknown backbone {name!r}. Choose one of: {', '.join(BACKBONES)}, or {TIMM_PREFIX}NAME.")
    block, layers = _RESNETS[name]
    return ResNet(block, layers, stem, zero_init_residual, in_channels, width)
