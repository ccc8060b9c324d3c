"""Few-shot evaluation, all tasks at once against one classifier per task.

Logistic regression (protocols A and A'): against scikit-learn. Both sides get the same unit-length features and the
same task list and return one accuracy per task; A' has 5 copies of every support image, 25 or 125 in a task. Accuracy
is compared with the exact optimum (scikit-learn in float64 at tolerance 1e-10).

SGD (protocol B): against a loop of ``torch.optim.SGD`` over ``nn.Linear``, 100 rounds, the same starts and orders; one
learning rate, and a grid of 8 at once.

One thread, CPU seconds, alternating rounds, median of the per-round ratios. Drawing the task list is in neither side.

    python benchmarks/few_shot.py [--quick]

Goals for 600 tasks (1 shot / 5 shot), in parentheses what must always hold: 35x / 18x (15x / 8x) at 512 dimensions,
25x / 12x (10x / 6x) at 2048; mean accuracy within 0.01 points (0.05) of the optimum. None is set for A' and B.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.episodes import Episodes, sample_episodes
from evaluation.few_shot import task_accuracies
from evaluation.few_shot_finetune import FewShotFinetuneConfig
from evaluation.few_shot_sgd import correct_queries, draw_tasks

GOALS = {(512, 1): 35, (512, 5): 18, (2048, 1): 25, (2048, 5): 12}
FLOORS = {(512, 1): 15, (512, 5): 8, (2048, 1): 10, (2048, 5): 6}
COPIES = 5
NUM_CLASSES, IMAGES_PER_CLASS = 20, 600  # miniImageNet's novel classes


def synthetic_features(dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit-length, non-negative features (N, dim), as pooled ReLU outputs are, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(NUM_CLASSES), IMAGES_PER_CLASS)
    centres = rng.normal(size=(NUM_CLASSES, dim)) * 6 / np.sqrt(dim)
    x = np.maximum(centres[labels] + rng.normal(size=(len(labels), dim)), 0).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True), labels


def sklearn_accuracies(x: np.ndarray, episodes: Episodes, tasks: range, tolerance: float = 1e-4) -> np.ndarray:
    """Accuracy of scikit-learn's classifier on some tasks; 1e-4 is its default tolerance."""
    _, num_ways, num_shots = episodes.support.shape
    support_labels = np.repeat(np.arange(num_ways), num_shots)
    query_labels = np.repeat(np.arange(num_ways), episodes.query.shape[2])
    accuracies = []
    for task in tasks:
        model = LogisticRegression(C=1.0, max_iter=1000, tol=tolerance)
        model.fit(x[episodes.support[task].reshape(-1)], support_labels)
        predicted = model.predict(x[episodes.query[task].reshape(-1)])
        accuracies.append(np.mean(predicted == query_labels))
    return np.array(accuracies)


def draw(labels: np.ndarray, num_shots: int, num_tasks: int) -> Episodes:
    """5-way tasks with 15 queries."""
    options = {"num_ways": 5, "num_shots": num_shots, "num_queries": 15, "num_classes": NUM_CLASSES, "seed": 0}
    return sample_episodes(labels, num_tasks=num_tasks, **options)


def with_copies(x: np.ndarray, episodes: Episodes) -> tuple[np.ndarray, Episodes]:
    """Protocol A': the support images' copies behind the plain images, each copy moved by itself."""
    noise = np.random.default_rng(1).normal(size=(COPIES, *x.shape), scale=0.3 / np.sqrt(x.shape[1]))
    copies = np.maximum(x + noise, 0).astype(np.float32).reshape(-1, x.shape[1])
    copies /= np.linalg.norm(copies, axis=1, keepdims=True)
    support = episodes.support[..., None] + len(x) * np.arange(1, COPIES + 1)
    return np.concatenate([x, copies]), replace(episodes, support=support.reshape(*support.shape[:2], -1))


def time_both(
    ours: Callable[[], object], other: Callable[[range], object], num_tasks: int, shares: list[range]
) -> dict[str, float]:
    """Milliseconds per task; in each round ours does all tasks and the other side one share of them."""
    our_ms, other_ms = [], []
    for share in shares:
        start = time.process_time()
        ours()
        middle = time.process_time()
        other(share)
        our_ms.append(1000 * (middle - start) / num_tasks)
        other_ms.append(1000 * (time.process_time() - middle) / len(share))
    return {
        "ours_ms": round(statistics.median(our_ms), 4),
        "other_ms": round(statistics.median(other_ms), 4),
        "ratio": round(statistics.median(b / a for a, b in zip(our_ms, other_ms, strict=True)), 1),
    }


