"""Linear read-off with augmentation: one linear layer trained on random crops of the training images, as published.

The frozen backbone (eval mode, so that BatchNorm does not move) sees a fresh augmented view of every training image in
every epoch; the linear layer learns from these features by one of the recipes in ``linear_recipes.py`` (moco, simsiam,
byol) and is judged on the plain evaluation view after the last epoch, never at the best one. Every parameter and buffer
of the backbone is fingerprinted before and after: a read-off that changed the encoder is an error
(``facebookresearch/moco: main_lincls.py, sanity_check``).

Two things are ours. The learning rate is chosen on validation images from a grid, because MoCo's 30 is meant for its
own unnormalised features and far too large for others, those of supervised pretraining above all, whose grid lies
lower. All rates train in the same passes. And where the training images fill the recipe's batch fewer than 8 times, the
batch shrinks (the learning rate with it, linearly), with a warning: epochs of one or two steps train next to nothing.

    phase "val":  the layers are fitted on 80 % of "train" (stratified), the rate is chosen on the plain views of the
                  other 20 %, and that same layer, which has not seen them, is scored on "val": a refit on all of
                  "train" would double the passes of the backbone.
    phase "test": the layers are fitted on all of "train", chosen on "val", and that same layer is scored on "test".
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.linear import stratified_split
from evaluation.linear_recipes import LINEAR_RECIPES, REFERENCE_BATCH, LinearHeads, LinearRecipe
from evaluation.metric import (
    Artifact,
    ClassCounts,
    EvaluationContext,
    FeatureBatch,
    Features,
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
from image_data.recipes import RECIPES

__all__ = [
    "LinearReadoffConfig",
    "check",
    "compare",
    "evaluate",
    "fit_heads",
    "metric_names",
    "protocol",
    "splits",
    "state_digests",
]

VIEW_BATCH = 256  # images per forward pass of the backbone; the linear layers' batches are put together from these
MIN_STEPS_PER_EPOCH = 8
TOP_K = 5


@dataclass(frozen=True)
class LinearReadoffConfig:
    """Linear read-off on augmented views.

    Attributes:
        recipe: moco (SGD, lr 30, steps at 60 and 80 of 100 epochs), simsiam (LARS, cosine, 90 epochs) or byol
            (Nesterov, cosine, 80 epochs).
        epochs: passes of the backbone over the training images; 0 is the recipe's.
        batch_size: images per step of the linear layer; 0 is the recipe's, or an eighth of the training images where
            that is less.
        learning_rates: the grid, ascending, each for a batch of 256 (scaled linearly with the batch); empty: half
            decades around the recipe's rate, lower for a pretraining with labels. A single one is not chosen but used.
        holdout: share of "train" that chooses the learning rate in phase "val".
        view: recipe of the augmented views; supervised_basic is RandomResizedCrop(0.08, 1) and mirroring.
    """

    recipe: Literal["moco", "simsiam", "byol"] = "moco"
    epochs: int = 0
    batch_size: int = 0
    learning_rates: tuple[float, ...] = ()
    holdout: float = 0.2
    view: str = "supervised_basic"


def metric_names(config: LinearReadoffConfig) -> tuple[str, ...]:
    """Names of the main metrics; ``linear_readoff/top5`` and ``linear_readoff/learning_rate`` are yielded too."""
    return ("linear_readoff/top1",)


def splits(config: LinearReadoffConfig, phase: Phase) -> tuple[str, ...]:
    """Splits that the evaluation reads."""
    return ("train", "val") if phase == "val" else ("train", "val", "test")


def protocol(config: LinearReadoffConfig, phase: Phase) -> dict:
    """Everything needed to reproduce the numbers, as JSON data."""
    recipe = LINEAR_RECIPES[config.recipe]
    choice = {
        "val": (
            f"fitted on {100 - 100 * config.holdout:g} % of train (stratified, seeded), chosen on the plain views of "
            "the rest, that layer is reported"
        ),
        "test": "fitted on train, chosen on val, that layer is reported",
    }[phase]
    rates = config.learning_rates or {use: recipe.rates(use == "with labels") for use in ("without", "with labels")}
    return {
        "name": f"linear read-off on augmented views, recipe {config.recipe}",
        "source": recipe.source,
        "phase": phase,
        "split": phase,
        "fitted_on": "train",
        "features": "pooled backbone output, not normalised; backbone in eval mode, proven unchanged by fingerprints",
        "view": RECIPES[config.view].to_json(),
        "classifier": f"softmax regression, weight decay 0, {config.epochs or recipe.epochs} epochs, last epoch",
        "batch": (
            f"{config.batch_size or recipe.batch_size} images; the training images / {MIN_STEPS_PER_EPOCH} where that "
            "is less and no batch_size is given; never more than the training images"
        ),
        "recipe": asdict(recipe),
        "learning_rate": (
            f"per {REFERENCE_BATCH} images, scaled linearly with the batch; {choice}; of equals the middle one; the "
            "chosen rate is the metric linear_readoff/learning_rate"
        ),
        "learning_rates": rates,
        "metric": "top-1 in percent",
        "interval": "larger side of Wilson's 95 % score interval: spread over images, not over pretraining seeds",
        "config": asdict(config),
    }


def check(config: LinearReadoffConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError where the options or the data do not allow the evaluation; call it before any long work."""
    if config.recipe not in LINEAR_RECIPES:
        raise ValueError(f"linear_readoff got recipe={config.recipe!r}; known: {', '.join(LINEAR_RECIPES)}.")
    if config.view not in RECIPES:
        raise ValueError(
            f"linear_readoff got view={config.view!r}; known: {', '.join(RECIPES)}. The published recipes use "
            "supervised_basic."
        )
    rates = config.learning_rates
    if not all(math.isfinite(r) and r > 0 for r in rates) or list(rates) != sorted(set(rates)):
        raise ValueError(
            f"linear_readoff got learning_rates={rates}; allowed: positive numbers in ascending order, or none for the "
            "recipe's own grid."
        )
    if config.epochs < 0 or config.batch_size < 0 or not 0 < config.holdout < 1:
        raise ValueError(
            f"linear_readoff got epochs={config.epochs}, batch_size={config.batch_size}, holdout={config.holdout}; "
            "allowed: epochs and batch_size at least 1 (0: the recipe's), holdout between 0 and 1."
        )
    check_image_splits("linear_readoff", class_counts, splits(config, phase))
    train = class_counts["train"]
    if sum(count > 0 for count in train) < 2:
        raise ValueError(
            "linear_readoff needs images of at least 2 classes in 'train'; a classifier has no other task."
        )
    if phase == "val" and max(train) < 2:
        raise ValueError(
            "linear_readoff holds out a part of each class of 'train' to choose its learning rate; no class has 2 "
            "images. Add images per class."
        )


