"""Contrastive multiview coding, CMC, of L and ab (Tian et al., ECCV 2020, arXiv 1906.05849).

a = f_L(x_L) and b = f_ab(x_ab) are the unit features of the two parts of one image in Lab colours, from two networks of
half width; each part has a memory bank (A, B). L = -log [exp(a_i.B_i/tau) / sum_j exp(a_i.B_j/tau)] - log [exp(b_i.A_i
/tau) / sum_j exp(b_i.A_j/tau)], j over the image itself and noise samples drawn uniformly with replacement, the same
ones for both directions; or the NCE form of InstDisc for each direction (the official code's default). Banks are
renewed after the step: v <- normalise(0.5 v + 0.5 f). As in ``HobbitLong/CMC``. Both halves side by side transfer.
A colour change after the conversion to Lab would tie or untie the two parts by itself and destroy the task; recipes
refuse it (``to_lab`` must come after every colour step), and the published recipe has crop and flip only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from methods.backbones import LabBackbone
from methods.contracts import Batch, MethodContext, Progress, StepOutput
from methods.heads import head_dim, mlp_head
from methods.memory_bank import BankLoss, MemoryBank, validate_bank
from methods.momentum_encoder import unit_vectors
from methods.monitors import contrast_monitors
from methods.optimizers import OptimizerConfig

__all__ = ["OPTIMIZER", "VIEWS", "CMCConfig", "Cmc"]

VIEWS = ("cmc",)
# 240 epochs, lr 0.03 at batch 128 (here per 256), x0.1 at 120, 160 and 200.
OPTIMIZER = OptimizerConfig(
    optimizer="sgd",
    learning_rate=0.06,
    weight_decay=1e-4,
    schedule="step",
    schedule_every="epoch",
    milestones=(120 / 240, 160 / 240, 200 / 240),
)


@dataclass(frozen=True)
class CMCConfig:
    """Defaults are the official code's, with the softmax form.

    Attributes:
        temperature: tau (Newell & Deng: 0.1).
        loss: softmax (over all images, exact), sampled_softmax (over the sampled ones) or nce.
        num_negatives: noise samples per image, with replacement (papers: 4,096 to 16,384); unused by softmax.
        bank_momentum: share of the old entry when an image's entry is renewed (Newell & Deng: 0.2 or 0.4).
        projector_depth: number of linear layers of each half's head; 0 = none.
        projector_hidden_dim: width between its layers; None takes the half's feature width.
        projector_dim: width of the banks' entries.
    """

    temperature: float = 0.07
    loss: BankLoss = "sampled_softmax"
    num_negatives: int = 16384
    bank_momentum: float = 0.5
    projector_depth: int = 1
    projector_hidden_dim: int | None = None
    projector_dim: int = 128


class Cmc(nn.Module):
    """The lightness of an image must find the image's colours in a bank, and the colours its lightness."""

    fixed_learning_rate: tuple[str, ...] = ()

    @staticmethod
    def validate(config: CMCConfig, context: MethodContext) -> None:
        """Raises ``ValueError`` for a setting that cannot train."""
        validate_bank(config, context, "cmc")

    def __init__(self, config: CMCConfig, backbone: Any, context: MethodContext) -> None:
        super().__init__()
        self.validate(config, context)
        if not hasattr(backbone, "split_features"):
            raise ValueError("cmc needs the two encoders of build_backbone(..., color_space='lab').")
        self.config = config
        self.backbone: LabBackbone = backbone
        width = backbone.encoder_l.num_features
        hidden, dim, depth = config.projector_hidden_dim or width, config.projector_dim, config.projector_depth
        self.projector_l = mlp_head(width, hidden, dim, depth)
        self.projector_ab = mlp_head(width, hidden, dim, depth)
        self.bank_l = MemoryBank(context.num_images, head_dim(width, dim, depth))
        self.bank_ab = MemoryBank(context.num_images, head_dim(width, dim, depth))

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """L against the bank of ab, plus ab against the bank of L."""
        (x,) = batch.views
        features_l, features_ab = self.backbone.split_features(x)
        a_BD = unit_vectors(self.projector_l(features_l))
        b_BD = unit_vectors(self.projector_ab(features_ab))
        num_noise = 0 if self.config.loss == "softmax" else self.config.num_negatives
        ids_BM1 = self.bank_l.sample(batch.index, num_noise, progress)
        loss_l = self._loss(a_BD, self.bank_ab, ids_BM1)
        loss_ab = self._loss(b_BD, self.bank_l, ids_BM1)
        self.bank_l.stage(a_BD, batch.index, progress.micro_step)
        self.bank_ab.stage(b_BD, batch.index, progress.micro_step)
        metrics = contrast_monitors(a_BD, b_BD) | {"loss_l": loss_l.detach(), "loss_ab": loss_ab.detach()}
        return StepOutput(loss_l + loss_ab, metrics)

    def _loss(self, q_BD: Tensor, bank: MemoryBank, ids_BM1: Tensor) -> Tensor:
        return bank.loss(q_BD, ids_BM1, self.config.loss, self.config.temperature)

    def after_step(self, progress: Progress) -> None:
        """Both banks take the features of the whole global batch."""
        self.bank_l.update(self.config.bank_momentum)
        self.bank_ab.update(self.config.bank_momentum)
