"""BatchNorm over all workers (``sync``) or over groups of one worker's batch (``split``).

Contrastive methods can read the answer from shared batch statistics ("leak", MoCo section 3.3). The papers train on 8
GPUs with one BatchNorm group per GPU; ``split`` gives the same groups inside one process. ``sync`` is torch's
SyncBatchNorm, but it also runs on CPU. Both keep parameters, buffers and state-dict keys of ``nn.BatchNorm``, and both
are plain ``nn.BatchNorm`` in evaluation mode.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from methods.collectives import all_gather_concat, all_reduce_mean, all_reduce_sum_with_grad, world_size

__all__ = [
    "BatchNormKind",
    "CrossProcessBatchNorm1d",
    "CrossProcessBatchNorm2d",
    "SplitBatchNorm1d",
    "SplitBatchNorm2d",
    "average_running_statistics",
    "convert_batchnorm",
]

BatchNormKind = Literal["local", "sync", "split"]


def _statistics_dtype(x: Tensor, weight: Tensor | None) -> torch.dtype:
    # Half-precision inputs keep their statistics in the dtype of the weights, as in nn.BatchNorm.
    return weight.dtype if weight is not None else torch.promote_types(x.dtype, torch.float32)


def _values_per_channel(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def _uses_batch_statistics(bn: _BatchNorm) -> bool:
    return bn.training or bn.running_mean is None


def _update_running_statistics(bn: _BatchNorm, mean_C: Tensor, unbiased_variance_C: Tensor) -> None:
    if not bn.training or bn.running_mean is None or bn.running_var is None or bn.num_batches_tracked is None:
        return
    bn.num_batches_tracked.add_(1)
    # momentum=None means a cumulative average, as in nn.BatchNorm.
    weight = 1.0 / float(bn.num_batches_tracked) if bn.momentum is None else bn.momentum
    bn.running_mean.lerp_(mean_C.to(bn.running_mean.dtype), weight)
    bn.running_var.lerp_(unbiased_variance_C.to(bn.running_var.dtype), weight)


class _SyncBatchNormFunction(torch.autograd.Function):
    """Normalises with given statistics of the global batch; the backward adds the statistics' share.

    With x_hat = (x - mean) / std over N values: dx = w / std * (dy - sum(dy) / N - x_hat * sum(dy * x_hat) / N).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean_C, variance_C, count, eps):
        ctx.save_for_backward(x, weight, mean_C, variance_C, count)
        ctx.eps = eps
        return torch.native_batch_norm(x, weight, bias, mean_C, variance_C, False, 0.0, eps)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, mean_C, variance_C, count = ctx.saved_tensors
        # With fixed statistics the kernel returns dy * w / std, sum(dy * x_hat) and sum(dy): all that is needed.
        direct, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean_C, variance_C, None, None, False, ctx.eps, [True, True, True]
        )
        sums_2C = all_reduce_sum_with_grad(torch.stack([grad_weight, grad_bias])) / count
        inverse_std = torch.rsqrt(variance_C + ctx.eps)
        scale = inverse_std if weight is None else inverse_std * weight
        slope_C = -scale * inverse_std * sums_2C[0]
        offset_C = -scale * sums_2C[1] - slope_C * mean_C
        shape = (1, -1) + (1,) * (x.dim() - 2)
        grad_x = torch.addcmul(direct + offset_C.view(shape), x, slope_C.view(shape)).to(x.dtype)
        has_weight, has_bias = ctx.needs_input_grad[1:3]
        # Weight and bias gradients stay those of this worker: DDP averages them like every other gradient.
        return grad_x, grad_weight if has_weight else None, grad_bias if has_bias else None, None, None, None, None


