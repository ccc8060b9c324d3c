"""Landmark regression: the two-layer head, how images and points are loaded, and the trainee of the fine-tuning loop.

Points are counted in pixels of the stored image (pixel i covers [i, i + 1)). The network sees the central crop of an
image, resized to a square, and its points in coordinates where the crop spans [-1, 1] in both directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from evaluation.fine_tuning import Draw, Freezing, Schedule, scored_table, train_table
from evaluation.fine_tuning.normalize import share_of_mean
from evaluation.metric import Phase
from image_data.contracts import IMAGENET_MEAN, IMAGENET_STD, DataError
from image_data.prepared import PreparedData
from image_data.tables import ImageTable

__all__ = [
    "FACE_MIRROR",
    "LandmarkHead",
    "LandmarkNetwork",
    "LandmarkProblem",
    "crop_box",
    "landmark_loss",
    "points_of",
]

FACE_MIRROR = (1, 0, 2, 4, 3)  # in a mirrored face the other eye is the left one, and so are the mouth corners
PREDICT_BATCH = 64  # images


class LandmarkHead(nn.Module):
    """Feature map -> 1x1 convolution to 128 -> BatchNorm -> LeakyReLU -> flatten -> linear layer.

    Zhao et al. state "1x1 conv and FC, interleaved with LeakyReLU and BN"; the slope 0.01 is torch's.
    """

    def __init__(self, in_channels: int, map_size: tuple[int, int], num_points: int, width: int = 128) -> None:
        """Args: map_size: h and w of the feature map."""
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, kernel_size=1, bias=False)  # BatchNorm has the bias
        self.bn, self.relu = nn.BatchNorm2d(width), nn.LeakyReLU(inplace=True)
        self.fc = nn.Linear(width * map_size[0] * map_size[1], 2 * num_points)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> points (B, K, 2)."""
        x = self.relu(self.bn(self.conv(features)))
        return self.fc(x.flatten(1)).unflatten(1, (-1, 2))


def landmark_loss(predicted: Tensor, points: Tensor, visible: Tensor) -> Tensor:
    """Mean squared error over the coordinates of visible points: this worker's share of that of the global batch.

    Errors are in sides of the crop, half of those between coordinates that span [-1, 1]. The scale decides which
    learning rates are stable, because the head sums over all places of the map: with a 7 x 7 map, four times this loss
    diverges from random weights at the paper's learning rate of 0.02.

    Args:
        predicted: (B, K, 2), the crop spanning [-1, 1].
        points: (B, K, 2), likewise; what stands at hidden points is not looked at.
        visible: bool (B, K).
    """
    squared = (0.5 * (predicted - torch.where(visible[:, :, None], points, 0.0))).square().mean(2)
    return share_of_mean(torch.where(visible, squared, 0.0).sum(), visible.sum())


