"""Reconstructions of several models beside each other, and their distances image by image (Zhao et al., Fig. 5, 6)."""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from evaluation.inversion_figures import Pair, PictureRow, picture_grid, scatter_figure
from evaluation.metric import Artifact, Metric, ModelResult, wilson_half_width
from evaluation.paired import paired_differences

if TYPE_CHECKING:
    from evaluation.inversion import InversionConfig

__all__ = ["compare"]

SHOWN = 24  # images of the joint grid
ALL_PAIRS_UP_TO = 3  # models
# What is compared image by image; feature_mse is in units of each backbone and cannot be.
QUANTITIES = ("lpips", "psnr", "ssim", "relative_feature_mse")

Pairs = Sequence[tuple[ModelResult, ModelResult]]


def compare(config: InversionConfig, models: Sequence[ModelResult]) -> Iterator[Metric | Artifact]:
    """Yield a grid originals x models, a scatter of the distances of pairs of models, and paired differences.

    Up to 3 models are compared pair by pair, more of them the first with each other one. Per pair and quantity:
    ``inversion/<quantity>/<a>_minus_<b>`` with the wider side of its 95 % bootstrap interval over the images, and below
    that name ``/p_value`` of the sign-flip test (see ``paired``). Per pair ``inversion/closer/<a>_than_<b>``: the
    percentage of images that a brings back closer than b, by LPIPS, or by SSIM where its weights were not given.

    Warns:
        RuntimeWarning: a model inverted other images than the first one and is left out.
    """
    models = _same_images([model for model in models if "inversion/reconstructions" in model.samples])
    if len(models) < 2:
        return
    yield Artifact("inversion/models.png", _grid(models))
    pairs = list(combinations(models, 2)) if len(models) <= ALL_PAIRS_UP_TO else [(models[0], m) for m in models[1:]]
    keys = _keys([model.name for model in models])
    label, drawn = _drawn(pairs)
    for (a, b), pair in zip(pairs, drawn, strict=True):
        n = len(pair.x)
        closer = pair.share_above
        half_width = 100 * wilson_half_width(round(closer / 100 * n), n)
        yield Metric(f"inversion/closer/{keys[a.name]}_than_{keys[b.name]}", closer, half_width, n)
    yield from _differences(pairs, keys)
    yield Artifact("inversion/scatter.png", scatter_figure(drawn, label))


def _same_images(models: Sequence[ModelResult]) -> list[ModelResult]:
    """The models that inverted the images of the first one."""
    same = [m for m in models if np.array_equal(m.samples["inversion/images"], models[0].samples["inversion/images"])]
    others = [model.name for model in models if model not in same]
    if others:
        warnings.warn(
            f"inversion: {', '.join(others)} inverted other images than {models[0].name} and cannot be compared with "
            "it; evaluate all models on the same data with the same num_images, image_size and seed.",
            RuntimeWarning,
            stacklevel=3,
        )
    return same


def _grid(models: Sequence[ModelResult]) -> bytes:
    """Originals, and below them what each model's features give."""
    first = models[0].samples
    rows = [PictureRow("original", first["inversion/images"][:SHOWN])]
    rows += [PictureRow(model.name, model.samples["inversion/reconstructions"][:SHOWN]) for model in models]
    names = [str(name) for name in first["inversion/class_names"][:SHOWN]]
    n = len(first["inversion/images"])
    return picture_grid(rows, names, "Feature inversion" + (f" (first {SHOWN} of {n} images)" if n > SHOWN else ""))


def _drawn(pairs: Pairs) -> tuple[str, list[Pair]]:
    """Name of the distance of the scatter, and its values; SSIM, a similarity, counts down from 1."""
    has_lpips = all("inversion/lpips" in model.samples for pair in pairs for model in pair)

    def distance(model: ModelResult) -> np.ndarray:
        return model.samples["inversion/lpips"] if has_lpips else 1 - model.samples["inversion/ssim"]

    drawn = [Pair(a.name, b.name, distance(a), distance(b)) for a, b in pairs]
    return ("LPIPS distance" if has_lpips else "1 − SSIM"), drawn


def _differences(pairs: Pairs, keys: dict[str, str]) -> Iterator[Metric | Artifact]:
    """Paired differences of every quantity that all models of the pairs have, then the table."""
    table: list[tuple[str, ...]] = [
        ("quantity", "a", "b", "mean_a", "mean_b", "a_minus_b", "low", "high", "p_value", "images")
    ]
    for quantity in QUANTITIES:
        name = f"inversion/{quantity}"
        known = [(a, b) for a, b in pairs if name in a.samples and name in b.samples]
        n = len(known[0][0].samples[name]) if known else 0
        if n < 2:
            continue  # one image has no spread
        found = paired_differences(np.stack([a.samples[name] - b.samples[name] for a, b in known]))
        for i, (a, b) in enumerate(known):
            mean, low, high, p_value = (float(x[i]) for x in (found.mean, found.low, found.high, found.p_value))
            full = f"{name}/{keys[a.name]}_minus_{keys[b.name]}"
            yield Metric(full, mean, max(high - mean, mean - low), n)
            yield Metric(f"{full}/p_value", p_value, None, n)
            means = (f"{model.samples[name].mean():.6g}" for model in (a, b))
            numbers = (f"{x:.6g}" for x in (mean, low, high, p_value))
            table.append((quantity, a.name, b.name, *means, *numbers, str(n)))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    yield Artifact("inversion/paired.csv", text.getvalue().encode())


def _keys(names: Sequence[str]) -> dict[str, str]:
    """Model name -> its part of a metric name: lower case letters, digits, dots and hyphens; unique."""
    keys: dict[str, str] = {}
    for name in names:
        key = plain = re.sub(r"[^a-z0-9.-]+", "_", name.lower()).strip("_") or "model"
        number = 1
        while key in keys.values():
            number += 1
            key = f"{plain}_{number}"
        keys[name] = key
    return keys
