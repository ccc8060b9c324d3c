"""Exact rotations, the loss as a slow formula, the even split of the batch, any number of workers and micro-steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from methods.contracts import MethodContext
from methods.optimizers import build_optimizer, learning_rate
from methods.rotation import OPTIMIZER, Rotation, RotationConfig, even_turns, rotate
from tests.methods import small_training
from tests.methods.distributed import run_processes
from tests.methods.examples import TinyBackbone, make_batch, make_context, progress, train_steps

ALL, RANDOM = RotationConfig(), RotationConfig("random")
SEED = torch.tensor(5)


def _method(config: RotationConfig) -> Rotation:
    torch.manual_seed(0)
    return Rotation(config, TinyBackbone(), make_context()).double()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_rotations_move_pixels_exactly(memory_format):
    x = torch.randn(9, 3, 6, 6).contiguous(memory_format=memory_format)
    turns = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0, 1])
    rotated = rotate(x, turns)
    assert rotated.is_contiguous(memory_format=memory_format)
    for image, turned, k in zip(x, rotated, turns.tolist(), strict=True):
        assert torch.equal(turned, torch.rot90(image, k, (1, 2)))


def test_four_quarter_turns_are_none():
    x, one = torch.randn(2, 3, 5, 5), torch.ones(2, dtype=torch.int64)
    assert torch.equal(rotate(rotate(rotate(rotate(x, one), one), one), one), x)


def _slow_loss(method: Rotation, copies: torch.Tensor, labels: list[int]) -> tuple[float, float]:
    """Cross entropy and accuracy by loops over the images; `copies` share one batch's statistics."""
    loss, hits = 0.0, 0
    weight, bias = method.classifier.weight, method.classifier.bias
    for feature, label in zip(method.backbone(copies), labels, strict=True):
        logits = [float((weight[k] * feature).sum() + bias[k]) for k in range(4)]
        loss -= float(F.log_softmax(torch.tensor(logits, dtype=torch.float64), dim=0)[label])
        hits += max(range(4), key=logits.__getitem__) == label
    return loss / len(labels), hits / len(labels)


def test_all_rotations_are_the_slow_formula():
    method, (x,) = _method(ALL).requires_grad_(False), make_batch(1).views
    copies = torch.stack([torch.rot90(image, k, (1, 2)) for image in x for k in range(4)])
    loss, hits = _slow_loss(method, copies, list(range(4)) * 8)
    output = method(make_batch(1), progress())
    assert output.loss.item() == pytest.approx(loss, rel=1e-9)
    assert output.metrics["accuracy"].item() == pytest.approx(hits)


def test_random_rotations_are_the_slow_formula():
    method, (x,) = _method(RANDOM).requires_grad_(False), make_batch(1).views
    turns = even_turns(8, method.turns_seed, progress(3)).tolist()
    copies = torch.stack([torch.rot90(image, k, (1, 2)) for image, k in zip(x, turns, strict=True)])
    loss, hits = _slow_loss(method, copies, turns)
    output = method(make_batch(1), progress(3))
    assert output.loss.item() == pytest.approx(loss, rel=1e-9)
    assert output.metrics["accuracy"].item() == pytest.approx(hits)


@pytest.mark.parametrize("count", [4, 8, 10, 15])
def test_the_batch_is_split_evenly_and_differently_every_step(count):
    draws = torch.stack([even_turns(count, SEED, progress(step)) for step in range(400)])
    counts = torch.stack([(draws == k).sum(1) for k in range(4)])
    assert counts.max() - counts.min() <= 1
    assert len(draws.unique(dim=0)) > (20 if count == 4 else 340)  # of 24 and at least 2,520 splits
    # Every place of the batch gets every rotation equally often.
    shares = torch.stack([(draws == k).float().mean(0) for k in range(4)])
    assert (shares - counts.float().mean(1, keepdim=True) / count).abs().max() < 0.12


def test_micro_steps_share_one_split():
    parts = [even_turns(4, SEED, progress(2, micro_step=m, num_micro_steps=3)) for m in range(3)]
    assert torch.equal(torch.cat(parts), even_turns(12, SEED, progress(2)))


