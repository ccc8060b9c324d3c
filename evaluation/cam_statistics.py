"""Where a class activation map looks, as three numbers per map.

Sun et al. (AAAI 2022) compare maps by eye; these numbers are our addition. All are computed on maps that were upsampled
to the image and scaled to [0, 1], so they depend on the size of the map that was upsampled: compare models of one
backbone at one image size. A map that is zero everywhere points nowhere and counts as evenly spread.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["STATISTICS", "TOP_SHARE", "area_fraction", "map_statistics", "mass_concentration", "spatial_entropy"]

THRESHOLD = 0.5  # of the map's range
TOP_SHARE = 0.1  # of the pixels


def area_fraction(maps_BHW: Tensor) -> Tensor:
    """Share (B,) of the pixels above half of the map's range; float64, in [0, 1]."""
    return (maps_BHW > THRESHOLD).flatten(1).double().mean(dim=1)


def spatial_entropy(maps_BHW: Tensor) -> Tensor:
    """-sum p ln p / ln(H W) with p = map / sum(map): 0 at a single pixel, 1 when evenly spread; float64 (B,)."""
    p = _shares(maps_BHW)
    return -torch.xlogy(p, p).sum(dim=1) / math.log(p.shape[1])


def mass_concentration(maps_BHW: Tensor) -> Tensor:
    """Share (B,) of the map's sum that lies in its top 10 % of pixels (rounded up): 0.1 evenly spread, at most 1."""
    p = _shares(maps_BHW)
    return p.topk(math.ceil(TOP_SHARE * p.shape[1]), dim=1).values.sum(dim=1)


def _shares(maps_BHW: Tensor) -> Tensor:
    """Maps as distributions over the pixels, float64 (B, H W); a zero map as the even one."""
    flat = maps_BHW.flatten(1).double()
    total = flat.sum(dim=1, keepdim=True)
    return torch.where(total > 0, flat / total, 1 / flat.shape[1])


STATISTICS = {
    "cam/area": area_fraction,
    "cam/spatial_entropy": spatial_entropy,
    "cam/mass_concentration": mass_concentration,
}


def map_statistics(maps_BHW: Tensor) -> dict[str, Tensor]:
    """All of them, by metric name: float64 (B,) each, on the CPU."""
    return {name: statistic(maps_BHW).cpu() for name, statistic in STATISTICS.items()}
