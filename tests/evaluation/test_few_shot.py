"""Few-shot protocol A: against scikit-learn per task, planted truth, and clear refusals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from evaluation import EvaluationContext, Metric, Samples, few_shot
from evaluation.episodes import sample_episodes
from evaluation.few_shot import FewShotConfig, task_accuracies
from evaluation.intervals import INTERVALS, IntervalName
from evaluation.metric import l2_normalize
from tests.evaluation.synthetic import clusters, context_of, with_labels

COUNTS = {"val_classes": (30,) * 6, "novel_classes": (30,) * 8, "val": (25,) * 5, "test": (25,) * 5}


def sklearn_accuracies(x: np.ndarray, episodes, c: float) -> np.ndarray:
    """Optimal accuracy per task, one classifier at a time."""
    accuracies = []
    for support, query in zip(episodes.support, episodes.query, strict=True):
        ways = np.arange(len(support))
        model = LogisticRegression(C=c, tol=1e-10, max_iter=10_000)
        model.fit(x[support.reshape(-1)], np.repeat(ways, support.shape[1]))
        predicted = model.predict(x[query.reshape(-1)])
        accuracies.append(np.mean(predicted == np.repeat(ways, query.shape[1])))
    return np.array(accuracies)


@pytest.mark.parametrize(("ways", "shots", "c"), [(5, 1, 1.0), (5, 5, 1.0), (2, 3, 1.0), (2, 3, 20.0), (8, 2, 0.1)])
def test_accuracies_equal_scikit_learn_task_by_task(ways: int, shots: int, c: float) -> None:
    """The optimum decides every query alike; 36 tasks of at least 30 queries leave no room for 0.01 points."""
    features = clusters(8, 40, 64, spread=3.0, seed=ways + shots)
    x = l2_normalize(features.features, "val_classes")
    options = {"num_ways": ways, "num_shots": shots, "num_queries": 15, "num_classes": 8}
    episodes = sample_episodes(features.labels, num_tasks=36, seed=0, **options)
    ours = task_accuracies(torch.from_numpy(x), episodes, c)
    expected = sklearn_accuracies(x.astype(np.float64), episodes, c)
    assert 1 / ways + 0.05 < expected.mean() < 0.97
    np.testing.assert_allclose(ours, expected, atol=1e-12)


def test_two_way_intercept_matches_scikit_learns_binary_objective() -> None:
    """With unequal class spreads the penalty's strength moves decisions; a wrong factor of 2 would show."""
    features = clusters(4, 60, 3, spread=1.0, seed=5)
    x = l2_normalize(features.features, "val")
    episodes = sample_episodes(
        features.labels, num_tasks=60, num_ways=2, num_shots=2, num_queries=40, num_classes=4, seed=0
    )
    x64 = x.astype(np.float64)
    ours = task_accuracies(torch.from_numpy(x64), episodes, 5.0)
    np.testing.assert_allclose(ours, sklearn_accuracies(x64, episodes, 5.0), atol=1e-12)


def metrics_of(config: FewShotConfig, context: EvaluationContext) -> list[Metric]:
    return [output for output in few_shot.evaluate(config, context) if isinstance(output, Metric)]


@pytest.mark.parametrize("interval", INTERVALS)
def test_metrics_carry_mean_interval_and_task_count_and_samples_every_task(interval: IntervalName) -> None:
    features = clusters(6, 30, 32, spread=2.5, seed=1)
    config = FewShotConfig(num_tasks=40, interval=interval)
    outputs = list(few_shot.evaluate(config, context_of({"val_classes": features}, "val", seed=3)))
    metrics, samples = outputs[::2], outputs[1::2]
    assert [m.name for m in metrics] == ["few_shot/5way_1shot_acc", "few_shot/5way_5shot_acc"]
    assert tuple(m.name for m in metrics) == tuple(s.name for s in samples) == few_shot.metric_names(config)
    x = torch.from_numpy(l2_normalize(features.features, "val_classes"))
    for metric, sample, shots in zip(metrics, samples, (1, 5), strict=True):
        assert isinstance(metric, Metric)
        assert isinstance(sample, Samples)
        options = {"num_ways": 5, "num_shots": shots, "num_queries": 15, "num_classes": 6, "seed": 3}
        values = 100 * task_accuracies(x, sample_episodes(features.labels, num_tasks=40, **options))
        np.testing.assert_array_equal(sample.values, values)
        assert metric.value == pytest.approx(values.mean())
        assert metric.ci95 == pytest.approx(INTERVALS[interval].half_width(values))
        assert metric.n == 40
    protocol = few_shot.protocol(config, "val")
    assert protocol["interval"].startswith(f"{interval}: mean +- {INTERVALS[interval].formula}")


