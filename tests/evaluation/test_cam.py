"""Class activation maps against grad-cam and a loop, on planted objects, and with damaged input."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pytorch_grad_cam import GradCAM, HiResCAM
from torch import Tensor, nn

from evaluation import cam
from evaluation.cam import CamConfig, Classifier, activation_maps, choose_rows, fit_classifier
from evaluation.features import FeatureExtractor
from evaluation.linear import LinearConfig
from evaluation.metric import Artifact, EvaluationContext, Features, Metric, Phase, Samples
from image_data.contracts import IMAGENET_MEAN, IMAGENET_STD
from image_data.rendered.dataset import RenderedOptions, rendered_rows, split_class_names, split_size
from image_data.subset import SubsetConfig, choose_images
from methods.backbones import BasicBlock, LabBackbone, ResNet, ResNet9, Stem

QUICK = CamConfig(num_images=20, grid_images=4, classifier=LinearConfig(epochs=20))


class Pictures(NamedTuple):
    """One split: uint8 (N, 3, S, S), labels (N,)."""

    images: np.ndarray
    labels: np.ndarray


def model_context(
    backbone: nn.Module, splits: Mapping[str, Pictures], phase: Phase = "val", names: Sequence[str] = (), **more
) -> EvaluationContext:
    """Context whose features and images are those of given pictures."""
    extract = FeatureExtractor(backbone.eval(), "cpu")

    def features(split: str) -> Features:
        images, labels = splits[split]
        known = tuple(names) or tuple(f"class {c}" for c in range(int(labels.max()) + 1))
        return Features(extract(images), labels, known)

    def images(split: str, rows: Sequence[int], image_size: int = 0) -> np.ndarray:
        chosen = torch.from_numpy(splits[split].images[list(rows)])
        if image_size:
            chosen = F.interpolate(chosen.float(), size=(image_size, image_size), mode="nearest").byte()
        return chosen.numpy()

    return EvaluationContext(features, phase, backbone=backbone, images=images, **more)


def noise(num_classes: int = 4, per_class: int = 6, side: int = 32, seed: int = 0) -> Pictures:
    """Noise whose brightness depends on the class."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(num_classes), per_class))
    images = rng.integers(0, 120, (len(labels), 3, side, side)) + 30 * labels[:, None, None, None]
    return Pictures(images.clip(0, 255).astype(np.uint8), labels)


def noise_splits(**changes) -> dict[str, Pictures]:
    return {name: noise(**{"seed": i, **changes}) for i, name in enumerate(("train", "val", "test"))}


def small_resnet(stem: Stem = "small", in_channels: int = 3, seed: int = 0) -> ResNet:
    torch.manual_seed(seed)
    return ResNet(BasicBlock, (1, 1, 1, 1), stem, in_channels=in_channels, width=4).eval()


def small_resnet9() -> ResNet9:
    torch.manual_seed(0)
    return ResNet9(width=4).eval()


def small_lab() -> LabBackbone:
    return LabBackbone(small_resnet(in_channels=1), small_resnet(in_channels=2, seed=1)).eval()


BACKBONES: list[Callable[[], Any]] = [small_resnet, small_resnet9, small_lab]


def results(outputs) -> tuple[dict[str, Metric], dict[str, np.ndarray], dict[str, bytes]]:
    found = list(outputs)
    return (
        {m.name: m for m in found if isinstance(m, Metric)},
        {s.name: s.values for s in found if isinstance(s, Samples)},
        {a.name: a.data for a in found if isinstance(a, Artifact)},
    )


def normalized(images: np.ndarray) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (torch.from_numpy(images).float() / 255 - mean) / std


def random_classifier(num_classes: int, dim: int, positive: bool = False) -> Classifier:
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(num_classes, dim, generator=g, dtype=torch.float64)
    return Classifier(weight.abs() if positive else weight, torch.randn(num_classes, generator=g, dtype=torch.float64))


# --- arithmetic -----------------------------------------------------------------------------------------------------


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
    from methods.cam import class_activation_map

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
    from evaluation import linear

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


# --- planted truth: rendered objects with their masks ----------------------------------------------------------------


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


