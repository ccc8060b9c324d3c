"""What CAMtrast, its ablations and the variant of its released code share: CE(x), the suppressed image x' and CE(x').

Every loss term is a ``StepOutput``; a method's forward adds the terms that it has with ``summed``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

from torch import Tensor

from methods.cam import MaskOrder, SuppressTo, class_activation_map, normalized_mask, suppress
from methods.contracts import Batch, MethodContext, Progress, StepOutput
from methods.supervised import accuracy, cross_entropy, validate_classes

__all__ = [
    "CamtrastConfig",
    "Original",
    "classify_original",
    "classify_suppressed",
    "is_warmup",
    "one_view",
    "summed",
    "suppressed_images",
    "take_views",
    "validate_camtrast",
    "warmup_epochs",
]

# 30 of 1,000 epochs on miniImageNet.
WARMUP_SHARE = 0.03


@dataclass(frozen=True)
class CamtrastConfig:
    """What all variants share.

    Attributes:
        cam_warmup_epochs: epochs that train only the classifier on x; None takes 3 % of the run but at least one epoch
            (the paper: 30 of 1,000 on miniImageNet and CIFAR-FS, 50 of 500 on tieredImageNet).
        suppress_to: what a hidden region becomes: mean_color (the normalised tensor is multiplied, as in the authors'
            code) or black (the pixels are multiplied).
    """

    cam_warmup_epochs: int | None = None
    suppress_to: SuppressTo = "mean_color"


def warmup_epochs(config: CamtrastConfig, total_epochs: int) -> int:
    """Epochs that train only CE(x).

    Raises:
        ValueError: no epoch would be left for the method itself.
    """
    if config.cam_warmup_epochs is None:
        return min(max(1, round(WARMUP_SHARE * total_epochs)), total_epochs - 1)
    if config.cam_warmup_epochs >= total_epochs:
        raise ValueError(
            f"cam_warmup_epochs={config.cam_warmup_epochs} leaves nothing of a run of {total_epochs} epochs: CAMtrast "
            "would be plain cross entropy. Set fewer warm-up epochs or more epochs."
        )
    return config.cam_warmup_epochs


def is_warmup(config: CamtrastConfig, progress: Progress) -> bool:
    """Whether this epoch trains only CE(x)."""
    return progress.epoch < warmup_epochs(config, progress.total_epochs)


def validate_camtrast(config: CamtrastConfig, context: MethodContext, method: str) -> None:
    """Raises ``ValueError`` for labels, warm-ups and image sizes with which no CAM can be trained."""
    validate_classes(context, method)
    if config.cam_warmup_epochs is not None and config.cam_warmup_epochs < 0:
        raise ValueError(f"cam_warmup_epochs={config.cam_warmup_epochs} is not allowed: it must be at least 0.")
    if config.suppress_to not in get_args(SuppressTo):
        raise ValueError(f"suppress_to={config.suppress_to!r} must be one of: {', '.join(get_args(SuppressTo))}.")
    if context.feature_map_side == 1:
        raise ValueError(
            f"{method} needs a class activation map, but the last feature map of {context.image_size} px images is a "
            "single location with this backbone and stem. Use larger images or the small stem."
        )


def take_views(batch: Batch, count: int, reason: str) -> list[Tensor]:
    """The views of the batch.

    Raises:
        ValueError: another number of views than `count`; the message starts with `reason`.
    """
    if len(batch.views) != count:
        example = " ".join(["light"] * count)
        raise ValueError(
            f"{reason}, so it takes {count} view{'s' * (count != 1)} of each image, but the data has "
            f"{len(batch.views)}. Name {count} view recipe{'s' * (count != 1)} (--views {example})."
        )
    return batch.views


def one_view(batch: Batch, method: str) -> Tensor:
    """x, of a method that makes its second view itself."""
    return take_views(batch, 1, f"{method} makes its second view itself (the suppressed image)")[0]


class Original(NamedTuple):
    """What the forward pass of x gives: the term CE(x), the last feature map, its global average and the logits."""

    term: StepOutput
    features_BChw: Tensor
    pooled_BC: Tensor
    logits_BK: Tensor


def classify_original(method: Any, x: Tensor, labels: Tensor) -> Original:
    """CE(x) by ``method.classifier`` on the pooled features of ``method.backbone``."""
    features_BChw = method.backbone.forward_features(x)
    pooled_BC = features_BChw.mean(dim=(2, 3))
    logits_BK = method.classifier(pooled_BC)
    loss = cross_entropy(logits_BK, labels)
    metrics = {"accuracy": accuracy(logits_BK, labels), "loss_original": loss.detach()}
    return Original(StepOutput(loss, metrics), features_BChw, pooled_BC, logits_BK)


def suppressed_images(
    method: Any, x: Tensor, features_BChw: Tensor, classes_B: Tensor, order: MaskOrder = "upsample_then_scale"
) -> tuple[Tensor, dict[str, Tensor]]:
    """x' = (1 - M) * x with M the CAM of the given classes by today's ``method.classifier``; and monitors of M.

    Args:
        method: has `classifier` and `config.suppress_to`.
        x: (B, 3, H, W) normalised images.
        features_BChw: their last feature maps; no gradient flows into them.
        classes_B: int64, the class that each CAM explains.
        order: see ``normalized_mask``.

    Raises:
        ValueError: feature maps of one location.
    """
    cam_Bhw = class_activation_map(features_BChw, method.classifier.weight, classes_B)
    if cam_Bhw[0].numel() == 1:
        raise ValueError(
            f"The feature map of a {x.shape[2]}x{x.shape[3]} image is a single location, so its CAM hides nothing. Use "
            "the small stem or larger images for CAMtrast."
        )
    mask, is_constant = normalized_mask(cam_Bhw, (x.shape[2], x.shape[3]), order)
    monitors = {"suppressed_share": mask.mean(), "constant_cams": is_constant.float().mean()}
    return suppress(x, mask, method.config.suppress_to), monitors


def classify_suppressed(method: Any, x_suppressed: Tensor, labels: Tensor) -> tuple[StepOutput, Tensor]:
    """CE(x') by the same network, and the pooled features of x'."""
    pooled_BC = method.backbone(x_suppressed)
    logits_BK = method.classifier(pooled_BC)
    loss = cross_entropy(logits_BK, labels)
    metrics = {"accuracy_suppressed": accuracy(logits_BK, labels), "loss_suppressed": loss.detach()}
    return StepOutput(loss, metrics), pooled_BC


def summed(*terms: StepOutput, monitors: dict[str, Tensor] | None = None) -> StepOutput:
    """Sum of the losses (weights 1) and all monitors."""
    loss, metrics = terms[0].loss, dict(terms[0].metrics)
    for term in terms[1:]:
        loss = loss + term.loss
        metrics |= term.metrics
    return StepOutput(loss, metrics | (monitors or {}))
