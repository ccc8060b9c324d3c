"""MoCo v1 (He et al., CVPR 2020, arXiv 1911.05722) and v2 (Chen et al. 2020, arXiv 2003.04297).

L = -log [ exp(q.k+/tau) / (exp(q.k+/tau) + sum_j exp(q.k_j/tau)) ] with q = f_q(x_q), k+ = f_k(x_k) of two views of an
image and k_j a queue of K earlier keys (Eq. 1); f_k <- m f_k + (1 - m) f_q (Eq. 2). As in ``facebookresearch/moco:
moco/builder.py``: f_k moves before the keys are computed, its BatchNorm buffers are its own, keys are computed with
ShuffleBN, and enqueued after the loss. v2 adds an MLP head, stronger augmentation, tau 0.2 and a cosine schedule.
Ours: in one process BatchNorm runs on groups of the batch (the papers' devices), so that ShuffleBN has its effect; keys
enter the queue after the optimiser step, so that accumulated gradients see the negatives of the full batch.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from methods.batchnorm import convert_batchnorm
from methods.contracts import Batch, MethodContext, Progress, StepOutput
from methods.heads import head_dim, mlp_head, validate_projector
from methods.losses import contrast
from methods.momentum_encoder import KeyEncoder, resolve_bn_splits, unit_vectors
from methods.monitors import contrast_monitors
from methods.optimizers import OptimizerConfig
from methods.queue import FeatureQueue, QueueDtype, validate_queue_dtype, validate_queue_size

__all__ = [
    "OPTIMIZER_V1",
    "OPTIMIZER_V2",
    "VIEWS_V1",
    "VIEWS_V2",
    "MoCo",
    "MoCoConfig",
    "validate_momentum_contrast",
]

VIEWS_V1 = ("moco_v1", "moco_v1")
VIEWS_V2 = ("moco_v2", "moco_v2")
# ``main_moco.py``: batch 256, x0.1 at epochs 120 and 160 of 200 (v1), ``--cos`` stepped once an epoch (v2).
OPTIMIZER_V1 = OptimizerConfig(
    optimizer="sgd", learning_rate=0.03, weight_decay=1e-4, schedule="step", schedule_every="epoch"
)
OPTIMIZER_V2 = OptimizerConfig(
    optimizer="sgd", learning_rate=0.03, weight_decay=1e-4, schedule="cosine", schedule_every="epoch"
)


@dataclass(frozen=True)
class MoCoConfig:
    """Defaults are MoCo v2; v1 has temperature 0.07 and projector_depth 1.

    Attributes:
        temperature: tau.
        queue_size: K, number of negatives; a multiple of the global batch, at most the number of images.
        momentum: m of the key encoder.
        projector_depth: number of linear layers of the head, without BatchNorm; 0 = none (contrast on the feature).
        projector_hidden_dim: width between its layers; None takes the backbone's feature width (official code).
        projector_dim: width of q and k.
        shuffle_bn: ShuffleBN, against reading the answer from shared batch statistics.
        bn_splits: BatchNorm groups of one worker's forward pass, in both encoders; "auto" makes groups of about 32
            images as in the paper (256 images on 8 GPUs) when shuffle_bn is on, else 1.
        queue_dtype: what queued keys are stored in; bf16 halves the queue's memory and rounds each component by at most
            0.4 %; the contrast computes in fp32 all the same.
    """

    temperature: float = 0.2
    queue_size: int = 65536
    momentum: float = 0.999
    projector_depth: int = 2
    projector_hidden_dim: int | None = None
    projector_dim: int = 128
    shuffle_bn: bool = True
    bn_splits: int | Literal["auto"] = "auto"
    queue_dtype: QueueDtype = "fp32"


def validate_momentum_contrast(config: Any, context: MethodContext, method: str) -> None:
    """Raises ``ValueError`` for values of the fields of ``MoCoConfig`` that cannot be built or trained."""
    if not config.temperature > 0:
        raise ValueError(f"{method} got temperature={config.temperature}; it must be above 0 (papers: 0.07 to 0.2).")
    if not 0 <= config.momentum < 1:
        raise ValueError(f"{method} got momentum={config.momentum}; it must be in [0, 1) (papers: 0.999).")
    validate_projector(config, method)
    validate_queue_size(config.queue_size, context)
    num_splits = resolve_bn_splits(config.bn_splits, config.shuffle_bn, context)
    if config.shuffle_bn and num_splits * context.world_size == 1:
        warnings.warn(
            f"{method}: shuffle_bn has no effect with one BatchNorm group (1 worker, bn_splits=1). Use "
            "bn_splits='auto' or at least 2 groups, or shuffle_bn=False.",
            stacklevel=2,
        )


class MoCo(nn.Module):
    """A query must find its key, made by the slow encoder from the other view, among the keys of other images."""

    fixed_learning_rate: tuple[str, ...] = ()

    @staticmethod
    def validate(config: MoCoConfig, context: MethodContext) -> None:
        """Raises ``ValueError`` for a setting that cannot train."""
        validate_momentum_contrast(config, context, "moco")
        validate_queue_dtype(config.queue_dtype)

    def __init__(self, config: MoCoConfig, backbone: Any, context: MethodContext) -> None:
        super().__init__()
        self.validate(config, context)
        self.config = config
        width = backbone.num_features
        self.backbone = backbone
        self.projector = mlp_head(
            width, config.projector_hidden_dim or width, config.projector_dim, config.projector_depth
        )
        num_splits = resolve_bn_splits(config.bn_splits, config.shuffle_bn, context)
        convert_batchnorm(self, "split" if num_splits > 1 else "local", num_splits)
        self.key_encoder = KeyEncoder(self.backbone, self.projector, config.momentum, config.shuffle_bn)
        # The first, random keys differ from run to run like the weights do.
        generator = torch.Generator().manual_seed(int(self.key_encoder.shuffle_seed))
        dim = head_dim(width, config.projector_dim, config.projector_depth)
        self.queue = FeatureQueue(config.queue_size, dim, generator=generator, dtype=config.queue_dtype)

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """InfoNCE of the first view (query) against the second (key) and the queue."""
        x_q, x_k = batch.views
        self.key_encoder.follow(self.backbone, self.projector, progress)
        q = unit_vectors(self.projector(self.backbone(x_q)))
        k = self.key_encoder(x_k, progress)
        result = contrast(q, k, self.queue.keys, self.config.temperature)
        metrics = {
            "contrast_top1": result.top1,
            "same_image_rate": self.queue.same_image_rate(batch.index),
            "negative_similarity": result.negative_similarity,
        } | contrast_monitors(q, k)
        self.queue.stage(k, batch.labels, batch.index, progress.micro_step)
        return StepOutput(result.loss, metrics)

    def after_step(self, progress: Progress) -> None:
        """Enqueues the keys of the whole global batch."""
        self.queue.enqueue_staged()
