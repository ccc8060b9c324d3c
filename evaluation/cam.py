"""Class activation maps of a frozen backbone: what a linear classifier on its features looks at.

CAM_c(u, v) = sum_k w_ck F_k(u, v) (Zhou et al., CVPR 2016; Sun et al., AAAI 2022, Fig. 2), with F the backbone's last
feature map and w the weights of a linear classifier after global average pooling; bilinear upsampling to the image,
then min-max to [0, 1]. A constant map becomes 0.

The classifier is fitted here, for every model alike, on the frozen pooled features of "train" with the solver and the
choice of learning rate of the linear task. Sun et al. show supervised models and CAMtrast with the classifier that
was trained along; a backbone that transfers has none, an unsupervised one never had, and one rule for all is the fair
comparison. The features are standardised for the fit; the scale is folded into the weights, so the map is one of raw
features. Softmax leaves the weights open up to a vector common to all classes; fitted from zero they sum to zero over
the classes, so the map is evidence for its class against the average class. The bias shifts a map evenly and min-max
takes it out again.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from evaluation import linear
from evaluation.cam_comparison import compare
from evaluation.cam_figures import model_grid
from evaluation.cam_statistics import STATISTICS, TOP_SHARE, map_statistics
from evaluation.linear import LinearConfig, Probes, RateSearch, stratified_split
from evaluation.metric import (
    Artifact,
    ClassCounts,
    EvaluationContext,
    Features,
    Metric,
    Output,
    Phase,
    Samples,
    accuracy_metric,
    check_image_splits,
    get_features,
    mean_interval,
)
from image_data.contracts import IMAGENET_MEAN, IMAGENET_STD
from image_data.splits import seeded_order
from methods.cam import class_activation_map, normalized_mask

__all__ = [
    "CamConfig",
    "Classifier",
    "activation_maps",
    "check",
    "choose_rows",
    "compare",
    "evaluate",
    "fit_classifier",
    "metric_names",
    "protocol",
    "splits",
]

BATCH = 64  # images per forward pass
READ = 1024  # images per call of the reader, which may stream the whole split each time
# Pooled features may have been computed in bfloat16 (8 bits through some 50 layers); another image differs by far more.
SAME_FEATURES = 0.05


@dataclass(frozen=True)
class CamConfig:
    """Class activation maps.

    Attributes:
        num_images: images of the scored split behind the numbers; all of them where the split has fewer.
        grid_images: the first of these, of different classes where there are enough, are shown.
        explain: the class whose map is drawn: the image's "label", or the classifier's "prediction".
        image_size: side of the images in pixels; 0 is the evaluation's own, at which the classifier is fitted.
        classifier: how the linear classifier is fitted; the fields of the linear task.
    """

    num_images: int = 200
    grid_images: int = 6
    explain: Literal["label", "prediction"] = "label"
    image_size: int = 0
    classifier: LinearConfig = field(default_factory=LinearConfig)


class Classifier(NamedTuple):
    """Linear layer on raw pooled features.

    Attributes:
        weight: (K, C).
        bias: (K,).
    """

    weight: Tensor
    bias: Tensor


def metric_names(config: CamConfig) -> tuple[str, ...]:
    """Names of the main metrics; yielded too: ``cam/classifier_top1``, ``constant_maps`` (percent), ``map_side``."""
    return tuple(STATISTICS)


def splits(config: CamConfig, phase: Phase) -> tuple[str, ...]:
    """Splits that the evaluation reads."""
    return linear.splits(config.classifier, phase)


def protocol(config: CamConfig, phase: Phase) -> dict:
    """Everything needed to reproduce the numbers, as JSON data."""
    return {
        "name": "class activation maps of a linear classifier on frozen features",
        "source": "Zhou et al., CVPR 2016; Sun et al., AAAI 2022, Fig. 2; the three numbers are ours",
        "phase": phase,
        "split": phase,
        "features": (
            f"sum_k w_ck F_k(u, v), c the image's {config.explain}, F the last feature map in eval mode, no bias, no "
            "ReLU; upsampled bilinearly to the image, then min-max to [0, 1]; a constant map becomes 0"
        ),
        "classifier": (
            "fitted on the frozen pooled features of train for every model alike (Sun et al. use the one trained with "
            "a supervised backbone, which a transferred backbone has not); standardisation folded into w"
        ),
        "classifier_fit": linear.protocol(config.classifier, phase),
        "images": (
            f"{config.num_images} of split {phase} (all where it has fewer), class by class in the seeded order in "
            "which nested subsets draw classes; the same for all models with the same classes"
        ),
        "metric": {
            "cam/area": "share of the pixels above 0.5",
            "cam/spatial_entropy": "-sum p ln p / ln(number of pixels), p = map / sum: 0 one pixel, 1 evenly spread",
            "cam/mass_concentration": f"share of the map's sum in its top {100 * TOP_SHARE:g} % of pixels (rounded up)",
            "cam/constant_maps": "percent of the maps that are constant; they count as evenly spread, with area 0",
            "cam/map_side": "height of the feature map; the numbers above compare between equal ones only",
            "cam/classifier_top1": f"top-1 in percent of the classifier on all of split {phase}",
        },
        "interval": "1.96 s / sqrt(n) over images (Wilson for top-1), not over pretraining seeds",
        "config": asdict(config),
    }


def check(config: CamConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError where the options or the data do not allow the maps; call it before any long work."""
    if config.num_images < 2 or not 1 <= config.grid_images <= config.num_images or config.image_size < 0:
        raise ValueError(
            f"cam got num_images={config.num_images}, grid_images={config.grid_images}, image_size="
            f"{config.image_size}; allowed: num_images at least 2, grid_images 1 to num_images, image_size in pixels "
            "or 0 for the evaluation's own."
        )
    if config.explain not in ("label", "prediction"):
        raise ValueError(f"cam explain={config.explain!r}; choose label or prediction.")
    check_image_splits("cam", class_counts, splits(config, phase))
    if sum(count > 0 for count in class_counts["train"]) < 2:
        raise ValueError(
            "cam explains a linear classifier, which needs at least 2 classes with images in split 'train'; use data "
            "with more classes."
        )
    linear.check(config.classifier, phase, class_counts)


