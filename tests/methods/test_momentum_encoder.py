"""The momentum copy against the slow loop, ShuffleBN against the permuted computation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from methods import collectives
from methods.batchnorm import convert_batchnorm
from methods.contracts import MethodContext, Progress
from methods.momentum_encoder import KeyEncoder, MomentumEncoder, resolve_bn_splits, shuffled_encode, unit_vectors
from tests.methods.distributed import run_processes


def make_module() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


def make_images(num: int, seed: int) -> torch.Tensor:
    return torch.randn(num, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_copy_takes_no_gradient_and_shares_nothing():
    online = make_module()
    encoder = MomentumEncoder(online)
    assert not any(p.requires_grad for p in encoder.parameters())
    assert all(p.requires_grad for p in online.parameters())
    torch.testing.assert_close(dict(encoder.module.state_dict()), dict(online.state_dict()), rtol=0, atol=0)
    assert not {p.data_ptr() for p in online.parameters()} & {p.data_ptr() for p in encoder.parameters()}
    assert not encoder(make_images(4, 0)).requires_grad


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999, 1.0])
def test_update_equals_the_slow_loop(momentum):
    online = make_module().double()
    encoder = MomentumEncoder(online)
    slow = [p.detach().clone() for p in online.parameters()]
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        with torch.no_grad():
            for p in online.parameters():
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
        encoder.update(online, momentum)
        slow = [s * momentum + p.detach() * (1 - momentum) for s, p in zip(slow, online.parameters(), strict=True)]
    for ours, expected in zip(encoder.parameters(), slow, strict=True):
        torch.testing.assert_close(ours.detach(), expected)


def test_batchnorm_buffers_are_the_copys_own():
    online = make_module().train()
    encoder = MomentumEncoder(online)
    online(make_images(8, 0))
    before = encoder.module[1].running_mean.clone()
    encoder.update(online, 0.5)
    assert torch.equal(encoder.module[1].running_mean, before)
    encoder(make_images(8, 1))
    assert not torch.equal(encoder.module[1].running_mean, before)


def test_update_follows_replaced_weights_and_deep_copies():
    """Stored parameter lists would silently move the wrong tensors here."""
    online = make_module()
    encoder = MomentumEncoder(online)
    encoder.update(online, 0.5)
    encoder.load_state_dict({k: torch.zeros_like(v) for k, v in encoder.state_dict().items()}, assign=True)
    pair = copy.deepcopy(nn.ModuleList([online, encoder]))
    for a, b in ((online, encoder), (pair[0], pair[1])):
        b.update(a, 0.75)
        torch.testing.assert_close(b.module[0].weight, a[0].weight.detach() * 0.25)


def progress(step: int, micro_step: int = 0, num_micro_steps: int = 1) -> Progress:
    return Progress(step, 10, 0, 1, micro_step, num_micro_steps)


def test_key_encoder_follows_once_per_step():
    backbone, projector = make_module(), nn.Linear(5, 2)
    keys = KeyEncoder(backbone, projector, 0.9, shuffle_bn=False)
    with torch.no_grad():
        projector.weight.add_(1.0)
    expected = keys.projector.module.weight.detach() * 0.9 + projector.weight.detach() * 0.1
    for micro_step in range(3):
        keys.follow(backbone, projector, progress(0, micro_step, 3))
        torch.testing.assert_close(keys.projector.module.weight.detach(), expected)


def test_shuffled_encode_is_the_encoding_of_the_permuted_batch_put_back():
    encoder = convert_batchnorm(make_module(), "split", 2)
    images, seed = make_images(8, 0), torch.tensor(5)
    permutation = collectives.broadcast_permutation(8, seed, 3)
    expected = torch.empty(8, 5)
    with torch.no_grad():
        expected[permutation] = copy.deepcopy(encoder)(images[permutation])
        plain = copy.deepcopy(encoder)(images)
    got = shuffled_encode(copy.deepcopy(encoder), images, seed, 3)
    assert torch.equal(got, expected)
    assert (got - plain).abs().max() > 1e-3  # other groups, other statistics
    assert not torch.equal(got, shuffled_encode(copy.deepcopy(encoder), images, seed, 4))


def test_permutation_differs_in_every_forward_pass():
    keys = KeyEncoder(convert_batchnorm(make_module(), "split", 2), nn.Identity(), 0.9, shuffle_bn=True)
    images = make_images(32, 0)  # 8 images have only 35 groupings: two of six permutations would often agree
    seen = [keys(images, progress(step, m, 2)) for step in range(3) for m in range(2)]
    for i, a in enumerate(seen):
        assert all((a - b).abs().max() > 1e-4 for b in seen[:i])
    assert torch.equal(seen[3], keys(images, progress(1, 1, 2)))  # a function of progress alone


def shuffle_on_worker() -> torch.Tensor:
    torch.manual_seed(0)
    encoder = make_module()
    start = 4 * collectives.rank()
    images = make_images(8, 0)[start : start + 4].contiguous(memory_format=torch.channels_last)
    return shuffled_encode(encoder, images, torch.tensor(5), 3)


def test_two_workers_equal_one_process_with_two_groups(tmp_path):
    torch.manual_seed(0)
    encoder = convert_batchnorm(make_module(), "split", 2)
    expected = shuffled_encode(encoder, make_images(8, 0), torch.tensor(5), 3)
    torch.testing.assert_close(torch.cat(run_processes(shuffle_on_worker, 2, tmp_path)), expected)


class GroupMean(nn.Module):
    """An encoder that tells nothing about the image: it outputs the batch statistics of its BatchNorm group."""

    SCALE = 1e3

    def __init__(self) -> None:
        super().__init__()
        # With so large an eps the output is (x - mean) / SCALE, so x - SCALE * output is the mean.
        self.bn = nn.BatchNorm1d(192, eps=self.SCALE**2, affine=False, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return x - self.SCALE * self.bn(x)


@pytest.mark.parametrize(("shuffle_bn", "leaks"), [(False, True), (True, False)])
def test_shuffling_closes_the_batch_statistics_leak(shuffle_bn, leaks):
    """Planted leak: without ShuffleBN query and key match perfectly though no image is described at all."""
    backbone = convert_batchnorm(GroupMean(), "split", 4)
    keys = KeyEncoder(backbone, nn.Identity(), 0.9, shuffle_bn)
    images = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, k = unit_vectors(backbone(images)), keys(images, progress(0))
    similarity = (q * k).sum(1)
    assert (similarity.min() > 0.999) == leaks
    assert (similarity.mean() < 0.6) == (not leaks)


def context(batch: int, world_size: int = 1, num_micro_steps: int = 1) -> MethodContext:
    return MethodContext(10, 10**6, batch, world_size, 32, num_micro_steps)


@pytest.mark.parametrize(
    ("bn_splits", "shuffle_bn", "where", "expected"),
    [
        ("auto", True, context(256), 8),
        ("auto", True, context(256, world_size=8), 1),
        ("auto", True, context(256, world_size=2), 4),
        ("auto", True, context(256, num_micro_steps=4), 2),
        ("auto", True, context(16), 2),
        ("auto", True, context(100), 2),
        ("auto", True, context(9, world_size=3), 1),
        ("auto", False, context(256), 1),
        (4, True, context(64), 4),
        (1, True, context(7), 1),
        (2, False, context(64), 2),
    ],
)
def test_number_of_groups(bn_splits, shuffle_bn, where, expected):
    assert resolve_bn_splits(bn_splits, shuffle_bn, where) == expected


@pytest.mark.parametrize(
    ("bn_splits", "where", "message"),
    [
        (3, context(64), "Use one of 1, 2, 4, 8, 16, 32, or 'auto'"),
        (64, context(64), "groups of at least 2"),
        (0, context(64), "bn_splits=0"),
        ("auto", context(7), "even batch size"),
        ("auto", context(2), "even batch size"),
        ("auto", context(64, world_size=3), "multiple of 3"),
        ("auto", context(4, world_size=4, num_micro_steps=2), "multiple of 8"),
    ],
)
def test_impossible_groups_are_explained(bn_splits, where, message):
    with pytest.raises(ValueError, match=message):
        resolve_bn_splits(bn_splits, True, where)
