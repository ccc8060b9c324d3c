"""SwAV (Caron et al., NeurIPS 2020, arXiv 2006.09882).

Codes q of one crop are predicted from the other crops: L = mean over the assignment crops a of the mean over all other
crops v of -sum_k q_a^(k) log softmax(z_v^T C / tau)^(k) (Eq. 2), with C a set of unit prototypes and q the optimal
transport of the embeddings of all workers (and of a queue) to the prototypes with equal shares (Eqs. 3-5). As in
``facebookresearch/swav: main_swav.py``: 2 large and 6 small crops, those of one size go through the network as one
batch; prototypes are put back to length 1 before every step and get no gradient at first; each assignment crop has a
queue of earlier embeddings, from some epoch on and once it is full, which serves the codes only.
Ours: the queue keeps the order of the global batch on all workers, so that their number does not change the codes.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.batchnorm import convert_batchnorm
from methods.collectives import all_reduce_mean, rank, world_size
from methods.contracts import Batch, MethodContext, Progress, StepOutput
from methods.heads import head_dim, mlp_head, validate_head_batch, validate_projector
from methods.momentum_encoder import unit_vectors
from methods.monitors import contrast_monitors
from methods.optimizers import OptimizerConfig
from methods.queue import FeatureQueue

__all__ = ["OPTIMIZER", "VIEWS", "Swav", "SwavConfig", "sinkhorn", "swapped_prediction_loss"]

NUM_ASSIGNMENT_CROPS = 2  # the large crops, the first two views
VIEWS = ("swav_large", "swav_large", *["swav_small"] * 6)
# Batch 256: 0.6 -> 0.0006 without warm-up. Batch 4096: 4.8 -> 0.0048 (0.3 per 256), 10 warm-up epochs.
OPTIMIZER = OptimizerConfig(
    optimizer="larc", learning_rate=0.6, weight_decay=1e-6, schedule="cosine", final_learning_rate=0.0006
)


@dataclass(frozen=True)
class SwavConfig:
    """Defaults are the recipe for a batch of 256 (batch 4096: no queue).

    Attributes:
        temperature: tau of the prediction.
        num_prototypes: K.
        epsilon: smoothness of the codes; 0 would be hard assignments.
        sinkhorn_iterations: rounds of Sinkhorn and Knopp's normalisation.
        queue_size: earlier embeddings per assignment crop that take part in the codes; a multiple of the global batch,
            at most the number of images; 0 = none.
        queue_start_epoch: epoch (from 0) from which the queue is filled.
        frozen_prototype_epochs: epochs at the start without gradient for the prototypes; may be fractional.
        projector_depth: number of linear layers, BatchNorm and ReLU between them; 0 = none.
        projector_hidden_dim: width between its layers; None takes the backbone's feature width (official: 2048).
        projector_dim: width of embeddings and prototypes.
        sync_batchnorm: BatchNorm over the batches of all workers.
    """

    temperature: float = 0.1
    num_prototypes: int = 3000
    epsilon: float = 0.05
    sinkhorn_iterations: int = 3
    queue_size: int = 3840
    queue_start_epoch: int = 15
    frozen_prototype_epochs: float = 1.0
    projector_depth: int = 2
    projector_hidden_dim: int | None = None
    projector_dim: int = 128
    sync_batchnorm: bool = True


@torch.no_grad()
def sinkhorn(scores_NK: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Codes of the embeddings of all workers: exp(scores / epsilon) scaled to equal prototype shares.

    Each round divides by the sum of every prototype over the embeddings of all workers, then by the sum of every
    embedding over the prototypes; the rows of the result sum to 1.

    Args:
        scores_NK: z^T C of this worker's N embeddings.
        epsilon: above 0.
        iterations: rounds.

    Returns:
        (N, K), in float32 or better.
    """
    dtype = torch.promote_types(scores_NK.dtype, torch.float32)
    logits_NK = scores_NK.to(dtype) / epsilon
    # The largest logit of any embedding of any worker would do; |score| <= 1 makes 1 / epsilon a bound for all.
    codes_NK = (logits_NK - 1.0 / epsilon).exp()
    for _ in range(iterations):
        codes_NK = codes_NK / (all_reduce_mean(codes_NK.sum(0)) * world_size())
        codes_NK = codes_NK / codes_NK.sum(1, keepdim=True)
    return codes_NK


