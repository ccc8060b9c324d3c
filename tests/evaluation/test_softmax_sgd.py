"""The grouped solver against torch's own modules and optimizer, one setting at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from evaluation.linear import Probes
from evaluation.softmax_sgd import Recipe, Setting, correct_share, fit_softmax
from tests.evaluation.synthetic import clusters

SETTINGS = (Setting(0.1, 0.0), Setting(0.5, 1e-2), Setting(0.02, 0.3))


def torch_model(
    x: np.ndarray, y: np.ndarray, num_classes: int, recipe: Recipe, setting: Setting, seed: int = 3
) -> nn.Module:
    """BatchNorm1d, Linear and torch.optim.SGD on the same batches."""
    linear = nn.Linear(x.shape[1], num_classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    model = nn.Sequential(nn.BatchNorm1d(x.shape[1], affine=False) if recipe.batch_norm else nn.Identity(), linear)
    optimizer = torch.optim.SGD(linear.parameters(), 1.0, recipe.momentum, weight_decay=setting.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(recipe.epochs):
        for group in optimizer.param_groups:
            group["lr"] = setting.learning_rate * recipe.factor(epoch)
        for rows in torch.randperm(len(x), generator=generator).split(min(recipe.batch_size, len(x))):
            if recipe.drop_last and len(rows) < min(recipe.batch_size, len(x)):
                continue
            optimizer.zero_grad()
            cross_entropy(model(torch.from_numpy(x)[rows]), torch.from_numpy(y)[rows]).backward()
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(("batch_size", "drop_last"), [(32, False), (32, True), (1000, True)])
def test_every_setting_equals_torch(batch_norm: bool, batch_size: int, drop_last: bool) -> None:
    data = clusters(4, 25, 8, spread=2.0, seed=0)
    x, y = data.features + 1, data.labels
    recipe = Recipe(4, batch_size, 0.9, lambda epoch: 1 / (1 + epoch), batch_norm, drop_last)
    probes = fit_softmax(x, y, 4, recipe, SETTINGS, torch.Generator().manual_seed(3))
    for i, setting in enumerate(SETTINGS):
        model = torch_model(x, y, 4, recipe, setting)
        z = (torch.from_numpy(x) - probes.mean) * probes.scale
        scores = z @ probes.weight[:, i] + probes.bias[i]
        torch.testing.assert_close(scores, model(torch.from_numpy(x)).detach(), rtol=1e-3, atol=2e-4)


def test_a_setting_that_diverges_scores_below_zero_and_leaves_the_others_alone() -> None:
    data = clusters(3, 20, 6, spread=0.2, seed=0, scale=30)
    recipe = Recipe(30, 16, 0.9, lambda epoch: 1.0)
    settings = (Setting(0.01, 0.0), Setting(1e4, 1.0))
    probes = fit_softmax(data.features, data.labels, 3, recipe, settings, torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(correct_share(probes, data.features, data.labels), [1.0, -1.0])
    assert isinstance(probes, Probes)
