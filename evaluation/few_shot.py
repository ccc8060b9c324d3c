"""Few-shot classification of classes that pretraining never saw: N-way K-shot tasks on frozen features.

Protocol A of CAMtrast (Sun et al., AAAI 2022; test script ``jinghanSunn/CAMtrast: test.py, dataset.py, util.py``):
600 tasks of 5 classes with 1 or 5 support images and 15 queries per class; pooled features at unit length; multinomial
logistic regression with L2 penalty, C = 1 and a free intercept, fitted on the support images of each task; mean
accuracy over the tasks, +- 1.96 s / sqrt(600) with s of ddof 1 (``interval`` names two other papers' formulas). Support
and query of a class come from one permutation of its images and never overlap.

What we do differently: all tasks are solved together and to the optimum (``few_shot_solver``); scikit-learn's default
tolerance stops earlier, which moves the mean accuracy by up to 0.1 percentage points. The task list is a function of
the seed and the class sizes only, so all models see the same tasks; the accuracy of each task is kept, and ``compare``
tests models task by task (``paired``).

Image sizes: backbones are pretrained and tested at 84 pixels on miniImageNet and tieredImageNet; on CIFAR-FS they are
tested at its own 32 pixels, also those that were pretrained at 84 (CAMtrast's supplement). The view is a resize of the
short side to 92 and the central 84 x 84. At other sizes we keep that ratio (35 and 32 pixels); the released script adds
8 pixels at any size, but has no branch for CIFAR-FS. Across data sets (Sun et al., Table 4) only the source of the
novel classes changes:

    python rayjobs/evaluate.py --checkpoint DIR --tasks few_shot --data novel_classes=cifar_fs:DIR --image-size 32
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from evaluation.episodes import Episodes, check_episode_options, check_episodes, draw_episodes
from evaluation.few_shot_solver import solve_dual
from evaluation.intervals import IntervalName, accuracy_outputs, check_interval, interval_record
from evaluation.metric import (
    Artifact,
    ClassCounts,
    EvaluationContext,
    Metric,
    ModelResult,
    Phase,
    Samples,
    get_features,
    l2_normalize,
)
from evaluation.paired import compare_samples

__all__ = [
    "FewShotConfig",
    "check",
    "compare",
    "evaluate",
    "gather_tasks",
    "metric_names",
    "protocol",
    "splits",
    "task_accuracies",
]

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
        interval: formula of the half width: "camtrast" (1.96, ddof 1), "closer_look" (1.96, ddof 0) or "rfs"
            (Student's t, ddof 1).
    """

    num_ways: int = 5
    shots: tuple[int, ...] = (1, 5)
    num_queries: int = 15
    num_tasks: int = 600
    c: float = 1.0
    split: Literal["unseen_classes", "base_classes"] = "unseen_classes"
    interval: IntervalName = "camtrast"


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
        "interval": interval_record(config.interval),
        "config": asdict(config),
    }


def check(config: FewShotConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError where the options or the data do not allow the tasks; call it before any long work."""
    _check_options(config)
    split = splits(config, phase)[0]
    other = "base_classes" if config.split == "unseen_classes" else "unseen_classes"
    instead = f", or set split={other!r} to draw the tasks from {SPLITS[other][phase]!r} instead"
    check_episodes("few_shot", config, split, class_counts, instead)


def _check_options(config: FewShotConfig) -> None:
    """ValueError for values outside their range."""
    if config.split not in SPLITS:
        raise ValueError(f"few_shot split is {config.split!r}; allowed: {', '.join(SPLITS)}.")
    check_episode_options("few_shot", config)
    check_interval("few_shot", config.interval)
    if not 0 < config.c < float("inf"):
        raise ValueError(f"few_shot c is {config.c}; allowed: a positive finite number (the papers use 1).")


def evaluate(config: FewShotConfig, context: EvaluationContext) -> Iterator[Metric | Samples]:
    """Yield the mean accuracy in percent with its interval, and the accuracy of each task, per number of shots."""
    split = splits(config, context.phase)[0]
    found = get_features(context, split)
    check(config, context.phase, {split: found.class_counts})
    x = torch.from_numpy(l2_normalize(found.features, split)).to(context.device)
    for num_shots in config.shots:
        episodes = draw_episodes(config, num_shots, found, context.seed)
        accuracies = task_accuracies(x, episodes, config.c)
        yield from accuracy_outputs(_metric_name(config, num_shots), accuracies, config.interval)


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
    """Inner products (T, N K, N (K + Q)) of each task's support images with all its images, support first."""
    num_tasks, num_ways, num_shots = episodes.support.shape
    num_support = num_ways * num_shots
    products = x.new_empty(num_tasks, num_support, num_support + num_ways * episodes.query.shape[2])
    for tasks, gathered in gather_tasks(x, episodes):
        torch.bmm(gathered[:, :num_support], gathered.transpose(1, 2), out=products[tasks])
    return products


def gather_tasks(x: Tensor, episodes: Episodes) -> Iterator[tuple[slice, Tensor]]:
    """The features (t, M, D) of a few tasks at a time, support images first; valid until the next ones are asked for.

    They go into one reused buffer that fits the cache; the features of all tasks at once (600 x 100 x 2048 floats)
    would go through main memory three times.
    """
    num_tasks = len(episodes.support)
    rows = np.concatenate([episodes.support.reshape(num_tasks, -1), episodes.query.reshape(num_tasks, -1)], axis=1)
    num_images, dim = rows.shape[1], x.shape[1]
    index = torch.from_numpy(rows).to(x.device)
    chunk = max(1, GATHER_FLOATS // (num_images * dim))
    buffer = x.new_empty(chunk * num_images, dim)
    for start in range(0, num_tasks, chunk):
        chosen = index[start : start + chunk].reshape(-1)
        gathered = torch.index_select(x, 0, chosen, out=buffer[: len(chosen)])
        yield slice(start, start + chunk), gathered.view(-1, num_images, dim)


def compare(config: FewShotConfig, models: Sequence[ModelResult]) -> Iterator[Metric | Artifact]:
    """Yield the models' differences on the same tasks: see ``paired.compare_samples``."""
    yield from compare_samples("few_shot", metric_names(config), models)
