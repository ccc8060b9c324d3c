"""The steps of a view recipe: frozen dataclasses that check their parameters. ``recipes.py`` puts them together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

from image_data.contracts import DataError

__all__ = [
    "COLOR_STEPS",
    "CROP_STEPS",
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
    "check_range",
]


def check_range(
    what: str, low: float, high: float, minimum: float, maximum: float, *, open_minimum: bool = False
) -> None:
    inside = minimum <= low <= high <= maximum and not (open_minimum and low == minimum)  # False for NaN
    if not inside:
        allowed = f"{'(' if open_minimum else '['}{minimum}, {maximum}]"
        given = f"{low}" if low == high else f"({low}, {high})"
        raise DataError(f"{what} is {given}; it must be in {allowed}, a range in increasing order. Change it.")


def _check_probability(what: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise DataError(f"{what} is {value}; a probability must be in [0, 1]. Change it.")


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
        check_range("RandomResizedCrop area", *self.area, 0.0, 1.0, open_minimum=True)
        check_range("RandomResizedCrop ratio", *self.ratio, 0.0, 100.0, open_minimum=True)


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
        check_range("ResizeCenterCrop enlarge", self.enlarge, self.enlarge, 1.0, 100.0)


@dataclass(frozen=True)
class RandomCrop:
    """Resize the whole image to the view's size, pad it with black, cut a view at a uniform offset of whole pixels.

    Both sides are resized to the view's side, whatever the image's ratio: the step is meant for data stored in squares
    of that size (CIFAR, the miniImageNet of RFS), which the resize then leaves alone.

    Attributes:
        padding: width of the black border on each side, as a share of the view's side, rounded to whole pixels.
            At most half a side, so that some of the image is always seen.
    """

    kind: ClassVar[str] = "random_crop"
    padding: float = 8 / 84

    def __post_init__(self) -> None:
        check_range("RandomCrop padding", self.padding, self.padding, 0.0, 0.5)


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
            check_range(f"ColorJitter {name}", getattr(self, name), getattr(self, name), 0.0, 100.0)
        check_range("ColorJitter hue", self.hue, self.hue, 0.0, 0.5)
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
        check_range("GaussianBlur sigma", *self.sigma, 0.0, 100.0, open_minimum=True)
        _check_probability("GaussianBlur p", self.p)


@dataclass(frozen=True)
class Solarize:
    """Replace every channel value v >= threshold by 1 - v, with probability p.

    Attributes:
        threshold: as a share of white.
        p: probability.
    """

    kind: ClassVar[str] = "solarize"
    threshold: float = 0.5
    p: float = 0.2

    def __post_init__(self) -> None:
        check_range("Solarize threshold", self.threshold, self.threshold, 0.0, 1.0)
        _check_probability("Solarize p", self.p)


@dataclass(frozen=True)
class HorizontalFlip:
    """Mirror left and right with probability p.

    Attributes:
        p: probability.
        shared: draw once for all views of an image that set it, instead of once a view (AMDIM). What is shared is the
            random number, so views with another p may still differ.
    """

    kind: ClassVar[str] = "horizontal_flip"
    p: float = 0.5
    shared: bool = False

    def __post_init__(self) -> None:
        _check_probability("HorizontalFlip p", self.p)


@dataclass(frozen=True)
class ToLab:
    """From here on, colours are CIE Lab. A marker: renderers skip it and the views stay RGB bytes.

    The backbone converts on the training device, in float32 (``methods/backbones.py: LabBackbone``), because what
    transfers must take RGB images. The step puts the conversion's place among the others on record, so that a recipe
    can be checked: `ViewRecipe` refuses what cannot come after it.
    """

    kind: ClassVar[str] = "to_lab"


Step = (
    RandomResizedCrop
    | ResizeCenterCrop
    | RandomCrop
    | ColorJitter
    | Grayscale
    | GaussianBlur
    | Solarize
    | HorizontalFlip
    | ToLab
)

STEPS: dict[str, type[Step]] = {step.kind: step for step in get_args(Step)}
CROP_STEPS = (RandomResizedCrop, ResizeCenterCrop, RandomCrop)
COLOR_STEPS = (ColorJitter, Grayscale, Solarize)
