"""Checkpoints to export, and formats that write something wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from methods.backbones import build_backbone
from rayjobs.configs import TrainConfig, preset
from rayjobs.exporters.contracts import Source


def randomised(network: nn.Module) -> nn.Module:
    """Weights and statistics of BatchNorm as training leaves them: not one and zero, which could be forgotten."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.2, 0.2),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 2.0),
            ):
                assert tensor is not None
                tensor.uniform_(low, high, generator=generator)
            assert module.num_batches_tracked is not None
            module.num_batches_tracked.fill_(7)
    return network.eval()


def source_of(name: str, method: str = "moco_v2", stem: str = "imagenet", network: nn.Module | None = None) -> Source:
    torch.manual_seed(0)
    train = TrainConfig(backbone=name, stem=stem, image_size=64, epochs=3)
    if network is None:
        network = build_backbone(name, train.stem)
    assert network is not None
    return Source(randomised(network), preset(method, train), {"epoch": 3})


def assert_same_features(found: np.ndarray, expected: torch.Tensor, tolerance: float) -> None:
    assert np.abs(found - expected.numpy()).max() <= tolerance * float(expected.abs().max())


class Altered:
    """A backbone whose stored tensors differ from those it computes with."""

    def __init__(self, backbone, state):
        self._backbone, self._state = backbone, state

    def state_dict(self):
        return self._state

    def __getattr__(self, name):
        return getattr(self._backbone, name)


def altered(form, change):
    """The format, but what it writes has been changed."""

    def write(source, folder):
        state = {name: tensor.clone() for name, tensor in source.backbone.state_dict().items()}
        change(state)
        return form.write(replace(source, backbone=Altered(source.backbone, state)), folder)

    return replace(form, write=write)


def negate(name):
    return lambda state: state[name].neg_()


def remove(name):
    return lambda state: state.pop(name)


def add(name):
    return lambda state: state.update({name: torch.ones(64)})