def evaluate(config: LinearReadoffConfig, context: EvaluationContext) -> Iterator[Output]:
    """Yield top-1 and (with more than 5 classes) top-5 in percent, the learning rate, and which images are right.

    Raises:
        ValueError: no backbone; impossible options or data; NaN features; every learning rate diverged.
        RuntimeError: the backbone changed.
    """
    if context.backbone is None or context.view_features is None:
        raise ValueError("linear_readoff runs the backbone on augmented views; evaluate a checkpoint, not features.")
    found = {split: get_features(context, split) for split in splits(config, context.phase)}
    check(config, context.phase, {split: features.class_counts for split, features in found.items()})
    train, chosen_on, scored = found["train"], found["val"], found[context.phase]
    fit = np.arange(len(train.labels))
    if context.phase == "val":
        fit, held_out = stratified_split(train.labels, config.holdout, np.random.default_rng(context.seed))
        chosen_on = Features(train.features[held_out], train.labels[held_out], train.class_names)
    rates = config.learning_rates or LINEAR_RECIPES[config.recipe].rates(bool(context.info.get("labels_used")))
    before = state_digests(context.backbone)
    heads = fit_heads(config, context, train, fit, rates)
    _check_unchanged(before, state_digests(context.backbone))
    layer = _choose(heads, rates, chosen_on)
    ranked = _ranking(heads, scored.features, layer)
    right = ranked[:, 0] == scored.labels
    yield accuracy_metric("linear_readoff/top1", ranked[:, 0], scored.labels)
    if heads.num_classes > TOP_K:
        in_top = np.where((ranked == scored.labels[:, None]).any(axis=1), scored.labels, -1)
        yield accuracy_metric("linear_readoff/top5", in_top, scored.labels)
    yield Metric("linear_readoff/learning_rate", rates[layer])
    yield Samples("linear_readoff/top1", right.astype(np.uint8))


