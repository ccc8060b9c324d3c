"""Weighted k-nearest-neighbour classification on frozen features: a transfer metric with nothing to tune.

The monitor of InstDisc (Wu et al., CVPR 2018; ``zhirongw/lemniscate.pytorch: test.py``): cosine similarity s to every
training image, the k = 200 nearest vote for their class with weight exp(s / T), T = 0.07; top-1 accuracy. Exact, for
millions of training images: see ``neighbors.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import numpy as np
import torch

from evaluation.metric import (
    Artifact,
    ClassCounts,
    EvaluationContext,
    Metric,
    ModelResult,
    Output,
    Phase,
    Samples,
    accuracy_metric,
    check_image_splits,
    get_features,
)
from evaluation.neighbors import Neighbors, UnitRows, faiss_neighbors, nearest_neighbors
from evaluation.paired_images import compare_images

__all__ = ["Backend", "KnnConfig", "check", "compare", "evaluate", "knn_predict", "metric_names", "protocol", "splits"]

Backend = Literal["blocks", "faiss"]
VOTE_BLOCK = 512  # queries whose votes (one float64 per class) are counted at once


@dataclass(frozen=True)
class KnnConfig:
    """Weighted nearest-neighbour votes.

    Attributes:
        num_neighbors: k, neighbours that vote; the whole training split where it is smaller (warned about).
        temperature: T of the vote exp(similarity / T).
        backend: what finds the neighbours: "blocks" (ours) or "faiss" (on the CPU, holds a copy of the training
            features). Both are exact.
    """

    num_neighbors: int = 200
    temperature: float = 0.07
    backend: Backend = "blocks"


def metric_names(config: KnnConfig) -> tuple[str, ...]:
    """Names of the main metrics; ``knn/num_neighbors``, the k that was used, is yielded too."""
    return ("knn/top1",)


def splits(config: KnnConfig, phase: Phase) -> tuple[str, ...]:
    """Splits that the evaluation reads."""
    return ("train", phase)


def protocol(config: KnnConfig, phase: Phase) -> dict:
    """Everything needed to reproduce the numbers, as JSON data."""
    return {
        "name": "weighted k-nearest neighbours on frozen features",
        "source": "Wu et al., CVPR 2018 (InstDisc); zhirongw/lemniscate.pytorch: test.py",
        "phase": phase,
        "split": phase,
        "bank": "train",
        "features": "pooled backbone output, one view per image, L2-normalised (a zero vector stays zero)",
        "classifier": (
            f"votes exp(cosine / {config.temperature:g}) of the k = {config.num_neighbors} nearest training images; "
            "all of them where the training split is smaller; the k that was used is the metric knn/num_neighbors; of "
            "equal sums of votes the smallest label"
        ),
        "metric": "top-1 in percent",
        "interval": "larger side of Wilson's 95 % score interval: spread over images, not over pretraining seeds",
        "config": asdict(config),
    }


def check(config: KnnConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError where the options or the data do not allow the evaluation; call it before any long work."""
    if config.num_neighbors < 1 or not 0 < config.temperature < float("inf"):
        raise ValueError(
            f"knn got num_neighbors={config.num_neighbors}, temperature={config.temperature}; allowed: num_neighbors "
            "at least 1 (the papers use 200), temperature positive (0.07)."
        )
    if config.backend not in get_args(Backend):
        raise ValueError(f"knn got backend={config.backend!r}; allowed: {', '.join(get_args(Backend))}.")
    check_image_splits("knn", class_counts, splits(config, phase))


def evaluate(config: KnnConfig, context: EvaluationContext) -> Iterator[Output]:
    """Yield top-1 in percent with its interval, the number of neighbours that was used, and which images are right."""
    bank, query = (get_features(context, split) for split in splits(config, context.phase))
    check(config, context.phase, {"train": bank.class_counts, context.phase: query.class_counts})
    k = min(config.num_neighbors, len(bank.labels))
    if k < config.num_neighbors:
        warnings.warn(
            f"knn: num_neighbors={config.num_neighbors} exceeds the {k:,} training images; all of them vote",
            RuntimeWarning,
            stacklevel=2,
        )
    predicted = knn_predict(
        UnitRows(bank.features, "train"),
        bank.labels,
        UnitRows(query.features, context.phase),
        num_classes=len(bank.class_names),
        num_neighbors=k,
        temperature=config.temperature,
        backend=config.backend,
        device=context.device,
    )
    yield accuracy_metric("knn/top1", predicted, query.labels)
    yield Metric("knn/num_neighbors", float(k))
    yield Samples("knn/top1", (predicted == query.labels).astype(np.uint8))


def compare(config: KnnConfig, models: Sequence[ModelResult]) -> Iterator[Metric | Artifact]:
    """Models compared on the same images."""
    yield from compare_images("knn/top1", models)


def knn_predict(
    bank: UnitRows,
    bank_labels: np.ndarray,
    queries: UnitRows,
    *,
    num_classes: int,
    num_neighbors: int,
    temperature: float,
    backend: Backend = "blocks",
    device: str = "cpu",
) -> np.ndarray:
    """Class (Q,) with the largest sum of votes; of equal sums the smallest label.

    Args:
        bank: N features.
        bank_labels: int64 (N,).
        queries: Q features.
        num_classes: C.
        num_neighbors: k, at most N.
        temperature: T.
        backend: what finds the neighbours.
        device: where "blocks" computes.
    """
    if backend == "faiss":
        found = faiss_neighbors(bank, queries, num_neighbors)
    else:
        found = nearest_neighbors(bank, queries, num_neighbors, device)
    labels = torch.from_numpy(bank_labels).to(device if backend == "blocks" else "cpu")
    return np.concatenate([_vote(neighbors, labels, num_classes, temperature) for neighbors in found])


def _vote(neighbors: Neighbors, labels: torch.Tensor, num_classes: int, temperature: float) -> np.ndarray:
    """Class (Q,) of each query."""
    predicted = []
    blocks = (neighbors.similarity.split(VOTE_BLOCK), neighbors.rows.split(VOTE_BLOCK))
    for similarity, rows in zip(*blocks, strict=True):
        # exp((s - 1) / T) instead of exp(s / T): the same ranking, and no overflow at a small T.
        weights = torch.exp((similarity.double() - 1) / temperature)
        votes = weights.new_zeros(len(rows), num_classes).scatter_add_(1, labels[rows], weights)
        predicted.append(votes.argmax(dim=1).cpu())
    return torch.cat(predicted).numpy()
