"""Rows: determinism, splits, consistency of the targets, errors, and whether there is something to learn."""

from __future__ import annotations

import hashlib
import io
import itertools
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from image_data.contracts import SPLITS, DataError
from image_data.rendered.classes import class_split
from image_data.rendered.dataset import (
    CLASS_NAMES,
    COARSE_NAMES,
    RenderedOptions,
    parse_options,
    rendered_rows,
    split_class_names,
    split_size,
)

SMALL = RenderedOptions(
    image_size=40,
    instances_per_class=(2, 1, 1),
    held_out_instances=1,
    images_per_instance=2,
    factors="1111",
    classes=15,
)


def array(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def digest(rows) -> str:
    state = hashlib.sha256()
    for row in rows:
        for key in sorted(row):
            state.update(row[key] if isinstance(row[key], bytes) else repr(row[key]).encode())
    return state.hexdigest()


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {split: list(rendered_rows(SMALL, split)) for split in SPLITS}


def test_bytes_do_not_depend_on_threads_or_ranges(rows):
    expected = digest(rows["train"])
    assert digest(rendered_rows(SMALL, "train", threads=3)) == expected
    total = split_size(SMALL, "train")
    cuts = [0, 1, 4, 5, 19, total]
    parts = [row for a, b in itertools.pairwise(cuts) for row in rendered_rows(SMALL, "train", 2, a, b)]
    assert digest(parts) == expected
    assert list(rendered_rows(SMALL, "train", start=total)) == []


def test_bytes_do_not_depend_on_the_process(rows):
    code = (
        "import hashlib\n"
        "from image_data.rendered.dataset import RenderedOptions, rendered_rows\n"
        f"rows = rendered_rows({SMALL!r}, 'train', threads=2)\n"
        "print(hashlib.sha256(b''.join(r['image'] + r['mask'] + r['depth'] for r in rows)).hexdigest())"
    )
    root = Path(__file__).resolve().parents[3]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    here = b"".join(row["image"] + row["mask"] + row["depth"] for row in rows["train"])
    assert out.stdout.strip() == hashlib.sha256(here).hexdigest()


def test_seed_changes_every_image(rows):
    other = list(rendered_rows(replace(SMALL, seed=1), "train", stop=6))
    assert all(a["image"] != b["image"] and a["mask"] != b["mask"] for a, b in zip(other, rows["train"], strict=False))


def test_more_training_instances_leave_the_others_as_they_were(rows):
    more = replace(SMALL, instances_per_class=(3, 1, 1))
    assert digest(rendered_rows(more, "val")) == digest(rows["val"])
    first = list(rendered_rows(more, "train", stop=4))
    assert digest(first) == digest(rows["train"][:4])


def test_instances_and_images_are_disjoint_over_splits(rows):
    owners = defaultdict(set)
    for split, members in rows.items():
        for row in members:
            owners[row["instance"]].add(split)
    assert all(len(splits) == 1 for splits in owners.values())
    everything = [row for members in rows.values() for row in members]
    assert len({row["image"] for row in everything}) == len({row["name"] for row in everything}) == len(everything)
    assert len({row["mask"] for row in everything}) > 0.95 * len(everything)  # also the shapes differ


def test_sizes_labels_and_names_agree(rows):
    for split, members in rows.items():
        names = split_class_names(SMALL, split)
        assert len(members) == split_size(SMALL, split)
        assert sorted({row["label"] for row in members}) == list(range(len(names)))
        for row in members:
            assert row["name"].startswith(names[row["label"]] + "/")
            assert names[row["label"]].startswith(COARSE_NAMES[row["coarse"]] + "/")
    assert sum(split_size(RenderedOptions(), split) for split in SPLITS) == 36 * 84 + 24 * 40


def test_class_split_is_disjoint_and_covers_every_category():
    pools = class_split()
    assert [len(pools[name]) for name in ("base", "val_classes", "novel_classes")] == [36, 12, 12]
    assert sorted(sum(pools.values(), ())) == list(range(60))
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 60
    for pool in pools.values():
        assert {class_id // 6 for class_id in pool} == set(range(10))
    for number in range(10, 61):
        parts = class_split(number)
        assert sum(map(len, parts.values())) == number == len(set(sum(parts.values(), ())))
        assert len({class_id // 6 for class_id in parts["base"]}) == min(10, len(parts["base"]))


def test_targets_agree_with_each_other(rows):
    visible = total = 0
    for row in (row for members in rows.values() for row in members):
        image, mask, depth = array(row["image"]), array(row["mask"]), array(row["depth"])
        assert image.shape == (row["height"], row["width"], 3) == (40, 40, 3)
        assert image.dtype == mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {0, row["coarse"] + 1}
        assert np.array_equal(depth > 0, mask > 0)
        distance = depth[depth > 0] * row["depth_scale"]
        assert 2.0 < distance.min() <= distance.max() < 5.6
        assert distance.max() == pytest.approx(row["depth_max"])
        y, x = np.nonzero(mask)
        assert row["box"] == (x.min(), y.min(), x.max() + 1, y.max() + 1)
        assert np.shape(row["landmarks"]) == (5, 3)
        for u, v, flag in row["landmarks"]:
            assert flag in (0.0, 1.0)
            if flag:
                assert x.min() <= u <= x.max() + 1
                assert y.min() <= v <= y.max() + 1
            visible, total = visible + flag, total + 1
        assert 0 <= row["pose"] <= 4
        assert len(row["rotation"]) == 3
    assert 0.5 < visible / total < 0.98


def test_every_class_shows_an_object_of_reasonable_size():
    options = RenderedOptions(32, (3, 1, 1), held_out_instances=3, images_per_instance=2, factors="1111")
    areas = defaultdict(list)
    for split in ("train", "val_classes", "novel_classes"):
        for row in rendered_rows(options, split):
            areas[row["name"].rsplit("/", 1)[0]].append((array(row["mask"]) > 0).mean())
    assert set(areas) == set(CLASS_NAMES)
    for name, values in areas.items():
        assert 0.05 < np.mean(values) < 0.6, name
        assert min(values) > 0.01, name
        assert max(values) < 0.8, name


@pytest.mark.parametrize("size", [32, 224])
def test_extreme_sizes_work(size):
    row = next(rendered_rows(RenderedOptions(image_size=size), "test"))
    assert array(row["image"]).shape == (size, size, 3)


def test_same_object_at_two_sizes_agrees():
    small, large = (next(rendered_rows(RenderedOptions(image_size=size), "test")) for size in (32, 128))
    assert small["rotation"] == large["rotation"]
    assert np.array(large["box"]) / 4 == pytest.approx(np.array(small["box"]), abs=1.01)
    assert np.array(large["landmarks"])[:, :2] / 4 == pytest.approx(np.array(small["landmarks"])[:, :2], abs=1e-3)


def test_query_sets_every_option():
    query = {
        "image_size": "48",
        "instances": "4,2,1",
        "held_out_instances": "3",
        "images_per_instance": "5",
        "seed": "9",
        "factors": "1010",
        "classes": "30",
    }
    assert parse_options(query) == RenderedOptions(48, (4, 2, 1), 3, 5, 9, "1010", 30)
    assert parse_options({}) == RenderedOptions()


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"size": "64"}, ["'size'", "image_size"]),
        ({"image_size": "31"}, ["31", "32 to 224"]),
        ({"image_size": "225"}, ["225", "32 to 224"]),
        ({"image_size": "big"}, ["'big'", "whole number"]),
        ({"factors": "111"}, ["'111'", "four digits"]),
        ({"factors": "1121"}, ["'1121'"]),
        ({"classes": "61"}, ["61", "10 to 60"]),
        ({"classes": "9"}, ["9", "10 to 60"]),
        ({"instances": "3,2"}, ["three values"]),
        ({"images_per_instance": "0"}, ["images_per_instance=0"]),
    ],
)
def test_wrong_options_are_named(query, words):
    with pytest.raises(DataError) as error:
        parse_options(query)
    assert all(word in str(error.value) for word in words)


