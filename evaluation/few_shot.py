"""Few-shot classification of classes that pretraining never saw: N-way K-shot tasks on frozen features.

Protocol A of CAMtrast (Sun et al., AAAI 2022; test script ``jinghanSunn/CAMtrast: test.py, dataset.py, util.py``):
600 tasks of 5 classes with 1 or 5 support images and 15 queries per class; pooled features at unit length; multinomial
logistic regression with L2 penalty, C = 1 and a free intercept, fitted on the support images of each task; mean
accuracy over the tasks, +- 1.96 s / sqrt(600) with s of ddof 1. Support and query of a class come from one permutation
of its images and never overlap.

What we do differently: all tasks are solved together and to the optimum (``few_shot_solver``); scikit-learn's default
tolerance stops earlier, which moves the mean accuracy by up to 0.1 percentage points. The task list is a function of
the seed and the class sizes only, so all models see the same tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from evaluation.episodes import Episodes, sample_episodes
from evaluation.few_shot_solver import solve_dual
from evaluation.metric import ClassCounts, EvaluationContext, Metric, Phase, get_features, l2_normalize, mean_interval

__all__ = ["FewShotConfig", "check", "evaluate", "metric_names", "protocol", "splits", "task_accuracies"]

SPLITS = {
    "unseen_classes": {"val": "val_classes", "test": "novel_classes"},
    "base_classes": {"val": "val", "test": "test"},
}
GATHER_FLOATS = 400_000  # features of the tasks that are gathered at once: 1.6 MB, about an L2 cache


@dataclass(frozen=True)
class FewShotConfig:
    """Few-shot protocol A.

    Attributes:
        num_ways: classes per task.
        shots: support images per class; one metric for each entry.
        num_queries: query images per class.
        num_tasks: tasks; 600 in the papers. Fewer tasks are a prefix of the same list: cheaper, wider interval.
        c: inverse strength of the L2 penalty, as in scikit-learn's LogisticRegression.
        split: "unseen_classes" draws tasks from classes that pretraining never saw ("val_classes" while hyperparameters
            are chosen, "novel_classes" for the report); "base_classes" from held-out images of the pretraining classes
            ("val" and "test").
    """

    num_ways: int = 5
    shots: tuple[int, ...] = (1, 5)
    num_queries: int = 15
    num_tasks: int = 600
    c: float = 1.0
    split: Literal["unseen_classes", "base_classes"] = "unseen_classes"


def metric_names(config: FewShotConfig) -> tuple[str, ...]:
    """Names of the metrics, in the order in which they are yielded."""
    return tuple(_metric_name(config, num_shots) for num_shots in config.shots)


def _metric_name(config: FewShotConfig, num_shots: int) -> str:
    return f"few_shot/{config.num_ways}way_{num_shots}shot_acc"


def splits(config: FewShotConfig, phase: Phase) -> tuple[str, ...]:
    """Splits that the evaluation reads."""
    return (SPLITS[config.split][phase],)


def protocol(config: FewShotConfig, phase: Phase) -> dict:
    """Everything needed to reproduce the numbers, as JSON data."""
    return {
        "name": "few-shot protocol A: logistic regression on frozen features",
        "source": "Sun et al., AAAI 2022 (CAMtrast); jinghanSunn/CAMtrast: test.py, dataset.py, util.py",
        "phase": phase,
        "split": splits(config, phase)[0],
        "features": "pooled backbone output, one view per image, L2-normalised (a zero vector stays zero)",
        "classifier": (
            f"multinomial logistic regression, scikit-learn's objective with C = {config.c:g} and a free intercept, "
            "solved to the optimum (float32, residual 1e-5; damped Newton in float64 where that is not reached)"
        ),
        "tasks": (
            f"{config.num_tasks} tasks, {config.num_ways} ways, {config.num_queries} queries per class; list drawn by "
            "numpy PCG64 from SeedSequence([seed, ways, shots, queries]) and the class sizes alone; support and query "
            "from one permutation without overlap"
        ),
        "metric": "mean accuracy over tasks in percent",
        "interval": "mean +- 1.96 s / sqrt(tasks), s with ddof = 1: spread over tasks, not over pretraining seeds",
        "config": asdict(config),
    }


def check(config: FewShotConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError where the options or the data do not allow the tasks; call it before any long work."""
    _check_options(config)
    split = splits(config, phase)[0]
    counts = class_counts.get(split, ())
    if not counts:
        other = "base_classes" if config.split == "unseen_classes" else "unseen_classes"
        raise ValueError(
            f"few_shot reads split {split!r}, which the data does not have (it has: {', '.join(class_counts)}). Give "
            f"{split}=URI, let the seeded class split make it, or set split={other!r} to draw the tasks from "
            f"{SPLITS[other][phase]!r} instead."
        )
    if len(counts) < config.num_ways:
        raise ValueError(
            f"few_shot needs at least {config.num_ways} classes in split {split!r} for {config.num_ways}-way tasks; it "
            f"has {len(counts)}. Give the split more classes or lower num_ways to {max(2, len(counts))}."
        )
    needed = max(config.shots) + config.num_queries
    small = [(label, count) for label, count in enumerate(counts) if count < needed]
    if small:
        named = ", ".join(f"{label} ({count})" for label, count in small[:8])
        more = f" and {len(small) - 8} more" if len(small) > 8 else ""
        raise ValueError(
            f"few_shot needs {needed} images per class in split {split!r} ({max(config.shots)} support + "
            f"{config.num_queries} query); too few in classes (label number, images): {named}{more}. Lower num_queries "
            "or shots, add images, or drop classes with fewer images (the subset option min_per_class)."
        )


