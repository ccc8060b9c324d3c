"""Depth against slow loops over pixels, planted predictions, and on two processes."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import depth
from evaluation.depth import DepthConfig, DepthProblem
from evaluation.depth_metrics import depth_sums, main_value, rmse, share
from evaluation.fine_tuning import Run, Schedule, train_table
from evaluation.fine_tuning.loop import draws
from evaluation.fine_tuning_images import Augmentation
from evaluation.metric import Artifact, Metric, Samples
from image_data.contracts import DataError
from tests.evaluation.fine_tuning.samples import (
    check_gradients,
    fine_tuning_context,
    rendered_data,
    resumed,
    run_in_two_processes,
    run_once,
    tiny_backbone,
)

CPU = torch.device("cpu")
SHORT = Schedule(3, 4, 0.003, optimizer="adam")
COUNTS = {"train": (2,) * 12, "val": (1,) * 12, "test": (1,) * 12}


def _run(**options: Any) -> Run:
    return Run("seed0", "depth", DepthProblem(**{"schedule": SHORT, **options}), "val")


def _true_depth(row: int, largest: float) -> np.ndarray:
    """Depth of a training image, read pixel by pixel."""
    table = train_table(rendered_data(), "val")
    stored = Image.open(io.BytesIO(table.value(row, "depth")))
    width, height = stored.size
    found = np.ones((height, width))
    for y in range(height):
        for x in range(width):
            value = stored.getpixel((x, y))
            assert isinstance(value, int)
            if value:
                found[y, x] = value * table.value(row, "depth_scale") / largest
    return found


def test_targets_are_the_stored_depths_and_the_background_is_the_largest() -> None:
    trainee = _run().problem.build(tiny_backbone(), rendered_data(), "val", 0, CPU)
    largest = max(train_table(rendered_data(), "val").column("depth_max"))
    chosen = draws(0, 24, 0, 3)
    images, depths = trainee.load(chosen)
    assert images.shape == (3, 3, 32, 32)
    for draw, found in zip(chosen, depths.numpy(), strict=True):
        np.testing.assert_allclose(found, _true_depth(draw.row, largest), rtol=1e-6)
    assert 0.5 < float(depths.min()) < 0.9


def test_targets_are_mirrored_with_their_images() -> None:
    plain, mirrored = (
        _run(augmentation=Augmentation(flip=flip)).problem.build(tiny_backbone(), rendered_data(), "val", 0, CPU)
        for flip in (False, True)
    )
    (images, depths), (seen, targets) = (t.load(draws(0, 24, 0, 16)) for t in (plain, mirrored))
    flipped = [not torch.equal(a, b) for a, b in zip(images, seen, strict=True)]
    assert 0 < sum(flipped) < 16
    for i, was_flipped in enumerate(flipped):
        assert torch.equal(seen[i], images[i].flip(-1) if was_flipped else images[i])
        assert torch.equal(targets[i], depths[i].flip(-1) if was_flipped else depths[i])


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("resolution", ["image", "map"])
def test_loss_is_the_mean_absolute_difference(head: Any, resolution: Any) -> None:
    trainee = _run(head=head, resolution=resolution).problem.build(tiny_backbone(), rendered_data(), "val", 0, CPU)
    batch = trainee.load(draws(0, 24, 0, 4))
    loss = trainee.model(batch)["l1"].item()
    features = tiny_backbone().forward_features(batch.images)
    model = trainee.model
    if head == "mlp":
        hidden = torch.einsum("oc,bchw->bohw", model.hidden[0].weight[:, :, 0, 0], features)
        centred = hidden - hidden.mean((0, 2, 3), keepdim=True)
        features = (centred / (hidden.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()).clamp(min=0)
    predicted = torch.einsum("c,bchw->bhw", model.last.weight[0, :, 0, 0], features) + model.last.bias
    if resolution == "map":
        depths = batch.depths[:, ::8, ::8]
    else:
        depths = batch.depths
        predicted = torch.nn.Upsample(scale_factor=8, mode="bilinear")(predicted[:, None])[:, 0]
    assert loss == pytest.approx((predicted - depths).abs().mean().item(), rel=1e-5)


def test_skips_are_the_sum_of_upsampled_maps_of_strides_from_four_on() -> None:
    trainee = _run(head="skips", resolution="map").problem.build(tiny_backbone(), rendered_data(), "val", 0, CPU)
    model, batch = trainee.model.eval(), trainee.load(draws(0, 24, 0, 2))
    backbone = tiny_backbone().eval()
    stem, first, second, third = backbone.stages
    fine = second(first(stem(batch.images)))
    coarse = third(fine)
    assert (fine.shape[-1], coarse.shape[-1]) == (8, 4)
    total = torch.zeros(2, 128, 8, 8)
    maps = (fine, torch.nn.Upsample(size=8, mode="bilinear")(coarse))
    for found, (conv, norm) in zip(maps, model.hidden.projections, strict=True):
        total += torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], found) / (1 + norm.eps) ** 0.5
    expected = torch.einsum("c,bchw->bhw", model.last.weight[0, :, 0, 0], total.clamp(min=0)) + model.last.bias
    torch.testing.assert_close(model.outputs(batch)[0], expected, atol=1e-5, rtol=1e-5)


def test_metrics_are_those_of_a_loop_over_pixels() -> None:
    rng = np.random.default_rng(0)
    depths = np.where(rng.random((5, 6, 7)) < 0.6, 1.0, rng.uniform(0.5, 0.95, (5, 6, 7))).astype(np.float32)
    predicted = (depths * rng.uniform(0.7, 1.4, depths.shape)).astype(np.float32)
    predicted[0, 0, :3] = (0, -0.5, -1.0)
    sums = depth_sums(predicted, depths, 4.0)
    for suffix, counts in (("", np.ones_like(depths)), ("_object", depths != 1)):
        for name, threshold in (("within_1_25", 1.25), ("within_1_1", 1.1)):
            right = total = 0
            for p, d, counted in zip(predicted.flat, depths.flat, counts.flat, strict=True):
                total += bool(counted)
                right += bool(counted and p > 0 and max(p / d, d / p) < threshold)
            found = share(sums, f"{name}{suffix}")
            assert found.value == pytest.approx(100 * right / total)
            assert found.parts.mean() == pytest.approx(found.value)
        squares = [
            (4.0 * (float(p) - float(d))) ** 2
            for p, d, c in zip(predicted.flat, depths.flat, counts.flat, strict=True)
            if c
        ]
        assert rmse(sums, suffix)[0] == pytest.approx(np.mean(squares) ** 0.5)
    assert main_value(sums) == share(sums, "within_1_25").value


def test_planted_predictions_have_known_metrics() -> None:
    depths = np.array([[[1.0, 0.5]], [[1.0, 1.0]]], np.float32)
    sums = depth_sums(np.array([[[1.0, 0.6]], [[1.2, 2.0]]], np.float32), depths, 10.0)
    shares = [share(sums, name).value for name in depth.SHARES]
    assert shares == pytest.approx([75, 25, 100, 0])
    assert rmse(sums, "")[0] == pytest.approx(((1 + 4 + 100) / 4) ** 0.5)
    assert rmse(sums, "_object")[0] == pytest.approx(1.0)
    nothing = depth_sums(np.ones((2, 1, 2), np.float32), np.ones((2, 1, 2), np.float32), 10.0)
    assert share(nothing, "within_1_1_object").value == 0
    assert share(nothing, "within_1_1").value == 100


def test_the_interval_of_a_ratio_is_that_of_the_bootstrap() -> None:
    rng = np.random.default_rng(1)
    objects = rng.integers(20, 200, 300)
    sums = {"within_1_1_object": rng.binomial(objects, rng.uniform(0.3, 0.9, 300)), "pixels_object": objects}
    drawn = rng.integers(0, 300, (4000, 300))
    values = 100 * sums["within_1_1_object"][drawn].sum(1) / objects[drawn].sum(1)
    assert share(sums, "within_1_1_object").half_width == pytest.approx(1.96 * values.std(), rel=0.06)


def test_it_learns_more_than_the_empty_scene() -> None:
    config = DepthConfig(iterations=30, batch_size=16, learning_rate=0.01, curve_points=2)
    outputs = list(depth.evaluate(config, fine_tuning_context("val")))
    metrics = {o.name: o for o in outputs if isinstance(o, Metric)}
    samples = {o.name: o.values for o in outputs if isinstance(o, Samples)}
    pictures = [o.name for o in outputs if isinstance(o, Artifact)]
    assert set(metrics) == {*depth.metric_names(config), "depth/rmse", "depth/rmse_object"}
    for name in depth.metric_names(config):
        assert samples[name].shape == (12,)
        assert samples[name].mean() == pytest.approx(metrics[name].value)
    trainee = _run().problem.build(tiny_backbone(), rendered_data(), "val", 0, CPU)
    depths = np.stack([trainee._depth(trainee._scored, row) for row in range(12)])
    empty = depth_sums(np.ones_like(depths), depths, trainee.largest)
    assert metrics["depth/within_1_25_object"].value > share(empty, "within_1_25_object").value + 15
    assert metrics["depth/rmse_object"].value < rmse(empty, "_object")[0]
    assert pictures == ["depth/examples.png", "depth/iterations.png"]
    assert samples["depth/curve"][:, 0].tolist() == [15, 30]


def test_seeds_give_a_mean_and_an_interval() -> None:
    config = DepthConfig(iterations=1, batch_size=4, seeds=2, resolution="map", head="mlp")
    metric = next(iter(depth.evaluate(config, fine_tuning_context("val"))))
    assert isinstance(metric, Metric)
    values = [main_value(run_once(Run("r", "depth", depth.problem(config), "val", seed)).last) for seed in (0, 1)]
    assert metric.value == pytest.approx(np.mean(values))
    assert metric.ci95 == pytest.approx(12.7062047 * abs(values[0] - values[1]) / 2)
    assert metric.n == 2


def test_two_processes_equal_one(tmp_path: Path) -> None:
    # Not Adam, which turns gradients that are zero but for rounding into steps of full length.
    run = _run(head="skips", augmentation=Augmentation(flip=True), schedule=Schedule(3, 4, 0.01))
    one, two = run_once(run), run_in_two_processes(run, tmp_path)
    check_gradients(one, two)
    np.testing.assert_allclose(two.losses, one.losses, rtol=1e-4)
    for name in ("pixels", "pixels_object", "squared", "examples", "example_depths"):
        np.testing.assert_allclose(two.last[name], one.last[name], rtol=1e-3, err_msg=name)
    assert main_value(two.last) == pytest.approx(main_value(one.last), abs=0.1)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    run = _run(augmentation=Augmentation(flip=True, color_jitter=0.8, grayscale=0.25), evaluate_at=(2,))
    one, again = run_once(run), resumed(run, tmp_path, stop_at=2)
    np.testing.assert_array_equal(again.losses, one.losses)
    for at in (2, 3):
        for name, values in one.predictions[at].items():
            np.testing.assert_array_equal(again.predictions[at][name], values)


def test_a_worker_without_images_gives_empty_arrays() -> None:
    trainee = _run().problem.build(tiny_backbone(), rendered_data(), "val", 0, CPU)
    trainee.model.eval()
    with torch.no_grad():
        none, all_of_them = trainee.predict([]), trainee.predict(range(12))
    assert set(none) == set(all_of_them)
    assert all(len(values) == 0 and values.dtype == all_of_them[name].dtype for name, values in none.items())
    assert len(all_of_them["examples"]) == 6


def test_resized_images_and_few_labels() -> None:
    problem = depth.problem(DepthConfig(image_size=16, num_labels=5, iterations=1, batch_size=4))
    trainee = problem.build(tiny_backbone(), rendered_data(), "val", 0, CPU)
    assert trainee.num_images == 5
    batch = trainee.load(draws(0, 5, 0, 4))
    assert batch.images.shape == (4, 3, 16, 16)
    assert batch.depths.shape == (4, 16, 16)


def test_the_papers_recipe() -> None:
    made = depth.problem(DepthConfig(recipe="newell_deng", num_labels=1000))
    assert (made.schedule.iterations, made.schedule.batch_size) == (31_400, 64)
    assert (made.head, made.resolution) == ("linear", "map")
    ours = depth.problem(DepthConfig())
    assert (ours.head, ours.resolution) == ("skips", "image")
    assert not made.augmentation.crop
    assert depth.protocol(DepthConfig(recipe="newell_deng"), "test")["schedule"]["optimizer"] == "adam"


def test_bad_options_and_missing_targets_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"head='deep'.*allowed: head auto, linear, mlp, skips"):
        depth.check(DepthConfig(head="deep"), "val", COUNTS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"depth got num_labels=99, but there are 24 training images"):
        depth.check(replace(DepthConfig(), num_labels=99), "val", COUNTS)
    depth.check_data(DepthConfig(), "val", rendered_data())
    monkeypatch.setattr("evaluation.fine_tuning_runs.target_columns", lambda data, split: ("pose", "depth"))
    with pytest.raises(
        DataError, match=r"depth needs a target 'depth_scale', but the images of split 'train' have pose, "
    ):
        depth.check_data(DepthConfig(), "val", rendered_data())
