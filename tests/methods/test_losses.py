"""Contrast losses against slow float64 sums, MoCo's own formulation, and two libraries."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from methods import losses
from methods.losses import contrast, info_nce, label_masked_info_nce


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch):
    """Blocks of 7 keys at a batch of 6: every test runs over several blocks and a ragged last one."""
    monkeypatch.setattr(losses, "_CPU_BLOCK_LOGITS", 42)


def make_inputs(num_queries: int = 6, num_keys: int = 40, dim: int = 8, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def unit(n: int) -> Tensor:
        return F.normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=1)

    q, k, queue = unit(num_queries), unit(num_queries), unit(num_keys)
    labels = torch.randint(0, 4, (num_queries,), generator=generator)
    queue_labels = torch.randint(-1, 4, (num_keys,), generator=generator)
    return q.requires_grad_(), k, queue, labels, queue_labels


def slow_loss(q, k, queue, tau, labels=None, queue_labels=None) -> Tensor:
    """Eq. 1 of MoCo and Eq. 2 of Exemplar (Zhao et al., ICLR 2021), term by term."""
    total = torch.zeros((), dtype=q.dtype)
    for i in range(len(q)):
        positive = torch.exp(q[i] @ k[i] / tau)
        denominator = positive
        for j in range(len(queue)):
            if labels is None or labels[i] != queue_labels[j]:
                denominator = denominator + torch.exp(q[i] @ queue[j] / tau)
        total = total - torch.log(positive / denominator)
    return total / len(q)


def gradient(loss: Tensor, q: Tensor) -> Tensor:
    return torch.autograd.grad(loss, q)[0]


@pytest.mark.parametrize("tau", [0.07, 0.2, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_slow_sums(tau, masked):
    q, k, queue, labels, queue_labels = make_inputs()
    if masked:
        ours = label_masked_info_nce(q, k, queue, labels, queue_labels, tau)
        slow = slow_loss(q, k, queue, tau, labels, queue_labels)
    else:
        ours, slow = info_nce(q, k, queue, tau), slow_loss(q, k, queue, tau)
    torch.testing.assert_close(ours, slow, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(ours, q), gradient(slow, q), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_float32_is_close_to_float64(masked):
    q, k, queue, labels, queue_labels = make_inputs(num_keys=500, dim=128)
    ids = (labels, queue_labels) if masked else (None, None)
    slow = slow_loss(q, k, queue, 0.07, *ids)
    q32 = q.detach().float().requires_grad_()
    ours = contrast(q32, k.float(), queue.float(), 0.07, *ids).loss
    torch.testing.assert_close(ours.double(), slow, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient(ours, q32).double(), gradient(slow, q), rtol=1e-5, atol=1e-6)


def test_gradcheck():
    q, k, queue, labels, queue_labels = make_inputs(3, 20, 4)
    k.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: info_nce(a, b, queue, 0.3), (q, k))
    assert torch.autograd.gradcheck(lambda a, b: label_masked_info_nce(a, b, queue, labels, queue_labels, 0.3), (q, k))


def test_equals_the_official_formulation():
    """Logits [positive, negatives] / T and cross entropy with target 0, as ``moco/builder.py`` states it."""
    q, k, queue, labels, queue_labels = make_inputs()
    positive = torch.einsum("nc,nc->n", q, k)[:, None]
    negative = torch.einsum("nc,ck->nk", q, queue.T)
    target = torch.zeros(len(q), dtype=torch.int64)
    expected = F.cross_entropy(torch.cat([positive, negative], dim=1) / 0.07, target)
    torch.testing.assert_close(info_nce(q, k, queue, 0.07), expected)
    same = labels[:, None] == queue_labels[None]
    masked = torch.cat([positive, negative.masked_fill(same, -torch.inf)], dim=1) / 0.07
    result = contrast(q, k, queue, 0.07, labels, queue_labels)
    torch.testing.assert_close(result.loss, F.cross_entropy(masked, target))
    torch.testing.assert_close(result.top1, (masked.argmax(1) == 0).double().mean())
    torch.testing.assert_close(result.positive_similarity, positive.detach().mean())
    torch.testing.assert_close(result.negative_similarity, negative.detach().mean())  # masked ones too
    assert not result.negative_similarity.requires_grad
    assert result.num_masked_queries == 0


def test_equals_lightly_with_a_memory_bank():
    from lightly.loss import NTXentLoss

    q, k, queue, _, _ = make_inputs()
    bank = NTXentLoss(temperature=0.1, memory_bank_size=(len(queue), queue.shape[1]))
    bank.memory_bank.bank = queue.clone()
    torch.testing.assert_close(info_nce(q, k, queue, 0.1), bank(q, k))


def test_equals_pytorch_metric_learning_with_explicit_pairs():
    from pytorch_metric_learning.losses import NTXentLoss

    q, k, queue, labels, queue_labels = make_inputs()
    anchors = torch.arange(len(q))
    pairs = (anchors, anchors, *torch.nonzero(labels[:, None] != queue_labels, as_tuple=True))
    shifted = (*pairs[:3], pairs[3] + len(q))  # the queue follows the keys in the reference set
    expected = NTXentLoss(temperature=0.1)(q, indices_tuple=shifted, ref_emb=torch.cat([k, queue]))
    ours = label_masked_info_nce(q, k, queue, labels, queue_labels, 0.1)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    # The library normalises its input, which removes the gradient along q.
    ours_grad = gradient(ours, q)
    tangential = ours_grad - (ours_grad * q).sum(1, keepdim=True) * q
    torch.testing.assert_close(tangential.detach(), gradient(expected, q), rtol=1e-6, atol=1e-6)


def test_distinct_labels_are_plain_info_nce_and_unknown_labels_are_negatives():
    q, k, queue, _, _ = make_inputs()
    labels = torch.arange(len(q)) + 2**33  # beyond int32 and beyond float32's integers
    for queue_labels in (torch.arange(len(queue)) + 2**33 + len(q), torch.full((len(queue),), -1)):
        assert torch.equal(label_masked_info_nce(q, k, queue, labels, queue_labels, 0.1), info_nce(q, k, queue, 0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_labels_give_exactly_zero_loss_and_gradient(dtype):
    q, k, queue, _, _ = make_inputs()
    q = q.detach().to(dtype).requires_grad_()
    ones = torch.ones(len(q), dtype=torch.int64)
    result = contrast(q, k.to(dtype), queue.to(dtype), 0.07, ones, torch.ones(len(queue), dtype=torch.int64))
    assert result.loss == 0
    assert torch.equal(gradient(result.loss, q), torch.zeros_like(q))
    assert result.num_masked_queries == len(q)
    assert result.top1 == 1


def test_one_fully_masked_query_among_others():
    q, k, queue, labels, _ = make_inputs()
    labels = torch.tensor([9, 0, 1, 2, 3, 4])
    queue_labels = torch.full((len(queue),), 9)
    result = contrast(q, k, queue, 0.07, labels, queue_labels)
    torch.testing.assert_close(result.loss, slow_loss(q[1:], k[1:], queue, 0.07) * 5 / 6)
    grad = gradient(result.loss, q)
    assert torch.equal(grad[0], torch.zeros(q.shape[1], dtype=q.dtype))
    assert (grad[1:] != 0).all()
    assert result.num_masked_queries == 1


def test_extreme_temperature_stays_finite_and_exact():
    """Opposite vectors at tau = 0.002: a fixed shift of the logits by 1 / tau = 500 would underflow."""
    q = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).requires_grad_()
    k = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    queue = torch.tensor([[-1.0, 0.0]] * 60 + [[0.0, 1.0]] * 2)
    result = info_nce(q, k, queue, 0.002)
    # Query 0: log(2 e^0 + 61 e^-500) + 500; query 1: log(e^500 + ...) - 500 = 0.
    assert result.item() == pytest.approx((math.log(2) + 500) / 2)
    assert gradient(result, q).isfinite().all()


@pytest.fixture
def long_queue(monkeypatch):
    """q, k and K = 65,536 keys of 1,000 classes in float32, in the blocks of real runs; the last one is ragged."""
    monkeypatch.setattr(losses, "_CPU_BLOCK_LOGITS", 2**16 - 2**9)
    generator = torch.Generator().manual_seed(0)
    q, k, queue = (F.normalize(torch.randn(n, 128, generator=generator), dim=1) for n in (64, 64, 65536))
    labels, queue_labels = (torch.randint(-1, 1000, (n,), generator=generator) for n in (64, 65536))
    return q.requires_grad_(), k, queue, labels.clamp_min(0), queue_labels


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tau", [0.04, 0.2])
def test_long_queue_in_float32_equals_the_slow_formula(long_queue, tau, masked):
    q, k, queue, labels, queue_labels = long_queue
    ids = (labels, queue_labels) if masked else (None, None)
    got = contrast(q, k, queue, tau, *ids)
    q64 = q.detach().double().requires_grad_()
    positive, negative = (q64 * k).sum(1, keepdim=True), q64 @ queue.double().T
    if masked:
        negative = negative.masked_fill(labels[:, None] == queue_labels, -torch.inf)
    slow = F.cross_entropy(torch.cat([positive, negative], 1) / tau, torch.zeros(len(q), dtype=torch.int64))
    torch.testing.assert_close(got.loss.double(), slow, rtol=1e-5, atol=0)
    expected = gradient(slow, q64)
    assert (gradient(got.loss, q).double() - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("masked", [False, True])
def test_bf16_queue_is_the_rounded_queue_and_close_to_fp32(long_queue, masked):
    q, k, queue, *labels = long_queue
    ids = labels if masked else (None, None)
    got, rounded, exact = (
        contrast(q, k, keys, 0.07, *ids) for keys in (queue.bfloat16(), queue.bfloat16().float(), queue)
    )
    assert got.loss.dtype == torch.float32
    gradients = [gradient(result.loss, q) for result in (got, rounded, exact)]
    torch.testing.assert_close(got.loss, rounded.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got.loss, exact.loss, rtol=3e-3, atol=0)
    assert (gradients[0] - gradients[2]).norm() < 3e-3 * gradients[2].norm()
    torch.testing.assert_close(got.negative_similarity, exact.negative_similarity, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tau", [0.002, 0.01, 0.07])
def test_counted_logits_far_below_the_bound_do_not_underflow(tau):
    """The hardest negatives are masked: what counts is at -1 / tau, where exp(-2 / tau) is 0 in float32."""
    q = torch.tensor([[1.0, 0.0]] * 2).requires_grad_()
    queue = torch.tensor([[1.0, 0.0]] * 30 + [[-1.0, 0.0]] * 30)
    queue_labels = torch.tensor([5] * 30 + [6] * 30)
    result = contrast(q, -q.detach(), queue, tau, torch.tensor([5, 5]), queue_labels)
    assert result.loss.item() == pytest.approx(math.log(31), rel=1e-5)
    assert result.top1 == 1


def test_vectors_of_any_length_are_exact():
    q, k, queue, labels, queue_labels = make_inputs()
    queue = queue * torch.linspace(0.1, 30, len(queue))[:, None]
    ours = label_masked_info_nce(q, k, queue, labels, queue_labels, 0.07)
    slow = slow_loss(q, k, queue, 0.07, labels, queue_labels)
    torch.testing.assert_close(ours, slow, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(ours, q), gradient(slow, q), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_half_inputs_compute_in_float32(dtype):
    q, k, queue, labels, queue_labels = (t.detach() for t in make_inputs())
    q, k, queue = q.to(dtype), k.to(dtype), queue.float()
    expected = contrast(q.float(), k.float(), queue, 0.07, labels, queue_labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = contrast(q.requires_grad_(), k, queue, 0.07, labels, queue_labels)
    assert got.loss.dtype == torch.float32
    assert torch.equal(got.loss, expected.loss)
    assert gradient(got.loss, q).dtype == dtype


def test_half_the_labels_is_an_error():
    q, k, queue, labels, _ = make_inputs()
    with pytest.raises(ValueError, match="only one of them"):
        contrast(q, k, queue, 0.1, labels)
