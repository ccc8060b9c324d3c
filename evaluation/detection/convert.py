"""Weights of our ResNets (named as in torchvision) as weights of detectron2's, and the proof that they arrived.

The map is that of ``facebookresearch/moco: detection/convert-pretrain-to-detectron2.py``: conv1, bn1 become the stem,
layer1..4 become res2..5, a BatchNorm becomes the ``norm`` of its convolution, downsample.0/1 become shortcut and its
norm. That script drops what it does not know; here every tensor must find its place, on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from methods.backbones import BasicBlock, ResNet

__all__ = ["detectron_name", "load_backbone", "resnet_depth", "to_detectron", "verify_features"]

TOLERANCE = 1e-5  # largest difference of two feature maps, as a part of the largest feature

_COUNTER = "num_batches_tracked"
_NAME = re.compile(
    r"(?:(?P<stem>conv1|bn1)|layer(?P<stage>[1-4])\.(?P<block>\d+)\.(?:(?P<kind>conv|bn)(?P<place>[1-3])"
    r"|downsample\.(?P<shortcut>[01])))\.(?P<value>weight|bias|running_mean|running_var|num_batches_tracked)"
)


def detectron_name(name: str) -> str:
    """The name of a backbone tensor in detectron2's ResNet: "layer1.0.bn2.bias" -> "res2.0.conv2.norm.bias".

    Raises:
        ValueError: no tensor of a ResNet is called so.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"The backbone tensor {name!r} has no place in detectron2's ResNet; known are conv1, bn1 and "
            "layer1..layer4 with conv1..3, bn1..3 and downsample. Give the weights of a resnet18/34/50 backbone."
        )
    part = match.groupdict()
    if part["stem"]:
        layer, is_norm = "stem.conv1", part["stem"] == "bn1"
    else:
        block = f"res{int(part['stage']) + 1}.{part['block']}"
        if part["shortcut"]:
            layer, is_norm = f"{block}.shortcut", part["shortcut"] == "1"
        else:
            layer, is_norm = f"{block}.conv{part['place']}", part["kind"] == "bn"
    return f"{layer}.norm.{part['value']}" if is_norm else f"{layer}.{part['value']}"


def to_detectron(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's state dict under detectron2's names.

    Raises:
        ValueError: a tensor that detectron2's ResNet has no place for.
    """
    return {detectron_name(name): value for name, value in state.items()}


def resnet_depth(backbone: Any) -> int | None:
    """18, 34 or 50 where detectron2's ResNet can be this very network; else None (another stem, width or kind)."""
    if not isinstance(backbone, ResNet) or not isinstance(backbone.maxpool, nn.MaxPool2d):
        return None
    stem: Any = backbone.conv1
    if tuple(stem.weight.shape) != (64, 3, 7, 7):
        return None
    layers: list[Any] = [backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4]
    kind = "basic" if isinstance(layers[0][0], BasicBlock) else "bottleneck"
    known = {"basic 2 2 2 2": 18, "basic 3 4 6 3": 34, "bottleneck 3 4 6 3": 50}
    return known.get(" ".join([kind, *(str(len(layer)) for layer in layers)]))


def load_backbone(backbone: nn.Module, parts: Mapping[str, nn.Module]) -> None:
    """Copy all weights and statistics of our backbone into detectron2's modules, frozen ones staying frozen.

    Args:
        backbone: resnet18/34/50.
        parts: prefix -> module: {"": ResNet} for a whole ResNet, {"": ResNet up to res4, "res5.": its last stage} where
            the last stage is part of the region heads.

    Raises:
        ValueError: a tensor of the backbone has no place, a tensor of detectron2 got no value, or a shape differs.
    """
    source = to_detectron(backbone.state_dict())
    target = {prefix + name: tensor for prefix, module in parts.items() for name, tensor in _tensors(module).items()}
    lost = sorted(set(source) - set(target))
    empty = sorted(set(target) - set(source))
    if lost or empty:
        raise ValueError(
            f"The backbone's weights do not fit detectron2's ResNet: {len(lost)} tensors have no place there "
            f"({_few(lost)}) and {len(empty)} of its tensors got no value ({_few(empty)}). Check that the checkpoint "
            "is a whole resnet18, resnet34 or resnet50 with the imagenet stem."
        )
    for name, tensor in target.items():
        if tensor.shape != source[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(source[name].shape)} in the backbone, {tuple(tensor.shape)} in detectron2."
            )
        with torch.no_grad():
            tensor.copy_(source[name])
    trained = {detectron_name(name): parameter.requires_grad for name, parameter in backbone.named_parameters()}
    for prefix, module in parts.items():
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(trained[prefix + name])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.state_dict(keep_vars=True))


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"


@torch.no_grad()
def verify_features(backbone: Any, trunk: nn.Module, res5: nn.Module | None, images: Tensor) -> float:
    """Largest difference of our and detectron2's features of the same images, as a part of the largest feature.

    Args:
        backbone: ours, on the CPU.
        trunk: detectron2's ResNet with output "res4" (and "res5" where it has that stage).
        res5: the last stage where it is apart.
        images: (B, 3, H, W), normalised.

    Raises:
        ValueError: above ``TOLERANCE``.
    """
    modules = [module for module in (backbone, trunk, res5) if module is not None]
    were_training = [{m: m.training for m in module.modules()} for module in modules]
    for module in modules:
        module.eval()
    *stem, last = backbone.stages
    ours = {"res4": nn.Sequential(*stem)(images)}
    ours["res5"] = last(ours["res4"])
    found = trunk(images)
    if res5 is not None:
        found = {**found, "res5": res5(found["res4"])}
    for states in were_training:
        for module, training in states.items():
            module.training = training
    worst = 0.0
    for name, expected in ours.items():
        difference = float((found[name] - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
        if not difference <= TOLERANCE:
            raise ValueError(
                f"detectron2's {name} differs from the backbone's by {difference:.2g} of its largest value "
                f"(allowed: {TOLERANCE:g}), so the weights were not converted faithfully."
            )
        worst = max(worst, difference)
    return worst
