"""Configurations: JSON round trip, hashes, hyperparameters by name."""

from __future__ import annotations

import dataclasses
import json

import pytest

from image_data.prepare import DataConfig
from image_data.subset import SubsetConfig
from methods import METHODS
from rayjobs.configs import PretrainConfig, TrainConfig, config_hash, from_dict, preset, to_dict, with_parameters


@pytest.mark.parametrize("method", list(METHODS))
def test_json_round_trip(method):
    data = DataConfig(data=("train=folder:a", "val=folder:b"), subset=SubsetConfig(classes=("x", "y"), fraction=0.5))
    config = preset(method, TrainConfig(views=("moco_v1",), epochs=3), data)
    stored = json.loads(json.dumps(to_dict(config)))
    again = from_dict(PretrainConfig, stored)
    assert again == config
    assert config_hash(again) == config_hash(config)


def test_hash_sees_every_part():
    base = preset("moco_v2")
    others = [
        with_parameters(base, {"temperature": 0.3}),
        with_parameters(base, {"learning_rate": 0.5}),
        with_parameters(base, {"seed": 1}),
        dataclasses.replace(base, data=DataConfig(data_seed=1)),
    ]
    assert len({config_hash(c) for c in [base, *others]}) == 5


def test_parameters_go_where_the_field_lives():
    config = with_parameters(preset("moco_v2"), {"temperature": 0.5, "warmup_epochs": 2, "image_size": 96})
    assert (config.method_config.temperature, config.optimizer.warmup_epochs, config.train.image_size) == (0.5, 2, 96)


def test_an_option_that_a_method_does_not_have_is_an_error():
    with pytest.raises(ValueError, match=r"'supervised' has no hyperparameter 'queue_size'.*It has: .*learning_rate"):
        with_parameters(preset("supervised"), {"queue_size": 128})


def test_a_file_of_another_version_is_refused():
    stored = to_dict(preset("moco_v2"))
    stored["train"]["flux"] = 1
    with pytest.raises(ValueError, match=r"TrainConfig has no field.*flux"):
        from_dict(PretrainConfig, stored)