def test_unknown_split_is_named():
    with pytest.raises(DataError, match=r"'testing'.*novel_classes"):
        list(rendered_rows(SMALL, "testing"))


def nearest_centroid(features, labels, test_features, test_labels) -> float:
    centroids = np.stack([features[labels == c].mean(0) for c in range(labels.max() + 1)])
    guess = ((test_features[:, None] - centroids) ** 2).sum(-1).argmin(1)
    return float((guess == test_labels).mean())


def accuracy(factors: str, feature) -> float:
    options = RenderedOptions(32, (6, 1, 3), images_per_instance=1, factors=factors, classes=20)
    sides = []
    for split in ("train", "test"):
        members = list(rendered_rows(options, split))
        sides += [np.stack([feature(row) for row in members]), np.array([row["label"] for row in members])]
    return nearest_centroid(*sides)


def histogram(row: dict) -> np.ndarray:
    pixels = array(row["image"])[array(row["mask"]) > 0] // 64
    counts = np.bincount(pixels @ np.array([16, 4, 1]), minlength=64)
    return counts / counts.sum()


def silhouette(row: dict) -> np.ndarray:
    mask = array(row["mask"]) > 0
    return mask.reshape(8, 4, 8, 4).mean((1, 3)).ravel()


def test_shape_tells_the_class_and_random_colour_does_not():
    chance = 1 / 12
    assert accuracy("0100", silhouette) > 6 * chance
    assert accuracy("1111", silhouette) > 1.5 * chance
    assert accuracy("1111", histogram) < 3 * chance
    assert accuracy("0000", histogram) > 3 * chance  # the hue tied to the class
