"""Pies and bars of the kinds of false positives."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Pie", "false_positive_figure"]

LABELS = ("correct", "location", "similar class", "other class", "background")
COLORS = ("#e4e4e4", "#4f81bd", "#c0504d", "#8fb65a", "#8064a2")  # the hues of the toolbox's figures
LIGHT = (COLORS[0], COLORS[3])  # that black is read on
DPI = 140
PIE = 2.2  # inches
SMALLEST_LABEL = 6.0  # percent


class Pie(NamedTuple):
    """A group of classes.

    Attributes:
        name: of the group.
        counts: int (5,), detections by kind: correct, location, similar, other, background.
    """

    name: str
    counts: np.ndarray


def false_positive_figure(
    pies: Sequence[Pie], class_names: Sequence[str], counts: np.ndarray, detections: str
) -> bytes:
    """Two rows of pies (with and without the correct detections) above a bar for each class.

    Args:
        pies: the first is of all classes.
        class_names: C.
        counts: int (C, 5) by class and kind.
        detections: which are counted, in words.

    Returns:
        A PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    width = max(8.8, PIE * len(pies), 0.16 * len(class_names) + 1.0)
    figure = plt.figure(figsize=(width, 2 * PIE + 3.9), layout="constrained")
    grid = figure.add_gridspec(3, len(pies), height_ratios=(PIE, PIE, 2.8))
    for column, pie in enumerate(pies):
        for row, first in enumerate((0, 1)):
            axis = figure.add_subplot(grid[row, column])
            _draw_pie(axis, pie.counts[first:], COLORS[first:])
            total = int(pie.counts[first:].sum())
            what = "false positive" if first else "detection"
            axis.set_title(f"{pie.name}\n{total:,} {what}{'' if total == 1 else 's'}", fontsize=9)
    _draw_bars(figure.add_subplot(grid[2, :]), class_names, counts)
    figure.suptitle(f"Kinds of detections\n{detections}", fontsize="medium")
    patches = [Patch(facecolor=color, edgecolor="#999999") for color in COLORS]
    figure.legend(patches, LABELS, loc="outside lower center", ncols=len(LABELS), frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    plt.close(figure)
    return buffer.getvalue()


def _draw_pie(axis, counts: np.ndarray, colors: Sequence[str]) -> None:
    """Wedges clockwise from the top, with their percentages where these fit in."""
    if not counts.sum():
        axis.axis("off")
        axis.text(0.5, 0.5, "none", ha="center", va="center", fontsize=9, color="#666666", transform=axis.transAxes)
        return
    _, _, texts = axis.pie(
        counts,
        colors=colors,
        startangle=90,
        counterclock=False,
        radius=1.1,
        autopct=lambda percent: f"{percent:.0f} %" if percent >= SMALLEST_LABEL else "",
        pctdistance=0.74,
        wedgeprops={"edgecolor": "white", "linewidth": 0.8},
        textprops={"fontsize": 8},
    )
    for text, color in zip(texts, colors, strict=True):
        text.set_color("black" if color in LIGHT else "white")


def _draw_bars(axis, class_names: Sequence[str], counts: np.ndarray) -> None:
    """False positives of each class by kind, in percent, their number above; a gap where a class has none."""
    wrong = counts[:, 1:]
    totals = wrong.sum(axis=1)
    parts = 100 * wrong / np.maximum(totals, 1)[:, None]
    places, bottom = np.arange(len(class_names)), np.zeros(len(class_names))
    for kind, color in enumerate(COLORS[1:]):
        axis.bar(places, parts[:, kind], bottom=bottom, color=color, width=min(0.78, 0.12 * len(class_names)))
        bottom += parts[:, kind]
    many = len(class_names) > 30
    for place, total in zip(places, totals, strict=True):
        axis.text(
            place, 101.5, f"{total:,}", ha="center", fontsize=5 if many else 7, color="#555555", rotation=90 * many
        )
    turned = {"rotation": 90, "va": "center"} if many else {"rotation": 45, "va": "top"}
    axis.set_xticks(places, class_names, ha="right", rotation_mode="anchor", **turned)
    axis.tick_params(axis="x", labelsize=6 if many else 8, length=0)
    axis.set(xlim=(-0.6, len(class_names) - 0.4), ylim=(0, 112), ylabel="false positives (%)")
    axis.set_yticks(range(0, 101, 25))
    axis.set_title("False positives of each class, their number above the bar", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
