"""SwAV: codes against the official algorithm re-derived and lightly's, multi-crop, queue, frozen prototypes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightly.loss.swav_loss import SwaVLoss
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn

from methods.collectives import rank, world_size
from methods.swav import Swav, SwavConfig, sinkhorn, swapped_prediction_loss
from tests.methods.distributed import run_processes
from tests.methods.examples import TinyBackbone, make_batch, make_context, progress

SMALL = SwavConfig(num_prototypes=5, projector_hidden_dim=7, projector_dim=6, queue_size=0, frozen_prototype_epochs=0.0)


def scores(num_rows: int = 8, num_prototypes: int = 5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_rows, num_prototypes, generator=generator, dtype=torch.float64) * 2 - 1


def slow_codes(scores_NK: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """distributed_sinkhorn of main_swav.py, on the transposed matrix and in its order of operations."""
    q = torch.exp(scores_NK / epsilon).T
    num_prototypes, num_samples = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / num_prototypes
        q = q / q.sum(dim=0, keepdim=True) / num_samples
    return (q * num_samples).T


@pytest.mark.parametrize("iterations", [1, 3, 50])
def test_codes_are_the_official_ones_and_lightlys(iterations):
    codes = sinkhorn(scores(), 0.05, iterations)
    torch.testing.assert_close(codes, slow_codes(scores(), 0.05, iterations))
    torch.testing.assert_close(codes, lightly_sinkhorn(scores(), iterations=iterations, epsilon=0.05))
    torch.testing.assert_close(codes.sum(1), torch.ones(8, dtype=torch.float64))
    if iterations == 50:
        torch.testing.assert_close(codes.mean(0), torch.full((5,), 0.2, dtype=torch.float64), rtol=1e-3, atol=1e-3)


def _codes_on_workers() -> torch.Tensor:
    size = 8 // world_size()
    return sinkhorn(scores()[rank() * size : (rank() + 1) * size], 0.05, 3)


def test_codes_of_two_processes_are_those_of_one(tmp_path):
    torch.testing.assert_close(torch.cat(run_processes(_codes_on_workers, 2, tmp_path)), _codes_on_workers())


def test_loss_and_gradient_are_lightlys():
    crops = [scores(seed=s).requires_grad_() for s in range(4)]
    codes = [sinkhorn(crop.detach(), 0.05, 3) for crop in crops[:2]]
    ours = swapped_prediction_loss(crops, codes, 0.1)
    gradients = torch.autograd.grad(ours, crops)
    theirs = SwaVLoss(temperature=0.1, sinkhorn_iterations=3, sinkhorn_epsilon=0.05)(crops[:2], crops[2:]).squeeze()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients, torch.autograd.grad(theirs, crops))


def _method(config: SwavConfig = SMALL, **context: Any) -> Swav:
    torch.manual_seed(0)
    return Swav(config, TinyBackbone(), make_context(**context)).double()


def _multi_crop(seed: int = 0):
    batch = make_batch(2, seed=seed)
    small = make_batch(3, seed=100 + seed, size=5).views
    return batch._replace(views=[*batch.views, *small])


def test_forward_is_the_official_algorithm_over_crops_of_two_sizes():
    method, batch = _method(), _multi_crop()
    prototypes = F.normalize(method.prototypes.weight.detach().clone(), dim=1)
    method.prototypes.weight.data.mul_(3.0)
    ours = method(batch, progress()).loss
    torch.testing.assert_close(method.prototypes.weight.detach(), prototypes)
    pooled = torch.cat([method.backbone(torch.cat(batch.views[:2])), method.backbone(torch.cat(batch.views[2:]))])
    z = F.normalize(method.projector(pooled), dim=1)
    crop_scores = (z @ prototypes.T).chunk(5)
    loss = 0.0
    for a in range(2):
        q = slow_codes(crop_scores[a].detach(), 0.05, 3)
        parts = [-(q * F.log_softmax(s / 0.1, 1)).sum(1).mean() for v, s in enumerate(crop_scores) if v != a]
        loss += sum(parts) / (4 * 2)
    torch.testing.assert_close(ours, loss)


def test_prototypes_stand_still_while_they_are_frozen():
    method = _method(replace(SMALL, frozen_prototype_epochs=1.0))
    for step, moves in ((0, False), (1, True)):
        method.zero_grad()
        method(_multi_crop(), progress(step)).loss.backward()
        assert bool(method.prototypes.weight.grad.abs().sum() > 0) is moves
        assert method.backbone.layer1[0].weight.grad.abs().sum() > 0


def test_the_queue_is_used_from_its_epoch_on_once_it_is_full():
    config = replace(SMALL, queue_size=16, queue_start_epoch=1)
    method, without = _method(config), _method()
    equal = []
    for step in range(5):  # one step per epoch; filled in steps 1 and 2, used from step 3 on
        batch = _multi_crop(step)
        a, b = (m(batch, progress(step, 5)).loss for m in (method, without))
        equal.append(torch.equal(a, b))
        method.after_step(progress(step, 5))
    assert equal == [True, True, True, False, False]
    filled = method.queues[0].index
    assert (filled >= 0).all()


def test_codes_with_a_queue_are_those_of_the_longer_batch():
    config = replace(SMALL, queue_size=16, queue_start_epoch=0)
    method = _method(config)
    for step in range(2):
        method(_multi_crop(step), progress(step))
        method.after_step(progress(step))
    here = scores(8, 5, 3)
    earlier = method.queues[1].keys.double() @ method.prototypes.weight.T
    expected = slow_codes(torch.cat([earlier, here]), 0.05, 3)[-8:]
    torch.testing.assert_close(method._codes(1, here, progress(2)), expected)


def test_usage_entropy_sees_a_collapse_onto_one_prototype():
    method = _method()
    value = method(_multi_crop(), progress()).metrics["prototype_entropy"]
    assert 0.9 < value <= 1 + 1e-9
    assert math.isfinite(value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"epsilon": -1.0}, "epsilon=-1.0"),
        ({"num_prototypes": 1}, "at least 2 prototypes"),
        ({"queue_size": 12}, "multiple of the global batch of 8, at most 64"),
        ({"queue_size": 128}, "at most 64"),
        ({"projector_dim": 0}, "widths at least 1"),
    ],
)
def test_settings_that_cannot_train_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Swav.validate(replace(SMALL, **changes), make_context())
