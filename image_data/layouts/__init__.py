"""The data sets whose own on-disk layouts are read as they are: scheme to layout, and their door."""

from __future__ import annotations

from collections.abc import Mapping

from image_data.contracts import SPLITS, DataError
from image_data.layouts.celeba import CELEBA_LAYOUTS
from image_data.layouts.cifar import CIFAR_LAYOUTS
from image_data.layouts.cityscapes import CITYSCAPES_LAYOUTS
from image_data.layouts.coco import COCO_LAYOUTS
from image_data.layouts.domains import DOMAIN_LAYOUTS
from image_data.layouts.few_shot import FEW_SHOT_LAYOUTS
from image_data.layouts.imagenet import IMAGENET_LAYOUTS
from image_data.layouts.layout import Arrays, ArraySource, Layout, ListedSource, layout_error
from image_data.layouts.places import PLACES_LAYOUTS
from image_data.layouts.voc import VOC_LAYOUTS
from image_data.sources import RowSource
from image_data.uri import DataUri, Files

__all__ = ["LAYOUTS", "ArraySource", "Arrays", "Layout", "ListedSource", "layout_error", "open_layout"]

LAYOUTS: dict[str, Layout] = {
    **FEW_SHOT_LAYOUTS,
    **CIFAR_LAYOUTS,
    **IMAGENET_LAYOUTS,
    **PLACES_LAYOUTS,
    **CELEBA_LAYOUTS,
    **VOC_LAYOUTS,
    **COCO_LAYOUTS,
    **CITYSCAPES_LAYOUTS,
    **DOMAIN_LAYOUTS,
}


def open_layout(uri: DataUri, split: str) -> Mapping[str, RowSource]:
    """Sources of a data set with a layout of its own, by split.

    Args:
        uri: its scheme is a key of ``LAYOUTS``.
        split: the split that the user named; "" for all that the data set has. "train" brings its val and test along,
            where it has them: they share its label space.

    Raises:
        DataError: unknown option, missing or wrong files, or a split that the data set does not have.
    """
    layout = LAYOUTS[uri.scheme]
    uri.check_keys(layout.options)
    files = Files(uri.path)
    if not files.is_dir():
        problem = "is a file, not a folder" if files.exists() else "does not exist"
        raise layout_error(layout, uri, f"the folder {uri.path} {problem}.")
    opened = layout.open(uri, files)
    assert set(opened) <= set(SPLITS), set(opened)
    wanted = {"": SPLITS, "train": SPLITS[:3]}.get(split, (split,))
    if split and split not in opened:
        raise DataError(
            f"{split}={uri.text}: {layout.name} has no split {split!r}; it has {', '.join(opened)} ({layout.summary})."
        )
    return {name: opened[name] for name in wanted if name in opened}
