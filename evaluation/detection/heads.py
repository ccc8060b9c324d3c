"""detectron2's heads, made to give one process and many the same loss.

Two things in detectron2 depend on how a batch is cut: anchors and proposals are sampled from torch's global generator,
and the losses of regions are averages over the regions of one worker. Here every image brings its own random numbers,
and the averages are over the regions of all workers (``share_of_mean``). For images of one size the loss and its
gradient are then those of the whole batch. Images of several sizes are padded to the largest of their worker, as in
detectron2, so BatchNorm sees another amount of padding when the batch is cut differently.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from evaluation.detection.detectron import (
    RPN,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    Res5ROIHeads,
    StandardROIHeads,
)
from evaluation.fine_tuning.normalize import share_of_mean

__all__ = ["C4Heads", "MaskHead", "Outputs", "PyramidHeads", "SeededRPN", "sample_labels"]


def sample_labels(
    labels: Tensor, count: int, positive_fraction: float, background: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random positive and negative entries; the rule of ``detectron2/modeling/sampling.py``.

    Args:
        labels: (N,), -1 is ignored, ``background`` is negative, all else positive.
        count: how many to sample in all, if there are as many.
        positive_fraction: at most this part of ``count`` is positive; negatives fill up.
        background: see ``labels``.
        generator: on the CPU, so that every device samples the same.

    Returns:
        Indices of positives and of negatives.
    """

    def some(chosen: Tensor, most: int) -> Tensor:
        order = torch.randperm(len(chosen), generator=generator)[:most]
        return chosen[order.to(chosen.device)]

    positive = ((labels != -1) & (labels != background)).nonzero().flatten()
    negative = (labels == background).nonzero().flatten()
    taken = some(positive, int(count * positive_fraction))
    return taken, some(negative, count - len(taken))


class _Seeded:
    """Takes the next image's generator; detectron2 samples the images of a batch in their order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._generators: Iterator[torch.Generator] = iter(())

    def seed(self, generators: Sequence[torch.Generator]) -> None:
        """Give the generators of the next batch, one per image."""
        self._generators = iter(generators)


class SeededRPN(_Seeded, RPN):
    """Region proposals; anchors sampled with the image's generator. Its losses count images, so they need no more."""

    def _subsample_labels(self, label: Tensor) -> Tensor:
        sampled = sample_labels(label, self.batch_size_per_image, self.positive_fraction, 0, next(self._generators))
        label.fill_(-1)
        for value, chosen in zip((1, 0), sampled, strict=True):
            label[chosen] = value
        return label


class _SeededProposals(_Seeded):
    """The sampling of proposals, for both kinds of region heads."""

    batch_size_per_image: int
    positive_fraction: float
    num_classes: int

    def _sample_proposals(
        self, matched_idxs: Tensor, matched_labels: Tensor, gt_classes: Tensor
    ) -> tuple[Tensor, Tensor]:
        if len(gt_classes):
            classes = gt_classes[matched_idxs]
            classes[matched_labels == 0] = self.num_classes
            classes[matched_labels == -1] = -1
        else:
            classes = torch.full_like(matched_idxs, self.num_classes)
        sampled = torch.cat(
            sample_labels(
                classes, self.batch_size_per_image, self.positive_fraction, self.num_classes, next(self._generators)
            )
        )
        return sampled, classes[sampled]


class Outputs(FastRCNNOutputLayers):
    """Class and box of a region; the losses are means over the sampled regions of all workers."""

    def losses(self, predictions: Any, proposals: Any) -> dict[str, Tensor]:
        count = sum(len(proposal) for proposal in proposals)
        return {
            name: share_of_mean(loss * count, count) for name, loss in super().losses(predictions, proposals).items()
        }


class MaskHead(MaskRCNNConvUpsampleHead):
    """Mask of a region; the loss is the mean over the foreground regions of all workers."""

    def forward(self, x: Tensor, instances: Any) -> Any:
        found = super().forward(x, instances)
        if self.training:
            count = sum(len(image) for image in instances)
            found = {name: share_of_mean(loss * count, count) for name, loss in found.items()}
        return found


class C4Heads(_SeededProposals, Res5ROIHeads):
    """The last stage of the backbone on every region, then class, box and mask."""


class PyramidHeads(_SeededProposals, StandardROIHeads):
    """Regions from the level of the pyramid that fits their size."""

    @classmethod
    def _init_box_head(cls, cfg: Any, input_shape: Any) -> dict[str, Any]:
        parts = super()._init_box_head(cfg, input_shape)
        shape = parts["box_head"].output_shape
        return {**parts, "box_predictor": Outputs(cfg, shape)}

    @classmethod
    def _init_mask_head(cls, cfg: Any, input_shape: Any) -> dict[str, Any]:
        parts = super()._init_mask_head(cfg, input_shape)
        if "mask_head" in parts:
            first = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]]
            side = cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
            shape = type(first)(channels=first.channels, height=side, width=side)
            parts = {**parts, "mask_head": MaskHead(cfg, shape)}
        return parts
