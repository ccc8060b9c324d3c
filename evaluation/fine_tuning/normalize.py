"""Averages over things that every worker has another number of: valid pixels, sampled boxes, visible points."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.collectives import all_reduce_mean, world_size

__all__ = ["share_of_mean"]


def share_of_mean(total: Tensor, count: Tensor | float) -> Tensor:
    """This worker's loss, such that the mean over the workers is the sum of all totals over the sum of all counts.

    DDP averages gradients over workers, so a plain local average would weigh a worker with few valid pixels as much as
    one with many, and the result would depend on the number of workers.

    Args:
        total: sum over this worker's entries, ().
        count: how many entries; at least 1 is divided by, so that no entries at all give 0.
    """
    counts = torch.as_tensor(count, dtype=total.dtype, device=total.device)
    return total / all_reduce_mean(counts).clamp(min=1.0 / world_size())
