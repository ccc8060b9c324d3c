"""What every row of ``TASKS`` promises to the commands that run it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math

import pytest

from evaluation import TASKS, EvaluationContext, Features, Phase
from evaluation.metric import REPORT_SPLITS
from tests.evaluation.synthetic import five_splits

PHASES: tuple[Phase, ...] = ("val", "test")
QUICK = {
    "linear": {"epochs": 3, "batch_size": 64},
    "knn": {"num_neighbors": 20},
    "few_shot": {"num_tasks": 10},
    "entropy": {},
    "uniformity": {},
}
SPLITS = five_splits(per_class=30)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.filterwarnings("ignore:linear. the best learning rate")
def test_task_reads_what_it_declares_and_yields_what_it_names(name: str, phase: Phase) -> None:
    spec = TASKS[name]
    config = dataclasses.replace(spec.config, **QUICK[name])
    asked: list[str] = []

    def features(split: str) -> Features:
        asked.append(split)
        return SPLITS[split]

    spec.check(config, phase, {split: found.class_counts for split, found in SPLITS.items()})
    metrics = list(spec.evaluate(config, EvaluationContext(features, phase)))
    assert set(asked) == set(spec.splits(config, phase))
    if phase == "val":
        assert not set(asked) & set(REPORT_SPLITS)
    names = [metric.name for metric in metrics]
    assert len(set(names)) == len(names)
    assert set(spec.metric_names(config)) <= set(names)
    for metric in metrics:
        assert metric.name.startswith(f"{name}/")
        assert metric.name == metric.name.lower()
        assert type(metric.value) is float
        assert math.isfinite(metric.value)
        assert metric.ci95 is None or (type(metric.ci95) is float and metric.ci95 >= 0)
        assert metric.n is None or type(metric.n) is int


@pytest.mark.parametrize("name", TASKS)
def test_same_seed_same_numbers(name: str) -> None:
    spec = TASKS[name]
    config = dataclasses.replace(spec.config, **QUICK[name])
    context = EvaluationContext(SPLITS.__getitem__, "val", seed=5)
    assert list(spec.evaluate(config, context)) == list(spec.evaluate(config, context))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("phase", PHASES)
def test_protocol_is_json_and_complete(name: str, phase: Phase) -> None:
    spec = TASKS[name]
    protocol = spec.protocol(spec.config, phase)
    stored = json.loads(json.dumps(protocol))
    assert {"name", "source", "phase", "split", "features", "metric", "interval", "config"} <= set(stored)
    assert stored["phase"] == phase
    assert stored["split"] in spec.splits(spec.config, phase)
    assert set(stored["config"]) == {field.name for field in dataclasses.fields(spec.config)}


@pytest.mark.parametrize("name", TASKS)
def test_every_option_is_documented_and_frozen(name: str) -> None:
    config = TASKS[name].config
    documentation = inspect.getdoc(type(config)) or ""
    for field in dataclasses.fields(config):
        assert f"\n    {field.name}: " in documentation
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, next(iter(dataclasses.fields(config))).name, None)


def test_table_keys_and_objectives() -> None:
    assert {name: spec.name for name, spec in TASKS.items()} == {name: name for name in TASKS}
    assert "few_shot/5way_5shot_acc" in TASKS["few_shot"].metrics
    assert "knn/top1" in TASKS["knn"].metrics
    assert all(spec.direction == "max" and spec.metrics for spec in TASKS.values())


@pytest.mark.parametrize("name", TASKS)
def test_check_refuses_data_without_any_split(name: str) -> None:
    spec = TASKS[name]
    with pytest.raises(ValueError, match=f"{name} "):
        spec.check(spec.config, "val", {})
