"""Recipes: every method at two scales, valid as they stand; the stated times follow from one published anchor."""

from __future__ import annotations

import re

import pytest

from methods import METHODS
from rayjobs.job import view_recipes
from rayjobs.pretrain import _parse
from rayjobs.recipes import RECIPES, describe_recipe, recipe
from rayjobs.train_loop import method_context

IMAGENET_IMAGES, MINI_IMAGES, CIFAR_IMAGES = 1_281_167, 38_400, 50_000
# Forward passes of the backbone per training image; forward and backward count 3. SwAV: 2 + 6 (96/224)^2 crops.
PASSES = {
    "supervised": 3, "sl_mlp": 3, "supcon": 6, "instdisc": 3, "moco_v1": 4, "moco_v2": 4, "exemplar_v1": 4,
    "exemplar_v2": 4, "simclr": 6, "byol": 8, "simsiam": 6, "swav": 9.3, "camtrast_moco": 7, "camtrast_simsiam": 6,
    "camtrast_cam_only": 6, "camtrast_contrast_only_moco": 5, "camtrast_contrast_only_simsiam": 6, "camtrast_code": 6,
    "rotation": 12, "vae": 3.5, "cmc": 1.5, "amdim": 6,
}  # fmt: skip
# 1e9 multiplications of a forward pass at 224 px; ResNet-9: at 32 px behind its own stem.
COST = {"resnet18": 1.82, "resnet50": 4.1, "resnet9": 0.38}
V100_RATE = 168 * 4 * 4.1  # 1e9 multiplications per second: MoCo v2's 168 images/s of 4 passes over a ResNet-50


def expected_hours(name: str) -> float:
    config = recipe(name)
    train = config.train
    if train.backbone == "resnet9":
        cost = COST["resnet9"] * (train.image_size / 32) ** 2
    else:
        small_stem = 16 if train.image_size < 48 else 1
        cost = COST[train.backbone] * (train.image_size / 224) ** 2 * small_stem
    images = IMAGENET_IMAGES if name.endswith("imagenet") else MINI_IMAGES if train.image_size == 84 else CIFAR_IMAGES
    return images * train.epochs * PASSES[config.method] * cost / (V100_RATE * train.num_workers) / 3600


def test_every_method_has_both_scales():
    assert set(RECIPES) == {f"{method}_{scale}" for method in METHODS for scale in ("imagenet", "small")}


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_is_a_valid_run_and_its_docstring_is_complete(name):
    config, text = recipe(name), describe_recipe(name)
    assert name == f"{config.method}_{'imagenet' if name.endswith('imagenet') else 'small'}"
    view_recipes(config)
    images = IMAGENET_IMAGES if name.endswith("imagenet") else MINI_IMAGES
    METHODS[config.method].method.validate(config.method_config, method_context(config, 64, images))
    assert f"python rayjobs/pretrain.py --recipe {name} --data " in text
    assert re.search(r"Hardware: \d+ GPUs? \(V100\)\.", text)
    assert "\nPublished: " in text
    hours = float(re.search(r"Time: about ([\d.]+) h", text)[1])
    assert hours == pytest.approx(expected_hours(name), rel=0.05, abs=0.05)


def test_the_anchor_is_mocos_published_time():
    assert expected_hours("moco_v2_imagenet") == pytest.approx(53, abs=0.5)


def test_a_recipe_sets_the_defaults_of_the_command():
    options, config = _parse(["--recipe", "exemplar_v2_imagenet", "--epochs", "3", "--output", "x"])
    assert options.recipe == "exemplar_v2_imagenet"
    assert config.method_config.queue_size == 2**20
    assert (config.train.epochs, config.train.num_workers, config.train.backbone) == (3, 8, "resnet50")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "moco_v2_imagnet"], "Did you mean moco_v2_imagenet"),
        (["--recipe", "moco_v2_small", "--method", "byol"], "is for --method moco_v2, not byol"),
    ],
)
def test_wrong_recipes_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        _parse(arguments)
