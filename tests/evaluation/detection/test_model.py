"""The detectors: one loss for any number of workers, sampling, every backbone, BatchNorm, freezing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fvcore.nn import precise_bn
from torch import nn

from evaluation.detection.detectron import FastRCNNOutputLayers
from evaluation.detection.heads import sample_labels
from evaluation.detection.model import build_detector
from evaluation.detection.problem import resolved_recipe
from evaluation.fine_tuning import Freezing
from evaluation.fine_tuning.loop import draws
from methods.backbones import ResNet9, build_backbone
from tests.evaluation.detection.detectors import TINY, batch_of, trainee_of

# ---- one loss for any number of workers


@pytest.mark.parametrize("head", ["c4", "fpn"])
def test_parts_of_a_batch_add_up_to_its_loss_and_gradient(head: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums and counts of unequal parts, as ``share_of_mean`` joins them over workers; BatchNorm fixed."""
    trainee = trainee_of(replace(TINY, head=head, masks="yes"))
    model, batch = trainee.model.train(), batch_of(trainee)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()

    def gradient(losses: dict[str, Any]) -> torch.Tensor:
        model.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    whole = model(batch)
    expected = gradient(whole)
    counts: list[float] = []

    def remember(total: torch.Tensor, count: Any) -> torch.Tensor:
        counts.append(float(count))
        return total

    monkeypatch.setattr("evaluation.detection.heads.share_of_mean", remember)
    three, one = model(batch[:3]), model(batch[3:])
    regions = ("loss_cls", "loss_box_reg", "loss_mask")
    assert len(counts) == 2 * len(regions)
    joined = {
        name: (three[name] + one[name]) / (first + second)
        for name, first, second in zip(regions, counts[:3], counts[3:], strict=True)
    }
    joined |= {name: (3 * three[name] + one[name]) / 4 for name in ("loss_rpn_cls", "loss_rpn_loc")}
    for name, loss in whole.items():
        torch.testing.assert_close(joined[name], loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient(joined), expected, rtol=1e-3, atol=1e-5)


def test_sampling_depends_on_the_image_alone() -> None:
    trainee = trainee_of(TINY)
    model, batch = trainee.model.train(), batch_of(trainee)
    first = model(batch)
    torch.manual_seed(99)  # detectron2 would sample with torch's own generator
    again = model(batch)
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = [{**image, "seed": image["seed"] + 1} for image in batch]
    assert not torch.equal(model(other)["loss_rpn_cls"], first["loss_rpn_cls"])


def test_sampling_follows_the_rule_of_detectron2() -> None:
    labels = torch.tensor([7] * 30 + [-1] * 10 + [2] * 5)
    for count, fraction, num_positive, num_negative in [(16, 0.25, 4, 12), (16, 0.5, 5, 11), (64, 0.25, 5, 30)]:
        chosen = sample_labels(labels, count, fraction, 7, torch.Generator().manual_seed(0))
        assert [len(part) for part in chosen] == [num_positive, num_negative]
        assert (labels[chosen[0]] == 2).all()
        assert (labels[chosen[1]] == 7).all()
        assert all(len(part.unique()) == len(part) for part in chosen)
    drawn = [sample_labels(labels, 16, 0.25, 7, torch.Generator().manual_seed(seed))[0].tolist() for seed in range(40)]
    assert {row for rows in drawn for row in rows} == set(range(40, 45))


def test_losses_equal_those_of_detectron2s_own_heads() -> None:
    """On one worker nothing but the sampling differs, so with the same sampled regions the losses must agree."""
    trainee = trainee_of(TINY)
    model, batch = trainee.model.train(), batch_of(trainee)
    ours = model(batch)
    model.rcnn.roi_heads.box_predictor.__class__ = FastRCNNOutputLayers
    theirs = model(batch)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)


# ---- networks


