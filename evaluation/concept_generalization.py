"""Concept generalization: how well a linear classifier tells apart classes that pretraining never saw.

Protocol of ImageNet-CoG (Sariyildiz et al., ICCV 2021; ``naver/cog: logreg.py, configs/default.py, feature_ops.py``) on
frozen, L2-normalised features: softmax regression, SGD with momentum 0.9, batch 1024, 100 epochs, learning rate decayed
by a cosine per epoch. Learning rate in [0.1, 100] and weight decay in [1e-12, 1e-4], both on a log scale, are tuned by
30 trials of Optuna's multivariate TPE sampler on 20 % of each class's training images; then the classifier is fitted
anew on all training images and the last epoch is scored on test images.

What differs: the weights start at zero instead of at random. The images of an unseen class are divided here, seeded,
into training and test images (CoG has 1.1 million training images of its own). CoG's five levels, classes ever further
from those of pretraining, are a choice of data, not of this task: name the classes of one level in the data URI
(``novel_classes=...``) and evaluate once per level. SL-MLP's split of ImageNet's classes along WordNet is another such
choice.

    phase "val":  classes of split "val_classes".
    phase "test": classes of split "novel_classes".
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch

from evaluation.feature_blocks import unit_rows
from evaluation.linear import Probes, stratified_split
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
    get_features,
)
from evaluation.paired_images import compare_images
from evaluation.softmax_sgd import Recipe, Setting, correct_share, fit_softmax

__all__ = [
    "ConceptGeneralizationConfig",
    "check",
    "compare",
    "cosine_factor",
    "evaluate",
    "metric_names",
    "protocol",
    "splits",
]

TOP1 = "concept_generalization/top1"
SPLITS: dict[Phase, str] = {"val": "val_classes", "test": "novel_classes"}
STARTUP_TRIALS = 10  # of TPESampler: drawn at random, so they can be fitted at once


@dataclass(frozen=True)
class ConceptGeneralizationConfig:
    """Linear classifier on classes that pretraining never saw.

    Attributes:
        trials: settings of learning rate and weight decay that Optuna tries.
        min_learning_rate: lower end of the learning rate.
        max_learning_rate: upper end.
        min_weight_decay: lower end of the weight decay.
        max_weight_decay: upper end.
        epochs: passes over the training features.
        batch_size: images per SGD step.
        momentum: momentum of SGD.
        holdout: share of each class's training images that tunes.
        test_share: share of each class's images that is scored and never tuned or fitted on.
    """

    trials: int = 30
    min_learning_rate: float = 0.1
    max_learning_rate: float = 100.0
    min_weight_decay: float = 1e-12
    max_weight_decay: float = 1e-4
    epochs: int = 100
    batch_size: int = 1024
    momentum: float = 0.9
    holdout: float = 0.2
    test_share: float = 0.5


def metric_names(config: ConceptGeneralizationConfig) -> tuple[str, ...]:
    """Names of the main metrics; the chosen learning rate and weight decay are yielded too."""
    return (TOP1,)


def splits(config: ConceptGeneralizationConfig, phase: Phase) -> tuple[str, ...]:
    """Splits that the evaluation reads."""
    return (SPLITS[phase],)


def protocol(config: ConceptGeneralizationConfig, phase: Phase) -> dict:
    """Everything needed to reproduce the numbers, as JSON data."""
    return {
        "name": "concept generalization: logistic regression on unseen classes",
        "source": "Sariyildiz et al., ICCV 2021 (ImageNet-CoG); naver/cog: logreg.py, configs/default.py",
        "phase": phase,
        "split": SPLITS[phase],
        "division": (
            f"{100 * config.test_share:g} % of each class's images (seeded, rounded, at least one) are scored; the "
            "rest trains"
        ),
        "features": "pooled backbone output, one view per image, L2-normalised (a zero vector stays zero)",
        "classifier": (
            f"softmax regression from zero, SGD momentum {config.momentum:g}, batch {config.batch_size} (the whole set "
            f"where smaller), {config.epochs} epochs, cosine per epoch as in the code (the first two at the full "
            "rate), last epoch"
        ),
        "tuning": (
            f"{config.trials} trials of Optuna's multivariate TPE sampler: learning rate "
            f"{config.min_learning_rate:g} to {config.max_learning_rate:g} and weight decay "
            f"{config.min_weight_decay:g} to {config.max_weight_decay:g}, log scale, by accuracy on "
            f"{100 * config.holdout:g} % of the training images (stratified); refit on all of them"
        ),
        "metric": "top-1 in percent",
        "interval": "larger side of Wilson's 95 % score interval: spread over images, not over pretraining seeds",
        "config": asdict(config),
    }


def check(config: ConceptGeneralizationConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError where the options or the data do not allow the evaluation; call it before any long work."""
    _check_options(config)
    split = SPLITS[phase]
    counts = [count for count in class_counts.get(split, ()) if count]
    if len(counts) < 2:
        present = ", ".join(name for name in class_counts if sum(class_counts[name])) or "none"
        raise ValueError(
            f"concept_generalization needs at least 2 classes with images in split {split!r}, it has {len(counts)}; "
            f"the data has: {present}. Give classes that pretraining does not see ({split}=... in the data URIs)."
        )
    too_few = [c for c, count in enumerate(class_counts[split]) if count in (1, 2)]
    if too_few:
        raise ValueError(
            f"concept_generalization needs at least 3 images per class of split {split!r}: one to fit, one to tune and "
            f"one to score; {len(too_few)} classes have fewer (label numbers {', '.join(map(str, too_few[:8]))}). Add "
            "images or drop the classes."
        )


