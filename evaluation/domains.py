"""Linear evaluation on further data sets ("12 domains"): what a frozen backbone is worth far from its pretraining data.

Protocol of Islam et al., ICCV 2021 (``asrafulashiq/transfer_broad: scripts/run_linear_bn.sh``), who introduced the list
of twelve data sets: BatchNorm without affine parameters, then a linear layer; SGD with momentum 0.9, learning rate
x 0.1 at 1/2 and 3/4 of the epochs. Learning rate, batch size and weight decay are chosen from a grid by 20 epochs on
70 % of the training images, scored on the other 30 %; then 50 epochs on all training images, last epoch, top-1 on the
test images. ChestX, which has several findings per image, is classified by its images with a single one.

What differs: each image has one feature vector, computed once, where the published code draws random crops and flips
while it trains; the part that is held out is stratified by class; the weights start at zero. All learning rates and
weight decays of one batch size train at once on the same batches.

The data sets are given by name and are the same in both phases: they are never used in pretraining, and to choose
hyperparameters of pretraining by them is to choose on their test images, which phase "val" refuses by scoring the
held-out part of the training images instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from evaluation.linear import Probes, stratified_split
from evaluation.metric import (
    Artifact,
    ClassCounts,
    EvaluationContext,
    Features,
    Metric,
    ModelResult,
    Output,
    Phase,
    Samples,
    accuracy_metric,
    get_features,
)
from evaluation.paired_images import compare_images
from evaluation.softmax_sgd import Recipe, Setting, correct_share, fit_softmax

__all__ = ["DomainsConfig", "check", "compare", "evaluate", "metric_names", "protocol", "splits", "step_factor"]

MEAN_TOP1 = "domains/mean_top1"


@dataclass(frozen=True)
class DomainsConfig:
    """Linear layer behind BatchNorm, on each of several data sets.

    Attributes:
        learning_rates: grid of learning rates.
        batch_sizes: grid of images per SGD step.
        weight_decays: grid of weight decays.
        tune_epochs: passes over the training features while the grid is searched.
        epochs: passes of the final fit.
        momentum: momentum of SGD.
        holdout: share of the training images that chooses from the grid.
    """

    learning_rates: tuple[float, ...] = (0.01, 0.001)
    batch_sizes: tuple[int, ...] = (128, 32)
    weight_decays: tuple[float, ...] = (0.0, 1e-4, 1e-5)
    tune_epochs: int = 20
    epochs: int = 50
    momentum: float = 0.9
    holdout: float = 0.3


class _Fit(NamedTuple):
    """One point of the grid."""

    batch_size: int
    setting: Setting


def metric_names(config: DomainsConfig) -> tuple[str, ...]:
    """The mean over the data sets; ``domains/<name>/top1`` is yielded for each of them too."""
    return (MEAN_TOP1,)


def splits(config: DomainsConfig, phase: Phase) -> tuple[str, ...]:
    """None of the pretraining data: the data sets come by name."""
    return ()


def protocol(config: DomainsConfig, phase: Phase) -> dict:
    """Everything needed to reproduce the numbers, as JSON data."""
    held_out = f"{100 * config.holdout:g} % of them (stratified, seeded)"
    grid = f"learning rate {config.learning_rates} x batch {config.batch_sizes} x weight decay {config.weight_decays}"
    scored = {
        "val": f"fitted on the rest of train after {held_out} were set aside, scored on these; test is not read",
        "test": "fitted on train, scored on test",
    }[phase]
    return {
        "name": "linear evaluation on further data sets, cached features",
        "source": "Islam et al., ICCV 2021; asrafulashiq/transfer_broad: scripts/run_linear_bn.sh, which also augments",
        "phase": phase,
        "split": f"of each data set: {scored}",
        "features": "pooled backbone output, one view per image",
        "classifier": (
            "BatchNorm without affine parameters (batch statistics in training, running ones in testing), softmax "
            f"regression from zero, SGD momentum {config.momentum:g}, x 0.1 at 1/2 and 3/4 of the epochs, an epoch's "
            "smaller last batch left out, last epoch"
        ),
        "tuning": (
            f"{grid}: {config.tune_epochs} epochs on the images that are fitted on without {held_out}, accuracy on "
            f"these, of equals the first; then {config.epochs} epochs on all of them"
        ),
        "metric": "top-1 in percent, and its mean over the data sets",
        "interval": (
            "larger side of Wilson's 95 % score interval per data set; of the mean, the root of the summed squares "
            "over their number: spread over images, not over pretraining seeds"
        ),
        "config": asdict(config),
    }


def check(config: DomainsConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError for options out of range; the data sets are checked when they are evaluated."""
    grids = {
        "learning_rates": (config.learning_rates, lambda v: 0 < v < math.inf),
        "batch_sizes": (config.batch_sizes, lambda v: v >= 2),
        "weight_decays": (config.weight_decays, lambda v: 0 <= v < math.inf),
    }
    for name, (values, allowed) in grids.items():
        if not values or not all(map(allowed, values)):
            raise ValueError(
                f"domains got {name}={values}; allowed: at least one value; learning rates positive, batch sizes at "
                "least 2 (BatchNorm), weight decays not negative."
            )
    if min(config.tune_epochs, config.epochs) < 1 or not 0 <= config.momentum < 1 or not 0 < config.holdout < 1:
        raise ValueError(
            f"domains got tune_epochs={config.tune_epochs}, epochs={config.epochs}, momentum={config.momentum}, "
            f"holdout={config.holdout}; allowed: epochs at least 1, momentum in [0, 1), holdout in (0, 1)."
        )


