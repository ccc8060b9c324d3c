"""Instance discrimination with a memory bank, InstDisc (Wu et al., CVPR 2018, arXiv 1805.01978).

P(i|v) = exp(v.v_i/tau) / Z (Eq. 2): every image is its own class, and a bank keeps one 128-d unit vector v_i of each.
The sum over all n images is approximated by noise-contrastive estimation with 4,096 samples and a constant Z (Eqs.
4-8), or taken exactly (softmax), or over the sampled entries only (sampled_softmax, the 2020 update of
``zhirongw/lemniscate.pytorch``). After the step v_i <- normalise(0.5 v_i + 0.5 f(x_i)). One view per image.
ImageNet, ResNet-50, linear: NCE-4096 56.5, softmax-4096 57.1, softmax-16384 58.5 (``HobbitLong/CMC: README.md``).
Ours: no proximal term (the official default weight is 0); the noise is drawn from (seed, step, position), so any number
of workers draws the same; with gradient accumulation Z comes from the first forward pass alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from methods.contracts import Batch, MethodContext, Progress, StepOutput
from methods.heads import head_dim, mlp_head
from methods.memory_bank import BankLoss, MemoryBank, validate_bank
from methods.momentum_encoder import unit_vectors
from methods.monitors import contrast_monitors
from methods.optimizers import OptimizerConfig

__all__ = ["OPTIMIZER", "VIEWS", "InstDisc", "InstDiscConfig"]

VIEWS = ("moco_v1",)  # MoCo v1 took its recipe from here
OPTIMIZER = OptimizerConfig(
    optimizer="sgd", learning_rate=0.03, weight_decay=1e-4, schedule="step", schedule_every="epoch"
)


@dataclass(frozen=True)
class InstDiscConfig:
    """Defaults are the paper's on ImageNet (CIFAR: temperature 0.1).

    Attributes:
        temperature: tau.
        loss: nce, softmax (over all images, exact) or sampled_softmax (over the sampled ones).
        num_negatives: noise samples per image, with replacement (2020 update: 65,536 with sampled_softmax); unused by
            softmax.
        bank_momentum: share of the old entry when an image's entry is renewed.
        projector_depth: number of linear layers of the head; 0 = none.
        projector_hidden_dim: width between its layers; None takes the backbone's feature width.
        projector_dim: width of the bank's entries.
    """

    temperature: float = 0.07
    loss: BankLoss = "nce"
    num_negatives: int = 4096
    bank_momentum: float = 0.5
    projector_depth: int = 1
    projector_hidden_dim: int | None = None
    projector_dim: int = 128


class InstDisc(nn.Module):
    """Every image must find its own entry in the bank."""

    fixed_learning_rate: tuple[str, ...] = ()

    @staticmethod
    def validate(config: InstDiscConfig, context: MethodContext) -> None:
        """Raises ``ValueError`` for a setting that cannot train."""
        validate_bank(config, context, "instdisc")

    def __init__(self, config: InstDiscConfig, backbone: Any, context: MethodContext) -> None:
        super().__init__()
        self.validate(config, context)
        self.config = config
        self.backbone = backbone
        width = backbone.num_features
        self.projector = mlp_head(
            width, config.projector_hidden_dim or width, config.projector_dim, config.projector_depth
        )
        self.bank = MemoryBank(context.num_images, head_dim(width, config.projector_dim, config.projector_depth))

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """The images' features against the bank."""
        (x,) = batch.views
        q_BD = unit_vectors(self.projector(self.backbone(x)))
        num_noise = 0 if self.config.loss == "softmax" else self.config.num_negatives
        ids_BM1 = self.bank.sample(batch.index, num_noise, progress)
        loss = self.bank.loss(q_BD, ids_BM1, self.config.loss, self.config.temperature)
        self.bank.stage(q_BD, batch.index, progress.micro_step)
        return StepOutput(loss, contrast_monitors(q_BD, self.bank.features[batch.index]))

    def after_step(self, progress: Progress) -> None:
        """The bank takes the features of the whole global batch."""
        self.bank.update(self.config.bank_momentum)
