"""Complete configurations by name: every method at the papers' ImageNet scale and on small images."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable

from rayjobs.configs import PretrainConfig
from rayjobs.recipes_imagenet import IMAGENET
from rayjobs.recipes_small import SMALL

__all__ = ["RECIPES", "describe_recipe", "recipe"]

RECIPES: dict[str, Callable[[], PretrainConfig]] = IMAGENET | SMALL


def recipe(name: str) -> PretrainConfig:
    """The configuration of this name.

    Raises:
        ValueError: unknown name; the message lists the names and the closest ones.
    """
    return _find(name)()


def describe_recipe(name: str) -> str:
    """A recipe's docstring: command, hardware, time, published number."""
    return inspect.cleandoc(_find(name).__doc__ or "")


def _find(name: str) -> Callable[[], PretrainConfig]:
    if name in RECIPES:
        return RECIPES[name]
    close = difflib.get_close_matches(name, RECIPES, n=2)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(f"Unknown recipe {name!r}.{hint} The recipes are: {', '.join(RECIPES)}.")
