"""What every row of ``TASKS`` promises to the commands that run it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from evaluation import TASKS, Artifact, Metric, ModelResult, Output, Phase, Samples
from evaluation.linear import LinearConfig
from evaluation.metric import REPORT_SPLITS
from rayjobs.transfer import check_task
from tests.evaluation.fine_tuning.samples import fine_tuning, fine_tuning_context, rendered_data, tiny_backbone
from tests.evaluation.synthetic import ImageSplits, PatchBackbone, image_context

PHASES: tuple[Phase, ...] = ("val", "test")
QUICK: dict[str, dict[str, Any]] = {
    "linear": {"epochs": 3, "batch_size": 64},
    "knn": {"num_neighbors": 20},
    "few_shot": {"num_tasks": 10},
    "few_shot_finetune": {"num_tasks": 10, "num_search_tasks": 5, "epochs": 5},
    "concept_generalization": {"trials": 3, "epochs": 3},
    "domains": {"tune_epochs": 1, "epochs": 2, "batch_sizes": (16,)},
    "feature_plots": {},
    "few_shot_rfs": {"num_tasks": 10, "copies": 2},
    "linear_readoff": {"epochs": 2, "batch_size": 60},
    "entropy": {},
    "uniformity": {},
    "alignment": {},
    "class_geometry": {},
    "cam": {"num_images": 12, "grid_images": 2, "classifier": LinearConfig(epochs=3, batch_size=64)},
    "inversion": {"num_images": 2, "iterations": 3},
    "classification": {"iterations": 2, "batch_size": 4},
    "pose": {"iterations": 2, "batch_size": 4},
    "segmentation": {"iterations": 2, "batch_size": 4},
    "depth": {"iterations": 2, "batch_size": 4},
    "landmarks": {"iterations": 2, "batch_size": 4, "num_pictures": 2},
    "detection": {"iterations": 2, "batch_size": 2},
    "utility": {"labels": (6, 12), "seeds": 2, "iterations": 2, "batch_size": 4},
    "layer_freezing": {"iterations": 1, "batch_size": 4},
}
IMAGES = ImageSplits()


def _other_weights(initial: str, seed: int) -> Any:
    return tiny_backbone(initial, seed + 7)


def _run(name: str, phase: Phase, asked: list[str] | None = None, seed: int = 0) -> tuple[Any, list[Output]]:
    """The task with quick options on small pictures: its config and all it yields."""
    spec = TASKS[name]
    config = dataclasses.replace(spec.config, **QUICK[name])
    if spec.needs == "fine_tuning":
        check_task(name, config, phase, rendered_data())
        return config, list(spec.evaluate(config, fine_tuning_context(phase, seed=seed)))
    spec.check(config, phase, IMAGES.counts())
    return config, list(spec.evaluate(config, image_context(IMAGES, phase, seed, asked=asked)))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_task_reads_what_it_declares_and_yields_what_it_names(name: str, phase: Phase) -> None:
    spec, asked = TASKS[name], []
    config, outputs = _run(name, phase, asked)
    assert set(asked) <= set(spec.splits(config, phase))
    if phase == "val":
        assert not set(asked) & set(REPORT_SPLITS)
    metrics = [output for output in outputs if isinstance(output, Metric)]
    names = [output.name for output in outputs]
    assert len(set(metric.name for metric in metrics)) == len(metrics)
    assert set(spec.metric_names(config)) <= {metric.name for metric in metrics}
    assert all(found.startswith(f"{name}/") and found == found.lower() for found in names)
    for metric in metrics:
        assert type(metric.value) is float
        assert math.isfinite(metric.value)
        assert metric.ci95 is None or (type(metric.ci95) is float and metric.ci95 >= 0)
        assert metric.n is None or type(metric.n) is int
    for output in outputs:
        if isinstance(output, Artifact):
            assert output.data[:4] == b"\x89PNG" or not output.name.endswith(".png")
        if isinstance(output, Samples):
            assert isinstance(output.values, np.ndarray)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_same_seed_same_numbers(name: str) -> None:
    first, second = _run(name, "val", seed=5)[1], _run(name, "val", seed=5)[1]
    for a, b in zip(first, second, strict=True):
        assert a.name == b.name
        if isinstance(a, Samples):
            np.testing.assert_array_equal(a.values, b.values)
        elif isinstance(a, Metric):
            assert a == b


@pytest.mark.parametrize("name", [name for name, spec in TASKS.items() if spec.compare])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_models_are_compared(name: str) -> None:
    models = []
    for number, method in enumerate(("moco_v2", "supervised")):
        torch.manual_seed(number)
        backbone = PatchBackbone()
        if number:
            nn.init.normal_(backbone.conv2.weight)
        spec = TASKS[name]
        config = dataclasses.replace(spec.config, **QUICK[name])
        context = image_context(IMAGES, "test", backbone=backbone)
        if spec.needs == "fine_tuning":
            other = fine_tuning(backbone=_other_weights if number else tiny_backbone)
            context = dataclasses.replace(context, fine_tuning=other)
        outputs = list(spec.evaluate(config, context))
        metrics = {output.name: output for output in outputs if isinstance(output, Metric)}
        samples = {output.name: output.values for output in outputs if isinstance(output, Samples)}
        models.append(ModelResult(f"model {number}", method, 6 * (number + 1), metrics, samples))
    found = list(TASKS[name].compare(config, models))  # type: ignore[misc]
    assert found
    for output in found:
        assert output.name.startswith(f"{name}/")
        assert not isinstance(output, Metric) or math.isfinite(output.value)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("phase", PHASES)
def test_protocol_is_json_and_complete(name: str, phase: Phase) -> None:
    spec = TASKS[name]
    protocol = spec.protocol(spec.config, phase)
    stored = json.loads(json.dumps(protocol))
    assert {"name", "source", "phase", "split", "metric", "interval", "config"} <= set(stored)
    assert ("schedule" if spec.needs == "fine_tuning" else "features") in stored
    assert stored["phase"] == phase
    assert stored["split"] in spec.splits(spec.config, phase) or not spec.splits(spec.config, phase)
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
    assert all(spec.metrics for spec in TASKS.values())
    assert {name for name, spec in TASKS.items() if spec.direction == "none"} >= {"entropy", "uniformity"}


@pytest.mark.parametrize("name", [name for name, spec in TASKS.items() if spec.splits(spec.config, "val")])
def test_data_without_the_splits_are_refused(name: str) -> None:
    spec = TASKS[name]
    if spec.needs == "fine_tuning":
        data = rendered_data()
        without = dataclasses.replace(data, splits={"train": data.splits["train"]})
        with pytest.raises(ValueError, match=f"{name}|has no split 'val'"):
            check_task(name, spec.config, "val", without)
        return
    with pytest.raises(ValueError, match=f"{name} "):
        spec.check(spec.config, "val", {})
