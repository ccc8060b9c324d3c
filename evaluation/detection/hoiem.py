"""Why detections are wrong: the false-positive diagnosis of Hoiem et al. (ECCV 2012).

Of each class the N detections with the highest scores are looked at, N being the number of its objects. Each is of the
first of these kinds that holds, taken in the order of their scores:

1. **Cor**: IoU >= 0.5 with an object of the class that no earlier detection has taken; of several, with the one that
   overlaps most. Difficult objects take part (Cor reads "not wrong") but do not add to N.
2. **Loc**: IoU >= 0.1 with an object of the class: found badly, or once more.
3. **Sim**, **Oth**: IoU >= 0.1 with an object of another class, similar to this one or not. Of several classes the one
   that overlaps most decides, the first of equals.
4. **BG**: all others.

Facts of ``wk910930/diagnosing-object-detectors: src/analyzeFalsePositives.m``, ``matchDetectionsWithGroundTruth.m``,
``setDatasetParameters.m``, followed to the letter: in 3, too, an object is taken by one detection of the class, so a
later one is compared with the objects that are left, where one that overlaps enough is. The toolbox's inclusive pixel
coordinates give the same IoUs as ours. Unlike there, a class with fewer than N detections is diagnosed by those it has.

Percentages have two denominators: all detections looked at (``top_*``, the toolbox's pies) and the false positives
among them (``fp_*``, Zhao et al. 2021). Both pool the classes; ``fp_*_mean`` is the mean over the classes that have a
false positive (the toolbox's text summary).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.detection.hoiem_figures import Pie, false_positive_figure
from evaluation.detection.objects import VOC_CLASSES, Objects, box_iou, check_detections
from evaluation.metric import Artifact, Metric, Samples
from image_data.rendered.classes import COARSE_NAMES

__all__ = ["KINDS", "Diagnosis", "class_groups", "diagnose", "diagnosis_outputs", "shares", "similar_sets"]

KINDS = ("cor", "loc", "sim", "oth", "bg")
COR, LOC, SIM, OTH, BG = range(len(KINDS))
STRONG, WEAK = 0.5, 0.1  # IoU

ClassSets = Sequence[Collection[str]]

# Classes that share a set are similar. Not a partition: a bird is similar to a dog and to an aeroplane, which differ.
VOC_ANIMALS = ("bird", "cat", "cow", "dog", "horse", "sheep")
VOC_VEHICLES = ("aeroplane", "bicycle", "boat", "bus", "car", "motorbike", "train")
VOC_FURNITURE = ("chair", "diningtable", "sofa")
VOC_SIMILAR = (
    *((*VOC_ANIMALS, "person"), VOC_VEHICLES, ("bicycle", "motorbike"), VOC_FURNITURE),
    ("aeroplane", "bird"),
)
VOC_GROUPS = {"animals": VOC_ANIMALS, "vehicles": VOC_VEHICLES, "furniture": VOC_FURNITURE}  # that have a pie

# Ours, after VOC's: vessels and towers are similar to nothing.
RENDERED_GROUPS = {
    "furniture": ("chair", "table", "lamp"),
    "vehicles": ("airplane", "boat", "car"),
    "living": ("animal", "plant"),
}

# Ours: the super-categories of COCO, which its annotation files name; "person" is one by itself.
COCO_GROUPS = {
    "vehicles": ("bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"),
    "outdoor": ("traffic light", "fire hydrant", "stop sign", "parking meter", "bench"),
    "animals": ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"),
    "accessories": ("backpack", "umbrella", "handbag", "tie", "suitcase"),
    "sports": (
        *("frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard"),
        *("surfboard", "tennis racket"),
    ),
    "kitchen": ("bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl"),
    "food": (*("banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake"),),
    "furniture": ("chair", "couch", "potted plant", "bed", "dining table", "toilet"),
    "electronics": ("tv", "laptop", "mouse", "remote", "keyboard", "cell phone"),
    "appliances": ("microwave", "oven", "toaster", "sink", "refrigerator"),
    "indoor": ("book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
}
COCO_CLASSES = ("person", *(name for names in COCO_GROUPS.values() for name in names))


@dataclass(frozen=True)
class Diagnosis:
    """What kind the detections of each class are of.

    Attributes:
        counts: int64 (C, 5), detections by class and ``KINDS``.
        num_objects: int64 (C,), N of each class.
        confused: int64 (C, C): detections of a class (row) by the other class that made them Sim or Oth (column).
    """

    counts: np.ndarray
    num_objects: np.ndarray
    confused: np.ndarray


def similar_sets(class_names: Sequence[str]) -> ClassSets:
    """The toolbox's sets for the classes of VOC, ours for those of the rendered data and COCO; no sets for others."""
    return tuple(_table(class_names, dict(enumerate(VOC_SIMILAR)), RENDERED_GROUPS, COCO_GROUPS).values())


