"""Where images come from, how they are divided, and how they reach the train loop.

``image_data.prepare.prepare`` turns data URIs into packed shards, once; the streams make augmented batches of them;
``open_source`` gives the encoded images as a Ray Dataset. Names load their module when they are first used, so
importing this package imports neither Ray nor numba.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from image_data.contracts import IMAGENET_MEAN, IMAGENET_STD, SPLITS, DataError, ImageBatch, ImageBuffer

if TYPE_CHECKING:
    from image_data.decode import UnreadableImage, decode_image
    from image_data.prepare import DataConfig, PreparedData, SplitInfo, open_source
    from image_data.ray_stream import RayDataStream
    from image_data.store import DecodedStore
    from image_data.stream import ImageStream, MemoryStream, to_device
    from image_data.subset import SubsetConfig
    from image_data.views import RECIPES, ViewMaker, ViewRecipe

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "RECIPES",
    "SPLITS",
    "DataConfig",
    "DataError",
    "DecodedStore",
    "ImageBatch",
    "ImageBuffer",
    "ImageStream",
    "MemoryStream",
    "PreparedData",
    "RayDataStream",
    "SplitInfo",
    "SubsetConfig",
    "UnreadableImage",
    "ViewMaker",
    "ViewRecipe",
    "decode_image",
    "open_source",
    "to_device",
]

_MODULES = {
    "decode": ("UnreadableImage", "decode_image"),
    "prepare": ("DataConfig", "PreparedData", "SplitInfo", "open_source"),
    "ray_stream": ("RayDataStream",),
    "store": ("DecodedStore",),
    "stream": ("ImageStream", "MemoryStream", "to_device"),
    "subset": ("SubsetConfig",),
    "views": ("RECIPES", "ViewMaker", "ViewRecipe"),
}


def __getattr__(name: str) -> Any:
    """Loads a public name's module on first use (PEP 562)."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"image_data.{module}"), name)
    raise AttributeError(f"module 'image_data' has no attribute {name!r}")
