"""Supervised contrastive learning, SupCon (Khosla et al., NeurIPS 2020, arXiv 2004.11362).

L_i = -(tau / tau_base) 1/|P(i)| sum_{p in P(i)} log [ exp(z_i.z_p/tau) / sum_{a != i} exp(z_i.z_a/tau) ] (Eq. 2,
"out"), mean over the views i of the batches of all workers; P(i) are the other views of the same class. As in
``HobbitLong/SupContrast``: head Linear-ReLU-Linear without BatchNorm, tau_base 0.07 (so a tau of 0.1 scales the loss by
1.43; set base_temperature = temperature for the textbook loss), an anchor without positives counts with loss 0.
Exemplar leaves same-class images alone, SupCon pulls them together; with all labels distinct it is SimCLR.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from methods.batchnorm import convert_batchnorm
from methods.contracts import Batch, MethodContext, Progress, StepOutput
from methods.heads import mlp_head
from methods.momentum_encoder import unit_vectors
from methods.monitors import contrast_monitors
from methods.optimizers import OptimizerConfig
from methods.pair_losses import sup_con
from methods.simclr import validate_in_batch_contrast
from methods.supervised import validate_classes

__all__ = ["OPTIMIZER", "VIEWS", "SupCon", "SupConConfig"]

VIEWS = ("supcon", "supcon")
# ``main_supcon.py`` on CIFAR: batch 1024, lr 0.5, weight decay 1e-4, warm-up to 0.5 in 10 epochs, cosine.
OPTIMIZER = OptimizerConfig(
    optimizer="sgd", learning_rate=0.125, weight_decay=1e-4, schedule="cosine", warmup_epochs=10.0
)


@dataclass(frozen=True)
class SupConConfig:
    """Head and temperatures of SupCon.

    Attributes:
        temperature: tau.
        base_temperature: tau_base; the loss is scaled by temperature / base_temperature.
        projector_depth: number of linear layers, without BatchNorm; 0 = none.
        projector_hidden_dim: width between its layers; None takes the backbone's feature width (official code).
        projector_dim: width of z.
        sync_batchnorm: BatchNorm over the batches of all workers.
    """

    temperature: float = 0.1
    base_temperature: float = 0.07
    projector_depth: int = 2
    projector_hidden_dim: int | None = None
    projector_dim: int = 128
    sync_batchnorm: bool = True


class SupCon(nn.Module):
    """Views of the same class attract each other, all others repel."""

    fixed_learning_rate: tuple[str, ...] = ()

    @staticmethod
    def validate(config: SupConConfig, context: MethodContext) -> None:
        """Raises ``ValueError`` for a setting that cannot train."""
        validate_classes(context, "supcon")
        if not config.base_temperature > 0:
            raise ValueError(f"supcon got base_temperature={config.base_temperature}; it must be above 0.")
        validate_in_batch_contrast(config, context, "supcon")

    def __init__(self, config: SupConConfig, backbone: Any, context: MethodContext) -> None:
        super().__init__()
        self.validate(config, context)
        self.config = config
        self.backbone = backbone
        width = backbone.num_features
        self.projector = mlp_head(
            width, config.projector_hidden_dim or width, config.projector_dim, config.projector_depth
        )
        if config.sync_batchnorm and context.world_size > 1:
            convert_batchnorm(self, "sync")

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """SupCon of two views, encoded in one pass."""
        x_1, x_2 = batch.views
        z_VBD = unit_vectors(self.projector(self.backbone(torch.cat([x_1, x_2])))).unflatten(0, (2, -1))
        result = sup_con(z_VBD, batch.labels, self.config.temperature)
        metrics = contrast_monitors(z_VBD[0], z_VBD[1]) | {
            "contrast_top1": result.top1,
            "negative_similarity": result.negative_similarity,
        }
        return StepOutput(result.loss * (self.config.temperature / self.config.base_temperature), metrics)

    def after_step(self, progress: Progress) -> None:
        """Nothing follows the optimiser step."""
