"""Backbones against torchvision with the same weights, and against the paper's description written out."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from methods.backbones import BACKBONES, Backbone, build_backbone


def _images(size: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
@pytest.mark.parametrize("training", [False, True])
def test_torchvision_weights_give_torchvision_features(name, training):
    torch.manual_seed(0)
    reference = getattr(torchvision.models, name)()
    weights = {k: v for k, v in reference.state_dict().items() if not k.startswith("fc.")}
    backbone = build_backbone(name, "imagenet")
    backbone.load_state_dict(weights, strict=True)
    reference.fc = nn.Identity()
    reference.train(training)
    backbone.train(training)
    x = _images(48, batch=4)
    torch.testing.assert_close(backbone(x), reference(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "stem", "side"),
    [("resnet18", "imagenet", 2), ("resnet18", "small", 8), ("resnet9", "small", 8), ("resnet9", "imagenet", 2)],
)
def test_contract(name, stem, side):
    backbone = build_backbone(name, stem).eval()
    assert isinstance(backbone, Backbone)
    x = _images(64)
    features = backbone.forward_features(x)
    assert features.shape == (2, backbone.num_features, side, side)
    torch.testing.assert_close(backbone(x), features.mean(dim=(2, 3)), rtol=1e-5, atol=1e-6)
    for stage in backbone.stages:
        x = stage(x)
    torch.testing.assert_close(x, features)


def test_stages_hold_every_parameter_once_and_share_it():
    for name in BACKBONES:
        backbone = build_backbone(name)
        inside = [p for stage in backbone.stages for p in stage.parameters()]
        assert {id(p) for p in inside} == {id(p) for p in backbone.parameters()}
        assert len(inside) == len({id(p) for p in inside})
        backbone.stages[0].requires_grad_(False)
        assert not backbone.conv1.weight.requires_grad


def test_resnet50_map_of_84_px_is_3x3():
    # The CAMs of the few-shot studies have nine locations.
    with torch.device("meta"):
        assert build_backbone("resnet50").forward_features(torch.zeros(1, 3, 84, 84)).shape == (1, 2048, 3, 3)


@pytest.mark.parametrize(
    ("name", "stem", "count"),
    [
        # torchvision's documented sizes minus its classifier of 1,000 classes.
        ("resnet18", "imagenet", 11_689_512 - 513_000),
        ("resnet34", "imagenet", 21_797_672 - 513_000),
        ("resnet50", "imagenet", 25_557_032 - 2_049_000),
        ("resnet18", "small", 11_689_512 - 513_000 - 64 * 3 * (49 - 9)),
        # Convolutions of 9 cells, two BatchNorm vectors each, and the layer per location.
        (
            "resnet9",
            "small",
            9 * (3 * 64 + 64 * 128 + 2 * 128 * 128 + 128 * 256 + 256 * 512 + 2 * 512 * 512)
            + 2 * (64 + 128 + 2 * 128 + 256 + 512 + 2 * 512)
            + 512 * 256
            + 256,
        ),
    ],
)
def test_parameter_count(name, stem, count):
    assert sum(p.numel() for p in build_backbone(name, stem).parameters()) == count


def _resnet9_by_hand(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """ResNet-9 in plain functions, BatchNorm on batch statistics."""

    def conv(x, name):
        return F.conv2d(x, weights[f"{name}.weight"], padding=1)

    def norm(x, name):
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        gain, bias = (weights[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * gain + bias

    def block(x, name):
        y = norm(conv(x, f"{name}.conv1"), f"{name}.bn1").relu()
        return (x + norm(conv(y, f"{name}.conv2"), f"{name}.bn2")).relu()

    def down(x, name):
        x = norm(F.max_pool2d(conv(x, f"{name}.conv1"), 2), f"{name}.bn")
        return torch.where(x > 0, x, 0.075 * (torch.exp(x / 0.075) - 1))  # CELU

    x = norm(conv(x, "conv1"), "bn1").relu()
    x = block(down(x, "layer1.0"), "layer1.1")
    x = down(x, "layer2.0")
    x = block(down(x, "layer3.0"), "layer3.1")
    locations = x.permute(0, 2, 3, 1) @ weights["fc.weight"].T + weights["fc.bias"]
    return locations.mean((1, 2))


def test_resnet9_is_the_papers_network():
    torch.manual_seed(0)
    backbone = build_backbone("resnet9", "small").double()
    for p in backbone.parameters():
        nn.init.normal_(p, std=0.1)
    x = _images(16, batch=3).double()
    torch.testing.assert_close(backbone(x), _resnet9_by_hand(dict(backbone.named_parameters()), x))


@pytest.mark.parametrize(("name", "last"), [("resnet9", "bn2"), ("resnet18", "bn2"), ("resnet50", "bn3")])
def test_zero_init_residual(name, last):
    def gains(zero):
        modules = build_backbone(name, zero_init_residual=zero).named_modules()
        return [m.weight for n, m in modules if n.split(".")[-1] == last and "." in n]

    assert gains(True)
    assert all((g == 0).all() for g in gains(True))
    assert all((g == 1).all() for g in gains(False))


def test_unknown_names_are_refused_with_the_list():
    with pytest.raises(ValueError, match="resnet9, resnet18, resnet34, resnet50, or timm:NAME"):
        build_backbone("resnet19")
    with pytest.raises(ValueError, match="imagenet, small"):
        build_backbone("resnet18", "tiny")  # type: ignore[arg-type]


class _FakeTimmModel(nn.Module):
    num_features = 5

    def __init__(self, is_map: bool) -> None:
        super().__init__()
        self.stem, self.act, self.body = nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.Conv2d(4, 5, 1)
        self.head = nn.LayerNorm(5)  # as in ConvNeXt: not part of the feature map
        self.is_map = is_map

    def forward_features(self, x):
        x = self.body(self.act(self.stem(x)))
        return x if self.is_map else x.flatten(2).transpose(1, 2)


def _fake_timm() -> types.ModuleType:
    module = types.ModuleType("timm")
    module.is_model = lambda name: name in ("conv", "vit")  # type: ignore[attr-defined]
    module.list_models = lambda: ["conv", "vit"]  # type: ignore[attr-defined]
    module.create_model = lambda name, pretrained, num_classes: _FakeTimmModel(name == "conv")  # type: ignore[attr-defined]
    return module


def test_timm_models_follow_the_contract_or_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", _fake_timm())
    backbone = build_backbone("timm:conv")
    assert isinstance(backbone, Backbone)
    assert backbone.stages == [backbone.model.stem, backbone.model.body]
    assert not any(p.requires_grad for p in backbone.model.head.parameters())
    assert all(p.requires_grad for stage in backbone.stages for p in stage.parameters())
    assert backbone.training
    x = _images(32)
    torch.testing.assert_close(backbone(x), backbone.forward_features(x).mean((2, 3)))
    with pytest.raises(ValueError, match=r"map \(B, C, h, w\)"):
        build_backbone("timm:vit")
    with pytest.raises(ValueError, match="Close names: conv"):
        build_backbone("timm:convv")
    with pytest.raises(ValueError, match="own stem"):
        build_backbone("timm:conv", "small")


def test_missing_timm_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="pip install timm"):
        build_backbone("timm:resnet18")
