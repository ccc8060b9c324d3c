"""A downstream metric against the number of fine-tuning iterations: values and a plot."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import numpy as np

from evaluation.metric import Artifact, Output, Samples

__all__ = ["curve_outputs"]


def curve_outputs(task: str, label: str, iterations: Sequence[int], values: np.ndarray) -> Iterator[Output]:
    """Yield the curve as samples and as a plot of the mean over seeds with its 95 % Student interval as a band.

    Samples ``<task>/curve`` are (P, 1 + seeds): the iteration, then the value of each seed. The file is
    ``<task>/iterations.png``.

    Args:
        task: its name.
        label: of the vertical axis, with the unit: "top-1 accuracy (%)".
        iterations: (P,), ascending.
        values: (seeds, P).

    Raises:
        ValueError: the shapes do not fit.
    """
    if values.ndim != 2 or values.shape[1] != len(iterations) or not values.size:
        raise ValueError(f"{task}: a curve of {len(iterations)} iterations got values of shape {values.shape}.")
    yield Samples(f"{task}/curve", np.column_stack([np.asarray(iterations, np.float64), values.T]))
    yield Artifact(f"{task}/iterations.png", _plot(task, label, iterations, values))


def _plot(task: str, label: str, iterations: Sequence[int], values: np.ndarray) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
    seeds, mean = len(values), values.mean(0)
    if seeds > 1:
        half = _half_widths(values)
        axis.fill_between(iterations, mean - half, mean + half, alpha=0.2, linewidth=0)
    axis.plot(iterations, mean, marker="o", markersize=4)
    note = f"mean and 95 % t-interval over {seeds} seeds" if seeds > 1 else "one seed"
    axis.set_title(f"{task}: fine-tuning for longer\n{note}", fontsize="medium")
    axis.set(xlabel="fine-tuning iterations", ylabel=label)
    axis.set_xlim(left=0)
    # The band of two seeds can be many times as wide as the curve is high; it is cut, not the curve.
    margin = max(0.15 * float(np.ptp(values)), 1e-3 * float(np.abs(values).max()), 1e-6)
    axis.set_ylim(float(values.min()) - margin, float(values.max()) + margin)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    plt.close(figure)
    return buffer.getvalue()


def _half_widths(values: np.ndarray) -> np.ndarray:
    """Student's 95 % half width of every column's mean, (P,)."""
    from scipy.stats import t

    n = len(values)
    return t.ppf(0.975, n - 1) * values.std(0, ddof=1) / np.sqrt(n)
