"""The ring against a slow first-in-first-out list, with the ids in lock-step."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from methods import collectives
from methods.contracts import MethodContext
from methods.queue import FeatureQueue, validate_queue_size
from tests.methods.distributed import run_processes


def make_keys(num: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    keys = F.normalize(torch.randn(num, 5, generator=generator), dim=1)
    return keys, torch.randint(0, 3, (num,), generator=generator), torch.randint(0, 1000, (num,), generator=generator)


def test_starts_with_seeded_unit_vectors_and_unknown_ids():
    queue = FeatureQueue(64, 5, with_labels=True, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(64))
    assert queue.keys.is_contiguous()
    assert queue.keys.mean(0).abs().max() < 0.3  # directions, not one corner
    assert (queue.labels == -1).all()
    assert (queue.index == -1).all()
    same = FeatureQueue(64, 5, generator=torch.Generator().manual_seed(3))
    other = FeatureQueue(64, 5, generator=torch.Generator().manual_seed(4))
    assert torch.equal(queue.keys, same.keys)
    assert not torch.equal(queue.keys, other.keys)
    assert same.labels is None
    assert set(same.state_dict()) == {"keys", "index", "pointer"}


@pytest.mark.parametrize("batch", [4, 12, 5])
def test_ring_equals_a_fifo_list(batch):
    """Also for a batch that does not divide the size: the write wraps."""
    queue = FeatureQueue(12, 5, with_labels=True)
    fifo = [(tuple(key.tolist()), -1, -1) for key in queue.keys]
    for step in range(8):
        keys, labels, index = make_keys(batch, step)
        queue.enqueue(keys, labels, index)
        fifo += [(tuple(k.tolist()), int(y), int(i)) for k, y, i in zip(keys, labels, index, strict=True)]
        fifo = fifo[-12:]
        pointer = int(queue.pointer)
        assert pointer == (step + 1) * batch % 12
        order = [(pointer + i) % 12 for i in range(12)]  # oldest first
        stored = [(tuple(queue.keys[s].tolist()), int(queue.labels[s]), int(queue.index[s])) for s in order]
        assert stored == fifo


def test_state_round_trip_continues_at_the_same_slot():
    queue = FeatureQueue(12, 5, with_labels=True)
    queue.enqueue(*make_keys(8, 0))
    other = FeatureQueue(12, 5, with_labels=True, generator=torch.Generator().manual_seed(9))
    other.load_state_dict(copy.deepcopy(queue.state_dict()))
    for q in (queue, other):
        q.enqueue(*make_keys(8, 1))
    torch.testing.assert_close(queue.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_bf16_keys_are_the_rounded_fp32_keys_and_their_state_round_trips():
    exact, queue = FeatureQueue(12, 5, with_labels=True), FeatureQueue(12, 5, with_labels=True, dtype="bf16")
    for step in range(2):
        assert queue.keys.dtype == torch.bfloat16
        assert torch.equal(queue.keys, exact.keys.bfloat16())
        assert torch.equal(queue.labels, exact.labels)
        for q in (exact, queue):
            q.enqueue(*make_keys(8, step))
    other = FeatureQueue(12, 5, with_labels=True, generator=torch.Generator().manual_seed(9), dtype="bf16")
    other.load_state_dict(copy.deepcopy(queue.state_dict()))
    assert other.keys.dtype == torch.bfloat16
    torch.testing.assert_close(queue.state_dict(), other.state_dict(), rtol=0, atol=0)
    other.load_state_dict(exact.state_dict())  # a run may go on with the smaller queue
    torch.testing.assert_close(queue.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_staged_micro_steps_enter_together_and_in_order():
    queue, expected = FeatureQueue(12, 5, with_labels=True), FeatureQueue(12, 5, with_labels=True)
    keys, labels, index = make_keys(6, 0)
    before = queue.keys.clone()
    queue.stage(*make_keys(3, 7), micro_step=0)  # an abandoned step
    for m in range(2):
        part = slice(3 * m, 3 * m + 3)
        queue.stage(keys[part], labels[part], index[part], micro_step=m)
        assert torch.equal(queue.keys, before)
    queue.enqueue_staged()
    expected.enqueue(keys, labels, index)
    torch.testing.assert_close(queue.state_dict(), expected.state_dict(), rtol=0, atol=0)


def enqueue_on_worker() -> dict:
    queue = FeatureQueue(16, 5, with_labels=True)
    for step in range(3):
        keys, labels, index = make_keys(8, step)
        for m in range(2):
            start = 4 * collectives.rank() + 2 * m
            queue.stage(keys[start : start + 2], labels[start : start + 2], index[start : start + 2], m)
        queue.enqueue_staged()
    return queue.state_dict()


def test_two_workers_with_two_micro_steps_write_what_one_process_writes(tmp_path):
    expected = FeatureQueue(16, 5, with_labels=True)
    for step in range(3):
        expected.enqueue(*make_keys(8, step))
    for state in run_processes(enqueue_on_worker, 2, tmp_path):
        torch.testing.assert_close(dict(state), dict(expected.state_dict()), rtol=0, atol=0)


def test_same_image_rate_counts_images_not_keys():
    queue = FeatureQueue(6, 5)
    index = torch.tensor([3, 1, 3, 2**40, 0, 3])
    assert queue.same_image_rate(index) == 0  # nothing known yet
    queue.enqueue(torch.zeros(4, 5), index=torch.tensor([3, 3, 2**40, 77]))
    assert queue.same_image_rate(index) == pytest.approx(4 / 6)
    assert queue.same_image_rate(torch.tensor([5])) == 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        queue.enqueue(torch.zeros(6, 5), index=torch.randint(0, 9, (6,), generator=generator))
        index = torch.randint(0, 9, (5,), generator=generator)
        held = set(queue.index.tolist())
        assert queue.same_image_rate(index) == pytest.approx(sum(i in held for i in index.tolist()) / 5)


def test_same_image_rate_tells_ids_with_equal_low_bits_apart():
    """On a CPU the low 16 bits sort most ids out; -1 (no image) has all of them set."""
    queue = FeatureQueue(6, 5)
    index = torch.tensor([7, 2**16 + 7, 2**33 + 7, 2**16 - 1])
    assert queue.same_image_rate(index) == 0
    queue.enqueue(torch.zeros(3, 5), index=torch.tensor([2**16 + 7, 2**17 + 7, 2**17 - 1]))
    assert queue.same_image_rate(index) == 1 / 4


def test_wrong_writes_are_explained():
    queue = FeatureQueue(4, 5, with_labels=True)
    with pytest.raises(ValueError, match="5 keys do not fit a queue of 4"):
        queue.enqueue(*make_keys(5, 0))
    with pytest.raises(ValueError, match="with_labels"):
        queue.enqueue(torch.zeros(4, 5))
    with pytest.raises(ValueError, match="with_labels"):
        FeatureQueue(4, 5).enqueue(*make_keys(4, 0))
    with pytest.raises(ValueError, match=r"queue_dtype='fp16' is unknown. Use one of fp32, bf16"):
        FeatureQueue(4, 5, dtype="fp16")


def context(num_images: int, batch: int) -> MethodContext:
    return MethodContext(num_classes=10, num_images=num_images, global_batch_size=batch, world_size=1, image_size=32)


def test_queue_size_must_suit_batch_and_data():
    validate_queue_size(4096, context(5000, 256))
    validate_queue_size(256, context(256, 256))
    with pytest.raises(ValueError, match=r"Use 768 or 1024"):
        validate_queue_size(1000, context(5000, 256))
    with pytest.raises(ValueError, match=r"Use 768, or"):
        validate_queue_size(1000, context(1001, 256))
    with pytest.raises(ValueError, match=r"Use 256, or"):
        validate_queue_size(0, context(5000, 256))
    with pytest.raises(ValueError, match=r"larger than the data set \(5000 images\).*at most 4864"):
        validate_queue_size(65536, context(5000, 256))
    with pytest.raises(ValueError, match="smaller batch"):
        validate_queue_size(256, context(100, 256))