def _check_options(config: ConceptGeneralizationConfig) -> None:
    """ValueError for options out of range."""
    for name in ("learning_rate", "weight_decay"):
        low, high = getattr(config, f"min_{name}"), getattr(config, f"max_{name}")
        if not 0 < low <= high < math.inf:
            raise ValueError(
                f"concept_generalization got min_{name}={low}, max_{name}={high}; allowed: positive numbers, the first "
                "not above the second (they are searched on a log scale)."
            )
    if min(config.trials, config.epochs, config.batch_size) < 1 or not 0 <= config.momentum < 1:
        raise ValueError(
            f"concept_generalization got trials={config.trials}, epochs={config.epochs}, batch_size="
            f"{config.batch_size}, momentum={config.momentum}; allowed: at least 1 each, momentum in [0, 1)."
        )
    if not (0 < config.holdout < 1 and 0 < config.test_share < 1):
        raise ValueError(
            f"concept_generalization got holdout={config.holdout}, test_share={config.test_share}; allowed: shares "
            "between 0 and 1."
        )


def evaluate(config: ConceptGeneralizationConfig, context: EvaluationContext) -> Iterator[Output]:
    """Yield top-1 in percent with its interval, the chosen setting, and which images are right."""
    split = SPLITS[context.phase]
    found = get_features(context, split)
    check(config, context.phase, {split: found.class_counts})
    x, y, num_classes = unit_rows(found.features, split), found.labels, len(found.class_names)
    rng = np.random.default_rng(context.seed)
    train, test = stratified_split(y, config.test_share, rng)
    fit, tune = (train[part] for part in stratified_split(y[train], config.holdout, rng))
    recipe = Recipe(config.epochs, config.batch_size, config.momentum, partial(cosine_factor, epochs=config.epochs))

    def probes(rows: np.ndarray, settings: Sequence[Setting]) -> Probes:
        generator = torch.Generator().manual_seed(context.seed)  # the same batches for every setting
        return fit_softmax(x[rows], y[rows], num_classes, recipe, settings, generator, context.device)

    def score(settings: Sequence[Setting]) -> np.ndarray:
        return correct_share(probes(fit, settings), x[tune], y[tune])

    chosen = _tune(config, context.seed, score)
    predicted = probes(train, (chosen,)).predict(x[test])[:, 0]
    yield accuracy_metric(TOP1, predicted, y[test])
    yield Metric("concept_generalization/learning_rate", chosen.learning_rate)
    yield Metric("concept_generalization/weight_decay", chosen.weight_decay)
    yield Samples(TOP1, (predicted == y[test]).astype(np.uint8))


def compare(config: ConceptGeneralizationConfig, models: Sequence[ModelResult]) -> Iterator[Metric | Artifact]:
    """Models compared on the same images."""
    yield from compare_images(TOP1, models)


def cosine_factor(epoch: int, epochs: int) -> float:
    """Factor of the learning rate: CoG's code sets the rate after each epoch from that epoch's number."""
    return 0.5 * (1 + math.cos(math.pi * max(epoch - 1, 0) / epochs))


def _tune(config: ConceptGeneralizationConfig, seed: int, score: Callable[[Sequence[Setting]], np.ndarray]) -> Setting:
    """The setting with the highest score, of equals the first; ``score`` maps settings to shares, -1 where diverged.

    Raises:
        ValueError: every setting diverged.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # multivariate, as in CoG
        sampler = optuna.samplers.TPESampler(multivariate=True, n_startup_trials=STARTUP_TRIALS, seed=seed)
    study = optuna.create_study(sampler=sampler, direction="maximize")
    done = 0
    while done < config.trials:
        at_once = min(STARTUP_TRIALS, config.trials) if done == 0 else 1  # each later one needs all results before it
        trials = [study.ask() for _ in range(at_once)]
        settings = [
            Setting(
                trial.suggest_float("lr", config.min_learning_rate, config.max_learning_rate, log=True),
                trial.suggest_float("wd", config.min_weight_decay, config.max_weight_decay, log=True),
            )
            for trial in trials
        ]
        for trial, value in zip(trials, score(settings), strict=True):
            study.tell(trial, float(value))
        done += at_once
    if study.best_value < 0:
        raise ValueError(
            "concept_generalization: the classifier diverged at every learning rate that was tried; lower "
            "min_learning_rate and max_learning_rate."
        )
    return Setting(study.best_params["lr"], study.best_params["wd"])
