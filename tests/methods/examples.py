"""Small backbone, batches and contexts that the tests of the methods share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from methods.collectives import all_reduce_mean, rank, world_size
from methods.contracts import Batch, MethodContext, Progress

__all__ = ["TinyBackbone", "make_batch", "make_context", "progress", "share", "train_steps"]


class TinyBackbone(nn.Module):
    """Two convolutions with BatchNorm: 8 features, stride 2; fast enough for float64."""

    num_features = 8

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.Tanh())
        self.layer1 = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8))

    @property
    def stages(self) -> list[nn.Module]:
        return [self.stem, self.layer1]

    def forward_features(self, x: Tensor) -> Tensor:
        return self.layer1(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x).mean(dim=(2, 3))


def make_context(batch_size: int = 8, **changes: Any) -> MethodContext:
    """A data set of 64 images in 4 classes, 8 px."""
    defaults = {"num_classes": 4, "num_images": 64, "world_size": 1, "image_size": 8}
    return MethodContext(**{**defaults, "global_batch_size": batch_size, **changes})


def make_batch(num_views: int, batch_size: int = 8, seed: int = 0, size: int = 8, dtype=torch.float64) -> Batch:
    """Random views, labels and image ids of a global batch."""
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(batch_size, 3, size, size, generator=generator, dtype=dtype) for _ in range(num_views)]
    labels = torch.randint(4, (batch_size,), generator=generator)
    return Batch(views, labels, torch.randperm(64, generator=generator)[:batch_size])


def progress(step: int = 0, total: int = 4, **changes: int) -> Progress:
    """One optimiser step per epoch."""
    return Progress(step, total, step, total, **changes)


def share(batch: Batch) -> Batch:
    """This worker's part of a global batch."""
    size = len(batch.labels) // world_size()
    part = slice(rank() * size, (rank() + 1) * size)
    return Batch([view[part] for view in batch.views], batch.labels[part], batch.index[part])


def train_steps(build: Callable[[MethodContext], Any], num_views: int, num_steps: int = 2) -> dict[str, Any]:
    """SGD steps on global batches shared by all workers, under DDP when there are several.

    Args:
        build: makes the method for a context; called after seeding, in float64.
        num_views: views per image.
        num_steps: optimiser steps.

    Returns:
        "losses": global loss of each step; "gradients": name -> gradient of the last step.
    """
    torch.manual_seed(0)
    method = build(make_context(world_size=world_size())).double().train()
    wrapped = method
    if world_size() > 1:
        unused = getattr(method, "has_unused_parameters", False)
        wrapped = DistributedDataParallel(method, forward_sync_buffers=False, find_unused_parameters=unused)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1, momentum=0.5)
    losses = []
    for step in range(num_steps):
        loss = wrapped(share(make_batch(num_views, seed=step)), progress(step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(progress(step))
        losses.append(all_reduce_mean(loss.detach()))
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    return {"losses": torch.stack(losses), "gradients": gradients}
