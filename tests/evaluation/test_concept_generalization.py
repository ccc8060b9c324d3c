"""Concept generalization: Optuna's own loop, planted classes, and what the data must have."""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import optuna
import pytest
from sklearn.linear_model import LogisticRegression

from evaluation import Artifact, Features, Metric, ModelResult, Phase, Samples
from evaluation import concept_generalization as cog
from evaluation.concept_generalization import ConceptGeneralizationConfig, cosine_factor
from evaluation.linear import stratified_split
from evaluation.metric import l2_normalize
from evaluation.softmax_sgd import Setting
from tests.evaluation.synthetic import clusters, context_of, five_splits, with_labels

QUICK = ConceptGeneralizationConfig(trials=12, epochs=8, batch_size=64)


def evaluated(config: ConceptGeneralizationConfig, splits: dict[str, Features], phase: Phase = "test", seed: int = 0):
    """Metrics and samples by name."""
    outputs = list(cog.evaluate(config, context_of(splits, phase, seed)))
    return {o.name: o for o in outputs if isinstance(o, Metric)}, {
        o.name: o.values for o in outputs if isinstance(o, Samples)
    }


@pytest.mark.parametrize("phase", ["val", "test"])
def test_separable_unseen_classes_reach_100(phase) -> None:
    metrics, samples = evaluated(QUICK, five_splits(spread=0.05), phase)
    top1 = metrics["concept_generalization/top1"]
    assert (top1.value, top1.n) == (100.0, 90)  # half of 6 x 30
    assert 0.1 <= metrics["concept_generalization/learning_rate"].value <= 100
    assert 1e-12 <= metrics["concept_generalization/weight_decay"].value <= 1e-4
    np.testing.assert_array_equal(samples["concept_generalization/top1"], np.ones(90))


def test_each_phase_reads_its_own_classes_only() -> None:
    splits = five_splits(spread=0.05)
    expected: dict[Phase, str] = {"val": "val_classes", "test": "novel_classes"}
    for phase, split in expected.items():
        assert cog.splits(QUICK, phase) == (split,)
        evaluated(QUICK, {split: splits[split]}, phase)  # any other split is a KeyError


def test_random_labels_give_chance() -> None:
    data = clusters(4, 200, 16, spread=1.0, seed=0)
    shuffled = with_labels(data, np.random.default_rng(0).permutation(data.labels))
    metrics, _ = evaluated(QUICK, {"novel_classes": shuffled})
    assert metrics["concept_generalization/top1"].value == pytest.approx(25, abs=9)  # 4 standard errors


def test_accuracy_is_near_the_optimum_on_the_same_division() -> None:
    data = clusters(5, 120, 16, spread=2.2, seed=0)
    metrics, samples = evaluated(dataclasses.replace(QUICK, epochs=40), {"novel_classes": data})
    train, test = stratified_split(data.labels, 0.5, np.random.default_rng(0))
    x = l2_normalize(data.features, "")
    scores = [
        LogisticRegression(C=c, max_iter=2000).fit(x[train], data.labels[train]).score(x[test], data.labels[test])
        for c in (0.1, 1, 10, 100)
    ]
    top1 = metrics["concept_generalization/top1"].value
    assert min(scores) * 100 - 3 < top1 < max(scores) * 100 + 3
    assert 100 * samples["concept_generalization/top1"].mean() == pytest.approx(top1)


def test_trials_are_those_of_optunas_own_loop() -> None:
    """Fitting the random start at once changes nothing that TPE sees."""

    def value(setting: Setting) -> float:
        return -abs(math.log10(setting.learning_rate) - 1) + 0.01 * math.log10(setting.weight_decay) + 9

    asked: list[Setting] = []

    def score(settings) -> np.ndarray:
        asked.extend(settings)
        return np.array([value(setting) for setting in settings])

    best = cog._tune(ConceptGeneralizationConfig(trials=15), 7, score)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(multivariate=True, seed=7), direction="maximize")
    study.optimize(
        lambda t: value(
            Setting(t.suggest_float("lr", 0.1, 100, log=True), t.suggest_float("wd", 1e-12, 1e-4, log=True))
        ),
        n_trials=15,
    )
    expected = [Setting(trial.params["lr"], trial.params["wd"]) for trial in study.trials]
    assert asked == expected
    assert best == Setting(study.best_params["lr"], study.best_params["wd"])
    assert len({setting.learning_rate for setting in asked}) == 15


