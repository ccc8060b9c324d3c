"""Linear read-off on augmented views: recipes against torch.optim on the same views, planted truth, frozen proof."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from evaluation import EvaluationContext, Features, Metric, Phase, Samples, linear_readoff, linear_recipes
from evaluation.linear import stratified_split
from evaluation.linear_readoff import LinearReadoffConfig, fit_heads, state_digests
from evaluation.linear_recipes import LINEAR_RECIPES, LinearHeads
from evaluation.metric import FeatureBatch
from tests.evaluation.synthetic import clusters, five_splits, with_labels

COUNTS = {"train": (20, 20), "val": (5, 5), "test": (5, 5)}
QUICK = LinearReadoffConfig("byol", epochs=6, batch_size=32, learning_rates=(0.0003, 0.003, 0.03, 0.3))


class Backbone(nn.Module):
    """Stands in for a network: "images" are vectors, BatchNorm moves when it is in train mode."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def readoff_context(
    images: Mapping[str, Features],
    phase: Phase,
    seed: int = 0,
    backbone: nn.Module | None = None,
    change: Callable[[FeatureBatch], FeatureBatch] = lambda batch: batch,
    labels_used: bool = False,
) -> EvaluationContext:
    """Context whose images are vectors and whose augmentation is noise; a split that is missing is a KeyError."""
    network = backbone or Backbone(images["train"].features.shape[1]).eval()

    @torch.no_grad()
    def run(x: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(x)).numpy()

    def features(split: str) -> Features:
        return dataclasses.replace(images[split], features=run(images[split].features))

    def view_features(
        split: str, recipe: str, *, epoch: int = 0, shuffle: bool = False, batch_size: int = 256
    ) -> Iterator[FeatureBatch]:
        assert (split, recipe, shuffle) == ("train", "supervised_basic", True)
        rng = np.random.default_rng((seed, epoch))
        found = images[split]
        noisy = found.features + 0.1 * rng.normal(size=found.features.shape).astype(np.float32)
        order = rng.permutation(len(noisy))
        for start in range(0, len(order), min(batch_size, 23)):
            rows = order[start : start + min(batch_size, 23)]
            yield change(FeatureBatch(run(noisy[rows]), found.labels[rows], rows))

    info = {"method": "moco_v2", "num_classes": 6, "labels_used": labels_used}
    return EvaluationContext(features, phase, seed, backbone=network, view_features=view_features, info=info)


def published_layer(
    recipe: str, context: EvaluationContext, fit: np.ndarray, rate: float, epochs: int, batch_size: int
) -> nn.Linear:
    """One layer trained as the official scripts do: autograd, torch.optim.SGD, apex' LARC around it."""
    facts = LINEAR_RECIPES[recipe]
    train = context.features("train")
    layer = nn.Linear(train.features.shape[1], len(train.class_names))
    first = facts.first_weight(layer.in_features, layer.out_features, torch.Generator().manual_seed(context.seed))
    layer.weight.data.copy_(first.T)
    layer.bias.data.zero_()
    scaled = rate * batch_size / 256
    optimizer = torch.optim.SGD(layer.parameters(), scaled, momentum=0.9, nesterov=recipe == "byol")
    steps = math.ceil(len(fit) / batch_size)
    for epoch in range(epochs):
        assert context.view_features is not None
        parts = list(context.view_features("train", "supervised_basic", epoch=epoch, shuffle=True))
        index = np.concatenate([part.index for part in parts])
        used = np.isin(index, fit)
        x = torch.from_numpy(np.concatenate([part.features for part in parts])[used])
        y = torch.from_numpy(train.labels[index[used]])
        for step, (rows, labels) in enumerate(zip(x.split(batch_size), y.split(batch_size), strict=True)):
            if recipe == "moco":
                now = scaled * (1 if epoch < 0.6 * epochs else 0.1 if epoch < 0.8 * epochs else 0.01)
            else:
                done = epoch / epochs if recipe == "simsiam" else (epoch * steps + step) / (epochs * steps)
                now = scaled * 0.5 * (1 + math.cos(math.pi * done))
            optimizer.param_groups[0]["lr"] = now
            optimizer.zero_grad()
            cross_entropy(layer(rows), labels).backward()
            for p in layer.parameters():
                assert p.grad is not None
                if recipe == "simsiam" and p.norm() > 0 and p.grad.norm() > 0:
                    p.grad *= 0.001 * p.norm() / (p.grad.norm() + 1e-8)
            optimizer.step()
    return layer


