"""Features with planted truth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from evaluation import EvaluationContext, Features, Phase
from evaluation.features import FeatureCache, FeatureExtractor
from evaluation.metric import FeatureBatch, check_split


def clusters(
    num_classes: int, per_class: int, dim: int, *, spread: float, seed: int, centre_seed: int = 0, scale: float = 1.0
) -> Features:
    """Gaussian classes around random unit-variance centres; ``spread`` is the standard deviation within a class."""
    centres = np.random.default_rng(centre_seed).normal(size=(num_classes, dim))
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(num_classes), per_class))
    x = centres[labels] + spread * rng.normal(size=(len(labels), dim))
    return Features((scale * x).astype(np.float32), labels, tuple(f"class {c}" for c in range(num_classes)))


def with_labels(features: Features, labels: np.ndarray) -> Features:
    """The same images under other labels."""
    return Features(features.features, labels, features.class_names)


def context_of(splits: Mapping[str, Features], phase: Phase, seed: int = 0) -> EvaluationContext:
    """Context over given features; a split that is missing is a KeyError."""
    return EvaluationContext(splits.__getitem__, phase, seed)


def five_splits(num_classes: int = 6, per_class: int = 30, dim: int = 16, spread: float = 0.5) -> dict[str, Features]:
    """All splits of a small data set: base images, and two sets of other classes."""
    base = {
        name: clusters(num_classes, count, dim, spread=spread, seed=i)
        for i, (name, count) in enumerate({"train": per_class, "val": 10, "test": 12}.items())
    }
    unseen = {
        name: clusters(num_classes, per_class, dim, spread=spread, seed=10 + i, centre_seed=20 + i)
        for i, name in enumerate(("val_classes", "novel_classes"))
    }
    return base | unseen


class ImageSplits:
    """The five splits as small pictures: a bright square whose colour and place are the class's, on noise."""

    def __init__(self, num_classes: int = 6, per_class: int = 30, size: int = 32) -> None:
        self.size = size
        self.pixels: dict[str, np.ndarray] = {}
        self.labels: dict[str, np.ndarray] = {}
        counts = {"train": per_class, "val": 10, "test": 12, "val_classes": per_class, "novel_classes": per_class}
        for number, (name, count) in enumerate(counts.items()):
            group = 0 if number < 3 else number  # base classes share their look
            looks = np.random.default_rng(100 + group)
            colours = looks.integers(60, 255, (num_classes, 3, 1, 1))
            places = looks.integers(0, size // 2, (num_classes, 2))
            rng = np.random.default_rng(number)
            labels = rng.permutation(np.repeat(np.arange(num_classes), count))
            pixels = rng.integers(0, 60, (len(labels), 3, size, size))
            for i, label in enumerate(labels):
                y, x = places[label]
                pixels[i, :, y : y + size // 2, x : x + size // 2] = colours[label]
            self.pixels[name], self.labels[name] = pixels.astype(np.uint8), labels
        self.names = tuple(f"class {c}" for c in range(num_classes))

    def counts(self) -> dict[str, tuple[int, ...]]:
        """Images per class of every split."""
        return {split: tuple(np.bincount(labels).tolist()) for split, labels in self.labels.items()}


class PatchBackbone(nn.Module):
    """Random convolutions with stride 8 and BatchNorm; 16 features, and the map they are pooled from."""

    num_features = 16

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 2, stride=2)
        self.eval()

    @property
    def stages(self) -> list[nn.Module]:
        return [self.conv1, self.conv2]

    def forward_features(self, x: Tensor) -> Tensor:
        return self.conv2(self.norm(self.conv1(x)).relu()).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x).mean(dim=(2, 3))


def image_context(
    splits: ImageSplits, phase: Phase, seed: int = 0, backbone: nn.Module | None = None, asked: list[str] | None = None
) -> EvaluationContext:
    """Context with a backbone, pictures and augmented views (shifted and noisy pictures), as the commands make it.

    Args:
        splits: the pictures.
        phase: "val" or "test".
        seed: of the context and of the views.
        backbone: default: ``PatchBackbone``.
        asked: receives the name of every split whose plain features or views are read.
    """
    backbone = backbone or PatchBackbone()
    extractor = FeatureExtractor(backbone)
    asked = [] if asked is None else asked

    def extracted(split: str) -> Features:
        return Features(extractor(splits.pixels[split]), splits.labels[split], splits.names)

    def features(split: str) -> Features:
        asked.append(split)
        return extracted(split)

    def view_features(
        split: str, recipe: str, *, epoch: int = 0, shuffle: bool = False, batch_size: int = 256
    ) -> Iterator[FeatureBatch]:
        check_split(phase, split)
        asked.append(split)
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(splits.labels[split])) if shuffle else np.arange(len(splits.labels[split]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            shifted = np.roll(splits.pixels[split][rows], rng.integers(-3, 4), axis=3).astype(np.int64)
            pixels = (shifted + rng.integers(-9, 10, shifted.shape)).clip(0, 255).astype(np.uint8)
            yield FeatureBatch(extractor(pixels), splits.labels[split][rows], rows)

    def images(split: str, rows: Sequence[int], image_size: int = 0) -> np.ndarray:
        check_split(phase, split)
        assert image_size in (0, splits.size)
        return splits.pixels[split][np.asarray(rows, np.int64)]

    return EvaluationContext(
        FeatureCache(features),
        phase,
        seed,
        backbone=backbone,
        view_features=view_features,
        images=images,
        domains={"shapes": lambda split: extracted({"train": "train", "test": "test"}[split])},
        info={"method": "moco_v2", "num_classes": len(splits.names), "labels_used": False},
    )
