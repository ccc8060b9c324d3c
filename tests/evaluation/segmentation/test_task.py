"""The task: it learns, two processes equal one, it resumes, it runs on a Cityscapes tree; its errors and numbers."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import t as student

from evaluation.fine_tuning import Freezing, Run, Schedule, scored_table, train_table
from evaluation.fine_tuning.loop import draws
from evaluation.fine_tuning.schedule import learning_rate
from evaluation.metric import Artifact, Metric, ModelResult, Samples
from evaluation.segmentation import problem as problem_module
from evaluation.segmentation import task
from evaluation.segmentation.metric import IGNORED, score
from evaluation.segmentation.problem import RECIPES, SegmentationProblem, example_rows, read_classes, read_mask
from evaluation.segmentation.task import SegmentationConfig
from image_data.contracts import DataError
from image_data.layouts.cityscapes import CITYSCAPES_CLASSES
from image_data.prepare import DataConfig, prepare
from image_data.prepared import PreparedData
from methods.backbones import ResNet9
from tests.evaluation.fine_tuning.samples import (
    fine_tuning_context,
    rendered_data,
    resumed,
    run_in_two_processes,
    run_once,
    tiny_backbone,
)
from tests.image_data.annotated_samples import write_cityscapes

NARROW = replace(RECIPES["rendered"], width=16, dropout=0.0)
TINY = SegmentationProblem(NARROW, Schedule(3, 4, 0.02, decay="poly"))
RUN = Run("seed0", "segmentation", TINY, "val")
V3 = replace(RECIPES["deeplab_v3"], width=8, auxiliary_width=8, dropout=0.0)


@pytest.fixture(scope="module")
def streets(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreparedData, dict[str, np.ndarray]]:
    """A tree of Cityscapes, prepared, and the label ids that were written."""
    folder = tmp_path_factory.mktemp("cityscapes")
    truth = write_cityscapes(folder / "data")
    config = DataConfig(data=(f"cityscapes:{folder / 'data'}",), cache=str(folder / "cache"))
    return prepare(config, log=lambda _: None), truth


def _trainee(problem: SegmentationProblem = TINY, data: PreparedData | None = None, seed: int = 0) -> Any:
    return problem.build(tiny_backbone(), data or rendered_data(), "val", seed, torch.device("cpu"))


def _with_masks(data: PreparedData, folder: Path, change: Any) -> PreparedData:
    """The data with other columns in the training split: ``change`` gets and returns its Parquet table."""
    import pyarrow.parquet as pq

    info = data.split("train")
    target = folder / "train-0.parquet"
    pq.write_table(change(pq.read_table(info.files[0])), target)
    splits = {**data.splits, "train": replace(info, files=(str(target),))}
    return replace(data, directory=str(folder), splits=splits)


# --- training


def test_it_learns_the_parts_of_a_street(streets: tuple[PreparedData, dict[str, np.ndarray]]) -> None:
    problem = SegmentationProblem(NARROW, Schedule(20, 8, 0.01, optimizer="adam", decay="poly"))
    result = run_once(replace(RUN, problem=problem, phase="test"), streets[0])
    assert result.losses[-5:, 1].mean() < 0.6 * result.losses[0, 1]
    confusion = result.last["confusion"].sum(0)
    most_frequent = np.zeros_like(confusion)
    most_frequent[:, confusion.sum(1).argmax()] = confusion.sum(1)
    found, chance = score(confusion), score(most_frequent)
    assert found.miou > 3 * chance.miou
    assert found.aacc > 2 * chance.aacc
    assert abs(task.main_value(result.last) - found.aacc) < 10


@pytest.mark.parametrize("recipe", [NARROW, V3])
def test_two_processes_equal_one(recipe: Any, tmp_path: Path) -> None:
    run = replace(RUN, problem=replace(TINY, recipe=recipe))
    one, two = run_once(run), run_in_two_processes(run, tmp_path)
    np.testing.assert_allclose(two.losses, one.losses, rtol=1e-4)
    assert one.last["confusion"].shape == (12, 11, 11)
    # A pixel between two classes may fall to either side.
    assert np.abs(two.last["confusion"] - one.last["confusion"]).sum() <= 0.01 * one.last["confusion"].sum()
    assert np.abs(two.last["output_pixels"] - one.last["output_pixels"]).sum() <= 12
    assert (two.last["examples"] != one.last["examples"]).mean() < 0.01


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    problem = replace(TINY, recipe=RECIPES["rendered"], schedule=Schedule(6, 4, 0.02), evaluate_at=(2,), num_labels=9)
    run = replace(RUN, problem=problem)
    one, again = run_once(run), resumed(run, tmp_path, stop_at=3)
    np.testing.assert_array_equal(again.losses, one.losses)
    for at in (2, 6):
        for name in ("confusion", "output_pixels", "examples"):
            np.testing.assert_array_equal(again.predictions[at][name], one.predictions[at][name])


def test_the_loss_is_the_mean_over_labelled_pixels_of_the_batch() -> None:
    trainee = _trainee(replace(TINY, recipe=V3))
    batch = trainee.load(draws(0, trainee.num_images, 0, 4))
    batch["masks"][0, :30] = IGNORED
    trainee.model.train()
    losses = trainee.model(batch)
    logits, auxiliary = trainee.model.deeplab(batch["images"])
    for name, own, weight in (("segmentation", logits, 1.0), ("auxiliary", auxiliary, 0.4)):
        full = torch.nn.functional.interpolate(own, size=batch["masks"].shape[1:], mode="bilinear")
        logs = full.log_softmax(1)
        valid = batch["masks"] != IGNORED
        picked = logs.gather(1, batch["masks"].long().clamp(max=10)[:, None])[:, 0][valid]
        torch.testing.assert_close(losses[name], -weight * picked.mean())


def test_a_batch_without_labels_has_loss_zero() -> None:
    trainee = _trainee()
    batch = trainee.load(draws(0, trainee.num_images, 0, 2))
    batch["masks"].fill_(IGNORED)
    loss = sum(trainee.model.train()(batch).values())
    loss.backward()
    assert loss.item() == 0


def test_label_subsets_and_frozen_stages() -> None:
    trainee = _trainee(replace(TINY, num_labels=7), seed=3)
    assert trainee.num_images == 7
    assert len(np.unique(np.array(trainee._table.column("coarse"))[trainee._rows])) == 7  # none twice
    names = [str(trainee._table.value(int(row), "name")) for row in trainee._rows]
    read = []
    trainee._table.value, value = lambda row, column: read.append(row) or value(row, column), trainee._table.value
    trainee.load(draws(0, trainee.num_images, 0, 7))
    assert sorted({str(value(row, "name")) for row in read}) == sorted(names)
    other = _trainee(replace(TINY, num_labels=7), seed=4)
    assert trainee._rows.tolist() != other._rows.tolist()
    backbone = tiny_backbone()
    Freezing(4).apply(backbone)
    frozen = TINY.build(backbone, rendered_data(), "val", 0, torch.device("cpu"))
    assert len(frozen.parameter_groups()) == 1
    assert len(trainee.parameter_groups()[0]["params"]) == len(list(tiny_backbone().parameters()))


def test_the_backbone_of_v3plus_learns_at_a_tenth() -> None:
    recipe = replace(RECIPES["deeplab_v3plus"], width=8)
    trainee = _trainee(replace(TINY, recipe=recipe))
    assert [group.get("lr_scale", 1.0) for group in trainee.parameter_groups()] == [0.1, 1.0]
    norms = [m for m in trainee.model.deeplab.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {m.momentum for m in norms} == {0.01}
    assert _trainee(TINY).model.deeplab.backbone.bn1.momentum == 0.1


# --- predictions


class _Oracle(torch.nn.Module):
    """Logits at a quarter of the resolution: what the red channel says, a class per 20 of 255."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        red = (images[:, 0, ::4, ::4] * 0.229 + 0.485) * 255
        classes = (red / 20).round().long()
        return 9.0 * torch.nn.functional.one_hot(classes, 11).permute(0, 3, 1, 2).float(), None


