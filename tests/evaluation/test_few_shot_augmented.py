"""Few-shot protocol A': RFS's classifier per task by scikit-learn, what is read, and clear refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from evaluation import EvaluationContext, Features, Metric, ModelResult, Phase, Samples, few_shot, few_shot_augmented
from evaluation.episodes import draw_episodes
from evaluation.few_shot import FewShotConfig
from evaluation.few_shot_augmented import FewShotRfsConfig
from evaluation.intervals import INTERVALS
from evaluation.metric import FeatureBatch
from tests.evaluation.synthetic import clusters

COUNTS = {"val_classes": (30,) * 6, "novel_classes": (30,) * 8, "val": (25,) * 5, "test": (25,) * 5}
CONFIG = FewShotRfsConfig(num_tasks=20)
SPLITS = {
    "val_classes": clusters(6, 30, 24, spread=2.0, seed=1),
    "novel_classes": clusters(7, 25, 24, spread=2.0, seed=2, centre_seed=5),
}


def copy_of(features: Features, epoch: int, strength: float = 0.7) -> np.ndarray:
    """The features of an augmented pass: the plain ones, moved."""
    noise = np.random.default_rng(100 + epoch).normal(size=features.features.shape)
    return (features.features + strength * noise).astype(np.float32)


class Passes:
    """Stands for the context's ``view_features`` and remembers what was asked for."""

    def __init__(self, change: Callable[[list[FeatureBatch]], list[FeatureBatch]] = list, strength: float = 0.7):
        self.change, self.strength = change, strength
        self.asked: list[tuple[str, str, int, bool]] = []

    def __call__(
        self, split: str, recipe: str, *, epoch: int = 0, shuffle: bool = False, batch_size: int = 256
    ) -> Iterator[FeatureBatch]:
        self.asked.append((split, recipe, epoch, shuffle))
        features = SPLITS[split]
        x, index = copy_of(features, epoch, self.strength), 3 * np.arange(len(features.labels))  # an index with gaps
        size = min(batch_size, 64)
        batches = [
            FeatureBatch(x[start : start + size], features.labels[start : start + size], index[start : start + size])
            for start in range(0, len(x), size)
        ]
        yield from self.change(batches)


def context_of(phase: Phase = "val", passes: Passes | None = None, seed: int = 0) -> EvaluationContext:
    return EvaluationContext(SPLITS.__getitem__, phase, seed, view_features=passes or Passes())


def metrics_of(config: FewShotRfsConfig, context: EvaluationContext) -> list[Metric]:
    return [output for output in few_shot_augmented.evaluate(config, context) if isinstance(output, Metric)]


def rfs_accuracies(features: Features, config: FewShotRfsConfig, num_shots: int, seed: int) -> np.ndarray:
    """Task by task as RFS does: each class's images tiled, augmented, unit length, scikit-learn."""

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)

    plain = unit(features.features)
    copies = [unit(copy_of(features, epoch)) for epoch in range(config.copies)]
    episodes = draw_episodes(config, num_shots, features, seed)
    ways = np.arange(config.num_ways)
    accuracies = []
    for support, query in zip(episodes.support, episodes.query, strict=True):
        model = LogisticRegression(C=config.c, tol=1e-10, max_iter=10_000)
        x = np.concatenate([x[support.reshape(-1)] for x in copies])
        model.fit(x, np.tile(np.repeat(ways, num_shots), config.copies))
        predicted = model.predict(plain[query.reshape(-1)])
        accuracies.append(100 * np.mean(predicted == np.repeat(ways, query.shape[1])))
    return np.array(accuracies)


@pytest.mark.parametrize("changes", [{}, {"num_ways": 2, "shots": (3,), "copies": 2, "c": 10.0}])
def test_accuracies_equal_rfs_task_by_task(changes: dict) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    outputs = list(few_shot_augmented.evaluate(config, context_of("test", seed=4)))
    assert tuple(output.name for output in outputs[::2]) == few_shot_augmented.metric_names(config)
    for metric, samples, num_shots in zip(outputs[::2], outputs[1::2], config.shots, strict=True):
        expected = rfs_accuracies(SPLITS["novel_classes"], config, num_shots, seed=4)
        assert isinstance(metric, Metric)
        assert isinstance(samples, Samples)
        assert 30 < expected.mean() < 97
        np.testing.assert_allclose(samples.values, expected, atol=1e-9)
        assert metric.value == pytest.approx(expected.mean())
        assert metric.ci95 == pytest.approx(INTERVALS["rfs"].half_width(expected))
        assert metric.n == config.num_tasks