# --- the task --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["val", "test"])
@pytest.mark.parametrize("make", BACKBONES)
def test_metrics_samples_and_grid(make: Callable[[], Any], phase: Phase) -> None:
    backbone = make()
    info = {"method": "moco_v2", "num_classes": 4}
    context = model_context(backbone, noise_splits(), phase, info=info)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    metrics, samples, files = results(cam.evaluate(QUICK, context))
    assert set(cam.metric_names(QUICK)) | {"cam/classifier_top1", "cam/constant_maps", "cam/map_side"} == set(metrics)
    for name in cam.metric_names(QUICK):
        values = samples[name]
        assert values.shape == (20,)
        assert ((values >= 0) & (values <= 1)).all()
        assert metrics[name].value == pytest.approx(values.mean())
        assert metrics[name].ci95 == pytest.approx(1.96 * values.std(ddof=1) / 20**0.5)
        assert metrics[name].n == 20
    assert metrics["cam/constant_maps"].value == 0
    assert metrics["cam/map_side"].value == 4
    assert (samples["cam/maps"].dtype, samples["cam/maps"].shape) == (np.uint8, (4, 32, 32))
    assert len(set(samples["cam/class_names"])) == 4
    assert len(set(samples["cam/image_ids"].tolist())) == 20
    assert Image.open(io.BytesIO(files["cam/grid.png"])).width > 600
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_numbers_do_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    context = model_context(small_resnet(), noise_splits())
    _, expected, _ = results(cam.evaluate(QUICK, context))
    monkeypatch.setattr(cam, "BATCH", 3)  # the grid's four images lie in two batches
    monkeypatch.setattr(cam, "READ", 7)
    _, found, _ = results(cam.evaluate(QUICK, context))
    for name in cam.metric_names(QUICK):
        np.testing.assert_allclose(found[name], expected[name], atol=2e-3)
    for name in ("cam/image_ids", "cam/images", "cam/class_names"):
        np.testing.assert_array_equal(found[name], expected[name])
    np.testing.assert_allclose(found["cam/maps"], expected["cam/maps"].astype(int), atol=1)


def test_predictions_can_be_explained_instead_of_labels() -> None:
    splits = noise_splits(per_class=10)
    splits["val"] = Pictures(splits["val"].images, np.roll(splits["val"].labels, 1))  # many wrong labels
    context = model_context(small_resnet(), splits)
    _, labelled, _ = results(cam.evaluate(QUICK, context))
    _, predicted, files = results(cam.evaluate(replace(QUICK, explain="prediction"), context))
    np.testing.assert_array_equal(labelled["cam/images"], predicted["cam/images"])
    assert (labelled["cam/maps"] != predicted["cam/maps"]).any()
    assert files["cam/grid.png"]


def test_fewer_images_than_asked_for_are_all_used() -> None:
    context = model_context(small_resnet(), {"train": noise(), "val": noise(num_classes=4, per_class=1, seed=1)})
    metrics, samples, _ = results(cam.evaluate(CamConfig(grid_images=9, classifier=LinearConfig(epochs=5)), context))
    assert metrics["cam/area"].n == 4
    assert len(samples["cam/maps"]) == 4
    one = model_context(small_resnet(), {"train": noise(), "val": Pictures(noise().images[:1], noise().labels[:1])})
    metrics, _, _ = results(cam.evaluate(QUICK, one))
    assert (metrics["cam/area"].n, metrics["cam/area"].ci95) == (1, None)


def test_nested_subsets_of_classes_share_their_first_images() -> None:
    names = [f"animal {c}" for c in range(12)]
    counts = np.random.default_rng(0).integers(3, 9, 12)
    labels = np.repeat(np.arange(12), counts)
    everything = Features(np.zeros((len(labels), 1), np.float32), labels, tuple(names))
    pictures = [f"{names[c]} {i}" for c, count in enumerate(counts) for i in range(count)]
    shown = {}
    for num_classes in (12, 6, 3):
        kept = choose_images(pictures, labels, names, SubsetConfig(num_classes=num_classes))
        classes = np.unique(labels[kept])
        compact = np.searchsorted(classes, labels[kept])
        subset = Features(everything.features[kept], compact, tuple(names[c] for c in classes))
        rows = choose_rows(subset, 200, seed=0)
        assert sorted(rows) == list(range(len(compact)))
        assert len(set(compact[rows[:num_classes]])) == num_classes  # one of each class first
        shown[num_classes] = [np.array(pictures)[kept][row] for row in rows]
    assert shown[12][:3] == shown[6][:3] == shown[3][:3]
    assert shown[12][:6] == shown[6][:6]
    assert choose_rows(everything, 5, seed=0).tolist() != choose_rows(everything, 5, seed=1).tolist()


