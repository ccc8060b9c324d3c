"""Few-shot protocol A': every support image enters as 5 augmented copies.

Tian et al., ECCV 2020 (RFS; ``WangYueFt/rfs: eval_fewshot.py, eval/meta_eval.py, dataset/mini_imagenet.py``): as
protocol A (``few_shot``), but the classifier of a task is fitted on 5 augmented views of each support image and not on
the plain image; queries are plain views. The views are those that RFS trains with: padded crop, colour jitter and flip
(recipe "rfs_a" for 84 pixels, "rfs_d" for CIFAR's 32). Unit-length features, logistic regression with C = 1; the
half width is Student's, t(0.975, 599) = 1.9639 instead of 1.96.

What we do differently: RFS draws new copies of an image in every task. Here each image has 5 copies, the views of 5
passes over the split, and all tasks that draw the image share them; the mean over tasks estimates the same quantity.
Queries are in the evaluation view of all other tasks (resized a tenth larger, then cut), where RFS takes the stored
84 x 84 pixels. Tasks are solved to the optimum, and their list is the one of protocol A with the same options.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import torch

from evaluation.episodes import Episodes, check_episode_options, check_episodes, draw_episodes
from evaluation.few_shot import SPLITS, task_accuracies
from evaluation.intervals import IntervalName, accuracy_outputs, check_interval, interval_record
from evaluation.metric import (
    Artifact,
    ClassCounts,
    EvaluationContext,
    Features,
    Metric,
    ModelResult,
    Phase,
    Samples,
    get_features,
    l2_normalize,
)
from evaluation.paired import compare_samples
from image_data import RECIPES

__all__ = ["FewShotRfsConfig", "check", "compare", "evaluate", "metric_names", "protocol", "splits"]


@dataclass(frozen=True)
class FewShotRfsConfig:
    """Few-shot protocol A' of RFS.

    Attributes:
        num_ways: classes per task.
        shots: support images per class, before they are copied; one metric for each entry.
        num_queries: query images per class.
        num_tasks: tasks; fewer are a prefix of the same list.
        c: inverse strength of the L2 penalty, as in scikit-learn's LogisticRegression.
        split: "unseen_classes" or "base_classes", as in protocol A.
        interval: formula of the half width: "rfs" (Student's t, ddof 1), "camtrast" (1.96, ddof 1) or "closer_look"
            (1.96, ddof 0).
        copies: augmented views of each support image; each is one more pass of the backbone over the split.
        recipe: view recipe of the copies: "rfs_a" for 84 pixels, "rfs_d" for 32.
    """

    num_ways: int = 5
    shots: tuple[int, ...] = (1, 5)
    num_queries: int = 15
    num_tasks: int = 600
    c: float = 1.0
    split: Literal["unseen_classes", "base_classes"] = "unseen_classes"
    interval: IntervalName = "rfs"
    copies: int = 5
    recipe: str = "rfs_a"


def metric_names(config: FewShotRfsConfig) -> tuple[str, ...]:
    """Names of the metrics, in the order in which they are yielded."""
    return tuple(_metric_name(config, num_shots) for num_shots in config.shots)


def _metric_name(config: FewShotRfsConfig, num_shots: int) -> str:
    return f"few_shot_rfs/{config.num_ways}way_{num_shots}shot_acc"


def splits(config: FewShotRfsConfig, phase: Phase) -> tuple[str, ...]:
    """Splits that the evaluation reads."""
    return (SPLITS[config.split][phase],)


def protocol(config: FewShotRfsConfig, phase: Phase) -> dict:
    """Everything needed to reproduce the numbers, as JSON data."""
    return {
        "name": f"few-shot protocol A': logistic regression on {config.copies} augmented copies of each support image",
        "source": (
            "Tian et al., ECCV 2020 (RFS); WangYueFt/rfs: eval_fewshot.py, eval/meta_eval.py, dataset/mini_imagenet.py"
        ),
        "phase": phase,
        "split": splits(config, phase)[0],
        "features": (
            f"pooled backbone output, L2-normalised (a zero vector stays zero); support: {config.copies} views of "
            f"recipe {config.recipe} per image and not the plain view, drawn once per image and shared by all tasks; "
            "query: the plain view"
        ),
        "views": RECIPES[config.recipe].to_json() if config.recipe in RECIPES else None,
        "classifier": (
            f"multinomial logistic regression, scikit-learn's objective with C = {config.c:g} and a free intercept, "
            "solved to the optimum (float32, residual 1e-5; damped Newton in float64 where that is not reached)"
        ),
        "tasks": (
            f"{config.num_tasks} tasks, {config.num_ways} ways, {config.num_queries} queries per class; the list of "
            "protocol A with the same seed and options"
        ),
        "metric": "mean accuracy over tasks in percent",
        "interval": interval_record(config.interval),
        "config": asdict(config),
    }


def check(config: FewShotRfsConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError where the options or the data do not allow the tasks; call it before any long work."""
    if config.split not in SPLITS:
        raise ValueError(f"few_shot_rfs split is {config.split!r}; allowed: {', '.join(SPLITS)}.")
    check_episode_options("few_shot_rfs", config)
    check_interval("few_shot_rfs", config.interval)
    if not 0 < config.c < float("inf") or config.copies < 1:
        raise ValueError(
            f"few_shot_rfs got c={config.c}, copies={config.copies}; allowed: c positive and finite, at least 1 copy "
            "(RFS: c=1, copies=5)."
        )
    if config.recipe not in RECIPES:
        raise ValueError(f"few_shot_rfs recipe is {config.recipe!r}; known recipes: {', '.join(RECIPES)}.")
    split = splits(config, phase)[0]
    other = "base_classes" if config.split == "unseen_classes" else "unseen_classes"
    instead = f", or set split={other!r} to draw the tasks from {SPLITS[other][phase]!r} instead"
    check_episodes("few_shot_rfs", config, split, class_counts, instead)


def evaluate(config: FewShotRfsConfig, context: EvaluationContext) -> Iterator[Metric | Samples]:
    """Yield the mean accuracy in percent with its interval, and the accuracy of each task, per number of shots.

    Memory: the plain features, and ``copies`` more vectors for each image that is support in any task.
    """
    split = splits(config, context.phase)[0]
    found = get_features(context, split)
    check(config, context.phase, {split: found.class_counts})
    lists = {shots: draw_episodes(config, shots, found, context.seed) for shots in config.shots}
    support_rows = np.unique(np.concatenate([episodes.support.reshape(-1) for episodes in lists.values()]))
    copies = _copies(config, context, split, found, support_rows)
    # One matrix for all: the plain images, then the copies of the first support image, of the second, ...
    x = torch.from_numpy(l2_normalize(np.concatenate([found.features, copies.reshape(-1, copies.shape[2])]), split))
    x = x.to(context.device)
    for num_shots, episodes in lists.items():
        augmented = _on_copies(episodes, support_rows, len(found.features), config.copies)
        yield from accuracy_outputs(
            _metric_name(config, num_shots), task_accuracies(x, augmented, config.c), config.interval
        )


def _copies(
    config: FewShotRfsConfig, context: EvaluationContext, split: str, found: Features, rows: np.ndarray
) -> np.ndarray:
    """Features (M, copies, D) of augmented views of chosen rows (M,), ascending.

    Raises:
        ValueError: no backbone; a pass that is not the split in the order of its index; NaN or infinite features.
    """
    if context.view_features is None:
        raise ValueError(
            "few_shot_rfs needs the backbone itself, for augmented views; the context has features only. Evaluate a "
            "checkpoint, or use few_shot."
        )
    copies = np.empty((len(rows), config.copies, found.features.shape[1]), dtype=np.float32)
    for epoch in range(config.copies):
        start, last_index = 0, -1
        for batch in context.view_features(split, config.recipe, epoch=epoch):
            stop = start + len(batch.labels)
            in_order = bool((np.diff(batch.index, prepend=last_index) > 0).all())
            if not in_order or not np.array_equal(batch.labels, found.labels[start:stop]):
                raise ValueError(
                    f"few_shot_rfs: augmented images {start:,} to {stop - 1:,} of split {split!r} are not the plain "
                    "ones; the pass must deliver every image once, in the order of its index."
                )
            first, last = np.searchsorted(rows, [start, stop])
            copies[first:last, epoch] = batch.features[rows[first:last] - start]
            start, last_index = stop, int(batch.index[-1])
        if start != len(found.labels):
            raise ValueError(
                f"few_shot_rfs: a pass over augmented views of split {split!r} gave {start:,} of "
                f"{len(found.labels):,} images."
            )
    bad = int((~np.isfinite(copies).all(axis=(1, 2))).sum())
    if bad:
        raise ValueError(
            f"few_shot_rfs: augmented views of {bad:,} images of split {split!r} have NaN or infinite features: "
            "pretraining diverged or the checkpoint is damaged. Evaluate an earlier checkpoint."
        )
    return copies


def _on_copies(episodes: Episodes, rows: np.ndarray, num_plain: int, copies: int) -> Episodes:
    """The task list with each support image replaced by its copies: support (T, N, K * copies).

    Args:
        episodes: rows of plain images.
        rows: the images that have copies, ascending.
        num_plain: plain images in front of the copies.
        copies: of each.
    """
    first = num_plain + copies * np.searchsorted(rows, episodes.support)
    support = (first[..., None] + np.arange(copies)).reshape(*first.shape[:2], -1)
    return replace(episodes, support=support)


def compare(config: FewShotRfsConfig, models: Sequence[ModelResult]) -> Iterator[Metric | Artifact]:
    """Yield the models' differences on the same tasks: see ``paired.compare_samples``."""
    yield from compare_samples("few_shot_rfs", metric_names(config), models)
