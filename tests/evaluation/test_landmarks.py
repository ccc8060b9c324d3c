"""Landmarks: the metric against loops, the points through crop and mirror, the runs, and the whole evaluation."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import t as student

from evaluation import landmarks
from evaluation.fine_tuning import Draw, Freezing, Run, Schedule
from evaluation.landmark_head import (
    LandmarkNetwork,
    LandmarkProblem,
    LandmarkTrainee,
    crop_box,
    landmark_loss,
    points_of,
)
from evaluation.landmarks import LandmarksConfig, relative_errors
from evaluation.metric import Artifact, Metric, Samples
from image_data.contracts import DataError
from image_data.prepare import DataConfig, prepare
from methods.backbones import build_backbone
from tests.evaluation.fine_tuning.samples import (
    check_gradients,
    fine_tuning_context,
    rendered_data,
    resumed,
    run_in_two_processes,
    run_once,
    tiny_backbone,
)
from tests.image_data.annotated_samples import write_celeba_mafl

TINY = LandmarksConfig(iterations=4, batch_size=8, learning_rate=0.02, image_size=32, num_pictures=5)
PROBLEM = LandmarkProblem(Schedule(4, 8, 0.02, decay="cosine"), 32)
RUN = Run("seed0", "landmarks", PROBLEM, "val")


class _Table:
    """Images in memory, with the interface of ``ImageTable``."""

    def __init__(self, images: list[np.ndarray], rows: list[Any], boxes: list[Any] | None = None) -> None:
        self.num_images, self._images = len(images), images
        self._columns = {"landmarks": rows, "name": [f"image{i}" for i in range(len(images))], "box": boxes}

    def image(self, row: int) -> np.ndarray:
        return self._images[row]

    def column(self, name: str) -> Any:
        return self._columns[name]

    def value(self, row: int, name: str) -> Any:
        return self._columns[name][row]


def _dotted(size: tuple[int, int], points: list[tuple[int, int]]) -> np.ndarray:
    """Black image (H, W, 3) with a dot of 3 x 3 pixels around each point, the first in red, the others in green."""
    image = np.zeros((size[1], size[0], 3), np.uint8)
    for i, (x, y) in enumerate(points):
        image[y - 1 : y + 2, x - 1 : x + 2, min(i, 1)] = 255
    return image


# --- metric


def test_errors_equal_loops_over_images_and_points() -> None:
    rng = np.random.default_rng(0)
    predicted, points = rng.normal(0, 20, (2, 7, 5, 2))
    visible, lengths = rng.random((7, 5)) < 0.6, rng.uniform(5, 40, 7)
    visible[:, 2] = True
    expected = []
    for i in range(7):
        one = [math.dist(predicted[i, k], points[i, k]) for k in range(5) if visible[i, k]]
        expected.append(100 * sum(one) / len(one) / lengths[i])
    np.testing.assert_allclose(relative_errors(predicted, points, visible, lengths), expected, rtol=1e-12)


def test_errors_by_hand() -> None:
    # Eyes 10 px apart; one point 3-4-5 off, the others exact: 5 / 5 points / 10 px = 10 %.
    points = np.array([[[0, 0], [10, 0], [5, 5], [2, 9], [8, 9]]], float)
    predicted = points.copy()
    predicted[0, 2] += (3, -4)
    everything = np.ones((1, 5), bool)
    assert relative_errors(predicted, points, everything, np.array([10.0])) == pytest.approx([10.0])
    hidden = everything.copy()
    hidden[0, 2] = False
    assert relative_errors(predicted, points, hidden, np.array([10.0])) == pytest.approx([0.0])
    points[0, 2] = np.nan  # what is not seen need not be known
    assert relative_errors(predicted, points, hidden, np.array([10.0])) == pytest.approx([0.0])


def test_on_faces_the_metric_is_the_mean_over_images_and_points() -> None:
    rng = np.random.default_rng(1)
    predicted, points = rng.normal(0, 9, (2, 30, 5, 2))
    lengths = np.linalg.norm(points[:, 0] - points[:, 1], axis=1)
    errors = relative_errors(predicted, points, np.ones((30, 5), bool), lengths)
    pooled = np.mean(np.linalg.norm(predicted - points, axis=2) / lengths[:, None])
    assert errors.mean() == pytest.approx(100 * pooled, rel=1e-12)


# --- network and loss


@pytest.mark.parametrize(
    ("name", "stem", "size"),
    [("resnet9", "small", 32), ("resnet9", "imagenet", 64), ("resnet18", "imagenet", 64), ("resnet50", "small", 16)],
)
def test_any_backbone_gives_two_numbers_per_point(name: Any, stem: Any, size: int) -> None:
    backbone = build_backbone(name, stem=stem).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    network = LandmarkNetwork(backbone, size, 5)
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    assert backbone.training
    head = network.head
    assert tuple(head.conv.weight.shape) == (128, backbone.num_features, 1, 1)
    assert isinstance(head.bn, torch.nn.BatchNorm2d)
    assert isinstance(head.relu, torch.nn.LeakyReLU)
    assert tuple(network.eval().points(torch.zeros(2, 3, size, size)).shape) == (2, 5, 2)


def test_loss_is_the_mean_squared_error_of_visible_coordinates_in_sides_of_the_crop() -> None:
    rng = np.random.default_rng(2)
    predicted, points = rng.normal(size=(2, 3, 5, 2))
    visible = rng.random((3, 5)) < 0.5
    terms = [
        0.5
        * ((predicted[i, k, 0] / 2 - points[i, k, 0] / 2) ** 2 + (predicted[i, k, 1] / 2 - points[i, k, 1] / 2) ** 2)
        for i in range(3)
        for k in range(5)
        if visible[i, k]
    ]
    found = landmark_loss(*(torch.from_numpy(x) for x in (predicted, points, visible)))
    assert float(found) == pytest.approx(sum(terms) / len(terms))


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_hidden_points_have_no_influence(value: float) -> None:
    predicted = torch.randn(3, 5, 2, requires_grad=True)
    visible = torch.rand(3, 5) < 0.5
    visible[0] = False
    points = torch.randn(3, 5, 2)
    points[~visible] = value
    landmark_loss(predicted, points, visible).backward()
    assert predicted.grad is not None
    assert bool((predicted.grad[~visible] == 0).all())
    assert bool((predicted.grad[visible] != 0).all())


def test_a_batch_without_visible_points_has_no_loss() -> None:
    predicted = torch.randn(2, 5, 2, requires_grad=True)
    loss = landmark_loss(predicted, torch.zeros(2, 5, 2), torch.zeros(2, 5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert predicted.grad is not None
    assert not predicted.grad.any()


# --- images and points


@pytest.mark.parametrize("crop", [1.0, 0.8])
@pytest.mark.parametrize("flip", [False, True])
def test_points_stay_on_what_they_mark(crop: float, flip: bool) -> None:
    """A dot of the loaded picture is where its loaded point is, through stretching, crop and mirror."""
    places = [(30, 40), (60, 50)]  # centre of the middle pixel: half a pixel further
    rows = [[[x + 0.5, y + 0.5, 1.0] for x, y in [*places, *[(40, 60)] * 3]]]
    table: Any = _Table([_dotted((90, 120), places)], rows)
    problem = LandmarkProblem(Schedule(1, 1, 0.1), 64, crop, flip)
    trainee = LandmarkTrainee(problem, tiny_backbone(), table, table, torch.device("cpu"))
    mirrored = set()
    for seed in range(6):
        batch = trainee.load([Draw(0, np.random.default_rng(seed))])
        light = batch["images"][0] - batch["images"].amin((0, 2, 3))[:, None, None]
        index = np.arange(64) + 0.5
        dots = []
        for channel in (0, 1):
            weight = light[channel].numpy()
            weight = weight / weight.sum()
            dots.append([(weight.sum(0) * index).sum() / 32 - 1, (weight.sum(1) * index).sum() / 32 - 1])
        is_mirrored = dots[0][0] > dots[1][0]
        mirrored.add(is_mirrored)
        found = batch["points"][0, [1, 0] if is_mirrored else [0, 1]].numpy()
        np.testing.assert_allclose(found, dots, atol=0.02)
        assert batch["points"][0, 0, 0] < batch["points"][0, 1, 0]  # the left eye is the left one
    assert mirrored == ({False, True} if flip else {False})


def test_mirrored_faces_exchange_their_mouth_corners_and_what_is_visible() -> None:
    points = [[10.0, 10, 1], [30, 10, 0], [20, 20, 1], [12, 30, 0], [28, 31, 1]]
    table: Any = _Table([np.zeros((40, 40, 3), np.uint8)], [points])
    problem = LandmarkProblem(Schedule(1, 1, 0.1), 32, flip=True)
    trainee = LandmarkTrainee(problem, tiny_backbone(), table, table, torch.device("cpu"))
    batches = [trainee.load([Draw(0, np.random.default_rng(seed))]) for seed in range(6)]
    mirrored = next(batch for batch in batches if not batch["visible"][0, 0])
    assert mirrored["visible"][0].tolist() == [False, True, True, True, False]
    expected = [[0, 0], [30, 10], [20, 20], [12, 31], [0, 0]]
    scale = np.where(mirrored["visible"][0].numpy()[:, None], np.array(expected) / 20 - 1, 0)
    np.testing.assert_allclose(mirrored["points"][0].numpy(), scale, atol=1e-6)


def test_predictions_are_in_pixels_of_the_stored_image() -> None:
    """A network that always says the centre, then the corner of the crop."""
    table: Any = _Table([np.zeros((120, 90, 3), np.uint8)] * 3, [[[1.0, 2, 1]] * 5] * 3)
    trainee = LandmarkTrainee(replace(PROBLEM, crop=0.8), tiny_backbone(), table, table, torch.device("cpu"))
    with torch.no_grad():
        for parameter in trainee.model.head.fc.parameters():
            parameter.zero_()
        trainee.model.eval()
        np.testing.assert_allclose(trainee.predict([0, 2])["points"], np.broadcast_to((45, 60), (2, 5, 2)))
        trainee.model.head.fc.bias.fill_(1)
        np.testing.assert_allclose(trainee.predict([1])["points"], np.broadcast_to((81, 108), (1, 5, 2)), rtol=1e-6)
    assert trainee.predict([])["points"].shape == (0, 5, 2)
    assert crop_box(90, 120, 0.8) == pytest.approx((9, 12, 81, 108))


def test_malformed_points_are_named() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    for rows in ([[[1, 2, 1]] * 5, [[1, 2, 1]] * 4], [[[1, 2, 1]] * 5, None], [[[1, 2, 1]] * 5, [[1, 2]] * 5]):
        with pytest.raises(DataError, match="landmarks of image1 are"):
            points_of(_Table([image] * 2, rows))  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="landmarks of image1 are not finite"):
        points_of(_Table([image] * 2, [[[1, 2, 1]] * 5, [[float("nan"), 2, 1]] * 5]))  # pyright: ignore[reportArgumentType]


# --- runs


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Half of the points are hidden, so the workers have different numbers of them; BatchNorm included."""
    run = replace(RUN, seed=1)  # with seed 0 an activation is so near a ReLU's kink that rounding decides its gradient
    one, two = run_once(run), run_in_two_processes(run, tmp_path)
    check_gradients(one, two)
    np.testing.assert_allclose(two.losses, one.losses, rtol=2e-3)
    np.testing.assert_allclose(two.last["points"], one.last["points"], atol=2e-2)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    run = replace(RUN, problem=replace(PROBLEM, schedule=Schedule(6, 8, 0.02), flip=True))
    one, again = run_once(run), resumed(run, tmp_path, stop_at=3)
    np.testing.assert_array_equal(again.losses, one.losses)
    np.testing.assert_array_equal(again.last["points"], one.last["points"])