# --- damaged input ---------------------------------------------------------------------------------------------------


class Planted(nn.Module):
    """A map of 4 x 4 places from the image, then something that is wrong with it."""

    num_features = 3

    def __init__(self, damage: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.damage = damage

    def forward_features(self, x: Tensor) -> Tensor:
        return self.damage(F.adaptive_avg_pool2d(x, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


def test_maps_without_structure_are_zero_counted_and_warned_about() -> None:
    flat = Planted(lambda f: f.mean(dim=(2, 3), keepdim=True).expand_as(f))
    with pytest.warns(RuntimeWarning, match="20 of 20 maps are constant"):
        metrics, samples, _ = results(cam.evaluate(QUICK, model_context(flat, noise_splits())))
    assert metrics["cam/constant_maps"].value == 100
    assert metrics["cam/area"].value == 0
    assert metrics["cam/spatial_entropy"].value == pytest.approx(1)
    assert not samples["cam/maps"].any()


def test_damaged_maps_and_features_are_refused() -> None:
    damages = {
        "last feature map contains NaN": lambda f: f / 0,
        "differs from the pooled features by": lambda f: f + 1,
    }
    for message, damage in damages.items():
        with pytest.raises(ValueError, match=message):
            list(cam.evaluate(QUICK, model_context(Planted(damage), noise_splits())))
    context = model_context(small_resnet(), noise_splits())

    def broken(split: str) -> Features:
        found = context.features(split)
        found.features[2, 1] = np.nan
        return found

    with pytest.raises(ValueError, match=r"1 of 24 feature vectors of split 'train' contain NaN"):
        list(cam.evaluate(QUICK, replace(context, features=broken)))
    with pytest.raises(ValueError, match="needs backbone and images"):
        list(cam.evaluate(QUICK, replace(context, backbone=None)))


def test_a_collapsed_backbone_has_numbers() -> None:
    collapsed = Planted(lambda f: f * 0)
    collapsed.forward = lambda x: x.new_zeros(len(x), 3)  # type: ignore[method-assign]
    with pytest.warns(RuntimeWarning):
        metrics, _, _ = results(cam.evaluate(QUICK, model_context(collapsed, noise_splits())))
    assert metrics["cam/constant_maps"].value == 100


def test_a_map_of_one_pixel_is_refused_before_features_are_computed() -> None:
    context = model_context(small_resnet(stem="imagenet"), noise_splits())

    def never(split: str) -> Features:
        raise AssertionError("features were computed")

    with pytest.raises(ValueError, match=r"1x1 for images of 32 px.*e\.g\. 64"):
        list(cam.evaluate(QUICK, replace(context, features=never)))
    metrics, samples, _ = results(cam.evaluate(replace(QUICK, image_size=64), context))
    assert samples["cam/maps"].shape == (4, 64, 64)
    assert metrics["cam/area"].n == 20


def test_wrong_options_and_data_are_refused() -> None:
    counts = {"train": (5, 5), "val": (5, 5), "test": (2, 2)}
    cam.check(CamConfig(), "test", counts)
    wrong = {
        "num_images=1,": replace(QUICK, num_images=1, grid_images=1),
        "grid_images=30": replace(QUICK, grid_images=30),
        "grid_images=0": replace(QUICK, grid_images=0),
        "image_size=-1": replace(QUICK, image_size=-1),
        "explain='class'": replace(QUICK, explain="class"),  # type: ignore[arg-type]
        "learning_rates": replace(QUICK, classifier=LinearConfig(learning_rates=(0.1,))),
    }
    for message, config in wrong.items():
        with pytest.raises(ValueError, match=message):
            cam.check(config, "val", counts)
    with pytest.raises(ValueError, match="at least 2 classes"):
        cam.check(QUICK, "val", {"train": (5, 0), "val": (5, 0)})
    with pytest.raises(ValueError, match="split 'test'"):
        cam.check(QUICK, "test", {"train": (5, 5), "val": (5, 5)})
    assert cam.splits(QUICK, "val") == ("train", "val")
    assert cam.splits(QUICK, "test") == ("train", "val", "test")