def evaluate(config: CamConfig, context: EvaluationContext) -> Iterator[Output]:
    """Yield the classifier's top-1, the mean of each number over the images, a grid, and the values behind them."""
    if context.backbone is None or context.images is None:
        raise ValueError("cam looks inside the backbone: the evaluation context needs backbone and images.")
    split = context.phase
    yield Metric("cam/map_side", float(_map_side(config, context)))
    found = {name: get_features(context, name) for name in splits(config, context.phase)}
    check(config, context.phase, {name: features.class_counts for name, features in found.items()})
    classifier, top1 = fit_classifier(config.classifier, found, context)
    yield top1
    rows = choose_rows(found[split], config.num_images, context.seed)
    shown = rows[: config.grid_images]
    values: dict[str, list[np.ndarray]] = {name: [] for name in (*STATISTICS, "constant", "cam/image_ids")}
    grid: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for start, images, maps, is_constant, classes in _explained(config, context, classifier, found[split], rows):
        for name, numbers in map_statistics(maps).items():
            values[name].append(numbers.numpy())
        values["constant"].append(is_constant.cpu().numpy())
        values["cam/image_ids"].append(_image_ids(images))
        if start < len(shown):
            wanted = slice(0, len(shown) - start)
            bytes_of_maps = (255 * maps[wanted]).round().byte().cpu().numpy()
            grid.append((images[wanted].copy(), bytes_of_maps, classes[wanted]))  # a view would keep its whole block
    merged = {name: np.concatenate(parts) for name, parts in values.items()}
    yield from _numbers(merged)
    yield from _pictures(grid, found[split], shown, config, context)


def _numbers(values: dict[str, np.ndarray]) -> Iterator[Metric | Samples]:
    """Means with intervals, and the values per image."""
    n = len(values["constant"])
    num_constant = int(values["constant"].sum())
    if num_constant:
        warnings.warn(
            f"cam: {num_constant:,} of {n:,} maps are constant: they point nowhere and count as evenly spread",
            RuntimeWarning,
            stacklevel=2,
        )
    for name in STATISTICS:
        yield Metric(name, *(mean_interval(values[name]) if n > 1 else (float(values[name][0]), None)), n)
        yield Samples(name, values[name])
    yield Metric("cam/constant_maps", 100 * num_constant / n, None, n)
    yield Samples("cam/image_ids", values["cam/image_ids"])