def evaluate(config: DomainsConfig, context: EvaluationContext) -> Iterator[Output]:
    """Yield per data set top-1 with its interval, the chosen settings and which images are right; then the mean."""
    check(config, context.phase, {})
    if not context.domains:
        raise ValueError(
            "domains needs further data sets and got none: give --domains NAME=URI ..., for example --domains "
            "eurosat=eurosat:DIR dtd=dtd:DIR?val=train."
        )
    found = []
    for name, load in context.domains.items():
        train, scored = _parts(name, load, config, context)
        chosen = _tune(name, train, config, context)
        probes = _fit(train, np.arange(len(train.labels)), (chosen,), config.epochs, config, context)
        predicted = probes.predict(scored.features)[:, 0]
        top1 = accuracy_metric(f"domains/{name}/top1", predicted, scored.labels)
        found.append(top1)
        yield top1
        yield Metric(f"domains/{name}/learning_rate", chosen.setting.learning_rate)
        yield Metric(f"domains/{name}/batch_size", float(chosen.batch_size))
        yield Metric(f"domains/{name}/weight_decay", chosen.setting.weight_decay)
        yield Samples(top1.name, (predicted == scored.labels).astype(np.uint8))
    half_width = math.sqrt(sum((metric.ci95 or 0.0) ** 2 for metric in found)) / len(found)
    mean = sum(metric.value for metric in found) / len(found)
    yield Metric(MEAN_TOP1, mean, half_width, sum(metric.n or 0 for metric in found))


def compare(config: DomainsConfig, models: Sequence[ModelResult]) -> Iterator[Metric | Artifact]:
    """Models compared on the same images of each data set."""
    names = {name for model in models for name in model.samples}
    for name in sorted(name for name in names if name.startswith("domains/") and name.endswith("/top1")):
        yield from compare_images(name, models)


def step_factor(epoch: int, epochs: int) -> float:
    """Factor of the learning rate: the milestones are whole epochs, rounded down as in the script."""
    return 0.1 ** ((epoch >= epochs // 2) + (epoch >= epochs * 3 // 4))


def _parts(
    name: str, load: Callable[[str], Features], config: DomainsConfig, context: EvaluationContext
) -> tuple[Features, Features]:
    """Images to fit on and images to score, as the phase allows.

    Raises:
        ValueError: arrays that are damaged (see ``get_features``), other classes in test, or too few images.
    """
    own = EvaluationContext(load, context.phase, context.seed)
    try:
        train = get_features(own, "train")
        if context.phase == "test":
            parts = train, get_features(own, "test")
        else:
            fit, held_out = stratified_split(train.labels, config.holdout, np.random.default_rng([context.seed, 1]))
            parts = _rows(train, fit), _rows(train, held_out)
    except ValueError as error:
        raise ValueError(f"domains, data set {name!r}: {error}") from error
    fitted, scored = parts
    if fitted.class_names != scored.class_names:
        raise ValueError(f"domains: train and test of data set {name!r} do not have the same class names.")
    unknown = sorted(set(scored.labels.tolist()) - set(fitted.labels.tolist()))
    if unknown:
        raise ValueError(
            f"domains: data set {name!r} has test images of {len(unknown)} classes without training images (first: "
            f"{fitted.class_names[unknown[0]]!r}), which can never be predicted. Use splits stratified by class."
        )
    if len(set(fitted.labels.tolist())) < 2 or max(fitted.class_counts) < 2:
        raise ValueError(
            f"domains: data set {name!r} needs at least 2 classes and a class with at least 2 images to fit on; it has "
            f"{len(fitted.labels)} images of {len(set(fitted.labels.tolist()))} classes. Add images."
        )
    return parts


def _rows(features: Features, rows: np.ndarray) -> Features:
    """Some images."""
    return Features(features.features[rows], features.labels[rows], features.class_names)


def _tune(name: str, train: Features, config: DomainsConfig, context: EvaluationContext) -> _Fit:
    """The point of the grid with the highest accuracy on the part that is held out; of equals the first.

    Raises:
        ValueError: every point diverged.
    """
    fit, held_out = stratified_split(train.labels, config.holdout, np.random.default_rng([context.seed, 2]))
    best, highest = None, -1.0
    for batch_size in config.batch_sizes:
        points = [
            _Fit(batch_size, Setting(rate, decay)) for rate in config.learning_rates for decay in config.weight_decays
        ]
        probes = _fit(train, fit, points, config.tune_epochs, config, context)
        for point, share in zip(
            points, correct_share(probes, train.features[held_out], train.labels[held_out]), strict=True
        ):
            if share > highest:
                best, highest = point, float(share)
    if best is None:
        raise ValueError(f"domains: data set {name!r}: the classifier diverged at every point of the grid; lower it.")
    return best


def _fit(
    train: Features,
    rows: np.ndarray,
    points: Sequence[_Fit],
    epochs: int,
    config: DomainsConfig,
    context: EvaluationContext,
) -> Probes:
    """Linear layers of some points of the grid with one batch size, on some rows."""
    factor = partial(step_factor, epochs=epochs)
    recipe = Recipe(epochs, points[0].batch_size, config.momentum, factor, batch_norm=True, drop_last=True)
    return fit_softmax(
        train.features[rows],
        train.labels[rows],
        len(train.class_names),
        recipe,
        [point.setting for point in points],
        torch.Generator().manual_seed(context.seed),
        context.device,
    )
