"""View recipes (augmentation) as data: what is done to an image, in order, with every parameter visible.

A recipe is a tuple of steps (``view_steps.py``). ``draws.py`` draws the random parameters of its steps for a whole
batch, ``fused.py`` and ``reference.py`` carry them out. A study adds or drops a step with
``replace(recipe, steps=...)``; a run stores ``to_json()``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from image_data.contracts import DataError
from image_data.view_steps import (
    COLOR_STEPS,
    CROP_STEPS,
    STEPS,
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    RandomCrop,
    RandomResizedCrop,
    ResizeCenterCrop,
    Solarize,
    Step,
    ToLab,
    check_range,
)

__all__ = [
    "RECIPES",
    "STEPS",
    "ColorJitter",
    "GaussianBlur",
    "Grayscale",
    "HorizontalFlip",
    "RandomCrop",
    "RandomResizedCrop",
    "ResizeCenterCrop",
    "Solarize",
    "Step",
    "ToLab",
    "ViewRecipe",
    "simclr_recipe",
]


@dataclass(frozen=True)
class ViewRecipe:
    """One view of an image: a crop, then any other steps in any order, each kind at most once.

    Attributes:
        name: for logs and error messages.
        steps: in the order in which they are carried out.
        size: side of the view in pixels; None: it follows from the run's image size.
        relative_size: side as a share of the run's image size, if `size` is None (multi-crop recipes set it, so that
            they fit any image size).
    """

    name: str
    steps: tuple[Step, ...]
    size: int | None = None
    relative_size: float = 1.0

    def __post_init__(self) -> None:
        known = tuple(STEPS.values())
        for step in self.steps:
            if not isinstance(step, known):
                raise DataError(f"Recipe {self.name!r} holds {step!r}; a step must be one of {', '.join(STEPS)}.")
        kinds = [step.kind for step in self.steps]
        crops = [kind for kind, step in zip(kinds, self.steps, strict=True) if isinstance(step, CROP_STEPS)]
        if len(crops) != 1 or kinds[0] != crops[0]:
            raise DataError(
                f"Recipe {self.name!r} has the steps {kinds}; it must start with its one crop step "
                f"({' or '.join(step.kind for step in CROP_STEPS)}), which also resizes to the view's size."
            )
        repeated = sorted({kind for kind in kinds if kinds.count(kind) > 1})
        if repeated:
            raise DataError(
                f"Recipe {self.name!r} repeats {repeated}; each kind of step may occur once. Remove the others."
            )
        self._check_lab()
        if self.size is not None and self.size < 1:
            raise DataError(f"Recipe {self.name!r} has size {self.size}; it must be at least 1 pixel, or None.")
        share = self.relative_size
        check_range(f"relative_size of recipe {self.name!r}", share, share, 0.0, 10.0, open_minimum=True)
        if self.size is not None and share != 1.0:
            raise DataError(
                f"Recipe {self.name!r} sets size {self.size} and relative_size {share}, which are two "
                "answers to one question. Give the size in pixels, or the share of the run's image size."
            )

    def _check_lab(self) -> None:
        """Refuse the steps that cannot come after `ToLab`."""
        kinds = [step.kind for step in self.steps]
        after = self.steps[kinds.index(ToLab.kind) + 1 :] if ToLab.kind in kinds else ()
        colors = [step.kind for step in after if isinstance(step, COLOR_STEPS)]
        if colors:
            raise DataError(
                f"Recipe {self.name!r} has {', '.join(colors)} after to_lab. Colour changes after the conversion "
                "destroy the task of CMC, whose two views are the channels L and ab of the same colours "
                "(HobbitLong/CMC: crop and flip only). Move the step before to_lab, or drop it."
            )
        if any(isinstance(step, GaussianBlur) for step in after):
            raise DataError(
                f"Recipe {self.name!r} has gaussian_blur after to_lab. The conversion is done last, on the training "
                "device, and is not linear, so a blur after it would not be what is rendered. Move it before to_lab."
            )

    @property
    def color_space(self) -> Literal["rgb", "lab"]:
        """What a backbone must turn these views into; the views themselves are always RGB."""
        return "lab" if any(isinstance(step, ToLab) for step in self.steps) else "rgb"

    def side(self, image_size: int) -> int:
        """Side of the view in pixels in a run with this image size."""
        return self.size if self.size is not None else max(1, round(image_size * self.relative_size))

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON types with every parameter; `from_json` reads it back."""
        steps = [
            {"step": step.kind}
            | {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(step).items()}
            for step in self.steps
        ]
        return {"name": self.name, "size": self.size, "relative_size": self.relative_size, "steps": steps}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ViewRecipe:
        """Read a recipe that `to_json` wrote, or that a user wrote by hand; parameters left out take their defaults."""
        name = str(record.get("name", "unnamed"))
        allowed = [field.name for field in fields(cls)]
        unknown = sorted(set(record) - set(allowed))
        if unknown or "steps" not in record:
            raise DataError(
                f"Recipe {name!r} has the keys {sorted(record)}; needed: 'steps', allowed: {', '.join(allowed)}."
            )
        steps = tuple(_step_from_json(name, step) for step in record["steps"])
        return cls(**{**record, "name": name, "steps": steps})


