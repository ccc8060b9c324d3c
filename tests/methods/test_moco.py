"""MoCo: against a slow re-derivation, over processes and micro-steps, through checkpoints, and its settings."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from methods.batchnorm import SplitBatchNorm2d
from methods.contracts import Method, MethodContext, Progress
from methods.moco import MoCo, MoCoConfig
from tests.methods.distributed import run_processes
from tests.methods.small_training import Run, TinyBackbone, make_batch, run_all, train

V2 = MoCoConfig(queue_size=24, momentum=0.9, projector_dim=6, bn_splits=2)
V1 = replace(V2, temperature=0.07, projector_depth=1)
STEPS = 5  # the queue of three batches wraps

# (run on one process, run on two): the same numerics.
PAIRS = {
    "v1, per-device BatchNorm": (Run(MoCo, V1), Run(MoCo, replace(V1, bn_splits=1))),
    "v2, per-device BatchNorm": (Run(MoCo, V2), Run(MoCo, replace(V2, bn_splits=1))),
    "v2, no shuffling": (
        Run(MoCo, replace(V2, shuffle_bn=False)),
        Run(MoCo, replace(V2, shuffle_bn=False, bn_splits=1)),
    ),
    "v2, two groups on each": (
        Run(MoCo, replace(V2, bn_splits=4)),
        Run(MoCo, replace(V2, bn_splits=2)),
    ),
    "v2, synchronised BatchNorm": (Run(MoCo, V2, kind="local"), Run(MoCo, V2, kind="sync")),
    "v2, micro-steps": (
        Run(MoCo, V2, batchnorm=False),
        Run(MoCo, replace(V2, bn_splits=1), batchnorm=False, num_micro_steps=2),
    ),
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[list[dict]]:
    runs = [pair[1] for pair in PAIRS.values()]
    return run_processes(run_all, 2, tmp_path_factory.mktemp("moco"), runs, STEPS)


def assert_same_run(got: dict, expected: dict) -> None:
    for name in ("losses", "grads", "state"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PAIRS)
def test_two_processes_equal_one(two_processes, name):
    run = PAIRS[name][0]
    expected = train(run, run.build(), range(STEPS))
    assert expected["losses"].std() > 0.01
    for results in two_processes:
        assert_same_run(results[list(PAIRS).index(name)], expected)


def test_accumulated_gradients_equal_the_full_batch():
    full, parts = Run(MoCo, V2, batchnorm=False), Run(MoCo, V2, batchnorm=False, num_micro_steps=4)
    parts = parts.with_config(bn_splits=1, shuffle_bn=False)
    expected, got = (train(run, run.build(), range(STEPS)) for run in (full, parts))
    assert_same_run(got, expected)


def slow_run(method: MoCo, steps: int, learning_rate: float = 0.5) -> list[float]:
    """Algorithm 1 of the paper: momentum update, logits [positive, negatives], cross entropy, first-in-first-out."""
    config = method.config
    online = torch.nn.Sequential(method.backbone, method.projector)
    slow = copy.deepcopy(online)
    queue = list(method.queue.keys.clone())
    losses = []
    for step in range(steps):
        x_q, x_k = make_batch(step).views
        for p, p_slow in zip(online.parameters(), slow.parameters(), strict=True):
            p_slow.data = p_slow.data * config.momentum + p.data * (1 - config.momentum)
        q, k = F.normalize(online(x_q)), F.normalize(slow(x_k)).detach()
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ torch.stack(queue).T], dim=1)
        loss = F.cross_entropy(logits / config.temperature, torch.zeros(len(q), dtype=torch.int64))
        online.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in online.parameters():
                p -= learning_rate * p.grad
        queue = queue[len(k) :] + list(k)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("config", [V1, V2, replace(V2, projector_depth=0), replace(V2, projector_hidden_dim=5)])
def test_equals_the_papers_algorithm(config):
    run = Run(MoCo, replace(config, shuffle_bn=False, bn_splits=1))
    method = run.build()
    expected = slow_run(copy.deepcopy(method), STEPS)
    assert train(run, method, range(STEPS))["losses"].tolist() == pytest.approx(expected, rel=1e-9)


def test_resumed_run_is_bit_equal():
    run = Run(MoCo, V2)
    method = run.build()
    train(run, method, range(2))
    state = copy.deepcopy(method.state_dict())
    resumed = replace(run, seed=1).build()  # other weights, queue and permutations until the state is loaded
    resumed.load_state_dict(state)
    a, b = train(run, method, range(2, 5)), train(run, resumed, range(2, 5))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_shuffling_changes_keys_and_nothing_else_about_the_setup():
    run = Run(MoCo, V2)
    plain = run.with_config(shuffle_bn=False)
    a, b = (train(r, r.build(), range(1)) for r in (run, plain))
    assert not torch.allclose(a["state"]["queue.keys"], b["state"]["queue.keys"])
    torch.testing.assert_close(a["state"]["queue.index"], b["state"]["queue.index"])
    torch.testing.assert_close(a["state"]["backbone.bn1.running_mean"], b["state"]["backbone.bn1.running_mean"])


def test_momentum_moves_once_under_accumulation():
    run = Run(MoCo, V2, num_micro_steps=2)
    method = run.build()
    with torch.no_grad():
        method.backbone.conv1.weight.add_(1.0)
    copied = method.key_encoder.backbone.module.conv1.weight
    expected = copied * 0.9 + method.backbone.conv1.weight.detach() * 0.1
    train(run, method, range(1))
    torch.testing.assert_close(copied, expected)


def test_queue_changes_after_the_step_only():
    method = Run(MoCo, V2).build()
    before = method.queue.keys.clone()
    batch, progress = make_batch(0), Progress(0, 10, 0, 1)
    method(batch, progress)
    assert torch.equal(method.queue.keys, before)
    method.after_step(progress)
    assert method.queue.index[:8].tolist() == batch.index.tolist()
    assert torch.equal(method.queue.keys[8:], before[8:])


def test_metrics_are_detached_and_mean_what_they_say():
    run = Run(MoCo, V2)
    method = run.build()
    result = train(run, method, range(3))
    assert set(result["metrics"][0]) == {
        "contrast_top1",
        "same_image_rate",
        "positive_similarity",
        "negative_similarity",
        "alignment",
        "feature_spread",
        "mean_cosine",
    }
    assert not any(value.requires_grad for value in result["metrics"][0].values())
    assert all(m["same_image_rate"] == 0 for m in result["metrics"])  # every step had new images
    again = train(run, method, range(1, 2))["metrics"][0]
    assert again["same_image_rate"] == 1


def test_monitors_equal_their_definitions():
    method, batch = Run(MoCo, replace(V2, shuffle_bn=False)).build(), make_batch(0)
    reference = copy.deepcopy(method)
    metrics = method(batch, Progress(0, 10, 0, 1)).metrics
    with torch.no_grad():  # the first momentum update moves nothing: both encoders are still equal
        q, k = (F.normalize(reference.projector(reference.backbone(view))) for view in batch.views)
    positive, negatives = (q * k).sum(1), q @ reference.queue.keys.T
    pairs = (q @ q.T)[~torch.eye(len(q), dtype=torch.bool)]
    expected = {
        "contrast_top1": (positive >= negatives.amax(1)).double().mean(),
        "positive_similarity": positive.mean(),
        "negative_similarity": negatives.mean(),
        "alignment": (2 - 2 * positive).mean(),  # |q - k|^2 of unit vectors
        "feature_spread": q.std(0, correction=0).mean() * q.shape[1] ** 0.5,
        "mean_cosine": pairs.mean(),
        "same_image_rate": 0.0,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(float(value), abs=1e-6), name


def test_backbone_is_saved_with_plain_keys_and_works_alone():
    method = Run(MoCo, V2).build()
    assert isinstance(method.backbone.bn1, SplitBatchNorm2d)
    assert isinstance(method.key_encoder.backbone.module.bn1, SplitBatchNorm2d)
    plain = TinyBackbone()
    assert list(method.backbone.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(method.backbone.state_dict())
    x = make_batch(0).views[0]
    assert torch.equal(plain.eval()(x), method.backbone.eval()(x))


def test_follows_the_contract_and_draws_from_the_seed():
    a, b, c = (Run(MoCo, V2, seed=seed).build() for seed in (0, 0, 1))
    assert isinstance(a, Method)
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)
    assert not torch.equal(a.queue.keys, c.queue.keys)
    assert a.key_encoder.shuffle_seed != c.key_encoder.shuffle_seed


def test_autocast_keeps_the_loss_in_float32():
    run = Run(MoCo, V2)
    method, batch = run.build().float(), make_batch(0)
    batch = batch._replace(views=[view.float() for view in batch.views])
    exact = copy.deepcopy(method)(batch, Progress(0, 10, 0, 1)).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = method(batch, Progress(0, 10, 0, 1)).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.05)
    loss.backward()
    method.after_step(Progress(0, 10, 0, 1))
    assert method.queue.keys.dtype == torch.float32


def test_bf16_queue_stores_half_the_bytes_and_hardly_changes_the_losses():
    run = Run(MoCo, V2)
    half = run.with_config(queue_dtype="bf16")
    method = half.build()
    assert method.queue.keys.dtype == torch.float64  # the tests' .double(); undone here
    method.queue.keys = method.queue.keys.bfloat16()
    losses = train(half, method, range(STEPS))["losses"]
    assert method.queue.keys.dtype == torch.bfloat16
    torch.testing.assert_close(losses, train(run, run.build(), range(STEPS))["losses"], rtol=5e-2, atol=0)
    resumed = half.build()
    resumed.queue.keys = resumed.queue.keys.bfloat16()
    resumed.load_state_dict(copy.deepcopy(method.state_dict()))
    a, b = (train(half, m, range(STEPS, STEPS + 2)) for m in (method, resumed))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


CONTEXT = MethodContext(num_classes=4, num_images=1000, global_batch_size=64, world_size=1, image_size=32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"projector_depth": -1}, "projector_depth=-1"),
        ({"projector_dim": 0}, "projector_dim=0"),
        ({"projector_hidden_dim": 0}, "projector_hidden_dim=0"),
        ({"queue_size": 65536}, r"at most 960"),
        ({"queue_size": 100}, r"Use 64 or 128"),
        ({"bn_splits": 5}, r"bn_splits=5"),
        ({"queue_dtype": "fp16"}, r"queue_dtype='fp16'.*fp32, bf16"),
    ],
)
def test_wrong_settings_are_explained(changes, message):
    with pytest.raises(ValueError, match=message):
        MoCo.validate(replace(MoCoConfig(queue_size=128), **changes), CONTEXT)
    MoCo.validate(MoCoConfig(queue_size=128), CONTEXT)


def test_shuffling_without_effect_warns():
    with pytest.warns(UserWarning, match="no effect"):
        MoCo.validate(MoCoConfig(queue_size=128, bn_splits=1), CONTEXT)
