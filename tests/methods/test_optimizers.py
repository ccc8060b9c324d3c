"""Schedules against slow formulas and torch's scheduler; LARS against lightly and the definition; groups; errors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from lightly.utils.lars import LARS as LightlyLARS
from torch import nn

from methods.lars import LARS
from methods.optimizers import (
    OptimizerConfig,
    build_optimizer,
    learning_rate,
    peak_learning_rate,
    set_learning_rate,
)

EPOCHS, STEPS = 20, 5


def _curve(config: OptimizerConfig, epochs: int = EPOCHS, batch: int = 256) -> list[float]:
    return [learning_rate(config, batch, s, epochs * STEPS, STEPS) for s in range(epochs * STEPS)]


def test_cosine_per_step_is_torchs():
    config = OptimizerConfig(learning_rate=0.4, schedule="cosine", schedule_every="step")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS * STEPS)
    for value in _curve(config):
        assert value == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_cosine_per_epoch_is_mocos():
    config = OptimizerConfig(learning_rate=0.03, schedule="cosine", schedule_every="epoch")
    expected = [0.03 * 0.5 * (1 + math.cos(math.pi * (s // STEPS) / EPOCHS)) for s in range(EPOCHS * STEPS)]
    assert _curve(config) == pytest.approx(expected)


@pytest.mark.parametrize("every", ["step", "epoch"])
def test_warmup_is_linear_from_0_then_the_cosine_covers_the_rest(every):
    config = OptimizerConfig(learning_rate=1.0, warmup_epochs=4, schedule_every=every)
    curve = _curve(config)
    assert curve[:20] == pytest.approx([s / 20 for s in range(20)])
    rest = [s // STEPS * STEPS if every == "epoch" else s for s in range(80)]
    assert curve[20:] == pytest.approx([0.5 * (1 + math.cos(math.pi * s / 80)) for s in rest])


@pytest.mark.parametrize("every", ["step", "epoch"])
def test_linear_falls_from_the_peak_to_the_floor(every):
    config = OptimizerConfig(
        learning_rate=1.0, schedule="linear", schedule_every=every, warmup_epochs=4, final_learning_rate=0.2
    )
    curve = _curve(config, batch=512)  # peak 2, floor 0.4
    assert curve[:20] == pytest.approx([2 * s / 20 for s in range(20)])
    rest = [s // STEPS * STEPS if every == "epoch" else s for s in range(80)]
    assert curve[20:] == pytest.approx([2 - 1.6 * s / 80 for s in rest])


def test_linear_is_torchs():
    config = OptimizerConfig(learning_rate=0.4, schedule="linear", final_learning_rate=0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.25, total_iters=EPOCHS * STEPS)
    for value in _curve(config):
        assert value == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("scale", [False, True])
def test_cosine_with_a_floor_is_torchs(scale):
    # SwAV: 0.6 to 0.0006 for a batch of 256.
    config = OptimizerConfig(learning_rate=0.6, final_learning_rate=0.0006, scale_learning_rate=scale)
    factor = 2.0 if scale else 1.0
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.6 * factor)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * STEPS, eta_min=0.0006 * factor)
    for value in _curve(config, batch=512):
        assert value == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("schedule", ["step", "constant"])
def test_other_schedules_have_no_floor(schedule):
    with_floor = OptimizerConfig(learning_rate=1.0, schedule=schedule, final_learning_rate=0.5)
    assert _curve(with_floor) == _curve(OptimizerConfig(learning_rate=1.0, schedule=schedule))


def test_fractional_warmup():
    config = OptimizerConfig(learning_rate=1.0, warmup_epochs=0.5, schedule="constant")
    assert _curve(config)[:4] == pytest.approx([0, 0.4, 0.8, 1.0])


def test_step_schedule_of_moco_v1():
    config = OptimizerConfig(learning_rate=0.03, schedule="step", schedule_every="epoch", milestones=(0.6, 0.8))
    curve = _curve(config, epochs=200)
    expected = [0.03 * (1 if e < 120 else 0.1 if e < 160 else 0.01) for e in range(200) for _ in range(STEPS)]
    assert curve == pytest.approx(expected)


@pytest.mark.parametrize("milestone", [0.07, 0.29, 0.55])  # 0.07 * 100 is above 7, 0.29 * 100 below 29
def test_milestones_do_not_suffer_from_rounding(milestone):
    config = OptimizerConfig(learning_rate=1.0, schedule="step", milestones=(milestone,))
    assert _curve(config).index(pytest.approx(0.1)) == round(milestone * 100)


def test_linear_scaling_rule():
    assert peak_learning_rate(OptimizerConfig(learning_rate=0.05), 512) == pytest.approx(0.1)
    assert peak_learning_rate(OptimizerConfig(learning_rate=0.05, scale_learning_rate=False), 512) == 0.05
    assert _curve(OptimizerConfig(learning_rate=0.05), batch=128)[0] == pytest.approx(0.025)


def test_warmup_of_the_whole_run_is_allowed_and_longer_refused():
    assert _curve(OptimizerConfig(learning_rate=1.0, warmup_epochs=EPOCHS))[-1] == pytest.approx(0.99)
    with pytest.raises(ValueError, match="longer than the run of 20 epochs"):
        _curve(OptimizerConfig(warmup_epochs=EPOCHS + 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adamw"}, "optimizer='adamw'.*'sgd', 'lars', 'larc', 'adam'"),
        ({"schedule": "exponential"}, "schedule='exponential'"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"final_learning_rate": -1e-4}, "final_learning_rate=-0.0001"),
        ({"learning_rate": 0.1, "final_learning_rate": 0.2}, "between 0 and learning_rate=0.1"),
        ({"final_learning_rate": math.nan}, "final_learning_rate=nan"),
        ({"weight_decay": -1e-4}, "weight_decay"),
        ({"warmup_epochs": -1}, "warmup_epochs"),
        ({"sgd_momentum": 1.0}, "sgd_momentum"),
        ({"adam_beta2": 1.5}, "adam_beta2"),
        ({"milestones": (0.8, 0.6)}, "increasing fractions"),
        ({"milestones": (120.0,)}, "increasing fractions"),
        ({"decay": 0.0}, "decay"),
        ({"nesterov": True, "optimizer": "lars"}, "nesterov"),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**changes)


class _Method(nn.Module):
    fixed_learning_rate = ("predictor.",)

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        self.predictor = nn.Linear(6, 3)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def loss(self, seed: int) -> torch.Tensor:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        return self.predictor(self.backbone(x)).square().sum()


def _ids(parameters) -> set[int]:
    return {id(p) for p in parameters}


@pytest.mark.parametrize("name", ["sgd", "lars", "larc", "adam"])
def test_schedule_leaves_the_predictor_and_frozen_parameters_alone(name):
    method = _Method()
    optimizer = build_optimizer(method, OptimizerConfig(optimizer=name, learning_rate=0.2), 512)
    set_learning_rate(optimizer, 0.01)
    by_rate = {0.4: set(), 0.01: set()}
    for group in optimizer.param_groups:
        by_rate[group["lr"]] |= _ids(group["params"])
    assert by_rate[0.4] == _ids(method.predictor.parameters())
    assert by_rate[0.01] == _ids(method.backbone.parameters())


def test_prefix_without_parameters_is_refused():
    method = _Method()
    method.fixed_learning_rate = ("predictr.",)
    with pytest.raises(ValueError, match="predictr"):
        build_optimizer(method, OptimizerConfig(), 256)
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimizerConfig(), 256)


def _run(method: _Method, optimizer: torch.optim.Optimizer, steps: int = 4) -> list[torch.Tensor]:
    for step in range(steps):
        optimizer.zero_grad()
        method.loss(step).backward()
        optimizer.step()
    return [p.detach().clone() for p in method.parameters()]


def _twins() -> tuple[_Method, _Method]:
    torch.manual_seed(0)
    first, second = _Method(), _Method()
    second.load_state_dict(first.state_dict())
    return first, second


def _trainable(method: _Method) -> list[nn.Parameter]:
    return [p for p in method.parameters() if p.requires_grad]


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torchs(nesterov):
    ours, other = _twins()
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, nesterov=nesterov)
    reference = torch.optim.SGD(
        _trainable(other), 0.01, momentum=0.9, weight_decay=0.1, nesterov=nesterov, foreach=False
    )
    torch.testing.assert_close(_run(ours, build_optimizer(ours, config, 256)), _run(other, reference))


def test_adam_is_torchs():
    ours, other = _twins()
    config = OptimizerConfig(optimizer="adam", learning_rate=0.01, weight_decay=0.1, adam_beta1=0.8)
    reference = torch.optim.Adam(_trainable(other), 0.01, betas=(0.8, 0.999), weight_decay=0.1, foreach=False)
    torch.testing.assert_close(_run(ours, build_optimizer(ours, config, 256)), _run(other, reference))


def test_lars_is_lightlys():
    ours, other = _twins()
    # One dead layer: zero gradient and zero weight take no adaptation and no decay.
    for method in (ours, other):
        nn.init.zeros_(method.predictor.weight)
    config = OptimizerConfig(optimizer="lars", learning_rate=2.0, weight_decay=1e-2)
    # lightly takes no adaptation exactly where the weight decay is 0.
    groups = [
        {"params": [p for p in _trainable(other) if p.ndim > 1]},
        {"params": [p for p in _trainable(other) if p.ndim == 1], "weight_decay": 0.0},
    ]
    reference = LightlyLARS(groups, lr=2.0, momentum=0.9, weight_decay=1e-2)
    torch.testing.assert_close(_run(ours, build_optimizer(ours, config, 256)), _run(other, reference))


def test_larc_adapts_every_parameter():
    ours, other = _twins()
    config = OptimizerConfig(optimizer="larc", learning_rate=2.0, weight_decay=1e-2)
    reference = LightlyLARS(_trainable(other), lr=2.0, momentum=0.9, weight_decay=1e-2)
    weights = _run(ours, build_optimizer(ours, config, 256))
    torch.testing.assert_close(weights, _run(other, reference))
    plain, _ = _twins()
    without = _run(plain, build_optimizer(plain, replace(config, optimizer="lars"), 256))
    assert not all(torch.allclose(a, b) for a, b in zip(without, weights, strict=True))


def test_lars_is_the_definition_and_its_state_round_trips():
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    expected, u = w.detach().clone(), torch.zeros_like(w)
    optimizer = LARS([w], lr=0.5, momentum=0.8, weight_decay=0.1, trust_coefficient=0.02)
    for step in range(4):
        g = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        rate = 0.02 * expected.norm() / (g.norm() + 0.1 * expected.norm())
        u = 0.8 * u + rate * (g + 0.1 * expected)
        expected = expected - 0.5 * u
        if step == 2:
            state = optimizer.state_dict()
            optimizer = LARS([w], lr=9.0)
            optimizer.load_state_dict(state)
        w.grad = g
        optimizer.step()
        torch.testing.assert_close(w.detach(), expected)


def test_lars_without_gradient_or_weight_does_not_divide_by_0():
    zero = nn.Parameter(torch.zeros(2, 2))
    still = nn.Parameter(torch.ones(2, 2))
    unused = nn.Parameter(torch.ones(2, 2))
    zero.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
    LARS([zero, still, unused], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(zero.detach(), torch.full((2, 2), -0.5))
    torch.testing.assert_close(still.detach(), torch.ones(2, 2))
    torch.testing.assert_close(unused.detach(), torch.ones(2, 2))