def _pictures(
    grid: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
    features: Features,
    shown: np.ndarray,
    config: CamConfig,
    context: EvaluationContext,
) -> Iterator[Artifact | Samples]:
    """The grid of this model, and what a grid of several models needs."""
    images, maps, classes = (np.concatenate(parts) for parts in zip(*grid, strict=True))
    names = [features.class_names[label] for label in features.labels[shown]]
    explained = [features.class_names[c] for c in classes] if config.explain == "prediction" else None
    yield Samples("cam/images", images)
    yield Samples("cam/maps", maps)
    yield Samples("cam/class_names", np.array(names))
    title = str(context.info.get("method", "")) or "class activation maps"
    if "num_classes" in context.info:
        title += f", pretrained on {context.info['num_classes']} classes"
    yield Artifact("cam/grid.png", model_grid(images, maps, names, title, explained))


def fit_classifier(
    config: LinearConfig, found: dict[str, Features], context: EvaluationContext
) -> tuple[Classifier, Metric]:
    """The linear task's classifier, and its top-1 on the scored split.

    Args:
        config: how it is fitted.
        found: features of the splits that the linear task reads.
        context: phase, seed and device.
    """
    train, val, scored = found["train"], found["val"], found[context.phase]
    x, y = train.features, train.labels
    search = RateSearch(config, len(train.class_names), context)
    if context.phase == "val":
        fit, held_out = stratified_split(y, config.holdout, np.random.default_rng(context.seed))
        rate, _ = search.best(x[fit], y[fit], x[held_out], y[held_out])
        probes = search.fit(x, y, (rate,))
    else:
        _, probes = search.best(x, y, val.features, val.labels)
    top1 = accuracy_metric("cam/classifier_top1", probes.predict(scored.features)[:, 0], scored.labels)
    return _on_raw_features(probes), top1


def _on_raw_features(probes: Probes) -> Classifier:
    """w (x - mean) scale + b = (w scale) x + (b - w scale mean), in float64."""
    weight_KC = (probes.weight[:, 0].double() * probes.scale.double()[:, None]).T
    bias_K = probes.bias[0].double() - weight_KC @ probes.mean.double()
    return Classifier(weight_KC.contiguous(), bias_K)


def choose_rows(features: Features, count: int, seed: int) -> np.ndarray:
    """Rows of a split, at most ``count``: an image of each class, then a second one of each, and so on.

    Classes come in the order in which nested subsets draw them (``image_data.subset``, same seed), and the images of a
    class in an order that depends on its name and its number of images alone. So models that were pretrained on 64, 32
    and 16 classes of one data set share their first images.
    """
    class_rank = np.empty(len(features.class_names), np.int64)
    class_rank[seeded_order(features.class_names, seed, "subset_classes")] = np.arange(len(class_rank))
    image_rank = np.empty(len(features.labels), np.int64)
    for label in np.unique(features.labels):
        rows = np.flatnonzero(features.labels == label)
        names = [f"{features.class_names[label]}\0{i}" for i in range(len(rows))]
        image_rank[rows[seeded_order(names, seed, "cam_images")]] = np.arange(len(rows))
    return np.lexsort((class_rank[features.labels], image_rank))[:count]


