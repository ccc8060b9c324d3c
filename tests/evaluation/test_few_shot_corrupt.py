"""Damaged features in all few-shot protocols: refused where they have no meaning, handled as documented elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest

from evaluation import EvaluationContext, Features, Metric, few_shot, few_shot_augmented, few_shot_finetune
from evaluation.few_shot import FewShotConfig
from evaluation.few_shot_augmented import FewShotRfsConfig
from evaluation.few_shot_finetune import FewShotFinetuneConfig
from evaluation.metric import FeatureBatch
from tests.evaluation.synthetic import clusters

FINETUNE = FewShotFinetuneConfig(
    num_tasks=10, num_search_tasks=6, epochs=10, learning_rates=(0.001, 0.01, 0.1, 1.0), base_accuracy=False
)
PROTOCOLS = {
    "few_shot": (few_shot, FewShotConfig(num_tasks=10)),
    "few_shot_rfs": (few_shot_augmented, FewShotRfsConfig(num_tasks=10, copies=2)),
    "few_shot_finetune": (few_shot_finetune, FINETUNE),
}
everywhere = pytest.mark.parametrize("task", PROTOCOLS)


def run(task: str, features: Features) -> dict[str, float]:
    """Accuracies; the augmented views are the plain images."""

    def views(
        split: str, recipe: str, *, epoch: int = 0, shuffle: bool = False, batch_size: int = 256
    ) -> Iterator[FeatureBatch]:
        yield FeatureBatch(features.features, features.labels, np.arange(len(features.labels)))

    module, config = PROTOCOLS[task]
    context = EvaluationContext({"val_classes": features}.__getitem__, "val", view_features=views)
    outputs = module.evaluate(config, context)
    return {m.name: m.value for m in outputs if isinstance(m, Metric) and m.name.endswith("acc")}


def good(spread: float = 0.3) -> Features:
    return clusters(6, 25, 16, spread=spread, seed=1)


@everywhere
def test_nan_and_infinity_are_refused_with_their_row(task: str) -> None:
    for value in (np.nan, np.inf):
        features = good()
        features.features[11, 3] = value
        with pytest.raises(ValueError, match=r"1 of 150 feature vectors .* NaN or infinity \(first: row 11\)"):
            run(task, features)


@everywhere
def test_a_class_with_too_few_images_is_named(task: str) -> None:
    features = good()
    keep = np.flatnonzero((features.labels != 2) | (np.cumsum(features.labels == 2) <= 4))
    small = dataclasses.replace(features, features=features.features[keep], labels=features.labels[keep])
    with pytest.raises(ValueError, match=rf"^{task} needs 20 images per class .*images\): 2 \(4\)\. Lower"):
        run(task, small)


@everywhere
def test_too_few_classes(task: str) -> None:
    with pytest.raises(ValueError, match=f"^{task} needs at least 5 classes in split 'val_classes'"):
        run(task, clusters(4, 25, 16, spread=0.3, seed=1))


@everywhere
@pytest.mark.filterwarnings("ignore:few_shot_finetune, . shot. the best learning rate")
def test_constant_dimensions_and_a_width_of_one_are_results(task: str) -> None:
    """Constant dimensions carry nothing and break nothing; one dimension cannot tell unit-length features apart."""
    features = good()
    with_constants = np.concatenate([features.features, np.full((150, 3), 0.5, np.float32)], axis=1)
    assert min(run(task, dataclasses.replace(features, features=with_constants)).values()) > 85
    positive = np.abs(features.features[:, :1]) + 0.1
    for accuracy in run(task, dataclasses.replace(features, features=positive)).values():
        assert 0 <= accuracy <= 80


@everywhere
@pytest.mark.filterwarnings("ignore:few_shot_finetune, . shot. the best learning rate")
def test_zero_vectors_stay_zero_and_the_rest_is_still_classified(task: str) -> None:
    features = good()
    features.features[::10] = 0
    if task == "few_shot_finetune":  # nothing is normalised
        found = run(task, features)
    else:
        with pytest.warns(RuntimeWarning, match="feature vectors of split 'val_classes' are zero and stay zero"):
            found = run(task, features)
    assert 60 < min(found.values()) <= max(found.values()) < 99


@everywhere
@pytest.mark.filterwarnings("ignore:few_shot_finetune, . shot. the best learning rate")
def test_collapsed_features_are_at_chance_with_a_warning(task: str) -> None:
    features = good()
    features.features[:] = 0.25
    with pytest.warns(RuntimeWarning, match="the backbone has collapsed"):
        found = run(task, features)
    assert list(found.values()) == [20.0, 20.0]
