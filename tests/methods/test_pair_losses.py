"""In-batch contrast against slow sums, lightly and pytorch-metric-learning, and over processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from pytorch_metric_learning.losses import SupConLoss
from torch import Tensor

from methods.collectives import rank, world_size
from methods.pair_losses import nt_xent, sup_con
from tests.methods.distributed import run_processes


def make_views(num_views: int = 2, batch_size: int = 6, seed: int = 0, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(num_views, batch_size, 5, generator=generator, dtype=dtype), dim=2)


LABELS = torch.tensor([0, 2, 0, 1, 0, 1])


def slow_sup_con(z_VBD: Tensor, labels: Tensor, tau: float) -> Tensor:
    """Eq. 2 of SupCon, anchor by anchor and positive by positive."""
    rows, classes = z_VBD.reshape(-1, z_VBD.shape[2]), labels.repeat(len(z_VBD)).tolist()
    total = torch.zeros((), dtype=z_VBD.dtype)
    for i in range(len(rows)):
        others = [a for a in range(len(rows)) if a != i]
        denominator = sum(torch.exp(rows[i] @ rows[a] / tau) for a in others)
        positives = [p for p in others if classes[p] == classes[i]]
        for p in positives:
            total = total - torch.log(torch.exp(rows[i] @ rows[p] / tau) / denominator) / len(positives)
    return total / len(rows)


def loss_and_gradient(fn, z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    loss = fn(F.normalize(z, dim=2))  # the libraries normalise too, which projects the gradient
    return loss.detach(), torch.autograd.grad(loss, z)[0]


@pytest.mark.parametrize("tau", [0.07, 0.5])
def test_nt_xent_is_eq_1_and_lightlys(tau):
    z = make_views()
    ours = loss_and_gradient(lambda v: nt_xent(v, tau).loss, z)
    torch.testing.assert_close(ours, loss_and_gradient(lambda v: slow_sup_con(v, torch.arange(6), tau), z))
    single = make_views(dtype=torch.float32)
    theirs = loss_and_gradient(lambda v: NTXentLoss(tau)(v[0], v[1]), single)
    torch.testing.assert_close(loss_and_gradient(lambda v: nt_xent(v, tau).loss, single), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_views", [1, 2, 3])
def test_sup_con_is_eq_2_and_pytorch_metric_learnings(num_views):
    z = make_views(num_views)
    ours = loss_and_gradient(lambda v: sup_con(v, LABELS, 0.1).loss, z)
    torch.testing.assert_close(ours, loss_and_gradient(lambda v: slow_sup_con(v, LABELS, 0.1), z))
    if num_views > 1:  # theirs averages over anchors that have a positive; with one view an anchor here has none
        library = SupConLoss(temperature=0.1)
        theirs = loss_and_gradient(lambda v: library(v.flatten(0, 1), LABELS.repeat(num_views)), z)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_an_anchor_without_positives_has_no_loss_and_no_nan():
    z = make_views(1)
    loss, gradient = loss_and_gradient(lambda v: sup_con(v, torch.arange(6), 0.1).loss, z)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_sup_con_with_distinct_labels_is_nt_xent():
    z = make_views()
    assert torch.equal(sup_con(z, torch.arange(6), 0.1).loss, nt_xent(z, 0.1).loss)


def test_monitors():
    z = make_views()
    result = sup_con(z, LABELS, 0.1)
    rows, classes = z.flatten(0, 1), LABELS.repeat(2)
    similarity = (rows @ rows.T).fill_diagonal_(-9)
    assert result.top1 == (classes[similarity.argmax(1)] == classes).double().mean()
    negative = similarity[classes[:, None] != classes]
    torch.testing.assert_close(result.negative_similarity, negative.mean())


def test_half_precision_is_computed_in_float32():
    z = make_views(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nt_xent(z, 0.1).loss, nt_xent(z, 0.1).loss.float())
        loss = nt_xent(z, 0.1).loss
    assert loss == nt_xent(z, 0.1).loss


def _on_workers() -> dict[str, Any]:
    z, size = make_views(), 6 // world_size()
    rows = slice(rank() * size, (rank() + 1) * size)
    results = {}
    for name, fn in {
        "nt_xent": lambda v: nt_xent(v[:, rows], 0.2).loss,
        "sup_con": lambda v: sup_con(v[:, rows], LABELS[rows], 0.2).loss,
    }.items():
        results[name] = loss_and_gradient(fn, z)
    return results


def test_two_processes_equal_one(tmp_path):
    one, two = _on_workers(), run_processes(_on_workers, 2, tmp_path)
    for name in one:
        torch.testing.assert_close(torch.stack([r[name][0] for r in two]).mean(), one[name][0])
        # DDP averages over the workers; each worker's gradient covers its own rows.
        torch.testing.assert_close(sum(r[name][1] for r in two) / 2, one[name][1])
