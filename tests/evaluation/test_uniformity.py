"""The uniformity task: its metrics, samples and refusals. The pair statistics have their own tests."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from evaluation import Features, Metric, ModelResult, uniformity
from evaluation.pair_statistics import pair_statistics
from evaluation.uniformity import UniformityConfig
from tests.evaluation.synthetic import clusters, context_of


def test_metrics_and_sample() -> None:
    features = clusters(5, 20, 12, spread=1.0, seed=0)
    context = context_of({"train": features}, "test", seed=4)
    metrics = list(uniformity.evaluate(UniformityConfig(), context))
    names = ("uniformity/normalized", "uniformity/raw", "uniformity/vmf_entropy", "uniformity/koleo")
    assert tuple(m.name for m in metrics) == names
    assert uniformity.metric_names(UniformityConfig()) == names[:2]
    assert [m.value for m in metrics] == pytest.approx(pair_statistics(features.features)[:4])
    assert {m.n for m in metrics} == {100}

    few = UniformityConfig(max_images=30)
    sampled, again = (next(uniformity.evaluate(few, context)) for _ in range(2))
    assert sampled == again
    assert sampled.n == 30
    other = next(uniformity.evaluate(few, dataclasses.replace(context, seed=5)))
    assert other.value != sampled.value
    all_of_them = next(uniformity.evaluate(UniformityConfig(max_images=100), context))
    assert all_of_them == metrics[0]


def test_t_is_used() -> None:
    context = context_of({"train": clusters(5, 20, 12, spread=1.0, seed=0)}, "val")
    (normalized, *_), (sharper, *_) = (uniformity.evaluate(UniformityConfig(t=t), context) for t in (2.0, 4.0))
    assert sharper.value > normalized.value


def test_collapse_warns_and_stays_finite() -> None:
    features = Features(np.ones((6, 3), np.float32), np.zeros(6, np.int64), ("a",))
    with pytest.warns(RuntimeWarning, match="collapsed"):
        values = [m.value for m in uniformity.evaluate(UniformityConfig(), context_of({"train": features}, "val"))]
    assert values == pytest.approx([0, 0, 0, np.log(1e-8)], abs=1e-6)


def test_comparison_draws_class_counts() -> None:
    metrics = {name: Metric(name, 4.0) for name in uniformity.metric_names(UniformityConfig())}
    models = [ModelResult(f"run {c}", "supervised", c, metrics, {}) for c in (8, 16)]
    (figure,) = uniformity.compare(UniformityConfig(), models)
    assert figure.name == "uniformity/by_num_classes.png"


def test_wrong_options_and_data_are_refused() -> None:
    for changes, message in (({"t": 0.0}, "t=0.0"), ({"t": 50.0}, "at most 20"), ({"max_images": 1}, "max_images=1")):
        with pytest.raises(ValueError, match=message):
            uniformity.check(dataclasses.replace(UniformityConfig(), **changes), "val", {"train": (5, 5)})
    with pytest.raises(ValueError, match="at least 2 images"):
        uniformity.check(UniformityConfig(), "val", {"train": (1,)})
    broken = Features(np.full((4, 3), np.inf, np.float32), np.zeros(4, np.int64), ("a",))
    with pytest.raises(ValueError, match="NaN or infinity"):
        list(uniformity.evaluate(UniformityConfig(), context_of({"train": broken}, "val")))
