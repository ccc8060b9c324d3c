"""Pictures of segmentation: images, true and predicted maps in columns; mIoU over iterations."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from evaluation.segmentation.metric import IGNORED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Example", "class_colors", "curve_plot", "example_grid"]

DPI = 140
CELL = 1.5  # inches, height of a picture
LEGEND_ROW = 0.22  # inches
LONGEST_ROW = 9.0  # inches of legend
IGNORED_COLOR = (255, 255, 255)
BACKGROUND_COLOR = (45, 45, 45)


class Example(NamedTuple):
    """One scored image.

    Attributes:
        image: uint8 (h, w, 3), RGB.
        truth: uint8 (h, w), classes or ``IGNORED``.
        predicted: uint8 (h, w), classes.
    """

    image: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray

    @classmethod
    def resized(cls, image: np.ndarray, truth: np.ndarray, predicted: np.ndarray, size: tuple[int, int]) -> Example:
        """Image and truth brought to the (height, width) of the prediction."""
        width_height = size[1], size[0]
        small = Image.fromarray(image).resize(width_height, Image.Resampling.BILINEAR)
        labels = Image.fromarray(truth).resize(width_height, Image.Resampling.NEAREST)
        return cls(np.asarray(small), np.asarray(labels), predicted)


def class_colors(names: Sequence[str]) -> np.ndarray:
    """uint8 (256, 3): a colour per class, dark for a background, white for what is ignored."""
    from matplotlib import colormaps

    strong, light = np.split(np.array(colormaps["tab20"].colors).reshape(10, 2, 3), 2, axis=1)  # type: ignore[attr-defined]
    palette = (255 * np.concatenate([strong[:, 0], light[:, 0]])).round().astype(np.uint8)
    has_background = bool(names) and names[0] == "background"
    table = palette[(np.arange(256) - has_background) % len(palette)]
    if has_background:
        table[0] = BACKGROUND_COLOR
    table[IGNORED] = IGNORED_COLOR
    return table


def example_grid(examples: Sequence[Example], names: Sequence[str]) -> bytes:
    """A column per image: picture, truth, prediction; below, the colours of the classes that occur.

    Args:
        examples: at least one, all of one size.
        names: classes in label order.
    """
    from matplotlib.figure import Figure

    height, width = examples[0].truth.shape
    cell = (CELL, min(CELL * width / height, 2.4 * CELL))
    present = sorted({int(c) for e in examples for c in np.unique(np.stack([e.truth, e.predicted])) if c < len(names)})
    total_width = max(len(examples) * (cell[1] + 0.06) + 0.45, 4.5)
    colors = class_colors(names)
    entries = [(names[c], colors[c] / 255) for c in present]
    if any((example.truth == IGNORED).any() for example in examples):
        entries.append(("ignored", colors[IGNORED] / 255))
    rows = _legend_rows([name for name, _ in entries], min(total_width, LONGEST_ROW))
    legend = LEGEND_ROW * (rows + 0.6)
    total_height = 3 * (cell[0] + 0.06) + 0.45 + legend
    figure = Figure(figsize=(total_width, total_height), dpi=DPI)
    cells = figure.subplots(3, len(examples), squeeze=False)
    figure.subplots_adjust(
        0.4 / total_width, legend / total_height, 1 - 0.05 / total_width, 1 - 0.35 / total_height, 0.04, 0.04
    )
    for column, example in enumerate(examples):
        pictures = (example.image, colors[example.truth], colors[example.predicted])
        for row, picture in enumerate(pictures):
            cells[row, column].imshow(picture, interpolation="nearest", aspect="auto")
            cells[row, column].set(xticks=[], yticks=[])
    for row, label in enumerate(("image", "truth", "prediction")):
        cells[row, 0].set_ylabel(label, fontsize=9)
    figure.suptitle("Segmentation of scored images after the last iteration", fontsize=10, y=1 - 0.1 / total_height)
    _add_legend(figure, entries, rows)
    return _png(figure)


def _legend_rows(names: Sequence[str], width: float) -> int:
    """Rows that a legend of these names needs on some inches."""
    per_row = max(1, int(width / (0.075 * max(map(len, names), default=1) + 0.45)))
    return -(-len(names) // per_row)


def _add_legend(figure: Figure, entries: Sequence[tuple[str, np.ndarray]], rows: int) -> None:
    from matplotlib.patches import Patch

    figure.legend(
        handles=[Patch(facecolor=tuple(color), edgecolor="0.4", linewidth=0.5, label=name) for name, color in entries],
        loc="lower center",
        ncols=-(-len(entries) // rows),
        fontsize=8,
        frameon=False,
        handlelength=1.0,
        columnspacing=1.2,
        borderaxespad=0.2,
    )


def curve_plot(iterations: np.ndarray, miou: np.ndarray) -> bytes:
    """mIoU over fine-tuning iterations, the mean of the runs and each of them.

    Args:
        iterations: (P,).
        miou: percent (runs, P).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    if len(miou) > 1:
        for run in miou:
            axes.plot(iterations, run, color="0.7", linewidth=1)
    axes.plot(iterations, miou.mean(0), color="tab:blue", marker="o", markersize=4)
    axes.set(xlabel="fine-tuning iterations", ylabel="mIoU (%)", xlim=(0, None), ylim=(0, None))
    title = "Segmentation" if len(miou) == 1 else f"Segmentation: mean of {len(miou)} runs (gray: each run)"
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
