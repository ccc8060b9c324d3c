"""A picture of the rendered data set for people: every class, and one image of every category with its targets."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from image_data.contracts import DataError
from image_data.rendered.classes import CLASS_NAMES, COARSE_NAMES
from image_data.rendered.dataset import RenderedOptions, rendered_rows

__all__ = ["contact_sheet"]

_LABEL = 13  # pixels of text above each class
_MASK_COLOURS = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#bcf60c",
                 "#fabebe")  # fmt: skip
_POSES = ("top", "pi", "-pi/2", "0", "pi/2")


def _class_rows(options: RenderedOptions) -> Iterator[dict]:
    """Rows of all 60 classes, ``instances_per_class[0]`` instances each."""
    for split in ("train", "val_classes", "novel_classes"):
        yield from rendered_rows(options, split)


def _picture(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def _targets(row: dict) -> list[Image.Image]:
    """(image with box and landmarks, mask, depth) of a row."""
    drawn = _picture(row["image"]).copy()
    draw = ImageDraw.Draw(drawn)
    x0, y0, x1, y1 = row["box"]
    draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline="white")
    for x, y, visible in row["landmarks"]:
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill="lime" if visible else None, outline="black")
    draw.text((2, 1), _POSES[row["pose"]], fill="white", stroke_width=1, stroke_fill="black")
    mask = np.asarray(_picture(row["mask"]))
    coloured = Image.new("RGB", drawn.size)
    coloured.paste(
        Image.new("RGB", drawn.size, _MASK_COLOURS[row["coarse"]]), mask=Image.fromarray((mask > 0) * np.uint8(255))
    )
    depth = np.asarray(_picture(row["depth"])).astype(np.float32) * row["depth_scale"]
    near = depth[depth > 0].min(initial=row["depth_max"])
    shade = np.where(depth > 0, 255 - 200 * (depth - near) / max(row["depth_max"] - near, 1e-6), 0)
    return [drawn, coloured, Image.fromarray(shade.astype(np.uint8)).convert("RGB")]


def contact_sheet(options: RenderedOptions, examples: int = 2) -> Image.Image:
    """All 60 classes, a row per category, and to the right the targets of one image per category.

    Args:
        options: image size, seed and factors are used.
        examples: instances per class.
    """
    if not 1 <= examples <= 20:
        raise DataError(f"a contact sheet with {examples} examples per class is not possible; give 1 to 20")
    shown = replace(
        options, instances_per_class=(examples, 1, 1), held_out_instances=examples, images_per_instance=1,
        classes=len(CLASS_NAMES),
    )  # fmt: skip
    rows: dict[str, list[dict]] = {name: [] for name in CLASS_NAMES}
    for row in _class_rows(shown):
        rows[row["name"].rsplit("/", 1)[0]].append(row)
    size, per_family = options.image_size, len(CLASS_NAMES) // len(COARSE_NAMES)
    columns = per_family * examples
    sheet = Image.new("RGB", ((columns + 3) * size + _LABEL, len(COARSE_NAMES) * (size + _LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (name, members) in enumerate(rows.items()):
        top = number // per_family * (size + _LABEL)
        left = number % per_family * examples * size
        draw.text((left + 2, top), name, fill="black")
        for k, row in enumerate(members):
            sheet.paste(_picture(row["image"]), (left + k * size, top + _LABEL))
        if number % per_family == 0:
            draw.text((columns * size + _LABEL, top), "box, landmarks, pose; mask; depth", fill="black")
            for k, target in enumerate(_targets(members[-1])):
                sheet.paste(target, ((columns + k) * size + _LABEL, top + _LABEL))
    return sheet