def activation_maps(
    backbone: nn.Module, images: np.ndarray, classifier: Classifier, classes: np.ndarray | None, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maps of one batch.

    Args:
        backbone: in eval mode, on the device.
        images: uint8 (B, 3, S, S), RGB.
        classifier: on raw pooled features.
        classes: int64 (B,), the classes to explain; None for those that the classifier predicts.
        device: where to compute.

    Returns:
        maps in [0, 1] (B, S, S); bool (B,), constant maps; the explained classes (B,); pooled features (B, C).

    Raises:
        ValueError: the feature map is not finite.
    """
    features_BChw = _feature_map(backbone, images, device)
    if not torch.isfinite(features_BChw).all():
        raise ValueError(
            "cam: the last feature map contains NaN or infinity: pretraining diverged or the checkpoint is damaged. "
            "Look at the pretraining loss, lower the learning rate, or evaluate an earlier checkpoint."
        )
    features_BChw = features_BChw.double()  # scores of several thousand channels cancel
    pooled_BC = features_BChw.mean(dim=(2, 3))
    if classes is None:
        explained_B = (pooled_BC @ classifier.weight.T + classifier.bias).argmax(dim=1)
    else:
        explained_B = torch.from_numpy(classes).to(features_BChw.device)
    cams_Bhw = class_activation_map(features_BChw, classifier.weight, explained_B)
    maps_B1HW, is_constant = normalized_mask(cams_Bhw, (images.shape[2], images.shape[3]))
    return maps_B1HW[:, 0], is_constant, explained_B, pooled_BC


@torch.no_grad()
def _feature_map(backbone: nn.Module, images: np.ndarray, device: str) -> Tensor:
    """Last feature map (B, C, h, w) of uint8 images (B, 3, S, S)."""
    mean, std = (torch.tensor(v, device=device).mul_(255).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    writable = images if images.flags.writeable else images.copy()  # arrays from Ray's object store are read-only
    x = ((torch.from_numpy(writable).to(device) - mean) / std).contiguous(memory_format=torch.channels_last)
    return backbone.forward_features(x)  # type: ignore[operator]  # of the Backbone protocol


def _explained(
    config: CamConfig, context: EvaluationContext, classifier: Classifier, features: Features, rows: np.ndarray
) -> Iterator[tuple[int, np.ndarray, Tensor, Tensor, np.ndarray]]:
    """Batches of (position of the first in ``rows``, images, maps, which are constant, explained classes)."""
    assert context.backbone is not None
    assert context.images is not None
    for first in range(0, len(rows), READ):
        block = context.images(context.phase, rows[first : first + READ].tolist(), config.image_size)
        for start in range(0, len(block), BATCH):
            images = block[start : start + BATCH]
            own = rows[first + start : first + start + len(images)]
            classes = features.labels[own] if config.explain == "label" else None
            maps, is_constant, explained, pooled = activation_maps(
                context.backbone, images, classifier, classes, context.device
            )
            if config.image_size == 0:
                _check_same_features(pooled.cpu().numpy(), features.features[own])
            yield first + start, images, maps, is_constant, explained.cpu().numpy()


def _check_same_features(pooled: np.ndarray, features: np.ndarray) -> None:
    """ValueError unless the maps' averages are the pooled features, on which the whole idea of a CAM rests."""
    difference = float(np.linalg.norm(pooled - features) / max(np.linalg.norm(features), 1e-12))
    if difference > SAME_FEATURES:
        raise ValueError(
            f"cam: the average of the last feature map differs from the pooled features by {100 * difference:.0f} % of "
            "their norm, so the classifier's weights do not apply to the map. The backbone's forward must be the "
            "global average of its forward_features, and features and images must be those of the same split."
        )


def _map_side(config: CamConfig, context: EvaluationContext) -> int:
    """Height of the last map; ValueError where it is a single pixel. One image, before any long work."""
    assert context.backbone is not None
    assert context.images is not None
    image = context.images(context.phase, [0], config.image_size)
    shape = _feature_map(context.backbone, image, context.device).shape[2:]
    if shape.numel() > 1:
        return shape[0]
    larger = side = image.shape[2]
    while larger < 16 * side:
        larger *= 2
        blank = np.zeros((1, 3, larger, larger), np.uint8)
        if _feature_map(context.backbone, blank, context.device).shape[2:].numel() > 1:
            break
    raise ValueError(
        f"cam: the backbone's last feature map is 1x1 for images of {side} px, so a class activation map cannot point "
        f"anywhere. Use a larger image_size for cam, e.g. {larger}, or a backbone with a small stem."
    )


def _image_ids(images: np.ndarray) -> np.ndarray:
    """int64 (B,): equal for equal pictures, by which images of different models are matched."""
    digests = [hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images]
    return np.frombuffer(b"".join(digests), dtype=np.int64)
