"""Task lists: valid, without leakage, paired between models, and drawn uniformly."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation import episodes as module
from evaluation.episodes import Episodes, sample_episodes

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(7), [25, 20, 40, 30, 21, 22, 60]))


def draw(labels: np.ndarray = LABELS, num_tasks: int = 50, seed: int = 0, **changes: int) -> Episodes:
    options = {"num_ways": 5, "num_shots": 5, "num_queries": 15, "num_classes": 7} | changes
    return sample_episodes(labels, num_tasks=num_tasks, seed=seed, **options)


def test_support_and_query_are_disjoint_images_of_their_class() -> None:
    tasks = draw(num_tasks=200)
    assert tasks.support.shape == (200, 5, 5)
    assert tasks.query.shape == (200, 5, 15)
    images = np.concatenate([tasks.support, tasks.query], axis=2)
    np.testing.assert_array_equal(LABELS[images], np.broadcast_to(tasks.classes[:, :, None], images.shape))
    for task, classes in zip(images.reshape(200, -1), tasks.classes, strict=True):
        assert len(set(task)) == 100
        assert len(set(classes)) == 5


def test_list_depends_on_seed_and_class_sizes_only() -> None:
    """Two models with rows in the same order see the same tasks; another order of labels maps onto the same images."""
    first, again, other = draw(), draw(), draw(seed=1)
    np.testing.assert_array_equal(first.support, again.support)
    np.testing.assert_array_equal(first.query, again.query)
    assert not np.array_equal(first.support, other.support)
    by_class = np.sort(LABELS)  # the same class sizes, rows in another order
    rank = np.argsort(np.argsort(LABELS, kind="stable"))
    np.testing.assert_array_equal(draw(by_class).support, rank[first.support])


def test_streams_are_other_lists_of_the_same_kind() -> None:
    """Hyperparameters are chosen on another stream than the reported list; no task of one is a task of the other."""
    reported, choosing = draw(num_tasks=100), draw(num_tasks=100, stream=1)
    tasks = [{tuple(sorted(task)) for task in x.support.reshape(100, -1)} for x in (reported, choosing)]
    assert not tasks[0] & tasks[1]
    np.testing.assert_array_equal(draw(stream=0).support, draw().support)
    assert not np.array_equal(draw(stream=2).support, draw(stream=1).support)


def test_part_is_the_tasks_from_start_to_stop() -> None:
    tasks = draw()
    part = tasks.part(10, 13)
    for name in ("classes", "support", "query"):
        np.testing.assert_array_equal(getattr(part, name), getattr(tasks, name)[10:13])


def test_fewer_tasks_are_a_prefix() -> None:
    few, many = draw(num_tasks=20), draw(num_tasks=60)
    np.testing.assert_array_equal(few.classes, many.classes[:20])
    np.testing.assert_array_equal(few.query, many.query[:20])


def test_chunks_of_the_table_do_not_change_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = draw()
    monkeypatch.setattr(module, "TABLE_ENTRIES", 150)
    np.testing.assert_array_equal(draw().support, whole.support)


def test_every_class_and_image_is_drawn_equally_often() -> None:
    tasks = draw(num_tasks=4000)
    share = np.bincount(tasks.classes.reshape(-1), minlength=7) / 4000
    np.testing.assert_allclose(share, 5 / 7, atol=0.03)  # 4 standard errors
    rows = np.bincount(tasks.support.reshape(-1), minlength=len(LABELS))
    expected = 4000 * (5 / 7) * 5 / np.bincount(LABELS)[LABELS]
    assert np.all(np.abs(rows - expected) < 5 * np.sqrt(expected))


def test_a_class_of_exactly_the_needed_size_gives_all_its_images() -> None:
    labels = np.repeat(np.arange(5), 6)
    tasks = draw(labels, num_shots=1, num_queries=5, num_classes=5)
    images = np.concatenate([tasks.support, tasks.query], axis=2).reshape(50, -1)
    np.testing.assert_array_equal(np.sort(images, axis=1), np.tile(np.arange(30), (50, 1)))