def test_the_rotations_can_be_learnt():
    # Images with a bright corner: their rotation is visible.
    torch.manual_seed(0)
    method = Rotation(RANDOM, TinyBackbone(), make_context())
    optimizer = torch.optim.SGD(method.parameters(), lr=0.5, momentum=0.9)
    hits = []
    for step in range(60):
        (x,) = make_batch(1, 32, seed=step, dtype=torch.float32).views
        x[:, :, :4, :] += torch.linspace(0, 4, 4).view(1, 1, 4, 1)
        output = method(make_batch(1, 32)._replace(views=[x]), progress(step, 100))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        hits.append(float(output.metrics["accuracy"]))
    assert sum(hits[-10:]) / 10 > 0.6


# One process = two processes = micro-steps.

BUILDERS = {
    name: lambda c, config=config: Rotation(replace(config, sync_batchnorm=True), TinyBackbone(), c)
    for name, config in (("all", ALL), ("random", RANDOM))
}
PLAIN = small_training.Run(Rotation, RANDOM, batchnorm=False)


def _train_all() -> dict[str, Any]:
    results: dict[str, Any] = {name: train_steps(build, 1, num_steps=3) for name, build in BUILDERS.items()}
    (run,) = small_training.run_all([_one_view(PLAIN, 2)], 2)
    return results | {"micro": {key: run[key] for key in ("losses", "grads")}}


class _FirstView(Rotation):
    """The shared loop gives two views."""

    def forward(self, batch, progress):
        return super().forward(batch._replace(views=batch.views[:1]), progress)


def _one_view(run: small_training.Run, num_micro_steps: int) -> small_training.Run:
    return replace(run, method=_FirstView, num_micro_steps=num_micro_steps)


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory) -> list[dict[str, Any]]:
    return run_processes(_train_all, 2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", BUILDERS)
def test_two_processes_equal_one(name, in_two_processes):
    one = train_steps(BUILDERS[name], 1, num_steps=3)
    for two in in_two_processes:
        torch.testing.assert_close(two[name], one, rtol=1e-5, atol=1e-8)


def test_two_processes_with_micro_steps_equal_one_step(in_two_processes):
    (one,) = small_training.run_all([_one_view(PLAIN, 1)], 2)
    for two in in_two_processes:
        torch.testing.assert_close(two["micro"], {key: one[key] for key in ("losses", "grads")})


# State, precision, errors


@pytest.mark.parametrize("config", [ALL, RANDOM])
@pytest.mark.parametrize("bf16", [False, True])
def test_three_steps_are_finite_and_every_parameter_has_a_gradient(config, bf16):
    torch.manual_seed(0)
    method = Rotation(config, TinyBackbone(), make_context())
    optimizer = build_optimizer(method, OPTIMIZER, 8)
    for step in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            output = method(make_batch(1, seed=step, dtype=torch.float32), progress(step))
        assert output.loss.isfinite()
        assert output.loss.dtype == torch.float32
        optimizer.zero_grad()
        output.loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
        optimizer.step()
        method.after_step(progress(step))


def test_resumed_runs_draw_the_same_rotations():
    method = _method(RANDOM)
    torch.manual_seed(9)
    other = Rotation(RANDOM, TinyBackbone(), make_context()).double()
    assert other.turns_seed != method.turns_seed
    other.load_state_dict(method.state_dict())
    batch = make_batch(1)
    assert torch.equal(other(batch, progress(2)).loss, method(batch, progress(2)).loss)


def test_the_schedule_is_the_official_one():
    rates = [learning_rate(OPTIMIZER, 128, epoch * 10, 2000, 10) for epoch in (0, 59, 60, 119, 120, 159, 160, 199)]
    assert rates == pytest.approx([0.1, 0.1, 0.02, 0.02, 0.004, 0.004, 0.0008, 0.0008])


def test_what_cannot_be_rotated_is_refused():
    method, batch = _method(ALL), make_batch(1)
    with pytest.raises(ValueError, match=r"8x6 pixels.*square"):
        method(batch._replace(views=[batch.views[0][..., :6]]), progress())
    with pytest.raises(ValueError, match="rotations='some' must be one of: all, random"):
        Rotation.validate(RotationConfig("some"), make_context())  # type: ignore[arg-type]


def test_local_batchnorm_is_the_default():
    context: MethodContext = make_context(world_size=2)
    kinds = {type(m).__name__ for m in Rotation(ALL, TinyBackbone(), context).modules()}
    assert "BatchNorm2d" in kinds
    synced = Rotation(replace(ALL, sync_batchnorm=True), TinyBackbone(), context)
    assert "CrossProcessBatchNorm2d" in {type(m).__name__ for m in synced.modules()}
