"""SL-MLP (Wang et al., CVPR 2022, arXiv 2112.00496): cross entropy through a projector.

L = CE(W p(f(x)), y). The projector p sits between the pooled feature and the classifier W; after pretraining both are
dropped and f(x), before the projector, transfers. No official code is at hand: the projector
Linear(d, d) - BN - ReLU - Linear(d, 256) is recalled from the paper, so each of its parts is a switch, which is also
what the paper ablates. Everything else is as in ``supervised``, so that the projector is the only difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from methods.batchnorm import convert_batchnorm
from methods.contracts import Batch, MethodContext, Progress, StepOutput
from methods.heads import validate_head_batch
from methods.supervised import OPTIMIZER, VIEWS, accuracy, cross_entropy, validate_classes

__all__ = ["OPTIMIZER", "SLMLP", "VIEWS", "SLMLPConfig", "build_projector"]


@dataclass(frozen=True)
class SLMLPConfig:
    """Cross entropy through a projector of ``projector_depth - 1`` blocks Linear-BN-ReLU and a last Linear.

    Attributes:
        projector_depth: number of linear layers; 0 = none, which is plain cross entropy.
        projector_hidden_dim: width between the layers; None takes the backbone's feature width, as in the paper.
        projector_dim: width of the projector's output.
        projector_batchnorm: BatchNorm between the layers (depth 2 and more).
        projector_relu: ReLU between the layers (depth 2 and more).
        projector_input_layer: False leaves out the first linear layer, not the BN and ReLU after it (depth >= 2).
        projector_output_layer: False leaves out the last linear layer (depth >= 2).
        sync_batchnorm: BatchNorm over the batches of all workers, so that their number does not change the result.
    """

    projector_depth: int = 2
    projector_hidden_dim: int | None = None
    projector_dim: int = 256
    projector_batchnorm: bool = True
    projector_relu: bool = True
    projector_input_layer: bool = True
    projector_output_layer: bool = True
    sync_batchnorm: bool = False


def build_projector(config: SLMLPConfig, in_dim: int) -> tuple[nn.Sequential, int]:
    """The projector (B, in_dim) -> (B, width), and its output width."""
    hidden_dim = config.projector_hidden_dim or in_dim
    layers: list[nn.Module] = []
    width = in_dim
    for i in range(config.projector_depth):
        is_last = i == config.projector_depth - 1
        is_kept = config.projector_input_layer if i == 0 else True
        is_kept = is_kept and (config.projector_output_layer or not is_last)
        if is_kept:
            out_dim = config.projector_dim if is_last else hidden_dim
            layers.append(nn.Linear(width, out_dim))
            width = out_dim
        if not is_last:
            layers += [nn.BatchNorm1d(width)] if config.projector_batchnorm else []
            layers += [nn.ReLU(inplace=True)] if config.projector_relu else []
    return nn.Sequential(*layers), width


class SLMLP(nn.Module):
    """Supervised learning with an MLP projector that is thrown away."""

    fixed_learning_rate: tuple[str, ...] = ()

    @staticmethod
    def validate(config: SLMLPConfig, context: MethodContext) -> None:
        """Raises ``ValueError`` for a setting that cannot train or has no effect."""
        validate_classes(context, "sl_mlp")
        depth, hidden = config.projector_depth, config.projector_hidden_dim
        if depth < 0 or config.projector_dim < 1 or (hidden is not None and hidden < 1):
            raise ValueError(
                f"sl_mlp got projector_depth={depth}, projector_hidden_dim={hidden}, "
                f"projector_dim={config.projector_dim}; the depth must be at least 0 and the widths at least 1."
            )
        if depth < 2 and not (config.projector_input_layer and config.projector_output_layer):
            raise ValueError(
                f"projector_input_layer and projector_output_layer can only be switched off in a projector of "
                f"projector_depth 2 or more, got {depth}. Use projector_depth=0 for no projector."
            )
        if depth > 1 and config.projector_batchnorm:
            validate_head_batch(context, config.sync_batchnorm)

    def __init__(self, config: SLMLPConfig, backbone: Any, context: MethodContext) -> None:
        super().__init__()
        self.validate(config, context)
        self.backbone = backbone
        self.projector, width = build_projector(config, backbone.num_features)
        self.classifier = nn.Linear(width, context.num_classes)
        if config.sync_batchnorm and context.world_size > 1:
            convert_batchnorm(self, "sync")

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """Mean cross entropy of the worker's images; one view per image."""
        (x,) = batch.views
        logits_BK = self.classifier(self.projector(self.backbone(x)))
        loss = cross_entropy(logits_BK, batch.labels)
        return StepOutput(loss, {"accuracy": accuracy(logits_BK, batch.labels)})

    def after_step(self, progress: Progress) -> None:
        """Nothing follows the optimiser step."""
