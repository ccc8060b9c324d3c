"""BYOL: its formula, lightly's modules, the momentum schedule, what the target does."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from torch import nn

from methods.byol import Byol, ByolConfig, target_momentum
from tests.methods.examples import TinyBackbone, make_batch, make_context, progress

SMALL = ByolConfig(projector_hidden_dim=20, projector_dim=6, predictor_hidden_dim=20, momentum=0.9)


def _method(config: ByolConfig = SMALL) -> Byol:
    torch.manual_seed(0)
    return Byol(config, TinyBackbone(), make_context()).double()


def test_loss_is_eq_2_of_the_paper():
    method, batch = _method(), make_batch(2)
    method.target.module[0].layer1[0].weight.data.mul_(1.3)  # a target that differs
    expected = 0.0
    for v, w in (batch.views, batch.views[::-1]):
        p = F.normalize(method.predictor(method.projector(method.backbone(v))), dim=1)
        t = F.normalize(method.target.module(w), dim=1)
        expected += (p - t).square().sum(1).mean().item()
    assert method(batch, progress()).loss.item() == pytest.approx(expected, rel=1e-9)


def test_loss_and_gradients_are_those_of_lightlys_modules():
    method, batch = _method(), make_batch(2)
    ours = method(batch, progress()).loss
    ours.backward()
    gradients = [p.grad.clone() for p in method.backbone.parameters()]
    projector, predictor = BYOLProjectionHead(8, 20, 6).double(), BYOLPredictionHead(6, 20, 6).double()
    for theirs, mine in ((projector, method.projector), (predictor, method.predictor)):
        linear = [[m for m in head.modules() if isinstance(m, nn.Linear)] for head in (theirs, mine)]
        for a, b in zip(*linear, strict=True):
            a.weight.data.copy_(b.weight)
            if a.bias is not None:
                a.bias.data.zero_()  # theirs has one in the last layer
    target = copy.deepcopy(nn.Sequential(method.backbone, projector))
    method.zero_grad()
    criterion = NegativeCosineSimilarity()
    v, w = batch.views
    terms = [criterion(predictor(projector(method.backbone(a))), target(b).detach()) for a, b in ((v, w), (w, v))]
    loss = 4 + 2 * (terms[0] + terms[1])
    loss.backward()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-9)
    torch.testing.assert_close(gradients, [p.grad for p in method.backbone.parameters()])


def test_momentum_rises_to_1_along_a_cosine():
    assert target_momentum(0.996, 0, 100) == pytest.approx(0.996)
    assert target_momentum(0.996, 50, 100) == pytest.approx(0.998)
    assert target_momentum(0.996, 100, 100) == 1.0


@pytest.mark.parametrize(("schedule", "momentum"), [(True, 1 - 0.1 * (1 + 0.5**0.5) / 2), (False, 0.9)])
def test_the_target_follows_after_the_step_and_its_statistics_are_its_own(schedule, momentum):
    method = _method(replace(SMALL, momentum_schedule=schedule))
    method(make_batch(2), progress())
    before = {k: v.clone() for k, v in method.target.module[0].state_dict().items()}
    with torch.no_grad():
        for p in method.backbone.parameters():
            p.add_(1.0)
    method.after_step(progress(step=1))
    online, after = method.backbone.state_dict(), method.target.module[0].state_dict()
    names = {name for name, _ in method.backbone.named_parameters()}
    for name, value in before.items():
        expected = momentum * value + (1 - momentum) * online[name] if name in names else value
        torch.testing.assert_close(after[name], expected)


def test_no_gradient_reaches_the_target():
    method = _method()
    method(make_batch(2), progress()).loss.backward()
    assert all(p.grad is None for p in method.target.parameters())
    assert all(p.grad is not None for p in method.predictor.parameters())


def test_heads_have_the_published_biases():
    method = _method()
    for head in (method.projector, method.predictor):
        first, last = [m for m in head if isinstance(m, nn.Linear)]
        assert first.bias is not None
        assert last.bias is None
        assert not isinstance(head[-1], nn.BatchNorm1d)


def test_settings_that_cannot_train_are_refused():
    with pytest.raises(ValueError, match=r"momentum=1.5.*\[0, 1\]"):
        Byol.validate(replace(SMALL, momentum=1.5), make_context())
    with pytest.raises(ValueError, match="at least 1"):
        Byol.validate(replace(SMALL, predictor_hidden_dim=0), make_context())