def test_five_passes_over_one_split_in_the_order_of_the_index() -> None:
    cases: tuple[tuple[Phase, str], ...] = (("val", "val_classes"), ("test", "novel_classes"))
    for phase, split in cases:
        passes = Passes()
        metrics_of(dataclasses.replace(CONFIG, recipe="rfs_d"), context_of(phase, passes))
        assert passes.asked == [(split, "rfs_d", epoch, False) for epoch in range(5)]
        assert few_shot_augmented.splits(CONFIG, phase) == (split,)


def test_copies_that_change_nothing_give_protocol_a_with_five_times_the_c() -> None:
    """Five equal copies weigh an image five times: the same optimum as C = 5 on the plain images."""
    copied = metrics_of(CONFIG, context_of(passes=Passes(strength=0.0)))
    plain = [
        output
        for output in few_shot.evaluate(FewShotConfig(num_tasks=20, c=5.0), context_of())
        if isinstance(output, Metric)
    ]
    assert [m.value for m in copied] == pytest.approx([m.value for m in plain], abs=0.1)


def test_tasks_without_a_backbone_are_refused() -> None:
    with pytest.raises(ValueError, match="needs the backbone itself"):
        list(few_shot_augmented.evaluate(CONFIG, EvaluationContext(SPLITS.__getitem__, "val")))


def swapped(batches: list[FeatureBatch]) -> list[FeatureBatch]:
    return [batches[1], batches[0], *batches[2:]]


def repeated_image(batches: list[FeatureBatch]) -> list[FeatureBatch]:
    index = batches[0].index.copy()
    index[5] = index[4]
    return [batches[0]._replace(index=index), *batches[1:]]


def other_labels(batches: list[FeatureBatch]) -> list[FeatureBatch]:
    return [batches[0]._replace(labels=(batches[0].labels + 1) % 6), *batches[1:]]


def with_nan(batches: list[FeatureBatch]) -> list[FeatureBatch]:
    return [batches[0]._replace(features=np.where(np.arange(24) == 3, np.nan, batches[0].features)), *batches[1:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swapped, "augmented images 0 to 63 of split 'val_classes' are not the plain ones"),
        (repeated_image, "augmented images 0 to 63 of split 'val_classes' are not the plain ones"),
        (other_labels, "are not the plain ones; the pass must deliver every image once"),
        (lambda batches: batches[:-1], "gave 128 of 180 images"),
        (with_nan, r"views of \d+ images of split 'val_classes' have NaN or infinite features"),
    ],
)
def test_a_damaged_pass_is_refused(change: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(few_shot_augmented.evaluate(CONFIG, context_of(passes=Passes(change))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_ways": 1}, "few_shot_rfs got num_ways=1"),
        ({"shots": (0,)}, "few_shot_rfs shots are"),
        ({"c": 0.0}, "few_shot_rfs got c=0.0, copies=5; allowed"),
        ({"copies": 0}, "copies=0"),
        ({"recipe": "rfs"}, "few_shot_rfs recipe is 'rfs'; known recipes: .*rfs_a, rfs_d"),
        ({"split": "all"}, "few_shot_rfs split is 'all'"),
        ({"interval": "none"}, "few_shot_rfs interval is 'none'"),
    ],
)
def test_wrong_options_are_refused(changes: dict, message: str) -> None:
    few_shot_augmented.check(CONFIG, "val", COUNTS)
    with pytest.raises(ValueError, match=message):
        few_shot_augmented.check(dataclasses.replace(CONFIG, **changes), "val", COUNTS)


def test_impossible_data_is_refused() -> None:
    with pytest.raises(ValueError, match="few_shot_rfs needs 20 images per class"):
        few_shot_augmented.check(CONFIG, "val", {"val_classes": (30, 30, 19, 30, 30)})
    with pytest.raises(ValueError, match=r"few_shot_rfs reads split 'novel_classes', .* split='base_classes'"):
        few_shot_augmented.check(CONFIG, "test", {"test": (30,) * 5})


def test_protocol_holds_the_views() -> None:
    protocol = few_shot_augmented.protocol(CONFIG, "test")
    assert [step["step"] for step in protocol["views"]["steps"]] == ["random_crop", "color_jitter", "horizontal_flip"]
    assert protocol["split"] == "novel_classes"
    assert protocol["interval"].startswith("rfs: mean +- t(0.975")


def test_models_are_compared_on_the_same_tasks() -> None:
    names = few_shot_augmented.metric_names(CONFIG)
    models = [
        ModelResult(name, "simclr", 6, {}, {metric: np.linspace(40, 60, 20) + shift for metric in names})
        for name, shift in (("a", 3.0), ("b", 0.0))
    ]
    found = {output.name: output for output in few_shot_augmented.compare(CONFIG, models)}
    metric = found["few_shot_rfs/5way_5shot_acc/a_minus_b"]
    assert isinstance(metric, Metric)
    assert metric.value == pytest.approx(3.0)
    assert "few_shot_rfs/paired.png" in found
