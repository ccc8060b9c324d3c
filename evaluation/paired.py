"""Comparison of models on one list of few-shot tasks, task by task.

Tasks differ far more in difficulty than models do, so the difference of two accuracies is known much better than either
accuracy. For models A and B with accuracies a_t and b_t on task t, and d_t = a_t - b_t:

    difference  mean of d_t, in percentage points.
    interval    percentile bootstrap: the 2.5 and 97.5 % points of the mean over 10,000 resamples of the tasks.
    p           sign-flip permutation test, two-sided. Null hypothesis: on every task the two models could change
                places, so the sign of each d_t is a fair coin. p = (1 + F) / (1 + 10,000), where F of 10,000 random
                flips give a mean at least as far from zero as the difference; p is never 0.
    p (t)       Student's paired t-test, for reference.

All describe the draw of the tasks for two given backbones; the spread over pretraining seeds is not in them. Up to 4
models are compared pair by pair. Of more models the best is compared with each; the best is picked on the same tasks,
which flatters it, so those p-values are somewhat too small. Holm's adjustment is over the comparisons of one metric.
"""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from evaluation.metric import Artifact, Metric, ModelResult

__all__ = ["Comparison", "Differences", "compare_samples", "holm", "model_pairs", "paired_differences"]

RESAMPLES = 10_000
ALL_PAIRS_UP_TO = 4  # models
BLOCK_ENTRIES = 500_000  # tasks of resamples that are drawn at once: 4 MB
SEED = 0  # of resamples and flips: the same result every time


