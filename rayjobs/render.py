"""Draw a contact sheet of the rendered data set: every class, and the targets of one image per category.

python rayjobs/render.py --output sheet.png [--image-size 96] [--seed 0] [--factors 0100] [--examples 2]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the project folder takes the place of this one on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from image_data.rendered.dataset import RenderedOptions
from image_data.rendered.sheet import contact_sheet
from rayjobs.cli import flat_parse, user_errors

__all__ = ["RenderConfig", "main"]


@dataclass(frozen=True)
class RenderConfig:
    """What to draw.

    Attributes:
        output: PNG file to write.
        image_size: side of each image in pixels, 32 to 224.
        seed: of the data set.
        factors: texture, colour, viewpoint, lighting, each 0 or 1.
        examples: shape instances shown per class.
    """

    output: Path
    image_size: int = 96
    seed: int = 0
    factors: str = RenderedOptions.factors
    examples: int = 2


def main(argv: list[str] | None = None) -> None:
    """Parse, draw, write."""
    config = flat_parse(RenderConfig, RenderConfig(Path("sheet.png")), argv, __doc__ or "")
    with user_errors():
        if config.output.suffix.lower() != ".png":
            raise ValueError(f"--output {config.output}: the sheet is a PNG image; give a name that ends in .png")
        options = RenderedOptions(image_size=config.image_size, seed=config.seed, factors=config.factors)
        sheet = contact_sheet(options, config.examples)
        config.output.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(config.output)
    print(f"{config.output}: {sheet.width} x {sheet.height} pixels")


if __name__ == "__main__":
    main()
