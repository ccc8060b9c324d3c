"""Views of images: recipes in, uint8 batches out.

``recipes.py`` says what a view is, ``draws.py`` draws a batch's random parameters, ``fused.py`` (fast) or
``reference.py`` (torchvision, image by image) carries them out. The stream normalises later, on the training device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from image_data.contracts import DataError, ImageBuffer
from image_data.draws import ViewParameters, draw_parameters
from image_data.recipes import RECIPES, ViewRecipe

__all__ = ["RECIPES", "ViewMaker", "ViewRecipe", "find_recipe"]

Renderer = Callable[[ImageBuffer, ViewParameters, np.ndarray, int, int], None]


def find_recipe(name: str) -> ViewRecipe:
    """The recipe of that name in `RECIPES`."""
    if name not in RECIPES:
        raise DataError(f"There is no view recipe {name!r}; choose one of {', '.join(RECIPES)}.")
    return RECIPES[name]


def _find_renderer(backend: str) -> Renderer:
    """Import only the backend that is asked for: numba and torchvision both take a second to load."""
    if backend == "fused":
        from image_data.fused import fused_views

        return fused_views
    if backend == "torchvision":
        from image_data.reference import reference_views

        return reference_views
    raise DataError(f"The view backend is {backend!r}; choose 'fused' (fast) or 'torchvision' (the reference).")


class ViewMaker:
    """Makes the views of a batch of images.

    A view depends on (seed, epoch, image index, position of the recipe) only: not on the batch, the number of threads
    or the process. Can be pickled.
    """

    def __init__(
        self,
        recipes: Sequence[ViewRecipe],
        image_size: int,
        seed: int,
        backend: Literal["fused", "torchvision"] = "fused",
    ) -> None:
        """Set up the views of a run.

        Args:
            recipes: one per view.
            image_size: the run's image size in pixels; `ViewRecipe.side` gives the side of a view.
            seed: the run's seed.
            backend: "fused" is fast, "torchvision" is the reference.
        """
        if not recipes:
            raise DataError("No view recipe was given; give one per view, for example (RECIPES['moco_v2'],) * 2.")
        if image_size < 1:
            raise DataError(f"The image size is {image_size}; it must be at least 1 pixel.")
        self.recipes = tuple(recipes)
        self.sizes = tuple(recipe.side(image_size) for recipe in self.recipes)
        self.seed = seed
        self.backend = backend
        self._render = _find_renderer(backend)
        self._pool: ThreadPoolExecutor | None = None
        self._pool_threads = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pool": None, "_pool_threads": 0}  # threads do not travel between processes

    def draw(self, images: ImageBuffer, epoch: int, index: np.ndarray) -> list[ViewParameters]:
        """The random parameters of every view of a batch."""
        return [
            draw_parameters(recipe, images.heights, images.widths, size, self.seed, epoch, view, index)
            for view, (recipe, size) in enumerate(zip(self.recipes, self.sizes, strict=True))
        ]

    def __call__(
        self,
        images: ImageBuffer,
        epoch: int,
        index: np.ndarray,
        threads: int = 1,
        out: Sequence[np.ndarray] | None = None,
    ) -> list[np.ndarray]:
        """Make all views of a batch.

        Args:
            images: B decoded images.
            epoch: the epoch, which changes every random number.
            index: integers (B,), the stable ids of the images.
            threads: how many threads share the work; the result does not depend on it.
            out: arrays to fill instead of new ones, as returned by an earlier call with the same batch size.

        Returns:
            One uint8 array (B, 3, S, S) per recipe, RGB, C-contiguous.
        """
        num_images = len(images.offsets)
        if len(index) != num_images:
            raise DataError(f"The batch has {num_images} images and {len(index)} indices; give one index per image.")
        if num_images and min(images.heights.min(), images.widths.min()) < 1:
            raise DataError("The batch holds an image of zero height or width; drop it before making views.")
        shapes = [(num_images, 3, size, size) for size in self.sizes]
        views = [np.empty(shape, np.uint8) for shape in shapes] if out is None else list(out)
        if len(views) != len(shapes):
            raise DataError(f"`out` holds {len(views)} arrays; give one per recipe, {len(shapes)}.")
        for view, shape in zip(views, shapes, strict=True):
            if view.shape != shape or view.dtype != np.uint8 or not view.flags.c_contiguous:
                raise DataError(f"`out` holds {view.dtype} {view.shape}; this batch needs C-contiguous uint8 {shape}.")
        parameters = self.draw(images, epoch, index)
        if threads <= 1:
            for view, drawn in zip(views, parameters, strict=True):
                self._render(images, drawn, view, 0, num_images)
            return views
        self._render_in_threads(images, parameters, views, threads)
        return views

    def _render_in_threads(
        self, images: ImageBuffer, parameters: list[ViewParameters], views: list[np.ndarray], threads: int
    ) -> None:
        """Give every thread one slice of every view; slices end where the next one starts."""
        if self._pool is None or self._pool_threads != threads:
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="views")
            self._pool_threads = threads
        bounds = np.linspace(0, len(images.offsets), threads + 1).astype(int).tolist()
        jobs = [
            self._pool.submit(self._render, images, drawn, view, first, last)
            for view, drawn in zip(views, parameters, strict=True)
            for first, last in pairwise(bounds)
        ]
        for job in jobs:
            job.result()
