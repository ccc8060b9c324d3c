"""Pictures of feature inversion as PNG files: grids, loss curves, and images of two models against each other."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Pair", "PictureRow", "loss_figure", "picture_grid", "scatter_figure"]

DPI = 140
COLUMNS = 8  # images beside each other; further ones follow below
CELL, GAP = 1.15, 0.05  # inches
NAME, CAPTION, HEADER = 0.2, 0.17, 0.36  # inches above a block, below a row, above everything
LONGEST_NAME = 15  # characters of a class name
LONGEST_LINE = 22  # characters of a model name, before it goes on below
LOWER, UPPER = "#1b7837", "#762a83"  # points below and above the diagonal


class PictureRow(NamedTuple):
    """One row of a grid.

    Attributes:
        title: at its left.
        images: uint8 (n, 3, S, S).
        captions: below the images; empty for none.
    """

    title: str
    images: np.ndarray
    captions: Sequence[str] = ()


class Pair(NamedTuple):
    """Distances of the same images under two models.

    Attributes:
        x_name: model on the horizontal axis.
        y_name: model on the vertical axis.
        x: distances (n,).
        y: distances (n,).
    """

    x_name: str
    y_name: str
    x: np.ndarray
    y: np.ndarray

    @property
    def share_below(self) -> float:
        """Points below the diagonal in percent (on it: half): there the model of the vertical axis is closer."""
        return float(100 * ((self.y < self.x).mean() + 0.5 * (self.y == self.x).mean()))

    @property
    def share_above(self) -> float:
        """Points above the diagonal in percent (on it: half): there the model of the horizontal axis is closer."""
        return 100.0 - self.share_below


def picture_grid(rows: Sequence[PictureRow], names: Sequence[str], title: str) -> bytes:
    """The same images in several versions, one version per row, a column per image, 8 columns in a block.

    Args:
        rows: the versions.
        names: of the images, above them.
        title: above everything.
    """
    rows = [row._replace(title=_wrapped(row.title)) for row in rows]
    num_images, columns = len(names), min(COLUMNS, len(names))
    heights = [CELL + GAP + (CAPTION if row.captions else 0) for row in rows]
    block = NAME + sum(heights) + 0.12
    left = 0.25 + 0.085 * max(len(line) for row in rows for line in row.title.split("\n"))
    width = max(left + columns * (CELL + GAP) + 0.1, 0.2 + 0.085 * len(title))
    height = HEADER + math.ceil(num_images / columns) * block
    figure = _figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))  # in inches from the top left corner
    axes.axis("off")
    axes.text(0.1, 0.1, title, fontsize=10, ha="left", va="top")
    for i, name in enumerate(names):
        x = left + (i % columns) * (CELL + GAP)
        y = HEADER + (i // columns) * block
        axes.text(x + CELL / 2, y + NAME - 0.04, _short(name), fontsize=7.5, ha="center", va="bottom")
        y += NAME
        for row, row_height in zip(rows, heights, strict=True):
            if i % columns == 0:
                axes.text(left - 0.1, y + CELL / 2, row.title, fontsize=8.5, ha="right", va="center")
            _picture(axes, row.images[i], x, y)
            if row.captions:
                axes.text(
                    x + CELL / 2, y + CELL + 0.03, row.captions[i], fontsize=7, color="0.35", ha="center", va="top"
                )
            y += row_height
    return _png(figure)


def _picture(axes: Axes, image: np.ndarray, x: float, y: float) -> None:
    """An image with its top left corner at (x, y), in a thin frame: many pictures are white at the border."""
    from matplotlib.patches import Rectangle

    axes.imshow(image.transpose(1, 2, 0), extent=(x, x + CELL, y + CELL, y), aspect="auto", interpolation="antialiased")
    axes.add_patch(Rectangle((x, y), CELL, CELL, fill=False, edgecolor="0.8", linewidth=0.5))


def _wrapped(name: str, width: int = LONGEST_LINE) -> str:
    return textwrap.fill(name, width)


def _short(name: str) -> str:
    name = name.replace("_", " ")
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def loss_figure(steps: np.ndarray, losses: np.ndarray, title: str) -> bytes:
    """Feature loss of every image and its median by iteration, on a logarithmic axis.

    Args:
        steps: iterations (P,).
        losses: (n, P).
        title: above the plot.
    """
    figure = _figure(6.4, 4.2)
    axes = figure.add_axes((0.12, 0.13, 0.84, 0.77))
    positive = np.where(losses > 0, losses, np.nan)  # a map that is met exactly has no place on the axis
    for curve in positive:
        axes.plot(steps, curve, color="#4878a8", linewidth=0.8, alpha=0.35)
    axes.plot([], [], color="#4878a8", linewidth=0.8, alpha=0.6, label=f"{len(losses)} images")
    axes.plot(steps, np.median(positive, axis=0), color="#b2182b", linewidth=2, label="median")
    axes.set_yscale("log")
    axes.set_xlim(0, steps[-1])
    axes.set_xlabel("iteration")
    axes.set_ylabel("feature loss (mean squared error)")
    axes.set_title(title, fontsize=10)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False)
    return _png(figure)


def scatter_figure(pairs: Sequence[Pair], quantity: str) -> bytes:
    """One panel per pair of models, one point per image, as in Figure 6 of Zhao et al.

    Args:
        pairs: distances of two models each.
        quantity: what the axes show; smaller must mean closer.
    """
    columns = min(3, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    figure = _figure(4.0 * columns + 0.3, 4.4 * rows + 0.2, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, pair in zip(panels, pairs, strict=False):
        _scatter(axes, pair, quantity)
    for axes in panels[len(pairs) :]:
        axes.axis("off")
    return _png(figure)


def _scatter(axes: Axes, pair: Pair, quantity: str) -> None:
    both = np.concatenate([pair.x, pair.y])
    margin = 0.06 * max(float(np.ptp(both)), 1e-6)
    limits = (float(both.min()) - margin, float(both.max()) + margin)
    axes.plot(limits, limits, color="0.5", linewidth=1, linestyle="--", zorder=1)
    closer = pair.y < pair.x
    for chosen, color in ((closer, LOWER), (~closer, UPPER)):
        axes.scatter(pair.x[chosen], pair.y[chosen], s=18, color=color, alpha=0.6, linewidths=0, zorder=2)
    mean = (float(pair.x.mean()), float(pair.y.mean()))
    axes.plot(*mean, marker="+", markersize=13, markeredgewidth=2, color="black", zorder=3)
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    axes.set_xlabel(f"{quantity}\n{_wrapped(pair.x_name, 40)}")
    axes.set_ylabel(f"{_wrapped(pair.y_name, 40)}\n{quantity}")
    corner = {"transform": axes.transAxes, "fontsize": 8}
    axes.text(0.97, 0.03, f"closer with\n{_wrapped(pair.y_name)}", color=LOWER, ha="right", va="bottom", **corner)
    axes.text(0.03, 0.97, f"closer with\n{_wrapped(pair.x_name)}", color=UPPER, ha="left", va="top", **corner)
    axes.set_title(
        f"{pair.share_below:.0f} % of {len(pair.x)} images below the diagonal\n"
        f"means (+): {mean[0]:.3g} across, {mean[1]:.3g} up",
        fontsize=9,
    )
    axes.grid(color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)


def _figure(width: float, height: float, layout: Literal["constrained"] | None = None) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
