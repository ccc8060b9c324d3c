"""SimCLR (Chen et al., ICML 2020, arXiv 2002.05709).

L = mean over the 2B views i of -log [ exp(z_i.z_j/tau) / sum_{l != i} exp(z_i.z_l/tau) ], j the other view of the same
image (Eq. 1), z = p(f(x)) of length 1, negatives from the batches of all workers. As in ``google-research/simclr:
model_util.py``: both views go through the network as one batch, BatchNorm is synchronised over all workers (else the
task leaks through batch statistics), and the head ends in a linear layer without bias and a BatchNorm without bias.
Ours: the mean over 2B as in the paper; the official code adds the means of both directions (twice the loss).
Negatives come from one forward pass, so that gradient accumulation is not the same as a larger batch.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from methods.batchnorm import convert_batchnorm
from methods.contracts import Batch, MethodContext, Progress, StepOutput
from methods.heads import mlp_head, validate_head_batch, validate_projector
from methods.momentum_encoder import unit_vectors
from methods.monitors import contrast_monitors
from methods.optimizers import OptimizerConfig
from methods.pair_losses import nt_xent

__all__ = ["OPTIMIZER", "VIEWS", "SimCLR", "SimCLRConfig", "validate_in_batch_contrast"]

VIEWS = ("simclr", "simclr")
# Batch 4096: LARS with 0.3 x B/256, weight decay 1e-4 (the repository's command), 10 warm-up epochs.
OPTIMIZER = OptimizerConfig(
    optimizer="lars", learning_rate=0.3, weight_decay=1e-4, schedule="cosine", warmup_epochs=10.0
)


@dataclass(frozen=True)
class SimCLRConfig:
    """Head and temperature of SimCLR (v1: two layers; v2, the repository's default, has three).

    Attributes:
        temperature: tau (paper: 0.1 on ImageNet, 0.5 on CIFAR-10).
        projector_depth: number of linear layers; 0 = none.
        projector_hidden_dim: width between its layers; None takes the backbone's feature width.
        projector_dim: width of z.
        sync_batchnorm: BatchNorm over the batches of all workers.
    """

    temperature: float = 0.1
    projector_depth: int = 2
    projector_hidden_dim: int | None = None
    projector_dim: int = 128
    sync_batchnorm: bool = True


def validate_in_batch_contrast(config: Any, context: MethodContext, method: str) -> None:
    """Raises ``ValueError`` for a temperature or head that cannot train; warns of gradient accumulation."""
    if not config.temperature > 0:
        raise ValueError(f"{method} got temperature={config.temperature}; it must be above 0 (papers: 0.07 to 0.5).")
    validate_projector(config, method)
    validate_head_batch(context, config.sync_batchnorm)
    if context.num_micro_steps > 1:
        images = context.global_batch_size // context.num_micro_steps
        warnings.warn(
            f"{method} contrasts the images of one forward pass with each other: with {context.num_micro_steps} "
            f"micro-steps it sees {images} images at a time, not the global batch of {context.global_batch_size}.",
            stacklevel=2,
        )


class SimCLR(nn.Module):
    """Two views of an image attract each other, all other views of the global batch repel."""

    fixed_learning_rate: tuple[str, ...] = ()

    @staticmethod
    def validate(config: SimCLRConfig, context: MethodContext) -> None:
        """Raises ``ValueError`` for a setting that cannot train."""
        validate_in_batch_contrast(config, context, "simclr")

    def __init__(self, config: SimCLRConfig, backbone: Any, context: MethodContext) -> None:
        super().__init__()
        self.validate(config, context)
        self.config = config
        self.backbone = backbone
        self.projector = mlp_head(
            backbone.num_features,
            config.projector_hidden_dim or backbone.num_features,
            config.projector_dim,
            config.projector_depth,
            batchnorm=True,
            output_bias=False,
            output_batchnorm="gain",
        )
        if config.sync_batchnorm and context.world_size > 1:
            convert_batchnorm(self, "sync")

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """NT-Xent of two views, encoded in one pass."""
        x_1, x_2 = batch.views
        z_VBD = unit_vectors(self.projector(self.backbone(torch.cat([x_1, x_2])))).unflatten(0, (2, -1))
        result = nt_xent(z_VBD, self.config.temperature)
        metrics = contrast_monitors(z_VBD[0], z_VBD[1]) | {
            "contrast_top1": result.top1,
            "negative_similarity": result.negative_similarity,
        }
        return StepOutput(result.loss, metrics)

    def after_step(self, progress: Progress) -> None:
        """Nothing follows the optimiser step."""
