"""Collectives: two processes against the plain computation on the concatenated tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from methods import collectives
from tests.methods.distributed import run_processes


def make_rows(rank: int) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def loss_of(rows: Tensor, rank: int) -> Tensor:
    """A loss of all rows that differs from rank to rank, so that a missing sum over workers shows."""
    weight = torch.linspace(0.1, 1.0 + rank, rows.numel(), dtype=rows.dtype).reshape(rows.shape)
    return (rows.sin() * weight).sum()


def exercise_collectives() -> dict:
    me = collectives.rank()
    x = make_rows(me).requires_grad_()
    gathered = collectives.gather_with_grad(x)
    loss_of(gathered, me).backward()

    y = make_rows(me).requires_grad_()
    total = collectives.all_reduce_sum_with_grad(y)
    loss_of(total, me).backward()

    images = (torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).float() + 1000 * me).contiguous(
        memory_format=torch.channels_last
    )
    gathered_images = collectives.all_gather_concat(images)
    return {
        "rank": me,
        "world_size": collectives.world_size(),
        "gathered": gathered.detach(),
        "gathered_grad": x.grad,
        "total": total.detach(),
        "total_grad": y.grad,
        "mean": collectives.all_reduce_mean(make_rows(me)),
        "images": gathered_images,
        "images_channels_last": gathered_images.is_contiguous(memory_format=torch.channels_last),
        "labels": collectives.all_gather_concat(torch.tensor([2**40 + me, -1])),
        # Different seeds on purpose: rank 0 decides.
        "permutation": collectives.broadcast_permutation(17, torch.tensor(5 + me), counter=3),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    return run_processes(exercise_collectives, 2, tmp_path_factory.mktemp("collectives"))


def test_ranks_and_world_size(two_ranks):
    assert [r["rank"] for r in two_ranks] == [0, 1]
    assert [r["world_size"] for r in two_ranks] == [2, 2]
    assert collectives.rank() == 0
    assert collectives.world_size() == 1


def test_gather_with_grad_equals_concatenation(two_ranks):
    parts = [make_rows(rank).requires_grad_() for rank in range(2)]
    rows = torch.cat(parts)
    sum(loss_of(rows, rank) for rank in range(2)).backward()
    for rank, result in enumerate(two_ranks):
        torch.testing.assert_close(result["gathered"], rows.detach(), rtol=0, atol=0)
        torch.testing.assert_close(result["gathered_grad"], parts[rank].grad)


def test_all_reduce_sum_with_grad_equals_sum(two_ranks):
    parts = [make_rows(rank).requires_grad_() for rank in range(2)]
    total = parts[0] + parts[1]
    sum(loss_of(total, rank) for rank in range(2)).backward()
    for rank, result in enumerate(two_ranks):
        torch.testing.assert_close(result["total"], total.detach())
        torch.testing.assert_close(result["total_grad"], parts[rank].grad)
        torch.testing.assert_close(result["mean"], total.detach() / 2)


def test_gather_keeps_order_dtype_and_memory_format(two_ranks):
    images = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).float()
    for result in two_ranks:
        torch.testing.assert_close(result["images"], torch.cat([images, images + 1000]), rtol=0, atol=0)
        assert result["images_channels_last"]
        assert result["labels"].tolist() == [2**40, -1, 2**40 + 1, -1]


def test_permutation_is_shared_and_equals_the_one_of_one_process(two_ranks):
    alone = collectives.broadcast_permutation(17, torch.tensor(5), counter=3)
    for result in two_ranks:
        assert torch.equal(result["permutation"], alone)


def test_without_a_process_group_everything_is_the_identity():
    x = make_rows(0).requires_grad_()
    assert collectives.gather_with_grad(x) is x
    assert collectives.all_reduce_sum_with_grad(x) is x
    assert torch.equal(collectives.all_gather_concat(x), x)
    assert not collectives.all_gather_concat(x).requires_grad
    assert torch.equal(collectives.all_reduce_mean(x), x)


def splitmix64(state: int) -> int:
    """The published generator in plain integers."""
    mask = 2**64 - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def test_permutation_follows_splitmix64():
    mask = 2**64 - 1
    stream = splitmix64((splitmix64(7) + 11) & mask)
    keys = [splitmix64((stream + i) & mask) for i in range(50)]
    signed = [key - 2**64 if key >= 2**63 else key for key in keys]
    expected = sorted(range(50), key=signed.__getitem__)
    assert collectives.broadcast_permutation(50, torch.tensor(7), counter=11).tolist() == expected


def test_permutations_are_uniform_over_positions():
    draws = torch.stack([collectives.broadcast_permutation(8, torch.tensor(1), counter=c) for c in range(4000)])
    assert torch.equal(draws.sort(dim=1).values, torch.arange(8).expand(4000, 8))
    counts = torch.stack([(draws == value).sum(0) for value in range(8)]).double()
    # Chi-square of the 8 x 8 table of (value, position): 49 degrees of freedom, 99.99 % quantile 95.
    assert ((counts - 500) ** 2 / 500).sum() < 95
    assert not torch.equal(draws[0], collectives.broadcast_permutation(8, torch.tensor(2), counter=0))
