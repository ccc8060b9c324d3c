"""Several models side by side: which cells show what, and paired differences against scipy."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from evaluation import Artifact, Metric, ModelResult, cam_comparison
from evaluation.cam import CamConfig
from evaluation.cam_comparison import compare, paired_difference
from evaluation.cam_figures import COLORMAP, OPACITY, Column, comparison_grid, model_grid, overlay
from evaluation.cam_statistics import STATISTICS

SIDE = 16


def model(name: str, method: str, num_classes: int, ids: list[int], shift: float = 0.0, seed: int = 0) -> ModelResult:
    """Numbers that depend on the image and the model; the picture of image i has colour i."""
    order = np.array(ids)
    noise = np.random.default_rng(seed).normal(0, 0.01, len(ids))
    samples = {name: 0.3 + 0.01 * order + shift + noise for name in STATISTICS}
    shown = order[:3]
    samples |= {
        "cam/image_ids": order.astype(np.int64),
        "cam/images": np.broadcast_to(shown[:, None, None, None], (len(shown), 3, SIDE, SIDE)).astype(np.uint8),
        "cam/maps": (shown[:, None, None] + np.zeros((1, SIDE, SIDE))).astype(np.uint8),
        "cam/class_names": np.array([f"class {i}" for i in shown]),
    }
    return ModelResult(name, method, num_classes, {}, samples)


def results(models: list[ModelResult]) -> tuple[dict[str, Metric], dict[str, bytes]]:
    found = list(compare(CamConfig(), models))
    metrics = {m.name: m for m in found if isinstance(m, Metric)}
    return metrics, {a.name: a.data for a in found if isinstance(a, Artifact)}


def test_differences_are_paired_by_image() -> None:
    first = model("Supervised 64", "supervised", 64, [5, 1, 2, 9, 4, 7])
    second = model("SimSiam, 16", "simsiam", 16, [2, 7, 5, 8, 1], shift=0.2, seed=1)
    metrics, files = results([first, second])
    common = [1, 2, 5, 7]
    a = np.array([first.samples["cam/area"][[5, 1, 2, 9, 4, 7].index(i)] for i in common])
    b = np.array([second.samples["cam/area"][[2, 7, 5, 8, 1].index(i)] for i in common])
    found = metrics["cam/area/simsiam_16_minus_supervised_64"]
    assert (found.value, found.n) == (pytest.approx((b - a).mean()), 4)
    assert found.ci95 == pytest.approx(1.96 * scipy.stats.sem(b - a))
    # Paired: the spread between images (0.01 per image) does not enter.
    assert found.ci95 is not None
    assert found.ci95 < 0.5 * 1.96 * math.hypot(scipy.stats.sem(a), scipy.stats.sem(b))
    rows = list(csv.DictReader(io.StringIO(files["cam/differences.csv"].decode())))
    assert [row["metric"] for row in rows] == list(STATISTICS)
    assert float(rows[0]["second_minus_first"]) == found.value
    assert float(rows[0]["mean_first"]) == pytest.approx(a.mean())
    assert (rows[0]["second"], rows[0]["images"]) == ("SimSiam, 16", "4")


def test_all_pairs_are_tabulated_and_the_first_model_is_the_reference() -> None:
    models = [model(f"m{i}", "supervised", 64, [1, 2, 3, 4], seed=i) for i in range(4)]
    metrics, files = results(models)
    assert len(metrics) == 3 * len(STATISTICS)
    assert len(files["cam/differences.csv"].decode().splitlines()) == 1 + 6 * len(STATISTICS)


def test_the_grid_has_a_column_per_method_and_class_count(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(cam_comparison, "comparison_grid", lambda *args: calls.append(args) or b"png")
    models = [
        model("a", "supervised", 16, [4, 1, 2, 3]),
        model("b", "simsiam", 16, [1, 4, 5, 2]),
        model("c", "supervised", 64, [2, 4, 1, 3]),
        model("d", "supervised", 64, [4, 2, 1, 3], seed=1),  # a second seed
    ]
    _, files = results(models)
    assert files["cam/models.png"] == b"png"
    images, names, columns, note = calls[0]
    assert images[:, 0, 0, 0].tolist() == [4, 1]  # shown by all, in the first model's order
    assert names == ["class 4", "class 1"]
    assert [(c.group, c.title) for c in columns] == [
        ("supervised", "64 classes"),
        ("supervised", "16 classes"),
        ("simsiam", "16 classes"),
    ]
    for column in columns:
        assert column.maps[:, 0, 0].tolist() == [4, 1]
    assert "1 not shown" in note


def test_models_without_a_common_image_are_not_compared() -> None:
    models = [model("a", "supervised", 16, [1, 2]), model("b", "simsiam", 16, [3, 4])]
    with pytest.warns(RuntimeWarning) as caught:
        metrics, files = results(models)
    messages = [str(w.message) for w in caught]
    assert any("no joint grid" in m for m in messages)
    assert any("no image in common" in m for m in messages)
    assert metrics == {}
    assert list(files) == ["cam/differences.csv"]
    assert paired_difference(models[0], models[1], "cam/area") is None
    one = paired_difference(models[0], model("c", "simsiam", 16, [2, 9]), "cam/area")
    assert one is not None
    assert (one.n, one.ci95) == (1, None)


def test_maps_of_different_sizes_are_warned_about() -> None:
    models = [
        ModelResult(f"m{side}", "supervised", side, {"cam/map_side": Metric("cam/map_side", side)}, found.samples)
        for side, found in ((2, model("", "", 0, [1, 2])), (8, model("", "", 0, [1, 2])))
    ]
    with pytest.warns(RuntimeWarning, match="2x2, 8x8"):
        results(models)


def test_models_that_lack_the_task_are_left_out() -> None:
    bare = ModelResult("bare", "vae", 8, {}, {})
    assert results([model("a", "supervised", 16, [1, 2]), bare]) == ({}, {})


def test_an_overlay_is_the_colour_over_the_gray_picture() -> None:
    from matplotlib import colormaps

    image = np.random.default_rng(0).integers(0, 256, (3, 5, 7), dtype=np.uint8)
    heat = np.random.default_rng(1).integers(0, 256, (5, 7), dtype=np.uint8)
    mixed = overlay(image, heat)
    assert mixed.shape == (5, 7, 3)
    for y, x in ((0, 0), (4, 6), (2, 3)):
        color = np.array(colormaps[COLORMAP](int(heat[y, x]))[:3])
        expected = OPACITY * color + (1 - OPACITY) * image[:, y, x].mean() / 255
        np.testing.assert_allclose(mixed[y, x], expected)


def test_grids_are_pictures_in_which_pixels_stand_at_their_places() -> None:
    red = np.zeros((2, 3, SIDE, SIDE), np.uint8)
    red[:, 0] = 200
    dark = np.zeros((2, SIDE, SIDE), np.uint8)
    alone = np.array(Image.open(io.BytesIO(model_grid(red, dark, ["a/b", "c"], "title", ["c", "c"]))).convert("RGB"))
    assert (alone == (200, 0, 0)).all(axis=2).mean() > 0.1
    columns = [Column("camtrast_contrast_only_simsiam", f"{c} classes", dark) for c in (64, 32, 16)]
    joint = np.array(Image.open(io.BytesIO(comparison_grid(red, ["a", "b"], columns, "note"))).convert("RGB"))
    pictures = (joint == (200, 0, 0)).all(axis=2)
    assert pictures.any(axis=0).argmax() < joint.shape[1] / 8  # the first column
    assert not pictures[:, joint.shape[1] // 3 :].any()
