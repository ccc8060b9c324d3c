"""What a search space is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["SearchSpace", "SpaceContext"]


@dataclass(frozen=True)
class SpaceContext:
    """What dependent parameters may depend on.

    Attributes:
        num_images: images of the pretraining split.
        num_classes: classes of the pretraining split.
        batch_size: global batch size.
        epochs: pretraining epochs.
        methods: methods to choose from (a space's own, or the user's selection of them).
    """

    num_images: int
    num_classes: int
    batch_size: int
    epochs: int
    methods: tuple[str, ...]


@dataclass(frozen=True)
class SearchSpace:
    """What to try, what it is judged by, and what the papers published.

    Attributes:
        name: as given to ``--space``.
        methods: the methods that it samples from.
        sample: module-level function (trial, context); calls ``trial.suggest_*`` (Optuna define-by-run, so parameters
            may depend on earlier ones) and returns constants to add. Every name is a field of the method's config, of
            its optimiser or of the training settings.
        tasks: downstream tasks evaluated for every finished trial.
        objective: downstream metric that the sweep optimises; measured on validation data or classes.
        direction: whether the objective is maximised or minimised.
        fixed: settings that differ from the presets for all trials.
        presets: parameter settings tried first (the papers' defaults); one dict per trial.
        published: published numbers to compare with, name -> value, each with its source in the docstring.
        summary: one line for help texts.
    """

    name: str
    methods: tuple[str, ...]
    sample: Callable[[Any, SpaceContext], Mapping[str, Any]]
    summary: str
    tasks: tuple[str, ...] = ("few_shot", "linear", "knn", "entropy", "uniformity")
    objective: str = "few_shot/5way_5shot_acc"
    direction: Literal["maximize", "minimize"] = "maximize"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    presets: Callable[[SpaceContext], list[dict[str, Any]]] | None = None
    published: Mapping[str, float] = field(default_factory=dict)
