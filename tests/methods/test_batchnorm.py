"""BatchNorm over workers and over groups, against nn.BatchNorm on the concatenated batch and on each group."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from methods import collectives
from methods.batchnorm import (
    CrossProcessBatchNorm2d,
    SplitBatchNorm1d,
    SplitBatchNorm2d,
    average_running_statistics,
    convert_batchnorm,
)
from tests.methods.distributed import run_processes

STEPS = 3
# Images per worker; unequal on purpose.
SIZES = (3, 5)


def make_batchnorm(dims: int, affine: bool = True, momentum: float | None = 0.1, dtype=torch.float64) -> nn.Module:
    bn = (nn.BatchNorm1d if dims == 1 else nn.BatchNorm2d)(6, affine=affine, momentum=momentum, dtype=dtype)
    if affine:
        generator = torch.Generator().manual_seed(0)
        nn.init.normal_(bn.weight, 1.0, generator=generator)
        nn.init.normal_(bn.bias, generator=generator)
    return bn


def make_input(dims: int, step: int, num_images: int, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """Images whose mean is far from 0 and differs between images, and a gradient for the output."""
    generator = torch.Generator().manual_seed(step)
    shape = (num_images, 6) if dims == 1 else (num_images, 6, 4, 3)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 20
    x = x + torch.arange(num_images).reshape(-1, *[1] * (len(shape) - 1))
    return x.to(dtype), torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def train(bn: nn.Module, dims: int, rows: slice, num_images: int) -> dict:
    outputs, grads = [], []
    for step in range(STEPS):
        x, grad = make_input(dims, step, num_images)
        x = x[rows].requires_grad_()
        y = bn(x)
        y.backward(grad[rows])
        outputs.append(y.detach())
        grads.append(x.grad)
    parameters = {name: p.grad for name, p in bn.named_parameters()}
    return {"outputs": outputs, "grads": grads, "parameters": parameters, "buffers": dict(bn.named_buffers())}


CASES = [(dims, affine, momentum) for dims in (1, 2) for affine, momentum in ((True, 0.1), (False, 0.1), (True, None))]


def exercise_workers() -> dict:
    me = collectives.rank()
    rows = slice(0, SIZES[0]) if me == 0 else slice(SIZES[0], sum(SIZES))
    sync = [
        train(convert_batchnorm(make_batchnorm(dims, affine, momentum), "sync"), dims, rows, sum(SIZES))
        for dims, affine, momentum in CASES
    ]
    images, grad = make_input(2, 0, 8, torch.float32)
    low = convert_batchnorm(make_batchnorm(2, dtype=torch.float32), "sync")
    x = images[me * 4 : me * 4 + 4].bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    y = low(x)
    y.backward(grad[me * 4 : me * 4 + 4].bfloat16())
    local = make_batchnorm(2)
    train(local, 2, slice(me * 4, me * 4 + 4), 8)
    average_running_statistics(local)
    return {
        "sync": sync,
        "bf16": (y.detach(), x.grad, low.running_var, y.is_contiguous(memory_format=torch.channels_last)),
        "averaged": dict(local.named_buffers()),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    return run_processes(exercise_workers, 2, tmp_path_factory.mktemp("batchnorm"))


@pytest.mark.parametrize("case", range(len(CASES)))
def test_sync_equals_batchnorm_of_the_concatenated_batch(two_ranks, case):
    dims, affine, momentum = CASES[case]
    expected = train(make_batchnorm(dims, affine, momentum), dims, slice(None), sum(SIZES))
    got = [result["sync"][case] for result in two_ranks]
    for step in range(STEPS):
        for name in ("outputs", "grads"):
            torch.testing.assert_close(torch.cat([g[name][step] for g in got]), expected[name][step])
    for name, grad in expected["parameters"].items():
        torch.testing.assert_close(got[0]["parameters"][name] + got[1]["parameters"][name], grad)
    for result in got:
        torch.testing.assert_close(result["buffers"], expected["buffers"])


def test_sync_in_bf16_keeps_statistics_in_float32(two_ranks):
    images, grad = make_input(2, 0, 8, torch.float32)
    bn = make_batchnorm(2, dtype=torch.float32)
    x = images.bfloat16().float().requires_grad_()
    y = bn(x)
    y.backward(grad.bfloat16().float())
    for rank, (out, x_grad, running_var, channels_last) in enumerate(result["bf16"] for result in two_ranks):
        rows = slice(rank * 4, rank * 4 + 4)
        assert out.dtype == x_grad.dtype == torch.bfloat16
        assert channels_last
        torch.testing.assert_close(out.float(), y[rows].detach(), rtol=1e-2, atol=2e-2)
        torch.testing.assert_close(x_grad.float(), x.grad[rows], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(running_var, bn.running_var, rtol=1e-5, atol=1e-5)


def test_averaged_workers_equal_split_batchnorm(two_ranks):
    split = convert_batchnorm(make_batchnorm(2), "split", 2)
    train(split, 2, slice(None), 8)
    for result in two_ranks:
        torch.testing.assert_close(result["averaged"], dict(split.named_buffers()))


@pytest.mark.parametrize(("dims", "affine", "momentum"), CASES)
def test_split_equals_batchnorm_of_each_group(dims, affine, momentum):
    num_splits, size = 3, 4
    split = convert_batchnorm(make_batchnorm(dims, affine, momentum), "split", num_splits)
    got = train(split, dims, slice(None), num_splits * size)
    devices = [
        train(make_batchnorm(dims, affine, momentum), dims, slice(s * size, (s + 1) * size), num_splits * size)
        for s in range(num_splits)
    ]
    for step in range(STEPS):
        for name in ("outputs", "grads"):
            torch.testing.assert_close(got[name][step], torch.cat([d[name][step] for d in devices]))
    for name, grad in got["parameters"].items():
        torch.testing.assert_close(grad, sum(d["parameters"][name] for d in devices))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(got["buffers"][name], torch.stack([d["buffers"][name] for d in devices]).mean(0))
    assert got["buffers"]["num_batches_tracked"] == STEPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_on_channels_last(dtype):
    x, grad = make_input(2, 0, 8, dtype)
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    split = convert_batchnorm(make_batchnorm(2, dtype=torch.float32), "split", 2)
    plain = make_batchnorm(2, dtype=torch.float32)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = split(a), torch.cat([plain(part) for part in b.chunk(2)])
    y.backward(grad)
    expected.backward(grad)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert a.grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)
    torch.testing.assert_close(split.weight.grad, plain.weight.grad)
    assert split.running_mean.dtype == torch.float32


def test_split_without_input_gradient_and_with_frozen_weight():
    split = convert_batchnorm(make_batchnorm(1), "split", 2)
    split.weight.requires_grad_(False)
    x, grad = make_input(1, 0, 8)
    split(x).backward(grad)
    torch.testing.assert_close(split.bias.grad, grad.sum(0))
    assert split.weight.grad is None


@pytest.mark.parametrize("kind", ["sync", "split"])
def test_evaluation_mode_is_plain_batchnorm(kind):
    plain = make_batchnorm(2)
    train(plain, 2, slice(None), 8)
    other = convert_batchnorm(copy.deepcopy(plain), kind, 2 if kind == "split" else 1).eval()
    x, _ = make_input(2, 7, 5)
    assert torch.equal(other(x), plain.eval()(x))


def test_split_without_running_statistics_groups_in_evaluation_too():
    bn = nn.BatchNorm1d(6, track_running_stats=False)
    split = convert_batchnorm(copy.deepcopy(bn), "split", 2).eval()
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(split(x), torch.cat([bn(part) for part in x.chunk(2)]))


def test_convert_keeps_parameters_and_keys_and_can_be_undone():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(16))
    parameters, state = list(model.parameters()), copy.deepcopy(model.state_dict())
    assert convert_batchnorm(model, "split", 4) is model
    assert isinstance(model[1], SplitBatchNorm2d)
    assert isinstance(model[3], SplitBatchNorm1d)
    assert model[1].num_splits == 4
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    convert_batchnorm(model, "sync")
    assert isinstance(model[1], CrossProcessBatchNorm2d)
    convert_batchnorm(model, "local")
    assert [type(m) for m in model] == [nn.Conv2d, nn.BatchNorm2d, nn.Flatten, nn.BatchNorm1d]


def test_wrong_settings_are_explained():
    class ActivatedBatchNorm(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match="ActivatedBatchNorm"):
        convert_batchnorm(nn.Sequential(ActivatedBatchNorm(3)), "split", 2)
    convert_batchnorm(nn.Sequential(ActivatedBatchNorm(3)), "local")
    with pytest.raises(ValueError, match="num_splits=2"):
        convert_batchnorm(nn.BatchNorm2d(3), "sync", 2)
    split = convert_batchnorm(nn.BatchNorm1d(3), "split", 4)
    with pytest.raises(ValueError, match="batch of 6 images for 4 groups"):
        split(torch.zeros(6, 3))
    with pytest.raises(ValueError, match="more than one value per channel"):
        split(torch.zeros(4, 3))
