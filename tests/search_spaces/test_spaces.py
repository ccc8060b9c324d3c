"""Every point that a space can produce is a valid run."""

from __future__ import annotations

from dataclasses import asdict

import optuna
import pytest

from methods import METHODS
from rayjobs.configs import preset, with_parameters
from rayjobs.train_loop import method_context
from search_spaces import SPACES, SpaceContext, search_space
from search_spaces.parameters import LEARNING_RATE, preset_parameters

optuna.logging.set_verbosity(optuna.logging.ERROR)


def context(space, num_images=2000, batch_size=64, epochs=8):
    return SpaceContext(num_images, 30, batch_size, epochs, space.methods)


def sampled(space, here, count=30):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(count):
        trial = study.ask()
        constants = space.sample(trial, here)
        yield {**trial.params, **constants}


@pytest.mark.parametrize("name", list(SPACES))
def test_samples_and_presets_are_valid_runs(name):
    space = SPACES[name]
    here = context(space)
    for parameters in [*sampled(space, here), *space.presets(here)]:
        values = dict(parameters)
        method = values.pop("method", space.methods[0])
        config = with_parameters(preset(method), values)
        METHODS[method].method.validate(config.method_config, run_context(config, here))


def run_context(config, here):
    settings = with_parameters(config, {"batch_size": here.batch_size})
    return method_context(settings, here.num_classes, here.num_images)


def test_transfer_covers_every_method_and_only_their_own_options():
    space = SPACES["transfer"]
    assert set(space.methods) == set(METHODS)
    seen = {}
    for parameters in sampled(space, context(space), 300):
        seen.setdefault(parameters["method"], set()).update(parameters)
    assert set(seen) == set(METHODS)
    assert "temperature" in seen["moco_v2"]
    assert "queue_size" in seen["exemplar_v1"]
    assert "temperature" not in seen["supervised"]
    assert "queue_size" not in seen["simsiam"]
    assert "projector_depth" in seen["sl_mlp"]
    assert "momentum" in seen["byol"]
    assert not {"queue_size", "temperature", "projector_depth"} & seen["vae"]
    assert all("warmup_epochs" in names and "learning_rate" in names for names in seen.values())


def test_the_sampler_keeps_every_method_in_its_own_ranges():
    """Optimisers have ranges of their own under one name: TPE learns from all trials and still stays inside."""
    space = SPACES["transfer"]
    here = SpaceContext(2000, 30, 64, 8, ("simclr", "moco_v2", "vae"))
    sampler = optuna.samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=0, n_startup_trials=5)
    study = optuna.create_study(sampler=sampler, direction="maximize")
    for _ in range(40):
        trial = study.ask()
        space.sample(trial, here)
        low, high = LEARNING_RATE[METHODS[trial.params["method"]].optimizer.optimizer]
        assert low <= trial.params["learning_rate"] <= high
        study.tell(trial, trial.params["learning_rate"])


def test_a_single_methods_space_sweeps_what_only_it_has():
    expected = {
        "instdisc": {"bank_momentum", "num_negatives"},
        "swav": {"num_prototypes", "epsilon"},
        "vae": {"kl_weight"},
        "amdim": {"tanh_clip"},
        "rotation": {"rotations"},
        "sl_mlp": {"projector_batchnorm", "projector_relu"},
        "camtrast_cam_only": {"suppress_to"},
    }
    for name, own in expected.items():
        space = SPACES[name]
        assert own <= set(next(sampled(space, context(space)))), name
        assert own <= set(space.presets(context(space))[0]), name


def test_published_settings_are_fitted_to_small_data():
    space = SPACES["transfer"]
    values = preset_parameters("swav", context(space, num_images=400, epochs=20))
    assert values["num_prototypes"] == 100
    assert values["queue_start_epoch"] == 2
    assert values["frozen_prototype_epochs"] == pytest.approx(0.1)
    assert preset_parameters("cmc", context(space, num_images=400))["num_negatives"] == 400
    large = context(space, num_images=1_281_167, batch_size=256, epochs=200)
    for name in ("swav", "cmc", "instdisc", "simclr", "byol", "vae"):
        config = with_parameters(preset(name), preset_parameters(name, large))
        changed = {"queue_size"} if name == "swav" else set()  # 3,840 is no power of 4 of the batch
        before, after = asdict(preset(name).method_config), asdict(config.method_config)
        assert {field for field in before if before[field] != after[field]} <= changed, name


def test_presets_can_be_enqueued_in_optuna():
    space = SPACES["transfer"]
    here = context(space)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = space.presets(here)
    for point in points:
        study.enqueue_trial(point)
    for point in points:
        trial = study.ask()
        space.sample(trial, here)
        assert trial.params == point


def test_queue_fits_small_data():
    space = SPACES["moco_v2"]
    for parameters in sampled(space, context(space, num_images=150, batch_size=64)):
        assert parameters["queue_size"] in (64, 128)


def test_a_selection_of_methods_is_honoured():
    space = SPACES["transfer"]
    here = SpaceContext(2000, 30, 64, 8, ("simsiam", "supervised"))
    assert {p["method"] for p in sampled(space, here)} == {"simsiam", "supervised"}
    assert [p["method"] for p in space.presets(here)] == ["simsiam", "supervised"]


def test_unknown_space_suggests():
    with pytest.raises(ValueError, match=r"Did you mean 'moco_v2'\?.*transfer"):
        search_space("moco_v22")
