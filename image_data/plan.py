"""Which image of which source goes to which split under which label: decided from the indices alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from image_data.contracts import SPLITS, DataError
from image_data.sources import SourceIndex
from image_data.splits import ClassSplit, check_fractions, split_classes, split_images
from image_data.subset import choose_images, frequent_classes
from image_data.uri import some

if TYPE_CHECKING:
    from image_data.prepare import DataConfig

__all__ = ["DEFAULT_CLASS_SPLIT", "Images", "plan_splits"]

DEFAULT_CLASS_SPLIT = (0.64, 0.16, 0.20)  # miniImageNet's 64, 16 and 20 classes
_BASE_SPLITS = SPLITS[:3]  # train, val, test: one label space
_HELD_OUT = SPLITS[3:]  # val_classes, novel_classes: each its own


@dataclass(frozen=True)
class Images:
    """Images from one or several sources under one label space.

    Attributes:
        source: int64 (N,), number of the source.
        position: int64 (N,), in the source's index.
        names: one per image, unique over sources.
        labels: int64 (N,), indices into ``class_names``.
        class_names: names of the labels.
        coarse: int64 (N,), indices into ``coarse_names``; all -1 where a source has no coarse labels.
        coarse_names: the same in all splits.
        groups: one per image, or None.
    """

    source: np.ndarray
    position: np.ndarray
    names: Sequence[str]
    labels: np.ndarray
    class_names: tuple[str, ...]
    coarse: np.ndarray
    coarse_names: tuple[str, ...]
    groups: Sequence[str] | None

    def take(self, chosen: np.ndarray) -> Images:
        """The images of a mask or of an array of rows; class names stay."""
        rows = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        listed = rows.tolist()
        return replace(
            self,
            source=self.source[rows],
            position=self.position[rows],
            names=[self.names[i] for i in listed],
            labels=self.labels[rows],
            coarse=self.coarse[rows],
            groups=None if self.groups is None else [self.groups[i] for i in listed],
        )

    def compact(self, classes: np.ndarray) -> Images:
        """The images of some classes, whose labels become 0..len(classes)-1 in the order of ``classes``."""
        new_label = np.full(len(self.class_names), -1, np.int64)
        new_label[classes] = np.arange(len(classes))
        kept = self.take(new_label[self.labels] >= 0)
        names = tuple(self.class_names[i] for i in classes)
        return replace(kept, labels=new_label[kept.labels], class_names=names)

    def with_coarse_labels(self) -> Images:
        """The same images, labelled by coarse class."""
        return replace(self, labels=self.coarse, class_names=self.coarse_names)


def plan_splits(config: DataConfig, indices: Mapping[str, SourceIndex]) -> tuple[dict[str, Images], str]:
    """Divides the images of all sources by the rule that the configuration states.

    Args:
        config: the data configuration.
        indices: by name of the split; the key "" stands for a source that has to be split.

    Returns:
        Images per split, and a sentence that says how the splits were made.
    """
    config.subset.check()
    check_fractions(config.image_split, "image_split", "train, val and test images")
    if isinstance(config.class_split, tuple) and not {"", "train"} & set(indices):
        raise DataError(
            f"class_split={config.class_split} has no effect: there is no train split to take classes from."
        )
    coarse_names = _coarse_names(config, indices)
    sources = list(indices)
    notes = _given_notes(indices)
    splits: dict[str, Images] = {}
    base = [name for name in ("", *_BASE_SPLITS) if name in indices]
    if base:
        _check_label_space(indices)
        images = _merge([(sources.index(name), name, indices[name]) for name in base], coarse_names)
        splits |= _split_base(config, _drop_rare(config, images, notes), sources, notes)
    for name in _HELD_OUT:
        if name in indices:
            images = _merge([(sources.index(name), name, indices[name])], coarse_names)
            splits[name] = _drop_rare(config, images, notes)
    _check_disjoint_classes(splits, notes)
    if config.subset.num_categories:  # draws fine classes, so that both kinds of labels are of the same images
        splits = _share_labels(_cut_train(config, splits))
    if config.subset.labels == "coarse":
        splits = {name: images.with_coarse_labels() for name, images in splits.items()}
    splits = _share_labels(splits if config.subset.num_categories else _cut_train(config, splits))
    notes += [sentence] if (sentence := config.subset.sentence()) else []
    return {name: splits[name] for name in SPLITS if name in splits and splits[name].names}, "; ".join(notes)


def _given_notes(indices: Mapping[str, SourceIndex]) -> list[str]:
    """How the splits that need no rule were made."""
    by_origin: dict[str, list[str]] = {}
    for name in (name for name in SPLITS if name in indices):
        by_origin.setdefault(indices[name].origin or "as given", []).append(name)
    return [f"{', '.join(names)} {origin}" for origin, names in by_origin.items()]


def _coarse_names(config: DataConfig, indices: Mapping[str, SourceIndex]) -> tuple[str, ...]:
    """Names of the coarse labels over all sources; empty unless every source has them."""
    without = [name or "the data" for name, index in indices.items() if index.coarse is None]
    subset = config.subset
    if without and (subset.labels == "coarse" or subset.num_categories):
        option = (
            "subset.labels=coarse" if subset.labels == "coarse" else f"subset.num_categories={subset.num_categories}"
        )
        raise DataError(
            f"{option}, but there are no coarse labels in {', '.join(without)}. Name their column with "
            "coarse=COLUMN (parquet, csv, webdataset), or leave the option out; folder: has no coarse ones."
        )
    return () if without else tuple(dict.fromkeys(name for index in indices.values() for name in index.coarse_names))


def _merge(parts: Sequence[tuple[int, str, SourceIndex]], coarse_names: tuple[str, ...]) -> Images:
    """Images of several (number, split, index) under one label space: the first one's classes first."""
    class_names = tuple(dict.fromkeys(name for _, _, index in parts for name in index.class_names))
    names: list[str] = []
    groups: list[str] = []
    columns: list[tuple[np.ndarray, ...]] = []
    for source, prefix, index in parts:
        size = len(index.names)
        own = [f"{prefix}/{name}" if prefix else name for name in index.names]
        names += own
        groups += own if index.groups is None else index.groups
        coarse = np.full(size, -1, np.int64)
        if coarse_names and index.coarse is not None:
            coarse = _renumber(index.coarse, index.coarse_names, coarse_names)
        labels = _renumber(index.labels, index.class_names, class_names)
        columns.append((np.full(size, source), np.arange(size), labels, coarse))
    source, position, labels, coarse = (np.concatenate(column) for column in zip(*columns, strict=True))
    grouped = groups if any(index.groups is not None for _, _, index in parts) else None
    return Images(source, position, names, labels, class_names, coarse, coarse_names, grouped)


