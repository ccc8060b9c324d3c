"""The one module that talks to ``torch.distributed``.

Every function also works when no process group exists (world size 1, any device), so that the algorithms above it have
no special case for one process. Tensors must have the same shape on all workers.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from methods.random_numbers import random_bits

__all__ = [
    "all_gather_concat",
    "all_reduce_mean",
    "all_reduce_sum_with_grad",
    "broadcast_permutation",
    "gather_with_grad",
    "rank",
    "world_size",
]


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of workers; 1 without a process group."""
    return dist.get_world_size() if _initialized() else 1


def rank() -> int:
    """Number of this worker, from 0; 0 without a process group."""
    return dist.get_rank() if _initialized() else 0


@torch.no_grad()
def all_gather_concat(x: Tensor) -> Tensor:
    """Concatenates the tensors of all workers in rank order; carries no gradient.

    Args:
        x: (B, ...), same shape on every worker. A channels_last (B, C, H, W) tensor stays channels_last.

    Returns:
        (world_size * B, ...). With one worker `x` itself, detached.
    """
    if world_size() == 1:
        return x.detach()
    channels_last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    local = (x.permute(0, 2, 3, 1) if channels_last else x).contiguous()
    gathered = local.new_empty((world_size() * local.shape[0], *local.shape[1:]))
    dist.all_gather_into_tensor(gathered, local)
    return gathered.permute(0, 3, 1, 2) if channels_last else gathered


@torch.no_grad()
def all_reduce_mean(x: Tensor) -> Tensor:
    """Mean over the workers; carries no gradient. With one worker `x` itself, detached."""
    if world_size() == 1:
        return x.detach()
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / world_size()


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.num_rows = x.shape[0]
        return all_gather_concat(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # Every worker's loss used this worker's rows, so their gradients add up.
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        start = rank() * ctx.num_rows
        return total[start : start + ctx.num_rows]


def gather_with_grad(x: Tensor) -> Tensor:
    """Differentiable ``all_gather_concat``: the gradients of all workers for this worker's rows are summed.

    With a loss that is averaged over the workers by DDP, the parameters get the gradient of the mean loss.
    """
    return x if world_size() == 1 else _GatherWithGrad.apply(x)


class _AllReduceSumWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def all_reduce_sum_with_grad(x: Tensor) -> Tensor:
    """Sum over the workers, differentiable: the gradients of all workers are summed on the way back."""
    return x if world_size() == 1 else _AllReduceSumWithGrad.apply(x)


@torch.no_grad()
def broadcast_permutation(n: int, seed: Tensor, counter: int) -> Tensor:
    """Random permutation of 0..n-1 that all workers share: rank 0's is broadcast.

    It is a pure function of `seed` and `counter` (random keys by splitmix64, then sorted), so a resumed run draws the
    same permutations with no generator state to store, one process draws the same as many, and it is computed on the
    device of `seed` without waiting for it.

    Args:
        n: number of elements.
        seed: int64 (), usually a buffer, so that it is part of the checkpoint.
        counter: number of this draw within the run.

    Returns:
        int64 (n,) on the device of `seed`.
    """
    permutation = torch.argsort(random_bits(n, seed, counter), stable=True)
    if world_size() > 1:
        dist.broadcast(permutation, src=0)
    return permutation