@pytest.mark.parametrize("head", ["c4", "fpn"])
def test_detectron2s_resnet_with_our_weights(head: Any) -> None:
    torch.manual_seed(1)
    backbone = build_backbone("resnet18")
    config = replace(TINY, head=head, short_side=64, freezing=Freezing(2, "eval"))
    trainee = trainee_of(config, backbone=backbone)
    state = {name.removeprefix("rcnn."): value for name, value in trainee.model.state_dict().items()}
    assert not any(name.startswith("backbone.stages") for name in state)
    prefix = "backbone." if head == "c4" else "backbone.bottom_up."
    assert torch.equal(state[f"{prefix}res3.1.conv2.weight"], backbone.layer2[1].conv2.weight)
    last = "roi_heads.res5.stage.0.conv1.weight" if head == "c4" else f"{prefix}res5.0.conv1.weight"
    assert torch.equal(state[last], backbone.layer4[0].conv1.weight)
    model = trainee.model.train()
    trunk = model.rcnn.backbone if head == "c4" else model.rcnn.backbone.bottom_up
    assert not trunk.stem.conv1.norm.training
    assert not trunk.res2[0].conv1.norm.training
    assert trunk.res3[0].conv1.norm.training
    losses = model(batch_of(trainee, 2))
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    sum(losses.values()).backward()
    trained = [parameter for group in trainee.parameter_groups() for parameter in group["params"]]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)
    assert trunk.stem.conv1.weight.grad is None
    assert not trunk.res2[0].conv1.weight.requires_grad
    frozen = sum(p.numel() for stage in backbone.stages[:2] for p in stage.parameters())
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in model.parameters()) - frozen


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet9", "resnet18"])
def test_the_trunk_sees_images_normalised_as_in_pretraining(name: str) -> None:
    """RGB from 0 to 1, less ImageNet's mean, over its deviation; the maps are then the backbone's own."""
    torch.manual_seed(1)
    backbone = build_backbone(name, "imagenet").eval()
    trainee = trainee_of(replace(TINY, short_side=64), backbone=backbone)
    rcnn = trainee.model.eval().rcnn
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    mean, deviation = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = ((image / 255.0 - mean) / deviation)[None]
    for stage in backbone.stages[:-1]:
        expected = stage(expected)
    (found,) = rcnn.backbone(rcnn.preprocess_image([{"image": image}]).tensor).values()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "stem"),
    [("resnet9", "small"), ("resnet9", "imagenet"), ("resnet18", "small"), ("resnet50", "imagenet")],
)
@pytest.mark.parametrize("head", ["c4", "fpn"])
def test_every_backbone_fits_its_detector(name: str, stem: Any, head: Any) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(name, stem)
    recipe = replace(resolved_recipe(replace(TINY, head=head)), pooler_side=4)
    detector = build_detector(backbone, recipe, 3, True, Freezing(), torch.randn(1, 3, 64, 64)).rcnn
    shapes = detector.backbone.output_shape()
    if head == "c4":
        assert [shape.stride for shape in shapes.values()] == [4 if stem == "small" else 16]
        assert detector.roi_heads.res5.norm.num_features == backbone.num_features
        assert detector.roi_heads.box_predictor.cls_score.in_features == backbone.num_features
    else:
        strides = [shape.stride for shape in shapes.values()]
        assert strides == ([4, 8, 16] if stem == "small" else [4, 8, 16, 32, 64])
        assert all(shape.channels == 256 for shape in shapes.values())


class ResNet9Strided(ResNet9):
    """A backbone whose strides jump from 2 to 8 to 32."""

    def __init__(self) -> None:
        super().__init__("small", width=8)
        self.layer2.append(nn.MaxPool2d(2))
        self.layer3.append(nn.MaxPool2d(2))


def test_a_backbone_without_a_pyramid_is_refused() -> None:
    recipe = resolved_recipe(replace(TINY, head="fpn"))
    with pytest.raises(ValueError, match=r"ResNet9Strided have strides 1, 2, 8, 32\. Use the head c4"):
        build_detector(ResNet9Strided(), recipe, 3, True, Freezing(), torch.zeros(1, 3, 32, 32))


def test_precise_batchnorm_is_that_of_fvcore(monkeypatch: pytest.MonkeyPatch) -> None:
    # fvcore's first estimator, which the published numbers are from; its newer one pools the variance of all batches.
    monkeypatch.setattr(precise_bn, "_PopulationVarianceEstimator", precise_bn._MeanOfBatchVarianceEstimator)
    config = replace(TINY, precise_bn_iterations=3)
    ours, theirs = trainee_of(config), trainee_of(config)
    batches = [ours.load(draws(0, ours.num_images, start, start + 4)) for start in (0, 4, 8)]
    with torch.no_grad():
        ours.model.train()
        ours.before_predict(iter(batches))
        precise_bn.update_bn_stats(theirs.model.train(), batches, num_iters=3)
    for (name, value), other in zip(ours.model.state_dict().items(), theirs.model.state_dict().values(), strict=True):
        if "running_" in name:
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6)
    assert all(m.momentum == 0.1 for m in ours.model.modules() if isinstance(m, nn.BatchNorm2d))


def test_batchnorm_does_not_decay_and_nothing_is_left_out() -> None:
    trainee = trainee_of(TINY)
    weights, norms = trainee.parameter_groups()
    assert norms["weight_decay"] == 0
    assert "weight_decay" not in weights
    assert all(parameter.dim() == 1 for parameter in norms["params"])
    assert len(weights["params"]) + len(norms["params"]) == len(list(trainee.model.parameters()))
