"""Maps of features: the silhouette against its definition, the draw of images, repeatability, side-by-side figures."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image as mpimg

from evaluation import Artifact, Features, Metric, ModelResult, Output, Phase, Samples, feature_plots
from evaluation.feature_plots import FeaturePlotsConfig, embed, stratified_rows
from tests.evaluation.synthetic import clusters, context_of, five_splits

QUICK = FeaturePlotsConfig(max_images=48, num_classes=3)


def run(config: FeaturePlotsConfig, splits: dict[str, Features], phase: Phase = "val", seed: int = 0) -> list[Output]:
    return list(feature_plots.evaluate(config, context_of(splits, phase, seed)))


def samples_of(outputs: list[Output]) -> dict[str, np.ndarray]:
    return {output.name: output.values for output in outputs if isinstance(output, Samples)}


def silhouette_of(outputs: list[Output]) -> Metric:
    (metric,) = [output for output in outputs if isinstance(output, Metric)]
    assert metric.name == "feature_plots/silhouette"
    return metric


def naive_silhouette(x: np.ndarray, labels: np.ndarray) -> float:
    """Rousseeuw's definition, image by image; 0 for a class of one image."""
    x = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    scores = []
    for i in range(len(x)):
        distances = np.linalg.norm(x - x[i], axis=1)
        own = (labels == labels[i]) & (np.arange(len(x)) != i)
        if not own.any():
            scores.append(0.0)
            continue
        a = distances[own].mean()
        b = min(distances[labels == other].mean() for other in set(labels.tolist()) - {labels[i]})
        scores.append((b - a) / max(a, b))
    return float(np.mean(scores))


def is_png(data: bytes) -> bool:
    height, width, _ = mpimg.imread(io.BytesIO(data)).shape
    return data.startswith(b"\x89PNG") and width > 400 and height > 400


@pytest.mark.parametrize("phase", ["val", "test"])
def test_silhouette_equals_its_definition(phase: Phase) -> None:
    splits = five_splits(num_classes=4, per_class=12, spread=1.0)
    unseen = splits[{"val": "val_classes", "test": "novel_classes"}[phase]]
    metric = silhouette_of(run(QUICK, splits, phase))
    assert metric.value == pytest.approx(naive_silhouette(unseen.features, unseen.labels), abs=1e-5)
    assert metric.n == 48


def test_silhouette_of_planted_classes() -> None:
    """Two directions, each class all but on one of them: 1. Labels without meaning: about 0 or below."""
    splits = five_splits(num_classes=4, per_class=12, spread=1.0)
    tight = clusters(4, 12, 16, spread=1e-3, seed=0)
    assert silhouette_of(run(QUICK, {**splits, "val_classes": tight})).value > 0.99
    mixed = dataclasses.replace(tight, labels=np.random.default_rng(0).permutation(tight.labels))
    assert silhouette_of(run(QUICK, {**splits, "val_classes": mixed})).value < 0.05


def test_map_keeps_planted_groups_apart_and_names_its_images() -> None:
    splits = five_splits(num_classes=5, per_class=12, spread=0.05)
    outputs = run(QUICK, splits)
    found = samples_of(outputs)
    positions, classes = found["feature_plots/tsne"], found["feature_plots/classes"]
    assert positions.shape == classes.shape == (48, 2)
    assert [len(np.unique(classes[classes[:, 0] == kind, 1])) for kind in (0, 1)] == [3, 3]
    assert [str(name) for name in found["feature_plots/class_names"]] == [f"class {label}" for _, label in classes]
    groups = [positions[(classes == group).all(axis=1)] for group in np.unique(classes, axis=0)]
    radius = max(np.linalg.norm(group - group.mean(axis=0), axis=1).max() for group in groups)
    centres = np.stack([group.mean(axis=0) for group in groups])
    gaps = np.linalg.norm(centres[:, None] - centres, axis=2)[~np.eye(6, dtype=bool)]
    assert radius < gaps.min() / 2
    (plot,) = [output for output in outputs if isinstance(output, Artifact)]
    assert plot.name == "feature_plots/tsne.png"
    assert is_png(plot.data)


def test_same_seed_same_map_and_other_seed_other_images() -> None:
    splits = five_splits(num_classes=5, per_class=12)
    first, again, other = (samples_of(run(QUICK, splits, seed=seed)) for seed in (3, 3, 4))
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
    assert not np.array_equal(first["feature_plots/tsne"], other["feature_plots/tsne"])


def test_rows_are_balanced_until_a_class_is_used_up() -> None:
    labels = np.array([0] * 50 + [1] * 3 + [2] * 20 + [3] * 20)
    rows = stratified_rows(labels, np.array([0, 1, 3]), 21, np.random.default_rng(0))
    assert np.bincount(labels[rows]).tolist() == [9, 3, 0, 9]
    assert len(np.unique(rows)) == 21
    assert (np.diff(rows) > 0).all()
    assert len(stratified_rows(labels, np.array([1]), 21, np.random.default_rng(0))) == 3


def models_of(seeds: tuple[int, ...], splits_of: Any) -> list[ModelResult]:
    models = []
    for number, seed in enumerate(seeds):
        outputs = run(QUICK, splits_of(number), seed=seed)
        metrics = {metric.name: metric for metric in (silhouette_of(outputs),)}
        models.append(ModelResult(f"model {number}", "moco_v2", 5, metrics, samples_of(outputs)))
    return models