@pytest.mark.parametrize("recipe", LINEAR_RECIPES)
@pytest.mark.parametrize("phase", ["val", "test"])
def test_every_rate_trains_as_alone_with_torch_optim(recipe, phase: Phase) -> None:
    images = five_splits(spread=2.0)
    context = readoff_context(images, phase, seed=3)
    train = context.features("train")
    fit = np.arange(180)
    if phase == "val":
        fit, _ = stratified_split(train.labels, 0.2, np.random.default_rng(3))
    rates = (0.02, 0.5, 12.0)
    config = LinearReadoffConfig(recipe, epochs=5, batch_size=50)  # 180 or 144 images: the last batch is smaller
    heads = fit_heads(config, context, train, fit, rates)
    weight, bias = heads.weight.view(16, 3, 6), heads.bias.view(3, 6)
    for i, rate in enumerate(rates):
        layer = published_layer(recipe, context, fit, rate, 5, 50)
        np.testing.assert_allclose(weight[:, i].T, layer.weight.detach(), atol=2e-5, rtol=2e-4)
        np.testing.assert_allclose(bias[i], layer.bias.detach(), atol=2e-5, rtol=2e-4)


def test_accuracy_and_samples_are_those_of_the_published_layer() -> None:
    images = five_splits(num_classes=8, spread=3.5)
    context = readoff_context(images, "test")
    config = LinearReadoffConfig("moco", epochs=5, batch_size=40, learning_rates=(0.05,))
    top1, top5, rate, right = linear_readoff.evaluate(config, context)
    layer = published_layer("moco", context, np.arange(240), 0.05, 5, 40)
    test = context.features("test")
    order = layer(torch.from_numpy(test.features)).argsort(dim=1, descending=True).numpy()
    assert isinstance(right, Samples)
    np.testing.assert_array_equal(right.values, order[:, 0] == test.labels)
    assert right.name == "linear_readoff/top1"
    assert (top1.name, top1.value) == ("linear_readoff/top1", pytest.approx(100 * right.values.mean()))
    expected = 100 * (order[:, :5] == test.labels[:, None]).any(axis=1).mean()
    assert (top5.name, top5.value) == ("linear_readoff/top5", pytest.approx(expected))
    assert 0 < top1.value < top5.value < 100
    assert isinstance(top1, Metric)
    assert (top1.n, rate) == (len(test.labels), Metric("linear_readoff/learning_rate", 0.05))


