"""Classifiers trained together against one nn.Linear and torch.optim.SGD per task, step for step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evaluation import few_shot_sgd
from evaluation.episodes import Episodes, sample_episodes
from evaluation.few_shot_sgd import SgdSettings, correct_queries, draw_tasks, query_scores
from tests.evaluation.synthetic import clusters

CHEN = SgdSettings(epochs=100, batch_size=4, momentum=0.9, dampening=0.9, weight_decay=0.001)
KEY = (7, 5)


def tasks(ways: int = 5, shots: int = 5, num_tasks: int = 2, dim: int = 12) -> tuple[Tensor, Episodes]:
    features = clusters(8, 20, dim, spread=2.0, seed=3)
    options = {"num_ways": ways, "num_shots": shots, "num_queries": 6, "num_classes": 8}
    return torch.tensor(features.features), sample_episodes(features.labels, num_tasks=num_tasks, seed=0, **options)


def train_one(x: Tensor, y: Tensor, draws: few_shot_sgd.TaskDraws, rate: float, settings: SgdSettings) -> nn.Linear:
    """The reference: Chen et al.'s loop for one task."""
    layer = nn.Linear(x.shape[1], draws.weight.shape[1]).to(x.dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(draws.weight[0]))
        layer.bias.copy_(torch.from_numpy(draws.bias[0]))
    optimizer = torch.optim.SGD(
        layer.parameters(),
        lr=rate,
        momentum=settings.momentum,
        dampening=settings.dampening,
        weight_decay=settings.weight_decay,
    )
    for order in torch.from_numpy(draws.order[0]):
        for batch in order.split(settings.batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(x[batch]), y[batch]).backward()
            optimizer.step()
    return layer


@pytest.mark.parametrize(
    ("ways", "shots", "rates", "settings"),
    [
        (5, 1, (0.1,), CHEN),
        (5, 5, (0.01, 1.0), CHEN._replace(epochs=15)),
        (3, 4, (0.003, 0.1, 2.0), SgdSettings(7, 5, momentum=0.5, dampening=0.0, weight_decay=0.1)),
        (2, 2, (0.003, 0.1, 2.0), SgdSettings(4, 100, momentum=0.0, dampening=0.0, weight_decay=0.0)),
    ],
)
def test_scores_equal_torch_sgd_per_task(
    ways: int, shots: int, rates: tuple[float, ...], settings: SgdSettings
) -> None:
    x, episodes = tasks(ways, shots)
    x = x.double()
    ours = torch.cat(list(query_scores(x, episodes, rates, settings, KEY)))
    labels = torch.arange(ways).repeat_interleave(shots)
    for task in range(len(episodes.support)):
        draws = draw_tasks(KEY, range(task, task + 1), ways, ways * shots, x.shape[1], settings.epochs)
        support = x[episodes.support[task].reshape(-1)]
        for i, rate in enumerate(rates):
            layer = train_one(support, labels, draws, rate, settings)
            expected = layer(x[episodes.query[task].reshape(-1)]).detach()
            assert expected.std() > 0.1
            np.testing.assert_allclose(ours[task, ..., i], expected, rtol=1e-7, atol=1e-7 * float(expected.abs().max()))


def test_float32_decides_as_float64() -> None:
    x, episodes = tasks(num_tasks=60)
    rates = (0.01, 0.1)
    counts = [correct_queries(features, episodes, rates, CHEN, KEY) for features in (x, x.double())]
    assert (counts[0] != counts[1]).mean() < 0.02
    assert counts[0].min() >= 0


def test_blocks_of_tasks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, episodes = tasks(num_tasks=7)
    settings = CHEN._replace(epochs=3)
    whole = correct_queries(x, episodes, (0.1,), settings, KEY)
    monkeypatch.setattr(few_shot_sgd, "BLOCK_FLOATS", 4000)
    parts = list(query_scores(x, episodes, (0.1,), settings, KEY))
    assert len(parts) > 2
    np.testing.assert_array_equal(correct_queries(x, episodes, (0.1,), settings, KEY), whole)


def test_draws_are_nn_linears_and_orders_belong_to_the_task() -> None:
    draws = draw_tasks(KEY, range(200), 5, 25, 64, 3)
    bound = 1 / 8
    assert draws.weight.dtype == np.float32
    for start in (draws.weight, draws.bias):
        assert -bound <= start.min() < -0.98 * bound
        assert 0.98 * bound < start.max() <= bound
    assert draws.weight.std() == pytest.approx(bound / np.sqrt(3), rel=0.01)
    np.testing.assert_array_equal(np.sort(draws.order, axis=2), np.broadcast_to(np.arange(25), (200, 3, 25)))
    assert len({tuple(order) for order in draws.order.reshape(-1, 25)}) == 600
    later = draw_tasks(KEY, range(150, 152), 5, 25, 64, 3)
    np.testing.assert_array_equal(later.weight, draws.weight[150:152])
    np.testing.assert_array_equal(later.order, draws.order[150:152])


def test_orders_and_direction_of_the_start_do_not_depend_on_the_width() -> None:
    """Models of another width see the same batches."""
    narrow, wide = draw_tasks(KEY, range(3), 5, 10, 16, 4), draw_tasks(KEY, range(3), 5, 10, 64, 4)
    np.testing.assert_array_equal(narrow.order, wide.order)
    np.testing.assert_allclose(narrow.bias, 2 * wide.bias, rtol=1e-5)
    assert not np.array_equal(narrow.order, draw_tasks((7, 6), range(3), 5, 10, 16, 4).order)


def test_diverged_training_is_marked() -> None:
    """At a rate times decay of 1000 the weights grow by a factor at every step."""
    x, episodes = tasks(num_tasks=3)
    counts = correct_queries(x, episodes, (0.1, 1e6), CHEN, KEY)
    assert (counts[:, 0] >= 0).all()
    assert (counts[:, 1] == -1).all()
