"""Cityscapes: masks with train ids, from a tiny tree in exactly its layout."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from image_data.contracts import DataError
from image_data.layouts import LAYOUTS
from image_data.layouts.cityscapes import CITYSCAPES_CLASSES, CITYSCAPES_IGNORE
from image_data.prepare import PreparedData
from tests.image_data import annotated_samples as samples
from tests.image_data.layout_samples import write
from tests.image_data.prepared_layouts import make, rows
from tests.image_data.samples import encode

# Names of all label ids, from cityscapesScripts' table (helpers/labels.py); 19 of them are classes by name.
LABELS = (
    *("unlabeled", "ego vehicle", "rectification border", "out of roi", "static", "dynamic", "ground", "road"),
    *("sidewalk", "parking", "rail track", "building", "wall", "fence", "guard rail", "bridge", "tunnel", "pole"),
    *("polegroup", "traffic light", "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car"),
    *("truck", "bus", "caravan", "trailer", "train", "motorcycle", "bicycle"),
)

FIRST = "train/aachen/aachen_000000_000019"
IMAGE, MASK = f"leftImg8bit/{FIRST}_leftImg8bit.png", f"gtFine/{FIRST}_gtFine_labelIds.png"


def masks(prepared: PreparedData, split: str) -> dict[str, np.ndarray]:
    """<city>/<name> of the image -> its mask."""
    found = {}
    for row in rows(prepared, split):
        with Image.open(io.BytesIO(row["mask"])) as picture:
            assert picture.mode == "L"
            found["/".join(row["name"].split("/")[-2:])] = np.array(picture)
    return found


def in_train_ids(label_ids: np.ndarray) -> np.ndarray:
    """The plain form of the table."""
    mapped = np.full(label_ids.shape, CITYSCAPES_IGNORE, np.uint8)
    for label_id, name in enumerate(LABELS):
        if name in CITYSCAPES_CLASSES:
            mapped[label_ids == label_id] = CITYSCAPES_CLASSES.index(name)
    return mapped


@pytest.fixture
def city(tmp_path):
    return samples.write_cityscapes(tmp_path / "c")


def test_cityscapes(tmp_path, city):
    prepared = make(tmp_path, f"cityscapes:{tmp_path / 'c'}")
    assert [(name, info.num_images) for name, info in prepared.splits.items()] == [
        ("train", 9),
        ("val", 3),
        ("test", 6),
    ]
    assert prepared.split("train").class_names == ("image",)
    found = {name: mask for split in prepared.splits for name, mask in masks(prepared, split).items()}
    assert found.keys() == city.keys()
    for name, mask in found.items():
        np.testing.assert_array_equal(mask, in_train_ids(city[name]))
    present = set(np.unique(np.stack(list(found.values()))).tolist())
    assert {0, 2, 10, 13, CITYSCAPES_IGNORE} <= present <= {*range(19), CITYSCAPES_IGNORE}
    for split in prepared.splits:
        for row in rows(prepared, split):
            assert row["mask_kind"] == "cityscapes"
            assert row["image"] == (tmp_path / "c" / row["name"].split("/", 1)[1]).read_bytes()


def test_no_city_is_in_two_splits(tmp_path, city):
    prepared = make(tmp_path, f"cityscapes:{tmp_path / 'c'}", image_split=(0.5, 0.5, 0))
    cities = {split: {name.split("/")[0] for name in masks(prepared, split)} for split in prepared.splits}
    assert [len(own) for own in cities.values()] == [2, 2, 2]
    assert cities["test"] == {"frankfurt", "munster"}
    assert cities["train"] | cities["val"] == {"aachen", "bochum", "bremen", "ulm"}
    assert "group by group" in prepared.rule


def test_every_label_id(tmp_path, city):
    ids = np.tile(np.arange(34, dtype=np.uint8), (48, 2))[:, :64]
    write(tmp_path / "c" / MASK, encode(ids))
    prepared = make(tmp_path, f"cityscapes:{tmp_path / 'c'}")
    found = masks(prepared, "train") | masks(prepared, "val")
    own = found["aachen/aachen_000000_000019_leftImg8bit.png"]
    np.testing.assert_array_equal(own, in_train_ids(ids))
    assert set(own[0].tolist()) == {*range(19), CITYSCAPES_IGNORE}


def test_masks_of_train_ids_count_where_there_are_no_others(tmp_path, city):
    expected = make(tmp_path, f"cityscapes:{tmp_path / 'c'}").content
    for path in (tmp_path / "c" / "gtFine").rglob("*_labelIds.png"):
        name = path.name.replace("labelIds", "labelTrainIds")
        write(path.parent / name, encode(in_train_ids(np.array(Image.open(path)))))
        path.unlink()
    assert make(tmp_path, f"cityscapes:{tmp_path / 'c'}").content == expected
    samples.write_cityscapes(tmp_path / "c")
    for path in (tmp_path / "c" / "gtFine").rglob("*_labelTrainIds.png"):
        write(path, encode(np.full((48, 64), 200, np.uint8)))
    assert make(tmp_path, f"cityscapes:{tmp_path / 'c'}").content == expected


def test_the_tree_names_the_files_that_are_read():
    assert all(name.split("/")[-1] in LAYOUTS["cityscapes"].tree for name in (IMAGE, MASK))


def fill(value: int, shape: tuple[int, ...] = (48, 64)) -> Callable[[Path], object]:
    return lambda folder: write(folder / MASK, encode(np.full(shape, value, np.uint8)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "gtFine").rename(d / "gtCoarse"), r"there is no folder gtFine \(found: gtCoarse, leftImg8bit"),
        (lambda d: (d / "leftImg8bit/val").rename(d / "leftImg8bit/test"), "there is no folder leftImg8bit/val"),
        (lambda d: (d / MASK).unlink(), rf"1 masks are missing: {MASK}"),
        (lambda d: (d / IMAGE).unlink(), rf"1 masks are without an image: {MASK}"),
        (lambda d: [p.unlink() for p in (d / "leftImg8bit/val").rglob("*.png")], r"no \*_leftImg8bit\.png in leftImg8"),
        (lambda d: (d / IMAGE).rename(d / "leftImg8bit/train/a_leftImg8bit.png"), "not in the folder of a city: left"),
        (fill(34), rf"{IMAGE}: {MASK}: the mask has the values 34; labels are 0 to 33"),
        (fill(255), rf"{MASK}: the mask has the values 255; labels are 0 to 33"),
        (fill(7, (24, 64)), rf"{MASK}: the image has 64 x 48 pixels, its mask says 64 x 24"),
        (fill(7, (48, 64, 3)), rf"{MASK}: the mask is not 8-bit gray but RGB"),
        (lambda d: (d / MASK).write_bytes((d / MASK).read_bytes()[:60]), rf"{IMAGE}: {MASK}: "),
        (lambda d: (d / MASK).write_text("x"), rf"{MASK}: cannot identify image file"),
        (lambda d: (d / IMAGE).write_text("x"), rf"\n  {IMAGE}: not an image"),
    ],
)  # fmt: skip
def test_cityscapes_errors(tmp_path, city, damage, message):
    damage(tmp_path / "c")
    with pytest.raises(DataError, match=message):
        make(tmp_path, f"cityscapes:{tmp_path / 'c'}")


def test_other_masks_make_other_data(tmp_path, city):
    before = make(tmp_path, f"cityscapes:{tmp_path / 'c'}")
    changed = city[f"{FIRST.removeprefix('train/')}_leftImg8bit.png"].copy()
    changed[0, 0] = 33
    write(tmp_path / "c" / MASK, encode(changed))
    after = make(tmp_path, f"cityscapes:{tmp_path / 'c'}")
    assert (before.fingerprint != after.fingerprint, before.content != after.content) == (True, True)


def test_remote_cityscapes(tmp_path, city):
    base = f"memory://{tmp_path.name}"
    fsspec.filesystem("memory").put(f"{tmp_path / 'c'}/", f"{base}/", recursive=True)
    local, remote = (make(tmp_path, f"cityscapes:{path}") for path in (tmp_path / "c", base))
    assert remote.content == local.content