class _Masked:
    """Images in memory whose red is 20 times the class in the mask, but for the wrong pixels."""

    def __init__(self, masks: list[np.ndarray], wrong: list[np.ndarray]) -> None:
        self.num_images, self._masks, self._wrong = len(masks), masks, wrong

    def image(self, row: int) -> np.ndarray:
        return np.repeat(20 * self._wrong[row][:, :, None], 3, axis=2).astype(np.uint8)

    def value(self, row: int, column: str) -> Any:
        if column == "mask":
            buffer = io.BytesIO()
            Image.fromarray(self._masks[row]).save(buffer, "PNG")
            return buffer.getvalue()
        return {"name": f"image{row}", "height": len(self._masks[row]), "width": self._masks[row].shape[1]}[column]


@pytest.mark.parametrize("batch_pixels", [1, 1 << 18])
def test_planted_predictions_are_counted(batch_pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem_module, "BATCH_PIXELS", batch_pixels)
    masks = [np.full((16, 24), c, np.uint8) for c in (0, 3, 3, 7)]
    masks[2] = np.full((20, 16), 3, np.uint8)  # another size
    masks[3][:, :12] = IGNORED
    shown = [mask.copy() for mask in masks]
    shown[1][:] = 5
    shown[3][:, :12] = 0
    trainee = _trainee()
    trainee._scored, trainee.num_scored = _Masked(masks, shown), 4
    trainee.model.deeplab = _Oracle()
    found = trainee.predict([0, 1, 2, 3])
    expected = np.zeros((4, 11, 11), np.int64)
    expected[0, 0, 0], expected[1, 3, 5], expected[2, 3, 3] = 16 * 24, 16 * 24, 20 * 16
    expected[3, 7, 7] = 16 * 12
    # The upsampled logits of the ignored half reach into the labelled one where they are stronger: nowhere.
    np.testing.assert_array_equal(found["confusion"], expected)
    assert found["output_pixels"].tolist() == [[24, 24], [0, 24], [20, 20], [12, 12]]
    assert task.main_value(found) == pytest.approx(100 * 56 / 80)
    assert found["examples"].shape == (4, 16, 24)
    assert (found["examples"][1] == 5).all()


