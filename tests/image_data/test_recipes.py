"""Recipes as data: the published values, JSON, and the mistakes that are refused."""

import json
from dataclasses import replace

import pytest

from image_data.contracts import DataError
from image_data.recipes import (
    STEPS,
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    RandomCrop,
    RandomResizedCrop,
    ResizeCenterCrop,
    Solarize,
    ToLab,
    ViewRecipe,
    simclr_recipe,
)
from image_data.views import RECIPES, ViewMaker, find_recipe

CROP = RandomResizedCrop(area=(0.2, 1.0))


def test_recipes_are_the_published_ones():
    moco_v2 = (
        RandomResizedCrop((0.2, 1.0), (3 / 4, 4 / 3)),
        ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        Grayscale(0.2),
        GaussianBlur((0.1, 2.0), 0.5),
        HorizontalFlip(0.5),
    )
    moco_v1 = (CROP, Grayscale(0.2), ColorJitter(0.4, 0.4, 0.4, 0.4, p=1.0), HorizontalFlip(0.5))
    wide_crop = RandomResizedCrop((0.08, 1.0))
    crop_and_flip, wide_crop_and_flip = (CROP, HorizontalFlip(0.5)), (wide_crop, HorizontalFlip(0.5))
    weak_jitter, distort = (0.4, 0.4, 0.4, 0.1), (ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8), Grayscale(0.2))
    byol_colors = (ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8), Grayscale(0.2))
    blur = GaussianBlur((0.1, 2.0), 0.5)
    rfs_jitter = ColorJitter(0.4, 0.4, 0.4, 0.0, p=1.0)
    assert {name: recipe.steps for name, recipe in RECIPES.items()} == {
        "supervised": (wide_crop, *moco_v2[1:]),
        "supervised_basic": wide_crop_and_flip,
        "moco_v1": moco_v1,
        "moco_v2": moco_v2,
        "light": crop_and_flip,
        "camtrast_code": (*moco_v1[:3], blur, HorizontalFlip(0.5)),
        "simclr": (*wide_crop_and_flip, *distort, blur),
        "simclr_small": (*wide_crop_and_flip, ColorJitter(*weak_jitter, p=0.8), Grayscale(0.2)),
        "supcon": (*crop_and_flip, ColorJitter(*weak_jitter, p=0.8), Grayscale(0.2)),
        "byol_1": (*wide_crop_and_flip, *byol_colors, GaussianBlur((0.1, 2.0), 1.0)),
        "byol_2": (*wide_crop_and_flip, *byol_colors, GaussianBlur((0.1, 2.0), 0.1), Solarize(0.5, 0.2)),
        "swav_large": (RandomResizedCrop((0.14, 1.0)), HorizontalFlip(0.5), *distort, blur),
        "swav_small": (RandomResizedCrop((0.05, 0.14)), HorizontalFlip(0.5), *distort, blur),
        "rfs_a": (RandomCrop(8 / 84), rfs_jitter, HorizontalFlip(0.5)),
        "rfs_d": (RandomCrop(4 / 32), rfs_jitter, HorizontalFlip(0.5)),
        "rotation": (RandomCrop(4 / 32), HorizontalFlip(0.5)),
        "cmc": (*wide_crop_and_flip, ToLab()),
        "amdim": (
            RandomResizedCrop((0.3, 1.0), (0.7, 1.4)),
            HorizontalFlip(0.5, shared=True),
            ColorJitter(0.4, 0.4, 0.4, 0.2, p=0.8),
            Grayscale(0.25),
        ),
        "vae": crop_and_flip,
        "evaluation": (ResizeCenterCrop(92 / 84),),
    }
    assert all(name == recipe.name for name, recipe in RECIPES.items())
    assert {name: recipe.side(224) for name, recipe in RECIPES.items() if recipe.side(224) != 224} == {"swav_small": 96}
    assert [name for name, recipe in RECIPES.items() if recipe.color_space == "lab"] == ["cmc"]


@pytest.mark.parametrize(("strength", "blur"), [(0.5, False), (1.0, True), (2.5, True)])
def test_simclr_recipes_scale_with_their_strength(strength, blur):
    recipe = simclr_recipe(strength, blur)
    weak = 0.8 * strength
    assert recipe.steps == (
        RandomResizedCrop((0.08, 1.0)),
        HorizontalFlip(0.5),
        ColorJitter(weak, weak, weak, 0.2 * strength, p=0.8),
        Grayscale(0.2),
        *([GaussianBlur((0.1, 2.0), 0.5)] if blur else []),
    )


def test_sides_follow_the_image_size_unless_they_are_set():
    plain, small = ViewRecipe("x", (CROP,)), ViewRecipe("x", (CROP,), relative_size=96 / 224)
    assert [plain.side(size) for size in (1, 32, 224)] == [1, 32, 224]
    assert [small.side(size) for size in (1, 32, 84, 224)] == [1, 14, 36, 96]
    assert ViewRecipe("x", (CROP,), size=12).side(224) == 12


@pytest.mark.parametrize("step", [step() for step in STEPS.values()], ids=lambda step: step.kind)
def test_every_step_survives_json(step):
    crop = () if step in (RandomResizedCrop(), ResizeCenterCrop(), RandomCrop()) else (CROP,)
    recipe = ViewRecipe("x", (*crop, step), relative_size=0.5)
    assert ViewRecipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_survive_json(name):
    for recipe in (RECIPES[name], replace(RECIPES[name], size=96, relative_size=1.0)):
        record = json.loads(json.dumps(recipe.to_json()))
        assert ViewRecipe.from_json(record) == recipe


