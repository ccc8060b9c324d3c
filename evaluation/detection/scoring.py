"""What the detections of a run are worth, and curves of it over fine-tuning."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.detection.coco_metric import coco_ap
from evaluation.detection.objects import Objects, read_objects, split_masks
from evaluation.detection.recipes import Recipe
from evaluation.detection.voc_metric import voc_ap
from evaluation.fine_tuning import Predictions
from image_data.tables import ImageTable

__all__ = ["Scored", "curve_plot", "score", "scored_objects"]


@dataclass(frozen=True)
class Scored:
    """Scores of one set of detections, in percent.

    Attributes:
        values: "ap", "ap50", "ap75", and the same with "mask_" where there are masks.
        per_class: float64 (C,), AP of each class; NaN for classes without objects.
    """

    values: dict[str, float]
    per_class: np.ndarray


def scored_objects(table: ImageTable, classes: Sequence[str]) -> tuple[list[Objects], np.ndarray]:
    """The objects of every image, and the images' heights and widths (N, 2)."""
    objects = [read_objects(table, row, classes) for row in range(table.num_images)]
    return objects, np.array([table.column("height"), table.column("width")]).T


def score(
    predictions: Predictions, objects: Sequence[Objects], sizes: np.ndarray, classes: int, recipe: Recipe
) -> Scored:
    """Scores of detections by the recipe's metric; masks always by COCO's.

    Args:
        predictions: "detections", and with masks "mask_rle" and "mask_sizes".
        objects: of every scored image.
        sizes: their heights and widths.
        classes: how many.
        recipe: says which metric.
    """
    detections = predictions["detections"]
    if recipe.metric == "voc":
        found = voc_ap(detections, objects, classes)
    else:
        found = coco_ap(detections, objects, sizes, classes)
    values = {"ap": found.ap, "ap50": found.ap50, "ap75": found.ap75}
    if recipe.masks:
        masks = split_masks(predictions["mask_rle"], predictions["mask_sizes"])
        of_masks = coco_ap(detections, objects, sizes, classes, kind="segm", masks=masks)
        values |= {"mask_ap": of_masks.ap, "mask_ap50": of_masks.ap50, "mask_ap75": of_masks.ap75}
    return Scored(values, found.per_class.mean(axis=1))


def curve_plot(iterations: Sequence[int], curves: Mapping[str, np.ndarray], num_seeds: int) -> bytes:
    """PNG of average precision over fine-tuning iterations.

    Args:
        iterations: P of them.
        curves: name -> percentages (seeds, P).
        num_seeds: shown in the title.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, values in curves.items():
        (line,) = axes.plot(iterations, values.mean(axis=0), marker="o", markersize=4, label=name)
        if len(values) > 1:
            color = line.get_color()
            axes.fill_between(iterations, values.min(axis=0), values.max(axis=0), color=color, alpha=0.18, linewidth=0)
    axes.set(xlabel="fine-tuning iterations", ylabel="average precision (%)", ylim=(0, None))
    spread = f", mean and range of {num_seeds} runs" if num_seeds > 1 else ""
    axes.set_title(f"Detection over fine-tuning{spread}", fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    plt.close(figure)
    return buffer.getvalue()
