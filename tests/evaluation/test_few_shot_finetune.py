"""Few-shot protocol B: which tasks choose the rate, what is reported, and clear refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from evaluation import ClassCounts, EvaluationContext, Metric, ModelResult, Phase, Samples, few_shot_finetune, linear
from evaluation.episodes import draw_episodes
from evaluation.few_shot_finetune import FewShotFinetuneConfig, choose_rate
from evaluation.few_shot_sgd import SgdSettings, correct_queries
from evaluation.intervals import INTERVALS
from tests.evaluation.synthetic import clusters, context_of, five_splits

COUNTS: ClassCounts = {split: (30,) * 6 for split in ("train", "val", "test", "val_classes", "novel_classes")}
GRID = (0.001, 0.01, 0.1, 1.0)
CONFIG = FewShotFinetuneConfig(
    num_tasks=12, num_search_tasks=8, epochs=10, learning_rates=GRID, base_accuracy=False, shots=(1, 2)
)
UNSEEN = {
    "val_classes": clusters(6, 20, 12, spread=2.0, seed=1),
    "novel_classes": clusters(7, 20, 12, spread=2.0, seed=2, centre_seed=5),
}


def outputs_of(config: FewShotFinetuneConfig, context: EvaluationContext) -> dict[str, Metric]:
    return {m.name: m for m in few_shot_finetune.evaluate(config, context) if isinstance(m, Metric)}


def right(split: str, shots: int, num_tasks: int, stream: int, rates: tuple[float, ...]) -> np.ndarray:
    """Correct queries (T, R), by the parts that are tested on their own."""
    features = UNSEEN[split]
    episodes = draw_episodes(CONFIG, shots, features, 4, stream, num_tasks)
    key = (4, CONFIG.num_ways, shots, CONFIG.num_queries, stream)
    return correct_queries(torch.tensor(features.features), episodes, rates, CONFIG.sgd, key)


@pytest.mark.parametrize(("phase", "split"), [("val", "val_classes"), ("test", "novel_classes")])
@pytest.mark.filterwarnings("ignore:few_shot_finetune, . shot. the best learning rate")
def test_rate_of_one_list_is_reported_on_another(phase: Phase, split: str) -> None:
    outputs = list(few_shot_finetune.evaluate(CONFIG, context_of(UNSEEN, phase, seed=4)))
    names = [f"few_shot_finetune/{n}" for n in ("5way_{}shot_acc", "5way_{}shot_acc", "learning_rate_{}shot")]
    assert [output.name for output in outputs] == [name.format(shots) for shots in (1, 2) for name in names]
    for shots, (metric, samples, rate) in zip((1, 2), (outputs[:3], outputs[3:]), strict=True):
        assert isinstance(metric, Metric)
        assert isinstance(samples, Samples)
        assert isinstance(rate, Metric)
        search = right("val_classes", shots, 8, 1, (*GRID, rate.value)).sum(axis=0)
        assert search[-1] == search.max()
        expected = 100 * right(split, shots, 12, 0, (rate.value,))[:, 0] / 75
        np.testing.assert_allclose(samples.values, expected)
        assert metric.value == pytest.approx(expected.mean())
        assert metric.ci95 == pytest.approx(INTERVALS["closer_look"].half_width(expected))
        assert metric.n == 12


def test_both_phases_choose_the_same_rate() -> None:
    """The choice reads the same list of validation classes."""
    names = [f"few_shot_finetune/learning_rate_{shots}shot" for shots in (1, 2)]
    config = dataclasses.replace(CONFIG, learning_rates=(1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0))
    found = [outputs_of(config, context_of(UNSEEN, phase)) for phase in ("val", "test")]
    assert [found[0][name].value for name in names] == [found[1][name].value for name in names]


def test_separable_classes_reach_100() -> None:
    separable = {"val_classes": clusters(6, 20, 40, spread=0.01, seed=0)}
    config = dataclasses.replace(CONFIG, epochs=100)
    found = outputs_of(config, context_of(separable, "val"))
    assert found["few_shot_finetune/5way_1shot_acc"][1:3] == (100.0, 0.0)


def test_base_accuracy_is_the_linear_task_under_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "LinearConfig", lambda: QUICK_LINEAR)
    data = five_splits()
    config = dataclasses.replace(CONFIG, shots=(1,), base_accuracy=True, epochs=2)
    cases: tuple[tuple[Phase, tuple[str, ...]], ...] = (("val", ("train", "val")), ("test", ("train", "val", "test")))
    for phase, splits in cases:
        found = list(few_shot_finetune.evaluate(config, context_of(data, phase)))
        expected = list(linear.evaluate(QUICK_LINEAR, context_of(data, phase)))
        names = [output.name for output in found[3:]]
        assert sorted(names) == sorted(
            ["few_shot_finetune/base_acc", "few_shot_finetune/base_learning_rate", "few_shot_finetune/base_acc"]
        )
        metrics = {m.name: m.value for m in found if isinstance(m, Metric)}
        theirs = {m.name: m.value for m in expected if isinstance(m, Metric)}
        assert metrics["few_shot_finetune/base_acc"] == theirs["linear/top1"]
        assert metrics["few_shot_finetune/base_learning_rate"] == theirs["linear/learning_rate"]
        assert set(few_shot_finetune.splits(config, phase)) >= set(splits)
    assert few_shot_finetune.metric_names(config)[-1] == "few_shot_finetune/base_acc"
    assert few_shot_finetune.protocol(config, "test")["base_accuracy"]["name"].startswith("linear probe")


QUICK_LINEAR = linear.LinearConfig(epochs=3, batch_size=64, learning_rates=(1e-5, 1e-3, 1e-1, 10.0))


def test_splits_and_protocol() -> None:
    assert few_shot_finetune.splits(CONFIG, "val") == ("val_classes",)
    assert few_shot_finetune.splits(CONFIG, "test") == ("val_classes", "novel_classes")
    protocol = few_shot_finetune.protocol(CONFIG, "test")
    assert protocol["split"] == "novel_classes"
    assert protocol["base_accuracy"] is None
    assert protocol["interval"].startswith("closer_look: mean +- 1.96 s / sqrt(n), s with ddof = 0")
    assert FewShotFinetuneConfig().sgd == SgdSettings(100, 4, 0.9, 0.9, 0.001)


def counts_by(best: float) -> Callable[[tuple[float, ...]], np.ndarray]:
    """Correct queries (1, R), falling with the distance of the rate from ``best`` in octaves."""
    return lambda rates: np.array([[int(1000 - 10 * abs(np.log2(rate / best))) for rate in rates]])


def test_grid_grows_towards_the_best_rate() -> None:
    assert choose_rate(counts_by(0.1), GRID, "x") == 0.1
    assert choose_rate(counts_by(100.0), GRID, "x") == pytest.approx(100.0)
    assert choose_rate(counts_by(1e-7), GRID, "x") == pytest.approx(1e-7)
    with pytest.warns(RuntimeWarning, match=r"x: the best learning rate 1e\+06 is at the edge of .* 0.001 to 1e\+06"):
        choose_rate(counts_by(1e12), GRID, "x")


def test_of_equal_rates_the_middle_one_and_diverged_tasks_count_as_wrong() -> None:
    def equal(rates: tuple[float, ...]) -> np.ndarray:
        return np.array([[3 if 0.001 < rate < 1 else 1 for rate in rates]] * 2)

    assert choose_rate(equal, (0.001, 0.01, 0.05, 0.1, 1.0), "x") == 0.05

    def half_diverged(rates: tuple[float, ...]) -> np.ndarray:
        return np.array([[40 if rate == 0.1 else 30 for rate in rates], [-1 if rate == 0.1 else 30 for rate in rates]])

    assert choose_rate(half_diverged, (0.001, 0.01, 0.1, 1.0), "x") != 0.1
    with pytest.raises(ValueError, match="x: training diverged at every learning rate"):
        choose_rate(lambda rates: np.full((4, len(rates)), -1), GRID, "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tasks": 1}, "few_shot_finetune got num_ways=5, num_queries=15, num_tasks=1"),
        ({"shots": (1, 1)}, "few_shot_finetune shots are"),
        ({"num_search_tasks": 0}, "num_search_tasks=0"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"learning_rates": (0.1,)}, "learning_rates are"),
        ({"learning_rates": (0.1, 0.01)}, "learning_rates are"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"dampening": -0.1}, "dampening=-0.1"),
        ({"weight_decay": 1.0}, "weight_decay=1.0"),
        ({"interval": "none"}, "interval is 'none'"),
    ],
)
def test_wrong_options_are_refused(changes: dict, message: str) -> None:
    few_shot_finetune.check(CONFIG, "val", COUNTS)
    with pytest.raises(ValueError, match=message):
        few_shot_finetune.check(dataclasses.replace(CONFIG, **changes), "val", COUNTS)


def test_impossible_data_is_refused() -> None:
    few_shot_finetune.check(FewShotFinetuneConfig(), "test", COUNTS)
    with pytest.raises(ValueError, match="few_shot_finetune reads split 'val_classes'"):
        few_shot_finetune.check(CONFIG, "test", {"novel_classes": (30,) * 6})
    with pytest.raises(ValueError, match="needs 17 images per class in split 'novel_classes'"):
        few_shot_finetune.check(CONFIG, "test", COUNTS | {"novel_classes": (30, 16, 30, 30, 30)})
    with pytest.raises(ValueError, match=r"base accuracy by the task linear: .* Or set base_accuracy to False\."):
        few_shot_finetune.check(FewShotFinetuneConfig(), "test", COUNTS | {"test": ()})


def test_models_are_compared_on_tasks_and_images() -> None:
    config = dataclasses.replace(CONFIG, shots=(1,), base_accuracy=True)
    samples = {"few_shot_finetune/5way_1shot_acc": np.linspace(40, 60, 12)}
    models = [
        ModelResult(
            name, "moco", 6, {}, {k: v + shift for k, v in samples.items()} | {"few_shot_finetune/base_acc": images}
        )
        for name, shift, images in (("a", 2.0, np.ones(50, np.uint8)), ("b", 0.0, np.eye(50, dtype=np.uint8)[0]))
    ]
    names = [output.name for output in few_shot_finetune.compare(config, models)]
    assert names[0] == "few_shot_finetune/5way_1shot_acc/a_minus_b"
    assert any(name.startswith("few_shot_finetune/base_acc") for name in names)
    assert not any("base_acc" in o.name for o in few_shot_finetune.compare(CONFIG, _without_base(models)))


def _without_base(models: list[ModelResult]) -> list[ModelResult]:
    task = models[0].samples["few_shot_finetune/5way_1shot_acc"]
    samples = dict.fromkeys(few_shot_finetune.metric_names(CONFIG), task)
    return [dataclasses.replace(model, samples=samples) for model in models]
