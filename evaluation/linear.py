"""Linear probe on cached features: how well one linear layer reads the classes off the frozen backbone.

Named protocol "cached features", ours. It differs from MoCo's linear read-off (``linear_readoff.py``: random crops
while the probe trains, lr 30, steps at 60 and 80 of 100 epochs) in two stated ways. Each image has one feature vector,
computed once, so the probe sees no augmentation. And the learning rate is chosen on validation images, because feature
norms differ widely between methods; for the same reason features are standardised first, which is BatchNorm without
affine parameters before the linear layer (``asrafulashiq/transfer_broad: scripts/run_linear_bn.sh``).

Softmax regression, SGD with momentum 0.9, no weight decay, cosine decay to zero, weights and biases start at zero (the
problem is convex); the last epoch is reported. All learning rates train at once: their weights are the column groups of
one matrix, so every step is two matrix products. Where the best rate is at an edge of the grid, the grid grows by three
further rates on that side, at most twice; still at the edge after that warns.

    phase "val":  the rate is chosen on 20 % of "train" (stratified), then the probe is fitted on all of "train" with
                  that rate and scored on "val".
    phase "test": every rate is fitted on "train", chosen on "val", and that same probe is scored on "test".
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

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
from evaluation.paired_images import compare_images

__all__ = [
    "LinearConfig",
    "RateSearch",
    "check",
    "compare",
    "evaluate",
    "fit_probes",
    "metric_names",
    "protocol",
    "score_gradient",
    "splits",
    "stratified_split",
]

GRID_GROWTH = 3  # rates added at an edge at once
MAX_GROWTHS = 2
MIN_VARIANCE = 1e-5  # relative to the mean variance: keeps near-constant dimensions small, whatever the feature scale


@dataclass(frozen=True)
class LinearConfig:
    """Linear probe on cached features.

    Attributes:
        learning_rates: the grid, ascending and log-spaced (each about the same multiple of the one before).
        epochs: passes over the training features.
        batch_size: images per SGD step.
        momentum: momentum of SGD.
        holdout: share of "train" that chooses the learning rate in phase "val".
    """

    learning_rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    epochs: int = 100
    batch_size: int = 256
    momentum: float = 0.9
    holdout: float = 0.2


class Probes(NamedTuple):
    """Linear layers of G learning rates, on standardised features.

    Attributes:
        mean: (D,), subtracted from the features.
        scale: (D,), multiplies the difference.
        weight: (D, G, C).
        bias: (G, C).
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Class (N, G) of each feature row under each probe; -1 for a probe that diverged."""
        dim, num_rates, num_classes = self.weight.shape
        finite = torch.isfinite(self.weight).all(dim=2).all(dim=0)
        predicted = []
        for block in torch.from_numpy(x).split(8192):
            z = (block.to(self.mean.device) - self.mean) * self.scale
            scores = torch.mm(z, self.weight.view(dim, -1)).view(-1, num_rates, num_classes) + self.bias
            predicted.append(torch.where(finite, scores.argmax(dim=2), -1).cpu())
        return torch.cat(predicted).numpy()


def metric_names(config: LinearConfig) -> tuple[str, ...]:
    """Names of the main metrics; ``linear/learning_rate``, the chosen rate, is yielded too."""
    return ("linear/top1",)


def splits(config: LinearConfig, phase: Phase) -> tuple[str, ...]:
    """Splits that the evaluation reads."""
    return ("train", "val") if phase == "val" else ("train", "val", "test")


def protocol(config: LinearConfig, phase: Phase) -> dict:
    """Everything needed to reproduce the numbers, as JSON data."""
    choice = {
        "val": f"chosen on {100 * config.holdout:g} % of train (stratified, seeded), refit on all of train",
        "test": "fitted on train, chosen on val, that probe is reported",
    }[phase]
    return {
        "name": "linear probe, cached features",
        "source": (
            "ours; lr choice and last epoch as usual for linear read-off, BatchNorm without affine parameters as in "
            "asrafulashiq/transfer_broad: scripts/run_linear_bn.sh; MoCo's own protocol augments while training"
        ),
        "phase": phase,
        "split": phase,
        "fitted_on": "train",
        "features": (
            f"pooled backbone output, one view per image, standardised: (x - mean) / sqrt(var + {MIN_VARIANCE:g} mean "
            "var) with the statistics of the images that the probe is fitted on"
        ),
        "classifier": (
            f"softmax regression from zero, SGD momentum {config.momentum:g}, weight decay 0, batch "
            f"{config.batch_size} (the whole set where smaller), {config.epochs} epochs, cosine decay per step, last "
            "epoch"
        ),
        "learning_rate": (
            f"{choice}; of equals the middle one; a best rate at an edge adds {GRID_GROWTH} rates there, at most "
            f"{MAX_GROWTHS} times; the chosen rate is the metric linear/learning_rate"
        ),
        "metric": "top-1 in percent",
        "interval": "larger side of Wilson's 95 % score interval: spread over images, not over pretraining seeds",
        "config": asdict(config),
    }


def check(config: LinearConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError where the options or the data do not allow the probe; call it before any long work."""
    rates = config.learning_rates
    if len(rates) < 2 or rates[0] <= 0 or list(rates) != sorted(set(rates)) or math.isinf(rates[-1]):
        raise ValueError(f"linear learning_rates are {rates}; allowed: at least two positive numbers, ascending.")
    if config.epochs < 1 or config.batch_size < 1 or not 0 <= config.momentum < 1 or not 0 < config.holdout < 1:
        raise ValueError(
            f"linear got epochs={config.epochs}, batch_size={config.batch_size}, momentum={config.momentum}, "
            f"holdout={config.holdout}; allowed: epochs and batch_size at least 1, momentum in [0, 1), holdout in "
            "(0, 1)."
        )
    check_image_splits("linear", class_counts, splits(config, phase))
    train = class_counts["train"]
    if sum(count > 0 for count in train) < 2:
        raise ValueError("linear needs at least 2 classes with images in split 'train'; use data with more classes.")
    if phase == "val" and max(train) < 2:
        raise ValueError(
            "linear holds out a part of each class of 'train' to choose its learning rate; no class has 2 images. Add "
            "images per class."
        )


