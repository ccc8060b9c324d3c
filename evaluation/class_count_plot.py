"""A metric against the number of pretraining classes, a line per method: Figure 3 of Sun et al., AAAI 2022 (CAMtrast).

The paper sweeps 64, 32, 16 and 8 classes at a fixed number of images. Models with the same method and class count are
taken as seeds of one setting: the point is their mean, the bar their 95 % t-interval (none for a single model).
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from evaluation.metric import Artifact, ModelResult

__all__ = ["Panel", "SettingMean", "means_by_num_classes", "plot_by_num_classes"]

MARKERS = "osD^vP*X<>"


class Panel(NamedTuple):
    """One plot of the figure.

    Attributes:
        metric: name of the metric.
        label: of the vertical axis.
    """

    metric: str
    label: str


class SettingMean(NamedTuple):
    """Models of one method and class count.

    Attributes:
        num_classes: of the pretraining data.
        mean: over the models.
        half_width: of the 95 % t-interval; None for a single model.
        count: models.
    """

    num_classes: int
    mean: float
    half_width: float | None
    count: int


def means_by_num_classes(models: Sequence[ModelResult], metric: str) -> dict[str, list[SettingMean]]:
    """Settings of each method by class count, methods in the order of their first model; models without the metric,
    or of unknown class count, are left out."""
    from scipy import stats

    values: dict[str, dict[int, list[float]]] = {}
    for model in models:
        if metric in model.metrics and model.num_classes > 0:
            values.setdefault(model.method, {}).setdefault(model.num_classes, []).append(model.metrics[metric].value)
    found: dict[str, list[SettingMean]] = {}
    for method, by_count in values.items():
        for num_classes, group in sorted(by_count.items()):
            n = len(group)
            half = float(stats.t.ppf(0.975, n - 1) * np.std(group, ddof=1) / math.sqrt(n)) if n > 1 else None
            found.setdefault(method, []).append(SettingMean(num_classes, float(np.mean(group)), half, n))
    return found


def plot_by_num_classes(
    name: str, title: str, panels: Sequence[Panel], models: Sequence[ModelResult]
) -> Iterator[Artifact]:
    """Yield the figure as PNG, panels side by side; nothing where all models have the same number of classes.

    Args:
        name: of the artifact.
        title: of the figure.
        panels: metrics to draw.
        models: two or more models.
    """
    settings = [means_by_num_classes(models, panel.metric) for panel in panels]
    ticks = sorted({s.num_classes for found in settings for group in found.values() for s in group})
    if len(ticks) < 2:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator

    methods = list(dict.fromkeys(method for found in settings for method in found))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.4 * len(panels) + 1.8, 3.8), layout="constrained", squeeze=False
    )
    for axis, panel, found in zip(axes[0], panels, settings, strict=True):
        for i, method in enumerate(methods):
            _draw_method(axis, method, found.get(method, []), i, len(methods))
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(FixedLocator(ticks))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticklabels([f"{tick:,}" for tick in ticks], rotation=45 if len(ticks) > 8 else 0)
        axis.set(xlabel="classes of the pretraining data", ylabel=panel.label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    seeds = max(s.count for found in settings for group in found.values() for s in group)
    note = f"mean and 95 % t-interval over up to {seeds} models" if seeds > 1 else "one model per point"
    figure.suptitle(f"{title}\n{note}", fontsize="medium")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    plt.close(figure)
    yield Artifact(name, buffer.getvalue())


def _draw_method(axis, method: str, group: Sequence[SettingMean], number: int, num_methods: int) -> None:
    """One method's line; points of different methods are moved apart a little, so that bars do not hide each other."""
    from matplotlib import pyplot as plt

    shift = 2 ** (0.05 * (number - (num_methods - 1) / 2)) if num_methods <= 10 else 1.0
    axis.errorbar(
        [s.num_classes * shift for s in group],
        [s.mean for s in group],
        yerr=[s.half_width or 0.0 for s in group],
        color=plt.get_cmap("tab10" if num_methods <= 10 else "tab20")(number % 20),
        marker=MARKERS[number % len(MARKERS)],
        markersize=5,
        linewidth=1.5,
        capsize=3,
        label=method,
    )
