"""Detection with detectron2, end to end on VOC, COCO and rendered data: learning, scoring, resuming, two processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluation.detection import task
from evaluation.detection.coco_metric import coco_ap
from evaluation.detection.objects import read_classes
from evaluation.detection.problem import DetectionConfig
from evaluation.detection.recipes import RECIPES
from evaluation.detection.scoring import curve_plot, scored_objects
from evaluation.detection.voc_metric import voc_ap
from evaluation.fine_tuning import scored_table, train_table
from evaluation.fine_tuning.loop import FineTuningDiverged
from evaluation.metric import Artifact, Metric, Samples
from image_data.contracts import DataError
from tests.evaluation.detection.detectors import TINY, run_of, shapes, trainee_of
from tests.evaluation.fine_tuning.samples import (
    check_gradients,
    fine_tuning_context,
    rendered_data,
    resumed,
    run_in_two_processes,
    run_once,
)
from tests.image_data.prepared_layouts import make
from tests.image_data.samples import encode, write_folder


def test_a_planted_problem_is_learned_on_voc_and_everything_is_yielded() -> None:
    config = DetectionConfig(
        metric_style="voc", iterations=60, learning_rate=0.1, short_side=32, precise_bn_iterations=4, curve_points=2
    )
    outputs = list(task.evaluate(config, fine_tuning_context("test", shapes("voc"))))
    metrics = {one.name: one for one in outputs if isinstance(one, Metric)}
    assert set(task.metric_names(config)) == {"detection/ap", "detection/ap50", "detection/ap75"} <= set(metrics)
    assert metrics["detection/ap50"].value > 20
    assert metrics["detection/ap"].ci95 is None
    assert any(name.startswith("detection/fp_") for name in metrics)
    samples = {one.name: one.values for one in outputs if isinstance(one, Samples)}
    assert samples["detection/iterations"].tolist() == [30, 60]
    assert samples["detection/ap50_by_iteration"][-1] == pytest.approx(metrics["detection/ap50"].value)
    assert samples["detection/ap"].mean() == pytest.approx(metrics["detection/ap"].value)
    assert len(samples["detection/ap"]) == 3  # car, cat and bottle; VOC's other classes have no object
    files = {one.name: one.data for one in outputs if isinstance(one, Artifact)}
    assert files["detection/iterations.png"].startswith(b"\x89PNG")


@pytest.mark.parametrize(("metric", "seeds"), [("coco", 2), ("voc", 1)])
def test_the_reported_values_are_those_of_the_metric_functions(metric: Any, seeds: int) -> None:
    config = replace(TINY, metric_style=metric, seeds=seeds)
    context = fine_tuning_context("val")
    found = {one.name: one for one in task.evaluate(config, context) if isinstance(one, Metric)}
    table = scored_table(rendered_data(), "val")
    classes = read_classes([train_table(rendered_data(), "val"), table])
    objects, sizes = scored_objects(table, classes)
    assert sizes.tolist() == [[32, 32]] * 12
    values = []
    for seed in range(seeds):
        predicted = run_once(replace(run_of(config), seed=seed)).last["detections"]
        by_coco = metric == "coco"
        one = coco_ap(predicted, objects, sizes, len(classes)) if by_coco else voc_ap(predicted, objects, len(classes))
        values.append([one.ap, one.ap50, one.ap75])
    mean = np.mean(values, axis=0)
    assert [found[name].value for name in task.metric_names(config)] == pytest.approx(mean.tolist())
    if seeds == 2:  # t(0.975, 1) = 12.706
        half = 12.706204736 * np.std(values, axis=0, ddof=1) / np.sqrt(2)
        assert found["detection/ap"].ci95 == pytest.approx(half[0])
        assert found["detection/ap"].n == 2


def test_masks_on_coco_with_a_crowd_and_an_empty_image() -> None:
    config = replace(TINY, masks="yes", iterations=2)
    trainee = trainee_of(config, shapes("coco"), phase="test")
    assert trainee.num_images == 9  # the last of ten has no object
    assert trainee.num_scored == 5
    outputs = list(task.evaluate(config, fine_tuning_context("test", shapes("coco"))))
    found = {one.name: one.value for one in outputs if isinstance(one, Metric)}
    assert set(task.metric_names(config)) <= set(found)
    assert all(0 <= found[f"detection/mask_{name}"] <= 100 for name in ("ap", "ap50", "ap75"))


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    run = run_of(replace(TINY, curve_points=2))
    one, again = run_once(run), resumed(run, tmp_path, stop_at=2)
    np.testing.assert_array_equal(again.losses, one.losses)
    assert set(again.predictions) == {2, 4}
    for at in (2, 4):
        np.testing.assert_array_equal(again.predictions[at]["detections"], one.predictions[at]["detections"])


def test_two_processes_equal_one(tmp_path: Path) -> None:
    run = run_of(replace(TINY, masks="yes"))
    one, two = run_once(run), run_in_two_processes(run, tmp_path)
    check_gradients(one, two)
    np.testing.assert_allclose(two.losses, one.losses, rtol=1e-4)
    ours, theirs = one.last["detections"], two.last["detections"]
    assert len(ours) == len(theirs)
    np.testing.assert_array_equal(ours[:, 0], theirs[:, 0])
    np.testing.assert_allclose(np.sort(ours[:, 2]), np.sort(theirs[:, 2]), rtol=1e-3)


def test_nan_boxes_are_reported_as_divergence() -> None:
    config = replace(TINY, learning_rate=1e9)
    with pytest.raises(FineTuningDiverged, match=r"detection \(seed0\) became NaN or infinite"):
        run_once(run_of(config))


def test_images_without_detections_give_no_rows() -> None:
    trainee = trainee_of(replace(TINY, masks="yes"))
    model = trainee.model.eval()
    with torch.no_grad():
        model.rcnn.roi_heads.box_predictor.cls_score.bias[-1] = 100.0  # all is background
        found = trainee.predict([0, 1])
        assert {name: values.shape for name, values in found.items()} == {
            "detections": (0, 7),
            "mask_rle": (0,),
            "mask_sizes": (0,),
        }
        assert trainee.predict([])["detections"].shape == (0, 7)


def test_detections_are_in_pixels_of_the_original() -> None:
    trainee = trainee_of(replace(TINY, short_side=96), shapes("coco"), phase="test")  # images of 64 x 48, enlarged
    trainee.model.eval()
    with torch.no_grad():
        found = trainee.predict([3, 4])["detections"]
    assert set(found[:, 0]) == {3, 4}
    assert set(found[:, 1]) <= {0, 1, 2}
    assert (found[:, 2] > 0.05).all()
    assert found[:, 3:5].min() >= 0
    assert 48 < found[:, 5].max() <= 64
    assert 30 < found[:, 6].max() <= 48
    assert (found[:, 5:] > found[:, 3:5]).all()


def test_the_curve_has_a_point_per_iteration_and_run() -> None:
    values = np.array([[5.0, 20, 30, 33], [4.0, 18, 33, 36]])
    png = curve_plot([25, 50, 75, 100], {"AP": values / 2, "AP50": values, "AP75": values / 3}, 2)
    assert png.startswith(b"\x89PNG")


def test_good_options_pass() -> None:
    for recipe in RECIPES:
        task.check(DetectionConfig(recipe), "test", {})  # type: ignore[arg-type]
    task.check_data(DetectionConfig(), "test", rendered_data())
    task.check_data(DetectionConfig(), "test", shapes("voc"))


def test_images_without_boxes_or_masks_are_refused_before_training(tmp_path: Path) -> None:
    picture = encode(np.zeros((8, 8, 3), np.uint8))
    uri = write_folder(tmp_path / "plain", [(f"{i}.png", label, picture) for i in range(12) for label in "abcde"])
    plain = make(tmp_path, uri)
    with pytest.raises(
        DataError, match=r"split 'train' has no targets beside its labels\. Use voc:, coco: or rendered:"
    ):
        task.check_data(DetectionConfig(), "val", plain)
    with pytest.raises(DataError, match=r"objects of split 'train' have none .*Set masks to 'no'"):
        task.check_data(replace(TINY, masks="yes"), "val", shapes("voc"))
