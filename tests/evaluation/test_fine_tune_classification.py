"""The fine-tuned classifier against torch's and scikit-learn's formulas, planted colours, and on two processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score

from evaluation import classification
from evaluation.classification import ClassificationConfig, ClassificationProblem
from evaluation.fine_tuning import Freezing, Run, Schedule, scored_table, train_table
from evaluation.fine_tuning.loop import draws
from evaluation.fine_tuning_images import Augmentation, augment, normalized_batch, square
from evaluation.fine_tuning_labels import label_subset
from evaluation.fine_tuning_runs import chosen_schedule, curve_iterations, newell_deng_schedule
from evaluation.metric import Artifact, Metric, Samples
from image_data.contracts import IMAGENET_MEAN, IMAGENET_STD, DataError
from image_data.prepare import DataConfig, prepare
from image_data.prepared import PreparedData
from tests.evaluation.fine_tuning.samples import (
    check_gradients,
    fine_tuning_context,
    rendered_data,
    resumed,
    run_in_two_processes,
    run_once,
    tiny_backbone,
)

COUNTS = {"train": (2,) * 12, "val": (1,) * 12, "test": (1,) * 12}
CPU = torch.device("cpu")
SHORT = Schedule(3, 4, 0.01, optimizer="adam")


def _run(**options: Any) -> Run:
    problem = ClassificationProblem(**{"target": "coarse", "schedule": SHORT, **options})
    return Run("seed0", "classification", problem, "val")


def test_loss_is_cross_entropy_of_the_linear_layer_on_the_mean_of_the_map() -> None:
    trainee = _run().problem.build(tiny_backbone(), rendered_data(), "val", 0, CPU)
    batch = trainee.load(draws(0, trainee.num_images, 0, 5))
    table = train_table(rendered_data(), "val")
    rows = [draw.row for draw in draws(0, 24, 0, 5)]
    pixels = torch.tensor(np.stack([table.image(row) for row in rows])).permute(0, 3, 1, 2) / 255
    expected = (pixels - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    torch.testing.assert_close(batch[0], expected.float(), atol=1e-5, rtol=0)
    assert batch[1].tolist() == [table.value(row, "coarse") for row in rows]

    loss = trainee.model(batch)["cross_entropy"]
    pooled = tiny_backbone().forward_features(batch[0]).flatten(2).mean(2).detach().numpy().astype(np.float64)
    head = trainee.model.head
    logits = pooled @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    slow = [np.log(np.exp(row).sum()) - row[label] for row, label in zip(logits, batch[1].tolist(), strict=True)]
    assert loss.item() == pytest.approx(np.mean(slow), rel=1e-5)


def _coloured(folder: Path) -> PreparedData:
    """Four classes of 24 noisy images of one colour each; no coarse classes."""
    rng = np.random.default_rng(0)
    for name, colour in (
        ("red", (200, 60, 60)),
        ("green", (60, 200, 60)),
        ("blue", (60, 60, 200)),
        ("gray", (120,) * 3),
    ):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(24):
            pixels = np.clip(colour + 30 * rng.normal(size=(16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{i}.png")
    config = DataConfig(
        data=(f"folder:{folder / 'images'}",),
        cache=str(folder / "cache"),
        class_split=None,
        image_split=(0.5, 0.25, 0.25),
    )
    return prepare(config, log=lambda _: None)


def test_it_reads_planted_colours_and_draws_its_curve(tmp_path: Path) -> None:
    config = ClassificationConfig(iterations=16, batch_size=16, learning_rate=0.005, curve_points=2)
    outputs = list(classification.evaluate(config, fine_tuning_context("test", _coloured(tmp_path))))
    metric, correct, curve, plot = outputs
    assert isinstance(metric, Metric)
    assert isinstance(correct, Samples)
    assert isinstance(curve, Samples)
    assert isinstance(plot, Artifact)
    assert (metric.name, metric.n) == ("classification/top1", 24)
    assert metric.value > 70  # chance is 25
    assert correct.name == metric.name
    assert correct.values.mean() == pytest.approx(metric.value)
    assert curve.values[:, 0].tolist() == [8, 16]
    assert curve.values[-1, 1] == pytest.approx(metric.value)
    assert plot.name == "classification/iterations.png"


def test_the_truth_is_the_column_and_top1_is_scikit_learns() -> None:
    last = run_once(_run()).last
    assert last["truth"].tolist() == scored_table(rendered_data(), "val").column("coarse")
    assert classification.main_value(last) == pytest.approx(100 * accuracy_score(last["truth"], last["predicted"]))
    planted = {"predicted": np.array([1, 2, 3, 3]), "truth": np.array([1, 2, 0, 3])}
    assert classification.main_value(planted) == 75.0


def test_seeds_give_a_mean_with_students_interval() -> None:
    config = ClassificationConfig(iterations=1, batch_size=4, learning_rate=0.01, seeds=3)
    context = fine_tuning_context("val", seed=5)
    metric, samples = list(classification.evaluate(config, context))
    values = [classification.main_value(run_once(_run_of(config, seed)).last) for seed in (5, 6, 7)]
    assert isinstance(metric, Metric)
    assert metric.value == pytest.approx(np.mean(values))
    assert metric.ci95 == pytest.approx(4.302653 * np.std(values, ddof=1) / 3**0.5)
    assert metric.n == 3
    assert isinstance(samples, Samples)
    assert samples.values.mean() == pytest.approx(metric.value)


def _run_of(config: ClassificationConfig, seed: int) -> Run:
    return Run(f"seed{seed}", "classification", classification.problem(config), "val", seed)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    run = _run(augmentation=Augmentation(flip=True, crop=True))
    one, two = run_once(run), run_in_two_processes(run, tmp_path)
    check_gradients(one, two)
    np.testing.assert_allclose(two.losses, one.losses, rtol=2e-4)
    np.testing.assert_array_equal(two.last["truth"], one.last["truth"])
    np.testing.assert_array_equal(two.last["predicted"], one.last["predicted"])


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    everything = Augmentation(flip=True, crop=True, cutout=True, color_jitter=0.8, grayscale=0.25)
    run = _run(augmentation=everything, schedule=replace(SHORT, iterations=6), evaluate_at=(2,))
    one, again = run_once(run), resumed(run, tmp_path, stop_at=3)
    np.testing.assert_array_equal(again.losses, one.losses)
    for at in (2, 6):
        np.testing.assert_array_equal(again.predictions[at]["predicted"], one.predictions[at]["predicted"])


def test_all_stages_frozen_leaves_the_backbone_as_it_is() -> None:
    kept: list[Any] = []

    def remembered(initial: str, seed: int) -> Any:
        kept.append(tiny_backbone(initial, seed))
        return kept[-1]

    run_once(_run(freezing=Freezing(4, "eval")), backbone=remembered)
    before, after = tiny_backbone().state_dict(), kept[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_few_labels_are_the_subset_of_the_seed() -> None:
    table = train_table(rendered_data(), "val")
    classes = np.array(table.column("coarse"))
    problem = _run(num_labels=7).problem
    trainee = problem.build(tiny_backbone(), rendered_data(), "val", 3, CPU)
    assert trainee.num_images == 7
    seen = trainee.load(draws(0, 7, 0, 7))
    rows = label_subset(classes, 7, 3)
    assert sorted(seen[1].tolist()) == sorted(classes[rows].tolist())
    expected = normalized_batch([table.image(int(row)).astype(np.float32) for row in rows]).sum((1, 2, 3)).sort()[0]
    scale = torch.tensor(IMAGENET_STD)[:, None, None]
    pixels = 255 * (seen[0] * scale + torch.tensor(IMAGENET_MEAN)[:, None, None])
    torch.testing.assert_close(pixels.sum((1, 2, 3)).sort()[0], expected, rtol=1e-4, atol=1)


def test_auto_is_coarse_where_there_is_one_and_label_is_the_class() -> None:
    auto, label = (
        _run(target=target).problem.build(tiny_backbone(), rendered_data(), "val", 0, CPU)
        for target in ("auto", "label")
    )
    assert auto.model.head.out_features == 10
    assert label.model.head.out_features == 12
    assert label.load(draws(0, 24, 0, 24))[1].bincount().tolist() == [2] * 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_labels": 25}, r"num_labels=25, but there are 24 training images"),
        ({"seeds": 0}, r"seeds=0; allowed: seeds at least 1"),
        ({"iterations": -1}, r"iterations=-1"),
        ({"learning_rate": float("nan")}, r"learning_rate=nan"),
        ({"target": "pose"}, r"target='pose'; allowed: auto, coarse, label"),
        ({"recipe": "imagenet"}, r"recipe='imagenet'; allowed: rendered, newell_deng"),
        ({"freezing": Freezing(-1)}, r"allowed: stages at least 0"),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classification.check(ClassificationConfig(**options), "val", COUNTS)


def test_the_report_trains_on_the_validation_images_too() -> None:
    classification.check(ClassificationConfig(num_labels=36), "test", COUNTS)
    assert classification.splits(ClassificationConfig(), "test") == ("train", "val", "test")
    assert classification.protocol(ClassificationConfig(), "test")["trained_on"] == ["train", "val"]


def test_data_without_coarse_classes_is_refused_where_they_were_asked_for() -> None:
    data = rendered_data()
    bare = replace(data, splits={name: replace(info, coarse_names=()) for name, info in data.splits.items()})
    classification.check_data(ClassificationConfig(), "val", bare)
    with pytest.raises(DataError, match=r"target=coarse, but the images of split 'train' have no coarse classes"):
        classification.check_data(ClassificationConfig(target="coarse"), "val", bare)


@pytest.mark.parametrize(
    ("labels", "iterations", "warmup"),
    [
        (100, 200 * 20, 100),
        (4000, 200 * 40, 200),
        (20_000, 600 * 40, 200),
        (200_000, 600 * 98, 490),
        (0, 600 * 98, 490),
    ],
)
def test_the_papers_label_sweep(labels: int, iterations: int, warmup: int) -> None:
    schedule = newell_deng_schedule(labels, 512, 50_000)
    assert (schedule.iterations, schedule.warmup_iterations) == (iterations, warmup)


def test_options_override_the_recipe() -> None:
    recipe = newell_deng_schedule(100, 512, 50_000)
    config = ClassificationConfig(batch_size=128, iterations=100, learning_rate=5e-4)
    schedule = chosen_schedule(recipe, config)
    assert (schedule.batch_size, schedule.iterations, schedule.learning_rate) == (128, 100, 5e-4)
    assert schedule.min_learning_rate == pytest.approx(5e-7)
    assert chosen_schedule(recipe, ClassificationConfig(batch_size=128)).learning_rate == pytest.approx(2.5e-4)
    assert curve_iterations(10, 0) == ()
    assert curve_iterations(10, 4) == (2, 5, 8, 10)


def test_augmentations_do_what_they_say() -> None:
    image = np.random.default_rng(0).normal(size=(16, 16, 3)).astype(np.float32)
    rng = np.random.default_rng(1)
    same, flipped = augment(image, Augmentation(), rng)
    assert same is image
    assert not flipped
    views = [augment(image, Augmentation(flip=True), rng) for _ in range(200)]
    assert 60 < sum(flag for _, flag in views) < 140
    assert all(np.array_equal(view, image[:, ::-1] if flag else image) for view, flag in views)
    gray = augment(image, Augmentation(grayscale=1.0), rng)[0]
    np.testing.assert_allclose(gray, np.repeat(image.mean(2, keepdims=True), 3, 2), rtol=1e-6)
    hole = augment(image, Augmentation(cutout=True), rng)[0]
    assert (hole == 0).all(2).sum() == 16
    jittered = augment(image, Augmentation(color_jitter=1.0), rng)[0]
    for channel in range(3):
        gain, shift = np.polyfit(image[..., channel].ravel(), jittered[..., channel].ravel(), 1)
        np.testing.assert_allclose(image[..., channel] * gain + shift, jittered[..., channel], atol=1e-5)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    windows = {padded[i : i + 16, j : j + 16].tobytes() for i in range(5) for j in range(5)}
    crops = [augment(image, Augmentation(crop=True), rng)[0] for _ in range(300)]
    assert {crop.tobytes() for crop in crops} == windows
    assert 40 < sum(np.array_equal(crop, image) for crop in crops) < 110  # 0.2 + 0.8 / 25 of 300 = 70


def test_squares_are_central_and_targets_keep_their_values() -> None:
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[:, 2:10] = 200
    assert (square(pixels, 4) == 200).all()
    assert square(pixels, 0) is pixels
    values = np.arange(16, dtype=np.uint16).reshape(4, 4) * 1000
    assert square(values, 2, nearest=True).tolist() == [[5000, 7000], [13000, 15000]]
