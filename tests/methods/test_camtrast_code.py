"""CAMtrast as its released code trains it: the whole algorithm by hand, weights after several batches."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import cv2
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from methods import camtrast_code
from methods.cam import class_activation_map, normalized_mask
from methods.camtrast import CamtrastSimSiam, CamtrastSimSiamConfig
from methods.camtrast_code import OPTIMIZER_CODE, warmup_epochs_code
from methods.contracts import MethodContext
from methods.optimizers import learning_rate
from tests.methods.distributed import run_processes
from tests.methods.examples import TinyBackbone, make_batch, make_context, progress
from tests.methods.phases import advance, make_optimizer, micro_batch, slow_bilinear, slow_suppressed, train_phases

T = 2  # batch 0 (epoch 1) is warm-up
MAIN = progress(1)
CONFIG = CamtrastSimSiamConfig(
    variant="code", cam_warmup_epochs=T, projector_hidden_dim=7, projector_dim=6, predictor_hidden_dim=3
)


def _build(context: MethodContext | None = None, config: CamtrastSimSiamConfig = CONFIG) -> CamtrastSimSiam:
    return CamtrastSimSiam(config, TinyBackbone(), context or make_context())


def _method(config: CamtrastSimSiamConfig = CONFIG) -> CamtrastSimSiam:
    torch.manual_seed(0)
    return _build(config=config).double().train()


# The mask


@pytest.mark.parametrize("size", [(9, 9), (7, 10)])
def test_mask_is_scaled_then_upsampled(size):
    features, weight = torch.randn(3, 5, 3, 3, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    classes = torch.tensor([3, 0, 1])
    mask, is_constant = normalized_mask(class_activation_map(features, weight, classes), size, "scale_then_upsample")
    assert not is_constant.any()
    ones = torch.ones(3, 1, *size, dtype=torch.float64)
    torch.testing.assert_close(1 - mask, slow_suppressed(ones, features, weight, classes, scale_first=True))
    # A peak in the middle keeps below 1 here; scaled afterwards it would reach 1.
    peak = torch.zeros(1, 3, 3)
    peak[0, 1, 1] = 5.0
    assert normalized_mask(peak, (84, 84), "scale_then_upsample")[0].amax() < 1
    assert normalized_mask(peak, (84, 84))[0].amax() == 1


def test_mask_is_that_of_opencv():
    """``returnCAM_tensor``: minimum 0, maximum 255, ``cv2.resize``, / 255; ToTensor does not scale floats."""
    maps = torch.randn(4, 3, 3)
    mask, _ = normalized_mask(maps, (84, 84), "scale_then_upsample")
    for b in range(4):
        scaled = maps[b] - maps[b].min()
        scaled = 255 * (scaled / scaled.max()).numpy()
        torch.testing.assert_close(
            mask[b, 0], torch.from_numpy(cv2.resize(scaled, (84, 84)) / 255.0), atol=1e-5, rtol=0
        )


def test_constant_maps_suppress_nothing():
    mask, is_constant = normalized_mask(torch.full((2, 3, 3), 3.7), (9, 9), "scale_then_upsample")
    assert is_constant.all()
    assert (mask == 0).all()


# The algorithm


class _SlowCode:
    """``train()`` of the released code on the modules of a method, with SGD written out."""

    def __init__(self, method: Any) -> None:
        self.m = method
        self.velocity: dict[str, Tensor] = {}
        self.classes: list[tuple[Tensor, Tensor]] = []

    def update(self) -> None:
        with torch.no_grad():
            for name, p in self.m.named_parameters():
                if p.grad is not None:
                    gradient = p.grad + 0.01 * p
                    self.velocity[name] = 0.5 * self.velocity[name] + gradient if name in self.velocity else gradient
                    p -= 0.1 * self.velocity[name]
                p.grad = None

    def classified(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        features = self.m.backbone.forward_features(x)
        pooled = features.flatten(2).sum(2) / features[0, 0].numel()
        logits = pooled @ self.m.classifier.weight.T + self.m.classifier.bias
        loss = sum(logits[b].exp().sum().log() - logits[b, labels[b]] for b in range(len(x))) / len(x)
        return loss, features, pooled, logits

    def similarity(self, p: Tensor, z: Tensor) -> Tensor:
        return ((p * z).sum(1) / (p.norm(dim=1) * z.norm(dim=1))).mean()

    def batch(self, step: int, count: int) -> Tensor:
        whole, kept, total = make_batch(1, seed=step), [], torch.zeros((), dtype=torch.float64)
        for m in range(count):
            x, labels = micro_batch(whole, m, count).views[0], micro_batch(whole, m, count).labels
            loss, features, _, logits = self.classified(x, labels)
            (loss / count).backward()
            total += loss.detach() / count
            kept.append((features.detach(), logits.argmax(1)))
            self.classes.append((logits.argmax(1), labels))
        self.update()
        if step + 1 < T:
            return total
        for m in range(count):
            x, labels = micro_batch(whole, m, count).views[0], micro_batch(whole, m, count).labels
            features, predicted = kept[m]
            anti = slow_suppressed(x, features, self.m.classifier.weight, predicted, scale_first=True)
            z1 = self.m.projector(self.classified(x, labels)[2])
            anti_loss, _, pooled, _ = self.classified(anti, labels)
            z2 = self.m.projector(pooled)
            p1, p2 = self.m.predictor(z1), self.m.predictor(z2)
            loss = anti_loss - (self.similarity(p1, z2.detach()) + self.similarity(p2, z1.detach())) * 0.5
            (loss / count).backward()
            total += loss.detach() / count
        self.update()
        return total


@pytest.mark.parametrize("count", [1, 2])
def test_weights_after_several_batches_are_those_of_the_code(count):
    ours, slow = _method(), _SlowCode(_method())
    losses = advance(ours, make_optimizer(ours), 1, range(4), count)
    expected = [slow.batch(step, count) for step in range(4)]
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected))
    torch.testing.assert_close(dict(ours.state_dict()), dict(slow.m.state_dict()))
    assert any((predicted != labels).any() for predicted, labels in slow.classes), "the label would do as well"


def test_gradients_of_the_second_phase():
    ours, slow = _method(), _SlowCode(_method())
    batch = make_batch(1, seed=1)
    ours(batch, progress(1))
    with torch.no_grad():  # the step between the phases
        for method in (ours, slow.m):
            method.classifier.weight.mul_(-0.7)
    ours(batch, progress(1, phase=1)).loss.backward()
    fresh = _method()
    features = fresh.backbone.forward_features(batch.views[0])
    predicted = fresh.classifier(features.mean((2, 3))).argmax(1)
    x = batch.views[0]
    anti = slow_suppressed(x, features, slow.m.classifier.weight, predicted, scale_first=True)
    z1 = slow.m.projector(slow.m.backbone(x))
    anti_loss, _, pooled, _ = slow.classified(anti, batch.labels)
    z2 = slow.m.projector(pooled)
    attraction = slow.similarity(slow.m.predictor(z1), z2.detach()) + slow.similarity(slow.m.predictor(z2), z1.detach())
    (anti_loss - attraction / 2).backward()
    for name, p in slow.m.named_parameters():
        torch.testing.assert_close(dict(ours.named_parameters())[name].grad, p.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_warmup_has_one_phase_of_plain_cross_entropy():
    method, slow = _method(), _method()
    batch = make_batch(1)
    assert [method.num_phases(progress(epoch)) for epoch in range(4)] == [1, 2, 2, 2]
    assert CamtrastSimSiam(replace(CONFIG, variant="paper"), TinyBackbone(), make_context()).num_phases(MAIN) == 1
    output = method(batch, progress(0))
    torch.testing.assert_close(
        output.loss, F.cross_entropy(slow.classifier(slow.backbone(batch.views[0])), batch.labels)
    )
    output.loss.backward()
    with_gradient = {name.split(".")[0] for name, p in method.named_parameters() if p.grad is not None}
    assert with_gradient == {"backbone", "classifier"}
    with pytest.raises(AssertionError, match="phase 1 before phase 0"):  # the warm-up keeps nothing
        method(batch, progress(0, phase=1))


def test_running_statistics_see_the_image_twice_and_its_suppressed_copy_once():
    method = _method()
    advance(method, make_optimizer(method), 1, [1])
    assert method.backbone.stem[1].num_batches_tracked == 3


def test_monitors_of_the_phases_have_different_names_and_no_graph():
    method = _method()
    first, second = method(make_batch(1), MAIN), method(make_batch(1), progress(1, phase=1))
    assert not set(first.metrics) & set(second.metrics)
    for value in [*first.metrics.values(), *second.metrics.values()]:
        assert value.dim() == 0
        assert not value.requires_grad


def test_what_is_kept_is_no_state_and_an_abandoned_step_is_forgotten():
    method = _method()
    names = set(method.state_dict())
    for m in range(2):
        method(make_batch(1, seed=m), progress(1, micro_step=m, num_micro_steps=2))
    assert set(method.state_dict()) == names == set(_method(replace(CONFIG, variant="paper")).state_dict())
    method(make_batch(1), progress(1, num_micro_steps=2))
    assert set(method._code._kept) == {0}
    pickle.dumps(copy.deepcopy(method))


def test_resuming_from_state_dicts_is_bit_equal():
    straight = _method()
    optimizer = make_optimizer(straight)
    advance(straight, optimizer, 1, range(2))
    stored = copy.deepcopy((straight.state_dict(), optimizer.state_dict()))
    expected = advance(straight, optimizer, 1, range(2, 4))
    torch.manual_seed(99)
    resumed = _build().double().train()
    optimizer = make_optimizer(resumed)
    resumed.load_state_dict(stored[0])
    optimizer.load_state_dict(stored[1])
    assert advance(resumed, optimizer, 1, range(2, 4)) == expected
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_two_processes_equal_one(tmp_path):
    one = train_phases(_build)
    for two in run_processes(train_phases, 2, tmp_path, _build):
        assert set(two["state"]) == set(one["state"])
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-8)


# Settings


def test_warmup_is_one_epoch_shorter_than_the_papers():
    default = CamtrastSimSiamConfig(variant="code")
    assert [warmup_epochs_code(default, n) for n in (1, 2, 10, 100)] == [0, 0, 2, 29]  # the README: t = 30 of 100
    assert [warmup_epochs_code(replace(default, cam_warmup_epochs=t), 10) for t in (0, 1, 5, 10)] == [0, 0, 4, 9]
    with pytest.raises(ValueError, match="starts CAMtrast's second step in epoch 11 of a run of 10 epochs"):
        warmup_epochs_code(replace(default, cam_warmup_epochs=11), 10)


def test_learning_rate_falls_after_60_and_80_of_100_epochs():
    rates = [learning_rate(OPTIMIZER_CODE, 256, epoch * 3, 300, 3) for epoch in (0, 59, 60, 79, 80, 99)]
    assert rates == pytest.approx([0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005])
    assert OPTIMIZER_CODE.weight_decay == 5e-4
    assert OPTIMIZER_CODE.sgd_momentum == 0.9
    assert camtrast_code.VIEWS_CODE == ("camtrast_code",)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"variant='both' must be one of: paper, code"):
        CamtrastSimSiam.validate(replace(CONFIG, variant="both"), make_context())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"takes 1 view of each image, but the data has 2"):
        _method()(make_batch(2), MAIN)


def test_slow_bilinear_is_torchs():
    small = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(
        slow_bilinear(small, 7, 9), F.interpolate(small[None, None], size=(7, 9), mode="bilinear")[0, 0]
    )