def swapped_prediction_loss(scores_VBK: list[Tensor], codes_ABK: list[Tensor], temperature: float) -> Tensor:
    """Mean over the assignment crops a of the mean over the crops v != a of -sum_k q_a log softmax(s_v / tau); ().

    Args:
        scores_VBK: scores of every crop.
        codes_ABK: codes of the first crops, without gradient.
        temperature: tau > 0.
    """
    terms = []
    with torch.autocast(scores_VBK[0].device.type, enabled=False):
        dtype = torch.promote_types(scores_VBK[0].dtype, torch.float32)
        log_probabilities = [F.log_softmax(scores.to(dtype) / temperature, dim=1) for scores in scores_VBK]
        for a, codes_BK in enumerate(codes_ABK):
            others = [-(codes_BK * p_BK).sum(1).mean() for v, p_BK in enumerate(log_probabilities) if v != a]
            terms.append(torch.stack(others).mean())
        return torch.stack(terms).mean()


class Swav(nn.Module):
    """All crops of an image predict the cluster codes of its two large crops."""

    fixed_learning_rate: tuple[str, ...] = ()

    @staticmethod
    def validate(config: SwavConfig, context: MethodContext) -> None:
        """Raises ``ValueError`` for a setting that cannot train; warns where accumulation changes the codes."""
        for name in ("temperature", "epsilon"):
            if not getattr(config, name) > 0:
                raise ValueError(f"swav got {name}={getattr(config, name)}; it must be above 0.")
        validate_projector(config, "swav")
        if config.num_prototypes < 2 or config.sinkhorn_iterations < 1:
            raise ValueError(
                f"swav got num_prototypes={config.num_prototypes}, sinkhorn_iterations={config.sinkhorn_iterations}; "
                "it needs at least 2 prototypes and 1 iteration."
            )
        batch = context.global_batch_size
        if config.queue_size < 0 or config.queue_size % batch or config.queue_size > context.num_images:
            largest = context.num_images // batch * batch
            raise ValueError(
                f"swav got queue_size={config.queue_size}; it must be 0 (none) or a multiple of the global batch of "
                f"{batch}, at most {largest} with {context.num_images} images."
            )
        validate_head_batch(context, config.sync_batchnorm)
        if context.num_micro_steps > 1:
            warnings.warn(
                f"swav computes codes over one forward pass: with {context.num_micro_steps} micro-steps over "
                f"{batch // context.num_micro_steps} images at a time, not over the global batch of {batch}. A queue "
                "makes up for it.",
                stacklevel=2,
            )

    @staticmethod
    def num_views(config: SwavConfig) -> range:
        """The two assignment crops and any number of others."""
        return range(NUM_ASSIGNMENT_CROPS, 100)

    def __init__(self, config: SwavConfig, backbone: Any, context: MethodContext) -> None:
        super().__init__()
        self.validate(config, context)
        self.config = config
        self.backbone = backbone
        width = backbone.num_features
        self.projector = mlp_head(
            width,
            config.projector_hidden_dim or width,
            config.projector_dim,
            config.projector_depth,
            batchnorm=True,
            hidden_bias=True,
        )
        dim = head_dim(width, config.projector_dim, config.projector_depth)
        self.prototypes = nn.Linear(dim, config.num_prototypes, bias=False)
        if config.sync_batchnorm and context.world_size > 1:
            convert_batchnorm(self, "sync")
        num_queues = NUM_ASSIGNMENT_CROPS if config.queue_size else 0
        self.queues = nn.ModuleList(FeatureQueue(config.queue_size, dim) for _ in range(num_queues))
        self._global_batch = context.global_batch_size

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """Swapped prediction over all crops."""
        if progress.micro_step == 0:
            with torch.no_grad():
                self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        z_VBD = self._embeddings(batch.views)
        is_frozen = progress.step < self.config.frozen_prototype_epochs * _steps_per_epoch(progress)
        # Zero gradient instead of none: DDP then has no unused parameter; LARS and the renewed length make it a no-op.
        prototypes_KD = self.prototypes.weight
        if is_frozen:
            prototypes_KD = prototypes_KD.detach() + 0.0 * prototypes_KD
        with torch.autocast(z_VBD[0].device.type, enabled=False):
            scores_VBK = [z_BD @ prototypes_KD.T for z_BD in z_VBD]
        codes_ABK = [self._codes(a, scores_VBK[a], progress) for a in range(NUM_ASSIGNMENT_CROPS)]
        loss = swapped_prediction_loss(scores_VBK, codes_ABK, self.config.temperature)
        if self._fills_queue(progress):
            for queue, z_BD in zip(self.queues, z_VBD, strict=False):
                queue.stage(z_BD, batch.labels, batch.index, progress.micro_step)  # type: ignore[operator]
        metrics = contrast_monitors(z_VBD[0], z_VBD[1])
        metrics["prototype_entropy"] = _usage_entropy(codes_ABK[0])
        return StepOutput(loss, metrics)

    def _embeddings(self, views: list[Tensor]) -> list[Tensor]:
        """Unit embeddings of every crop; consecutive crops of one size share a forward pass of the backbone."""
        pooled, sizes = [], []
        for _, group in groupby(views, key=lambda view: view.shape[-1]):
            crops = list(group)
            pooled.append(self.backbone(torch.cat(crops)))
            sizes += [len(crop) for crop in crops]
        return list(unit_vectors(self.projector(torch.cat(pooled))).split(sizes))

    @torch.no_grad()
    def _codes(self, crop: int, scores_BK: Tensor, progress: Progress) -> Tensor:
        """Codes of this worker's embeddings, together with its share of the queue once that is full."""
        scores_NK = scores_BK.detach()
        if self._uses_queue(progress):
            share = self.config.queue_size // world_size()
            queue: Any = self.queues[crop]
            earlier_QD = queue.keys[rank() * share : (rank() + 1) * share]
            scores_NK = torch.cat([earlier_QD.to(scores_NK.dtype) @ self.prototypes.weight.T, scores_NK])
        return sinkhorn(scores_NK, self.config.epsilon, self.config.sinkhorn_iterations)[-len(scores_BK) :]

    def _fills_queue(self, progress: Progress) -> bool:
        return bool(self.queues) and progress.epoch >= self.config.queue_start_epoch

    def _uses_queue(self, progress: Progress) -> bool:
        """Whether earlier steps have filled the queue: a function of the step, so that the host waits for nothing."""
        if not self._fills_queue(progress):
            return False
        filled = progress.step - self.config.queue_start_epoch * _steps_per_epoch(progress)
        return filled * self._global_batch >= self.config.queue_size

    def after_step(self, progress: Progress) -> None:
        """The embeddings of the whole global batch enter the queues."""
        if self._fills_queue(progress):
            for queue in self.queues:
                queue.enqueue_staged()  # type: ignore[operator]


def _steps_per_epoch(progress: Progress) -> int:
    return progress.total_steps // progress.total_epochs


@torch.no_grad()
def _usage_entropy(codes_BK: Tensor) -> Tensor:
    """Entropy of the mean code over log K: 1 when all prototypes are used alike, 0 when one takes everything."""
    share_K = all_reduce_mean(codes_BK.mean(0))
    return torch.special.entr(share_K).sum() / math.log(len(share_K))
