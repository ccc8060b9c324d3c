"""A plain training loop that follows ``num_phases``, and CAMtrast's mask by hand; for the tests of its variants."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from methods.collectives import all_reduce_mean, world_size
from methods.contracts import Batch, MethodContext, Progress
from tests.methods.examples import make_batch, make_context, share

__all__ = ["advance", "make_optimizer", "micro_batch", "slow_bilinear", "slow_suppressed", "train_phases"]

# One step per epoch, as the examples' progress().
TOTAL = 4


def make_optimizer(method: Any) -> torch.optim.Optimizer:
    """SGD whose momentum and weight decay show which parameters a step touched."""
    trained = [p for p in method.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.1, momentum=0.5, weight_decay=0.01)


def micro_batch(batch: Batch, m: int, count: int) -> Batch:
    """Part `m` of `count` of a batch."""
    size = len(batch.labels) // count
    part = slice(m * size, (m + 1) * size)
    return Batch([view[part] for view in batch.views], batch.labels[part], batch.index[part])


def advance(
    method: Any,
    optimizer: torch.optim.Optimizer,
    num_views: int,
    steps: Sequence[int],
    count: int = 1,
    wrapped: Any = None,
) -> list[Tensor]:
    """Optimiser steps on the batches of `steps`; the loss of each, summed over phases, mean over workers."""
    losses = []
    for step in steps:
        batch = share(make_batch(num_views, seed=step))
        progress = Progress(step, TOTAL, step, TOTAL, 0, count)
        total = torch.zeros((), dtype=torch.float64)
        phases = method.num_phases(progress) if hasattr(method, "num_phases") else 1
        for phase in range(phases):
            optimizer.zero_grad()
            for m in range(count):
                progress = Progress(step, TOTAL, step, TOTAL, m, count, phase)
                last = m + 1 == count
                with contextlib.nullcontext() if last or wrapped is None else wrapped.no_sync():
                    loss = (wrapped or method)(micro_batch(batch, m, count), progress).loss
                    (loss / count).backward()
                total += loss.detach() / count
            optimizer.step()
        method.after_step(progress)
        losses.append(all_reduce_mean(total))
    return losses


def train_phases(build: Callable[[MethodContext], Any], num_views: int = 1, num_steps: int = 4) -> dict[str, Any]:
    """Trains a new method in float64 on global batches shared by all workers, under DDP when there are several.

    Returns:
        "losses" of the steps, and "state": name -> parameter or buffer after the last.
    """
    torch.manual_seed(0)
    method = build(make_context(world_size=world_size())).double().train()
    wrapped = None
    if world_size() > 1:
        unused = getattr(method, "has_unused_parameters", False)
        # As the train loop wraps it.
        wrapped = DistributedDataParallel(
            method, broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=unused
        )
    losses = advance(method, make_optimizer(method), num_views, range(num_steps), wrapped=wrapped)
    return {"losses": torch.stack(losses), "state": {name: v.detach() for name, v in method.state_dict().items()}}


def slow_bilinear(small: Tensor, height: int, width: int) -> Tensor:
    """Enlarges (h, w) pixel by pixel: half-pixel centres, edges repeated."""

    def position(i: int, out: int, size: int) -> tuple[int, int, float]:
        source = min(max((i + 0.5) * size / out - 0.5, 0), size - 1)
        return int(source), min(int(source) + 1, size - 1), source - int(source)

    large = torch.empty(height, width, dtype=small.dtype)
    for y in range(height):
        top, bottom, fy = position(y, height, small.shape[0])
        for x in range(width):
            left, right, fx = position(x, width, small.shape[1])
            upper = small[top, left] * (1 - fx) + small[top, right] * fx
            lower = small[bottom, left] * (1 - fx) + small[bottom, right] * fx
            large[y, x] = upper * (1 - fy) + lower * fy
    return large


@torch.no_grad()
def slow_suppressed(x: Tensor, features: Tensor, weight: Tensor, classes: Tensor, scale_first: bool) -> Tensor:
    """(1 - M) * x, image by image."""
    suppressed = []
    for b in range(len(x)):
        cam = sum(weight[classes[b], k] * features[b, k] for k in range(features.shape[1]))
        for step in ("scale", "upsample") if scale_first else ("upsample", "scale"):
            if step == "scale":
                cam = cam - cam.min()
                cam = cam / cam.max()
            else:
                cam = slow_bilinear(cam, *x.shape[2:])
        suppressed.append((1 - cam) * x[b])
    return torch.stack(suppressed)
