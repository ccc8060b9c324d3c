"""Contrast against a queue of keys: InfoNCE (MoCo, Eq. 1), also label-masked (Exemplar, Zhao et al., ICLR 2021, Eq. 2).

Shapes: B queries, K queued keys, D dimensions. q, k and the queue are unit vectors in the methods, but the formulas
hold for any length. With n_i = log sum_j exp(q_i . queue_j / tau) over the negatives that count for query i, the loss

    -log[ exp(q_i . k_i / tau) / (exp(q_i . k_i / tau) + exp(n_i)) ] = softplus(n_i - q_i . k_i / tau),

so positive and negative logits never meet in one matrix. The queue takes no gradient, so one pass over blocks of it
gives n_i and its gradient sum_j softmax_ij queue_j / tau; no (B, K) matrix is stored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Contrast", "contrast", "info_nce", "label_masked_info_nce"]

# Logits per block. On CPU a block (1 MiB of float32) stays in cache; on a GPU big blocks keep the launches few.
_CPU_BLOCK_LOGITS = 2**18
_GPU_BLOCK_LOGITS = 2**24


class Contrast(NamedTuple):
    """Loss and monitors of one contrast; the monitors carry no gradient.

    Attributes:
        loss: (), mean over the queries.
        top1: (), share of queries whose positive beats every counted negative.
        positive_similarity: (), mean of q . k.
        num_masked_queries: int64 (), queries without a single counted negative (their loss is exactly 0).
    """

    loss: Tensor
    top1: Tensor
    positive_similarity: Tensor
    num_masked_queries: Tensor


class _NegativeLogSumExp(torch.autograd.Function):
    """log sum_j exp(q . queue_j / tau) over the counted keys, and their largest logit; streams over the queue."""

    @staticmethod
    def forward(ctx, q_BD, queue_KD, temperature, labels_B, queue_labels_K):
        scaled_BD = q_BD / temperature
        logits_per_block = _CPU_BLOCK_LOGITS if q_BD.device.type == "cpu" else _GPU_BLOCK_LOGITS
        block_size = max(1, logits_per_block // len(q_BD))
        largest_B1 = q_BD.new_full((len(q_BD), 1), -torch.inf)
        sum_B1 = torch.zeros_like(largest_B1)
        weighted_BD = torch.zeros_like(q_BD)
        for start in range(0, len(queue_KD), block_size):
            keys_bD = queue_KD[start : start + block_size].to(q_BD.dtype)
            logits_Bb = scaled_BD @ keys_bD.T
            if labels_B is not None:
                same_class = labels_B[:, None] == queue_labels_K[start : start + block_size]
                logits_Bb.masked_fill_(same_class, -torch.inf)
            previous_B1, largest_B1 = largest_B1, torch.maximum(largest_B1, logits_Bb.amax(1, keepdim=True))
            # A finite shift: -inf - -inf would be NaN while every key so far is masked.
            shift_B1 = largest_B1.clamp_min(torch.finfo(q_BD.dtype).min)
            exp_Bb = logits_Bb.sub_(shift_B1).exp_()
            rescale_B1 = (previous_B1 - shift_B1).exp_()
            sum_B1.mul_(rescale_B1).add_(exp_Bb.sum(1, keepdim=True))
            if ctx.needs_input_grad[0]:
                weighted_BD.mul_(rescale_B1).addmm_(exp_Bb, keys_bD)
        # Fully masked queries: 0 / tiny = 0, so that their gradient is 0 and not NaN.
        tiny = torch.finfo(q_BD.dtype).tiny
        ctx.save_for_backward(weighted_BD / (sum_B1.clamp_min(tiny) * temperature))
        log_sum_B1 = sum_B1.log() + largest_B1.clamp_min(torch.finfo(q_BD.dtype).min)
        ctx.mark_non_differentiable(largest_B1)
        return log_sum_B1.squeeze(1), largest_B1.squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_B, _):
        (gradient_BD,) = ctx.saved_tensors
        return grad_B[:, None] * gradient_BD, None, None, None, None


def contrast(
    q_BD: Tensor,
    k_BD: Tensor,
    queue_KD: Tensor,
    temperature: float,
    labels_B: Tensor | None = None,
    queue_labels_K: Tensor | None = None,
) -> Contrast:
    """InfoNCE of `q` against its key and the queue, with monitors; label-masked when labels are given.

    Always computed in at least float32, also under autocast. The queue takes no gradient.

    Args:
        q_BD: queries.
        k_BD: their positive keys.
        queue_KD: keys of other images, the negatives.
        temperature: tau > 0.
        labels_B: int64, class of each query; queued keys of the same class do not count. The positive always counts.
        queue_labels_K: int64, class of each queued key; -1 = unknown, which is always a negative.

    Returns:
        The loss and its monitors.
    """
    if (labels_B is None) != (queue_labels_K is None):
        raise ValueError("label masking needs the labels of both the queries and the queue; only one of them was given")
    dtype = torch.promote_types(q_BD.dtype, torch.float32)
    with torch.autocast(q_BD.device.type, enabled=False):
        q_BD, k_BD = q_BD.to(dtype), k_BD.to(dtype)
        similarity_B = (q_BD * k_BD).sum(1)
        positive_B = similarity_B / temperature
        negative_B, hardest_B = _NegativeLogSumExp.apply(q_BD, queue_KD, temperature, labels_B, queue_labels_K)
        # softplus(-inf) is exactly 0 with zero gradient. Above the threshold softplus(x) = x to machine precision.
        loss = F.softplus(negative_B - positive_B, threshold=40.0).mean()
    with torch.no_grad():
        return Contrast(
            loss=loss,
            top1=(positive_B >= hardest_B).to(dtype).mean(),
            positive_similarity=similarity_B.detach().mean(),
            num_masked_queries=hardest_B.isneginf().sum(),
        )


def info_nce(q_BD: Tensor, k_BD: Tensor, queue_KD: Tensor, temperature: float) -> Tensor:
    """MoCo's loss: the mean over B of -log[ e^(q.k/tau) / (e^(q.k/tau) + sum_j e^(q.queue_j/tau)) ].

    Args:
        q_BD: queries.
        k_BD: their positive keys.
        queue_KD: negatives; they take no gradient.
        temperature: tau > 0.

    Returns:
        The loss, ().
    """
    return contrast(q_BD, k_BD, queue_KD, temperature).loss


def label_masked_info_nce(
    q_BD: Tensor, k_BD: Tensor, queue_KD: Tensor, labels_B: Tensor, queue_labels_K: Tensor, temperature: float
) -> Tensor:
    """Exemplar's loss: ``info_nce`` whose sum over the queue skips the keys of the query's own class.

    Skipped logits are -inf (not 0, which would leave e^0 = 1 each in the denominator). A query whose class fills the
    whole queue has loss 0 and zero gradient.

    Args:
        q_BD: queries.
        k_BD: their positive keys, never masked.
        queue_KD: keys of other images; they take no gradient.
        labels_B: int64, class of each query.
        queue_labels_K: int64, class of each queued key, -1 = unknown (always a negative).
        temperature: tau > 0.

    Returns:
        The loss, ().
    """
    return contrast(q_BD, k_BD, queue_KD, temperature, labels_B, queue_labels_K).loss
