"""What a worker trains for segmentation: the recipes, the masks of a table, and the network with its loss."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.fine_tuning import Draw, Freezing, Predictions, Schedule, scored_table, train_table
from evaluation.fine_tuning.normalize import share_of_mean
from evaluation.fine_tuning_labels import label_subset
from evaluation.metric import Phase
from evaluation.segmentation.augment import View, augment, normalize, resize_short_side
from evaluation.segmentation.deeplab import DeepLab, HeadKind
from evaluation.segmentation.metric import IGNORED, confusion_matrix
from image_data.contracts import DataError
from image_data.prepared import PreparedData
from image_data.tables import ImageTable

__all__ = [
    "AUXILIARY_WEIGHT",
    "EXAMPLES",
    "RECIPES",
    "Recipe",
    "SegmentationProblem",
    "example_rows",
    "example_size",
    "read_classes",
    "read_mask",
]

AUXILIARY_WEIGHT = 0.4  # of the auxiliary loss (mmsegmentation)
EXAMPLES = 6  # scored images whose predicted maps are kept for a picture
EXAMPLE_SIDE = 160  # pixels, longest short side of such a map
BATCH_PIXELS = 1 << 18  # of images that are scored at once: 64 of 64 px, one of Cityscapes


@dataclass(frozen=True)
class Recipe:
    """The settings of a paper.

    Attributes:
        schedule: iterations, batch size, optimiser, learning rate.
        head: fcn (maps of all strides from 4 on), v3 (ASPP), v3plus (ASPP and a decoder with an early map).
        output_stride: largest stride of the last map; strides beyond are replaced by dilation.
        width: channels in the head.
        rates: dilations of ASPP.
        dropout: before the classifier.
        auxiliary_width: channels of an FCN head on the map before the last stage; 0 for none.
        crop: (height, width) of a training crop as shares of the short side of the images.
        scale: range of the random scale.
        max_class_share: of one class in a crop, see ``augment.View``.
        distort: photometric distortion.
        backbone_lr_scale: learning rate of the backbone as a share of the head's.
        batchnorm_momentum: of the backbone's running statistics; 0 keeps the backbone's own.
        source: where the settings are from.
    """

    schedule: Schedule
    head: HeadKind
    output_stride: int
    width: int
    rates: tuple[int, ...] = ()
    dropout: float = 0.1
    auxiliary_width: int = 0
    crop: tuple[float, float] = (1.0, 1.0)
    scale: tuple[float, float] = (0.5, 2.0)
    max_class_share: float = 1.0
    distort: bool = False
    backbone_lr_scale: float = 1.0
    batchnorm_momentum: float = 0.0
    source: str = ""


RECIPES: dict[str, Recipe] = {
    "rendered": Recipe(
        # From random weights, ResNet-9 with the ImageNet stem, 1,080 images of 64 px: mIoU 29 (SGD 0.1: 25).
        Schedule(300, 16, 2e-3, optimizer="adam", weight_decay=1e-4, decay="poly", min_learning_rate=2e-5),
        head="fcn",
        output_stride=32,
        width=128,
        scale=(0.8, 1.25),
        source="ours, for small images; pixel accuracy as in Newell & Deng, CVPR 2020",
    ),
    "deeplab_v3": Recipe(
        Schedule(40_000, 8, 0.01, weight_decay=5e-4, decay="poly", min_learning_rate=1e-4),
        head="v3",
        output_stride=8,
        width=512,
        rates=(1, 12, 24, 36),
        auxiliary_width=256,
        crop=(0.5, 1.0),  # 512 x 1024 of Cityscapes' 1024 x 2048
        max_class_share=0.75,
        distort=True,
        source="Zhao et al., ICLR 2021; what it leaves open as in open-mmlab/mmsegmentation: configs/_base_",
    ),
    "deeplab_v3plus": Recipe(
        Schedule(30_000, 8, 0.01, weight_decay=1e-4, decay="poly", min_learning_rate=1e-6),
        head="v3plus",
        output_stride=16,
        width=256,
        rates=(1, 6, 12, 18),
        crop=(0.75, 0.75),  # 768 x 768
        backbone_lr_scale=0.1,
        batchnorm_momentum=0.01,
        source=(
            "Sun et al., AAAI 2022, supplement; what it leaves open as in VainF/DeepLabV3Plus-Pytorch: main.py, "
            "network/_deeplab.py"
        ),
    ),
}


def read_classes(table: ImageTable, source: str) -> tuple[str, ...]:
    """Names of the classes in the masks, by value.

    Args:
        table: images with a column ``mask``; where a column ``mask_kind`` says "cityscapes", its values are train ids,
            else 0 is the background and i + 1 the i-th coarse class (rendered data).
        source: the data, for errors.

    Raises:
        DataError: there are no masks, or nothing says what they mean.
    """
    if "mask" not in table.columns:
        raise DataError(
            f"segmentation needs a mask for every image (target column 'mask'), but {source} has only "
            f"{', '.join(table.columns)}. Use rendered: or cityscapes: data."
        )
    kinds = set(table.column("mask_kind")) if "mask_kind" in table.columns else set()
    if kinds == {"cityscapes"}:
        from image_data.layouts.cityscapes import CITYSCAPES_CLASSES

        return tuple(CITYSCAPES_CLASSES)
    if kinds:
        raise DataError(
            f"{source} has masks of kind {', '.join(sorted(map(str, kinds)))}; segmentation knows 'cityscapes' (train "
            "ids), and masks without a kind whose values are the coarse class + 1."
        )
    if not table.coarse_names:
        raise DataError(
            f"the masks of {source} have no class names: there is neither a column 'mask_kind' nor are there coarse "
            "classes. Use rendered: or cityscapes: data."
        )
    return ("background", *table.coarse_names)


def read_mask(table: ImageTable, row: int, num_classes: int) -> np.ndarray:
    """The mask of an image, uint8 (H, W): classes or ``IGNORED``.

    Raises:
        DataError: not an 8-bit PNG, another size than the image, or a value without a class; the image is named.
    """
    name = str(table.value(row, "name"))
    try:
        with Image.open(io.BytesIO(table.value(row, "mask")), formats=("PNG",)) as picture:
            if picture.mode not in ("L", "P"):
                raise DataError(f"the mask of {name} has mode {picture.mode}; it must be 8-bit gray or palette.")
            mask = np.asarray(picture)
    except (OSError, SyntaxError, TypeError) as error:
        raise DataError(f"the mask of {name} is not a readable PNG: {error}") from error
    size = (table.value(row, "height"), table.value(row, "width"))
    if mask.shape != size:
        raise DataError(
            f"the mask of {name} has {mask.shape[1]} x {mask.shape[0]} pixels, its image {size[1]} x {size[0]}; they "
            "must be equal."
        )
    unknown = np.flatnonzero(np.bincount(mask.ravel(), minlength=256)[num_classes:IGNORED]) + num_classes
    if len(unknown):
        raise DataError(
            f"the mask of {name} holds {', '.join(map(str, unknown[:5]))}; the {num_classes} classes are 0 to "
            f"{num_classes - 1}, and {IGNORED} is ignored. Correct the mask (for Cityscapes: train ids, not label ids)."
        )
    return mask


def example_rows(num_scored: int) -> np.ndarray:
    """Rows of the scored images that are drawn, int64 (<= EXAMPLES,), evenly spread."""
    return np.unique(np.linspace(0, num_scored - 1, EXAMPLES).round().astype(np.int64))


def example_size(table: ImageTable) -> tuple[int, int]:
    """(height, width) at which examples are drawn: that of the first image, made smaller where it is large."""
    height, width = table.value(0, "height"), table.value(0, "width")
    factor = min(1.0, EXAMPLE_SIDE / min(height, width))
    return round(height * factor), round(width * factor)


@dataclass(frozen=True)
class SegmentationProblem:
    """Segmentation as ``evaluation.fine_tuning.Problem``.

    Attributes:
        recipe: network and training views; its schedule is not used.
        schedule: see ``Problem``.
        image_size: short side of the images in pixels; 0 keeps the stored size.
        num_labels: training images, a seeded subset; 0 for all.
        evaluate_at: see ``Problem``.
        freezing: see ``Problem``.
    """

    recipe: Recipe
    schedule: Schedule
    image_size: int = 0
    num_labels: int = 0
    evaluate_at: tuple[int, ...] = ()
    freezing: Freezing = Freezing()  # noqa: RUF009

    def build(self, backbone: Any, data: PreparedData, phase: Phase, seed: int, device: torch.device) -> _Trainee:
        """The network around a backbone, and its data."""
        return _Trainee(self, backbone, data, phase, seed, device)


class _Network(nn.Module):
    """Losses of a batch."""

    def __init__(self, deeplab: DeepLab, device: torch.device) -> None:
        super().__init__()
        self.deeplab, self.device = deeplab, device

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images, masks = batch["images"].to(self.device), batch["masks"].to(self.device)
        logits, auxiliary = self.deeplab(images)
        losses = {"segmentation": _cross_entropy(logits, masks)}
        if auxiliary is not None:
            losses["auxiliary"] = AUXILIARY_WEIGHT * _cross_entropy(auxiliary, masks)
        return losses


def _cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean over the labelled pixels of the global batch; logits are resized to the masks.

    Args:
        logits: (B, C, h, w).
        masks: uint8 (B, H, W).
    """
    full = F.interpolate(logits, size=masks.shape[1:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(full, masks.long(), ignore_index=IGNORED, reduction="sum")
    return share_of_mean(total, (masks != IGNORED).sum())


class _Trainee:
    """See ``evaluation.fine_tuning.Trainee``."""

    def __init__(
        self, problem: SegmentationProblem, backbone: Any, data: PreparedData, phase: Phase, seed: int, device: Any
    ) -> None:
        self._table, self._scored = train_table(data, phase), scored_table(data, phase)
        self._problem, recipe = problem, problem.recipe
        self._num_classes = len(read_classes(self._table, " ".join(data.source)))
        strata = self._table.column("coarse") if self._table.coarse_names else self._table.labels
        self._rows = label_subset(np.asarray(strata), problem.num_labels, seed)
        self.num_images, self.num_scored = len(self._rows), self._scored.num_images
        self._view = _view(problem, self._table)
        _set_batchnorm_momentum(backbone, recipe.batchnorm_momentum)
        deeplab = DeepLab(
            backbone,
            self._num_classes,
            head=recipe.head,
            output_stride=recipe.output_stride,
            width=recipe.width,
            rates=recipe.rates,
            dropout=recipe.dropout,
            auxiliary_width=recipe.auxiliary_width,
        )
        self.model = _Network(deeplab, device)

    def load(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Augmented images, float32 (B, 3, h, w), and masks, uint8 (B, h, w)."""
        views = []
        for draw in draws:
            row = int(self._rows[draw.row])
            mask = read_mask(self._table, row, self._num_classes)
            views.append(augment(self._table.image(row), mask, self._view, draw.rng))
        images, masks = zip(*views, strict=True)
        return {"images": torch.from_numpy(np.stack(images)), "masks": torch.from_numpy(np.stack(masks))}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Backbone and heads."""
        deeplab = self.model.deeplab
        heads = [module for module in (deeplab.head, deeplab.auxiliary) if module is not None]
        groups = [
            {
                "params": [p for p in deeplab.backbone.parameters() if p.requires_grad],
                "lr_scale": self._problem.recipe.backbone_lr_scale,
            },
            {"params": [p for head in heads for p in head.parameters()]},
        ]
        return [group for group in groups if group["params"]]

    def before_predict(self, batches: Iterator[Any]) -> None:
        """Nothing: running statistics are used as they are, as in the papers' code."""

    def predict(self, rows: Sequence[int]) -> Predictions:
        """Whole images at one scale.

        Returns:
            confusion: int64 (n, C, C), at the resolution of the masks, rows are the truth.
            output_pixels: int64 (n, 2), right and scored pixels at the resolution of the network's output, the masks
                brought there by their nearest pixel.
            examples: uint8 (m, h, w), predicted maps of those ``example_rows`` that are among the rows.
        """
        wanted = set(example_rows(self.num_scored).tolist())
        size = example_size(self._scored)
        confusion = np.zeros((len(rows), self._num_classes, self._num_classes), np.int64)
        output_pixels, examples, done = np.zeros((len(rows), 2), np.int64), [], 0
        for images, masks in self._batches(rows):
            logits, _ = self.model.deeplab(images.to(self.model.device))
            for i, mask in enumerate(masks.to(logits.device)):
                predicted = _full_size(logits[i : i + 1], mask.shape)
                confusion[done] = confusion_matrix(mask, predicted, self._num_classes).cpu().numpy()
                output_pixels[done] = _output_pixels(logits[i], mask)
                if rows[done] in wanted:
                    examples.append(_resize_nearest(predicted, size).to(torch.uint8).cpu().numpy())
                done += 1
        kept = np.stack(examples) if examples else np.zeros((0, *size), np.uint8)
        return {"confusion": confusion, "output_pixels": output_pixels, "examples": kept}

    def _batches(self, rows: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Runs of images that have the same size and fit together: images (B, 3, h, w), masks (B, H, W)."""
        images: list[np.ndarray] = []
        masks: list[np.ndarray] = []

        def batch() -> tuple[Tensor, Tensor]:
            return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks))

        for row in rows:
            mask = read_mask(self._scored, row, self._num_classes)
            image = normalize(resize_short_side(self._scored.image(row), self._problem.image_size))
            is_full = bool(images) and (len(images) + 1) * image[0].size > BATCH_PIXELS
            if is_full or (images and (image.shape, mask.shape) != (images[0].shape, masks[0].shape)):
                yield batch()
                images, masks = [], []
            images.append(image)
            masks.append(mask)
        if images:
            yield batch()


def _view(problem: SegmentationProblem, table: ImageTable) -> View:
    """The crop in pixels, from the short side of the images: the given one, or that of the first image."""
    short = problem.image_size or min(table.value(0, "height"), table.value(0, "width"))
    recipe = problem.recipe
    size = (max(1, round(recipe.crop[0] * short)), max(1, round(recipe.crop[1] * short)))
    return View(size, problem.image_size, recipe.scale, recipe.max_class_share, recipe.distort)


def _set_batchnorm_momentum(backbone: nn.Module, momentum: float) -> None:
    for module in backbone.modules():
        if momentum and isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum


def _full_size(logits: Tensor, shape: Sequence[int]) -> Tensor:
    """Classes (H, W) after bilinear upsampling of the logits (1, C, h, w)."""
    return F.interpolate(logits, size=tuple(shape), mode="bilinear", align_corners=False)[0].argmax(0)


def _resize_nearest(labels: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(labels[None, None].float(), size=tuple(size), mode="nearest")[0, 0]


def _output_pixels(logits: Tensor, mask: Tensor) -> tuple[int, int]:
    """Right and scored pixels at the network's own resolution (Newell & Deng: tasks/classify.py)."""
    small = _resize_nearest(mask, logits.shape[1:])
    scored = small != IGNORED
    return int((logits.argmax(0) == small)[scored].sum()), int(scored.sum())