def logistic_case(dim: int, num_shots: int, num_tasks: int, rounds: int, copied: bool) -> dict:
    """Time both sides and compare the accuracies."""
    x, labels = synthetic_features(dim, seed=dim + num_shots)
    episodes = draw(labels, num_shots, num_tasks)
    if copied:
        x, episodes = with_copies(x, episodes)
    features = torch.from_numpy(x)
    ours = task_accuracies(features, episodes)  # also the warm-up
    sklearn_accuracies(x, episodes, range(5))
    share = num_tasks // rounds  # scikit-learn does a different part of the tasks in each round
    shares = [range(number * share, (number + 1) * share) for number in range(rounds)]
    times = time_both(
        lambda: task_accuracies(features, episodes),
        lambda tasks: sklearn_accuracies(x, episodes, tasks),
        num_tasks,
        shares,
    )
    exact = sklearn_accuracies(x.astype(np.float64), episodes, range(num_tasks), tolerance=1e-10)
    support = f"{num_shots} shot" + (f" x {COPIES} copies" if copied else "")
    return {
        "benchmark": "few_shot",
        "case": f"{dim}-d, {support}, {num_tasks} tasks, per task, against scikit-learn",
        **times,
        "goal": None if copied else GOALS[dim, num_shots],
        "floor": None if copied else FLOORS[dim, num_shots],
        "accuracy": round(100 * float(ours.mean()), 3),
        "accuracy_minus_optimum_pp": round(100 * float(ours.mean() - exact.mean()), 4),
        "tasks_that_differ": int((np.abs(ours - exact) > 1e-9).sum()),
    }


def torch_sgd(x: torch.Tensor, episodes: Episodes, tasks: range, rate: float, config: FewShotFinetuneConfig) -> list:
    """Correct queries of some tasks, one layer and one optimizer per task."""
    num_ways, num_shots = episodes.support.shape[1:]
    labels = torch.arange(num_ways).repeat_interleave(num_shots)
    query_labels = torch.arange(num_ways).repeat_interleave(episodes.query.shape[2])
    correct = []
    for task in tasks:
        draws = draw_tasks((0,), range(task, task + 1), num_ways, len(labels), x.shape[1], config.epochs)
        layer = nn.Linear(x.shape[1], num_ways)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(draws.weight[0]))
            layer.bias.copy_(torch.from_numpy(draws.bias[0]))
        optimizer = torch.optim.SGD(
            layer.parameters(),
            lr=rate,
            momentum=config.momentum,
            dampening=config.dampening,
            weight_decay=config.weight_decay,
        )
        support = x[episodes.support[task].reshape(-1)]
        for order in torch.from_numpy(draws.order[0]):
            for batch in order.split(config.batch_size):
                optimizer.zero_grad()
                nn.functional.cross_entropy(layer(support[batch]), labels[batch]).backward()
                optimizer.step()
        with torch.no_grad():
            predicted = layer(x[episodes.query[task].reshape(-1)]).argmax(dim=1)
        correct.append(int((predicted == query_labels).sum()))
    return correct


def sgd_case(dim: int, num_shots: int, num_tasks: int, rounds: int, num_rates: int) -> dict:
    """Protocol B; with several rates the loop's time is for all of them."""
    config = FewShotFinetuneConfig()
    x, labels = synthetic_features(dim, seed=dim + num_shots)
    features, episodes = torch.from_numpy(20 * x), draw(labels, num_shots, num_tasks)
    rates = (0.01,) if num_rates == 1 else config.learning_rates
    ours = correct_queries(features, episodes, rates, config.sgd, (0,))
    expected = np.array(torch_sgd(features, episodes, range(6), 0.01, config))
    times = time_both(
        lambda: correct_queries(features, episodes, rates, config.sgd, (0,)),
        lambda tasks: torch_sgd(features, episodes, tasks, 0.01, config),
        num_tasks,
        [range(2 * number, 2 * number + 2) for number in range(rounds)],
    )
    return {
        "benchmark": "few_shot",
        "case": f"{dim}-d, {num_shots} shot, {num_tasks} tasks, SGD, {len(rates)} rates, per task, against torch.optim",
        "ours_ms": times["ours_ms"],
        "other_ms": round(times["other_ms"] * len(rates), 4),
        "ratio": round(times["ratio"] * len(rates), 1),
        "goal": None,
        "floor": None,
        "tasks_that_differ_of_6": int((ours[:6, rates.index(0.01)] != expected).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 tasks and 3 rounds instead of 600 and 10")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    threadpool_limits(1)  # scikit-learn's BLAS and OpenMP
    size = (100, 3) if quick else (600, 10)
    for dim, num_shots in GOALS:
        print(json.dumps(logistic_case(dim, num_shots, *size, copied=False)), flush=True)
    for num_shots in (1, 5):
        print(json.dumps(logistic_case(512, num_shots, *size, copied=True)), flush=True)
    for num_shots in (1, 5):
        for num_rates in (1, 8):
            print(json.dumps(sgd_case(512, num_shots, *size, num_rates=num_rates)), flush=True)


if __name__ == "__main__":
    main()