def _step_from_json(recipe: str, record: Mapping[str, Any]) -> Step:
    kind = record.get("step")
    if kind not in STEPS:
        raise DataError(f"Recipe {recipe!r} names the step {kind!r}; known steps: {', '.join(STEPS)}.")
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in record.items() if key != "step"
    }
    allowed = [field.name for field in fields(STEPS[kind])]
    unknown = sorted(set(values) - set(allowed))
    if unknown:
        raise DataError(f"Step {kind!r} of recipe {recipe!r} has no parameter {unknown}; it has {allowed}.")
    return STEPS[kind](**values)


def simclr_recipe(strength: float, blur: bool) -> ViewRecipe:
    """SimCLR's views (`google-research/simclr: data_util.py`, Chen et al. 2020, appendix A).

    Two things differ. The official blur kernel is 10 % of the view's side wide; ours is as wide as its sigma needs
    (``draws.blur_radius``: 6 pixels each side at sigma 2), which at 224 pixels leaves out weights below 0.3 % of the
    peak and at small sizes does not cut the Gaussian off. The official resize is bicubic, ours antialiased bilinear.

    Args:
        strength: colour strength s: 1 on ImageNet, 0.5 on CIFAR; at most 2.5, where the hue turns by 0.5.
        blur: whether to blur; the paper does not on CIFAR (appendix B.9).
    """
    check_range("simclr_recipe strength", strength, strength, 0.0, 2.5)
    return ViewRecipe(
        f"simclr_{strength:g}" + ("" if blur else "_no_blur"),
        (
            RandomResizedCrop(area=(0.08, 1.0)),
            HorizontalFlip(),
            *_distort(strength),
            *((GaussianBlur(sigma=(0.1, 2.0), p=0.5),) if blur else ()),
        ),
    )


def _distort(strength: float) -> tuple[Step, ...]:
    """SimCLR's colour distortion, which SwAV took over."""
    weak, hue = 0.8 * strength, 0.2 * strength
    return ColorJitter(weak, weak, weak, hue, p=0.8), Grayscale(p=0.2)


_CROP_AND_FLIP = (RandomResizedCrop(area=(0.2, 1.0)), HorizontalFlip())

# facebookresearch/moco main_moco.py: the two --aug-plus branches. v1 is the recipe of InstDisc: gray before an
# unconditional jitter with the strong hue of 0.4, no blur.
_MOCO_V1 = ViewRecipe(
    "moco_v1",
    (RandomResizedCrop(area=(0.2, 1.0)), Grayscale(p=0.2), ColorJitter(0.4, 0.4, 0.4, 0.4, p=1.0), HorizontalFlip()),
)
_MOCO_V2 = ViewRecipe(
    "moco_v2",
    (
        RandomResizedCrop(area=(0.2, 1.0)),
        ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        Grayscale(p=0.2),
        GaussianBlur(sigma=(0.1, 2.0), p=0.5),
        HorizontalFlip(),
    ),
)

# google-deepmind/deepmind-research byol/utils/augmentations.py: the two views differ in blur and solarization only. The
# official brightness is an addition and its saturation works in HSV; ours are torchvision's.
_BYOL = (
    RandomResizedCrop(area=(0.08, 1.0)),
    HorizontalFlip(),
    ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
    Grayscale(p=0.2),
)

# facebookresearch/swav src/multicropdataset.py and the README's commands: 2 views of 224 and 6 of 96 pixels, SimCLR's
# colours at strength 1 and a blur that follows its sigma (the official kernel: 23 x 23).
_SWAV = (HorizontalFlip(), *_distort(1.0), GaussianBlur(sigma=(0.1, 2.0), p=0.5))

