"""Small backbones, pictures and contexts for tests of the class activation maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.cam import CamConfig, Classifier
from evaluation.features import FeatureExtractor
from evaluation.linear import LinearConfig
from evaluation.metric import Artifact, EvaluationContext, Features, Metric, Phase, Samples
from image_data.contracts import IMAGENET_MEAN, IMAGENET_STD
from methods.backbones import BasicBlock, LabBackbone, ResNet, ResNet9, Stem

QUICK = CamConfig(num_images=20, grid_images=4, classifier=LinearConfig(epochs=20))


class Pictures(NamedTuple):
    """One split: uint8 (N, 3, S, S), labels (N,)."""

    images: np.ndarray
    labels: np.ndarray


def model_context(
    backbone: nn.Module, splits: Mapping[str, Pictures], phase: Phase = "val", names: Sequence[str] = (), **more
) -> EvaluationContext:
    """Context whose features and images are those of given pictures."""
    extract = FeatureExtractor(backbone.eval(), "cpu")

    def features(split: str) -> Features:
        images, labels = splits[split]
        known = tuple(names) or tuple(f"class {c}" for c in range(int(labels.max()) + 1))
        return Features(extract(images), labels, known)

    def images(split: str, rows: Sequence[int], image_size: int = 0) -> np.ndarray:
        chosen = torch.from_numpy(splits[split].images[list(rows)])
        if image_size:
            chosen = F.interpolate(chosen.float(), size=(image_size, image_size), mode="nearest").byte()
        return chosen.numpy()

    return EvaluationContext(features, phase, backbone=backbone, images=images, **more)


def noise(num_classes: int = 4, per_class: int = 6, side: int = 32, seed: int = 0) -> Pictures:
    """Noise whose brightness depends on the class."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(num_classes), per_class))
    images = rng.integers(0, 120, (len(labels), 3, side, side)) + 30 * labels[:, None, None, None]
    return Pictures(images.clip(0, 255).astype(np.uint8), labels)


def noise_splits(**changes) -> dict[str, Pictures]:
    return {name: noise(**{"seed": i, **changes}) for i, name in enumerate(("train", "val", "test"))}


def small_resnet(stem: Stem = "small", in_channels: int = 3, seed: int = 0) -> ResNet:
    torch.manual_seed(seed)
    return ResNet(BasicBlock, (1, 1, 1, 1), stem, in_channels=in_channels, width=4).eval()


def small_resnet9() -> ResNet9:
    torch.manual_seed(0)
    return ResNet9(width=4).eval()


def small_lab() -> LabBackbone:
    return LabBackbone(small_resnet(in_channels=1), small_resnet(in_channels=2, seed=1)).eval()


BACKBONES: list[Callable[[], Any]] = [small_resnet, small_resnet9, small_lab]


def results(outputs) -> tuple[dict[str, Metric], dict[str, np.ndarray], dict[str, bytes]]:
    found = list(outputs)
    return (
        {m.name: m for m in found if isinstance(m, Metric)},
        {s.name: s.values for s in found if isinstance(s, Samples)},
        {a.name: a.data for a in found if isinstance(a, Artifact)},
    )


def normalized(images: np.ndarray) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (torch.from_numpy(images).float() / 255 - mean) / std


def random_classifier(num_classes: int, dim: int, positive: bool = False) -> Classifier:
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(num_classes, dim, generator=g, dtype=torch.float64)
    return Classifier(weight.abs() if positive else weight, torch.randn(num_classes, generator=g, dtype=torch.float64))
