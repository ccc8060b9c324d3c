"""View recipes (augmentation) as data: what is done to an image, in order, with every parameter visible.

A recipe is a tuple of steps. ``draws.py`` draws the random parameters of its steps for a whole batch, ``fused.py`` and
``reference.py`` carry them out. A study adds or drops a step with ``replace(recipe, steps=...)``; a run stores
``to_json()``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

from image_data.contracts import DataError

__all__ = [
    "RECIPES",
    "STEPS",
    "ColorJitter",
    "GaussianBlur",
    "Grayscale",
    "HorizontalFlip",
    "RandomResizedCrop",
    "ResizeCenterCrop",
    "Step",
    "ViewRecipe",
]


def _check_range(
    what: str, low: float, high: float, minimum: float, maximum: float, *, open_minimum: bool = False
) -> None:
    inside = minimum <= low <= high <= maximum and not (open_minimum and low == minimum)  # False for NaN
    if not inside:
        allowed = f"{'(' if open_minimum else '['}{minimum}, {maximum}]"
        given = f"{low}" if low == high else f"({low}, {high})"
        raise DataError(f"{what} is {given}; it must be in {allowed}, a range in increasing order. Change the step.")


def _check_probability(what: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise DataError(f"{what} is {value}; a probability must be in [0, 1]. Change the step.")


@dataclass(frozen=True)
class RandomResizedCrop:
    """Crop a random rectangle and resize it to the view's size (antialiased bilinear), as torchvision's.

    Attributes:
        area: range of the crop's area as a share of the image's, uniform.
        ratio: range of width / height, log-uniform. After 10 draws that do not fit: the largest centre crop inside the
            range.
    """

    kind: ClassVar[str] = "random_resized_crop"
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        _check_range("RandomResizedCrop area", *self.area, 0.0, 1.0, open_minimum=True)
        _check_range("RandomResizedCrop ratio", *self.ratio, 0.0, 100.0, open_minimum=True)


@dataclass(frozen=True)
class ResizeCenterCrop:
    """Resize the short side to round(size * enlarge) and cut the central size x size square. Draws nothing.

    Attributes:
        enlarge: 92/84 is CAMtrast's few-shot test (Resize 92, CenterCrop 84; `jinghanSunn/CAMtrast: dataset.py`);
            8/7 is ImageNet's usual one.
    """

    kind: ClassVar[str] = "resize_center_crop"
    enlarge: float = 92 / 84

    def __post_init__(self) -> None:
        _check_range("ResizeCenterCrop enlarge", self.enlarge, self.enlarge, 1.0, 100.0)


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast, saturation and hue changed in a random order, as torchvision's.

    Attributes:
        brightness: factor uniform in [max(0, 1 - brightness), 1 + brightness]; 0 leaves the operation out.
        contrast: likewise.
        saturation: likewise.
        hue: shift uniform in [-hue, hue], in turns of the colour circle; 0 leaves the operation out.
        p: probability that the step happens at all.
    """

    kind: ClassVar[str] = "color_jitter"
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            _check_range(f"ColorJitter {name}", getattr(self, name), getattr(self, name), 0.0, 100.0)
        _check_range("ColorJitter hue", self.hue, self.hue, 0.0, 0.5)
        _check_probability("ColorJitter p", self.p)


@dataclass(frozen=True)
class Grayscale:
    """Replace all channels by 0.2989 R + 0.587 G + 0.114 B with probability p."""

    kind: ClassVar[str] = "grayscale"
    p: float = 0.2

    def __post_init__(self) -> None:
        _check_probability("Grayscale p", self.p)


@dataclass(frozen=True)
class GaussianBlur:
    """Gaussian blur with probability p.

    Attributes:
        sigma: range of the standard deviation in pixels of the view, uniform. The kernel's radius follows from it:
            ``draws.blur_radius``.
        p: probability.
    """

    kind: ClassVar[str] = "gaussian_blur"
    sigma: tuple[float, float] = (0.1, 2.0)
    p: float = 0.5

    def __post_init__(self) -> None:
        _check_range("GaussianBlur sigma", *self.sigma, 0.0, 100.0, open_minimum=True)
        _check_probability("GaussianBlur p", self.p)


@dataclass(frozen=True)
class HorizontalFlip:
    """Mirror left and right with probability p."""

    kind: ClassVar[str] = "horizontal_flip"
    p: float = 0.5

    def __post_init__(self) -> None:
        _check_probability("HorizontalFlip p", self.p)


Step = RandomResizedCrop | ResizeCenterCrop | ColorJitter | Grayscale | GaussianBlur | HorizontalFlip

STEPS: dict[str, type[Step]] = {
    step.kind: step
    for step in (RandomResizedCrop, ResizeCenterCrop, ColorJitter, Grayscale, GaussianBlur, HorizontalFlip)
}
_CROPS = (RandomResizedCrop, ResizeCenterCrop)


@dataclass(frozen=True)
class ViewRecipe:
    """One view of an image: a crop, then any other steps in any order, each kind at most once.

    Attributes:
        name: for logs and error messages.
        steps: in the order in which they are carried out.
        size: side of the view in pixels; None means the run's image size (multi-crop recipes set it).
    """

    name: str
    steps: tuple[Step, ...]
    size: int | None = None

    def __post_init__(self) -> None:
        known = tuple(STEPS.values())
        for step in self.steps:
            if not isinstance(step, known):
                raise DataError(f"Recipe {self.name!r} holds {step!r}; a step must be one of {', '.join(STEPS)}.")
        kinds = [step.kind for step in self.steps]
        crops = [kind for kind, step in zip(kinds, self.steps, strict=True) if isinstance(step, _CROPS)]
        if len(crops) != 1 or kinds[0] != crops[0]:
            raise DataError(
                f"Recipe {self.name!r} has the steps {kinds}; it must start with its one crop step "
                f"({' or '.join(step.kind for step in _CROPS)}), which also resizes to the view's size."
            )
        repeated = sorted({kind for kind in kinds if kinds.count(kind) > 1})
        if repeated:
            raise DataError(
                f"Recipe {self.name!r} repeats {repeated}; each kind of step may occur once. Remove the others."
            )
        if self.size is not None and self.size < 1:
            raise DataError(f"Recipe {self.name!r} has size {self.size}; it must be at least 1 pixel, or None.")

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON types with every parameter; `from_json` reads it back."""
        steps = [
            {"step": step.kind}
            | {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(step).items()}
            for step in self.steps
        ]
        return {"name": self.name, "size": self.size, "steps": steps}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ViewRecipe:
        """Read a recipe that `to_json` wrote, or that a user wrote by hand; parameters left out take their defaults."""
        name = str(record.get("name", "unnamed"))
        unknown = sorted(set(record) - {"name", "size", "steps"})
        if unknown or "steps" not in record:
            raise DataError(f"Recipe {name!r} has the keys {sorted(record)}; needed: 'steps', allowed: 'name', 'size'.")
        return cls(name, tuple(_step_from_json(name, step) for step in record["steps"]), record.get("size"))


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
        ViewRecipe("light", (RandomResizedCrop(area=(0.2, 1.0)), HorizontalFlip())),
        # jinghanSunn/CAMtrast test.py: Resize 92, CenterCrop 84, scaled to other sizes.
        ViewRecipe("evaluation", (ResizeCenterCrop(enlarge=92 / 84),)),
    )
}