@torch.no_grad()
def _global_statistics(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), biased variance (C,) and count () over the batches of all workers, without cancellation."""
    n = _values_per_channel(x)
    mean_C, unbiased_C = torch.zeros(2, x.shape[1], dtype=dtype, device=x.device)
    # Momentum 1 writes the batch statistics into the given tensors, in their precision.
    torch.batch_norm_update_stats(x, mean_C, unbiased_C, 1.0)
    variance_C = unbiased_C * ((n - 1) / n) if n > 1 else torch.zeros_like(mean_C)
    local = torch.cat([mean_C, variance_C, mean_C.new_full((1,), n)])
    means_WC, variances_WC, counts_W1 = all_gather_concat(local[None]).split([x.shape[1], x.shape[1], 1], dim=1)
    count = counts_W1.sum()
    shares_W1 = counts_W1 / count
    mean_C = (means_WC * shares_W1).sum(0)
    variance_C = ((variances_WC + (means_WC - mean_C).square()) * shares_W1).sum(0)
    return mean_C, variance_C, count


def _sync_batch_norm(bn: _BatchNorm, x: Tensor) -> Tensor:
    mean_C, variance_C, count = _global_statistics(x, _statistics_dtype(x, bn.weight))
    _update_running_statistics(bn, mean_C, variance_C * (count / (count - 1)))
    return _SyncBatchNormFunction.apply(x, bn.weight, bn.bias, mean_C, variance_C, count, bn.eps)


class CrossProcessBatchNorm1d(nn.BatchNorm1d):
    """``nn.BatchNorm1d`` over the concatenated batches of all workers; differentiable, any device."""

    def forward(self, input: Tensor) -> Tensor:
        if world_size() == 1 or not _uses_batch_statistics(self):
            return super().forward(input)
        self._check_input_dim(input)
        return _sync_batch_norm(self, input)


class CrossProcessBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` over the concatenated batches of all workers; differentiable, any device."""

    def forward(self, input: Tensor) -> Tensor:
        if world_size() == 1 or not _uses_batch_statistics(self):
            return super().forward(input)
        self._check_input_dim(input)
        return _sync_batch_norm(self, input)


class _SplitBatchNormFunction(torch.autograd.Function):
    """``nn.BatchNorm`` on each of `num_splits` contiguous parts of the batch, written into one output."""

    @staticmethod
    def forward(ctx, x, weight, bias, num_splits, eps, dtype):
        # 4 x (S, C): what the backward needs (mean, 1 / std), and mean and unbiased variance for the running averages.
        statistics = torch.zeros(4, num_splits, x.shape[1], dtype=dtype, device=x.device)
        saved_mean, saved_inverse_std, mean_SC, variance_SC = statistics
        out = torch.empty_like(x)
        for s, (part, out_part) in enumerate(zip(x.chunk(num_splits), out.chunk(num_splits), strict=True)):
            # Momentum 1 writes this part's statistics into mean_SC and variance_SC.
            torch.ops.aten.native_batch_norm.out(
                part, weight, bias, mean_SC[s], variance_SC[s], True, 1.0, eps,
                out=out_part, save_mean=saved_mean[s], save_invstd=saved_inverse_std[s],
            )  # fmt: skip
        ctx.save_for_backward(x, weight, saved_mean, saved_inverse_std)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean_SC, variance_SC)
        return out, mean_SC, variance_SC

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        x, weight, saved_mean, saved_inverse_std = ctx.saved_tensors
        num_splits, mask = saved_mean.shape[0], list(ctx.needs_input_grad[:3])
        grad_x = torch.empty_like(x) if mask[0] else None
        grad_weight = torch.zeros_like(saved_mean[0]) if mask[1] else None
        grad_bias = torch.zeros_like(saved_mean[0]) if mask[2] else None
        for s, (grad_part, part) in enumerate(zip(grad.chunk(num_splits), x.chunk(num_splits), strict=True)):
            grads = torch.ops.aten.native_batch_norm_backward(
                grad_part, part, weight, None, None, saved_mean[s], saved_inverse_std[s], True, ctx.eps, mask
            )
            if grad_x is not None:
                # Copied part by part, while it is in cache; a concatenation at the end costs a third more.
                grad_x[s * len(part) : (s + 1) * len(part)].copy_(grads[0])
            if grad_weight is not None:
                grad_weight += grads[1]
            if grad_bias is not None:
                grad_bias += grads[2]
        return grad_x, grad_weight, grad_bias, None, None, None


