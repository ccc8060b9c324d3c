"""SimCLR and SupCon as methods: lightly's modules, heads, scale of the loss, settings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from torch import nn

from methods.pair_losses import sup_con
from methods.simclr import SimCLR, SimCLRConfig
from methods.supcon import SupCon, SupConConfig
from tests.methods.examples import TinyBackbone, make_batch, make_context, progress

SMALL = SimCLRConfig(projector_hidden_dim=7, projector_dim=6)


def _simclr(config: SimCLRConfig = SMALL) -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(config, TinyBackbone(), make_context()).double()


def test_loss_and_gradients_are_those_of_lightlys_modules():
    method, batch = _simclr(), make_batch(2)
    ours = method(batch, progress()).loss
    ours.backward()
    gradients = [p.grad.clone() for p in method.backbone.parameters()]
    head = SimCLRProjectionHead(8, 7, 6).double()
    linear = [[m for m in module.modules() if isinstance(m, nn.Linear)] for module in (head, method.projector)]
    for theirs, mine in zip(*linear, strict=True):
        theirs.weight.data.copy_(mine.weight)
    method.zero_grad()
    z = head(method.backbone(torch.cat(batch.views)))
    loss = NTXentLoss(temperature=0.1)(*z.chunk(2))
    loss.backward()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(gradients, [p.grad for p in method.backbone.parameters()], rtol=1e-5, atol=1e-8)


def test_head_is_the_official_one():
    linear = [m for m in _simclr().projector if isinstance(m, nn.Linear)]
    norms = [m for m in _simclr().projector if isinstance(m, nn.BatchNorm1d)]
    assert [m.bias is None for m in linear] == [True, True]
    assert [m.bias.requires_grad for m in norms] == [True, False]  # the last BatchNorm has a gain only


def test_supcon_scales_the_loss_with_the_base_temperature():
    torch.manual_seed(0)
    method, batch = SupCon(SupConConfig(projector_dim=6), TinyBackbone(), make_context()).double(), make_batch(2)
    z = nn.functional.normalize(method.projector(method.backbone(torch.cat(batch.views)))).unflatten(0, (2, 8))
    expected = sup_con(z, batch.labels, 0.1).loss * 0.1 / 0.07
    assert method(batch, progress()).loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert not any(isinstance(m, nn.BatchNorm1d) for m in method.projector)


def test_supcon_with_distinct_labels_is_simclr_on_the_same_features():
    torch.manual_seed(0)
    config = SupConConfig(projector_depth=0, base_temperature=0.1)
    supcon = SupCon(config, TinyBackbone(), make_context(num_classes=8)).double()
    simclr = SimCLR(SimCLRConfig(projector_depth=0), supcon.backbone, make_context()).double()
    batch = make_batch(2)._replace(labels=torch.arange(8))
    assert supcon(batch, progress()).loss.item() == simclr(batch, progress()).loss.item()


@pytest.mark.parametrize(
    ("method", "config", "context", "message"),
    [
        (SimCLR, replace(SMALL, temperature=0.0), {}, "simclr got temperature=0.0"),
        (SimCLR, replace(SMALL, projector_depth=-1), {}, "at least 0"),
        (SimCLR, replace(SMALL, sync_batchnorm=False), {"world_size": 8}, "at least 2"),
        (SupCon, SupConConfig(), {"num_classes": 1}, "supcon learns from labels"),
        (SupCon, SupConConfig(base_temperature=0), {}, "base_temperature=0"),
    ],
)
def test_settings_that_cannot_train_are_refused(method, config, context, message):
    with pytest.raises(ValueError, match=message):
        method.validate(config, make_context(**context))


def test_accumulation_is_named_as_a_smaller_contrast():
    with pytest.warns(UserWarning, match="sees 4 images at a time"):
        SimCLR.validate(SMALL, make_context(num_micro_steps=2))