def compare(config: LinearReadoffConfig, models: Sequence[ModelResult]) -> Iterator[Metric | Artifact]:
    """Models compared on the same images: McNemar's exact test and the difference's interval."""
    yield from compare_images("linear_readoff/top1", models)


def fit_heads(
    config: LinearReadoffConfig, context: EvaluationContext, train: Features, fit: np.ndarray, rates: tuple[float, ...]
) -> LinearHeads:
    """Train one linear layer per learning rate in the same passes over augmented views.

    Args:
        config: recipe and its changes.
        context: passes of the backbone, seed and device.
        train: plain features of "train"; its labels are compared with those of the passes.
        fit: rows of "train" to train on, ascending; the others are passed over.
        rates: learning rates at 256 images per step (G).
    """
    recipe = LINEAR_RECIPES[config.recipe]
    epochs = config.epochs or recipe.epochs
    batch_size = _batch_size(config, recipe, len(fit))
    steps = math.ceil(len(fit) / batch_size)
    scaled = tuple(rate * batch_size / REFERENCE_BATCH for rate in rates)
    generator = torch.Generator().manual_seed(context.seed)
    dim, num_classes = train.features.shape[1], len(train.class_names)
    heads = LinearHeads(recipe, scaled, dim, num_classes, generator, context.device)
    used = np.zeros(len(train.labels), bool)
    used[fit] = True
    for epoch in range(epochs):
        passed = _checked_pass(config, context, train, epoch)
        for step, (x, y) in enumerate(_batches(passed, used, batch_size)):
            heads.step(x.to(context.device), y.to(context.device), recipe.decay(epoch, step, steps, epochs))
    return heads


