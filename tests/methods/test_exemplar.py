"""Exemplar: its limits (MoCo, zero loss), the slow formula over steps, processes, checkpoints."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F

from methods.contracts import Method, MethodContext, Progress
from methods.exemplar import Exemplar, ExemplarConfig
from methods.moco import MoCo, MoCoConfig
from tests.methods.distributed import run_processes
from tests.methods.small_training import Run, TinyBackbone, make_batch, run_all, train

V2 = ExemplarConfig(queue_size=24, momentum=0.9, projector_dim=6, bn_splits=2)
V1 = replace(V2, temperature=0.07, projector_depth=1)
STEPS = 5  # the queue of three batches wraps

# (run on one process, run on two): the same numerics.
PAIRS = {
    "v1, per-device BatchNorm": (Run(Exemplar, V1), Run(Exemplar, replace(V1, bn_splits=1))),
    "v2, per-device BatchNorm": (Run(Exemplar, V2), Run(Exemplar, replace(V2, bn_splits=1))),
    "v2, micro-steps": (
        Run(Exemplar, V2, batchnorm=False),
        Run(Exemplar, replace(V2, bn_splits=1), batchnorm=False, num_micro_steps=2),
    ),
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[list[dict]]:
    runs = [pair[1] for pair in PAIRS.values()]
    return run_processes(run_all, 2, tmp_path_factory.mktemp("exemplar"), runs, STEPS)


@pytest.mark.parametrize("name", PAIRS)
def test_two_processes_equal_one(two_processes, name):
    run = PAIRS[name][0]
    expected = train(run, run.build(), range(STEPS))
    for results in two_processes:
        got = results[list(PAIRS).index(name)]
        for key in ("losses", "grads", "state"):
            torch.testing.assert_close(got[key], expected[key], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("config", [V1, V2])
def test_distinct_labels_equal_moco(config):
    run = Run(Exemplar, config, labels="distinct")
    moco = replace(run, method=MoCo, config=MoCoConfig(**asdict(config)))
    a, b = (train(r, r.build(), range(STEPS)) for r in (run, moco))
    labels = a["state"].pop("queue.labels")
    assert (labels >= 0).all()
    for name in ("losses", "grads", "state"):
        torch.testing.assert_close(a[name], b[name], rtol=1e-12, atol=1e-12)


def test_equal_labels_give_zero_loss_and_gradient_once_the_queue_is_known():
    run = Run(Exemplar, V2, labels="equal")
    method = run.build()
    filling = train(run, method, range(3))  # unknown keys (-1) are negatives until the first round is full
    assert (filling["losses"] > 0.1).all()
    assert all(m["masked_queries"] == 0 for m in filling["metrics"])
    known = train(run, method, range(3, 5))
    assert torch.equal(known["losses"], torch.zeros(2, dtype=torch.float64))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in known["grads"].values())
    assert all(m["masked_queries"] == 8 for m in known["metrics"])


def test_equals_the_slow_algorithm_with_a_list_of_labelled_keys():
    run = Run(Exemplar, replace(V2, shuffle_bn=False, bn_splits=1))
    method = run.build()
    expected = slow_run(copy.deepcopy(method), STEPS)
    result = train(run, method, range(STEPS))
    assert result["losses"].tolist() == pytest.approx(expected, rel=1e-9)
    moco = train(replace(run, method=MoCo), replace(run, method=MoCo).build(), range(STEPS))
    assert (result["losses"] - moco["losses"])[1:].max() < -0.01  # fewer negatives


def slow_run(method: Exemplar, steps: int, learning_rate: float = 0.5) -> list[float]:
    """Eq. 2 with a Python list of (key, label): each query sums over the keys of other classes only."""
    config = method.config
    online = torch.nn.Sequential(method.backbone, method.projector)
    slow = copy.deepcopy(online)
    queue = [(key, -1) for key in method.queue.keys.clone()]
    losses = []
    for step in range(steps):
        batch = make_batch(step)
        for p, p_slow in zip(online.parameters(), slow.parameters(), strict=True):
            p_slow.data = p_slow.data * config.momentum + p.data * (1 - config.momentum)
        q, k = F.normalize(online(batch.views[0])), F.normalize(slow(batch.views[1])).detach()
        terms = []
        for q_i, k_i, y_i in zip(q, k, batch.labels, strict=True):
            others = torch.stack([key for key, y in queue if y != y_i])
            logits = torch.cat([(q_i @ k_i)[None], others @ q_i]) / config.temperature
            terms.append(torch.logsumexp(logits, 0) - logits[0])
        loss = torch.stack(terms).mean()
        online.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in online.parameters():
                p -= learning_rate * p.grad
        queue = queue[len(k) :] + list(zip(k, batch.labels.tolist(), strict=True))
        losses.append(loss.item())
    return losses


def test_resumed_run_is_bit_equal():
    run = Run(Exemplar, V2)
    method = run.build()
    train(run, method, range(2))
    resumed = replace(run, seed=1).build()
    resumed.load_state_dict(copy.deepcopy(method.state_dict()))
    a, b = train(run, method, range(2, 5)), train(run, resumed, range(2, 5))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_labels_stay_beside_their_keys():
    run = Run(Exemplar, V2)
    state = train(run, run.build(), range(4))["state"]
    batches = {step: make_batch(step) for step in range(4)}
    label_of = {int(i): int(y) for b in batches.values() for i, y in zip(b.index, b.labels, strict=True)}
    assert [label_of[i] for i in state["queue.index"].tolist()] == state["queue.labels"].tolist()


def test_metrics_add_the_masked_queries_to_mocos():
    run = Run(Exemplar, V2)
    metrics = train(run, run.build(), range(4))["metrics"]
    moco = train(replace(run, method=MoCo), replace(run, method=MoCo).build(), range(1))["metrics"]
    assert set(metrics[0]) == set(moco[0]) | {"masked_queries"}
    # Nothing is masked yet: all queued keys are of unknown class.
    torch.testing.assert_close({k: v for k, v in metrics[0].items() if k != "masked_queries"}, moco[0])
    assert not any(value.requires_grad for value in metrics[0].values())


def test_bf16_queue_is_stored_in_bf16():
    run = Run(Exemplar, replace(V2, queue_dtype="bf16"))
    context = MethodContext(4, num_images=1000, global_batch_size=8, world_size=1, image_size=9)
    method = Exemplar(run.config, TinyBackbone().float(), context)
    assert method.queue.keys.dtype == torch.bfloat16
    batch = make_batch(0)
    batch = batch._replace(views=[view.float() for view in batch.views])
    output = method(batch, Progress(0, 10, 0, 1))
    assert output.loss.dtype == torch.float32
    assert all(value.dtype != torch.bfloat16 for value in output.metrics.values())
    output.loss.backward()
    method.after_step(Progress(0, 10, 0, 1))
    assert method.queue.labels is not None
    assert method.queue.labels[:8].tolist() == batch.labels.tolist()


def test_follows_the_contract():
    assert isinstance(Run(Exemplar, V2).build(), Method)


@pytest.mark.parametrize(
    ("changes", "num_classes", "message"),
    [
        ({}, 1, "at least 2 classes, or moco_v2"),
        ({"temperature": -1.0}, 4, "exemplar got temperature"),
        ({"queue_size": 2**20}, 4, "at most 960"),
        ({"queue_dtype": "fp16"}, 4, r"queue_dtype='fp16'.*fp32, bf16"),
    ],
)
def test_wrong_settings_are_explained(changes, num_classes, message):
    context = MethodContext(num_classes, num_images=1000, global_batch_size=64, world_size=1, image_size=32)
    with pytest.raises(ValueError, match=message):
        Exemplar.validate(replace(ExemplarConfig(queue_size=128), **changes), context)
