"""Task lists of few-shot evaluation: which images are support and query of each task.

A task list is a function of the seed and the class sizes alone, so every model that is evaluated on the same data sees
the same tasks and comparisons are paired (papers: "use the same task list for all methods").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Episodes", "sample_episodes"]

TABLE_ENTRIES = 8_000_000  # int32 entries of the shuffling table held at once: 32 MB


@dataclass(frozen=True)
class Episodes:
    """A list of N-way K-shot tasks over the rows of one feature matrix.

    Attributes:
        classes: int64 (T, N), the class label of each way.
        support: int64 (T, N, K), rows of the support images.
        query: int64 (T, N, Q), rows of the query images.
    """

    classes: np.ndarray
    support: np.ndarray
    query: np.ndarray


def sample_episodes(
    labels: np.ndarray, *, num_tasks: int, num_ways: int, num_shots: int, num_queries: int, num_classes: int, seed: int
) -> Episodes:
    """Draw tasks: ways without replacement, then each way's support and query from one permutation of its images.

    Every task consumes the same number of uniform draws, so the first 200 tasks of a list of 600 are the list of 200: a
    cheap evaluation inside a sweep uses a part of the tasks of the final report.

    Args:
        labels: (N,), class of each feature row; each class must have at least ``num_shots + num_queries`` rows.
        num_tasks: T.
        num_ways: classes per task.
        num_shots: support images per way.
        num_queries: query images per way.
        num_classes: classes that may be drawn, labels 0..num_classes-1.
        seed: one list per (seed, ways, shots, queries).
    """
    counts = np.bincount(labels, minlength=num_classes)
    rows_by_class = np.argsort(labels, kind="stable")
    starts = np.cumsum(counts) - counts
    num_images = num_shots + num_queries
    rng = np.random.default_rng(np.random.SeedSequence([seed, num_ways, num_shots, num_queries]))
    draws = rng.random((num_tasks, num_ways * (1 + num_images)))

    classes = _draw_without_replacement(draws[:, :num_ways], np.full(num_tasks, num_classes))
    flat_classes = classes.reshape(-1)
    positions = _draw_without_replacement(draws[:, num_ways:].reshape(-1, num_images), counts[flat_classes])
    rows = rows_by_class[starts[flat_classes][:, None] + positions].reshape(num_tasks, num_ways, num_images)
    return Episodes(classes, rows[..., :num_shots], rows[..., num_shots:])


def _draw_without_replacement(draws: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """First m steps of a Fisher-Yates shuffle of 0..sizes[r]-1 for every row r, from uniform draws (R, m) in [0, 1)."""
    num_rows, num_steps = draws.shape
    chosen = np.empty((num_rows, num_steps), dtype=np.int64)
    chunk = max(1, TABLE_ENTRIES // int(sizes.max()))
    for start in range(0, num_rows, chunk):
        part = slice(start, start + chunk)
        chosen[part] = _shuffle_prefix(draws[part], sizes[part])
    return chosen


def _shuffle_prefix(draws: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """One chunk of ``_draw_without_replacement``, with its table of remaining items (R, max size)."""
    num_rows, num_steps = draws.shape
    table = np.tile(np.arange(sizes.max(), dtype=np.int32), (num_rows, 1))
    rows = np.arange(num_rows)
    for step in range(num_steps):
        picked = step + (draws[:, step] * (sizes - step)).astype(np.int64)
        drawn = table[rows, picked]
        table[rows, picked] = table[:, step]
        table[:, step] = drawn
    return table[:, :num_steps]
