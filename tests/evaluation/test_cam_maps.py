"""The arithmetic of class activation maps against a loop and grad-cam, and maps of planted objects."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pytorch_grad_cam import GradCAM, HiResCAM
from torch import Tensor, nn

from evaluation import cam, linear
from evaluation.cam import Classifier, activation_maps, choose_rows, fit_classifier
from evaluation.features import FeatureExtractor
from evaluation.metric import Phase
from image_data.contracts import IMAGENET_MEAN, IMAGENET_STD
from image_data.rendered.dataset import RenderedOptions, rendered_rows, split_class_names, split_size
from methods.cam import class_activation_map
from tests.evaluation.cam_pictures import (
    BACKBONES,
    QUICK,
    Pictures,
    model_context,
    noise,
    noise_splits,
    normalized,
    random_classifier,
    results,
    small_resnet,
)


def loop_map(features_Chw: np.ndarray, weight_C: np.ndarray, side: int) -> np.ndarray:
    """Weighted sum, bilinear upsampling with half-pixel centres and min-max, pixel by pixel in float64."""
    channels, height, width = features_Chw.shape
    small = np.zeros((height, width))
    for k in range(channels):
        small += weight_C[k] * features_Chw[k].astype(np.float64)
    large = np.zeros((side, side))
    for u in range(side):
        for v in range(side):
            y = min(max((u + 0.5) * height / side - 0.5, 0), height - 1)
            x = min(max((v + 0.5) * width / side - 0.5, 0), width - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            top = small[y0, x0] * (1 - (x - x0)) + small[y0, x1] * (x - x0)
            bottom = small[y1, x0] * (1 - (x - x0)) + small[y1, x1] * (x - x0)
            large[u, v] = top * (1 - (y - y0)) + bottom * (y - y0)
    return (large - large.min()) / (large.max() - large.min())


@pytest.mark.parametrize("make", BACKBONES)
def test_maps_equal_a_loop_and_the_pooled_map_is_the_feature(make: Callable[[], Any]) -> None:
    backbone = make()
    images = noise(side=32).images[:3]
    classifier = random_classifier(5, backbone.num_features)
    classes = np.array([4, 0, 2])
    maps, is_constant, explained, pooled = activation_maps(backbone, images, classifier, classes)
    with torch.no_grad():
        features = backbone.forward_features(normalized(images)).numpy()
    expected = [loop_map(f, classifier.weight[c].numpy(), 32) for f, c in zip(features, classes, strict=True)]
    np.testing.assert_allclose(maps, expected, atol=2e-4)
    np.testing.assert_allclose(pooled, FeatureExtractor(backbone)(images), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(explained, classes)
    assert not is_constant.any()
    assert (float(maps.min()), float(maps.max())) == (0.0, 1.0)


class _WithClassifier(nn.Module):
    """Backbone, average, linear layer: what grad-cam explains. The map is a module's output, so that it can hook it."""

    def __init__(self, backbone: Any, classifier: Classifier) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.map = nn.Identity()
        self.linear = nn.Linear(classifier.weight.shape[1], classifier.weight.shape[0])
        self.linear.weight.data.copy_(classifier.weight)
        self.linear.bias.data.copy_(classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.map(self.backbone.forward_features(x)).mean(dim=(2, 3)))


@pytest.mark.parametrize("reference", [GradCAM, HiResCAM])
def test_maps_equal_grad_cam(reference) -> None:
    """grad-cam divides by h w (a gradient of the average), clips at 0, and scales before and after cv2's upsampling.

    With non-negative features and weights nothing is clipped, and min-max undoes the factor: equal maps.
    """
    backbone, images = small_resnet(), noise(side=32).images[:4]
    classifier = random_classifier(5, backbone.num_features, positive=True)
    model = _WithClassifier(backbone, classifier)
    with reference(model, [model.map]) as explainer:
        expected = explainer(normalized(images), targets=None)  # its own prediction
    maps, _, explained, _ = activation_maps(backbone, images, classifier, None)
    np.testing.assert_array_equal(explained, model(normalized(images)).argmax(dim=1))
    np.testing.assert_allclose(maps, expected, atol=1e-4)


