"""SL-MLP: projector parts, equality with cross entropy at the identity, and what transfers."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods.sl_mlp import SLMLP, SLMLPConfig, build_projector
from methods.supervised import Supervised, SupervisedConfig
from tests.methods.examples import TinyBackbone, make_batch, make_context, progress


def _same_weights(config: SLMLPConfig) -> tuple[SLMLP, Supervised]:
    torch.manual_seed(0)
    sl_mlp = SLMLP(config, TinyBackbone(), make_context()).double()
    supervised = Supervised(SupervisedConfig(), TinyBackbone(), make_context()).double()
    supervised.backbone.load_state_dict(sl_mlp.backbone.state_dict())
    return sl_mlp, supervised


def _compare(sl_mlp: SLMLP, supervised: Supervised) -> None:
    batch = make_batch(1)
    losses = [method(batch, progress()).loss for method in (sl_mlp, supervised)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=0)
    for loss in losses:
        loss.backward()
    for ours, other in zip(sl_mlp.backbone.parameters(), supervised.backbone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad)


def test_no_projector_is_cross_entropy():
    sl_mlp, supervised = _same_weights(SLMLPConfig(projector_depth=0))
    supervised.classifier.load_state_dict(sl_mlp.classifier.state_dict())
    _compare(sl_mlp, supervised)


def test_identity_projector_is_cross_entropy():
    config = SLMLPConfig(projector_dim=8, projector_batchnorm=False, projector_relu=False)
    sl_mlp, supervised = _same_weights(config)
    for layer in sl_mlp.projector:
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    supervised.classifier.load_state_dict(sl_mlp.classifier.state_dict())
    _compare(sl_mlp, supervised)


def test_loss_is_the_formula():
    torch.manual_seed(0)
    method = SLMLP(SLMLPConfig(projector_dim=5), TinyBackbone(), make_context()).double()
    batch = make_batch(1)
    first, norm, _, last = method.projector
    h = method.backbone(batch.views[0]) @ first.weight.T + first.bias
    h = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt() * norm.weight + norm.bias
    z = h.clamp_min(0) @ last.weight.T + last.bias
    logits = z @ method.classifier.weight.T + method.classifier.bias
    expected = F.nll_loss(logits - logits.exp().sum(1, keepdim=True).log(), batch.labels)
    torch.testing.assert_close(method(batch, progress()).loss, expected)


def test_projector_parts():
    def layers(**changes):
        head, width = build_projector(SLMLPConfig(projector_dim=5, projector_hidden_dim=6, **changes), 8)
        dims = [(m.in_features, m.out_features) if isinstance(m, nn.Linear) else type(m).__name__ for m in head]
        assert head(torch.randn(3, 8)).shape == (3, width)
        return dims

    assert layers() == [(8, 6), "BatchNorm1d", "ReLU", (6, 5)]
    assert layers(projector_depth=1) == [(8, 5)]
    assert layers(projector_depth=3) == [(8, 6), "BatchNorm1d", "ReLU", (6, 6), "BatchNorm1d", "ReLU", (6, 5)]
    assert layers(projector_input_layer=False) == ["BatchNorm1d", "ReLU", (8, 5)]
    assert layers(projector_output_layer=False) == [(8, 6), "BatchNorm1d", "ReLU"]
    assert layers(projector_batchnorm=False) == [(8, 6), "ReLU", (6, 5)]
    both_off = {"projector_input_layer": False, "projector_output_layer": False}
    assert layers(projector_relu=False, **both_off) == ["BatchNorm1d"]
    assert layers(projector_batchnorm=False, **both_off) == ["ReLU"]


def test_every_combination_of_parts_trains():
    flags = [
        "projector_batchnorm",
        "projector_relu",
        "projector_input_layer",
        "projector_output_layer",
    ]
    for values in itertools.product([False, True], repeat=4):
        config = SLMLPConfig(projector_dim=5, **dict(zip(flags, values, strict=True)))
        method = SLMLP(config, TinyBackbone(), make_context()).double()
        method(make_batch(1), progress()).loss.backward()
        assert all(p.grad is not None for p in method.parameters())


def test_what_transfers_has_no_projector():
    method = SLMLP(SLMLPConfig(), TinyBackbone(), make_context())
    assert isinstance(method.backbone, TinyBackbone)
    assert set(method.backbone.state_dict()) == set(TinyBackbone().state_dict())
    assert method.backbone(torch.randn(2, 3, 8, 8)).shape == (2, 8)


@pytest.mark.parametrize(
    ("config", "context", "message"),
    [
        (SLMLPConfig(projector_depth=-1), {}, "at least 0"),
        (SLMLPConfig(projector_dim=0), {}, "at least 1"),
        (SLMLPConfig(projector_depth=1, projector_input_layer=False), {}, "projector_depth 2 or more"),
        (SLMLPConfig(), {"num_classes": 1}, "at least 2 classes"),
        (SLMLPConfig(), {"world_size": 8}, "needs at least 2"),
    ],
)
def test_settings_that_cannot_train_are_refused(config, context, message):
    with pytest.raises(ValueError, match=message):
        SLMLP.validate(config, make_context(**context))
