"""Linear evaluation on further data sets: the published steps with torch's modules, planted data, wrong data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from evaluation import EvaluationContext, Features, Metric, ModelResult, Phase, Samples, domains
from evaluation.domains import DomainsConfig, step_factor
from evaluation.linear import stratified_split
from evaluation.softmax_sgd import Recipe, Setting
from tests.evaluation.synthetic import clusters, with_labels
from tests.evaluation.test_softmax_sgd import torch_model

PHASES: tuple[Phase, ...] = ("val", "test")
QUICK = DomainsConfig(tune_epochs=3, epochs=6, batch_sizes=(16, 8))


def two_domains(spread: float = 0.1) -> dict[str, dict[str, Features]]:
    return {
        name: {
            split: clusters(num_classes, count, 8, spread=spread, seed=i, centre_seed=num_classes)
            for i, (split, count) in enumerate((("train", 20), ("test", 10)))
        }
        for name, num_classes in (("eurosat", 3), ("dtd", 4))
    }


def context_with(data: Mapping[str, Mapping[str, Features]], phase: Phase = "test", seed: int = 0) -> EvaluationContext:
    """A context that has these data sets and nothing else; a split that is missing is a KeyError."""
    nothing: dict[str, Features] = {}
    return EvaluationContext(
        nothing.__getitem__, phase, seed, domains={name: found.__getitem__ for name, found in data.items()}
    )


def evaluated(context: EvaluationContext, config: DomainsConfig = QUICK):
    """Metrics and samples by name."""
    outputs = list(domains.evaluate(config, context))
    return {o.name: o for o in outputs if isinstance(o, Metric)}, {
        o.name: o.values for o in outputs if isinstance(o, Samples)
    }


def test_separable_classes_reach_100_and_the_mean_is_of_the_data_sets() -> None:
    data = two_domains()
    data["dtd"]["test"] = with_labels(data["dtd"]["test"], (data["dtd"]["test"].labels + 1) % 4)  # all wrong
    metrics, samples = evaluated(context_with(data))
    assert metrics["domains/eurosat/top1"].value == 100
    assert metrics["domains/dtd/top1"].value == 0
    mean = metrics["domains/mean_top1"]
    assert (mean.value, mean.n) == (50, 70)
    halves = [metrics[f"domains/{name}/top1"].ci95 or 0 for name in data]
    assert mean.ci95 == pytest.approx(np.hypot(halves[0], halves[1]) / 2)
    np.testing.assert_array_equal(samples["domains/eurosat/top1"], np.ones(30))
    np.testing.assert_array_equal(samples["domains/dtd/top1"], np.zeros(40))
    assert domains.metric_names(QUICK) == ("domains/mean_top1",)
    assert metrics["domains/dtd/batch_size"].value in (16, 8)


def test_the_whole_protocol_equals_torch_modules() -> None:
    """Tuning on the held-out part with each point of the grid, then the final fit: predictions image by image."""
    data = {
        split: clusters(4, count, 8, spread=2.5, seed=i)
        for i, (split, count) in enumerate({"train": 30, "test": 25}.items())
    }
    metrics, samples = evaluated(context_with({"x": data}))
    train, test = data["train"], data["test"]
    fit, held_out = stratified_split(train.labels, 0.3, np.random.default_rng([0, 2]))

    def share(model, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return (model(torch.from_numpy(features)).argmax(dim=1).numpy() == labels).astype(np.uint8)

    def recipe(epochs: int, size: int) -> Recipe:
        return Recipe(epochs, size, 0.9, lambda epoch: step_factor(epoch, epochs), True, True)

    torch.manual_seed(0)
    scores = {}
    for size in QUICK.batch_sizes:
        for rate in QUICK.learning_rates:
            for decay in QUICK.weight_decays:
                model = torch_model_of(train, fit, recipe(3, size), Setting(rate, decay))
                scores[size, rate, decay] = share(model, train.features[held_out], train.labels[held_out]).mean()
    size, rate, decay = max(scores, key=lambda point: scores[point])
    assert metrics["domains/x/batch_size"].value == size
    assert metrics["domains/x/learning_rate"].value == rate
    assert metrics["domains/x/weight_decay"].value == decay
    model = torch_model_of(train, np.arange(len(train.labels)), recipe(6, size), Setting(rate, decay))
    np.testing.assert_array_equal(samples["domains/x/top1"], share(model, test.features, test.labels))


def torch_model_of(train: Features, rows: np.ndarray, recipe: Recipe, setting: Setting):
    return torch_model(train.features[rows], train.labels[rows], 4, recipe, setting, seed=0)


def test_milestones_of_the_script() -> None:
    assert [step_factor(epoch, 50) for epoch in (0, 24, 25, 36, 37, 49)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert [step_factor(epoch, 20) for epoch in (9, 10, 14, 15)] == pytest.approx([1, 0.1, 0.1, 0.01])


def test_scale_and_offset_of_the_features_do_not_matter() -> None:
    data = {"x": {split: clusters(4, 20, 8, spread=1.5, seed=i) for i, split in enumerate(("train", "test"))}}
    moved = {
        "x": {
            split: dataclasses.replace(found, features=(100 * found.features + 300).astype(np.float32))
            for split, found in data["x"].items()
        }
    }
    first, second = (
        evaluated(context_with(found), DomainsConfig())[0]["domains/x/top1"].value for found in (data, moved)
    )
    assert first == pytest.approx(second, abs=1.5)


def test_phase_val_never_reads_test() -> None:
    data = {name: {"train": found["train"]} for name, found in two_domains().items()}
    metrics, samples = evaluated(context_with(data, "val"))
    assert metrics["domains/mean_top1"].value == 100
    assert len(samples["domains/eurosat/top1"]) == 18  # 30 % of 3 x 20


def test_random_labels_give_chance() -> None:
    rng = np.random.default_rng(0)
    data = {split: clusters(4, 150, 8, spread=1.0, seed=i) for i, split in enumerate(("train", "test"))}
    shuffled = {split: with_labels(found, rng.permutation(found.labels)) for split, found in data.items()}
    metrics, _ = evaluated(context_with({"x": shuffled}))
    assert metrics["domains/x/top1"].value == pytest.approx(25, abs=8)  # 4 standard errors


def test_no_data_sets_is_an_error_that_says_what_to_give() -> None:
    assert domains.splits(QUICK, "test") == ()
    with pytest.raises(ValueError, match="give --domains NAME=URI"):
        evaluated(context_with({}))


def test_constant_dimension_and_zero_vectors_are_allowed() -> None:
    data = two_domains()
    for found in data["dtd"].values():
        found.features[:, 2] = 7
        found.features[:2] = 0
    metrics, _ = evaluated(context_with(data))
    assert metrics["domains/dtd/top1"].value >= 90


def test_wrong_data_is_refused_with_the_name_of_the_data_set() -> None:
    data = two_domains()
    data["dtd"]["train"].features[0, 0] = np.inf
    with pytest.raises(ValueError, match="data set 'dtd': 1 of 80 feature vectors"):
        evaluated(context_with(data))
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    train = Features(x, np.array([0, 0, 1, 1]), ("a", "b", "c"))
    with pytest.raises(ValueError, match=r"1 classes without training images \(first: 'c'\)"):
        evaluated(context_with({"x": {"train": train, "test": with_labels(train, np.array([0, 1, 2, 2]))}}))
    with pytest.raises(ValueError, match="4 images of 1 classes"):
        one = with_labels(train, np.zeros(4, np.int64))
        evaluated(context_with({"x": {"train": one, "test": one}}))
    with pytest.raises(ValueError, match="same class names"):
        evaluated(context_with({"x": {"train": train, "test": dataclasses.replace(train, class_names=("a", "b"))}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rates": ()}, "learning_rates"),
        ({"learning_rates": (0.0,)}, "learning_rates"),
        ({"batch_sizes": (1,)}, "batch_sizes"),
        ({"weight_decays": (-1.0,)}, "weight_decays"),
        ({"epochs": 0}, "epochs=0"),
        ({"holdout": 1.0}, "holdout=1.0"),
    ],
)
def test_wrong_options_are_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        domains.check(dataclasses.replace(QUICK, **changes), "test", {})


def test_models_are_compared_per_data_set() -> None:
    right = {"good": np.ones(50, np.uint8), "bad": (np.arange(50) < 20).astype(np.uint8)}
    models = [
        ModelResult(name, "byol", 5, {}, {"domains/dtd/top1": r, "domains/svhn/top1": r, "knn/top1": r})
        for name, r in right.items()
    ]
    found = {o.name: o.value for o in domains.compare(QUICK, models) if isinstance(o, Metric)}
    assert found["domains/dtd/top1/bad_minus_good"] == pytest.approx(-60)
    assert found["domains/svhn/top1/bad_minus_good"] == pytest.approx(-60)
    assert not any(name.startswith("knn") for name in found)


def test_protocol_is_json() -> None:
    for phase in PHASES:
        assert "transfer_broad" in json.dumps(domains.protocol(DomainsConfig(), phase))
