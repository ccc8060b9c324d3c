"""The 60 fine classes in 10 coarse categories, and which of them pretraining may see."""

from __future__ import annotations

from image_data.contracts import DataError
from image_data.rendered.draws import Draws
from image_data.rendered.furniture import CHAIRS, LAMPS, TABLES
from image_data.rendered.nature import ANIMALS, PLANTS
from image_data.rendered.shapes import Shape, Solid
from image_data.rendered.things import TOWERS, VESSELS
from image_data.rendered.vehicles import AIRPLANES, BOATS, CARS

__all__ = ["CLASS_NAMES", "COARSE_NAMES", "FAMILIES", "build_solid", "class_split", "coarse_of"]

# coarse = way of construction, fine = structural variant; continuous proportions are drawn per instance
FAMILIES = {
    "chair": CHAIRS,
    "table": TABLES,
    "lamp": LAMPS,
    "airplane": AIRPLANES,
    "boat": BOATS,
    "car": CARS,
    "vessel": VESSELS,
    "tower": TOWERS,
    "animal": ANIMALS,
    "plant": PLANTS,
}
COARSE_NAMES = tuple(FAMILIES)
CLASS_NAMES = tuple(f"{coarse}/{fine}" for coarse, variants in FAMILIES.items() for fine in variants)
_PER_FAMILY = len(CLASS_NAMES) // len(COARSE_NAMES)
_BUILDERS = tuple(builder for variants in FAMILIES.values() for builder in variants.values())
_SHAPE = 0  # stream name of an instance's proportions


def coarse_of(class_id: int) -> int:
    """The coarse category (0 to 9) of a global class number."""
    return class_id // _PER_FAMILY


def build_solid(class_id: int, seed: int, instance: int) -> Solid:
    """The object with this instance number, the same on every call."""
    shape = Shape()
    _BUILDERS[class_id](Draws(seed, class_id, instance, _SHAPE), shape)
    return shape.finish()


def _pools() -> tuple[list[int], list[int], list[int]]:
    """Global class numbers of the base, validation and novel pools, 36 + 12 + 12, families interleaved.

    Every family gives one class to validation, one to novel; two families give a second one to either. Which variant
    goes where rotates with the family, so that no pool collects the first-listed (plainest) variants.
    """
    base, val, novel = [], [], []
    for rank in range(_PER_FAMILY):
        for family in range(len(COARSE_NAMES)):
            class_id = family * _PER_FAMILY + (rank + family) % _PER_FAMILY
            if rank == 4 or (rank == 3 and family in (0, 5)):
                val.append(class_id)
            elif rank == 5 or (rank == 3 and family in (2, 7)):
                novel.append(class_id)
            else:
                base.append(class_id)
    return base, val, novel


def class_split(num_classes: int = len(CLASS_NAMES)) -> dict[str, tuple[int, ...]]:
    """Which global class numbers are base, validation and novel classes; it does not depend on the seed.

    Args:
        num_classes: of all three together: a fifth each for validation and novel, the rest base.

    Returns:
        ``{"base": ..., "val_classes": ..., "novel_classes": ...}``, sorted and disjoint.
    """
    most = len(CLASS_NAMES)
    if not len(COARSE_NAMES) <= num_classes <= most:
        raise DataError(f"rendered: classes={num_classes} is not possible; give a number from 10 to {most}")
    base, val, novel = _pools()
    held_out = (num_classes + 2) // 5  # the nearest integer to a fifth; at most 36 are left for base
    counts = {"base": num_classes - 2 * held_out, "val_classes": held_out, "novel_classes": held_out}
    pools = {"base": base, "val_classes": val[::-1], "novel_classes": novel[::-1]}
    return {name: tuple(sorted(pools[name][:count])) for name, count in counts.items()}
