"""The picture of a landmark evaluation: images with their true and predicted points."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Picture", "landmark_grid"]

DPI = 140
COLUMNS = 8
CELL = 1.45  # inches
TRUE, PREDICTED = "#ffffff", "#ff2f92"  # readable on faces and on every rendered background, with a dark rim


class Picture(NamedTuple):
    """One image of the grid.

    Attributes:
        image: uint8 (H, W, 3).
        points: true ones (K, 2), in pixels.
        visible: bool (K,).
        predicted: (K, 2), in pixels.
        error: in percent.
    """

    image: np.ndarray
    points: np.ndarray
    visible: np.ndarray
    predicted: np.ndarray
    error: float


def landmark_grid(pictures: Sequence[Picture], title: str) -> bytes:
    """PNG: each image with its true points (circles) and the predicted ones (crosses), joined by lines.

    Only visible points are drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(COLUMNS, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    width = max(CELL * columns, 0.085 * len(title))
    figure = Figure(figsize=(width, (CELL + 0.2) * rows + 0.75), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, picture in zip(grid.flat, pictures, strict=False):
        _draw(axes, picture)
    figure.suptitle(title, fontsize=11)
    marks = [
        Line2D([], [], marker="o", linestyle="", markerfacecolor=TRUE, markeredgecolor="black", label="true point"),
        Line2D([], [], marker="X", linestyle="", markerfacecolor=PREDICTED, markeredgecolor="black", label="predicted"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _draw(axes, picture: Picture) -> None:
    height, width = picture.image.shape[:2]
    axes.imshow(picture.image, extent=(0, width, height, 0), interpolation="nearest")
    for true, predicted in zip(picture.points[picture.visible], picture.predicted[picture.visible], strict=True):
        axes.plot(*zip(true, predicted, strict=True), color="black", linewidth=2.0)
        axes.plot(*zip(true, predicted, strict=True), color=PREDICTED, linewidth=1.0)
        axes.plot(*true, marker="o", markersize=4.5, markerfacecolor=TRUE, markeredgecolor="black")
        axes.plot(*predicted, marker="X", markersize=5, markerfacecolor=PREDICTED, markeredgecolor="black")
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_title(f"{picture.error:.1f} %", fontsize=8, pad=2)
