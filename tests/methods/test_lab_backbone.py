"""The pair of half-width encoders: what each sees, its widths, stages, gradients and stored state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from methods.backbones import Backbone, LabBackbone, build_backbone
from methods.lab import normalized_lab

WIDTHS = {"resnet9": 256, "resnet18": 512, "resnet50": 2048}
CASES = [(name, stem) for name in WIDTHS for stem in ("imagenet", "small")]


def _images(size: int = 32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def _build(name: str = "resnet9", stem: str = "small") -> LabBackbone:
    torch.manual_seed(0)
    return build_backbone(name, stem, color_space="lab").eval()  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "stem"), CASES)
def test_contract(name, stem):
    backbone, x = _build(name, stem), _images()
    assert isinstance(backbone, LabBackbone)
    assert isinstance(backbone, Backbone)
    assert backbone.num_features == WIDTHS[name]  # that of the RGB network
    features = backbone.forward_features(x)
    assert features.shape[:2] == (2, backbone.num_features)
    torch.testing.assert_close(backbone(x), features.mean(dim=(2, 3)), rtol=1e-5, atol=1e-6)
    for stage in backbone.stages:
        x = stage(x)
    torch.testing.assert_close(x, features)


@pytest.mark.parametrize("name", WIDTHS)
def test_every_layer_has_half_the_channels(name):
    whole = build_backbone(name)
    lab = build_backbone(name, color_space="lab")
    for encoder, in_channels in ((lab.encoder_l, 1), (lab.encoder_ab, 2)):
        pairs = zip(whole.named_modules(), encoder.named_modules(), strict=True)
        for (full_name, full), (half_name, half) in pairs:
            assert full_name == half_name
            if isinstance(full, nn.Conv2d | nn.Linear):
                expected = in_channels if full_name == "conv1" else full.weight.shape[1] // 2
                assert half.weight.shape[:2] == (full.weight.shape[0] // 2, expected), full_name
            elif isinstance(full, nn.BatchNorm2d):
                assert half.num_features == full.num_features // 2


def test_features_are_those_of_l_beside_those_of_ab():
    backbone, x = _build(), _images()
    lab = normalized_lab(x)
    parts = backbone.encoder_l(lab[:, :1]), backbone.encoder_ab(lab[:, 1:])
    torch.testing.assert_close(torch.cat(parts, dim=1), backbone(x))
    for ours, expected in zip(backbone.split_features(x), parts, strict=True):
        torch.testing.assert_close(ours, expected)


def test_each_encoder_sees_only_its_channels():
    backbone = _build()
    normalize = ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))
    dark, bright = (torch.stack([torch.full((8, 8), (v - m) / s) for m, s in normalize])[None] for v in (0.2, 0.8))
    f_dark, f_bright = backbone.split_features(dark), backbone.split_features(bright)
    # Grays differ in L alone (up to the rounding of the conversion).
    torch.testing.assert_close(f_dark[1], f_bright[1], rtol=1e-3, atol=1e-3)
    assert (f_dark[0] - f_bright[0]).abs().max() > 0.01


def test_encoders_start_with_different_weights():
    backbone = _build()
    assert not torch.equal(backbone.encoder_l.layer1[0].conv1.weight, backbone.encoder_ab.layer1[0].conv1.weight)


@pytest.mark.parametrize("name", WIDTHS)
def test_stages_hold_every_parameter_once_and_share_it(name):
    backbone = build_backbone(name, color_space="lab")
    inside = [p for stage in backbone.stages for p in stage.parameters()]
    assert {id(p) for p in inside} == {id(p) for p in backbone.parameters()}
    assert len(inside) == len({id(p) for p in inside})
    backbone.stages[0].requires_grad_(False)
    assert not backbone.encoder_l.conv1.weight.requires_grad
    assert not backbone.encoder_ab.conv1.weight.requires_grad
    assert backbone.encoder_ab.layer1[0].conv1.weight.requires_grad


def test_modes_of_the_backbone_reach_its_stages():
    backbone = _build().train()
    norms = [m for stage in backbone.stages for m in stage.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 16
    assert all(norm.training for norm in norms)
    backbone.eval()
    assert not any(norm.training for norm in norms)


@pytest.mark.parametrize("name", WIDTHS)
def test_state_round_trips(name, tmp_path):
    backbone, x = _build(name), _images()
    backbone.train()(x)  # moves the running statistics
    torch.save(backbone.state_dict(), tmp_path / "backbone.pt")
    torch.manual_seed(1)
    other = build_backbone(name, "small", color_space="lab")
    other.load_state_dict(torch.load(tmp_path / "backbone.pt", weights_only=True), strict=True)
    assert torch.equal(other.eval()(x), backbone.eval()(x))
    assert all(key.split(".")[0] in ("encoder_l", "encoder_ab") for key in backbone.state_dict())


@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_reach_both_encoders(bf16):
    backbone = _build().train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        features = backbone(_images())
    features.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())


def test_residual_blocks_start_as_identities_in_both_encoders():
    backbone = build_backbone("resnet18", zero_init_residual=True, color_space="lab")
    gains = [p for name, p in backbone.named_parameters() if name.endswith("bn2.weight")]
    assert len(gains) == 16
    assert all((gain == 0).all() for gain in gains)


def test_timm_models_and_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"half-width.*Choose one of: resnet9"):
        build_backbone("timm:convnext_atto", color_space="lab")
    with pytest.raises(ValueError, match="Unknown backbone 'resnet19'"):
        build_backbone("resnet19", color_space="lab")