def test_records_of_older_versions_are_read():
    record = {"name": "light", "size": None, "steps": [{"step": "random_resized_crop"}, {"step": "horizontal_flip"}]}
    assert ViewRecipe.from_json(record).steps == (RandomResizedCrop(), HorizontalFlip(p=0.5, shared=False))
    assert ViewRecipe.from_json(record).relative_size == 1.0


def test_json_shows_every_parameter():
    steps = (CROP, ColorJitter(0.4, 0.3, 0.2, 0.1, 0.8), GaussianBlur(), Solarize(), HorizontalFlip(), ToLab())
    record = ViewRecipe("mine", steps).to_json()
    assert record == {
        "name": "mine",
        "size": None,
        "relative_size": 1.0,
        "steps": [
            {"step": "random_resized_crop", "area": [0.2, 1.0], "ratio": [3 / 4, 4 / 3]},
            {"step": "color_jitter", "brightness": 0.4, "contrast": 0.3, "saturation": 0.2, "hue": 0.1, "p": 0.8},
            {"step": "gaussian_blur", "sigma": [0.1, 2.0], "p": 0.5},
            {"step": "solarize", "threshold": 0.5, "p": 0.2},
            {"step": "horizontal_flip", "p": 0.5, "shared": False},
            {"step": "to_lab"},
        ],
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomResizedCrop(area=(0.0, 1.0)), r"area is \(0.0, 1.0\).*\(0.0, 1.0\]"),
        (lambda: RandomResizedCrop(area=(0.5, 0.2)), "area"),
        (lambda: RandomResizedCrop(area=(0.5, 1.2)), "area"),
        (lambda: RandomResizedCrop(area=(float("nan"), 1.0)), "area"),
        (lambda: RandomResizedCrop(ratio=(0.0, 1.0)), "ratio"),
        (lambda: ResizeCenterCrop(0.9), "enlarge is 0.9"),
        (lambda: ColorJitter(hue=0.6), "hue is 0.6"),
        (lambda: ColorJitter(brightness=-0.1), "brightness is -0.1"),
        (lambda: ColorJitter(p=1.5), "p is 1.5"),
        (lambda: Grayscale(p=-0.1), "Grayscale p is -0.1"),
        (lambda: GaussianBlur(sigma=(0.0, 1.0)), "sigma"),
        (lambda: GaussianBlur(p=float("nan")), "GaussianBlur p"),
        (lambda: HorizontalFlip(p=2), "HorizontalFlip p"),
        (lambda: Solarize(threshold=1.1), r"Solarize threshold is 1.1.*\[0.0, 1.0\]"),
        (lambda: Solarize(p=-1), "Solarize p is -1"),
        (lambda: RandomCrop(padding=8), r"RandomCrop padding is 8.*\[0.0, 0.5\]"),
        (lambda: RandomCrop(padding=-0.1), "RandomCrop padding"),
        (lambda: simclr_recipe(2.6, True), r"strength is 2.6.*2.5"),
        (lambda: ViewRecipe("x", ()), "start with its one crop"),
        (lambda: ViewRecipe("x", (HorizontalFlip(), CROP)), "start with its one crop"),
        (lambda: ViewRecipe("x", (CROP, ResizeCenterCrop())), "start with its one crop"),
        (lambda: ViewRecipe("x", (CROP, Grayscale(), Grayscale())), "repeats.*grayscale"),
        (lambda: ViewRecipe("x", (CROP, "flip")), "'flip'.*horizontal_flip"),
        (lambda: ViewRecipe("x", (RandomCrop(), CROP)), "start with its one crop"),
        (lambda: ViewRecipe("x", (CROP, ToLab(), ColorJitter())), "color_jitter after to_lab.*CMC.*before to_lab"),
        (lambda: ViewRecipe("x", (CROP, ToLab(), HorizontalFlip(), Grayscale())), "grayscale after to_lab"),
        (lambda: ViewRecipe("x", (CROP, ToLab(), Solarize())), "solarize after to_lab"),
        (lambda: ViewRecipe("x", (CROP, ToLab(), GaussianBlur())), "gaussian_blur after to_lab.*before to_lab"),
        (lambda: ViewRecipe("x", (CROP,), size=0), "size 0"),
        (lambda: ViewRecipe("x", (CROP,), relative_size=0.0), "relative_size of recipe 'x' is 0.0"),
        (lambda: ViewRecipe("x", (CROP,), relative_size=float("nan")), "relative_size"),
        (lambda: ViewRecipe("x", (CROP,), size=96, relative_size=0.5), "size 96 and relative_size 0.5.*pixels, or"),
        (lambda: ViewRecipe.from_json({"name": "x"}), "'steps', allowed: name, steps, size, relative_size"),
        (lambda: ViewRecipe.from_json({"name": "x", "steps": [{"step": "solarise"}]}), "'solarise'.*grayscale"),
        (lambda: ViewRecipe.from_json({"steps": [{"step": "grayscale", "q": 1}]}), r"no parameter \['q'\]"),
        (lambda: find_recipe("moco_v3"), "moco_v3.*moco_v2"),
        (lambda: ViewMaker([], 32, 0), "No view recipe"),
        (lambda: ViewMaker([RECIPES["light"]], 0, 0), "image size is 0"),
        (lambda: ViewMaker([RECIPES["light"]], 32, 0, backend="opencv"), "opencv.*torchvision"),
    ],
)
def test_mistakes_are_explained(make, message):
    with pytest.raises(DataError, match=f"(?s){message}"):
        make()


def test_colours_may_change_before_the_conversion_and_views_may_flip_after_it():
    recipe = ViewRecipe("x", (CROP, ColorJitter(), Grayscale(), Solarize(), GaussianBlur(), ToLab(), HorizontalFlip()))
    assert recipe.color_space == "lab"
    assert RECIPES["light"].color_space == "rgb"