def test_schedules_at_named_epochs() -> None:
    moco, simsiam, byol = (LINEAR_RECIPES[name] for name in ("moco", "simsiam", "byol"))
    steps = [moco.decay(epoch, 7, 10, 100) for epoch in (0, 59, 60, 79, 80, 99)]
    np.testing.assert_allclose(steps, [1, 1, 0.1, 0.1, 0.01, 0.01])
    np.testing.assert_allclose([moco.decay(epoch, 0, 10, 5) for epoch in range(5)], [1, 1, 1, 0.1, 0.01])
    optimizer = torch.optim.SGD([torch.zeros(1)], 1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 90)
    for epoch in range(90):
        assert simsiam.decay(epoch, 5, 10, 90) == pytest.approx(schedule.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        schedule.step()
    assert byol.decay(0, 0, 4, 80) == 1
    assert byol.decay(40, 0, 4, 80) == pytest.approx(0.5)
    assert byol.decay(79, 3, 4, 80) == pytest.approx(0.5 * (1 + math.cos(math.pi * 319 / 320)))


def test_first_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = LINEAR_RECIPES["moco"].first_weight(400, 100, generator)
    assert float(normal.std()) == pytest.approx(0.01, rel=0.02)
    cut = LINEAR_RECIPES["byol"].first_weight(400, 100, generator)
    assert float(cut.abs().max()) <= 0.1  # two deviations of 1 / sqrt(400)
    assert float(cut.std()) == pytest.approx(0.05 * 0.8796, rel=0.02)  # a normal cut at two deviations


def test_recipes_as_published() -> None:
    facts = {name: (r.learning_rate, r.batch_size, r.epochs, r.momentum) for name, r in LINEAR_RECIPES.items()}
    assert facts == {"moco": (30, 256, 100, 0.9), "simsiam": (0.1, 4096, 90, 0.9), "byol": (0.2, 1024, 80, 0.9)}
    for recipe in LINEAR_RECIPES.values():
        for labels_used in (False, True):
            rates = recipe.rates(labels_used)
            assert len(rates) >= 9
            assert rates[-1] / rates[0] >= 0.999e4
            assert any(rate == pytest.approx(recipe.learning_rate) for rate in rates) or labels_used
        assert recipe.rates(True)[0] < recipe.rates(False)[0]


def test_blocks_of_a_batch_give_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    images = five_splits(spread=2.0)
    config = LinearReadoffConfig("simsiam", epochs=3, batch_size=60)
    heads = []
    for scores in (1 << 24, 12 * 7):  # whole batches; 7 images at a time
        monkeypatch.setattr(linear_recipes, "MAX_SCORES", scores)
        context = readoff_context(images, "test")
        heads.append(fit_heads(config, context, context.features("train"), np.arange(180), (0.5, 5.0)))
    np.testing.assert_allclose(heads[0].weight, heads[1].weight, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(heads[0].bias, heads[1].bias, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recipe", LINEAR_RECIPES)
@pytest.mark.parametrize("phase", ["val", "test"])
@pytest.mark.parametrize("labels_used", [False, True])
@pytest.mark.filterwarnings("ignore:linear_readoff. the best learning rate")
def test_separable_classes_reach_100_with_the_recipes_own_grid(recipe, phase: Phase, labels_used: bool) -> None:
    images = five_splits(num_classes=4, spread=0.05)
    config = LinearReadoffConfig(recipe, epochs=15, batch_size=16)
    top1, rate, right = linear_readoff.evaluate(config, readoff_context(images, phase, labels_used=labels_used))
    assert (top1.value, top1.n) == (100.0, len(images[phase].labels))
    assert top1.ci95 is not None
    assert 0 < top1.ci95 < 10
    assert any(rate.value == pytest.approx(r) for r in LINEAR_RECIPES[recipe].rates(labels_used))
    assert right.values.all()


@pytest.mark.filterwarnings("ignore:linear_readoff. the best learning rate")
def test_random_labels_give_chance() -> None:
    images = {name: clusters(4, 100, 16, spread=1.0, seed=i) for i, name in enumerate(("train", "val"))}
    rng = np.random.default_rng(0)
    shuffled = {name: with_labels(f, rng.permutation(f.labels)) for name, f in images.items()}
    top1, *_ = linear_readoff.evaluate(QUICK, readoff_context(shuffled, "val"))
    assert top1.value == pytest.approx(25, abs=9)  # 4 standard errors


@pytest.mark.filterwarnings("ignore:linear_readoff. the best learning rate")
def test_phase_val_reads_train_and_val_only() -> None:
    images = five_splits(spread=1.0)
    context = readoff_context({name: images[name] for name in ("train", "val")}, "val")  # "test" is a KeyError
    top1, *_ = linear_readoff.evaluate(QUICK, context)
    assert top1.n == len(images["val"].labels)
    assert linear_readoff.splits(QUICK, "val") == ("train", "val")
    assert linear_readoff.splits(QUICK, "test") == ("train", "val", "test")


@pytest.mark.parametrize("phase", ["val", "test"])
@pytest.mark.filterwarnings("ignore:linear_readoff. the best learning rate")
def test_reported_split_has_no_part_in_fit_or_choice(phase: Phase) -> None:
    images = five_splits(spread=2.0, per_class=40)
    rate = next(m for m in linear_readoff.evaluate(QUICK, readoff_context(images, phase)) if "rate" in m.name)
    wrong = with_labels(images[phase], (images[phase].labels + 1) % 6)
    poisoned = list(linear_readoff.evaluate(QUICK, readoff_context(images | {phase: wrong}, phase)))
    assert rate in poisoned
    assert poisoned[0].value < 20


def test_held_out_images_are_not_trained_on() -> None:
    images = five_splits(spread=1.0)
    fit, held_out = stratified_split(images["train"].labels, 0.2, np.random.default_rng(0))

    def spoil(batch: FeatureBatch) -> FeatureBatch:
        held = np.isin(batch.index, held_out)
        return batch._replace(features=np.where(held[:, None], 1e3, batch.features).astype(np.float32))

    weights = []
    for change in (lambda batch: batch, spoil):
        context = readoff_context(images, "val", change=change)
        weights.append(fit_heads(QUICK, context, context.features("train"), fit, (0.03,)).weight)
    assert torch.equal(*weights)


def test_phase_test_chooses_on_val() -> None:
    images = five_splits(spread=2.5)
    config = dataclasses.replace(QUICK, learning_rates=(1e-6, 0.01, 0.1, 2e39))
    context = readoff_context(images, "test")
    heads = fit_heads(config, context, context.features("train"), np.arange(180), config.learning_rates)
    val = context.features("val")
    scores = [heads.scores(torch.from_numpy(val.features), i).argmax(dim=1).numpy() for i in range(4)]
    correct = np.array([(predicted == val.labels).sum() for predicted in scores])
    best = np.flatnonzero(correct == correct.max())
    chosen = best[(len(best) - 1) // 2]
    assert chosen in (1, 2), "the planted data must have its best rate inside the grid"
    found = {m.name: m for m in linear_readoff.evaluate(config, context) if isinstance(m, Metric)}
    assert found["linear_readoff/learning_rate"].value == config.learning_rates[chosen]


@pytest.mark.filterwarnings("ignore:linear_readoff. the best learning rate")
def test_diverged_rates_are_never_chosen() -> None:
    config = dataclasses.replace(QUICK, learning_rates=(0.01, 0.1, 2e39))  # float32 ends at 3.4e38
    found = list(linear_readoff.evaluate(config, readoff_context(five_splits(), "test")))
    assert found[0].value > 95
    assert next(m for m in found if "rate" in m.name).value <= 0.1


@pytest.mark.parametrize("label", range(3))
@pytest.mark.filterwarnings("ignore:linear_readoff. the best learning rate")
def test_a_diverged_rate_does_not_win_by_luck(label: int) -> None:
    """Whatever class NaN scores seem to name, and though the other layer is wrong on every image."""
    heads = LinearHeads(LINEAR_RECIPES["moco"], (0.1, 0.2), 4, 3, torch.Generator())
    heads.weight.zero_()
    heads.bias[(label + 1) % 3] = 1  # layer 0 names another class
    heads.weight[2, 4] = torch.nan  # layer 1
    heads.bias[3:] = torch.nan
    assert heads.diverged.tolist() == [False, True]
    always = Features(np.ones((5, 4), np.float32), np.full(5, label), ("a", "b", "c"))
    assert linear_readoff._choose(heads, (0.1, 0.2), always) == 0


def test_divergence_of_every_rate_is_an_error() -> None:
    hopeless = dataclasses.replace(QUICK, learning_rates=(1.9e39, 2e39))
    with pytest.raises(ValueError, match="diverged at every learning rate"):
        next(linear_readoff.evaluate(hopeless, readoff_context(five_splits(), "test")))


def test_best_rate_at_the_edge_warns() -> None:
    config = dataclasses.replace(QUICK, learning_rates=(1e-9, 1e-8, 0.05))
    with pytest.warns(RuntimeWarning, match="edge of the grid 1e-09 to 0.05"):
        list(linear_readoff.evaluate(config, readoff_context(five_splits(), "test")))


@pytest.mark.parametrize(
    ("recipe", "batch_size", "expected"), [("simsiam", 0, 22), ("moco", 500, 180), ("byol", 30, 30), ("moco", 0, 22)]
)
def test_batches_that_are_too_large_shrink_with_a_warning(recipe, batch_size: int, expected: int) -> None:
    sizes: set[int] = set()

    class Watched(LinearHeads):
        def step(self, x: Tensor, targets: Tensor, decay: float) -> None:
            sizes.add(len(x))
            super().step(x, targets, decay)

    context = readoff_context(five_splits(), "test")
    config = LinearReadoffConfig(recipe, epochs=1, batch_size=batch_size)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(linear_readoff, "LinearHeads", Watched)
        heads = fit_heads(config, context, context.features("train"), np.arange(180), (2.0,))
    assert sizes <= {expected, 180 % expected}
    assert expected in sizes
    assert float(heads.rates[0]) == pytest.approx(2.0 * expected / 256)
    assert [str(w.message) for w in caught if "too large for 180" in str(w.message)] == [str(w.message) for w in caught]
    assert bool(caught) == (expected != batch_size)


def test_a_backbone_that_moves_is_an_error() -> None:
    network = Backbone(16).train()
    with pytest.raises(RuntimeError, match=r"changed 3 of 6 tensors of the backbone \(such as norm\.num_bat"):
        next(linear_readoff.evaluate(QUICK, readoff_context(five_splits(), "val", backbone=network)))


def test_digests_see_every_parameter_and_buffer() -> None:
    network = Backbone(4).eval()
    before = state_digests(network)
    network(torch.randn(3, 4))
    assert state_digests(network) == before
    with torch.no_grad():
        network.norm.weight[2] += 1e-7
    network.get_buffer("calls").add_(1)
    after = state_digests(network)
    assert {name for name in before if before[name] != after[name]} == {"norm.weight", "calls"}


@pytest.mark.filterwarnings("ignore:linear_readoff. the best learning rate")
def test_same_seed_same_numbers_and_other_seed_others() -> None:
    images = five_splits(spread=3.0)

    def weights(seed: int) -> Tensor:
        context = readoff_context(images, "test", seed)
        return fit_heads(QUICK, context, context.features("train"), np.arange(180), (0.03,)).weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    first, second = (list(linear_readoff.evaluate(QUICK, readoff_context(images, "val"))) for _ in range(2))
    assert first[:-1] == second[:-1]
    np.testing.assert_array_equal(first[-1].values, second[-1].values)


def test_labels_of_pretraining_choose_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[float, ...]] = []

    def stop(config, context, train, fit, rates) -> LinearHeads:
        tried.append(rates)
        raise InterruptedError

    monkeypatch.setattr(linear_readoff, "fit_heads", stop)
    for labels_used in (False, True):
        with pytest.raises(InterruptedError):
            next(
                linear_readoff.evaluate(
                    LinearReadoffConfig(), readoff_context(five_splits(), "val", labels_used=labels_used)
                )
            )
    np.testing.assert_allclose([rates[0] for rates in tried], [0.03, 0.0003])
    np.testing.assert_allclose([rates[-1] for rates in tried], [300, 3])


def spoiled(**changes: Callable[[np.ndarray], np.ndarray]) -> Callable[[FeatureBatch], FeatureBatch]:
    """Change of some arrays of every batch."""
    return lambda batch: batch._replace(**{key: change(getattr(batch, key)) for key, change in changes.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoiled(features=lambda x: np.where(x > 1.5, np.nan, x)), "contain NaN or infinity in epoch 1"),
        (spoiled(labels=lambda y: (y + 1) % 6), "other images than the plain pass"),
        (spoiled(index=lambda i: i + 1), "other images than the plain pass"),
        (spoiled(index=lambda i: np.zeros_like(i), labels=lambda y: np.full_like(y, 3)), "other images"),
    ],
)
def test_damaged_passes_are_errors(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(linear_readoff.evaluate(QUICK, readoff_context(five_splits(), "test", change=change)))


def test_missing_images_of_a_pass_are_an_error() -> None:
    def shorter(batch: FeatureBatch) -> FeatureBatch:
        return FeatureBatch(batch.features[:-1], batch.labels[:-1], batch.index[:-1])

    with pytest.raises(ValueError, match="of epoch 1 delivered 172 of 180 images"):
        next(linear_readoff.evaluate(QUICK, readoff_context(five_splits(), "test", change=shorter)))


def test_features_alone_are_not_enough() -> None:
    context = EvaluationContext(five_splits().__getitem__, "val")
    with pytest.raises(ValueError, match="evaluate a checkpoint"):
        next(linear_readoff.evaluate(QUICK, context))


def test_collapsed_backbone_gives_a_constant_prediction() -> None:
    images = {name: dataclasses.replace(f, features=np.zeros_like(f.features)) for name, f in five_splits(4).items()}
    network = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Threshold(1e9, 1.0)).eval()
    with pytest.warns(RuntimeWarning, match="collapsed"):
        top1, *_ = linear_readoff.evaluate(QUICK, readoff_context(images, "val", backbone=network))
    assert top1.value == 25.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "cmc"}, "known: moco, simsiam, byol"),
        ({"view": "none"}, "supervised_basic"),
        ({"learning_rates": (0.1, 0.01)}, "ascending"),
        ({"learning_rates": (0.0, 0.1)}, "positive"),
        ({"learning_rates": (0.1, float("nan"))}, "positive"),
        ({"epochs": -1}, "epochs=-1"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"holdout": 0.0}, "holdout=0.0"),
    ],
)
def test_wrong_options_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_readoff.check(dataclasses.replace(LinearReadoffConfig(), **changes), "val", COUNTS)


@pytest.mark.parametrize(
    ("counts", "phase", "message"),
    [
        ({"train": (20, 20), "val": (5, 5)}, "test", "split 'test'"),
        ({"train": (20, 0), "val": (5, 0)}, "val", "at least 2 classes"),
        ({"train": (1, 1), "val": (5, 5)}, "val", "no class has 2"),
        ({"train": (5, 0), "val": (5, 5)}, "val", "can never be predicted"),
    ],
)
def test_impossible_data_is_refused(counts: dict, phase: Phase, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_readoff.check(LinearReadoffConfig(), phase, counts)


@pytest.mark.parametrize("recipe", LINEAR_RECIPES)
def test_protocol_is_json(recipe) -> None:
    stored = json.loads(json.dumps(linear_readoff.protocol(LinearReadoffConfig(recipe), "val")))
    assert stored["recipe"]["learning_rate"] == LINEAR_RECIPES[recipe].learning_rate
    assert [step["step"] for step in stored["view"]["steps"]] == ["random_resized_crop", "horizontal_flip"]
    assert tuple(stored["learning_rates"]["with labels"]) == LINEAR_RECIPES[recipe].rates(True)
