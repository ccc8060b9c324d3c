"""From images to frozen features: one pass of the backbone per split, shared by all frozen tasks.

The backbone runs in eval mode (BatchNorm uses its running statistics), without gradients, on one view per image; its
pooled output is kept as it is. Memory is one batch of images and the N x D features. ``FeatureExtractor`` is the part
that works on a batch alone; ``assemble_features`` is the part that turns batches from anywhere (this process or a pool
of workers, in any order) into the record of a split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from evaluation.metric import FeatureBatch, Features
from image_data.contracts import IMAGENET_MEAN, IMAGENET_STD, ImageBatch

__all__ = [
    "FeatureCache",
    "FeatureExtractor",
    "assemble_features",
    "extract_features",
    "feature_batches",
    "frozen",
]


class FeatureExtractor:
    """Callable that maps a uint8 batch to features; the backbone must be in eval mode (see ``frozen``)."""

    def __init__(self, backbone: nn.Module, device: torch.device | str = "cpu", autocast: bool = False) -> None:
        """Move the backbone to a device and keep it.

        Args:
            backbone: maps normalised images (B, 3, H, W) to pooled features (B, D).
            device: where to compute; the backbone stays there.
            autocast: bfloat16 autocast; features are returned as float32 either way.
        """
        self.backbone = backbone.to(device)
        self.device = torch.device(device)
        self.autocast = autocast
        self.mean = torch.tensor(IMAGENET_MEAN, device=device).mul_(255).view(1, 3, 1, 1)
        self.inverse_std = torch.tensor(IMAGENET_STD, device=device).mul_(255).reciprocal_().view(1, 3, 1, 1)

    @torch.no_grad()  # not inference_mode: a module may keep tensors of its forward pass and train on
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features, float32 (B, D), of RGB images, uint8 (B, 3, H, W).

        Raises:
            ValueError: images of another type or shape, or a backbone that does not return (B, D).
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are {images.dtype} {images.shape}; expected uint8 (B, 3, H, W), RGB.")
        writable = images if images.flags.writeable else images.copy()  # arrays from Ray's object store are read-only
        x = torch.from_numpy(writable).to(self.device, non_blocking=True)
        # Only the input is converted: changing the weights' layout would change the rest of a training run.
        x = ((x - self.mean) * self.inverse_std).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            y = self.backbone(x)
        if y.ndim != 2 or len(y) != len(images):
            raise ValueError(f"the backbone returned shape {tuple(y.shape)} for {len(images)} images; expected (B, D).")
        return y.float().cpu().numpy()


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """Eval mode inside the block; afterwards every submodule has its own training flag again."""
    flags = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield module
    finally:
        for part, training in flags.items():
            part.training = training


def extract_features(
    backbone: nn.Module,
    batches: Iterable[ImageBatch],
    class_names: tuple[str, ...],
    device: torch.device | str = "cpu",
    autocast: bool = False,
) -> Features:
    """One pass over a split in this process.

    Args:
        backbone: its modes are restored afterwards; its statistics and weights do not change.
        batches: one uint8 view per image; every image of the split once, in any order.
        class_names: names in label order.
        device: where to compute; the backbone is moved there.
        autocast: bfloat16 autocast.
    """
    return assemble_features(
        ((b.features, b.labels, b.index) for b in feature_batches(backbone, batches, device, autocast)), class_names
    )


def feature_batches(
    backbone: nn.Module, batches: Iterable[ImageBatch], device: torch.device | str = "cpu", autocast: bool = False
) -> Iterator[FeatureBatch]:
    """The features of each batch's first view, in eval mode; the backbone's own modes are back after the last batch."""
    with frozen(backbone):
        extractor = FeatureExtractor(backbone, device, autocast)
        for batch in batches:
            yield FeatureBatch(extractor(batch.views[0]), batch.labels, batch.index)


def assemble_features(
    parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], class_names: tuple[str, ...]
) -> Features:
    """Features of a split in the order of the images' index, which makes task lists equal for all models.

    Args:
        parts: (features (B, D), labels (B,), index (B,)) per batch, in any order.
        class_names: names in label order.

    Raises:
        ValueError: no batch at all, an image that was delivered twice, or a label without a name.
    """
    columns = list(zip(*parts, strict=True))
    if not columns:
        raise ValueError("the split delivered no images; check that it exists and is not empty.")
    features, labels, index = (np.concatenate(column) for column in columns)
    order = np.argsort(index, kind="stable")
    repeated = int((np.diff(index[order]) == 0).sum())
    if repeated:
        raise ValueError(
            f"{repeated:,} of {len(index):,} images were delivered twice (equal index); a feature pass must not pad or "
            "repeat its split."
        )
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}, but there are {len(class_names)} class names."
        )
    return Features(
        np.ascontiguousarray(features[order], dtype=np.float32), labels[order].astype(np.int64), tuple(class_names)
    )


class FeatureCache:
    """Calls ``extract`` once per split and keeps the result; contexts of both phases can share one cache."""

    def __init__(self, extract: Callable[[str], Features]) -> None:
        self.extract = extract
        self.cached: dict[str, Features] = {}

    def __call__(self, split: str) -> Features:
        if split not in self.cached:
            self.cached[split] = self.extract(split)
        return self.cached[split]
