"""What pretext metrics say about the geometry of features while a method trains; none of it enters a loss.

Collapse: all images get (nearly) the same feature. `feature_spread` is then near 0 and `mean_cosine` near 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["COLLAPSED_SPREAD", "contrast_monitors", "feature_monitors", "feature_spread", "is_collapsed"]

# Below this spread a run counts as collapsed: the features fill less than a tenth of the sphere's extent.
COLLAPSED_SPREAD = 0.1


@torch.no_grad()
def feature_spread(z_BD: Tensor) -> Tensor:
    """Standard deviation of normalised z times sqrt(D); about 1 when spread out, 0 when collapsed (SimSiam, Fig. 2)."""
    return F.normalize(z_BD.float(), dim=1).std(dim=0, correction=0).mean() * z_BD.shape[1] ** 0.5


@torch.no_grad()
def feature_monitors(z_BD: Tensor) -> dict[str, Tensor]:
    """`feature_spread`, and `mean_cosine`: the mean cosine between the features of two different images; ()."""
    unit_BD = F.normalize(z_BD.float(), dim=1)
    size = max(len(unit_BD), 2)
    # sum over i != j of u_i . u_j = |sum u|^2 - B
    mean_cosine = (unit_BD.sum(0).square().sum() - len(unit_BD)) / (size * (size - 1))
    spread = unit_BD.std(dim=0, correction=0).mean() * z_BD.shape[1] ** 0.5
    return {"feature_spread": spread, "mean_cosine": mean_cosine}


@torch.no_grad()
def contrast_monitors(q_BD: Tensor, k_BD: Tensor) -> dict[str, Tensor]:
    """Monitors of pairs of unit vectors.

    Args:
        q_BD: features of one view.
        k_BD: features of the other view of the same images.
        negatives_ND: features of other images, a batch or so: they are read once more. For a queue leave them out and
            take ``losses.Contrast.negative_similarity``, which the pass over its keys yields.

    Returns:
        The monitors of ``feature_monitors`` for q; `positive_similarity`, mean q.k; `alignment`, mean |q - k|^2 (Wang
        & Isola, ICML 2020, alpha = 2).
    """
    q_BD, k_BD = q_BD.float(), k_BD.float()
    return feature_monitors(q_BD) | {
        "positive_similarity": (q_BD * k_BD).sum(1).mean(),
        "alignment": (q_BD - k_BD).square().sum(1).mean(),
    }


def is_collapsed(metrics: dict[str, float]) -> bool:
    """Whether an epoch's mean metrics show a collapse; False for methods without the monitor."""
    return metrics.get("feature_spread", 1.0) < COLLAPSED_SPREAD
