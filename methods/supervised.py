"""Supervised cross entropy: L = -log softmax(W f(x) + b)[y], the baseline of every comparison.

The optimiser is not stated in the transfer papers; SGD with lr 0.1 per 256 images, momentum 0.9, weight decay 1e-4 and
cosine decay is the usual ImageNet setting. What transfers is f, so the classifier W is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.batchnorm import convert_batchnorm
from methods.contracts import Batch, MethodContext, Progress, StepOutput
from methods.optimizers import OptimizerConfig

__all__ = ["OPTIMIZER", "VIEWS", "Supervised", "SupervisedConfig", "accuracy", "cross_entropy", "validate_classes"]

VIEWS = ("supervised",)
OPTIMIZER = OptimizerConfig(optimizer="sgd", learning_rate=0.1, weight_decay=1e-4, schedule="cosine")


@dataclass(frozen=True)
class SupervisedConfig:
    """Cross entropy on the pooled feature.

    Attributes:
        sync_batchnorm: BatchNorm over the batches of all workers, so that their number does not change the result; off
            as in the papers, where every device has its own statistics.
    """

    sync_batchnorm: bool = False


def cross_entropy(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """-log softmax(logits)[label], mean over the batch, in float32 or better also under autocast; ()."""
    with torch.autocast(logits_BK.device.type, enabled=False):
        return F.cross_entropy(logits_BK.to(torch.promote_types(logits_BK.dtype, torch.float32)), labels_B)


def accuracy(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Share of images whose largest logit is their label; (), no gradient."""
    return (logits_BK.detach().argmax(dim=1) == labels_B).float().mean()


def validate_classes(context: MethodContext, method: str) -> None:
    """Raises ``ValueError`` unless there are two classes to tell apart."""
    if context.num_classes < 2:
        raise ValueError(
            f"{method} learns from labels, but the pretraining data has {context.num_classes} class(es). Use data with "
            "at least 2 classes, or a method without labels (moco_v2, simsiam)."
        )


class Supervised(nn.Module):
    """Cross entropy through a linear classifier on the pooled feature."""

    fixed_learning_rate: tuple[str, ...] = ()

    @staticmethod
    def validate(config: SupervisedConfig, context: MethodContext) -> None:
        """Raises ``ValueError`` for a setting that cannot train."""
        validate_classes(context, "supervised")

    def __init__(self, config: SupervisedConfig, backbone: Any, context: MethodContext) -> None:
        super().__init__()
        self.validate(config, context)
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.num_features, context.num_classes)
        if config.sync_batchnorm and context.world_size > 1:
            convert_batchnorm(self, "sync")

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """Mean cross entropy of the worker's images; one view per image."""
        (x,) = batch.views
        logits_BK = self.classifier(self.backbone(x))
        loss = cross_entropy(logits_BK, batch.labels)
        return StepOutput(loss, {"accuracy": accuracy(logits_BK, batch.labels)})

    def after_step(self, progress: Progress) -> None:
        """Nothing follows the optimiser step."""