class LandmarkNetwork(nn.Module):
    """Backbone and head; called with a batch it returns the loss."""

    def __init__(self, backbone: Any, image_size: int, num_points: int) -> None:
        super().__init__()
        channels, height, width = _map_shape(backbone, image_size)
        self.backbone, self.head = backbone, LandmarkHead(channels, (height, width), num_points)

    def points(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, K, 2), the crop spanning [-1, 1]."""
        return self.head(self.backbone.forward_features(images))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        device = self.head.fc.weight.device
        images, points, visible = (batch[name].to(device) for name in ("images", "points", "visible"))
        return {"landmarks": landmark_loss(self.points(images), points, visible)}


@torch.no_grad()
def _map_shape(backbone: Any, image_size: int) -> tuple[int, int, int]:
    """(C, h, w) of the last feature map, found with one empty image; the BatchNorm statistics stay as they are."""
    was_training = backbone.training
    backbone.eval()
    parameter = next(backbone.parameters())
    shape = backbone.forward_features(parameter.new_zeros(1, 3, image_size, image_size)).shape
    backbone.train(was_training)
    return shape[1], shape[2], shape[3]


@dataclass(frozen=True)
class LandmarkProblem:
    """Fine-tune a backbone and the head on the column ``landmarks``.

    Attributes:
        schedule: see ``Schedule``.
        image_size: S, side of the square that the network sees, in pixels.
        crop: share of height and width that is kept, from the centre.
        flip: mirror half of the training images, with ``FACE_MIRROR``.
        evaluate_at: further iterations at which the images are scored.
        freezing: stages that are not trained.
    """

    schedule: Schedule
    image_size: int
    crop: float = 1.0
    flip: bool = False
    evaluate_at: tuple[int, ...] = ()
    freezing: Freezing = Freezing()  # noqa: RUF009

    def build(
        self, backbone: Any, data: PreparedData, phase: Phase, seed: int, device: torch.device
    ) -> LandmarkTrainee:
        return LandmarkTrainee(self, backbone, train_table(data, phase), scored_table(data, phase), device)


class LandmarkTrainee:
    """What the loop trains."""

    def __init__(
        self, problem: LandmarkProblem, backbone: Any, train: ImageTable, scored: ImageTable, device: torch.device
    ) -> None:
        self._problem, self._device = problem, device
        self._train, self._scored = train, scored
        self._points, self._visible = points_of(train)
        self.num_images, self.num_scored = train.num_images, scored.num_images
        self.model = LandmarkNetwork(backbone, problem.image_size, self._points.shape[1]).to(device)

    def load(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """{"images": (B, 3, S, S), "points": (B, K, 2), "visible": bool (B, K)}."""
        rows = [draw.row for draw in draws]
        pictures, boxes = self._pictures(self._train, rows)
        points = _to_crop(self._points[rows], boxes)
        visible = self._visible[rows]
        if self._problem.flip:
            for i in np.flatnonzero([draw.rng.random() < 0.5 for draw in draws]):
                pictures[i] = pictures[i, :, ::-1].copy()
                points[i] = (points[i] * (-1.0, 1.0))[list(FACE_MIRROR)]
                visible[i] = visible[i, list(FACE_MIRROR)]
        return {
            "images": _normalized(pictures),
            "points": torch.from_numpy(np.where(visible[:, :, None], points, 0.0).astype(np.float32)),
            "visible": torch.from_numpy(visible),
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All that is not frozen, at one learning rate."""
        return [{"params": [p for p in self.model.parameters() if p.requires_grad]}]

    def before_predict(self, batches: Iterator[Any]) -> None:
        """Nothing: the running statistics of BatchNorm are used."""

    def predict(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """{"points": float32 (N, K, 2), in pixels of the stored images}."""
        found = [np.zeros((0, *self._points.shape[1:]), np.float32)]
        for start in range(0, len(rows), PREDICT_BATCH):
            pictures, boxes = self._pictures(self._scored, rows[start : start + PREDICT_BATCH])
            points = self.model.points(_normalized(pictures).to(self._device)).cpu().numpy()
            found.append(_from_crop(points, boxes).astype(np.float32))
        return {"points": np.concatenate(found)}

    def _pictures(self, table: ImageTable, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The crops as uint8 (B, S, S, 3), and where they lay: float64 (B, 4), x0, y0, x1, y1 in pixels."""
        size, pictures, boxes = self._problem.image_size, [], []
        for row in rows:
            image = table.image(row)
            box = crop_box(image.shape[1], image.shape[0], self._problem.crop)
            resized = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box=box)
            pictures.append(np.asarray(resized))
            boxes.append(box)
        return np.stack(pictures), np.array(boxes)


def crop_box(width: int, height: int, share: float) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) of the central crop, in pixels."""
    x, y = 0.5 * width * (1 - share), 0.5 * height * (1 - share)
    return x, y, width - x, height - y


def _to_crop(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Pixels (B, K, 2) -> coordinates in which the box spans [-1, 1]."""
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    return 2 * (points - low) / (high - low) - 1


def _from_crop(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Inverse of ``_to_crop``."""
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    return low + 0.5 * (points + 1) * (high - low)


def _normalized(pictures: np.ndarray) -> Tensor:
    """uint8 (B, S, S, 3) -> float32 (B, 3, S, S), ImageNet-normalised."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(255)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((x - mean) / std).contiguous()


def points_of(table: ImageTable) -> tuple[np.ndarray, np.ndarray]:
    """The column ``landmarks``: points, float64 (N, K, 2) in pixels, and which are visible, bool (N, K).

    Raises:
        DataError: there is no such column; images have another number of points, or visible ones that are not finite.
    """
    rows = table.column("landmarks")
    names = table.column("name")
    for name, row in zip(names, rows, strict=True):
        if row is None or len(row) != len(rows[0] or ()) or any(len(point) != 3 for point in row):
            raise DataError(
                f"the landmarks of {name} are {row}, those of {names[0]} {rows[0]}; every image needs equally many "
                "points of (x, y, visible)."
            )
    values = np.array(rows, np.float64).reshape(len(rows), -1, 3)
    points, visible = values[:, :, :2], values[:, :, 2] > 0
    bad = np.flatnonzero((visible & ~np.isfinite(points).all(2)).any(1))
    if len(bad):
        raise DataError(
            f"visible landmarks of {names[bad[0]]} are not finite: {rows[bad[0]]}. Correct the annotations."
        )
    return points, visible
