"""Task lists of few-shot evaluation: which images are support and query of each task.

A task list is a function of the seed and the class sizes alone, so every model that is evaluated on the same data sees
the same tasks and comparisons are paired (papers: "use the same task list for all methods").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from evaluation.metric import ClassCounts, Features

__all__ = ["EpisodeOptions", "Episodes", "check_episode_options", "check_episodes", "draw_episodes", "sample_episodes"]

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

    def part(self, start: int, stop: int) -> Episodes:
        """The tasks start, ..., stop - 1."""
        return Episodes(self.classes[start:stop], self.support[start:stop], self.query[start:stop])


class EpisodeOptions(Protocol):
    """What the configs of all few-shot protocols say about their tasks."""

    @property
    def num_ways(self) -> int: ...
    @property
    def shots(self) -> tuple[int, ...]: ...
    @property
    def num_queries(self) -> int: ...
    @property
    def num_tasks(self) -> int: ...


def check_episode_options(task: str, options: EpisodeOptions) -> None:
    """ValueError for values outside their range; ``task`` is the name that the message gives."""
    if options.num_ways < 2 or options.num_queries < 1 or options.num_tasks < 2:
        raise ValueError(
            f"{task} got num_ways={options.num_ways}, num_queries={options.num_queries}, "
            f"num_tasks={options.num_tasks}; allowed: at least 2 ways, 1 query and 2 tasks (an interval needs two)."
        )
    shots = options.shots
    if not shots or min(shots) < 1 or len(set(shots)) != len(shots):
        raise ValueError(f"{task} shots are {shots}; allowed: one or more different numbers, each at least 1.")


def check_episodes(task: str, options: EpisodeOptions, split: str, counts: ClassCounts, instead: str = "") -> None:
    """ValueError where a split does not have the classes or images that the tasks need.

    Args:
        task: name for the message.
        options: of the tasks.
        split: where they are drawn.
        counts: images per class of all splits that there are.
        instead: what else the user can do where the split is missing, the end of a sentence.
    """
    found = counts.get(split, ())
    if not found:
        raise ValueError(
            f"{task} reads split {split!r}, which the data does not have (it has: {', '.join(counts)}). Give "
            f"{split}=URI or let the seeded class split make it{instead}."
        )
    if len(found) < options.num_ways:
        raise ValueError(
            f"{task} needs at least {options.num_ways} classes in split {split!r} for {options.num_ways}-way tasks; it "
            f"has {len(found)}. Give the split more classes or lower num_ways to {max(2, len(found))}."
        )
    needed = max(options.shots) + options.num_queries
    small = [(label, count) for label, count in enumerate(found) if count < needed]
    if small:
        named = ", ".join(f"{label} ({count})" for label, count in small[:8])
        more = f" and {len(small) - 8} more" if len(small) > 8 else ""
        raise ValueError(
            f"{task} needs {needed} images per class in split {split!r} ({max(options.shots)} support + "
            f"{options.num_queries} query); too few in classes (label number, images): {named}{more}. Lower "
            "num_queries or shots, add images, or drop classes with fewer images (the subset option min_per_class)."
        )


def draw_episodes(
    options: EpisodeOptions, num_shots: int, found: Features, seed: int, stream: int = 0, num_tasks: int = 0
) -> Episodes:
    """``sample_episodes`` over the rows of a split's features; ``num_tasks`` 0 takes that of the options."""
    return sample_episodes(
        found.labels,
        num_tasks=num_tasks or options.num_tasks,
        num_ways=options.num_ways,
        num_shots=num_shots,
        num_queries=options.num_queries,
        num_classes=len(found.class_names),
        seed=seed,
        stream=stream,
    )


def sample_episodes(
    labels: np.ndarray,
    *,
    num_tasks: int,
    num_ways: int,
    num_shots: int,
    num_queries: int,
    num_classes: int,
    seed: int,
    stream: int = 0,
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
        seed: one list per (seed, ways, shots, queries, stream).
        stream: 0 for the list that is reported; other numbers give lists that share no draws with it, for choosing
            hyperparameters.
    """
    counts = np.bincount(labels, minlength=num_classes)
    rows_by_class = np.argsort(labels, kind="stable")
    starts = np.cumsum(counts) - counts
    num_images = num_shots + num_queries
    key = [seed, num_ways, num_shots, num_queries] + ([stream] if stream else [])
    rng = np.random.default_rng(np.random.SeedSequence(key))
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
