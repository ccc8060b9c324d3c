"""Grids of class activation maps over images, as PNG files."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Column", "comparison_grid", "model_grid", "overlay"]

COLORMAP = "inferno"  # perceptually uniform, and dark where the map is low, so that the picture steps back there
OPACITY = 0.6
CELL = 1.35  # inches
WIDEST = 30.0  # inches; more columns become smaller
DPI = 140
LONGEST_NAME = 16  # characters of a class name


class Column(NamedTuple):
    """Maps of one model.

    Attributes:
        group: heads the columns of one method.
        title: of this column.
        maps: uint8 (n, S, S).
    """

    group: str
    title: str
    maps: np.ndarray


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """A map laid over the gray picture.

    Args:
        image: uint8 (3, S, S), RGB.
        heat: uint8 (S, S), the map in [0, 255].

    Returns:
        float (S, S, 3) in [0, 1].
    """
    from matplotlib import colormaps

    gray = image.mean(axis=0)[..., None] / 255
    return OPACITY * colormaps[COLORMAP](heat)[..., :3] + (1 - OPACITY) * gray


def model_grid(
    images: np.ndarray, maps: np.ndarray, names: Sequence[str], title: str, explained: Sequence[str] | None = None
) -> bytes:
    """One model: pictures above, their maps below.

    Args:
        images: uint8 (n, 3, S, S).
        maps: uint8 (n, S, S).
        names: classes of the images.
        title: of the figure.
        explained: classes that the maps explain, where these are not the images' own.
    """
    n = len(images)
    figure, cells, _ = _grid(2, n, header=0.52)
    for i, (image, heat) in enumerate(zip(images, maps, strict=True)):
        cells[0, i].imshow(image.transpose(1, 2, 0))
        cells[0, i].set_title(_short(names[i]), fontsize=8, pad=3)
        cells[1, i].imshow(overlay(image, heat))
        if explained is not None:
            cells[1, i].set_xlabel(f"as {_short(explained[i])}", fontsize=8, labelpad=2)
    height = figure.get_figheight()
    figure.text(0.5, 1 - 0.1 / height, title, ha="center", va="top", fontsize=10)
    return _png(figure)


def comparison_grid(images: np.ndarray, names: Sequence[str], columns: Sequence[Column], note: str = "") -> bytes:
    """Several models: a row per image, a column per model, columns of one group side by side under its name.

    Args:
        images: uint8 (n, 3, S, S).
        names: classes of the images.
        columns: models, those of one group next to each other.
        note: one line below the grid.
    """
    starts = [i for i, column in enumerate(columns) if i == 0 or column.group != columns[i - 1].group]
    figure, cells, cell = _grid(len(images), 1 + len(columns), header=0.78, gaps=[1 + i for i in starts])
    for row, image in enumerate(images):
        cells[row, 0].imshow(image.transpose(1, 2, 0))
        cells[row, 0].set_ylabel(_short(names[row]), fontsize=8, labelpad=3)
        for i, column in enumerate(columns):
            cells[row, 1 + i].imshow(overlay(image, column.maps[row]))
    size = max(5.0, 8.0 * cell / CELL)
    cells[0, 0].set_title("image", fontsize=size, pad=4)
    for i, column in enumerate(columns):
        cells[0, 1 + i].set_title(column.title, fontsize=size, pad=4)
    for start, stop in zip(starts, [*starts[1:], len(columns)], strict=True):
        left, right = cells[0, 1 + start].get_position().x0, cells[0, stop].get_position().x1
        _heading(figure, columns[start].group, left, right)
    if note:
        figure.text(0.01, 0.06 / figure.get_figheight(), note, ha="left", va="bottom", fontsize=7, color="0.35")
    return _png(figure)


def _heading(figure: Figure, text: str, left: float, right: float) -> None:
    """A group's name over a line that spans its columns (figure coordinates), on two lines where it is long."""
    from matplotlib.lines import Line2D

    height = figure.get_figheight()
    y = 1 - 0.5 / height
    figure.add_artist(Line2D([left, right], [y, y], color="0.3", linewidth=0.8))
    points = 72 * (right - left) * figure.get_figwidth()
    lines = textwrap.wrap(text.replace("_", " "), max(len(text) // 2 + 2, int(points / 6)))  # 6 points a character
    longest = max(map(len, lines), default=1)
    size = min(10.0, points / (0.6 * longest))  # a character is about 0.6 of the font size wide
    figure.text((left + right) / 2, y + 0.05 / height, "\n".join(lines), ha="center", va="bottom", fontsize=size)


def _grid(num_rows: int, num_columns: int, header: float, gaps: Sequence[int] = ()) -> tuple[Figure, np.ndarray, float]:
    """A figure with square cells without ticks, and a bar that explains the colours at its foot.

    Args:
        num_rows: of cells.
        num_columns: of cells.
        header: inches above the cells.
        gaps: columns with some space on their left.

    Returns:
        The figure, its axes (num_rows, num_columns), the side of a cell in inches.
    """
    from matplotlib.figure import Figure

    side, space, gap, foot = 0.32, 0.06, 0.14, 0.75
    cell = min(CELL, (WIDEST - 2 * side) / num_columns)
    width = max(3.2, 2 * side + num_columns * (cell + space) - space + gap * len(gaps))
    height = header + num_rows * (cell + 2 * space) + foot
    figure = Figure(figsize=(width, height))
    cells = np.empty((num_rows, num_columns), object)
    for row in range(num_rows):
        for column in range(num_columns):
            x = side + column * (cell + space) + gap * sum(g <= column for g in gaps)
            y = height - header - (row + 1) * (cell + 2 * space) + 2 * space
            axes = figure.add_axes((x / width, y / height, cell / width, cell / height))
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            cells[row, column] = axes
    _color_bar(figure)
    return figure, cells, cell


def _color_bar(figure: Figure) -> None:
    width, height = figure.get_size_inches()
    bar = figure.add_axes(((width / 2 - 0.9) / width, 0.42 / height, 1.8 / width, 0.09 / height))
    bar.imshow(overlay(np.full((3, 1, 256), 128, np.uint8), np.arange(256, dtype=np.uint8)[None]), aspect="auto")
    bar.set(yticks=[])
    bar.set_xticks([0, 127.5, 255], ["0", "0.5", "1"], fontsize=7)
    bar.tick_params(length=2, pad=1)
    bar.spines[:].set_visible(False)
    bar.set_title("class activation, scaled per image", fontsize=7, pad=2)


def _short(name: str) -> str:
    """A class name that fits over a cell: the part after its last slash, cut to length."""
    last = name.rpartition("/")[2]
    return last if len(last) <= LONGEST_NAME else last[: LONGEST_NAME - 1] + "…"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
