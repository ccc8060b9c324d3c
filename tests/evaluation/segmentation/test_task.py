"""The task: options and schedules, bad data, and the whole evaluation on rendered images and on a Cityscapes tree."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.stats import t as student

from evaluation.fine_tuning import Run, scored_table, train_table
from evaluation.fine_tuning.loop import draws
from evaluation.fine_tuning.schedule import learning_rate
from evaluation.metric import Artifact, Metric, ModelResult, Samples
from evaluation.segmentation import task
from evaluation.segmentation.metric import IGNORED, score
from evaluation.segmentation.problem import RECIPES, read_classes, read_mask
from evaluation.segmentation.task import SegmentationConfig
from image_data.contracts import DataError
from image_data.layouts.cityscapes import CITYSCAPES_CLASSES
from image_data.prepared import PreparedData
from tests.evaluation.fine_tuning.samples import (
    fine_tuning_context,
    rendered_data,
    run_once,
)
from tests.evaluation.segmentation.samples import NARROW, V3, streets, trainee_of


def _with_masks(data: PreparedData, folder: Path, change: Any) -> PreparedData:
    """The data with other columns in the training split: ``change`` gets and returns its Parquet table."""
    import pyarrow.parquet as pq

    info = data.split("train")
    target = folder / "train-0.parquet"
    pq.write_table(change(pq.read_table(info.files[0])), target)
    splits = {**data.splits, "train": replace(info, files=(str(target),))}
    return replace(data, directory=str(folder), splits=splits)


# --- schedules and options


def test_the_papers_schedules() -> None:
    v3, plus = (task.problem(SegmentationConfig(recipe=name)).schedule for name in ("deeplab_v3", "deeplab_v3plus"))
    assert (v3.iterations, v3.batch_size, v3.weight_decay, v3.momentum, v3.optimizer) == (40_000, 8, 5e-4, 0.9, "sgd")
    assert (plus.iterations, plus.batch_size, plus.weight_decay) == (30_000, 8, 1e-4)
    # Poly by its formula: (0.01 - 1e-4) (1 - t / T)^0.9 + 1e-4.
    for t in (0, 1, 20_000, 39_999):
        assert learning_rate(v3, t) == pytest.approx(0.0099 * (1 - t / 40_000) ** 0.9 + 1e-4)
    assert learning_rate(v3, 0) == pytest.approx(0.01)
    assert learning_rate(plus, 15_000) == pytest.approx(0.01 * 0.5**0.9, rel=1e-3)


def test_options_change_the_schedule() -> None:
    config = SegmentationConfig(recipe="deeplab_v3", batch_size=16)
    assert (task.problem(config).schedule.iterations, task.problem(config).schedule.learning_rate) == (20_000, 0.02)
    config = replace(config, iterations=100, learning_rate=0.04, curve_points=4)
    built = task.problem(config)
    assert (built.schedule.iterations, built.schedule.learning_rate) == (100, 0.04)
    assert built.schedule.min_learning_rate == pytest.approx(4e-4)
    assert built.evaluate_at == (25, 50, 75)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "unet"}, "recipe='unet'; allowed: rendered, deeplab_v3, deeplab_v3plus"),
        ({"iterations": -1}, "iterations=-1; allowed: 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"seeds": 0}, "seeds=0"),
        ({"batch_size": 1}, "at least 2 images"),
        ({"iterations": 5, "curve_points": 6}, "curve_points=6 for 5 iterations"),
    ],
)
def test_impossible_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task.check(SegmentationConfig(**options), "val", {"train": (3,), "val": (3,)})


def test_a_missing_split_is_named() -> None:
    task.check(SegmentationConfig(), "val", {"train": (3,), "val": (3,)})
    with pytest.raises(ValueError, match="needs images in split 'test'; the data has: train, val"):
        task.check(SegmentationConfig(), "test", {"train": (3,), "val": (3,)})


# --- data


def test_missing_masks_are_an_error_that_names_the_data(tmp_path: Path) -> None:
    data = _with_masks(rendered_data(), tmp_path, lambda table: table.drop_columns(["mask"]))
    task.check_data(SegmentationConfig(), "val", rendered_data())
    with pytest.raises(DataError, match=r"'mask'\); split 'train' of rendered:.* has the targets .*depth"):
        task.check_data(SegmentationConfig(), "val", data)


def test_masks_without_a_meaning_are_an_error(tmp_path: Path) -> None:
    data = rendered_data()
    splits = {name: replace(info, coarse_names=()) for name, info in data.splits.items()}
    with pytest.raises(DataError, match="have no class names"):
        task.check_data(SegmentationConfig(), "val", replace(data, splits=splits))

    def with_kind(table: Any) -> Any:
        return table.append_column("mask_kind", [["ade20k"] * len(table)])

    other = _with_masks(data, tmp_path, with_kind)
    with pytest.raises(DataError, match="masks of kind ade20k"):
        read_classes(train_table(other, "val"), "data")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.full((32, 32), 37, np.uint8), r"mask of \S+/train-\S+ holds 37; the 11 classes are 0 to 10"),
        (np.zeros((16, 32), np.uint8), r"mask of \S+/train-\S+ has 32 x 16 pixels, its image 32 x 32"),
        (np.zeros((32, 32), np.uint16), r"mask of \S+/train-\S+ has mode I;16"),
        (None, r"mask of \S+/train-\S+ is not a readable PNG"),
    ],
)
def test_a_bad_mask_stops_before_training(mask: np.ndarray | None, message: str, tmp_path: Path) -> None:
    def spoil(table: Any) -> Any:
        buffer = io.BytesIO()
        if mask is not None:
            Image.fromarray(mask).save(buffer, "PNG")
        masks = table["mask"].to_pylist()
        masks[5] = buffer.getvalue()
        return table.set_column(table.column_names.index("mask"), "mask", [masks])

    data = _with_masks(rendered_data(), tmp_path, spoil)
    with pytest.raises(DataError, match=message):
        task.check_data(SegmentationConfig(), "val", data)
    trainee = trainee_of(data=data)
    with pytest.raises(DataError, match=message):
        trainee.load([draw for draw in draws(0, 24, 0, 24) if draw.row == 5])


def test_too_many_labels() -> None:
    with pytest.raises(ValueError, match="num_labels is 25, but there are 24 training images"):
        task.check_data(SegmentationConfig(num_labels=25), "val", rendered_data())


# --- the whole evaluation


def _outputs(config: SegmentationConfig, context: Any) -> tuple[dict, dict, dict]:
    found = list(task.evaluate(config, context))
    metrics = {output.name: output for output in found if isinstance(output, Metric)}
    samples = {output.name: output.values for output in found if isinstance(output, Samples)}
    return metrics, samples, {output.name: output.data for output in found if isinstance(output, Artifact)}


def test_everything_on_rendered_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "rendered", NARROW)
    config = SegmentationConfig(iterations=4, batch_size=4, seeds=2, curve_points=2)
    metrics, samples, artifacts = _outputs(config, fine_tuning_context("test"))
    assert set(task.metric_names(config)) | {"segmentation/absent_classes"} == set(metrics)
    runs = [
        run_once(Run(f"seed{seed}", "segmentation", task.problem(config), "test", seed)).last["confusion"]
        for seed in (0, 1)
    ]
    values = np.array([score(run.sum(0)).miou for run in runs])
    assert metrics["segmentation/miou"].value == pytest.approx(values.mean())
    for name in ("macc", "aacc"):
        assert metrics[f"segmentation/{name}"].value == pytest.approx(
            np.mean([getattr(score(run.sum(0)), name) for run in runs])
        )
    half = student.ppf(0.975, 1) * values.std(ddof=1) / np.sqrt(2)
    assert metrics["segmentation/miou"].ci95 == pytest.approx(half)
    assert metrics["segmentation/miou"].n == 2
    names = samples["segmentation/class_names"].tolist()
    assert names[0] == "background"
    assert samples["segmentation/iou"].shape == (11,) == (len(names),)
    right = np.array([run.trace(axis1=1, axis2=2) for run in runs])
    np.testing.assert_allclose(samples["segmentation/aacc"], 100 * right.mean(0) / 32**2)
    assert samples["segmentation/curve"].shape == (2, 3)
    assert samples["segmentation/curve"][:, 0].tolist() == [2, 4]
    np.testing.assert_allclose(samples["segmentation/curve"][1, 1:], values)
    assert set(artifacts) == {"segmentation/examples.png", "segmentation/curve.png"}
    assert all(Image.open(io.BytesIO(data)).size[0] > 500 for data in artifacts.values())


def test_everything_on_a_cityscapes_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    data, written = streets()
    monkeypatch.setitem(RECIPES, "deeplab_v3", replace(V3, dropout=0.1))
    config = SegmentationConfig(recipe="deeplab_v3", iterations=3, batch_size=4)
    metrics, samples, artifacts = _outputs(config, fine_tuning_context("test", data))
    assert samples["segmentation/class_names"].tolist() == list(CITYSCAPES_CLASSES)
    table = scored_table(data, "test")
    assert metrics["segmentation/miou"].n == table.num_images == len(samples["segmentation/aacc"])
    assert 0 <= metrics["segmentation/miou"].value <= 100
    assert metrics["segmentation/absent_classes"].value == np.isnan(samples["segmentation/iou"]).sum()
    assert set(artifacts) == {"segmentation/examples.png"}
    # The masks are those that were written: label id 7 is road, train id 0; ids without a class are ignored.
    for row in range(table.num_images):
        name = str(table.value(row, "name"))
        ids = next(ids for file, ids in written.items() if name.endswith(file) or file.endswith(name))
        mask = read_mask(table, row, 19)
        np.testing.assert_array_equal(mask == 0, ids == 7)
        np.testing.assert_array_equal(
            mask == IGNORED, ~np.isin(ids, [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33])
        )


def test_one_run_has_intervals_over_images() -> None:
    config = SegmentationConfig(iterations=2, batch_size=4)
    metrics, samples, _ = _outputs(config, fine_tuning_context("val"))
    assert metrics["segmentation/aacc"].n == 12
    assert metrics["segmentation/aacc"].value == pytest.approx(samples["segmentation/aacc"].mean())
    assert 0 < metrics["segmentation/aacc"].ci95 < 50


def test_models_are_compared_on_the_same_images() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.uniform(50, 60, 40), rng.uniform(60, 70, 40)
    models = [
        ModelResult(name, name, 10, {}, {"segmentation/aacc": values}) for name, values in (("a", first), ("b", second))
    ]
    found = {output.name: output for output in task.compare(SegmentationConfig(), models)}
    difference = found["segmentation/aacc/a_minus_b"]
    assert isinstance(difference, Metric)
    assert difference.value == pytest.approx((first - second).mean())


def test_the_protocol_says_how() -> None:
    import json

    found = task.protocol(SegmentationConfig(recipe="deeplab_v3"), "test")
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(found))
    assert found["split"] == "test"
    assert found["trained_on"] == ["train", "val"]
    assert found["schedule"]["iterations"] == 40_000
    assert found["network"]["rates"] == (1, 12, 24, 36)
    assert "0.4" in found["loss"]


def test_only_features_are_not_enough() -> None:
    context = replace(fine_tuning_context("val"), fine_tuning=None)
    with pytest.raises(ValueError, match="only features were given"):
        next(iter(task.evaluate(SegmentationConfig(), context)))
