"""Heads have exactly the layers that the papers list."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from methods.heads import head_dim, mlp_head, validate_head_batch
from tests.methods.examples import make_context


def _layers(head: nn.Sequential) -> list[str]:
    def text(layer: nn.Module) -> str:
        if isinstance(layer, nn.Linear):
            return f"linear {layer.in_features}-{layer.out_features} {'bias' if layer.bias is not None else 'plain'}"
        if isinstance(layer, nn.BatchNorm1d):
            return f"bn {layer.num_features} {'affine' if layer.affine else 'plain'}"
        return type(layer).__name__.lower()

    return [text(layer) for layer in head]


def test_moco_heads():
    assert _layers(mlp_head(8, 16, 4, 1)) == ["linear 8-4 bias"]
    assert _layers(mlp_head(8, 16, 4, 2)) == ["linear 8-16 bias", "relu", "linear 16-4 bias"]


def test_simsiam_heads():
    projector = mlp_head(8, 16, 4, 3, batchnorm=True, output_bias="frozen", output_batchnorm="plain")
    hidden = ["linear 8-16 plain", "bn 16 affine", "relu", "linear 16-16 plain", "bn 16 affine", "relu"]
    assert _layers(projector) == [*hidden, "linear 16-4 bias", "bn 4 plain"]
    assert not projector[6].bias.requires_grad
    assert projector[6].weight.requires_grad
    predictor = mlp_head(4, 2, 4, 2, batchnorm=True)
    assert _layers(predictor) == ["linear 4-2 plain", "bn 2 affine", "relu", "linear 2-4 bias"]


def test_every_part_can_be_switched():
    head = mlp_head(8, 16, 4, 2, batchnorm=True, relu=False, hidden_bias=True, output_bias=False)
    assert _layers(head) == ["linear 8-16 bias", "bn 16 affine", "linear 16-4 plain"]
    assert _layers(mlp_head(8, 16, 4, 1, output_batchnorm="affine")) == ["linear 8-4 bias", "bn 4 affine"]


def test_depth_0_is_the_identity():
    x = torch.randn(3, 8)
    assert mlp_head(8, 16, 4, 0)(x) is x
    assert head_dim(8, 4, 0) == 8
    assert head_dim(8, 4, 1) == 4


def test_impossible_heads_are_refused():
    with pytest.raises(ValueError, match="depth >= 0"):
        mlp_head(8, 16, 4, -1)
    with pytest.raises(ValueError, match="at least 1"):
        mlp_head(8, 0, 4, 2)


def test_single_image_batches_are_refused():
    context = make_context(4, world_size=2, num_micro_steps=2)
    with pytest.raises(ValueError, match="at least 2"):
        validate_head_batch(context, sync_batchnorm=False)
    validate_head_batch(context, sync_batchnorm=True)  # 2 images, one per worker
