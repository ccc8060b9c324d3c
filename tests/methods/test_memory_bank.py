"""Memory bank, InstDisc and CMC against the official formulas re-derived slowly; CMC's two directions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from methods import memory_bank
from methods.backbones import LabBackbone
from methods.cmc import Cmc, CMCConfig
from methods.instdisc import InstDisc, InstDiscConfig
from methods.memory_bank import MemoryBank, nce_loss, sampled_logits, sampled_softmax_loss
from tests.methods.examples import TinyBackbone, make_batch, make_context, progress

INSTDISC = InstDiscConfig(num_negatives=20, projector_dim=6, temperature=0.2)
CMC = CMCConfig(num_negatives=20, projector_dim=6, temperature=0.2)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Three queries of 21 entries of 6 values at a time: a batch of 8 takes several chunks and a ragged last one."""
    monkeypatch.setattr(memory_bank, "_CPU_CHUNK_VALUES", 3 * 21 * 6)


def make_queries(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Unit queries (8, 6), a bank (64, 6), entries (8, 21) with the own one first."""
    generator = torch.Generator().manual_seed(seed)
    q = F.normalize(torch.randn(8, 6, generator=generator, dtype=torch.float64), dim=1).requires_grad_()
    bank = F.normalize(torch.randn(64, 6, generator=generator, dtype=torch.float64), dim=1)
    return q, bank, torch.randint(64, (8, 21), generator=generator)


def slow_nce(q: Tensor, bank: Tensor, ids: Tensor, tau: float, z: float) -> Tensor:
    """NCEAverage and NCECriterion of lemniscate, entry by entry (without the 1e-7 in their denominators)."""
    n, noise = len(bank), ids.shape[1] - 1
    total = torch.zeros((), dtype=q.dtype)
    for i in range(len(q)):
        p = [torch.exp(q[i] @ bank[j] / tau) / z for j in ids[i]]
        total = total - torch.log(p[0] / (p[0] + noise / n))
        for p_noise in p[1:]:
            total = total - torch.log((noise / n) / (p_noise + noise / n))
    return total / len(q)


def slow_softmax(q: Tensor, bank: Tensor, ids: Tensor, tau: float) -> Tensor:
    total = torch.zeros((), dtype=q.dtype)
    for i in range(len(q)):
        terms = [torch.exp(q[i] @ bank[j] / tau) for j in ids[i]]
        total = total - torch.log(terms[0] / sum(terms))
    return total / len(q)


def gradient(loss: Tensor, q: Tensor) -> Tensor:
    return torch.autograd.grad(loss, q)[0]


def test_nce_is_the_official_criterion():
    q, bank, ids = make_queries()
    ours = nce_loss(sampled_logits(q, bank, ids, 0.2), torch.tensor(math.log(9.0)), 64)
    slow = slow_nce(q, bank, ids, 0.2, 9.0)
    torch.testing.assert_close(ours, slow, rtol=1e-7, atol=0)
    torch.testing.assert_close(gradient(ours, q), gradient(slow, q), rtol=1e-6, atol=1e-9)


def test_sampled_softmax_is_cross_entropy_over_the_entries():
    q, bank, ids = make_queries()
    ours, slow = sampled_softmax_loss(sampled_logits(q, bank, ids, 0.2)), slow_softmax(q, bank, ids, 0.2)
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(gradient(ours, q), gradient(slow, q))


def test_softmax_counts_every_image_once():
    q, features, _ = make_queries()
    bank = MemoryBank(64, 6).double()
    bank.features.copy_(features)
    own = torch.randperm(64)[:8, None]
    everything = torch.stack([torch.cat([i, torch.tensor([j for j in range(64) if j != i])]) for i in own])
    ours, slow = bank.loss(q, own, "softmax", 0.2), slow_softmax(q, features, everything, 0.2)
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(gradient(ours, q), gradient(slow, q))


def test_z_is_set_by_the_first_batch_and_kept():
    q, features, ids = make_queries()
    bank = MemoryBank(64, 6).double()
    bank.features.copy_(features)
    assert bank.log_z.isinf()
    bank.loss(q, ids, "nce", 0.2)
    logits = (q.detach()[:, None] * features[ids]).sum(2) / 0.2
    expected = (64 * logits.exp().mean()).log()
    torch.testing.assert_close(bank.log_z, expected)
    bank.loss(make_queries(1)[0], ids, "nce", 0.2)
    torch.testing.assert_close(bank.log_z, expected)


def test_entries_are_averaged_and_put_back_to_length_1():
    bank = MemoryBank(64, 6).double()
    before = bank.features.clone()
    features, index = F.normalize(torch.randn(3, 6, dtype=torch.float64), dim=1), torch.tensor([5, 60, 0])
    bank.stage(features, index, 0)
    bank.update(0.3)
    expected = before.clone()
    expected[index] = F.normalize(0.3 * before[index] + 0.7 * features, dim=1)
    torch.testing.assert_close(bank.features, expected)
    bound = 1 / math.sqrt(6 / 3)
    assert before.abs().max() <= bound
    assert before.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_noise_is_uniform_fresh_each_step_and_the_same_for_micro_steps():
    bank = MemoryBank(10, 6)
    index = torch.arange(8)
    ids = bank.sample(index, 2000, progress())
    assert torch.equal(ids[:, 0], index)
    counts = ids[:, 1:].flatten().bincount(minlength=10)
    assert (counts - 1600).abs().max() < 5 * math.sqrt(1600)  # standard deviation of a count is 38
    assert not torch.equal(ids, bank.sample(index, 2000, progress(1)))
    halves = [bank.sample(index[4 * m :][:4], 2000, progress(micro_step=m, num_micro_steps=2)) for m in range(2)]
    assert torch.equal(torch.cat(halves), ids)


def _instdisc(config: InstDiscConfig = INSTDISC) -> InstDisc:
    torch.manual_seed(0)
    return InstDisc(config, TinyBackbone(), make_context()).double()


@pytest.mark.parametrize("loss", ["nce", "softmax", "sampled_softmax"])
def test_instdisc_steps_are_the_papers_algorithm(loss):
    method = _instdisc(replace(INSTDISC, loss=loss))
    bank = method.bank.features.clone()
    for step in range(3):
        batch = make_batch(1, seed=step)
        ours = method(batch, progress(step)).loss
        q = F.normalize(method.projector(method.backbone(batch.views[0])), dim=1)
        ids = method.bank.sample(batch.index, 20, progress(step))
        if loss == "nce":
            expected = slow_nce(q, bank, ids, 0.2, float(method.bank.log_z.exp()))
        else:
            rest = [[int(i), *(j for j in range(64) if j != i)] for i in batch.index]
            expected = slow_softmax(q, bank, torch.tensor(rest) if loss == "softmax" else ids, 0.2)
        torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-9)
        method.after_step(progress(step))
        bank[batch.index] = F.normalize(0.5 * bank[batch.index] + 0.5 * q.detach(), dim=1)
        torch.testing.assert_close(method.bank.features, bank)


class TinyLabBackbone(LabBackbone):
    def __init__(self) -> None:
        super().__init__(TinyBackbone(1), TinyBackbone(2))


def _cmc(config: CMCConfig = CMC) -> Cmc:
    torch.manual_seed(0)
    return Cmc(config, TinyLabBackbone(), make_context()).double()


@pytest.mark.parametrize("loss", ["sampled_softmax", "nce"])
def test_cmc_contrasts_each_half_with_the_bank_of_the_other(loss):
    method, batch = _cmc(replace(CMC, loss=loss)), make_batch(1)
    a, b = method.backbone.split_features(batch.views[0])
    a, b = F.normalize(method.projector_l(a), dim=1), F.normalize(method.projector_ab(b), dim=1)
    ids = method.bank_l.sample(batch.index, 20, progress())
    bank_a, bank_b = method.bank_l.features.clone(), method.bank_ab.features.clone()
    ours = method(batch, progress()).loss
    if loss == "nce":
        z = [float(bank.log_z.exp()) for bank in (method.bank_ab, method.bank_l)]
        expected = slow_nce(a, bank_b, ids, 0.2, z[0]) + slow_nce(b, bank_a, ids, 0.2, z[1])
    else:
        expected = slow_softmax(a, bank_b, ids, 0.2) + slow_softmax(b, bank_a, ids, 0.2)
    torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-9)
    method.after_step(progress())
    for bank, old, new in ((method.bank_l, bank_a, a), (method.bank_ab, bank_b, b)):
        mixed = F.normalize(0.5 * old[batch.index] + 0.5 * new.detach(), dim=1)
        torch.testing.assert_close(bank.features[batch.index], mixed)


def test_cmcs_halves_see_lightness_and_colour_only():
    method, batch = _cmc(), make_batch(1, dtype=torch.float64)
    image = batch.views[0].clamp(-1, 1)
    gray = image.mean(1, keepdim=True).expand_as(image)
    low, ab = method.backbone.split_features(image)
    assert not torch.allclose(ab, method.backbone.split_features(gray)[1])
    assert torch.equal(torch.cat([low, ab], 1), method.backbone(image))
    assert method.backbone.num_features == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "hinge"}, "'hinge'; choose one of: nce, softmax, sampled_softmax"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"bank_momentum": 1.0}, "bank_momentum=1.0"),
        ({"num_negatives": 0}, "num_negatives=0.*loss='softmax'"),
        ({"projector_dim": 0}, "widths at least 1"),
    ],
)
@pytest.mark.parametrize(("method", "config"), [(InstDisc, INSTDISC), (Cmc, CMC)])
def test_settings_that_cannot_train_are_refused(method: Any, config: Any, changes, message):
    with pytest.raises(ValueError, match=message):
        method.validate(replace(config, **changes), make_context())


def test_cmc_needs_its_two_encoders():
    with pytest.raises(ValueError, match="color_space='lab'"):
        Cmc(CMC, TinyBackbone(), make_context())
