"""What a worker trains and scores: a detector, its batches, its detections.

The details follow detectron2: objects of crowds are no targets, images without targets are not trained on, BatchNorm's
weights do not decay, images are flipped with probability 1/2, the short side is drawn for each image. What comes back
are the detections of every image with scores above 0.05, at most 100, in the pixels of the original image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from evaluation.detection.inputs import network_size, scored_input, training_input
from evaluation.detection.model import build_detector
from evaluation.detection.objects import join_masks, read_classes, read_objects
from evaluation.detection.recipes import Recipe
from evaluation.fine_tuning import Draw, Predictions
from image_data.contracts import IMAGENET_MEAN, IMAGENET_STD, DataError
from image_data.tables import ImageTable

if TYPE_CHECKING:
    from evaluation.detection.problem import DetectionProblem

__all__ = ["DetectionTrainee"]

PREDICT_PIXELS = 128 * 1024  # of images that are scored at once, where they have one size


class DetectionTrainee:
    """See ``fine_tuning.Trainee``."""

    model: nn.Module

    def __init__(self, problem: DetectionProblem, backbone: Any, table: ImageTable, scored: ImageTable) -> None:
        self._recipe, self._table, self._scored = problem.recipe, table, scored
        self._classes = read_classes([table, scored])
        self._rows = _rows_with_targets(table, self._classes, self._recipe.masks)
        self.num_images, self.num_scored = len(self._rows), scored.num_images
        probe = _normalised(table.image(int(self._rows[0])))
        self._detector = build_detector(
            backbone, self._recipe, len(self._classes), problem.head_batchnorm, problem.freezing, probe
        )
        self.model = self._detector

    def load(self, draws: Sequence[Draw]) -> list[dict[str, Any]]:
        batch = []
        for draw in draws:
            row = int(self._rows[draw.row])
            objects = read_objects(self._table, row, self._classes)
            batch.append(training_input(self._table.image(row), objects, self._recipe, draw.rng))
        return batch

    def parameter_groups(self) -> list[dict[str, Any]]:
        norms = [module for module in self.model.modules() if isinstance(module, _BatchNorm)]
        undecayed = {id(parameter) for module in norms for parameter in module.parameters(recurse=False)}
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return [
            {"params": [parameter for parameter in trained if id(parameter) not in undecayed]},
            {"params": [parameter for parameter in trained if id(parameter) in undecayed], "weight_decay": 0.0},
        ]

    def before_predict(self, batches: Iterator[Any]) -> None:
        """Precise BatchNorm: statistics become the average over some training batches of the finished weights."""
        norms = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and m.training]
        if not norms or not self._recipe.precise_bn_iterations:
            return
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average of all batches
        for _ in range(self._recipe.precise_bn_iterations):
            self.model(next(batches))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

    def predict(self, rows: Sequence[int]) -> Predictions:
        detections, masks = [np.zeros((0, 7), np.float32)], []
        for group in _groups(self._scored, rows, self._recipe):
            inputs = [scored_input(self._scored.image(row), self._recipe) for row in group]
            for row, found in zip(group, self._detector.detect(inputs), strict=True):
                detections.append(_detections(row, found))
                masks += _encoded_masks(found) if self._recipe.masks else []
        predictions = {"detections": np.concatenate(detections)}
        if self._recipe.masks:
            predictions["mask_rle"], predictions["mask_sizes"] = join_masks(masks)
        return predictions


def _rows_with_targets(table: ImageTable, classes: Sequence[str], masks: bool) -> np.ndarray:
    """Images with something to learn, int64 (n,)."""
    rows = []
    for row in range(table.num_images):
        objects = read_objects(table, row, classes)
        if (~objects.crowd).any():
            rows.append(row)
            if masks and not objects.masks:
                raise DataError(
                    f"image {table.value(row, 'name')!r} has boxes but no masks, and the detector is to predict masks. "
                    "Set masks to 'no' or use data with masks (coco:, rendered:)."
                )
    if not rows:
        raise DataError("no training image has an object; a detector needs annotated objects.")
    return np.array(rows, np.int64)


def _normalised(image: np.ndarray) -> Tensor:
    """The image's middle, at most 256 pixels a side, as float32 (1, 3, H, W)."""
    height, width = (min(side, 256) for side in image.shape[:2])
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    values = torch.from_numpy(image[top : top + height, left : left + width].astype(np.float32) / 255)
    values = (values - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    return values.permute(2, 0, 1)[None].float()


def _groups(table: ImageTable, rows: Sequence[int], recipe: Recipe) -> Iterator[list[int]]:
    """Neighbouring images of one size, few enough to be scored at once; others one by one, so that none is padded."""
    group: list[int] = []
    size = (0, 0)
    for row in rows:
        own = network_size(table.value(row, "height"), table.value(row, "width"), recipe.test_side, recipe)
        if group and (own != size or (len(group) + 1) * own[0] * own[1] > PREDICT_PIXELS):
            yield group
            group = []
        group, size = [*group, row], own
    if group:
        yield group


def _detections(row: int, found: Any) -> np.ndarray:
    """Row, class, score and box of each, float32 (n, 7)."""
    columns = [
        torch.full((len(found), 1), float(row)),
        found.pred_classes.cpu().float()[:, None],
        found.scores.cpu().float()[:, None],
        found.pred_boxes.tensor.cpu().float(),
    ]
    return torch.cat(columns, dim=1).numpy()


def _encoded_masks(found: Any) -> list[bytes]:
    """Compressed run lengths of each mask."""
    pictures = found.pred_masks.cpu().numpy().astype(np.uint8)
    rles: list[Any] = [coco_mask.encode(np.asfortranarray(picture)) for picture in pictures]
    return [rle["counts"] for rle in rles]