def test_models_share_a_figure_when_they_show_the_same_images() -> None:
    models = models_of((0, 0, 1), lambda number: five_splits(num_classes=5, per_class=12, spread=0.2 + 0.5 * number))
    with pytest.warns(RuntimeWarning, match="model 2 show other images than model 0"):
        (figure,) = feature_plots.compare(QUICK, models)
    assert figure.name == "feature_plots/tsne_models.png"
    assert is_png(figure.data)
    with pytest.warns(RuntimeWarning, match="other images"):
        assert list(feature_plots.compare(QUICK, models[1:])) == []
    assert list(feature_plots.compare(QUICK, models[:1])) == []
    swapped = {**models[1].samples, "feature_plots/classes": 1 - models[1].samples["feature_plots/classes"]}
    with pytest.warns(RuntimeWarning, match="other images"):
        assert list(feature_plots.compare(QUICK, [models[0], dataclasses.replace(models[1], samples=swapped)])) == []
    assert list(feature_plots.compare(FeaturePlotsConfig(methods=("umap",)), models)) == []


def test_tiny_and_degenerate_sets_give_finite_maps() -> None:
    rng = np.random.default_rng(0)
    for x in (rng.normal(size=(5, 8)), rng.normal(size=(9, 1)), np.ones((9, 4)), np.zeros((9, 4))):
        positions = embed(x.astype(np.float32), "tsne", FeaturePlotsConfig(), 0)
        assert positions.shape == (len(x), 2)
        assert np.isfinite(positions).all()
        np.testing.assert_array_equal(embed(x.astype(np.float32), "tsne", FeaturePlotsConfig(), 0), positions)
    with pytest.raises(ValueError, match="at least 4"):
        embed(np.ones((3, 2), np.float32), "tsne", FeaturePlotsConfig(), 0)


def test_umap_receives_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    received: dict[str, Any] = {}

    class Recorder:
        def __init__(self, **options: Any) -> None:
            received.update(options)

        def fit_transform(self, x: np.ndarray) -> np.ndarray:
            return x[:, :2].astype(np.float64)

    monkeypatch.setattr(feature_plots, "_umap_class", lambda: Recorder)
    config = dataclasses.replace(QUICK, methods=("umap", "tsne"), num_neighbors=100, min_dist=0.3)
    outputs = run(config, five_splits(num_classes=5, per_class=12), seed=7)
    expected = {"n_neighbors": 47, "min_dist": 0.3, "random_state": 7, "n_jobs": 1, "init": "spectral"}
    assert received == expected
    names = [output.name for output in outputs if isinstance(output, Artifact)]
    assert names == ["feature_plots/umap.png", "feature_plots/tsne.png"]


def test_umap_itself_separates_groups_and_repeats(tmp_path: Path) -> None:
    """In a process of its own without compilation: compiling umap takes longer than these 16 images."""
    program = (
        "import json, numpy as np\n"
        "from evaluation.feature_plots import FeaturePlotsConfig, embed\n"
        "x = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)\n"
        "x[8:] += 9\n"
        "maps = [embed(x, 'umap', FeaturePlotsConfig(num_neighbors=5), 0) for _ in range(2)]\n"
        "print(json.dumps([m.tolist() for m in maps]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    first, second = np.array(json.loads(done.stdout.splitlines()[-1]))
    np.testing.assert_array_equal(first, second)
    left, right = first[:8], first[8:]
    spread = max(np.linalg.norm(group - group.mean(axis=0), axis=1).max() for group in (left, right))
    assert np.linalg.norm(left.mean(axis=0) - right.mean(axis=0)) > 2 * spread


def test_missing_umap_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    counts = {"val": (5, 5), "val_classes": (5, 5)}
    with pytest.raises(ValueError, match="pip install umap-learn"):
        feature_plots.check(FeaturePlotsConfig(methods=("umap",)), "val", counts)
    feature_plots.check(FeaturePlotsConfig(), "val", counts)


def test_damaged_features() -> None:
    splits = five_splits(num_classes=4, per_class=6)
    splits["val"].features[1, 0] = np.nan
    with pytest.raises(ValueError, match="split 'val' contain NaN"):
        run(QUICK, splits)
    splits = five_splits(num_classes=4, per_class=6)
    splits["val_classes"].features[:] = 0.5
    with pytest.warns(RuntimeWarning, match="collapsed"):
        outputs = run(QUICK, splits)
    assert silhouette_of(outputs).value == 0
    one = dataclasses.replace(splits["val_classes"], labels=np.array([0] * 23 + [1]))
    splits["val_classes"] = one
    with pytest.warns(RuntimeWarning, match="collapsed"):
        assert np.isfinite(silhouette_of(run(QUICK, splits)).value)


def test_wrong_options_and_data_are_refused() -> None:
    counts = {"val": (5, 5), "val_classes": (5, 5), "test": (5, 5)}
    feature_plots.check(FeaturePlotsConfig(), "val", counts)
    wrong: dict[str, dict[str, Any]] = {
        "methods are": {"methods": ("pca",)},
        "one or both": {"methods": ()},
        "max_images=2": {"max_images": 2},
        "num_classes=11": {"num_classes": 11},
        "perplexity=0": {"perplexity": 0.0},
        "num_neighbors=1": {"num_neighbors": 1},
        "min_dist=2": {"min_dist": 2.0},
    }
    for message, changes in wrong.items():
        with pytest.raises(ValueError, match=message):
            feature_plots.check(dataclasses.replace(FeaturePlotsConfig(), **changes), "val", counts)
    with pytest.raises(ValueError, match="split 'novel_classes'; the data has: val, val_classes, test"):
        feature_plots.check(FeaturePlotsConfig(), "test", counts)
    for unseen in ((9,), (1, 1, 1)):
        with pytest.raises(ValueError, match="at least 2 classes, one of them with 2 images"):
            feature_plots.check(FeaturePlotsConfig(), "val", {**counts, "val_classes": unseen})