def _check_options(config: FewShotConfig) -> None:
    """ValueError for values outside their range."""
    if config.split not in SPLITS:
        raise ValueError(f"few_shot split is {config.split!r}; allowed: {', '.join(SPLITS)}.")
    if config.num_ways < 2 or config.num_queries < 1 or config.num_tasks < 2:
        raise ValueError(
            f"few_shot got num_ways={config.num_ways}, num_queries={config.num_queries}, num_tasks={config.num_tasks}; "
            "allowed: at least 2 ways, 1 query and 2 tasks (an interval needs two)."
        )
    if not config.shots or min(config.shots) < 1 or len(set(config.shots)) != len(config.shots):
        raise ValueError(f"few_shot shots are {config.shots}; allowed: one or more different numbers, each at least 1.")
    if not 0 < config.c < float("inf"):
        raise ValueError(f"few_shot c is {config.c}; allowed: a positive finite number (the papers use 1).")


def evaluate(config: FewShotConfig, context: EvaluationContext) -> Iterator[Metric]:
    """Yield the mean accuracy in percent and its interval, one metric per number of shots."""
    split = splits(config, context.phase)[0]
    found = get_features(context, split)
    check(config, context.phase, {split: found.class_counts})
    x = torch.from_numpy(l2_normalize(found.features, split)).to(context.device)
    for num_shots in config.shots:
        episodes = sample_episodes(
            found.labels,
            num_tasks=config.num_tasks,
            num_ways=config.num_ways,
            num_shots=num_shots,
            num_queries=config.num_queries,
            num_classes=len(found.class_names),
            seed=context.seed,
        )
        mean, half_width = mean_interval(100.0 * task_accuracies(x, episodes, config.c))
        yield Metric(_metric_name(config, num_shots), mean, half_width, config.num_tasks)


def task_accuracies(x: Tensor, episodes: Episodes, c: float = 1.0) -> np.ndarray:
    """Query accuracy (T,) in [0, 1] of the exact logistic regression of each task.

    Args:
        x: features (N, D), float32 or float64; the precision of everything.
        episodes: the task list.
        c: scikit-learn's C. With two classes scikit-learn fits one weight vector w instead of w/2 and -w/2, whose
            penalty is twice ours; half the c makes the problems equal.
    """
    _, num_ways, num_shots = episodes.support.shape
    num_queries = episodes.query.shape[2]
    num_support = num_ways * num_shots
    products = _support_products(x, episodes)
    products *= c / 2 if num_ways == 2 else c
    ways = torch.arange(num_ways, device=x.device)
    solution = solve_dual(products[:, :, :num_support], ways.repeat_interleave(num_shots), num_ways)
    scores = torch.baddbmm(
        solution.intercept[:, :, None], solution.coefficients.transpose(1, 2), products[:, :, num_support:]
    )
    correct = scores.argmax(dim=1) == ways.repeat_interleave(num_queries)
    return correct.double().mean(dim=1).cpu().numpy()


def _support_products(x: Tensor, episodes: Episodes) -> Tensor:
    """Inner products (T, N K, N (K + Q)) of each task's support images with all its images, support first.

    A few tasks at a time are gathered into one reused buffer that fits the cache; the features of all tasks at once
    (600 x 100 x 2048 floats) would go through main memory three times.
    """
    num_tasks, num_ways, num_shots = episodes.support.shape
    num_support = num_ways * num_shots
    rows = np.concatenate([episodes.support.reshape(num_tasks, -1), episodes.query.reshape(num_tasks, -1)], axis=1)
    num_images, dim = rows.shape[1], x.shape[1]
    index = torch.from_numpy(rows).to(x.device)
    products = x.new_empty(num_tasks, num_support, num_images)
    chunk = max(1, GATHER_FLOATS // (num_images * dim))
    buffer = x.new_empty(chunk * num_images, dim)
    for start in range(0, num_tasks, chunk):
        chosen = index[start : start + chunk].reshape(-1)
        gathered = torch.index_select(x, 0, chosen, out=buffer[: len(chosen)]).view(-1, num_images, dim)
        support, part = gathered[:, :num_support], products[start : start + chunk]
        torch.bmm(support, gathered.transpose(1, 2), out=part)
    return products