@pytest.mark.parametrize("reference", [GradCAM, HiResCAM])
def test_signed_sums_equal_grad_cams_before_it_clips(reference) -> None:
    backbone, images = small_resnet(), noise(side=32).images[:4]
    classifier = random_classifier(5, backbone.num_features)
    model, x = _WithClassifier(backbone, classifier), normalized(images)
    with reference(model, [model.map]) as explainer:
        explainer(x, targets=None)
        hooked = explainer.activations_and_grads
        values, gradients = (part[0].detach().numpy() for part in (hooked.activations, hooked.gradients))
        raw = explainer.get_cam_image(x, model.map, [], values, gradients, False)
    features = torch.from_numpy(values)
    ours = class_activation_map(features, classifier.weight, model(x).argmax(dim=1))
    assert (ours < 0).any()
    np.testing.assert_allclose(ours, raw * values.shape[2] * values.shape[3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("phase", ["val", "test"])
def test_the_classifier_is_the_linear_tasks_on_raw_features(phase: Phase) -> None:
    context = model_context(small_resnet(), noise_splits(per_class=10), phase)
    found = {name: context.features(name) for name in linear.splits(QUICK.classifier, phase)}
    classifier, top1 = fit_classifier(QUICK.classifier, found, context)
    reference = results(linear.evaluate(QUICK.classifier, context))[0]["linear/top1"]
    assert (top1.value, top1.ci95, top1.n) == (reference.value, reference.ci95, reference.n)
    x = found[phase].features.astype(np.float64)
    predicted = (x @ classifier.weight.numpy().T + classifier.bias.numpy()).argmax(axis=1)
    assert 100 * (predicted == found[phase].labels).mean() == pytest.approx(top1.value)
    # Fitted from zero, softmax weights sum to zero over the classes.
    np.testing.assert_allclose(classifier.weight.sum(dim=0), 0, atol=1e-3 * float(classifier.weight.abs().max()))


# --- planted truth: rendered objects with their masks


class ContrastByHue(nn.Module):
    """Hand-made backbone: channel k says how much a place differs from the background and has hue k.

    The rendered background is one colour with soft light and covers most of the picture: the median is its colour.
    """

    num_features = 12

    def forward_features(self, x: Tensor) -> Tensor:
        rgb = x * x.new_tensor(IMAGENET_STD).view(3, 1, 1) + x.new_tensor(IMAGENET_MEAN).view(3, 1, 1)
        chroma = rgb / rgb.sum(dim=1, keepdim=True).clamp_min(0.05)  # not changed by a shadow
        background = chroma.flatten(2).median(dim=2).values[..., None, None]
        contrast = (chroma - background).norm(dim=1, keepdim=True)
        opponent = torch.stack([chroma[:, 0] - chroma[:, 1], (chroma[:, 0] + chroma[:, 1]) / 2 - chroma[:, 2]], dim=1)
        angles = torch.arange(self.num_features) * (2 * torch.pi / self.num_features)
        directions = torch.stack([angles.cos(), angles.sin()], dim=1)
        hues = torch.einsum("kd,bdhw->bkhw", directions, F.normalize(opponent, dim=1)).sub(0.7).relu()
        return F.avg_pool2d(contrast * hues, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x).mean(dim=(2, 3))


@cache
def rendered(split: str) -> tuple[Pictures, np.ndarray, tuple[str, ...]]:
    """Objects whose colour belongs to their class, before a background of any colour; their masks bool (N, S, S)."""
    options = RenderedOptions(64, (4, 2, 1), 1, images_per_instance=4, factors="0000", classes=10)
    # The first three classes are chairs in red and yellow, green tables, blue lamps.
    rows = list(rendered_rows(options, split, stop=split_size(options, split) // 2))
    images = np.stack([np.array(Image.open(io.BytesIO(row["image"]))).transpose(2, 0, 1) for row in rows])
    masks = np.stack([np.array(Image.open(io.BytesIO(row["mask"]))) > 0 for row in rows])
    labels = np.array([row["label"] for row in rows])
    return Pictures(images, labels), masks, split_class_names(options, split)[:3]


def peaks_in_mask(maps: np.ndarray, masks: np.ndarray) -> float:
    """Share of the maps whose largest value lies on the object."""
    peaks = maps.reshape(len(maps), -1).argmax(axis=1)
    return float(masks.reshape(len(masks), -1)[np.arange(len(peaks)), peaks].mean())


def test_the_peak_falls_on_the_planted_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cam, "model_grid", lambda *_: b"")  # a picture of 24 columns takes long to draw
    val, masks, names = rendered("val")
    context = model_context(ContrastByHue(), {"train": rendered("train")[0], "val": val}, names=names)
    n = len(val.labels)
    found = context.features("val")
    rows = choose_rows(found, n, context.seed)
    metrics, samples, _ = results(cam.evaluate(replace(QUICK, num_images=n, grid_images=n), context))
    np.testing.assert_array_equal(samples["cam/images"], val.images[rows])
    assert metrics["cam/classifier_top1"].value > 80
    assert peaks_in_mask(samples["cam/maps"], masks[rows]) >= 0.9
    assert masks.mean() < 0.25  # a peak anywhere would be right this often
    # The wrong pictures' objects and a classifier turned round: the test can tell.
    assert peaks_in_mask(samples["cam/maps"], masks[np.roll(rows, 7)]) < 0.8
    classifier, _ = fit_classifier(QUICK.classifier, {s: context.features(s) for s in ("train", "val")}, context)
    turned = Classifier(-classifier.weight, classifier.bias)
    maps, *_ = activation_maps(ContrastByHue(), val.images, turned, val.labels)
    assert peaks_in_mask(maps.numpy(), masks) < 0.2
