"""Every method at its published settings trains on rendered images: three seeds, no NaN, weights that move."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from image_data.prepare import DataConfig, prepare
from image_data.store import DecodedStore
from image_data.stream import MemoryStream
from methods import METHODS
from rayjobs.configs import TrainConfig, preset, with_parameters
from rayjobs.job import view_recipes
from rayjobs.train_loop import Worker, build_method, method_context, train
from search_spaces import SpaceContext
from search_spaces.parameters import preset_parameters
from tests.rayjobs.conftest import PlainReporter

# The ImageNet stem leaves 2x2 locations of 48 px: the least that a class activation map needs.
SETTINGS = TrainConfig(backbone="resnet9", stem="imagenet", image_size=48, batch_size=16, epochs=1)
NUM_IMAGES = 36
WIDE = {"projector_hidden_dim": 64, "predictor_hidden_dim": 64}  # the papers' 4,096 would be most of the time


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    uri = "rendered:?image_size=48&instances=2,1,1&images_per_instance=2&held_out_instances=1"
    config = DataConfig(data=(uri,), cache=cache)
    config = dataclasses.replace(config, subset=dataclasses.replace(config.subset, num_images=NUM_IMAGES))
    return config, prepare(config, log=lambda _: None)


@pytest.mark.parametrize("method", list(METHODS))
def test_three_seeds_train_without_nan(method, rendered, tmp_path):
    data_config, data = rendered
    info = data.split("train")
    store = DecodedStore.open(info, data.directory)
    for seed in range(3):
        settings = dataclasses.replace(SETTINGS, seed=seed)
        space = SpaceContext(info.num_images, len(info.class_names), settings.batch_size, settings.epochs, (method,))
        config = with_parameters(preset(method, settings, data_config), preset_parameters(method, space))
        fields = {f.name for f in dataclasses.fields(config.method_config)}
        config = with_parameters(config, {name: value for name, value in WIDE.items() if name in fields})
        stream = MemoryStream(store, view_recipes(config), image_size=48, batch_size=16, seed=seed)
        context = method_context(config, len(info.class_names), info.num_images)
        reporter = PlainReporter(tmp_path / str(seed))
        train(config, {}, context, stream, Worker(), reporter)
        for report in reporter.reports:
            values = {name: value for name, value in report.items() if isinstance(value, float)}
            assert all(math.isfinite(value) for value in values.values()), values
        trained = torch.load(tmp_path / str(seed) / "epoch_00001" / "state.pt", weights_only=True)["method"]
        method_again = build_method(config, context)
        fresh = method_again.state_dict()
        moved = [name for name in fresh if name.startswith("backbone.") and "weight" in name]
        assert moved
        weights = [trained[name] for name, _ in method_again.named_parameters()]
        assert all(weight.isfinite().all() for weight in weights)
        assert not all(torch.equal(trained[name], fresh[name]) for name in moved)
