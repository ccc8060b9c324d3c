"""Contrast against a queue of keys: InfoNCE (MoCo, Eq. 1), also label-masked (Exemplar, Zhao et al., ICLR 2021, Eq. 2).

Shapes: B queries, K queued keys, D dimensions. q, k and the queue are unit vectors in the methods, but the formulas
hold for any length. With n_i = log sum_j exp(q_i . queue_j / tau) over the negatives that count for query i, the loss

    -log[ exp(q_i . k_i / tau) / (exp(q_i . k_i / tau) + exp(n_i)) ] = softplus(n_i - q_i . k_i / tau),

so positive and negative logits never meet in one matrix. The queue takes no gradient, so one pass over blocks of it
gives n_i and its gradient sum_j softmax_ij queue_j / tau; no (B, K) matrix is stored. Exponents are shifted by the
largest logit seen so far rather than by the bound 1 / tau of unit vectors: any length and any temperature stay exact.
That costs next to nothing beside the matrix products, and the largest logit is a monitor anyway. Measured by
``benchmarks/large_queue.py``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Contrast", "contrast", "info_nce", "label_masked_info_nce", "log_sum_exp"]

# Logits per block: 8 MiB of float32 on a CPU, 64 on a GPU. One thread is as fast with 1 MiB, but several wait for each
# other at the end of every operation, which is slow when the data pipeline needs the same cores.
_CPU_BLOCK_LOGITS = 2**21
_GPU_BLOCK_LOGITS = 2**24
_LOG2_E = math.log2(math.e)


class Contrast(NamedTuple):
    """Loss and monitors of one contrast; the monitors carry no gradient.

    Attributes:
        loss: (), mean over the queries.
        top1: (), share of queries whose positive beats every counted negative.
        positive_similarity: (), mean of q . k.
        num_masked_queries: int64 (), queries without a single counted negative (their loss is exactly 0).
        negative_similarity: (), mean of q . queue over all queries and all keys, the masked ones too.
    """

    loss: Tensor
    top1: Tensor
    positive_similarity: Tensor
    num_masked_queries: Tensor
    negative_similarity: Tensor


class _SameClassMask:
    """Rows of 0 and -inf that, added to a key's logits, remove it from the queries of its own class.

    One row per class of the batch, copied to each key: far cheaper on a CPU than comparing B labels with each of K and
    filling, the same for few classes as for many, and without a list of pairs, whose length a GPU would have to tell.
    """

    def __init__(self, labels_B: Tensor, queue_labels_K: Tensor, dtype: torch.dtype) -> None:
        sorted_B = labels_B.sort().values
        self.queue_labels_K = queue_labels_K
        # A label above all others is looked up at position B, so the largest one stands there again: no match.
        self.sorted_labels = torch.cat([sorted_B, sorted_B[-1:]])
        size = len(labels_B)
        self.rows = torch.zeros(size + 1, size, dtype=dtype, device=labels_B.device)
        self.rows[:size].masked_fill_(sorted_B[:, None] == labels_B, -torch.inf)

    def copy_rows(self, block: slice) -> Tensor:
        """(b, B) for the keys of a block; the caller owns it."""
        labels_b = self.queue_labels_K[block]
        no_match = len(self.sorted_labels) - 1
        row_b = torch.searchsorted(self.sorted_labels[:no_match], labels_b)
        row_b.masked_fill_(self.sorted_labels.index_select(0, row_b) != labels_b, no_match)
        return self.rows.index_select(0, row_b)


class _NegativeLogSumExp(torch.autograd.Function):
    """log2 sum_j exp(q . queue_j / tau) over the counted keys, the largest of these logits / ln 2, the mean key."""

    @staticmethod
    def forward(ctx, q_BD, queue_KD, temperature, labels_B, queue_labels_K):
        scale = _LOG2_E / temperature  # powers of 2, because exp2 is cheaper than exp
        scaled_BD = q_BD * scale
        logits_per_block = _CPU_BLOCK_LOGITS if q_BD.device.type == "cpu" else _GPU_BLOCK_LOGITS
        block_size = max(1, logits_per_block // len(q_BD))
        mask = None if labels_B is None else _SameClassMask(labels_B, queue_labels_K, q_BD.dtype)
        smallest = torch.finfo(q_BD.dtype).min
        largest_B = q_BD.new_full((len(q_BD),), -torch.inf)
        sum_B, weighted_BD, key_sum_D = torch.zeros_like(largest_B), torch.zeros_like(q_BD), torch.zeros_like(q_BD[0])
        for start in range(0, len(queue_KD), block_size):
            block = slice(start, start + block_size)
            keys_bD = queue_KD[block].to(q_BD.dtype)  # a bf16 queue is exact here: only its storage is bf16
            key_sum_D += keys_bD.sum(0)
            if mask is None:
                logits_bB = keys_bD @ scaled_BD.T
            else:
                logits_bB = mask.copy_rows(block).addmm_(keys_bD, scaled_BD.T)
            previous_B, largest_B = largest_B, torch.maximum(largest_B, logits_bB.amax(0))
            # A finite shift: -inf - -inf would be NaN while every key so far is masked.
            shift_B = largest_B.clamp_min(smallest)
            exp_bB = logits_bB.sub_(shift_B).exp2_()
            rescale_B = (previous_B - shift_B).exp2_()
            sum_B.mul_(rescale_B).add_(exp_bB.sum(0))
            if ctx.needs_input_grad[0]:
                weighted_BD.mul_(rescale_B[:, None]).addmm_(exp_bB.T, keys_bD)
        # The largest logit alone adds 1 to the sum. It is 0 for fully masked queries: their gradient is 0, not 0 / 0.
        ctx.save_for_backward(weighted_BD * (scale / sum_B.clamp_min(1.0))[:, None])
        log_sum_B = sum_B.log2() + largest_B.clamp_min(smallest)
        key_mean_D = key_sum_D / len(queue_KD)
        ctx.mark_non_differentiable(largest_B, key_mean_D)
        return log_sum_B, largest_B, key_mean_D

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_B, *_):
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
        queue_KD: keys of other images, the negatives; also in bf16, which counts as its values in float32.
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
        positive_B = similarity_B * (_LOG2_E / temperature)
        negative_B, hardest_B, key_mean_D = _NegativeLogSumExp.apply(
            q_BD, queue_KD, temperature, labels_B, queue_labels_K
        )
        # softplus(-inf) is exactly 0 with zero gradient. Above the threshold softplus(x) = x to machine precision.
        loss = F.softplus((negative_B - positive_B) / _LOG2_E, threshold=40.0).mean()
    with torch.no_grad(), torch.autocast(q_BD.device.type, enabled=False):
        return Contrast(
            loss=loss,
            top1=(positive_B >= hardest_B).to(dtype).mean(),
            positive_similarity=similarity_B.detach().mean(),
            num_masked_queries=hardest_B.isneginf().sum(),
            negative_similarity=q_BD.mean(0) @ key_mean_D,
        )


def log_sum_exp(q_BD: Tensor, keys_KD: Tensor, temperature: float) -> Tensor:
    """log sum_j exp(q_i . key_j / tau) over all keys, (B,), in one pass over them; gradient to q only."""
    with torch.autocast(q_BD.device.type, enabled=False):
        q_BD = q_BD.to(torch.promote_types(q_BD.dtype, torch.float32))
        return _NegativeLogSumExp.apply(q_BD, keys_KD, temperature, None, None)[0] / _LOG2_E


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