def test_gathering_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features = clusters(6, 30, 16, spread=1.0, seed=2)
    config, context = FewShotConfig(num_tasks=10), context_of({"val_classes": features}, "val")
    whole = metrics_of(config, context)
    monkeypatch.setattr(few_shot, "GATHER_FLOATS", 16 * 100 * 3)
    assert metrics_of(config, context) == whole


def test_separable_classes_reach_100_and_random_labels_chance() -> None:
    separable = clusters(6, 40, 64, spread=0.01, seed=0)
    config = FewShotConfig(num_tasks=100)
    for metric in metrics_of(config, context_of({"val_classes": separable}, "val")):
        assert (metric.value, metric.ci95) == (100.0, 0.0)
    noise = clusters(6, 40, 64, spread=1.0, seed=0)
    shuffled = with_labels(noise, np.random.default_rng(1).permutation(noise.labels))
    for metric in metrics_of(config, context_of({"val_classes": shuffled}, "val")):
        assert metric.value == pytest.approx(20, abs=2.5)


def test_collapsed_features_are_exactly_at_chance() -> None:
    """Every query ties, so every query gets the first way."""
    collapsed = clusters(6, 30, 8, spread=0.0, seed=0)
    collapsed.features[:] = 1.5
    with pytest.warns(RuntimeWarning, match="collapsed"):
        metrics = metrics_of(FewShotConfig(num_tasks=20), context_of({"val_classes": collapsed}, "val"))
    assert [m.value for m in metrics] == [20.0, 20.0]


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_feature_scale_does_not_matter(scale: float) -> None:
    config = FewShotConfig(num_tasks=20)
    values = []
    for factor in (1.0, scale):
        features = clusters(6, 30, 16, spread=1.5, seed=2, scale=factor)
        values.append([m.value for m in metrics_of(config, context_of({"val_classes": features}, "val"))])
    np.testing.assert_allclose(values[1], values[0], atol=0.1)


def test_phase_and_option_choose_the_split() -> None:
    base = FewShotConfig(split="base_classes")
    assert few_shot.splits(FewShotConfig(), "val") == ("val_classes",)
    assert few_shot.splits(FewShotConfig(), "test") == ("novel_classes",)
    assert few_shot.splits(base, "val") == ("val",)
    assert few_shot.splits(base, "test") == ("test",)
    assert few_shot.protocol(base, "test")["split"] == "test"
    for config in (FewShotConfig(), base):
        few_shot.check(config, "val", COUNTS)
        few_shot.check(config, "test", COUNTS)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (
            {"train": (40,) * 5, "val": (40,) * 5},
            r"'val_classes', which the data does not have .* split='base_classes'",
        ),
        ({"val_classes": (40,) * 3}, r"at least 5 classes in split 'val_classes' .* it has 3"),
        ({"val_classes": (40, 19, 40, 40, 20, 3)}, r"needs 20 images per class .* 1 \(19\), 5 \(3\)\. Lower"),
    ],
)
def test_impossible_data_is_refused_before_and_during(counts: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        few_shot.check(FewShotConfig(), "val", counts)


def test_evaluate_checks_the_features_it_gets() -> None:
    small = clusters(6, 19, 8, spread=1.0, seed=0)
    with pytest.raises(ValueError, match="needs 20 images per class"):
        list(few_shot.evaluate(FewShotConfig(num_tasks=5), context_of({"val_classes": small}, "val")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_ways": 1}, "num_ways=1"),
        ({"num_queries": 0}, "num_queries=0"),
        ({"num_tasks": 1}, "num_tasks=1"),
        ({"shots": ()}, "shots are"),
        ({"shots": (1, 1)}, "shots are"),
        ({"shots": (0,)}, "shots are"),
        ({"c": 0.0}, "c is 0.0"),
        ({"c": float("inf")}, "c is inf"),
        ({"split": "novel_classes"}, "allowed: unseen_classes, base_classes"),
        ({"interval": "normal"}, "interval is 'normal'; allowed: camtrast: 1.96 s"),
    ],
)
def test_wrong_options_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        few_shot.check(dataclasses.replace(FewShotConfig(), **changes), "val", COUNTS)
