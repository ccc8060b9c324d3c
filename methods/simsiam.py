"""SimSiam (Chen & He, CVPR 2021, arXiv 2011.10566).

L = -1/2 [cos(p_1, sg(z_2)) + cos(p_2, sg(z_1))] with z = projector(f(x)), p = predictor(z), sg = stop-gradient: no
negatives and no momentum encoder. As in ``facebookresearch/simsiam: simsiam/builder.py``: the projector ends in a
BatchNorm without gain and bias (and the bias of the layer before it is frozen), the predictor's output has no
BatchNorm, BatchNorm is synchronised over all workers, the last BatchNorm gain of every residual block starts at zero
(``MethodSpec.zero_init_residual``), and the predictor's learning rate stays constant (``--fix-pred-lr``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.batchnorm import convert_batchnorm
from methods.contracts import Batch, MethodContext, Progress, StepOutput
from methods.heads import head_dim, mlp_head, validate_head_batch
from methods.monitors import feature_monitors
from methods.optimizers import OptimizerConfig

__all__ = [
    "OPTIMIZER",
    "VIEWS",
    "SimSiam",
    "SimSiamConfig",
    "build_heads",
    "negative_cosine",
    "validate_heads",
]

VIEWS = ("moco_v2", "moco_v2")
OPTIMIZER = OptimizerConfig(
    optimizer="sgd", learning_rate=0.05, weight_decay=1e-4, schedule="cosine", schedule_every="epoch"
)


@dataclass(frozen=True)
class SimSiamConfig:
    """Heads and switches of SimSiam.

    Attributes:
        projector_depth: number of linear layers of the projector; 0 = none.
        projector_hidden_dim: width between its layers; None takes the backbone's feature width (official code).
        projector_dim: width of z and p.
        predictor_hidden_dim: width of the predictor's bottleneck.
        fixed_predictor_learning_rate: keep the predictor at the peak learning rate.
        stop_gradient: False removes sg from the loss; training then collapses (the paper's Figure 2).
        sync_batchnorm: BatchNorm over the batches of all workers.
    """

    projector_depth: int = 3
    projector_hidden_dim: int | None = None
    projector_dim: int = 2048
    predictor_hidden_dim: int = 512
    fixed_predictor_learning_rate: bool = True
    stop_gradient: bool = True
    sync_batchnorm: bool = True


def negative_cosine(p_BD: Tensor, z_BD: Tensor) -> Tensor:
    """-cos(p, z), mean over the batch, computed in float32 or better; ()."""
    dtype = torch.promote_types(p_BD.dtype, torch.float32)
    with torch.autocast(p_BD.device.type, enabled=False):
        return -F.cosine_similarity(p_BD.to(dtype), z_BD.to(dtype), dim=1).mean()


def build_heads(config: Any, in_dim: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Projector and predictor of a config that has the four fields of ``SimSiamConfig`` for them."""
    hidden_dim = config.projector_hidden_dim or in_dim
    projector = mlp_head(
        in_dim,
        hidden_dim,
        config.projector_dim,
        config.projector_depth,
        batchnorm=True,
        output_bias="frozen",
        output_batchnorm="plain",
    )
    z_dim = head_dim(in_dim, config.projector_dim, config.projector_depth)
    return projector, mlp_head(z_dim, config.predictor_hidden_dim, z_dim, 2, batchnorm=True)


def validate_heads(config: Any, context: MethodContext, method: str) -> None:
    """Raises ``ValueError`` for widths and depths that ``build_heads`` cannot build or train."""
    hidden = config.projector_hidden_dim
    if config.projector_depth < 0 or min(config.projector_dim, config.predictor_hidden_dim, hidden or 1) < 1:
        raise ValueError(
            f"{method} got projector_depth={config.projector_depth}, projector_hidden_dim={hidden}, "
            f"projector_dim={config.projector_dim}, predictor_hidden_dim={config.predictor_hidden_dim}; the depth must "
            "be at least 0 and the widths at least 1."
        )
    validate_head_batch(context, config.sync_batchnorm)


class SimSiam(nn.Module):
    """Two views attract each other through a predictor; the stop-gradient keeps them from collapsing."""

    @staticmethod
    def validate(config: SimSiamConfig, context: MethodContext) -> None:
        """Raises ``ValueError`` for a setting that cannot train."""
        validate_heads(config, context, "simsiam")

    def __init__(self, config: SimSiamConfig, backbone: Any, context: MethodContext) -> None:
        super().__init__()
        self.validate(config, context)
        self.config = config
        self.backbone = backbone
        self.projector, self.predictor = build_heads(config, backbone.num_features)
        self.fixed_learning_rate: tuple[str, ...] = ("predictor.",) if config.fixed_predictor_learning_rate else ()
        if config.sync_batchnorm and context.world_size > 1:
            convert_batchnorm(self, "sync")

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """Symmetric loss of the two views; each has its own pass, because batch statistics are per view."""
        x_1, x_2 = batch.views
        z_1, z_2 = self.projector(self.backbone(x_1)), self.projector(self.backbone(x_2))
        p_1, p_2 = self.predictor(z_1), self.predictor(z_2)
        t_1, t_2 = (z_1.detach(), z_2.detach()) if self.config.stop_gradient else (z_1, z_2)
        loss = (negative_cosine(p_1, t_2) + negative_cosine(p_2, t_1)) / 2
        # Of p: the BatchNorm at the projector's end stretches a collapsed z apart again.
        return StepOutput(loss, feature_monitors(p_1))

    def after_step(self, progress: Progress) -> None:
        """Nothing follows the optimiser step."""
