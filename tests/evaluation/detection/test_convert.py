"""Our ResNets as detectron2's: every tensor finds its place, and the features are the same."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from evaluation.detection.convert import detectron_name, load_backbone, resnet_depth, to_detectron, verify_features
from evaluation.detection.detectron import BasicStem, ResNet
from methods.backbones import build_backbone

NAMES = ("resnet18", "resnet34", "resnet50")


def lively(name: str, seed: int = 0) -> Any:
    """A backbone whose BatchNorms all differ, as after training."""
    torch.manual_seed(seed)
    backbone = build_backbone(name)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return backbone


def parts_for(name: str, whole: bool = False) -> tuple[Any, nn.Module | None, dict[str, nn.Module]]:
    """(trunk, last stage where it is apart, both by prefix) of detectron2."""
    depth = int(name.removeprefix("resnet"))
    groups = ResNet.make_default_stages(depth, norm="BN", **({"stride_in_1x1": False} if depth == 50 else {}))
    if whole:
        trunk = ResNet(BasicStem(norm="BN"), groups, out_features=["res4", "res5"])
        return trunk, None, {"": trunk}
    trunk, last = ResNet(BasicStem(norm="BN"), groups[:3], out_features=["res4"]), nn.Sequential(*groups[3])
    return trunk, last, {"": trunk, "res5.": last}


def reference_name(name: str) -> str:
    """The map of MoCo's script as a chain of replacements."""
    if "layer" not in name:
        name = f"stem.{name}"
    for stage in range(1, 5):
        name = name.replace(f"layer{stage}", f"res{stage + 1}")
    for number in range(1, 4):
        name = name.replace(f"bn{number}", f"conv{number}.norm")
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_of_the_published_script(name: str) -> None:
    with torch.device("meta"):  # only the names are needed
        ours = build_backbone(name).state_dict()
        theirs = {key for key in getattr(torchvision.models, name)().state_dict() if not key.startswith("fc.")}
    assert set(ours) == theirs
    assert {key: detectron_name(key) for key in ours} == {key: reference_name(key) for key in ours}
    assert len(to_detectron(ours)) == len(ours)


@pytest.mark.parametrize("name", ["fc.weight", "encoder.conv1.weight", "layer5.0.conv1.weight", "conv1.scale"])
def test_an_unknown_tensor_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(repr(name))} has no place in detectron2's ResNet"):
        detectron_name(name)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_features_are_the_same(name: str, whole: bool) -> None:
    backbone = lively(name)
    trunk, last, parts = parts_for(name, whole)
    images = torch.randn(1, 3, 64, 96)
    with pytest.raises(ValueError, match="differs from the backbone's by"):
        verify_features(backbone, trunk, last, images)
    load_backbone(backbone, parts)
    backbone.train()
    trunk.train()
    assert verify_features(backbone, trunk, last, images) <= 1e-5
    assert all(module.training for module in [*backbone.modules(), *trunk.modules()])
    with torch.no_grad():  # compared once more, by the backbone's own forward
        features = trunk.eval()(images)["res5"] if last is None else last.eval()(trunk.eval()(images)["res4"])
        torch.testing.assert_close(features, backbone.eval().forward_features(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda trunk: trunk.stem.conv1.norm.running_mean.add_(0.05),
        lambda trunk: trunk.res4[1].conv2.weight.mul_(1.001),
        lambda trunk: trunk.res3[0].shortcut.norm.bias[0].add_(0.1),
    ],
)
def test_one_wrong_tensor_is_noticed(change: Any) -> None:
    backbone, (trunk, last, parts) = lively("resnet18"), parts_for("resnet18")
    load_backbone(backbone, parts)
    with torch.no_grad():
        change(trunk)
    with pytest.raises(ValueError, match="not converted faithfully"):
        verify_features(backbone, trunk, last, torch.randn(1, 3, 64, 64))


def test_every_tensor_must_arrive_and_every_place_be_filled() -> None:
    _, _, parts = parts_for("resnet18")
    lacking = lively("resnet18")
    del lacking.layer3[1].bn2
    with pytest.raises(ValueError, match=r"0 tensors have no place there \(none\) and 5 of its .*res4\.1\.conv2\.norm"):
        load_backbone(lacking, parts)
    with pytest.raises(ValueError, match=r"18 tensors have no place there \(res5\.0\.conv1\.norm\.bias"):
        load_backbone(lively("resnet18"), {"": parts[""], "res5.": parts["res5."][1:]})  # type: ignore[index]
    with pytest.raises(ValueError, match="have no place there"):
        load_backbone(lively("resnet50"), parts)
    wider = lively("resnet18")
    wider.conv1 = nn.Conv2d(1, 64, 7, bias=False)
    with pytest.raises(ValueError, match=r"stem\.conv1\.weight has shape \(64, 1, 7, 7\).*\(64, 3, 7, 7\)"):
        load_backbone(wider, parts)


def test_frozen_stays_frozen() -> None:
    backbone, (trunk, last, parts) = lively("resnet18"), parts_for("resnet18")
    assert last is not None
    for stage in backbone.stages[:2]:
        stage.requires_grad_(False)
    load_backbone(backbone, parts)
    frozen = {name for name, parameter in trunk.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in trunk.named_parameters() if name.startswith(("stem.", "res2."))}
    assert all(parameter.requires_grad for parameter in last.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_which_backbones_detectron2_has(name: str) -> None:
    with torch.device("meta"):
        assert resnet_depth(build_backbone(name)) == int(name.removeprefix("resnet"))
        assert resnet_depth(build_backbone(name, stem="small")) is None
        assert resnet_depth(build_backbone(name, color_space="lab")) is None


def test_resnet9_is_not_among_them() -> None:
    with torch.device("meta"):
        assert resnet_depth(build_backbone("resnet9")) is None
        assert resnet_depth(build_backbone("resnet9", stem="small")) is None