def test_images_are_scored_at_the_given_size_and_counted_at_their_own() -> None:
    trainee = _trainee(replace(TINY, image_size=16))
    seen = []
    trainee.model.deeplab.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    with torch.no_grad():
        found = trainee.predict([0, 1])
    assert seen == [(2, 3, 16, 16)]
    assert (found["confusion"].sum((1, 2)) == 32 * 32).all()
    assert trainee._view.size == (16, 16)


def test_example_rows_are_spread_and_distinct() -> None:
    assert example_rows(100).tolist() == [0, 20, 40, 59, 79, 99]
    assert example_rows(3).tolist() == [0, 1, 2]


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
    trainee = _trainee(data=data)
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


def test_everything_on_a_cityscapes_tree(
    streets: tuple[PreparedData, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, written = streets
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


def test_crops_of_cityscapes_shrink_with_the_images(streets: tuple[PreparedData, dict[str, np.ndarray]]) -> None:
    data, _ = streets
    height = train_table(data, "test").value(0, "height")
    trainee = SegmentationProblem(V3, TINY.schedule).build(
        ResNet9(stem="imagenet", width=8), data, "test", 0, torch.device("cpu")
    )
    batch = trainee.load(draws(0, trainee.num_images, 0, 2))
    assert batch["images"].shape == (2, 3, height // 2, height)
    assert batch["masks"].shape == (2, height // 2, height)
    large = problem_module._view(SegmentationProblem(RECIPES["deeplab_v3plus"], TINY.schedule, 1024), trainee._table)
    assert large.size == (768, 768)


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