def evaluate(config: LinearConfig, context: EvaluationContext) -> Iterator[Output]:
    """Yield top-1 in percent with its interval, the learning rate that was chosen, and which images are right."""
    found = {split: get_features(context, split) for split in splits(config, context.phase)}
    check(config, context.phase, {split: features.class_counts for split, features in found.items()})
    train, val, scored = found["train"], found["val"], found[context.phase]
    x, y = train.features, train.labels
    num_classes = len(train.class_names)
    search = RateSearch(config, num_classes, context)
    if context.phase == "val":
        fit, held_out = stratified_split(y, config.holdout, np.random.default_rng(context.seed))
        rate, _ = search.best(x[fit], y[fit], x[held_out], y[held_out])
        predicted = search.fit(x, y, (rate,)).predict(scored.features)[:, 0]
    else:
        rate, probes = search.best(x, y, val.features, val.labels)
        predicted = probes.predict(scored.features)[:, 0]
    yield accuracy_metric("linear/top1", predicted, scored.labels)
    yield Metric("linear/learning_rate", rate)
    yield Samples("linear/top1", (predicted == scored.labels).astype(np.uint8))


def compare(config: LinearConfig, models: Sequence[ModelResult]) -> Iterator[Metric | Artifact]:
    """Models compared on the same images: McNemar's exact test and the difference's interval."""
    yield from compare_images("linear/top1", models)


