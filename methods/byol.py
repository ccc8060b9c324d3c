"""BYOL (Grill et al., NeurIPS 2020, arXiv 2006.07733).

L = |n(g(p(f(v)))) - sg(n(p'(f'(v'))))|^2 + the same with v and v' exchanged = 4 - 2 cos - 2 cos, mean over the batch
(Eq. 2; n = to length 1, sg = stop-gradient). f', p' are an exponential moving average of f, p whose momentum rises to
1: m_k = 1 - (1 - m_0) (1 + cos(pi k / K)) / 2 (section 3.1), updated after the optimiser step. As in
``google-deepmind/deepmind-research: byol``: projector and predictor are Linear-BN-ReLU-Linear with a last layer without
bias or BatchNorm; BatchNorm is synchronised over all workers; only parameters are averaged, the statistics of f' come
from its own passes.
Ours: the target starts as a copy of the online network; the official code initialises it from another seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from methods.batchnorm import convert_batchnorm
from methods.contracts import Batch, MethodContext, Progress, StepOutput
from methods.heads import head_dim, mlp_head, validate_head_batch
from methods.momentum_encoder import MomentumEncoder
from methods.monitors import feature_monitors
from methods.optimizers import OptimizerConfig
from methods.simsiam import negative_cosine

__all__ = ["OPTIMIZER", "VIEWS", "Byol", "ByolConfig", "target_momentum"]

VIEWS = ("byol_1", "byol_2")
# 1,000 epochs at batch 4096. Fewer epochs: 0.3 and momentum 0.99 (300), 0.45 and 0.99 (100), 0.45 and 0.97 (40), each
# with weight decay 1e-6.
OPTIMIZER = OptimizerConfig(
    optimizer="lars", learning_rate=0.2, weight_decay=1.5e-6, schedule="cosine", warmup_epochs=10.0
)


@dataclass(frozen=True)
class ByolConfig:
    """Heads and momentum of BYOL.

    Attributes:
        momentum: m_0, momentum of the target at the start (paper: 0.996 for 1,000 epochs, 0.99 for 100 to 300).
        momentum_schedule: rise to 1 along a cosine (paper), or keep m_0 (False).
        projector_depth: number of linear layers of the projector; 0 = none.
        projector_hidden_dim: width between its layers.
        projector_dim: width of projections and predictions.
        predictor_hidden_dim: width between the two layers of the predictor.
        sync_batchnorm: BatchNorm over the batches of all workers.
    """

    momentum: float = 0.996
    momentum_schedule: bool = True
    projector_depth: int = 2
    projector_hidden_dim: int = 4096
    projector_dim: int = 256
    predictor_hidden_dim: int = 4096
    sync_batchnorm: bool = True


def target_momentum(initial: float, step: int, total_steps: int) -> float:
    """m_k: from `initial` in the first step along a cosine to 1 at the end of the run."""
    return 1.0 - (1.0 - initial) * (1.0 + math.cos(math.pi * step / total_steps)) / 2.0


class Byol(nn.Module):
    """The online network predicts what a slow copy of itself makes of the other view."""

    fixed_learning_rate: tuple[str, ...] = ()

    @staticmethod
    def validate(config: ByolConfig, context: MethodContext) -> None:
        """Raises ``ValueError`` for a setting that cannot train."""
        if not 0 <= config.momentum <= 1:
            raise ValueError(f"byol got momentum={config.momentum}; it must be in [0, 1] (paper: 0.97 to 0.996).")
        if config.projector_depth < 0 or (
            min(config.projector_hidden_dim, config.projector_dim, config.predictor_hidden_dim) < 1
        ):
            raise ValueError(
                f"byol got projector_depth={config.projector_depth}, "
                f"projector_hidden_dim={config.projector_hidden_dim}, projector_dim={config.projector_dim}, "
                f"predictor_hidden_dim={config.predictor_hidden_dim}; the depth must be at least 0 and the widths at "
                "least 1."
            )
        validate_head_batch(context, config.sync_batchnorm)

    def __init__(self, config: ByolConfig, backbone: Any, context: MethodContext) -> None:
        super().__init__()
        self.validate(config, context)
        self.config = config
        self.backbone = backbone
        width = backbone.num_features
        kind: dict[str, Any] = dict(batchnorm=True, hidden_bias=True, output_bias=False)
        hidden, dim = config.projector_hidden_dim, config.projector_dim
        self.projector = mlp_head(width, hidden, dim, config.projector_depth, **kind)
        z_dim = head_dim(width, dim, config.projector_depth)
        self.predictor = mlp_head(z_dim, config.predictor_hidden_dim, z_dim, 2, **kind)
        if config.sync_batchnorm and context.world_size > 1:
            convert_batchnorm(self, "sync")
        self.target = MomentumEncoder(self._online())

    def _online(self) -> nn.Sequential:
        return nn.Sequential(self.backbone, self.projector)

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """Symmetric loss of two views; each has its own passes, because batch statistics are per view."""
        x_1, x_2 = batch.views
        z_1, z_2 = self.projector(self.backbone(x_1)), self.projector(self.backbone(x_2))
        p_1, p_2 = self.predictor(z_1), self.predictor(z_2)
        t_1, t_2 = self.target(x_1), self.target(x_2)
        loss = 4.0 + 2.0 * (negative_cosine(p_1, t_2) + negative_cosine(p_2, t_1))
        metrics = feature_monitors(t_1) | {"positive_similarity": _similarity(p_1, t_2)}
        return StepOutput(loss, metrics)

    def after_step(self, progress: Progress) -> None:
        """The target moves towards the online network."""
        m = self.config.momentum
        if self.config.momentum_schedule:
            m = target_momentum(m, progress.step, progress.total_steps)
        self.target.update(self._online(), m)


@torch.no_grad()
def _similarity(p_BD: Tensor, t_BD: Tensor) -> Tensor:
    return -negative_cosine(p_BD, t_BD)
