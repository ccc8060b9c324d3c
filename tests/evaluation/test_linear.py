"""Linear probe: against autograd, no leakage into the choice of the learning rate, planted truth."""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from evaluation import Features, linear
from evaluation.linear import LinearConfig, fit_probes, stratified_split
from tests.evaluation.synthetic import clusters, context_of, five_splits, with_labels

COUNTS = {"train": (20, 20), "val": (5, 5), "test": (5, 5)}
QUICK = LinearConfig(epochs=20, batch_size=64)


def autograd_probe(x: np.ndarray, y: np.ndarray, config: LinearConfig, rate: float, seed: int) -> torch.nn.Linear:
    """One probe the plain way: autograd through cross entropy, SGD with momentum, cosine decay per step."""
    x64 = x.astype(np.float64)
    z = torch.from_numpy((x64 - x64.mean(0)) / np.sqrt(x64.var(0) + 1e-5 * x64.var(0).mean())).float()
    layer = torch.nn.Linear(x.shape[1], int(y.max()) + 1)
    velocity = [torch.zeros_like(p) for p in layer.parameters()]
    for p in layer.parameters():
        torch.nn.init.zeros_(p)
    steps_per_epoch = -(-len(x) // config.batch_size)
    generator = torch.Generator().manual_seed(seed)
    step = 0
    for _ in range(config.epochs):
        for rows in torch.randperm(len(x), generator=generator).split(config.batch_size):
            now = rate * (1 + math.cos(math.pi * step / (config.epochs * steps_per_epoch))) / 2
            loss = cross_entropy(layer(z[rows]), torch.from_numpy(y)[rows])
            for p, v, gradient in zip(
                layer.parameters(), velocity, torch.autograd.grad(loss, list(layer.parameters())), strict=True
            ):
                v.copy_(config.momentum * v + gradient)
                p.data -= now * v
            step += 1
    return layer


def test_every_rate_trains_as_alone_by_autograd() -> None:
    features = clusters(4, 25, 12, spread=2.0, seed=0)
    config = LinearConfig(epochs=5, batch_size=32)  # 100 images: the last batch has 4
    rates = (0.01, 0.1, 0.5)
    generator = torch.Generator().manual_seed(7)
    probes = fit_probes(features.features, features.labels, 4, config, rates, generator)
    for i, rate in enumerate(rates):
        layer = autograd_probe(features.features, features.labels, config, rate, seed=7)
        np.testing.assert_allclose(probes.weight[:, i].T, layer.weight.detach(), atol=1e-5, rtol=1e-4)
        np.testing.assert_allclose(probes.bias[i], layer.bias.detach(), atol=1e-5, rtol=1e-4)


def test_prediction_standardises_with_the_training_statistics() -> None:
    train, test = (clusters(4, 25, 12, spread=1.0, seed=s) for s in (0, 1))
    config = LinearConfig(epochs=5, batch_size=32)
    generator = torch.Generator().manual_seed(0)
    probes = fit_probes(train.features, train.labels, 4, config, (0.1,), generator)
    layer = autograd_probe(train.features, train.labels, config, 0.1, seed=0)
    x64 = train.features.astype(np.float64)
    z = (test.features - x64.mean(0)) / np.sqrt(x64.var(0) + 1e-5 * x64.var(0).mean())
    expected = layer(torch.from_numpy(z).float()).argmax(dim=1).numpy()
    np.testing.assert_array_equal(probes.predict(test.features)[:, 0], expected)


def test_stratified_split() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3, 5], [50, 10, 2, 1, 7]))
    fit, held_out = stratified_split(labels, 0.2, np.random.default_rng(0))
    assert not set(fit) & set(held_out)
    assert sorted([*fit, *held_out]) == list(range(len(labels)))
    np.testing.assert_array_equal(np.bincount(labels[held_out], minlength=6), [10, 2, 1, 0, 0, 1])
    again = stratified_split(labels, 0.2, np.random.default_rng(0))[1]
    np.testing.assert_array_equal(held_out, again)
    assert not np.array_equal(held_out, stratified_split(labels, 0.2, np.random.default_rng(1))[1])