def test_it_learns() -> None:
    result = run_once(replace(RUN, problem=replace(PROBLEM, schedule=Schedule(50, 8, 0.01, decay="cosine"))))
    assert result.losses[-5:, 1].mean() < 0.25 * result.losses[0, 1]
    assert result.last["points"].shape == (12, 5, 2)
    assert 0 < result.last["points"].mean() < 32


# --- schedule


def test_epochs_become_iterations_of_the_images_that_are_trained_on() -> None:
    config = LandmarksConfig(recipe="mafl")
    schedule = landmarks.problem(config, 19_000).schedule
    assert (schedule.iterations, schedule.batch_size, schedule.learning_rate) == (29_688, 128, 0.02)  # 200 x 148.4375
    assert schedule.warmup_iterations == 742  # 5 epochs
    assert landmarks.problem(config, 19_000).image_size == 224
    half = landmarks.problem(replace(config, batch_size=64), 19_000).schedule
    assert (half.iterations, half.learning_rate) == (59_376, 0.01)
    assert landmarks.problem(replace(config, epochs=10), 1280).schedule.iterations == 100
    assert landmarks.problem(replace(config, iterations=7), 1280).schedule.iterations == 7
    assert landmarks.problem(replace(config, learning_rate=0.3), 9).schedule.learning_rate == 0.3
    assert landmarks.problem(LandmarksConfig(), 99_999).schedule.iterations == 200
    assert landmarks.problem(LandmarksConfig(epochs=2), 320).schedule.iterations == 20


