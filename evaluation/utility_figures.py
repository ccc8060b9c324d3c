"""The two curves of label efficiency: accuracy against labels, and what pretraining is worth."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation.utility_curve import UtilityPoint

__all__ = ["utility_plot"]

_COLORS = {"from scratch": "#7f7f7f", "pretrained, fine-tuned": "#1f77b4"}
_MARKS = {"ok": "o", "above_range": "^", "below_range": "v", "mixed": "x"}
_NOTES = {
    "above_range": "above the scratch curve: at least",
    "below_range": "below the scratch curve: at most",
    "mixed": "runs above and below it",
}


def utility_plot(target: str, scratch: np.ndarray, finetuned: np.ndarray, points: Sequence[UtilityPoint]) -> bytes:
    """PNG of accuracy against labels (left) and of U(n) with the line beyond which it cannot be measured (right).

    Args:
        target: name of the task.
        scratch: (L, runs), accuracies from scratch.
        finetuned: (L, runs), accuracies of the pretrained network.
        points: (L,), the utilities.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    counts = np.array([point.n for point in points])
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.0), layout="constrained")
    for (label, color), values in zip(_COLORS.items(), (scratch, finetuned), strict=True):
        mean, half = values.mean(1), _half_widths(values)
        left.fill_between(counts, mean - half, mean + half, alpha=0.2, linewidth=0, color=color)
        left.plot(counts, mean, marker="o", markersize=4, color=color, label=label)
    low, high = left.get_ylim()
    left.set(ylabel="accuracy (%)", ylim=(max(low, -2.0), min(high, 102.0)))
    _legend(left)
    left.set_title(f"{target}: accuracy against labels\n{_runs_note(scratch.shape[1])}", fontsize="medium")
    _utilities(right, counts, points)
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_xticks(counts, [f"{n:,}" for n in counts])
        axis.minorticks_off()
        axis.set_xlabel("labelled images n")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    plt.close(figure)
    return buffer.getvalue()


def _utilities(axis: Any, counts: np.ndarray, points: Sequence[UtilityPoint]) -> None:
    values = np.array([point.utility for point in points])
    fine = np.geomspace(counts[0], counts[-1], 200)
    axis.plot(fine, counts[-1] / fine - 1, color="#bbbbbb", linestyle="--", label="most that can be measured")
    axis.plot(counts, values, color="#1f77b4", linewidth=1)
    for status, mark in _MARKS.items():
        own = [i for i, point in enumerate(points) if point.status == status]
        if own:
            halves = [points[i].half_width or 0.0 for i in own]
            label = _NOTES.get(status, "U(n) = n̂ / n - 1")
            style: dict[str, Any] = {"marker": mark, "markersize": 6, "linestyle": "none", "capsize": 3}
            axis.errorbar(counts[own], values[own], halves, color="#1f77b4", label=label, **style)
    axis.axhline(0, color="black", linewidth=0.8)
    halves = np.array([point.half_width or 0.0 for point in points])
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.5)
    reach = high - low + 0.5  # an interval over two seeds may be wider than all else: it is cut at the frame
    low, high = max((values - halves).min(), low - reach), min((values + halves).max(), high + reach)
    axis.set(ylabel="utility U(n)", ylim=(min(low, 0.0) - 0.25, max(high, 0.5) + 0.25))
    axis.set_title("labels that pretraining saves\nU = 1: worth twice the labels", fontsize="medium")
    _legend(axis)


def _legend(axis: Any) -> None:
    """Below the axis, where it hides nothing."""
    axis.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _half_widths(values: np.ndarray) -> np.ndarray:
    """Student's 95 % half width of every row's mean; 0 for one run."""
    if values.shape[1] < 2:
        return np.zeros(len(values))
    from evaluation.intervals import mean_and_half_width

    return np.array([mean_and_half_width(row, "rfs")[1] for row in values])


def _runs_note(runs: int) -> str:
    return f"mean and 95 % t-interval over {runs} seeds" if runs > 1 else "one seed"
