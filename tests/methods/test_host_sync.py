"""No training step makes the host wait for the device: seen on a CPU by the operations that read values back."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from methods import METHODS
from methods.optimizers import build_optimizer
from methods.queue import FeatureQueue
from tests.methods.examples import make_context, progress
from tests.methods.test_table import _backbone, _batch, _small

# Operations whose result, or whose size, the host must wait for on a GPU.
READS = {
    torch.ops.aten._local_scalar_dense.default,  # item(), float(), bool(), int()
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten._unique2.default,
}


class NoReads(TorchDispatchMode):
    """Raises on an operation that waits."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS:
            raise AssertionError(f"{func} reads a value back: the host would wait for the device")
        # x[mask] and x[mask] = y look for the set entries first.
        if func is torch.ops.aten.index.Tensor or func is torch.ops.aten.index_put_.default:
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), f"{func} with a mask"
        return func(*args, **(kwargs or {}))


def test_the_mode_sees_what_waits():
    x = torch.ones(3)
    for wait in (lambda: x[0].item(), lambda: bool(x.sum() > 1), lambda: x[x > 0], lambda: x.nonzero()):
        with NoReads(), pytest.raises(AssertionError):
            wait()
    with NoReads():
        torch.where(x > 0, x, 0.0).sum()


@pytest.mark.parametrize("name", METHODS)
def test_steps_read_nothing_back(name, monkeypatch):
    # This monitor has a way of its own on CPUs, which selects by a mask.
    monkeypatch.setattr(FeatureQueue, "same_image_rate", lambda self, index: index.float().mean())
    torch.manual_seed(0)
    method = METHODS[name].method(_small(name), _backbone(name), make_context()).train()
    optimizer = build_optimizer(method, dataclasses.replace(METHODS[name].optimizer, warmup_epochs=0), 256)
    for step in range(3):
        batch = _batch(name, step)
        with NoReads():
            phases = getattr(method, "num_phases", lambda _: 1)(progress(step))
            for phase in range(phases):
                optimizer.zero_grad()
                method(batch, progress(step, phase=phase)).loss.backward()
            method.after_step(progress(step))
        optimizer.step()