# --- the evaluation


def _error(outputs: Any) -> Metric:
    return next(output for output in outputs if isinstance(output, Metric) and output.name == "landmarks/error")


def test_rendered_data_end_to_end() -> None:
    error, left_out, samples, picture = landmarks.evaluate(TINY, fine_tuning_context())
    assert isinstance(error, Metric)
    assert isinstance(samples, Samples)
    assert isinstance(picture, Artifact)
    assert left_out == Metric("landmarks/left_out", 0.0)
    assert (error.name, samples.name, samples.values.shape, error.n) == (
        "landmarks/error",
        "landmarks/error",
        (12,),
        12,
    )
    assert error.value == pytest.approx(samples.values.mean())
    assert error.ci95 == pytest.approx(1.96 * samples.values.std(ddof=1) / math.sqrt(12))
    assert picture.name == "landmarks/points.png"
    assert Image.open(io.BytesIO(picture.data)).format == "PNG"


def test_the_interval_is_over_seeds_where_there_are_several() -> None:
    single = [_error(landmarks.evaluate(TINY, fine_tuning_context(seed=seed))).value for seed in (3, 4)]
    outputs = list(landmarks.evaluate(replace(TINY, seeds=2, num_pictures=0), fine_tuning_context(seed=3)))
    metric = _error(outputs)
    assert metric.value == pytest.approx(np.mean(single))
    assert metric.ci95 == pytest.approx(student.ppf(0.975, 1) * np.std(single, ddof=1) / math.sqrt(2))
    assert (metric.n, len(outputs)) == (2, 3)


