"""A backbone of two layers and a plain training loop, to compare runs that must be equal."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from methods import collectives
from methods.batchnorm import average_running_statistics, convert_batchnorm
from methods.contracts import Batch, MethodContext, Progress

__all__ = ["Run", "TinyBackbone", "make_batch", "run_all", "train"]

GLOBAL_BATCH = 8
NUM_IMAGES = 1000
NUM_CLASSES = 4


class TinyBackbone(nn.Module):
    """Two convolutions with or without BatchNorm, float64."""

    num_features = 12

    def __init__(self, batchnorm: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(8) if batchnorm else nn.Identity()
        self.conv2 = nn.Conv2d(8, 12, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(12) if batchnorm else nn.Identity()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x))).mean((2, 3))


def make_batch(step: int, labels: str = "some") -> Batch:
    """The global batch of a step.

    Args:
        step: seeds the images; every step has new images.
        labels: "some" of 4 classes, all "distinct" over all steps, or all "equal".
    """
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(GLOBAL_BATCH, 3, 9, 9, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, *images.shape, generator=generator, dtype=torch.float64)
    index = torch.arange(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH) % NUM_IMAGES
    ids = {
        "some": torch.randint(0, NUM_CLASSES, (GLOBAL_BATCH,), generator=generator),
        "distinct": index,
        "equal": torch.zeros_like(index),
    }
    return Batch([images + 0.3 * noise[0], images + 0.3 * noise[1]], ids[labels], index)


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        method: method class.
        config: its config.
        batchnorm: whether the backbone has BatchNorm.
        kind: BatchNorm to convert everything to after building; None keeps what the method chose.
        num_micro_steps: forward passes per optimiser step.
        labels: see ``make_batch``.
        seed: of the initial weights.
    """

    method: type
    config: Any
    batchnorm: bool = True
    kind: str | None = None
    num_micro_steps: int = 1
    labels: str = "some"
    seed: int = 0

    def build(self) -> nn.Module:
        """The method with seeded weights, in float64, for the workers that there are."""
        torch.manual_seed(self.seed)
        context = MethodContext(
            NUM_CLASSES, NUM_IMAGES, GLOBAL_BATCH, collectives.world_size(), 9, self.num_micro_steps
        )
        method = self.method(self.config, TinyBackbone(self.batchnorm), context).double().train()
        return convert_batchnorm(method, self.kind) if self.kind else method

    def with_config(self, **changes: Any) -> Run:
        """The same run with other config values."""
        return replace(self, config=replace(self.config, **changes))


def train(run: Run, method: nn.Module, steps: range, learning_rate: float = 0.5) -> dict[str, Any]:
    """Plain SGD with DDP where there are workers; each worker takes its rows of the global batch.

    Returns:
        Losses (mean over workers and micro-steps) and metrics of every step, gradients of the last step, and the
        state with running statistics averaged over workers.
    """
    world_size, count = collectives.world_size(), run.num_micro_steps
    wrapped = DistributedDataParallel(method, forward_sync_buffers=False) if world_size > 1 else method
    size = GLOBAL_BATCH // world_size // count
    losses, metrics = [], []
    for step in steps:
        batch = make_batch(step, run.labels)
        method.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64)
        for m in range(count):
            start = (collectives.rank() * count + m) * size
            rows = slice(start, start + size)
            share = Batch([view[rows] for view in batch.views], batch.labels[rows], batch.index[rows])
            progress = Progress(step, 100, 0, 1, m, count)
            last = m + 1 == count
            with contextlib.nullcontext() if last or world_size == 1 else wrapped.no_sync():
                output = wrapped(share, progress)
                (output.loss / count).backward()
            total += output.loss.detach() / count
            metrics.append({name: value.clone() for name, value in output.metrics.items()})
        with torch.no_grad():
            for p in method.parameters():
                if p.grad is not None:
                    p -= learning_rate * p.grad
        method.after_step(progress)
        losses.append(collectives.all_reduce_mean(total))
    average_running_statistics(method)
    return {
        "losses": torch.stack(losses),
        "metrics": metrics,
        "grads": {name: p.grad for name, p in method.named_parameters() if p.grad is not None},
        "state": dict(method.state_dict()),
    }


def run_all(runs: list[Run], num_steps: int) -> list[dict[str, Any]]:
    """Trains every run from its start; for ``run_processes``."""
    return [train(run, run.build(), range(num_steps)) for run in runs]