def class_groups(class_names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Groups of classes that are summed up, for VOC those of the toolbox."""
    return _table(class_names, VOC_GROUPS, RENDERED_GROUPS, {name: COCO_GROUPS[name] for name in VOC_GROUPS})


def _table(class_names: Sequence[str], voc: Mapping, rendered: Mapping, coco: Mapping) -> dict[Any, tuple[str, ...]]:
    """The one of three tables of sets that fits the names of all classes, as far as these classes are in it."""
    names, table = set(class_names), {}
    for classes, candidate in ((VOC_CLASSES, voc), (COARSE_NAMES, rendered), (COCO_CLASSES, coco)):
        if names <= set(classes):
            table = candidate
            break
    present = {key: tuple(name for name in members if name in names) for key, members in table.items()}
    return {key: members for key, members in present.items() if members}


def similar_matrix(class_names: Sequence[str], sets: ClassSets) -> np.ndarray:
    """Which classes are similar, that is share a set: bool (C, C), symmetric, False on the diagonal.

    Raises:
        ValueError: a set names an unknown class.
    """
    place = {name: number for number, name in enumerate(class_names)}
    unknown = sorted({name for one in sets for name in one} - set(place))
    if unknown:
        raise ValueError(f"similar classes: there is no class {unknown[0]!r}; there are {', '.join(class_names)}.")
    similar = np.zeros((len(place), len(place)), bool)
    for one in sets:
        members = [place[name] for name in one]
        similar[np.ix_(members, members)] = True
    np.fill_diagonal(similar, False)
    return similar


def diagnose(
    detections: np.ndarray, objects: Sequence[Objects], similar: np.ndarray, first_false_positives: int = 0
) -> Diagnosis:
    """Counts the kinds of each class's detections with the highest scores.

    Args:
        detections: float (M, 7): row of the image, class, score, x0, y0, x1, y1.
        objects: of every image; crowds are treated as difficult objects.
        similar: bool (C, C), from ``similar_matrix``.
        first_false_positives: where positive, each class's detections up to its so-many-th false positive are looked
            at instead of N (the toolbox's other mode, there 100).

    Raises:
        ValueError: malformed detections.
    """
    num_classes = len(similar)
    check_detections(detections, len(objects), num_classes)
    counts, confused = np.zeros((num_classes, len(KINDS)), np.int64), np.zeros((num_classes, num_classes), np.int64)
    num_objects = np.zeros(num_classes, np.int64)
    for one in objects:
        np.add.at(num_objects, one.classes[~(one.difficult | one.crowd)], 1)
    for c in range(num_classes):
        rows = np.flatnonzero(detections[:, 1] == c)
        rows = rows[np.argsort(-detections[rows, 2], kind="stable")]
        if not first_false_positives:
            rows = rows[: num_objects[c]]
        for kind, other in _kinds(detections[rows], objects, c, similar[c]):
            counts[c, kind] += 1
            if other >= 0:
                confused[c, other] += 1
            if counts[c, LOC:].sum() == first_false_positives > 0:
                break
    return Diagnosis(counts, num_objects, confused)


def _kinds(
    detections: np.ndarray, objects: Sequence[Objects], own: int, similar: np.ndarray
) -> Iterator[tuple[int, int]]:
    """Of each detection of class ``own``, by falling score: its kind, and the class that made it Sim or Oth or -1."""
    taken = [np.zeros(len(one.classes), bool) for one in objects]
    for image, row in zip(detections[:, 0].astype(int), detections, strict=True):
        one, used = objects[image], taken[image]
        iou = box_iou(row[None, 3:], one.boxes)[0]
        # of every class, also where the own one decides: its detections take objects of the other classes too
        found = {int(k): _take(iou, one.classes == k, used, STRONG if k == own else WEAK) for k in set(one.classes)}
        overlap, correct = found.pop(own, (0.0, False))
        other = max(sorted(found), key=lambda k: found[k][0], default=-1)  # the first of equals
        if correct:
            yield COR, -1
        elif overlap >= WEAK:
            yield LOC, -1
        elif other >= 0 and found[other][0] >= WEAK:
            yield (SIM if similar[other] else OTH), other
        else:
            yield BG, -1


def _take(iou: np.ndarray, members: np.ndarray, used: np.ndarray, threshold: float) -> tuple[float, bool]:
    """Matches one detection with the objects of one class and marks the object that it takes.

    Returns:
        IoU with the object taken, True; or the largest IoU with any of the class, False.
    """
    free = members & ~used & (iou >= threshold)
    best = int(np.where(free if free.any() else members, iou, -1).argmax())
    if free.any():
        used[best] = True
        return float(iou[best]), True
    return float(iou[best]), False


def shares(counts: np.ndarray, false_positives: bool = False) -> np.ndarray:
    """Percentages of (..., 5) counts by ``KINDS``, adding up to 100; NaN where there is nothing to divide.

    Args:
        false_positives: without Cor: (..., 4).
    """
    parts = counts[..., LOC:] if false_positives else counts
    total = parts.sum(axis=-1, keepdims=True)
    return np.where(total > 0, 100 * parts / np.maximum(total, 1), np.nan)


def diagnosis_outputs(
    prefix: str,
    detections: np.ndarray,
    objects: Sequence[Objects],
    class_names: Sequence[str],
    similar: ClassSets | None = None,
    first_false_positives: int = 0,
) -> Iterator[Metric | Artifact | Samples]:
    """The diagnosis as outputs of an evaluation.

    Args:
        prefix: of all names, usually the task.
        detections: float (M, 7): row of the image, class, score, x0, y0, x1, y1.
        objects: of every image.
        class_names: C names.
        similar: sets of similar classes; None: ``similar_sets``.
        first_false_positives: see ``diagnose``.

    Yields:
        Metrics ``top_cor``, ``top_loc`` ... (percent of all detections looked at), ``fp_loc`` ... (percent of the false
        positives), ``fp_loc_mean`` ... (mean over classes); those that would divide by nothing are left out. Samples
        ``false_positive_counts`` (C, 5). Artifacts ``false_positives.png`` and ``.json``.
    """
    sets = similar_sets(class_names) if similar is None else similar
    matrix = similar_matrix(class_names, sets)
    diagnosis = diagnose(detections, objects, matrix, first_false_positives)
    pooled, per_class = diagnosis.counts.sum(axis=0), shares(diagnosis.counts, false_positives=True)
    if pooled.sum():
        yield from (_metric(prefix, "top", k, shares(pooled)[k]) for k in range(len(KINDS)))
    if pooled[LOC:].sum():
        of_false = shares(pooled, false_positives=True)
        yield from (_metric(prefix, "fp", k, of_false[k - LOC]) for k in range(LOC, len(KINDS)))
        means = np.nanmean(per_class, axis=0)
        yield from (_metric(prefix, "fp", k, means[k - LOC], "_mean") for k in range(LOC, len(KINDS)))
    yield Samples(f"{prefix}/false_positive_counts", diagnosis.counts)
    groups = {"all classes": tuple(class_names), **class_groups(class_names)}
    pies = [Pie(name, _sum(diagnosis.counts, class_names, members)) for name, members in groups.items()]
    looked = (
        f"the detections of each class up to its false positive number {first_false_positives}"
        if first_false_positives
        else "the N detections of each class with the highest scores, N its number of objects"
    )
    figure = false_positive_figure(pies, class_names, diagnosis.counts, looked)
    yield Artifact(f"{prefix}/false_positives.png", figure)
    data = _summary(diagnosis, class_names, matrix, pies) | {"detections": looked, "iou": {"cor": STRONG, "loc": WEAK}}
    yield Artifact(f"{prefix}/false_positives.json", json.dumps(data, indent=1).encode())


def _metric(prefix: str, what: str, kind: int, value: float, suffix: str = "") -> Metric:
    return Metric(f"{prefix}/{what}_{KINDS[kind]}{suffix}", float(value))


def _sum(counts: np.ndarray, class_names: Sequence[str], members: Collection[str]) -> np.ndarray:
    return counts[[name in members for name in class_names]].sum(axis=0)


def _summary(
    diagnosis: Diagnosis, class_names: Sequence[str], similar: np.ndarray, pies: Sequence[Pie]
) -> dict[str, Any]:
    """All counts, for reading and for other figures."""
    classes = {}
    for c, name in enumerate(class_names):
        others = [k for k in np.argsort(-diagnosis.confused[c], kind="stable") if diagnosis.confused[c, k]]
        classes[name] = {
            "objects": int(diagnosis.num_objects[c]),
            **_by_kind(diagnosis.counts[c]),
            "similar": [name for name, alike in zip(class_names, similar[c], strict=True) if alike],
            "confused_with": {class_names[k]: int(diagnosis.confused[c, k]) for k in others},
        }
    return {"groups": {pie.name: _by_kind(pie.counts) for pie in pies}, "classes": classes}


def _by_kind(counts: np.ndarray) -> dict[str, Any]:
    """Counts and both percentages; these are empty where there is nothing to divide."""
    found = {"counts": dict(zip(KINDS, counts.tolist(), strict=True))}
    for name, kinds, parts in (
        ("percent_of_detections", KINDS, shares(counts)),
        ("percent_of_false_positives", KINDS[LOC:], shares(counts, false_positives=True)),
    ):
        found[name] = {kind: part for kind, part in zip(kinds, parts.tolist(), strict=True) if not np.isnan(part)}
    return found