def stratified_split(labels: np.ndarray, share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit on and rows held out, each ascending: ``share`` of every class, rounded, at least one of each kind.

    A class with a single image is only fitted on.
    """
    held_out = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        held_out.append(rows[:count])
    chosen = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


class RateSearch:
    """Fits the grid of learning rates and extends it where the best rate is at its edge."""

    def __init__(self, config: LinearConfig, num_classes: int, context: EvaluationContext) -> None:
        self.config, self.num_classes, self.context = config, num_classes, context

    def fit(self, x: np.ndarray, y: np.ndarray, rates: tuple[float, ...]) -> Probes:
        """Probes of these rates; the order of the images depends on the seed only, not on the rates."""
        generator = torch.Generator().manual_seed(self.context.seed)
        return fit_probes(x, y, self.num_classes, self.config, rates, generator, self.context.device)

    def best(self, x: np.ndarray, y: np.ndarray, val_x: np.ndarray, val_y: np.ndarray) -> tuple[float, Probes]:
        """The rate with the highest validation accuracy (of equals the middle one) and its probe.

        Raises:
            ValueError: every rate diverged.
        """
        tried: dict[float, tuple[int, Probes]] = {}
        new = self.config.learning_rates
        for growth in range(MAX_GROWTHS + 1):
            probes = self.fit(x, y, new)
            predicted = probes.predict(val_x)
            correct = np.where(predicted[0] < 0, -1, (predicted == val_y[:, None]).sum(axis=0))  # -1: diverged
            tried.update(
                {rate: (int(c), _single(probes, i)) for i, (rate, c) in enumerate(zip(new, correct, strict=True))}
            )
            rates = sorted(tried)
            highest = max(correct for correct, _ in tried.values())
            equals = [rate for rate in rates if tried[rate][0] == highest]
            best = equals[(len(equals) - 1) // 2] if highest >= 0 else rates[0]
            if best not in (rates[0], rates[-1]):
                return best, tried[best][1]
            if growth < MAX_GROWTHS:
                new = _beyond(rates, best)
        if tried[best][0] < 0:
            raise ValueError(
                f"linear: the probe diverged at every learning rate of {rates}; use smaller learning_rates."
            )
        warnings.warn(
            f"linear: the best learning rate {best:g} is at the edge of the extended grid {rates[0]:g} to "
            f"{rates[-1]:g}; set learning_rates so that the best lies inside",
            RuntimeWarning,
            stacklevel=2,
        )
        return best, tried[best][1]


def _beyond(rates: list[float], edge: float) -> tuple[float, ...]:
    """The next rates past an edge of an ascending grid, in its mean ratio."""
    ratio = (rates[-1] / rates[0]) ** (1 / (len(rates) - 1))
    powers = range(1, GRID_GROWTH + 1) if edge == rates[-1] else range(-GRID_GROWTH, 0)
    return tuple(edge * ratio**power for power in powers)


def _single(probes: Probes, i: int) -> Probes:
    """One learning rate's probe."""
    return Probes(probes.mean, probes.scale, probes.weight[:, i : i + 1].contiguous(), probes.bias[i : i + 1])


def fit_probes(
    x: np.ndarray,
    y: np.ndarray,
    num_classes: int,
    config: LinearConfig,
    rates: tuple[float, ...],
    generator: torch.Generator,
    device: str = "cpu",
) -> Probes:
    """Train one linear layer per learning rate, all at once.

    Args:
        x: features (N, D), float32.
        y: labels (N,).
        num_classes: C.
        config: epochs, batch size and momentum.
        rates: learning rates, one probe each (G).
        generator: order of the images, on the CPU.
        device: where to compute.
    """
    mean, scale = _standardisation(x, device)
    z = (torch.from_numpy(x).to(device) - mean) * scale
    targets = torch.from_numpy(y).to(device)
    n, dim = z.shape
    batch_size = min(config.batch_size, n)
    num_steps = config.epochs * math.ceil(n / batch_size)
    weight = z.new_zeros(dim, len(rates) * num_classes)
    bias = z.new_zeros(len(rates) * num_classes)
    weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    base_rate = torch.tensor(rates, device=device).repeat_interleave(num_classes)
    step = 0
    for _ in range(config.epochs):
        for rows in torch.randperm(n, generator=generator).split(batch_size):
            rows = rows.to(device)
            batch = z.index_select(0, rows)
            gradient = score_gradient(torch.addmm(bias, batch, weight), targets[rows], len(rates))
            rate = base_rate * (0.5 * (1 + math.cos(math.pi * step / num_steps)))
            weight_velocity.addmm_(batch.T, gradient, beta=config.momentum)
            bias_velocity.mul_(config.momentum).add_(gradient.sum(dim=0))
            weight.addcmul_(weight_velocity, rate, value=-1)
            bias.addcmul_(bias_velocity, rate, value=-1)
            step += 1
    return Probes(mean, scale, weight.view(dim, len(rates), num_classes), bias.view(len(rates), num_classes))


def _standardisation(x: np.ndarray, device: str) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation (D,) of the rows of ``x``; the variance is bounded below, relatively."""
    mean = x.mean(axis=0, dtype=np.float64)
    variance = x.var(axis=0, dtype=np.float64)
    # Identical rows have no variance at all; any positive number then keeps the (zero) differences finite.
    floor = MIN_VARIANCE * variance.mean() or 1.0
    scale = 1 / np.sqrt(variance + floor)
    return torch.from_numpy(mean.astype(np.float32)).to(device), torch.from_numpy(scale.astype(np.float32)).to(device)


def score_gradient(scores: Tensor, targets: Tensor, num_rates: int) -> Tensor:
    """Gradient (B, G C) of the mean cross entropy of each probe with respect to its scores (B, G C)."""
    batch_size = len(scores)
    gradient = torch.softmax(scores.view(batch_size, num_rates, -1), dim=2)
    gradient[torch.arange(batch_size, device=scores.device), :, targets] -= 1
    return gradient.div_(batch_size).view(batch_size, -1)
