"""Class activation maps of several models beside each other (Sun et al., AAAI 2022, Fig. 2), and paired differences."""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from evaluation.cam_figures import Column, comparison_grid
from evaluation.cam_statistics import STATISTICS
from evaluation.metric import Artifact, Metric, ModelResult, mean_interval

if TYPE_CHECKING:
    from evaluation.cam import CamConfig

__all__ = ["Difference", "compare", "paired_difference"]

NEEDED = ("cam/image_ids", "cam/images", "cam/maps", "cam/class_names", *STATISTICS)


class Difference(NamedTuple):
    """Second model minus first over the images that both explained.

    Attributes:
        first: mean of the first model over these images.
        second: mean of the second one.
        value: mean difference.
        ci95: half width of its 95 % interval (1.96 s / sqrt(n)); None for a single image.
        n: images.
    """

    first: float
    second: float
    value: float
    ci95: float | None
    n: int


def compare(config: CamConfig, models: Sequence[ModelResult]) -> Iterator[Metric | Artifact]:
    """Yield a grid methods x class counts, and how area, spatial entropy and mass concentration differ.

    Images are matched by their pixels: models that were pretrained on nested subsets of classes share some of them,
    models that were evaluated at different image sizes none. The metrics are differences to the first model; the table
    has all pairs.

    Warns:
        RuntimeWarning: two models have no image in common, or feature maps of different sizes.
    """
    models = [model for model in models if all(name in model.samples for name in NEEDED)]
    if len(models) < 2:
        return
    sides = sorted({int(model.metrics["cam/map_side"].value) for model in models if "cam/map_side" in model.metrics})
    if len(sides) > 1:
        sizes = ", ".join(f"{side}x{side}" for side in sides)
        _warn(f"cam: the feature maps are of {sizes} places; a coarser one is wider, whatever the model looks at")
    yield from _grid(models)
    rows = []
    for first, second in combinations(models, 2):
        for name in STATISTICS:
            found = paired_difference(first, second, name)
            if found is None:
                _warn(f"cam: {first.name} and {second.name} explained no image in common; they are not compared")
                break
            rows.append([name, first.name, second.name, *found])
            if first is models[0]:
                pair = f"{_slug(second.name)}_minus_{_slug(first.name)}"
                yield Metric(f"{name}/{pair}", found.value, found.ci95, found.n)
    yield Artifact("cam/differences.csv", _table(rows))


def paired_difference(first: ModelResult, second: ModelResult, name: str) -> Difference | None:
    """Mean difference of one number over the common images; None where there is none."""
    _, i, j = np.intersect1d(first.samples["cam/image_ids"], second.samples["cam/image_ids"], return_indices=True)
    if not len(i):
        return None
    a, b = first.samples[name][i], second.samples[name][j]
    value, ci95 = mean_interval(b - a) if len(a) > 1 else (float((b - a)[0]), None)
    return Difference(float(a.mean()), float(b.mean()), value, ci95, len(a))


def _grid(models: Sequence[ModelResult]) -> Iterator[Artifact]:
    """S-CAM's Fig. 2; one model per method and class count."""
    chosen: dict[tuple[str, int], ModelResult] = {}
    for model in models:
        chosen.setdefault((model.method, model.num_classes), model)
    ids = {key: _shown_ids(model) for key, model in chosen.items()}
    common = [i for i in _shown_ids(models[0]) if all(i in others for others in ids.values())]
    if not common:
        _warn("cam: no image is shown by every model, so there is no joint grid; use one data set and image_size")
        return
    methods = list(dict.fromkeys(model.method for model in models))
    columns = [
        Column(method, f"{count} classes", model.samples["cam/maps"][[ids[method, count].index(i) for i in common]])
        for (method, count), model in sorted(chosen.items(), key=lambda c: (methods.index(c[0][0]), -c[0][1]))
    ]
    rows = [_shown_ids(models[0]).index(i) for i in common]
    images, names = models[0].samples["cam/images"][rows], models[0].samples["cam/class_names"][rows]
    left_out = len(models) - len(chosen)
    note = f"the first of several models per column ({left_out} not shown)" if left_out else ""
    yield Artifact("cam/models.png", comparison_grid(images, [str(name) for name in names], columns, note))


def _shown_ids(model: ModelResult) -> list[int]:
    """Ids of the images with stored maps, in their order."""
    return model.samples["cam/image_ids"][: len(model.samples["cam/maps"])].tolist()


def _table(rows: Sequence[Sequence[object]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["metric", "first", "second", "mean_first", "mean_second", "second_minus_first", "ci95", "images"])
    writer.writerows(rows)
    return text.getvalue().encode()


def _slug(name: str) -> str:
    """Lower case, and nothing that a metric's name may not hold."""
    return re.sub(r"[^a-z0-9_.-]+", "_", name.lower())


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