def _renumber(labels: np.ndarray, names: Sequence[str], new_names: Sequence[str]) -> np.ndarray:
    ids = {name: i for i, name in enumerate(new_names)}
    return np.array([ids[name] for name in names], np.int64)[labels]


def _check_label_space(indices: Mapping[str, SourceIndex]) -> None:
    """val and test may have no class that train lacks."""
    if "train" not in indices:
        return
    known = set(indices["train"].class_names)
    for name in ("val", "test"):
        extra = [c for c in indices[name].class_names if c not in known] if name in indices else []
        if extra:
            raise DataError(
                f"{name} has classes that train does not have: {some(extra)}. The three splits share one label space; "
                "give classes that pretraining never sees as val_classes=URI or novel_classes=URI."
            )


def _drop_rare(config: DataConfig, images: Images, notes: list[str]) -> Images:
    """Leaves out the classes with too few images."""
    minimum = config.subset.min_per_class
    frequent = frequent_classes(images.labels, len(images.class_names), minimum)
    if not frequent.any():
        largest = int(np.bincount(images.labels).max())
        raise DataError(f"subset.min_per_class={minimum}: no class is left, the largest has {largest} images.")
    if not frequent.all():
        notes.append(f"{np.sum(~frequent)} of {len(frequent)} classes left out (fewer than {minimum} images)")
    return images.compact(np.flatnonzero(frequent))


def _split_base(config: DataConfig, images: Images, sources: Sequence[str], notes: list[str]) -> dict[str, Images]:
    """Splits the images of the bare source, or of train, val and test, by class and then by image."""
    fractions = config.class_split
    if fractions == "auto":
        fractions = DEFAULT_CLASS_SPLIT if "" in sources else None
    if fractions is None:
        return _split_by_image(config, images, sources, notes)
    given = [name for name in sources if name in _HELD_OUT]
    if given:
        raise DataError(f"class_split={fractions} and {', '.join(given)}=URI are both given: choose one of them.")
    parts = split_classes(images.class_names, fractions, config.data_seed)
    _check_groups(images, parts)
    shares = "/".join(f"{f:g}" for f in fractions)
    notes.append(
        f"classes split {shares} into {len(parts.base)} base, {len(parts.val)} val_classes and {len(parts.novel)} "
        f"novel_classes (seed {config.data_seed})"
    )
    held_out = {"val_classes": images.compact(parts.val), "novel_classes": images.compact(parts.novel)}
    return _split_by_image(config, images.compact(parts.base), sources, notes) | held_out


