"""Exemplar v1 and v2 (Zhao et al., ICLR 2021, arXiv 2006.06606, section 4.1).

L_i = -log [ exp(q_i.k_i/tau) / (exp(q_i.k_i/tau) + sum_{j: y_j != y_i} exp(q_i.k_j/tau)) ]  (Eq. 2): instance
discrimination in which images of the same class are neither attracted nor repelled. It is MoCo (v1 or v2) whose queue
carries the class of each key; the same-class logits are -inf. The positive is only the other view of the same image.
No official training code exists; the limits (all labels distinct = MoCo, all equal = loss 0) are tests.
Ours: K = 65,536 by default as MoCo, because the paper's ablation value "1M" (1,048,576, a multiple of 256) only suits
data sets of that size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from methods.batchnorm import convert_batchnorm
from methods.contracts import Batch, MethodContext, Progress, StepOutput
from methods.heads import head_dim, mlp_head
from methods.losses import contrast
from methods.moco import OPTIMIZER_V1, OPTIMIZER_V2, VIEWS_V1, VIEWS_V2, validate_momentum_contrast
from methods.momentum_encoder import KeyEncoder, resolve_bn_splits, unit_vectors
from methods.monitors import contrast_monitors
from methods.queue import FeatureQueue, QueueDtype, validate_queue_dtype

# Views and optimiser are MoCo's.
__all__ = ["OPTIMIZER_V1", "OPTIMIZER_V2", "VIEWS_V1", "VIEWS_V2", "Exemplar", "ExemplarConfig"]


@dataclass(frozen=True)
class ExemplarConfig:
    """Defaults are Exemplar v2; v1 has temperature 0.07 and projector_depth 1.

    Attributes:
        temperature: tau (paper: 0.07 for v1, 0.1 for v2).
        queue_size: K, number of queued keys; a multiple of the global batch, at most the number of images.
        momentum: m of the key encoder.
        projector_depth: number of linear layers of the head, without BatchNorm; 0 = none (contrast on the feature).
        projector_hidden_dim: width between its layers; None takes the backbone's feature width (MoCo's code).
        projector_dim: width of q and k.
        shuffle_bn: ShuffleBN, against reading the answer from shared batch statistics.
        bn_splits: BatchNorm groups of one worker's forward pass, in both encoders; "auto" makes groups of about 32
            images as in MoCo (256 images on 8 GPUs) when shuffle_bn is on, else 1.
        queue_dtype: what queued keys are stored in; bf16 halves the queue's memory and rounds each component by at most
            0.4 %; the contrast computes in fp32 all the same.
    """

    temperature: float = 0.1
    queue_size: int = 65536
    momentum: float = 0.999
    projector_depth: int = 2
    projector_hidden_dim: int | None = None
    projector_dim: int = 128
    shuffle_bn: bool = True
    bn_splits: int | Literal["auto"] = "auto"
    queue_dtype: QueueDtype = "fp32"


class Exemplar(nn.Module):
    """A query must find its key among the keys of images of other classes."""

    fixed_learning_rate: tuple[str, ...] = ()

    @staticmethod
    def validate(config: ExemplarConfig, context: MethodContext) -> None:
        """Raises ``ValueError`` for a setting that cannot train."""
        if context.num_classes < 2:
            raise ValueError(
                f"exemplar learns from labels, but the pretraining data has {context.num_classes} class(es); with one "
                "class every negative is masked and the loss is 0. Use data with at least 2 classes, or moco_v2."
            )
        validate_momentum_contrast(config, context, "exemplar")
        validate_queue_dtype(config.queue_dtype)

    def __init__(self, config: ExemplarConfig, backbone: Any, context: MethodContext) -> None:
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
        self.queue = FeatureQueue(
            config.queue_size, dim, with_labels=True, generator=generator, dtype=config.queue_dtype
        )

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """Label-masked InfoNCE of the first view (query) against the second (key) and the queue."""
        x_q, x_k = batch.views
        self.key_encoder.follow(self.backbone, self.projector, progress)
        q = unit_vectors(self.projector(self.backbone(x_q)))
        k = self.key_encoder(x_k, progress)
        result = contrast(q, k, self.queue.keys, self.config.temperature, batch.labels, self.queue.labels)
        metrics = {
            "contrast_top1": result.top1,
            "masked_queries": result.num_masked_queries,
            "same_image_rate": self.queue.same_image_rate(batch.index),
            "negative_similarity": result.negative_similarity,
        } | contrast_monitors(q, k)
        self.queue.stage(k, batch.labels, batch.index, progress.micro_step)
        return StepOutput(result.loss, metrics)

    def after_step(self, progress: Progress) -> None:
        """Enqueues the keys of the whole global batch with their labels."""
        self.queue.enqueue_staged()