@pytest.mark.parametrize("phase", ["val", "test"])
def test_separable_classes_reach_100(phase) -> None:
    splits = five_splits(spread=0.05)
    top1, rate, _ = linear.evaluate(QUICK, context_of(splits, phase))
    assert (top1.name, top1.value, top1.n) == ("linear/top1", 100.0, len(splits[phase].labels))
    assert top1.ci95 is not None
    assert 0 < top1.ci95 < 10
    assert rate.name == "linear/learning_rate"


@pytest.mark.parametrize("phase", ["val", "test"])
def test_samples_are_the_images_that_are_right(phase) -> None:
    splits = five_splits(spread=3.0)
    top1, _, right = linear.evaluate(QUICK, context_of(splits, phase))
    assert right.name == top1.name
    assert right.values.shape == splits[phase].labels.shape
    assert 0 < top1.value < 100
    assert 100 * right.values.mean() == pytest.approx(top1.value)


def test_random_labels_give_chance() -> None:
    splits = {name: clusters(4, 100, 16, spread=1.0, seed=i) for i, name in enumerate(("train", "val"))}
    rng = np.random.default_rng(0)
    shuffled = {name: with_labels(f, rng.permutation(f.labels)) for name, f in splits.items()}
    top1, *_ = linear.evaluate(QUICK, context_of(shuffled, "val"))
    assert top1.value == pytest.approx(25, abs=9)  # 4 standard errors


def test_reported_split_has_no_part_in_fit_or_choice() -> None:
    """Other labels on the reported split change the accuracy but not the rate; in phase test, val labels may."""
    splits = five_splits(spread=2.0, per_class=40)
    for phase in ("val", "test"):
        _, rate, _ = linear.evaluate(QUICK, context_of(splits, phase))
        wrong = with_labels(splits[phase], (splits[phase].labels + 1) % 6)
        poisoned_top1, poisoned_rate, _ = linear.evaluate(QUICK, context_of(splits | {phase: wrong}, phase))
        assert poisoned_rate.value == rate.value
        assert poisoned_top1.value < 20


