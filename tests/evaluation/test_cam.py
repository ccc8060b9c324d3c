"""The task of class activation maps: what it yields, which images it takes, and damaged input."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from evaluation import cam
from evaluation.cam import CamConfig, choose_rows
from evaluation.linear import LinearConfig
from evaluation.metric import Features, Phase
from image_data.subset import SubsetConfig, choose_images
from tests.evaluation.cam_pictures import (
    BACKBONES,
    QUICK,
    Pictures,
    model_context,
    noise,
    noise_splits,
    results,
    small_resnet,
)


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


# --- damaged input


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
