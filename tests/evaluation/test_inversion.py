"""Feature inversion as a task: planted truth, the same numbers again, other executors, and models beside each other."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import Tensor
from torchvision.models import squeezenet1_1

from evaluation import Artifact, EvaluationContext, Features, Metric, ModelResult, Samples, inversion
from evaluation.deep_image_prior import Inversion
from evaluation.inversion import InversionConfig, choose_rows, invert_in_groups
from evaluation.perceptual_distance import find_lpips_linear, load_lpips, psnr, ssim
from tests.evaluation.test_deep_image_prior import TinyBackbone, discs

QUICK = InversionConfig(num_images=3, iterations=4)
NUM_IMAGES, NUM_CLASSES = 12, 4
PICTURES = discs(NUM_IMAGES, 16)

pytestmark = pytest.mark.filterwarnings("ignore:inversion. the LPIPS distance is left out")


def features_of_val(split: str) -> Features:
    assert split == "val"
    labels = np.arange(NUM_IMAGES) % NUM_CLASSES
    pooled = np.random.default_rng(0).normal(size=(NUM_IMAGES, 8)).astype(np.float32)
    return Features(pooled, labels, tuple(f"class {c}" for c in range(NUM_CLASSES)))


def read_pictures(split: str, rows: Sequence[int], image_size: int = 0) -> np.ndarray:
    assert split == "val"
    return discs(NUM_IMAGES, image_size or 16)[list(rows)]


def context_of(**changes: Any) -> EvaluationContext:
    given = {"backbone": TinyBackbone().eval(), "images": read_pictures, "seed": 3, **changes}
    return EvaluationContext(features_of_val, "val", **given)


def run(config: InversionConfig = QUICK, **changes: Any) -> tuple[dict[str, Metric], dict[str, Any], dict[str, bytes]]:
    """Metrics, samples and files by name."""
    outputs = list(inversion.evaluate(config, context_of(**changes)))
    names = [output.name for output in outputs if not isinstance(output, Samples)]
    assert len(set(names)) == len(names)
    metrics = {output.name: output for output in outputs if isinstance(output, Metric)}
    samples = {output.name: output.values for output in outputs if isinstance(output, Samples)}
    return metrics, samples, {output.name: output.data for output in outputs if isinstance(output, Artifact)}


def model(name: str, config: InversionConfig = QUICK, **changes: Any) -> ModelResult:
    metrics, samples, _ = run(config, **changes)
    return ModelResult(name, name, NUM_CLASSES, metrics, samples)


@pytest.fixture(scope="module")
def two_models() -> list[ModelResult]:
    """A run that was given no time, and one that had some."""
    with pytest.warns(RuntimeWarning, match="LPIPS distance is left out"):
        return [
            model("short", dataclasses.replace(QUICK, iterations=1, image_size=24)),
            model("Long run/2", dataclasses.replace(QUICK, iterations=30, image_size=24, learning_rate=0.01)),
        ]


def test_outputs_belong_together() -> None:
    metrics, samples, files = run()
    assert set(inversion.metric_names(QUICK)) <= set(metrics)
    assert set(files) == {"inversion/grid.png", "inversion/loss.png"}
    for name, metric in metrics.items():
        assert metric.value == pytest.approx(samples[name].mean())
        assert metric.ci95 == pytest.approx(1.96 * samples[name].std(ddof=1) / 3**0.5)
        assert metric.n == len(samples[name]) == 3
    rows = samples["inversion/rows"].tolist()
    originals, pictures = samples["inversion/images"], samples["inversion/reconstructions"]
    np.testing.assert_array_equal(originals, PICTURES[rows])
    assert pictures.dtype == np.uint8
    assert pictures.shape == originals.shape
    assert samples["inversion/class_names"].tolist() == [f"class {row % NUM_CLASSES}" for row in rows]
    np.testing.assert_allclose(samples["inversion/psnr"], psnr(originals, pictures))
    np.testing.assert_allclose(samples["inversion/ssim"], ssim(originals, pictures))
    assert samples["inversion/losses"].shape == (3, QUICK.iterations + 1)
    np.testing.assert_allclose(samples["inversion/losses"][:, -1], samples["inversion/feature_mse"])
    variance = samples["inversion/feature_mse"] / samples["inversion/relative_feature_mse"]
    backbone = TinyBackbone().eval()
    for original, expected in zip(originals, variance, strict=True):
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        with torch.no_grad():
            target = backbone.forward_features((torch.from_numpy(original)[None] / 255 - mean) / std)
        assert target.numpy().var() == pytest.approx(expected, rel=1e-4)


def test_more_iterations_come_closer(two_models: list[ModelResult]) -> None:
    short, long = (m.samples for m in two_models)
    assert (long["inversion/feature_mse"] < 0.3 * short["inversion/feature_mse"]).all()
    assert (long["inversion/psnr"] > short["inversion/psnr"] + 1).all()


def test_same_seed_same_numbers_other_seed_other_images() -> None:
    (first, samples, files), (again, samples_again, files_again), (_, others, _) = run(), run(), run(seed=4)
    assert first == again
    assert files == files_again
    for name, values in samples.items():
        np.testing.assert_array_equal(values, samples_again[name])
    assert samples["inversion/rows"].tolist() != others["inversion/rows"].tolist()


def test_rows_take_the_classes_in_turn() -> None:
    labels = np.array([0] * 6 + [1] * 2 + [2] * 4)
    rows = choose_rows(labels, 12, seed=1)
    assert sorted(rows) == list(range(12))
    assert sorted(labels[rows[:3]]) == sorted(labels[rows[3:6]]) == [0, 1, 2]
    assert sorted(labels[rows[6:8]]) == sorted(labels[rows[8:10]]) == [0, 2]
    assert rows[:5] == choose_rows(labels, 5, seed=1), "fewer images are a prefix"
    assert rows != choose_rows(labels, 12, seed=2)
    assert len({choose_rows(labels, 1, seed)[0] for seed in range(20)}) > 3


def test_groups_are_the_same_images_in_order() -> None:
    """Groups change rounding only, which five steps in float64 keep invisible."""
    config = dataclasses.replace(QUICK, images_at_once=2)
    backbone, images = TinyBackbone().double(), PICTURES[:3]
    grouped = dict(invert_in_groups(backbone, images, [5, 6, 7], config, seed=1))
    single = dict(invert_in_groups(backbone, images, [5, 6, 7], QUICK, seed=1))
    assert list(grouped) == list(single) == [0, 1, 2]
    for i, result in single.items():
        np.testing.assert_array_equal(result.reconstruction, grouped[i].reconstruction)


def test_executor_takes_the_place_of_this_process() -> None:
    asked: list[tuple[list[int], int]] = []

    def elsewhere(
        images: np.ndarray, rows: Sequence[int], config: InversionConfig, seed: int
    ) -> Iterator[tuple[int, Inversion]]:
        asked.append((list(rows), seed))
        yield from reversed(list(invert_in_groups(TinyBackbone().eval(), images, rows, config, seed)))

    here, there = run(), run(backbone=None, info={"inversion_executor": elsewhere})
    assert asked == [(here[1]["inversion/rows"].tolist(), 3)]
    assert here[0] == there[0]
    np.testing.assert_array_equal(here[1]["inversion/reconstructions"], there[1]["inversion/reconstructions"])


def test_progress_is_said_by_tenths(caplog: pytest.LogCaptureFixture) -> None:
    lines: list[str] = []
    config = InversionConfig(num_images=1, iterations=20, image_size=11)
    run(config, info={"on_progress": lines.append})
    assert len(lines) == 11
    assert lines[3].startswith("inversion: image 1 of 1, iteration 6 of 20, feature loss ")
    with caplog.at_level(logging.INFO, "evaluation.inversion"):
        run(InversionConfig(num_images=2, iterations=1))
    assert any("image 2 of 2, iteration 1 of 1," in message for message in caplog.messages)


def test_interrupt_keeps_what_is_finished() -> None:
    def stopped(images: np.ndarray, rows: Sequence[int], config: InversionConfig, seed: int) -> Iterator[Any]:
        yield 1, Inversion(images[1], 0.1, 1.0, np.arange(2), np.ones(2, np.float32))
        raise KeyboardInterrupt

    outputs = inversion.evaluate(QUICK, context_of(info={"inversion_executor": stopped}))
    first = next(outputs)
    assert isinstance(first, Artifact)
    assert first.name == "inversion/partial.png"
    with pytest.raises(KeyboardInterrupt):
        next(outputs)


def test_lpips_with_weights(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(squeezenet1_1(weights=None).state_dict(), tmp_path / "trunk.pth")
    config = InversionConfig(num_images=2, iterations=1, image_size=17, lpips_trunk=str(tmp_path / "trunk.pth"))
    inversion.check(config, "val", {"val": (3, 3, 3, 3)})
    metrics, samples, _ = run(config)
    assert inversion.metric_names(config)[0] == "inversion/lpips"
    expected = load_lpips(tmp_path / "trunk.pth", find_lpips_linear()).distances(
        samples["inversion/images"], samples["inversion/reconstructions"]
    )
    np.testing.assert_allclose(samples["inversion/lpips"], expected)
    assert metrics["inversion/lpips"].value > 0.01
    with pytest.raises(ValueError, match="images of 16 px; its distances need at least 17 px"):
        run(dataclasses.replace(config, image_size=0))


def test_without_weights_the_message_says_how_to_get_them() -> None:
    with pytest.warns(RuntimeWarning, match=r"lpips_trunk .*squeezenet1_1-b8a52dc0\.pth.* lpips_linear .*squeeze\.pth"):
        metrics, _, _ = run()
    assert "inversion/lpips" not in metrics
    assert "inversion/lpips" not in inversion.metric_names(QUICK)


def test_one_image_has_no_interval_and_few_images_are_all_taken() -> None:
    metrics, _, _ = run(dataclasses.replace(QUICK, num_images=1))
    assert all(metric.ci95 is None and metric.n == 1 for metric in metrics.values())
    with pytest.warns(RuntimeWarning, match="num_images=99 exceeds the 12 images"):
        metrics, _, _ = run(InversionConfig(num_images=99, iterations=1))
    assert metrics["inversion/psnr"].n == NUM_IMAGES


class Collapsed(TinyBackbone):
    def forward_features(self, x: Tensor) -> Tensor:
        return 0 * super().forward_features(x)


def test_collapsed_backbone_is_said() -> None:
    with pytest.warns(RuntimeWarning, match="3 of 3 images is constant"):
        metrics, _, files = run(backbone=Collapsed().eval())
    assert "inversion/relative_feature_mse" not in metrics
    assert metrics["inversion/feature_mse"].value == 0
    assert set(files) == {"inversion/grid.png", "inversion/loss.png"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 0}, "num_images=0"),
        ({"iterations": 0}, "iterations=0"),
        ({"images_at_once": 0}, "images_at_once=0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"image_size": 10}, "at least 11 px"),
        ({"lpips_linear": "squeeze.pth"}, "without lpips_trunk"),
        ({"lpips_trunk": "missing.pth"}, r"lpips_trunk=missing\.pth is not a file"),
    ],
)
def test_wrong_options_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inversion.check(dataclasses.replace(QUICK, **changes), "val", {"val": (3, 3)})


def test_wrong_data_and_contexts_are_refused() -> None:
    with pytest.raises(ValueError, match="needs images in split 'test'; the data has: val"):
        inversion.check(QUICK, "test", {"val": (3,), "test": ()})
    with pytest.raises(ValueError, match="features only"):
        run(images=None)
    with pytest.raises(ValueError, match="needs the backbone"):
        run(backbone=None)
    with pytest.raises(ValueError, match="images of 8 px"):
        run(images=lambda split, rows, image_size: discs(len(rows), 8))


def test_protocol_is_json() -> None:
    stored = json.loads(json.dumps(inversion.protocol(QUICK, "test")))
    assert {"name", "source", "phase", "split", "features", "metric", "interval", "config"} <= set(stored)
    assert stored["split"] == "test"
    assert stored["config"] == dataclasses.asdict(QUICK)
    assert "4 steps" in stored["optimisation"]


def test_two_models_side_by_side(two_models: list[ModelResult]) -> None:
    outputs = list(inversion.compare(QUICK, two_models))
    files = {output.name: output.data for output in outputs if isinstance(output, Artifact)}
    metrics = {output.name: output for output in outputs if isinstance(output, Metric)}
    assert set(files) == {"inversion/models.png", "inversion/scatter.png", "inversion/paired.csv"}
    short, long = (m.samples for m in two_models)
    difference = metrics["inversion/psnr/short_minus_long_run_2"]
    assert difference.value == pytest.approx((short["inversion/psnr"] - long["inversion/psnr"]).mean())
    assert difference.ci95 is not None
    assert difference.value + difference.ci95 < 0
    assert 0 < metrics["inversion/psnr/short_minus_long_run_2/p_value"].value <= 1
    closer = metrics["inversion/closer/short_than_long_run_2"]
    assert closer.value == pytest.approx(100 * (short["inversion/ssim"] > long["inversion/ssim"]).mean())
    table = list(csv.DictReader(io.StringIO(files["inversion/paired.csv"].decode())))
    assert [row["quantity"] for row in table] == ["psnr", "ssim", "relative_feature_mse"]
    assert float(table[0]["a_minus_b"]) == pytest.approx(difference.value, rel=1e-4)
    assert (table[0]["a"], table[0]["b"], table[0]["images"]) == ("short", "Long run/2", "3")
    assert "feature_mse" not in {name.split("/")[1] for name in metrics}, "in units of each backbone"


def test_many_models_are_compared_with_the_first(
    two_models: list[ModelResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    for slow in ("picture_grid", "scatter_figure"):
        monkeypatch.setattr(f"evaluation.inversion_comparison.{slow}", lambda *_: b"")

    def pairs(count: int) -> list[str]:
        models = [dataclasses.replace(two_models[i % 2], name=f"m{i}") for i in range(count)]
        found = [output.name for output in inversion.compare(QUICK, models)]
        return [name.removeprefix("inversion/closer/") for name in found if "/closer/" in name]

    assert pairs(1) == []
    assert pairs(3) == ["m0_than_m1", "m0_than_m2", "m1_than_m2"]
    assert pairs(4) == ["m0_than_m1", "m0_than_m2", "m0_than_m3"]


def test_models_with_other_images_are_left_out(two_models: list[ModelResult]) -> None:
    other = dataclasses.replace(
        two_models[1], samples={**two_models[1].samples, "inversion/images": np.zeros((3, 3, 8, 8), np.uint8)}
    )
    with pytest.warns(RuntimeWarning, match="Long run/2 inverted other images than short"):
        assert list(inversion.compare(QUICK, [two_models[0], other])) == []
    assert list(inversion.compare(QUICK, [dataclasses.replace(m, samples={}) for m in two_models])) == []


def test_distance_decides_the_side_of_the_diagonal() -> None:
    """LPIPS where both have it; of three images a is closer in one, b in one, and one is a tie."""
    images = np.zeros((3, 3, 12, 12), np.uint8)
    shared = {
        "inversion/images": images,
        "inversion/reconstructions": images,
        "inversion/class_names": np.array(["x", "y", "z"]),
        "inversion/ssim": np.array([0.9, 0.9, 0.9]),
    }
    a, b = (
        ModelResult(name, name, 3, {}, {**shared, "inversion/lpips": np.array(distances)})
        for name, distances in (("a", [0.1, 0.5, 0.4]), ("b", [0.2, 0.3, 0.4]))
    )
    metrics = {output.name: output for output in inversion.compare(QUICK, [a, b]) if isinstance(output, Metric)}
    assert metrics["inversion/closer/a_than_b"].value == pytest.approx(50)
    assert metrics["inversion/lpips/a_minus_b"].value == pytest.approx(1 / 30)


def test_files_are_pictures(two_models: list[ModelResult]) -> None:
    """The grid shows the originals' own pixels: a strip of the first image's ground has its colour."""
    _, _, files = run()
    files |= {o.name: o.data for o in inversion.compare(QUICK, two_models) if isinstance(o, Artifact)}
    for name, data in files.items():
        if name.endswith(".png"):
            pixels = imread(io.BytesIO(data))[..., :3]
            assert min(pixels.shape[:2]) > 250, name
            assert pixels.std() > 0.05, name
    grid = (imread(io.BytesIO(files["inversion/grid.png"]))[..., :3] * 255).round()
    assert (np.abs(grid - 40).max(axis=2) <= 1).mean() > 0.02, "the dark ground of the discs"