def _check_groups(images: Images, parts: ClassSplit) -> None:
    """No group may have images both of base and of held-out classes."""
    role = np.zeros(len(images.class_names), np.int64)
    role[parts.val], role[parts.novel] = 1, 2
    first_role: dict[str, int] = {}
    roles = role[images.labels].tolist()
    divided = [g for g, r in zip(images.groups or (), roles, strict=False) if first_role.setdefault(g, r) != r]
    if divided:
        divided = list(dict.fromkeys(divided))
        raise DataError(
            f"{len(divided)} groups have images of several classes, some base and some held-out, for example "
            f"{some(divided, 5)}. Use class_split=None, another group column, or coarser classes."
        )


def _split_by_image(config: DataConfig, images: Images, sources: Sequence[str], notes: list[str]) -> dict[str, Images]:
    """Images of train, val and test: as given, and what is missing taken from train."""
    part_of_source = np.array([_BASE_SPLITS.index(name) if name in _BASE_SPLITS else 0 for name in sources])
    part = part_of_source[images.source]
    missing = [name not in sources and config.image_split[i] > 0 for i, name in enumerate(_BASE_SPLITS)]
    if any(missing[1:]) and (part == 0).any():
        val, test = (f if m else 0.0 for f, m in zip(config.image_split[1:], missing[1:], strict=True))
        fractions = (1 - val - test, val, test)
        train = np.flatnonzero(part == 0)
        own = images.take(train)
        part[train] = split_images(own.names, own.labels, own.groups, fractions, config.data_seed)
        shares = "/".join(f"{f:g}" for f in fractions)
        unit = "group by group" if images.groups is not None else "image by image"
        notes.append(f"images of each class split {shares} into train, val and test, {unit} (seed {config.data_seed})")
    return {name: images.take(part == i) for i, name in enumerate(_BASE_SPLITS) if (part == i).any()}


def _check_disjoint_classes(splits: Mapping[str, Images], notes: list[str]) -> None:
    """Held-out classes may not be among the base classes, as far as names tell."""
    base = {name for split in _BASE_SPLITS if split in splits for name in splits[split].class_names}
    for split in _HELD_OUT:
        shared = [name for name in splits[split].class_names if name in base] if split in splits else []
        if not shared:
            continue
        if all(name.isdecimal() for name in shared):
            notes.append(f"classes of {split} are numbers: that they are not among train's could not be checked")
            continue
        raise DataError(
            f"{split} has classes that train has too: {some(shared)}. Its classes must be ones that pretraining never "
            "sees; for further images of the same classes use val=URI or test=URI."
        )


def _cut_train(config: DataConfig, splits: dict[str, Images]) -> dict[str, Images]:
    """The subset of train, with the rest as it was."""
    subset = config.subset
    sizes = (subset.classes, subset.num_classes, subset.num_categories, subset.num_images)
    if subset.fraction == 1 and not any(sizes):
        return splits
    if "train" not in splits:
        raise DataError("a subset of train is asked for, but there is no train split; give train=URI.")
    train = splits["train"]
    for name in (name for name in _HELD_OUT if name in splits):
        held_out = [c for c in subset.classes if c in splits[name].class_names and c not in train.class_names]
        if held_out:
            raise DataError(
                f"subset.classes: {some(held_out)} belong to {name}, which pretraining never sees (data_seed "
                f"{config.data_seed}). Choose among the base classes, or use class_split=None."
            )
    chosen = choose_images(train.names, train.labels, train.class_names, subset, train.coarse, train.coarse_names)
    return splits | {"train": train.take(chosen)}


def _share_labels(splits: dict[str, Images]) -> dict[str, Images]:
    """Numbers labels without gaps: train, val and test by train's classes, held-out splits by their own."""
    base = {name: splits[name] for name in _BASE_SPLITS if name in splits}
    seen = [base["train"]] if "train" in base else list(base.values())
    result = dict(splits)
    if base:
        classes = np.unique(np.concatenate([images.labels for images in seen]))
        result |= {name: images.compact(classes) for name, images in base.items()}
    for name in (name for name in _HELD_OUT if name in splits):
        result[name] = splits[name].compact(np.unique(splits[name].labels))
    return result