def test_cosine_of_the_code() -> None:
    """Epoch 0 and 1 at the full rate: the code sets the rate after an epoch from that epoch's number."""
    rates = [1.0]
    for epoch in range(9):
        rates.append(0.5 * (1 + math.cos(math.pi * epoch / 10)))
    assert [cosine_factor(epoch, 10) for epoch in range(10)] == pytest.approx(rates)


def test_same_seed_same_numbers_other_seed_another_division() -> None:
    splits = {"novel_classes": clusters(5, 60, 16, spread=2.0, seed=0)}
    first, again, other = (evaluated(QUICK, splits, seed=seed) for seed in (0, 0, 1))
    assert first[0] == again[0]
    for name in first[1]:
        np.testing.assert_array_equal(first[1][name], again[1][name])
    assert first[0] != other[0]


def test_every_setting_diverged_is_an_error() -> None:
    with pytest.raises(ValueError, match="diverged at every learning rate"):
        cog._tune(QUICK, 0, lambda settings: np.full(len(settings), -1.0))


def test_zero_vectors_are_warned_about_and_nan_is_refused() -> None:
    data = clusters(4, 20, 8, spread=0.1, seed=0)
    data.features[:2] = 0
    with pytest.warns(RuntimeWarning, match="2 of 80 feature vectors of split 'novel_classes' are zero"):
        metrics, _ = evaluated(QUICK, {"novel_classes": data})
    assert metrics["concept_generalization/top1"].value > 90
    data.features[0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        evaluated(QUICK, {"novel_classes": data})


def test_a_constant_dimension_changes_little() -> None:
    data = clusters(4, 40, 8, spread=0.1, seed=0)
    data.features[:, 3] = 5
    metrics, _ = evaluated(QUICK, {"novel_classes": data})
    assert metrics["concept_generalization/top1"].value == 100


def test_models_are_compared_on_the_same_images() -> None:
    right = {"good": np.ones(50, np.uint8), "bad": (np.arange(50) < 20).astype(np.uint8)}
    models = [ModelResult(name, "byol", 5, {}, {"concept_generalization/top1": r}) for name, r in right.items()]
    outputs = list(cog.compare(QUICK, models))
    found = {o.name: o.value for o in outputs if isinstance(o, Metric)}
    assert found["concept_generalization/top1/bad_minus_good"] == pytest.approx(-60)
    assert any(isinstance(o, Artifact) for o in outputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_learning_rate": 0.0}, "min_learning_rate=0.0"),
        ({"min_weight_decay": 1.0}, "max_weight_decay"),
        ({"trials": 0}, "trials=0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"test_share": 1.0}, "test_share=1.0"),
        ({"holdout": 0.0}, "holdout=0.0"),
    ],
)
def test_wrong_options_are_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        cog.check(dataclasses.replace(QUICK, **changes), "test", {"novel_classes": (5, 5)})


def test_wrong_data_is_refused() -> None:
    cog.check(QUICK, "test", {"novel_classes": (3, 0, 3)})
    with pytest.raises(ValueError, match=r"split 'novel_classes', it has 0; the data has: train"):
        cog.check(QUICK, "test", {"train": (5, 5)})
    with pytest.raises(ValueError, match="at least 2 classes"):
        cog.check(QUICK, "val", {"val_classes": (50,)})
    with pytest.raises(ValueError, match=r"1 classes have fewer \(label numbers 1\)"):
        cog.check(QUICK, "test", {"novel_classes": (5, 2, 5)})