def _batch_size(config: LinearReadoffConfig, recipe: LinearRecipe, num_images: int) -> int:
    """Images per step; warns where it is not what was asked for."""
    wanted = config.batch_size or recipe.batch_size
    allowed = num_images if config.batch_size else max(1, num_images // MIN_STEPS_PER_EPOCH)
    if wanted > allowed:
        warnings.warn(
            f"linear_readoff: batches of {wanted:,} images are too large for {num_images:,} training images; the batch "
            f"is {allowed:,} and the learning rate is scaled to it",
            RuntimeWarning,
            stacklevel=2,
        )
    return min(wanted, allowed)


def _checked_pass(
    config: LinearReadoffConfig, context: EvaluationContext, train: Features, epoch: int
) -> Iterator[FeatureBatch]:
    """One shuffled pass over augmented views of "train".

    Raises:
        ValueError: NaN or infinite features; labels or images other than those of the plain pass.
    """
    assert context.view_features is not None
    seen = np.zeros(len(train.labels), bool)
    for batch in context.view_features("train", config.view, epoch=epoch, shuffle=True, batch_size=VIEW_BATCH):
        if not np.isfinite(batch.features).all():
            raise ValueError(
                f"features of augmented views of split 'train' contain NaN or infinity in epoch {epoch + 1}: "
                "pretraining diverged or the checkpoint is damaged. Evaluate an earlier checkpoint."
            )
        known = bool((batch.index < len(seen)).all()) and not seen[batch.index].any()
        if not known or not np.array_equal(train.labels[batch.index], batch.labels):
            raise ValueError(
                f"the augmented pass over 'train' of epoch {epoch + 1} delivered other images than the plain pass: an "
                "index out of range or twice, or another label. Prepare the data again."
            )
        seen[batch.index] = True
        yield batch
    if not seen.all():
        raise ValueError(
            f"the augmented pass over 'train' of epoch {epoch + 1} delivered {int(seen.sum()):,} of {len(seen):,} "
            "images. Prepare the data again."
        )


def _batches(passed: Iterator[FeatureBatch], used: np.ndarray, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Features (B, D) and labels (B,) of the used images in the order of the pass; only the last batch is smaller."""
    kept_x: list[np.ndarray] = []
    kept_y: list[np.ndarray] = []
    waiting = 0
    for batch in passed:
        chosen = used[batch.index]
        kept_x.append(batch.features[chosen])
        kept_y.append(batch.labels[chosen])
        waiting += int(chosen.sum())
        if waiting < batch_size:
            continue
        x, y = np.concatenate(kept_x), np.concatenate(kept_y)
        whole = waiting - waiting % batch_size
        for start in range(0, whole, batch_size):
            part = slice(start, start + batch_size)
            yield torch.from_numpy(x[part]), torch.from_numpy(y[part])
        kept_x, kept_y, waiting = [x[whole:]], [y[whole:]], waiting - whole
    if waiting:
        yield torch.from_numpy(np.concatenate(kept_x)), torch.from_numpy(np.concatenate(kept_y))


def _choose(heads: LinearHeads, rates: tuple[float, ...], features: Features) -> int:
    """The layer that is right most often, of equals the middle one.

    Raises:
        ValueError: every rate diverged.

    Warns:
        RuntimeWarning: the best rate is at an edge of the grid.
    """
    diverged = heads.diverged.cpu().numpy()
    if diverged.all():
        raise ValueError(f"linear_readoff diverged at every learning rate of {rates}; use smaller learning_rates.")
    correct = [
        -1 if gone else int((_ranking(heads, features.features, layer)[:, 0] == features.labels).sum())
        for layer, gone in enumerate(diverged)
    ]
    equals = np.flatnonzero(np.array(correct) == max(correct))
    best = int(equals[(len(equals) - 1) // 2])
    if len(rates) > 1 and best in (0, len(rates) - 1):
        warnings.warn(
            f"linear_readoff: the best learning rate {rates[best]:g} is at the edge of the grid {rates[0]:g} to "
            f"{rates[-1]:g}; set learning_rates so that the best lies inside",
            RuntimeWarning,
            stacklevel=2,
        )
    return best


def _ranking(heads: LinearHeads, x: np.ndarray, layer: int) -> np.ndarray:
    """The classes (N, 5) with the highest scores, best first; fewer columns where there are fewer classes."""
    k = min(TOP_K, heads.num_classes)
    blocks = torch.from_numpy(x).split(8192)
    return torch.cat(
        [heads.scores(b.to(heads.weight.device), layer).topk(k, dim=1).indices.cpu() for b in blocks]
    ).numpy()


def state_digests(module: nn.Module) -> dict[str, str]:
    """SHA-256 of every parameter and buffer, by name; buffers that a state_dict leaves out are included."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {
        name: hashlib.sha256(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()
        for name, t in tensors
    }


def _check_unchanged(before: dict[str, str], after: dict[str, str]) -> None:
    """RuntimeError with the names of what changed."""
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    if changed:
        raise RuntimeError(
            f"linear_readoff changed {len(changed)} of {len(before)} tensors of the backbone (such as "
            f"{min(changed)}): the encoder was not frozen, so the accuracy would not be a linear read-off. Run it in "
            "eval mode and without an optimiser."
        )
