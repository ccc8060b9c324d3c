"""One remembered feature per training image, and the losses against it (Wu et al., CVPR 2018, "InstDisc").

Shapes: n images, D dimensions, B queries of this worker, M noise samples per query. All workers hold the whole bank
(n * D * 4 bytes: 0.66 GB for ImageNet at 128 dimensions) and write the features of the whole global batch, so the
copies stay equal. The bank takes no gradient.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from methods.collectives import all_gather_concat, all_reduce_mean, rank
from methods.contracts import MethodContext, Progress
from methods.heads import validate_projector
from methods.losses import log_sum_exp
from methods.random_numbers import random_integers

__all__ = ["BankLoss", "MemoryBank", "nce_loss", "sampled_logits", "sampled_softmax_loss", "validate_bank"]

BankLoss = Literal["nce", "softmax", "sampled_softmax"]

# Bank rows gathered at once. On CPU they stay in cache; on a GPU big gathers keep the launches few.
_CPU_CHUNK_VALUES = 2**19
_GPU_CHUNK_VALUES = 2**26


class _SampledSimilarity(torch.autograd.Function):
    """q_i . bank[ids_ij] without storing the (B, M, D) rows; the backward gathers them again."""

    @staticmethod
    def forward(ctx: Any, q_BD: Tensor, bank_nD: Tensor, ids_BM: Tensor) -> Tensor:
        ctx.save_for_backward(bank_nD, ids_BM)
        out_BM = q_BD.new_empty(ids_BM.shape)
        for rows in _chunks(q_BD, ids_BM):
            torch.bmm(bank_nD[ids_BM[rows]].to(q_BD.dtype), q_BD[rows, :, None], out=out_BM[rows, :, None])
        return out_BM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BM: Tensor) -> tuple[Tensor, None, None]:
        bank_nD, ids_BM = ctx.saved_tensors
        grad_BD = grad_BM.new_empty(len(ids_BM), bank_nD.shape[1])
        for rows in _chunks(grad_BD, ids_BM):
            torch.bmm(grad_BM[rows, None], bank_nD[ids_BM[rows]].to(grad_BM.dtype), out=grad_BD[rows, None])
        return grad_BD, None, None


def _chunks(q_BD: Tensor, ids_BM: Tensor) -> list[slice]:
    limit = _CPU_CHUNK_VALUES if q_BD.device.type == "cpu" else _GPU_CHUNK_VALUES
    size = max(1, limit // (ids_BM.shape[1] * q_BD.shape[1]))
    return [slice(start, start + size) for start in range(0, len(ids_BM), size)]


def sampled_logits(q_BD: Tensor, bank_nD: Tensor, ids_BM: Tensor, temperature: float) -> Tensor:
    """q_i . bank[ids_ij] / tau, (B, M), in float32 or better; gradient to q only."""
    with torch.autocast(q_BD.device.type, enabled=False):
        q_BD = q_BD.to(torch.promote_types(q_BD.dtype, torch.float32))
        return _SampledSimilarity.apply(q_BD, bank_nD, ids_BM) / temperature


def nce_loss(logits_BM1: Tensor, log_z: Tensor, num_images: int) -> Tensor:
    """-log h(own) - sum over the noise of log(1 - h(noise)), h = P / (P + M / n), P = exp(logit) / Z; mean over B.

    Section 3.2 of the paper; the official code adds 1e-7 to the denominators.

    Args:
        logits_BM1: column 0 is the image's own entry, the others are the M noise samples.
        log_z: (), log of the constant Z.
        num_images: n.
    """
    num_noise = logits_BM1.shape[1] - 1
    odds_BM1 = logits_BM1 - log_z - math.log(num_noise / num_images)
    return -(F.logsigmoid(odds_BM1[:, 0]) + F.logsigmoid(-odds_BM1[:, 1:]).sum(1)).mean()


def sampled_softmax_loss(logits_BM1: Tensor) -> Tensor:
    """Cross entropy over the own entry (column 0) and the noise samples; mean over B."""
    return (logits_BM1.logsumexp(1) - logits_BM1[:, 0]).mean()


class MemoryBank(nn.Module):
    """Ring-free memory: entry i is a running average of the unit features of image i.

    Attributes:
        features: float (n, D); uniform in +-1/sqrt(D/3) until an image is first seen (``lemniscate``).
        log_z: float (), log of NCE's constant Z; infinite until the first step sets it.
        seed: int64 (), source of all noise samples of the run.
    """

    features: Tensor
    log_z: Tensor
    seed: Tensor

    def __init__(self, num_images: int, dim: int) -> None:
        """A bank from the global generator, like initial weights: the same on every worker after DDP has started."""
        super().__init__()
        bound = 1.0 / math.sqrt(dim / 3)
        self.register_buffer("features", torch.empty(num_images, dim).uniform_(-bound, bound))
        self.register_buffer("log_z", torch.full((), torch.inf))
        self.register_buffer("seed", torch.randint(2**62, ()))
        self._staged: list[tuple[Tensor, Tensor]] = []

    def sample(self, index_B: Tensor, num_noise: int, progress: Progress) -> Tensor:
        """Own entry and `num_noise` uniform entries with replacement (the own one may be among them); (B, M + 1)."""
        size = len(index_B)
        first = (rank() * progress.num_micro_steps + progress.micro_step) * size * num_noise
        noise = random_integers(size * num_noise, len(self.features), self.seed, progress.step, first)
        return torch.cat([index_B[:, None], noise.view(size, num_noise)], dim=1)

    def loss(self, q_BD: Tensor, ids_BM1: Tensor, kind: BankLoss, temperature: float) -> Tensor:
        """The loss of unit queries against the bank; ().

        Args:
            q_BD: features with gradient.
            ids_BM1: entries from ``sample``; only the first column counts for "softmax".
            kind: nce, softmax over all n entries, or sampled_softmax over the sampled ones.
            temperature: tau > 0.
        """
        if kind == "softmax":
            own_B = sampled_logits(q_BD, self.features, ids_BM1[:, :1], temperature)[:, 0]
            return (log_sum_exp(q_BD, self.features, temperature) - own_B).mean()
        logits_BM1 = sampled_logits(q_BD, self.features, ids_BM1, temperature)
        if kind == "sampled_softmax":
            return sampled_softmax_loss(logits_BM1)
        self._set_z(logits_BM1.detach())
        return nce_loss(logits_BM1, self.log_z, len(self.features))

    @torch.no_grad()
    def _set_z(self, logits: Tensor) -> None:
        """Z = n * mean(exp(logit)) over the first batch of all workers, then constant."""
        mean = all_reduce_mean(logits.exp().mean())
        log_z = mean.log() + math.log(len(self.features))
        self.log_z.copy_(torch.where(self.log_z.isinf(), log_z.to(self.log_z.dtype), self.log_z))

    @torch.no_grad()
    def stage(self, features_BD: Tensor, index_B: Tensor, micro_step: int) -> None:
        """Remembers the features of one forward pass until ``update``; micro_step 0 forgets an abandoned step."""
        if micro_step == 0:
            self._staged.clear()
        self._staged.append((features_BD.detach(), index_B))

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """v_i <- normalise(momentum v_i + (1 - momentum) f_i) for every image of the global batch."""
        assert self._staged, "update() before stage()"
        features, index = (all_gather_concat(torch.cat(parts)) for parts in zip(*self._staged, strict=True))
        self._staged.clear()
        mixed = self.features[index].lerp(features.to(self.features.dtype), 1.0 - momentum)
        self.features.index_copy_(0, index, F.normalize(mixed, dim=1))


def validate_bank(config: Any, context: MethodContext, method: str) -> None:
    """Raises ``ValueError`` for values of temperature, loss, num_negatives, bank_momentum or head that cannot train."""
    if config.loss not in get_args(BankLoss):
        raise ValueError(f"{method} got loss={config.loss!r}; choose one of: {', '.join(get_args(BankLoss))}.")
    if not config.temperature > 0:
        raise ValueError(f"{method} got temperature={config.temperature}; it must be above 0 (papers: 0.07 to 0.1).")
    if not 0 <= config.bank_momentum < 1:
        raise ValueError(f"{method} got bank_momentum={config.bank_momentum}; it must be in [0, 1) (paper: 0.5).")
    if config.loss != "softmax" and config.num_negatives < 1:
        raise ValueError(
            f"{method} got num_negatives={config.num_negatives}; it must be at least 1, or use loss='softmax', which "
            "compares with every image."
        )
    validate_projector(config, method)
    if context.num_images < 2:
        raise ValueError(f"{method} tells images apart, but the pretraining data has {context.num_images} image(s).")