def test_faces_end_to_end(tmp_path: Path) -> None:
    truth = write_celeba_mafl(tmp_path / "data")
    data = prepare(DataConfig(data=(f"mafl:{tmp_path / 'data'}",), cache=str(tmp_path / "cache")), log=lambda _: None)
    config = replace(TINY, recipe="mafl", flip=True, crop=0.9)
    landmarks.check_data(config, "test", data)
    outputs = list(landmarks.evaluate(config, fine_tuning_context(data=data)))
    samples = next(output for output in outputs if isinstance(output, Samples))
    assert samples.values.shape == (6,)  # MAFL's test images
    assert _error(outputs).value == pytest.approx(samples.values.mean())
    assert len(truth) == 36
    with pytest.raises(DataError, match=r"needs the target 'box' in split 'train'.*recipe mafl"):
        landmarks.check_data(TINY, "test", data)


def _truth(rows: list[Any], normalizer: Any, boxes: list[Any] | None = None) -> Any:
    table: Any = _Table([np.zeros((8, 8, 3), np.uint8)] * len(rows), rows, boxes)
    return landmarks._truth(table, normalizer)


def test_normalisers() -> None:
    rows = [[[0.0, 0, 1], [3, 4, 1], [9, 9, 1]], [[1.0, 1, 1], [1, 9, 1], [0, 0, 0]]]
    assert _truth(rows, "eyes").lengths.tolist() == [5, 8]
    assert _truth(rows, "box", [[1, 2, 4, 6], [0, 0, 5, 12]]).lengths.tolist() == [5, 13]