def _split_batch_norm(bn: _BatchNorm, x: Tensor, num_splits: int) -> Tensor:
    if x.shape[0] % num_splits or _values_per_channel(x) // num_splits < 2:
        raise ValueError(
            f"split BatchNorm got a batch of {x.shape[0]} images for {num_splits} groups; every group needs the same "
            "number of images and more than one value per channel. Choose a batch size that is a multiple of the "
            "number of groups (at least 2 images each), or fewer groups."
        )
    dtype = _statistics_dtype(x, bn.weight)
    out, mean_SC, variance_SC = _SplitBatchNormFunction.apply(x, bn.weight, bn.bias, num_splits, bn.eps, dtype)
    _update_running_statistics(bn, mean_SC.mean(0), variance_SC.mean(0))
    return out


class SplitBatchNorm1d(nn.BatchNorm1d):
    """One process, `num_splits` BatchNorm groups: the contiguous parts of the batch, as if on that many devices.

    The running statistics are the mean over the groups, which is the mean of the devices' own running statistics.
    """

    num_splits: int = 1

    def forward(self, input: Tensor) -> Tensor:
        if self.num_splits == 1 or not _uses_batch_statistics(self):
            return super().forward(input)
        self._check_input_dim(input)
        return _split_batch_norm(self, input, self.num_splits)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """One process, `num_splits` BatchNorm groups: the contiguous parts of the batch, as if on that many devices.

    The running statistics are the mean over the groups, which is the mean of the devices' own running statistics.
    """

    num_splits: int = 1

    def forward(self, input: Tensor) -> Tensor:
        if self.num_splits == 1 or not _uses_batch_statistics(self):
            return super().forward(input)
        self._check_input_dim(input)
        return _split_batch_norm(self, input, self.num_splits)


_CLASSES_1D: dict[BatchNormKind, type[nn.BatchNorm1d]] = {
    "local": nn.BatchNorm1d,
    "sync": CrossProcessBatchNorm1d,
    "split": SplitBatchNorm1d,
}
_CLASSES_2D: dict[BatchNormKind, type[nn.BatchNorm2d]] = {
    "local": nn.BatchNorm2d,
    "sync": CrossProcessBatchNorm2d,
    "split": SplitBatchNorm2d,
}


def convert_batchnorm(module: nn.Module, kind: BatchNormKind, num_splits: int = 1) -> nn.Module:
    """Makes every BatchNorm inside `module` (itself included) of one kind, in place.

    Parameters, buffers, hooks and state-dict keys stay the same objects: only the class changes. Converting again,
    also back to ``local``, is allowed.

    Args:
        module: any module; BatchNorm layers must be ``nn.BatchNorm1d/2d`` or the classes of this file.
        kind: local (one worker's batch), sync (all workers' batches) or split (`num_splits` parts of the batch).
        num_splits: number of groups for kind split; 1 is the same as local.

    Returns:
        `module`.
    """
    if num_splits < 1 or (num_splits > 1 and kind != "split"):
        raise ValueError(
            f"num_splits={num_splits} with kind={kind!r}; it must be at least 1, and 1 unless kind='split'"
        )
    for child in module.modules():
        if type(child) in _CLASSES_1D.values():
            child.__class__ = _CLASSES_1D[kind]
        elif type(child) in _CLASSES_2D.values():
            child.__class__ = _CLASSES_2D[kind]
        elif isinstance(child, _BatchNorm) and kind != "local":
            raise ValueError(
                f"cannot make {type(child).__name__} a {kind!r} BatchNorm: only nn.BatchNorm1d and nn.BatchNorm2d are "
                "known. Use a backbone with plain BatchNorm layers, or local BatchNorm."
            )
        if isinstance(child, (SplitBatchNorm1d, SplitBatchNorm2d)):
            child.num_splits = num_splits
    return module


@torch.no_grad()
def average_running_statistics(module: nn.Module) -> None:
    """Replaces the running statistics of every BatchNorm in `module` by their mean over the workers.

    Local BatchNorm gives each worker its own running statistics; their mean is what split BatchNorm keeps in one
    process. Averaging is linear, so it may be done only when a checkpoint is written. All workers must call it.
    """
    buffers = [
        buffer
        for child in module.modules()
        if isinstance(child, _BatchNorm)
        for buffer in (child.running_mean, child.running_var)
        if buffer is not None
    ]
    if world_size() == 1 or not buffers:
        return
    mean = all_reduce_mean(torch.cat(buffers))
    for buffer, value in zip(buffers, mean.split([len(buffer) for buffer in buffers]), strict=True):
        buffer.copy_(value)
