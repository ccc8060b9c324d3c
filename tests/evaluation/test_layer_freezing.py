"""Layer freezing against single runs of the classification and pose tasks, planted predictions, and frozen weights."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from evaluation import classification, layer_freezing, pose
from evaluation.classification import ClassificationConfig
from evaluation.fine_tuning import FineTuneResult, FineTuning, Freezing, Run
from evaluation.layer_freezing import LayerFreezingConfig
from evaluation.metric import Artifact, EvaluationContext, Metric, Output, Samples, accuracy_metric
from evaluation.pose import PoseConfig
from image_data.contracts import DataError
from tests.evaluation.fine_tuning.samples import fine_tuning_context, rendered_data, run_once, tiny_backbone

COUNTS = {"train": (2,) * 12, "val": (1,) * 12, "test": (1,) * 12}
STAGES = 4  # of the tiny ResNet-9: stem and three
SHORT: dict[str, Any] = {"iterations": 2, "batch_size": 4, "learning_rate": 0.01}
TRUTH = np.arange(10) % 5


def _metrics(outputs: Sequence[Output]) -> dict[str, Metric]:
    return {one.name: one for one in outputs if isinstance(one, Metric)}


def _samples(outputs: Sequence[Output]) -> np.ndarray:
    (found,) = [one for one in outputs if isinstance(one, Samples)]
    assert found.name == "layer_freezing/top1"
    return found.values


def _planted(run: Run) -> int:
    """How many of ten images are right: fewer the more is frozen, other ones by label count and seed."""
    return 9 - 2 * run.problem.freezing.stages + run.seed % 2 - (run.problem.num_labels > 0)


def _planted_context(calls: list[Any], seed: int = 0, stop_after: int = 10**6) -> EvaluationContext:
    """Runs that give planted predictions at once, the last one first, as many workers might."""

    def run_all(runs: Sequence[Run], spread: bool = False) -> Iterator[tuple[int, FineTuneResult]]:
        calls.append((list(runs), spread))
        for count, position in enumerate(reversed(range(len(runs)))):
            if count == stop_after:
                raise KeyboardInterrupt
            predicted = np.where(np.arange(10) < _planted(runs[position]), TRUTH, TRUTH + 1)
            last = {"predicted": predicted, "truth": TRUTH}
            yield position, FineTuneResult({1: {"predicted": TRUTH + 1, "truth": TRUTH}, 2: last})

    tuning = FineTuning(lambda _: rendered_data(), run_all, tiny_backbone)
    return replace(fine_tuning_context("val", seed=seed), fine_tuning=tuning)


@pytest.mark.parametrize("target", ["classification", "pose"])
def test_every_number_is_that_of_a_run_with_these_stages_frozen(target: Any) -> None:
    outputs = list(layer_freezing.evaluate(LayerFreezingConfig(target, "eval", **SHORT), fine_tuning_context("val")))
    task = pose if target == "pose" else classification
    metrics = _metrics(outputs)
    for k in range(STAGES + 1):
        options = {**SHORT, "freezing": Freezing(k, "eval")}
        alone = task.problem(PoseConfig(**options) if target == "pose" else ClassificationConfig(**options))  # type: ignore[arg-type]
        last = run_once(Run("alone", target, alone, "val")).last
        name = f"layer_freezing/top1_k{k}"
        assert metrics[name] == accuracy_metric(name, last["predicted"], last["truth"])
        np.testing.assert_allclose(_samples(outputs)[k], [[metrics[name].value]])
    assert set(metrics) == {
        *(f"layer_freezing/top1_k{k}" for k in range(STAGES + 1)),
        *layer_freezing.metric_names(LayerFreezingConfig(target)),
        "layer_freezing/drop_all",  # smaller is better, so it is no objective
    }
    assert metrics["layer_freezing/top1_none"][1:] == metrics["layer_freezing/top1_k0"][1:]
    assert metrics["layer_freezing/top1_all"][1:] == metrics[f"layer_freezing/top1_k{STAGES}"][1:]


def test_nothing_frozen_is_the_classification_task_itself() -> None:
    context = fine_tuning_context("test", seed=3)
    (own, _) = classification.evaluate(ClassificationConfig(**SHORT), context)
    outputs = layer_freezing.evaluate(LayerFreezingConfig(**SHORT), context)
    assert isinstance(own, Metric)
    first = next(outputs)
    assert isinstance(first, Metric)
    assert first.name == "layer_freezing/top1_k0"
    assert first[1:] == own[1:]


def _backbone_after(config: LayerFreezingConfig, stages: int) -> list[bool]:
    """Which stages are bit by bit what they were before the run."""
    kept: list[Any] = []

    def remembered(initial: str, seed: int) -> Any:
        kept.append(tiny_backbone(initial, seed))
        return kept[-1]

    run = Run("k", "layer_freezing", layer_freezing.problem(config, stages), "val")
    run_once(run, backbone=remembered)
    pairs = zip(tiny_backbone().stages, kept[0].stages, strict=True)
    states = [(before.state_dict(), after.state_dict()) for before, after in pairs]
    return [all(torch.equal(before[name], after[name]) for name in before) for before, after in states]


def test_frozen_stages_keep_every_bit_in_mode_eval_and_move_their_statistics_in_mode_train() -> None:
    still = LayerFreezingConfig(batchnorm="eval", **SHORT)
    for k in (0, 2, STAGES):
        assert _backbone_after(still, k) == [True] * k + [False] * (STAGES - k)
    assert _backbone_after(LayerFreezingConfig(batchnorm="train", **SHORT), STAGES) == [False] * STAGES


def test_the_batchnorm_modes_are_different_runs_only_where_something_is_frozen() -> None:
    losses = {
        (mode, k): run_once(
            Run("k", "layer_freezing", layer_freezing.problem(LayerFreezingConfig(batchnorm=mode, **SHORT), k), "val")
        ).losses
        for mode in ("train", "eval")
        for k in (0, STAGES)
    }
    np.testing.assert_array_equal(losses["train", 0], losses["eval", 0])
    assert abs(losses["train", STAGES] - losses["eval", STAGES]).max() > 1e-3


def test_label_counts_have_their_own_metrics_and_the_largest_one_the_main_ones() -> None:
    calls: list[Any] = []
    outputs = list(layer_freezing.evaluate(LayerFreezingConfig(labels=(5, 0, 10)), _planted_context(calls)))
    metrics = _metrics(outputs)
    values = _samples(outputs)
    assert values.shape == (STAGES + 1, 3, 1)
    for k in range(STAGES + 1):
        expected = [80 - 20 * k, 90 - 20 * k, 80 - 20 * k]
        assert [metrics[f"layer_freezing/top1_n{n}_k{k}"].value for n in (5, 0, 10)] == pytest.approx(expected)
        assert values[k, :, 0] == pytest.approx(expected)
    assert metrics["layer_freezing/top1_none"].value == pytest.approx(90)
    assert metrics["layer_freezing/top1_all"].value == pytest.approx(10)
    assert metrics["layer_freezing/drop_all"].value == pytest.approx(80)
    assert len(metrics) == 3 * (STAGES + 1) + 3
    ((runs, spread),) = calls
    assert spread
    assert {run.name for run in runs} == {f"k{k}-n{n}-seed0" for k in range(STAGES + 1) for n in (5, 0, 10)}
    assert all(run.name == f"k{run.problem.freezing.stages}-n{run.problem.num_labels}-seed0" for run in runs)
    assert {(run.task, run.phase, run.initial) for run in runs} == {("layer_freezing", "val", "checkpoint")}

    most = layer_freezing.evaluate(LayerFreezingConfig(labels=(5, 10)), _planted_context([]))
    assert _metrics(list(most))["layer_freezing/top1_none"].value == pytest.approx(80)


def test_the_drop_of_one_seed_has_the_interval_of_paired_images() -> None:
    metric = _metrics(list(layer_freezing.evaluate(LayerFreezingConfig(), _planted_context([]))))
    lost = 100.0 * np.array([0, *[1] * 8, 0])  # image 0 is always right, image 9 never
    drop = metric["layer_freezing/drop_all"]
    assert drop.value == pytest.approx(lost.mean())
    assert drop.ci95 == pytest.approx(1.96 * stats.sem(lost))
    assert drop.n == 10


def test_seeds_give_means_with_students_interval_in_the_order_of_the_seeds() -> None:
    config = LayerFreezingConfig(seeds=3)
    outputs = list(layer_freezing.evaluate(config, _planted_context([], seed=6)))
    metrics, values = _metrics(outputs), _samples(outputs)
    np.testing.assert_allclose(values[0], [[90, 100, 90]])
    np.testing.assert_allclose(values[STAGES], [[10, 20, 10]])
    for name, each in (("top1_none", values[0, 0]), ("top1_k2", values[2, 0]), ("top1_all", values[STAGES, 0])):
        metric = metrics[f"layer_freezing/{name}"]
        low, high = stats.t.interval(0.95, 2, each.mean(), stats.sem(each))
        assert (metric.value, metric.ci95, metric.n) == pytest.approx((each.mean(), (high - low) / 2, 3))
    drop = metrics["layer_freezing/drop_all"]  # the same for every seed: pairing takes their differences out
    assert (drop.value, drop.ci95, drop.n) == pytest.approx((80, 0, 3))


def test_what_is_finished_is_known_before_the_end() -> None:
    outputs: list[Output] = []
    running = layer_freezing.evaluate(LayerFreezingConfig(seeds=2), _planted_context([], stop_after=5))
    with pytest.raises(KeyboardInterrupt):
        while True:
            outputs.append(next(running))
    assert [one.name for one in outputs] == [
        "layer_freezing/top1_k4",
        "layer_freezing/top1_all",
        "layer_freezing/top1_k3",
    ]


@pytest.mark.parametrize(("labels", "seeds"), [((0,), 1), ((5, 0), 2)])
def test_the_plot_is_a_picture(labels: tuple[int, ...], seeds: int) -> None:
    outputs = list(layer_freezing.evaluate(LayerFreezingConfig(labels=labels, seeds=seeds), _planted_context([])))
    (plot,) = [one for one in outputs if isinstance(one, Artifact)]
    assert plot.name == "layer_freezing/frozen_stages.png"
    picture = Image.open(io.BytesIO(plot.data))
    assert picture.format == "PNG"
    assert min(picture.size) > 500
    assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "depth"}, r"target='depth'; allowed: classification, pose"),
        ({"batchnorm": "frozen"}, r"batchnorm='frozen'; allowed: train, eval"),
        ({"recipe": "imagenet"}, r"recipe='imagenet'; allowed: rendered, newell_deng"),
        ({"labels": ()}, r"labels=\(\), but there are 24 training images; give at least one"),
        ({"labels": (5, 25)}, r"labels=\(5, 25\), but there are 24 training images; .* 0 \(all\) to 24"),
        ({"labels": (-1,)}, r"labels=\(-1,\)"),
        ({"labels": (5, 5)}, r"a label count is given twice"),
        ({"labels": (0, 24)}, r"given twice \(0 is all 24 images\)"),
        ({"seeds": 0}, r"seeds=0; allowed: seeds at least 1"),
        ({"iterations": -1}, r"iterations=-1"),
        ({"batch_size": -8}, r"batch_size=-8"),
        ({"learning_rate": float("nan")}, r"learning_rate=nan"),
        ({"image_size": -1}, r"image_size=-1"),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^layer_freezing.*{message}"):
        layer_freezing.check(LayerFreezingConfig(**options), "val", COUNTS)


def test_possible_options_and_data_pass_and_missing_ones_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    layer_freezing.check(LayerFreezingConfig(labels=(5, 0)), "val", COUNTS)
    layer_freezing.check(LayerFreezingConfig(labels=(24, 0)), "test", COUNTS)  # which trains on 36 images
    with pytest.raises(ValueError, match=r"^layer_freezing needs images in split 'val'"):
        layer_freezing.check(LayerFreezingConfig(), "val", {"train": (2,)})
    data = rendered_data()
    layer_freezing.check_data(LayerFreezingConfig("pose"), "test", data)
    monkeypatch.setattr("evaluation.fine_tuning_runs.target_columns", lambda data, split: ("depth",))
    layer_freezing.check_data(LayerFreezingConfig(), "val", data)
    with pytest.raises(DataError, match=r"^layer_freezing needs a target 'pose'"):
        layer_freezing.check_data(LayerFreezingConfig("pose"), "val", data)


def test_the_protocol_says_which_labels_schedules_and_batchnorm() -> None:
    config = LayerFreezingConfig(batchnorm="eval", labels=(100, 0), recipe="newell_deng")
    protocol = layer_freezing.protocol(config, "test")
    assert {"name", "source", "phase", "split", "metric", "interval", "config", "schedule", "batchnorm"} <= set(
        protocol
    )
    assert (protocol["phase"], protocol["split"]) == ("test", "test")
    assert protocol["batchnorm"].startswith("eval: ")
    assert protocol["labels"] == [100, "all"]
    by_labels = protocol["schedule_by_labels"]
    assert protocol["schedule"] == by_labels["all"]
    assert by_labels["all"]["iterations"] > by_labels["100"]["iterations"] == 4000
    assert layer_freezing.splits(config, "test") == ("train", "val", "test")
