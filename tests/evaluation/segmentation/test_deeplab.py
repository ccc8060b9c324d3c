"""Dilation against torchvision and against the strided network; heads: shapes, strides, auxiliary logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision

from evaluation.segmentation.deeplab import DeepLab, dilate, map_shapes, stage_maps
from evaluation.segmentation.problem import RECIPES
from methods.backbones import BasicBlock, Bottleneck, ResNet, ResNet9, build_backbone

IMAGE = torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(0))


def _trained(network: Any) -> Any:
    """Running statistics and norms away from their start, so that a wrong mode or order shows."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in network.state_dict().items():
        if "running" in name or ("bn" in name and tensor.is_floating_point()):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return network.eval()


def _narrow(block: Any, stem: Any = "imagenet") -> Any:
    torch.manual_seed(0)
    return _trained(ResNet(block, (1, 2, 2, 2), stem, width=8))


@pytest.mark.parametrize(("output_stride", "replaced"), [(8, [False, True, True]), (16, [False, False, True])])
@torch.no_grad()
def test_dilated_resnet50_equals_torchvision(output_stride: int, replaced: list[bool]) -> None:
    torch.manual_seed(0)
    reference = _trained(torchvision.models.resnet50(weights=None, replace_stride_with_dilation=replaced))
    ours = build_backbone("resnet50").eval()
    ours.load_state_dict({name: value for name, value in reference.state_dict().items() if not name.startswith("fc.")})
    dilate(ours, output_stride)
    steps = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    expected = IMAGE
    for name in steps:
        expected = getattr(reference, name)(expected)
    found = ours.forward_features(IMAGE)
    assert found.shape == (1, 2048, 96 // output_stride, 64 // output_stride)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize(("stem", "size", "output_stride"), [("imagenet", (75, 64), 8), ("small", (37, 32), 2)])
@torch.no_grad()
def test_the_dense_map_holds_the_strided_one(block: Any, stem: Any, size: tuple[int, int], output_stride: int) -> None:
    network = _narrow(block, stem)
    image = torch.randn(2, 3, *size)
    before = network.forward_features(image)
    dilate(network, output_stride)
    dense = network.forward_features(image)
    step = round(dense.shape[3] / before.shape[3])
    assert step == 4
    torch.testing.assert_close(dense[:, :, ::step, ::step], before)


def test_dilation_keeps_every_parameter_and_is_done_once() -> None:
    network = _narrow(Bottleneck)
    before = dict(network.named_parameters())
    dilate(network, 8)
    after = dict(network.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    settings = [(m.stride, m.dilation, m.padding) for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    dilate(network, 8)
    assert settings == [(m.stride, m.dilation, m.padding) for m in network.modules() if isinstance(m, torch.nn.Conv2d)]


@torch.no_grad()
def test_networks_with_a_small_enough_or_unknown_stride_are_left_alone() -> None:
    for network in (
        _narrow(BasicBlock, "small"),
        ResNet9("small", width=8).eval(),
        ResNet9("imagenet", width=8).eval(),
    ):
        before = network.forward_features(IMAGE)
        dilate(network, 8)
        torch.testing.assert_close(network.forward_features(IMAGE), before, rtol=0, atol=0)


def test_both_encoders_of_a_lab_backbone_are_dilated() -> None:
    backbone = build_backbone("resnet18", color_space="lab")
    dilate(backbone, 8)
    assert [stride for _, stride in map_shapes(backbone)] == [4, 4, 8, 8, 8]


def test_shapes_are_found_without_a_trace() -> None:
    network = _narrow(BasicBlock).train()
    network.layer1.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert map_shapes(network) == [(8, 4), (8, 4), (16, 8), (32, 16), (64, 32)]
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert network.training
    assert network.layer2.training
    assert not network.layer1.training


@pytest.mark.parametrize("name", ["timm:resnet18", "timm:convnext_atto"])
def test_maps_of_timm_models_end_in_their_features(name: str) -> None:
    backbone = build_backbone(name).eval()
    maps = stage_maps(backbone, IMAGE)
    torch.testing.assert_close(maps[-1], backbone.forward_features(IMAGE), rtol=0, atol=0)
    assert len(maps) == len(backbone.stages)
    assert [found.shape[1:] for found in stage_maps(backbone, IMAGE)] == [found.shape[1:] for found in maps]


def _deeplab(recipe_name: str, backbone: Any, num_classes: int = 5) -> DeepLab:
    recipe = RECIPES[recipe_name]
    return DeepLab(
        backbone,
        num_classes,
        head=recipe.head,
        output_stride=recipe.output_stride,
        width=16,
        rates=recipe.rates,
        dropout=recipe.dropout,
        auxiliary_width=8 if recipe.auxiliary_width else 0,
    )


@pytest.mark.parametrize(
    ("recipe", "backbone", "stride", "auxiliary"),
    [
        ("rendered", lambda: _narrow(BasicBlock), 4, None),
        ("rendered", lambda: ResNet9("small", width=8), 4, None),
        ("rendered", lambda: ResNet9("imagenet", width=8), 4, None),
        ("deeplab_v3", lambda: _narrow(Bottleneck), 8, 8),
        ("deeplab_v3", lambda: ResNet9("small", width=8), 8, 4),
        ("deeplab_v3plus", lambda: _narrow(Bottleneck), 4, None),
        ("deeplab_v3plus", lambda: build_backbone("timm:resnet18"), 4, None),
    ],
)
def test_logits_of_every_recipe(recipe: str, backbone: Any, stride: int, auxiliary: int | None) -> None:
    network = _deeplab(recipe, backbone()).train()
    assert network.output_stride == stride
    images = IMAGE.expand(2, -1, -1, -1)
    logits, extra = network(images)
    assert logits.shape == (2, 5, 96 // stride, 64 // stride)
    if auxiliary is None:
        assert extra is None
    else:
        assert extra.shape == (2, 5, 96 // auxiliary, 64 // auxiliary)
    loss = logits.square().mean() + (0 if extra is None else extra.square().mean())
    loss.backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    assert network.eval()(images)[1] is None


def test_the_paper_networks_have_their_sizes() -> None:
    v3, v3plus = RECIPES["deeplab_v3"], RECIPES["deeplab_v3plus"]
    assert (v3.output_stride, v3.rates, v3.width, v3.auxiliary_width) == (8, (1, 12, 24, 36), 512, 256)
    assert (v3plus.output_stride, v3plus.rates, v3plus.width, v3plus.dropout) == (16, (1, 6, 12, 18), 256, 0.1)
    with torch.device("meta"):
        torchvision_head = torchvision.models.segmentation.deeplabv3.DeepLabHead(2048, 19)
    network = _deeplab("deeplab_v3", _narrow(Bottleneck), 19)
    # The same branches in the same order but for the pooled one, which torchvision puts last; and a 3x3 bottleneck.
    kernels = [m.kernel_size[0] for m in torchvision_head.modules() if isinstance(m, torch.nn.Conv2d)]
    assert kernels == [1, 3, 3, 3, 1, 1, 3, 1]
    ours = [m for m in network.head.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.kernel_size[0] for m in ours] == [1, 3, 3, 3, 1, 3, 1]
    assert [m.dilation[0] for m in ours] == [1, 12, 24, 36, 1, 1, 1]