def test_phase_test_chooses_the_rate_that_is_best_on_val() -> None:
    splits = five_splits(spread=3.0, per_class=40)
    config = LinearConfig(learning_rates=(1e-5, 0.003, 0.03, 0.3), epochs=10, batch_size=64)
    train, val, test = splits["train"], splits["val"], splits["test"]
    generator = torch.Generator().manual_seed(0)
    probes = fit_probes(train.features, train.labels, 6, config, config.learning_rates, generator)
    scores = (probes.predict(val.features) == val.labels[:, None]).sum(axis=0)
    equals = np.flatnonzero(scores == scores.max())
    chosen = equals[(len(equals) - 1) // 2]
    assert chosen not in (0, 3), "the planted data must have its best rate inside the grid"
    top1, rate, _ = linear.evaluate(config, context_of(splits, "test"))
    assert rate.value == config.learning_rates[chosen]
    assert top1.value == pytest.approx(100 * (probes.predict(test.features)[:, chosen] == test.labels).mean())


def chosen_rate(monkeypatch: pytest.MonkeyPatch, grid: tuple[float, ...], correct_of) -> tuple[float, list[float]]:
    """The rate chosen, and all rates fitted, when a rate's probe is right on ``correct_of(rate)`` of 100 images.

    Image i has the feature vector e_i; class 1 is right for all, and a probe scores it above class 0 on the first ones.
    """
    fitted: list[float] = []

    def fake_fit(x, y, num_classes, config, rates, generator, device) -> linear.Probes:
        fitted.extend(rates)
        weight = torch.zeros(100, len(rates), 2)
        for i, rate in enumerate(rates):
            weight[: correct_of(rate), i, 1] = 1
        return linear.Probes(torch.zeros(100), torch.ones(100), weight, torch.zeros(len(rates), 2))

    monkeypatch.setattr(linear, "fit_probes", fake_fit)
    labels = np.ones(100, np.int64)
    labels[-1] = 0  # two classes, so that the data passes the check
    features = Features(np.eye(100, dtype=np.float32), labels, ("a", "b"))
    context = context_of({"train": features, "val": features, "test": features}, "test")
    _, rate, _ = linear.evaluate(LinearConfig(learning_rates=grid), context)
    return rate.value, fitted


@pytest.mark.parametrize(("best", "num_fitted"), [(0.1, 3), (10.0, 6), (0.001, 6), (1000.0, 9)])
def test_grid_grows_towards_the_best_rate(monkeypatch: pytest.MonkeyPatch, best: float, num_fitted: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rate, fitted = chosen_rate(
            monkeypatch, (0.01, 0.1, 1.0), lambda r: round(90 - 4 * abs(math.log10(r) - math.log10(best)))
        )
    assert rate == pytest.approx(best)
    assert len(fitted) == len(set(fitted)) == num_fitted


def test_grid_stops_growing_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(RuntimeWarning, match="edge of the extended grid 0.01 to 1e\\+06"):
        rate, fitted = chosen_rate(monkeypatch, (0.01, 0.1, 1.0), lambda r: round(50 + 4 * math.log10(r)))
    assert rate == pytest.approx(1e6)
    np.testing.assert_allclose(fitted, 10.0 ** np.arange(-2, 7))


def test_of_equal_rates_the_middle_one_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    rate, fitted = chosen_rate(monkeypatch, (0.001, 0.01, 0.1, 1.0, 10.0), lambda r: 80 if r < 5 else 10)
    assert (rate, len(fitted)) == (0.01, 5)


def test_diverged_rates_are_never_chosen() -> None:
    splits = five_splits(spread=0.5)
    config = LinearConfig(learning_rates=(0.01, 0.1, 1e38), epochs=5, batch_size=64)
    top1, rate, _ = linear.evaluate(config, context_of(splits, "test"))
    assert rate.value <= 0.1
    assert top1.value > 95
    train = splits["train"]
    generator = torch.Generator().manual_seed(0)
    probes = fit_probes(train.features, train.labels, 6, config, (1e38,), generator)
    np.testing.assert_array_equal(probes.predict(train.features), -1)


def test_divergence_of_every_rate_is_an_error() -> None:
    hopeless = LinearConfig(learning_rates=(9.9e37, 1e38), epochs=5, batch_size=64)
    with pytest.raises(ValueError, match="diverged at every learning rate"):
        next(linear.evaluate(hopeless, context_of(five_splits(), "test")))


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_feature_scale_does_not_matter(scale: float) -> None:
    """One grid must serve all methods, whose feature norms differ widely."""
    results = []
    for factor in (1.0, scale):
        splits = {
            name: clusters(5, 30, 16, spread=2.0, seed=i, scale=factor) for i, name in enumerate(("train", "val"))
        }
        top1, rate, _ = linear.evaluate(QUICK, context_of(splits, "val"))
        results.append([top1.value, rate.value])
    assert results[1] == pytest.approx(results[0], abs=1.5)


def test_collapsed_features_give_a_constant_prediction() -> None:
    splits = five_splits(num_classes=5)
    collapsed = {name: dataclasses.replace(f, features=np.full_like(f.features, 2)) for name, f in splits.items()}
    with pytest.warns(RuntimeWarning, match="collapsed"):
        top1, *_ = linear.evaluate(QUICK, context_of(collapsed, "val"))
    assert top1.value == 20.0


def test_more_classes_than_one_split_has() -> None:
    """A class of train that val lacks is allowed, the other way round is not."""
    linear.check(LinearConfig(), "val", {"train": (5, 5, 5), "val": (5, 0, 5)})
    with pytest.raises(ValueError, match=r"classes 1 \(label numbers\)"):
        linear.check(LinearConfig(), "val", {"train": (5, 0, 5), "val": (5, 5, 5)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rates": (0.1,)}, "learning_rates"),
        ({"learning_rates": (0.1, 0.01)}, "learning_rates"),
        ({"learning_rates": (0.0, 0.1)}, "learning_rates"),
        ({"learning_rates": (0.1, float("inf"))}, "learning_rates"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"holdout": 1.0}, "holdout=1.0"),
    ],
)
def test_wrong_options_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear.check(dataclasses.replace(LinearConfig(), **changes), "val", COUNTS)


@pytest.mark.parametrize(
    ("counts", "phase", "message"),
    [
        ({"train": (20, 20), "val": (5, 5)}, "test", "split 'test'"),
        ({"train": (20, 20)}, "val", "split 'val'"),
        ({"train": (20, 0), "val": (5, 0)}, "val", "at least 2 classes"),
        ({"train": (1, 1), "val": (5, 5)}, "val", "no class has 2 images"),
    ],
)
def test_impossible_data_is_refused(counts: dict, phase, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear.check(LinearConfig(), phase, counts)
