"""Few-shot evaluation, all tasks at once against scikit-learn's logistic regression per task.

Both sides get the same unit-length features and the same task list and return one accuracy per task; one thread, CPU
seconds, alternating rounds, median of the per-round ratios. Drawing the task list is in neither side. Accuracy is
compared with the exact optimum (scikit-learn in float64 at tolerance 1e-10).

    python benchmarks/few_shot.py [--quick]

Goals for 600 tasks (1 shot / 5 shot): 15x / 8x at 512 dimensions, 10x / 6x at 2048.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.episodes import Episodes, sample_episodes
from evaluation.few_shot import task_accuracies

GOALS = {(512, 1): 15, (512, 5): 8, (2048, 1): 10, (2048, 5): 6}
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


def run_case(dim: int, num_shots: int, num_tasks: int, rounds: int) -> dict:
    """Time both sides and compare the accuracies."""
    x, labels = synthetic_features(dim, seed=dim + num_shots)
    episodes = sample_episodes(
        labels, num_tasks=num_tasks, num_ways=5, num_shots=num_shots, num_queries=15, num_classes=NUM_CLASSES, seed=0
    )
    features = torch.from_numpy(x)
    ours = task_accuracies(features, episodes)  # also the warm-up
    sklearn_accuracies(x, episodes, range(5))
    share = num_tasks // rounds  # scikit-learn does a different part of the tasks in each round
    our_ms, other_ms = [], []
    for number in range(rounds):
        start = time.process_time()
        task_accuracies(features, episodes)
        middle = time.process_time()
        sklearn_accuracies(x, episodes, range(number * share, (number + 1) * share))
        our_ms.append(1000 * (middle - start) / num_tasks)
        other_ms.append(1000 * (time.process_time() - middle) / share)
    exact = sklearn_accuracies(x.astype(np.float64), episodes, range(num_tasks), tolerance=1e-10)
    return {
        "benchmark": "few_shot",
        "case": f"{dim}-d, {num_shots} shot, {num_tasks} tasks, per task, against scikit-learn",
        "ours_ms": round(statistics.median(our_ms), 4),
        "other_ms": round(statistics.median(other_ms), 4),
        "ratio": round(statistics.median(b / a for a, b in zip(our_ms, other_ms, strict=True)), 1),
        "goal": GOALS[dim, num_shots],
        "accuracy": round(100 * float(ours.mean()), 3),
        "accuracy_minus_optimum_pp": round(100 * float(ours.mean() - exact.mean()), 4),
        "tasks_that_differ": int((np.abs(ours - exact) > 1e-9).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 tasks and 3 rounds instead of 600 and 10")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    threadpool_limits(1)  # scikit-learn's BLAS and OpenMP
    for dim, num_shots in GOALS:
        print(json.dumps(run_case(dim, num_shots, *((100, 3) if quick else (600, 10)))), flush=True)


if __name__ == "__main__":
    main()