RECIPES: dict[str, ViewRecipe] = {
    recipe.name: recipe
    for recipe in (
        # Zhao et al. (ICLR 2021), footnote 1: MoCo v2's steps with the supervised crop area.
        replace(_MOCO_V2, name="supervised", steps=(RandomResizedCrop(area=(0.08, 1.0)), *_MOCO_V2.steps[1:])),
        # Zhao et al., Table 1, the first two rows: crop and flip only.
        ViewRecipe("supervised_basic", (RandomResizedCrop(area=(0.08, 1.0)), HorizontalFlip())),
        _MOCO_V1,
        _MOCO_V2,
        # Sun et al. (CAMtrast, AAAI 2022) as the text reads; the released code adds jitter, gray and blur.
        ViewRecipe("light", _CROP_AND_FLIP),
        # jinghanSunn/CAMtrast train.py: MoCo v1's steps with MoCo v2's blur before the flip.
        ViewRecipe("camtrast_code", (*_MOCO_V1.steps[:3], GaussianBlur(sigma=(0.1, 2.0), p=0.5), HorizontalFlip())),
        replace(simclr_recipe(1.0, blur=True), name="simclr"),
        # Chen et al. (SimCLR, ICML 2020), appendix B.9: CIFAR-10.
        replace(simclr_recipe(0.5, blur=False), name="simclr_small"),
        # HobbitLong/SupContrast main_supcon.py.
        ViewRecipe("supcon", (*_CROP_AND_FLIP, ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), Grayscale(p=0.2))),
        ViewRecipe("byol_1", (*_BYOL, GaussianBlur(sigma=(0.1, 2.0), p=1.0))),
        ViewRecipe("byol_2", (*_BYOL, GaussianBlur(sigma=(0.1, 2.0), p=0.1), Solarize(threshold=0.5, p=0.2))),
        ViewRecipe("swav_large", (RandomResizedCrop(area=(0.14, 1.0)), *_SWAV)),
        ViewRecipe("swav_small", (RandomResizedCrop(area=(0.05, 0.14)), *_SWAV), relative_size=96 / 224),
        # WangYueFt/rfs dataset/transform_cfg.py, "A" (miniImageNet, 84 pixels) and "D" (CIFAR, 32 pixels).
        ViewRecipe("rfs_a", (RandomCrop(padding=8 / 84), ColorJitter(0.4, 0.4, 0.4, 0.0), HorizontalFlip())),
        ViewRecipe("rfs_d", (RandomCrop(padding=4 / 32), ColorJitter(0.4, 0.4, 0.4, 0.0), HorizontalFlip())),
        # gidariss/FeatureLearningRotNet dataloader.py, its branch for CIFAR. On ImageNet the code crops 224 pixels from
        # an image resized to 256. The rotations are the method's, after these steps.
        ViewRecipe("rotation", (RandomCrop(padding=4 / 32), HorizontalFlip())),
        # HobbitLong/CMC train_CMC.py, --crop_low 0.08, the README's choice for ResNets.
        ViewRecipe("cmc", (RandomResizedCrop(area=(0.08, 1.0)), HorizontalFlip(), ToLab())),
        # Philip-Bachman/amdim-public datasets.py, STL-10; gray has p 0.2 on ImageNet, CIFAR shifts by 4 pixels instead
        # of the crop. The official code flips before the crop, once for both views: the same distribution.
        ViewRecipe(
            "amdim",
            (
                RandomResizedCrop(area=(0.3, 1.0), ratio=(0.7, 1.4)),
                HorizontalFlip(shared=True),
                ColorJitter(0.4, 0.4, 0.4, 0.2, p=0.8),
                Grayscale(p=0.25),
            ),
        ),
        # Ours. Newell and Deng (princeton-vl/selfstudy util/augment.py) shift by up to an eighth of the side, mirror
        # and change colours with one draw for a whole chunk of images, which a recipe of single images cannot say.
        ViewRecipe("vae", _CROP_AND_FLIP),
        # jinghanSunn/CAMtrast test.py: Resize 92, CenterCrop 84, scaled to other sizes.
        ViewRecipe("evaluation", (ResizeCenterCrop(enlarge=92 / 84),)),
    )
}
