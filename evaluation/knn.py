"""Weighted k-nearest-neighbour classification on frozen features: a transfer metric with nothing to tune.

The monitor of InstDisc (Wu et al., CVPR 2018; ``zhirongw/lemniscate.pytorch: test.py``): cosine similarity s to every
training image, the k = 200 nearest vote for their class with weight exp(s / T), T = 0.07; top-1 accuracy. Exact: all
similarities are computed, in blocks, keeping a running top-k.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from evaluation.metric import (
    ClassCounts,
    EvaluationContext,
    Metric,
    Phase,
    accuracy_metric,
    check_image_splits,
    get_features,
    l2_normalize,
)

__all__ = ["KnnConfig", "check", "evaluate", "knn_predict", "metric_names", "protocol", "splits"]

# One block of similarities is 512 x 32,768 float32, 64 MB: large enough that the product, not the top-k, sets the pace.
QUERY_BLOCK = 512
BANK_BLOCK = 32_768


@dataclass(frozen=True)
class KnnConfig:
    """Weighted nearest-neighbour votes.

    Attributes:
        num_neighbors: k, neighbours that vote; the whole training split where it is smaller (warned about).
        temperature: T of the vote exp(similarity / T).
    """

    num_neighbors: int = 200
    temperature: float = 0.07


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
            "all of them where the training split is smaller; the k that was used is the metric knn/num_neighbors"
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
    check_image_splits("knn", class_counts, splits(config, phase))


def evaluate(config: KnnConfig, context: EvaluationContext) -> Iterator[Metric]:
    """Yield top-1 in percent with its interval, and the number of neighbours that was used."""
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
        torch.from_numpy(l2_normalize(bank.features, "train")).to(context.device),
        torch.from_numpy(bank.labels).to(context.device),
        torch.from_numpy(l2_normalize(query.features, context.phase)).to(context.device),
        num_classes=len(bank.class_names),
        num_neighbors=k,
        temperature=config.temperature,
    )
    yield accuracy_metric("knn/top1", predicted, query.labels)
    yield Metric("knn/num_neighbors", float(k))


def knn_predict(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, num_classes: int, num_neighbors: int, temperature: float
) -> np.ndarray:
    """Class (Q,) with the largest sum of votes; of equal sums the smallest label.

    Args:
        bank: unit-length features (N, D).
        bank_labels: int64 (N,).
        queries: unit-length features (Q, D).
        num_classes: C.
        num_neighbors: k, at most N.
        temperature: T.
    """
    predicted = []
    for block in queries.split(QUERY_BLOCK):
        similarity, index = _nearest(block, bank, num_neighbors)
        # exp((s - 1) / T) instead of exp(s / T): the same ranking, and no overflow at a small T.
        weights = torch.exp((similarity.double() - 1) / temperature)
        votes = weights.new_zeros(len(block), num_classes).scatter_add_(1, bank_labels[index], weights)
        predicted.append(votes.argmax(dim=1).cpu())
    return torch.cat(predicted).numpy()


def _nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarities and bank rows (Q, k) of the nearest neighbours, in no order, over blocks of the bank."""
    similarity = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), BANK_BLOCK):
        products = torch.mm(queries, bank[start : start + BANK_BLOCK].T)
        best, rows = products.topk(min(k, products.shape[1]), dim=1, sorted=False)
        similarity = torch.cat([similarity, best], dim=1)
        index = torch.cat([index, rows + start], dim=1)
        if similarity.shape[1] > k:
            similarity, kept = similarity.topk(k, dim=1, sorted=False)
            index = index.gather(1, kept)
    return similarity, index
