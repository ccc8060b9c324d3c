"""Means over seeds against scipy, and which figures are drawn."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib import image as mpimg
from scipy import stats

from evaluation import Metric, ModelResult
from evaluation.class_count_plot import Panel, means_by_num_classes, plot_by_num_classes

PANELS = (Panel("entropy/h_r", "H_R (nats)"), Panel("uniformity/raw", "U"))


def model(method: str, num_classes: int, seed: int, **values: float) -> ModelResult:
    metrics = {name.replace("__", "/"): Metric(name.replace("__", "/"), value) for name, value in values.items()}
    return ModelResult(f"{method} {num_classes} {seed}", method, num_classes, metrics, {})


def test_mean_and_t_interval_over_seeds() -> None:
    values = [3.0, 3.5, 4.4]
    models = [model("moco_v2", 16, seed, entropy__h_r=value) for seed, value in enumerate(values)]
    models += [model("moco_v2", 8, 0, entropy__h_r=2.0), model("simsiam", 8, 0, entropy__h_r=5.0)]
    models += [model("moco_v2", 16, 9, uniformity__raw=1.0), model("simsiam", 0, 1, entropy__h_r=7.0)]
    found = means_by_num_classes(models, "entropy/h_r")
    assert list(found) == ["moco_v2", "simsiam"]
    few, many = found["moco_v2"]
    assert (few.num_classes, few.mean, few.half_width, few.count) == (8, 2.0, None, 1)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (many.num_classes, many.count) == (16, 3)
    assert many.mean - (many.half_width or 0) == pytest.approx(low)
    assert many.mean + (many.half_width or 0) == pytest.approx(high)
    assert [s.mean for s in found["simsiam"]] == [5.0]


def test_figure_only_where_class_counts_differ() -> None:
    same = [model("moco_v2", 16, seed, entropy__h_r=4.0) for seed in (0, 1)]
    assert list(plot_by_num_classes("entropy/by_num_classes.png", "title", PANELS[:1], same)) == []
    assert list(plot_by_num_classes("x/y.png", "title", PANELS[1:], [*same, model("moco_v2", 8, 0)])) == []
    (figure,) = plot_by_num_classes(
        "entropy/by_num_classes.png", "title", PANELS, [*same, model("moco_v2", 8, 0, entropy__h_r=3.0)]
    )
    assert figure.name == "entropy/by_num_classes.png"
    assert figure.data.startswith(b"\x89PNG")
    height, width, _ = mpimg.imread(io.BytesIO(figure.data)).shape
    assert width > height > 300