class Differences(NamedTuple):
    """What is known of P differences of means; every field is float64 (P,).

    Attributes:
        mean: of the differences.
        low: lower end of the 95 % interval.
        high: upper end.
        p_value: of the sign-flip test.
        t_p_value: of the paired t-test; 1 where all differences are zero.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p_value: np.ndarray
    t_p_value: np.ndarray


class Comparison(NamedTuple):
    """One row of the table.

    Attributes:
        metric: what was compared.
        first: name of model A.
        second: name of model B.
        difference: mean of A - B, in the unit of the metric.
        low: lower end of its 95 % interval.
        high: upper end.
        p_value: of the sign-flip test.
        p_holm: adjusted for the comparisons of this metric.
        t_p_value: of the paired t-test.
        num_tasks: tasks.
    """

    metric: str
    first: str
    second: str
    difference: float
    low: float
    high: float
    p_value: float
    p_holm: float
    t_p_value: float
    num_tasks: int


def paired_differences(differences: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED) -> Differences:
    """Intervals and p-values of the means of P lists of paired differences.

    All lists see the same resamples and flips.

    Args:
        differences: (P, n), finite, n >= 2.
        resamples: bootstrap resamples, and flips.
        seed: of both.
    """
    d = np.asarray(differences, dtype=np.float64)
    num_lists, n = d.shape
    mean = d.mean(axis=1)
    bootstrap_rng, flip_rng = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2))
    means = np.empty((resamples, num_lists))
    as_large = np.zeros(num_lists, dtype=np.int64)
    # A flip that gives the same mean in other rounding counts as large.
    bound = np.abs(mean) - 1e-9 * np.abs(d).max(axis=1)
    block = max(1, BLOCK_ENTRIES // n)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = bootstrap_rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(drawn.reshape(-1), minlength=size * n).reshape(size, n)
        means[start : start + size] = counts.astype(np.float64) @ d.T / n
        signs = 2.0 * flip_rng.integers(0, 2, (size, n)) - 1.0
        as_large += (np.abs(signs @ d.T / n) >= bound).sum(axis=0)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return Differences(mean, low, high, (1 + as_large) / (1 + resamples), _t_test(d))


def _t_test(d: np.ndarray) -> np.ndarray:
    """Two-sided p-values (P,) of Student's test that the mean of each row is zero."""
    from scipy.stats import t  # slow to import

    n = d.shape[1]
    error = d.std(axis=1, ddof=1) / np.sqrt(n)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * t.sf(np.abs(d.mean(axis=1) / error), n - 1)
    return np.where(np.isnan(p), 1.0, p)


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down adjustment of p-values (P,): controls the chance of any false rejection among them."""
    order = np.argsort(p_values, kind="stable")
    steps = p_values[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def model_pairs(means: np.ndarray) -> list[tuple[int, int]]:
    """Which models are compared: every pair of up to 4; of more, the best (of equals the first) with each other one."""
    if len(means) <= ALL_PAIRS_UP_TO:
        return list(combinations(range(len(means)), 2))
    best = int(np.argmax(means))
    return [(best, other) for other in range(len(means)) if other != best]


def compare_samples(task: str, names: Sequence[str], models: Sequence[ModelResult]) -> Iterator[Metric | Artifact]:
    """Yield, per pair, its difference with an interval and two p-values; then the table and a plot of all.

    The metrics are ``<metric>/<a>_minus_<b>`` with the wider side of the interval as its half width, and below that
    name ``/p_value`` (raw) and ``/p_value_holm``. Files: ``<task>/paired.csv``, ``.md`` and ``.png``.

    Args:
        task: name of the task.
        names: metrics with samples, one value per task of the list.
        models: evaluated on the same task lists: same data, options and seed.

    Raises:
        ValueError: samples of different length or not finite.

    Warns:
        RuntimeWarning: models without the samples; they are left out.
    """
    rows = [row for name in names for row in _compare(name, models)]
    if not rows:
        return
    labels = _labels([model.name for model in models])
    for row in rows:
        name = f"{row.metric}/{labels[row.first]}_minus_{labels[row.second]}"
        half_width = max(row.high - row.difference, row.difference - row.low)
        yield Metric(name, row.difference, half_width, row.num_tasks)
        yield Metric(f"{name}/p_value", row.p_value, None, row.num_tasks)
        yield Metric(f"{name}/p_value_holm", row.p_holm, None, row.num_tasks)
    yield Artifact(f"{task}/paired.csv", _csv(rows).encode())
    yield Artifact(f"{task}/paired.md", _markdown(rows).encode())
    yield Artifact(f"{task}/paired.png", _forest_plot(rows))


def _values(name: str, models: Sequence[ModelResult]) -> np.ndarray:
    """Samples (models, n) of one metric."""
    lengths = {model.name: np.shape(model.samples[name]) for model in models}
    shapes = set(lengths.values())
    if len(shapes) > 1 or len(shape := shapes.pop()) != 1 or shape[0] < 2:
        found = ", ".join(f"{model} {shape}" for model, shape in lengths.items())
        raise ValueError(
            f"{name}: the models' task lists have different or impossible lengths ({found}); needed: one accuracy per "
            "task, the same tasks, at least 2. Evaluate all models with the same num_tasks."
        )
    values = np.stack([np.asarray(model.samples[name], dtype=np.float64) for model in models])
    bad = [model.name for model, row in zip(models, values, strict=True) if not np.isfinite(row).all()]
    if bad:
        raise ValueError(f"{name}: accuracies of {', '.join(bad)} are NaN or infinite; evaluate those models again.")
    return values


def _compare(metric: str, models: Sequence[ModelResult]) -> list[Comparison]:
    """The rows of one metric."""
    known = [model for model in models if metric in model.samples]
    if len(known) < len(models):
        missing = ", ".join(model.name for model in models if metric not in model.samples)
        message = f"comparison of {metric}: no accuracies of single tasks of {missing}; evaluate them again"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    if len(known) < 2:
        return []
    values, names = _values(metric, known), [model.name for model in known]
    pairs = model_pairs(values.mean(axis=1))
    found = paired_differences(np.stack([values[a] - values[b] for a, b in pairs]))
    adjusted = holm(found.p_value)
    rows = []
    for i, (a, b) in enumerate(pairs):
        mean, low, high, p_value, t_p_value = (float(column[i]) for column in found)
        p_holm = float(adjusted[i])
        rows.append(
            Comparison(metric, names[a], names[b], mean, low, high, p_value, p_holm, t_p_value, values.shape[1])
        )
    return rows


def _labels(names: Sequence[str]) -> dict[str, str]:
    """Model name -> its part of a metric name: lower case letters, digits, dots and hyphens; unique."""
    labels: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^a-z0-9.-]+", "_", name.lower()).strip("_") or "model"
        label, number = plain, 1
        while label in labels.values():
            number += 1
            label = f"{plain}_{number}"
        labels[name] = label
    return labels


def _csv(rows: Sequence[Comparison]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Comparison._fields)
    writer.writerows(rows)
    return text.getvalue()


def _markdown(rows: Sequence[Comparison]) -> str:
    lines = [
        "| metric | A | B | A - B (points) | 95 % interval | p | p (Holm) | p (t-test) | tasks |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        first, second = (name.replace("|", "\\|") for name in (row.first, row.second))
        lines.append(
            f"| {row.metric} | {first} | {second} | {row.difference:+.2f} | {row.low:+.2f} to {row.high:+.2f} | "
            f"{row.p_value:.4f} | {row.p_holm:.4f} | {row.t_p_value:.2g} | {row.num_tasks} |"
        )
    note = (
        f"Mean difference over the same tasks; percentile bootstrap and sign-flip test, {RESAMPLES:,} resamples each; "
        "Holm's adjustment within a metric. Spread over tasks, not over pretraining seeds."
    )
    return "\n".join([*lines, "", note, ""])


def _forest_plot(rows: Sequence[Comparison]) -> bytes:
    """PNG: one panel per metric, one line per pair with its interval; filled where Holm's p is below 0.05."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = list(dict.fromkeys(row.metric for row in rows))
    panels = [[row for row in rows if row.metric == metric] for metric in metrics]
    height = 1.1 + 0.34 * max(len(panel) for panel in panels)
    figure = Figure(figsize=(1.5 + 5.6 * len(panels), height + 0.5), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for line, row in enumerate(panel):
            sure = row.p_holm < 0.05
            color = ("#1b7837" if row.difference > 0 else "#b2182b") if sure else "#666666"
            axes.plot([row.low, row.high], [line, line], color=color, linewidth=2, solid_capstyle="round")
            axes.plot(row.difference, line, "o", color=color, markersize=7, markerfacecolor=color if sure else "white")
        axes.axvline(0, color="black", linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(panel)), [f"{row.first} − {row.second}" for row in panel])
        axes.set_ylim(len(panel) - 0.4, -0.6)
        axes.set_title(panel[0].metric, fontsize=10)
        axes.set_xlabel("difference in percentage points, 95 % interval")
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.supxlabel("filled: p < 0.05 after Holm's adjustment (sign-flip test on the same tasks)", fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
