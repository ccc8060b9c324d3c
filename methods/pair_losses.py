"""Contrast within the batch of all workers: NT-Xent (SimCLR) and the supervised contrastive loss (SupCon).

Shapes: N anchors of this worker (its images times their views, view by view), M rows of all workers, D dimensions. Rows
are unit vectors in the methods, but the formulas hold for any length. Every anchor is compared with all rows but
itself; the rows of other workers come with gradient (``gather_with_grad``), so N processes compute what one computes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from methods.collectives import all_gather_concat, gather_with_grad, rank

__all__ = ["PairContrast", "nt_xent", "sup_con"]


class PairContrast(NamedTuple):
    """Loss and monitors of one in-batch contrast; the monitors carry no gradient.

    Attributes:
        loss: (), mean over this worker's anchors.
        top1: (), share of anchors whose nearest other row is a positive.
        negative_similarity: (), mean inner product of an anchor and a row that is neither itself nor a positive.
    """

    loss: Tensor
    top1: Tensor
    negative_similarity: Tensor


def nt_xent(z_VBD: Tensor, temperature: float) -> PairContrast:
    """SimCLR, Eq. 1: -log [ e^(z_i.z_j/tau) / sum_{l != i} e^(z_i.z_l/tau) ], mean over all 2B anchors i.

    j is the other view of image i. The official code (``google-research/simclr: objective.py``) adds the means of both
    directions, which is twice this.

    Args:
        z_VBD: two views of this worker's B images.
        temperature: tau > 0.
    """
    images_B = torch.arange(z_VBD.shape[1], device=z_VBD.device) + rank() * z_VBD.shape[1]
    return _contrast(z_VBD, images_B, temperature)


def sup_con(z_VBD: Tensor, labels_B: Tensor, temperature: float) -> PairContrast:
    """SupCon, Eq. 2: -1/|P(i)| sum_{p in P(i)} log [ e^(z_i.z_p/tau) / sum_{a != i} e^(z_i.z_a/tau) ], mean over i.

    P(i) are all rows of the anchor's class but itself. An anchor without positives has loss 0 (in the official code
    too: ``HobbitLong/SupContrast: losses.py`` sets its count to 1). With all labels distinct it is ``nt_xent``.

    Args:
        z_VBD: V views of this worker's B images.
        labels_B: int64, class of each image.
        temperature: tau > 0.
    """
    return _contrast(z_VBD, labels_B, temperature)


def _contrast(z_VBD: Tensor, classes_B: Tensor, temperature: float) -> PairContrast:
    """Rows of the same class attract each other."""
    num_views, _, dim = z_VBD.shape
    dtype = torch.promote_types(z_VBD.dtype, torch.float32)
    with torch.autocast(z_VBD.device.type, enabled=False):
        anchors_ND = z_VBD.to(dtype).reshape(-1, dim)
        classes_N = classes_B.repeat(num_views)
        rows_MD, classes_M = gather_with_grad(anchors_ND), all_gather_concat(classes_N)
        similarity_NM = anchors_ND @ rows_MD.T
        own_N = torch.arange(len(anchors_ND), device=anchors_ND.device) + rank() * len(anchors_ND)
        is_self_NM = torch.arange(len(rows_MD), device=anchors_ND.device) == own_N[:, None]
        is_positive_NM = (classes_N[:, None] == classes_M) & ~is_self_NM
        logits_NM = (similarity_NM / temperature).masked_fill(is_self_NM, -torch.inf)
        log_sum_N1 = logits_NM.logsumexp(dim=1, keepdim=True)
        log_probability_NM = (logits_NM - log_sum_N1).masked_fill(~is_positive_NM, 0.0)
        num_positives_N = is_positive_NM.sum(1).clamp_min(1)
        loss = -(log_probability_NM.sum(1) / num_positives_N).mean()
    with torch.no_grad():
        nearest_N1 = logits_NM.argmax(dim=1, keepdim=True)
        is_negative_NM = ~(is_positive_NM | is_self_NM)
        negative_sum = similarity_NM.mul(is_negative_NM).sum()
        return PairContrast(
            loss=loss,
            top1=is_positive_NM.gather(1, nearest_N1).to(dtype).mean(),
            negative_similarity=negative_sum / is_negative_NM.sum().clamp_min(1),
        )