def test_faces_without_a_distance_of_the_eyes_are_named() -> None:
    good = [[0.0, 0, 1], [3, 4, 1], [9, 9, 1]]
    same, hidden = [[3.0, 4, 1], *good[1:]], [good[0], [3.0, 4, 0], good[2]]
    with pytest.raises(DataError, match=r"2 images have no distance of the eyes .*image1, image2\."):
        _truth([good, same, hidden], "eyes")


def test_objects_out_of_sight_are_left_out() -> None:
    seen, unseen = [[1.0, 1, 1], [2, 2, 0]], [[1.0, 1, 0], [2, 2, 0]]
    truth = _truth([seen, seen, unseen, seen], "box", [[0, 0, 3, 4], [0, 0, 0, 0], [0, 0, 3, 4], [0, 0, 6, 8]])
    assert truth.rows.tolist() == [0, 3]
    assert truth.lengths.tolist() == [5, 10]
    with pytest.raises(DataError, match="no scored image"):
        _truth([unseen], "box", [[0, 0, 3, 4]])


COUNTS = {"train": (5, 5), "val": (2, 2), "test": (2, 2)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LandmarksConfig(recipe="voc"), "recipe='voc'; allowed: rendered, mafl"),  # pyright: ignore[reportArgumentType]
        (LandmarksConfig(normalizer="nose"), "normalizer='nose'; allowed: recipe, eyes, box"),  # pyright: ignore[reportArgumentType]
        (LandmarksConfig(crop=0), "crop=0; allowed"),
        (LandmarksConfig(crop=1.5), "crop=1.5; allowed"),
        (LandmarksConfig(seeds=0), "seeds=0, .*allowed"),
        (LandmarksConfig(iterations=-1), "iterations=-1, .*allowed"),
        (LandmarksConfig(epochs=3, iterations=4), "give one of them"),
        (LandmarksConfig(freezing=Freezing(-1)), "stages=-1.*at least 0"),
        (LandmarksConfig(flip=True), "flip for data without left and right"),
    ],
)
def test_impossible_options(config: LandmarksConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landmarks.check(config, "test", COUNTS)


def test_missing_splits() -> None:
    landmarks.check(LandmarksConfig(), "test", COUNTS)
    landmarks.check(LandmarksConfig(), "val", {"train": (5,), "val": (3,)})
    with pytest.raises(ValueError, match="needs images in split 'test'; the data has: train, val"):
        landmarks.check(LandmarksConfig(), "test", {"train": (5,), "val": (3,)})


def test_the_protocol_says_what_errors_are_divided_by() -> None:
    rendered, faces = (landmarks.protocol(LandmarksConfig(recipe=r), "test") for r in ("rendered", "mafl"))  # pyright: ignore[reportArgumentType]
    assert rendered["normalizer"] == "diagonal of the object's box"
    assert "eyes" in faces["normalizer"]
    assert (rendered["split"], rendered["train"]) == ("test", ["train", "val"])
    schedule = faces["schedule"]
    assert (schedule["iterations"], schedule["warmup_iterations"], schedule["batch_size"]) == (200, 5, 128)
    assert schedule["counted_in"] == "passes over the training images"
    assert landmarks.protocol(LandmarksConfig(recipe="mafl", batch_size=32), "val")["schedule"]["iterations"] == 200
    assert (rendered["schedule"]["iterations"], rendered["schedule"]["counted_in"]) == (200, "iterations")
    assert "inferred" in faces["source"]
    assert faces["augmentation"] == "none"


def test_data_without_landmarks() -> None:
    landmarks.check_data(LandmarksConfig(), "test", rendered_data())
