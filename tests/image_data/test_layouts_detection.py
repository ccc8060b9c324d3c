"""VOC and COCO: objects from annotation files, from tiny files in exactly their layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from image_data.contracts import DataError
from image_data.layouts import open_layout
from image_data.layouts.annotated import AnnotationError, clip_box
from image_data.layouts.coco import compress_counts
from image_data.layouts.voc import VOC_CLASSES
from image_data.prepare import PreparedData
from image_data.uri import parse_uri
from tests.image_data import annotated_samples as samples
from tests.image_data.layout_samples import write
from tests.image_data.prepared_layouts import make, rows
from tests.image_data.samples import encode, table, write_folder

Damage = Callable[[Path], object]


def objects_of(prepared: PreparedData, split: str) -> dict[str, list[dict[str, Any]]]:
    """Name of the image file without its split and folders -> its objects."""
    return {Path(row["name"]).stem: json.loads(row["objects"]) for row in rows(prepared, split)}


def replace(path: str, old: str, new: str, count: int = 1) -> Damage:
    def damage(folder: Path) -> None:
        text = (folder / path).read_text()
        assert old in text
        (folder / path).write_text(text.replace(old, new, count))

    return damage


def remove(path: str) -> Damage:
    return lambda folder: (folder / path).unlink()


# ---- boxes


@pytest.mark.parametrize(
    ("box", "clipped"),
    [
        ((0, 0, 64, 48), [0, 0, 64, 48]),
        ((3, 4, 5, 6), [3, 4, 5, 6]),
        ((-1, 0, 65, 48.5), [0, 0, 64, 48]),
        ((63.5, 47.25, 64.75, 49), [63.5, 47.25, 64, 48]),
    ],
)
def test_boxes_are_clipped_by_a_pixel_at_most(box: Sequence[float], clipped: list[float]):
    assert clip_box(box, (64, 48)) == clipped


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((-1.01, 0, 5, 5), "outside of the image of 64 x 48"),
        ((0, 0, 5, 49.01), "outside of the image of 64 x 48"),
        ((64, 0, 65, 5), "outside of the image of 64 x 48"),
        ((5, 5, 5, 9), "empty or inverted"),
        ((5, 9, 8, 5), "empty or inverted"),
        ((float("nan"), 0, 5, 5), "empty or inverted"),
    ],
)
def test_impossible_boxes(box: Sequence[float], message: str):
    with pytest.raises(AnnotationError, match=message):
        clip_box(box, (64, 48))


# ---- VOC


def test_voc(tmp_path):
    truth = samples.write_voc(tmp_path / "v")
    prepared = make(tmp_path, f"voc:{tmp_path / 'v'}")
    assert [(name, info.num_images) for name, info in prepared.splits.items()] == [
        ("train", 8),
        ("val", 4),
        ("test", 6),
    ]
    assert prepared.split("train").class_names == ("image",)
    found: dict[str, Any] = {}
    for split in prepared.splits:
        found |= objects_of(prepared, split)
        for row in rows(prepared, split):
            assert row["name"].startswith(f"{split}/VOC2007/JPEGImages/")
            assert row["image"] == (tmp_path / "v" / row["name"].removeprefix(f"{split}/")).read_bytes()
    assert found == truth
    assert any(entry["difficult"] for own in found.values() for entry in own)
    listed = (tmp_path / "v" / "VOC2007" / "ImageSets" / "Main" / "val.txt").read_text().split()
    assert sorted(objects_of(prepared, "val")) == listed


def test_boxes_of_voc_are_continuous(tmp_path):
    samples.write_voc(tmp_path / "v")
    xml = samples.voc_xml("000001", (64, 48), [("dog", (1, 1, 64, 48), 0), ("tvmonitor", (11, 21, 30.5, 40), 1)])
    part = "<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
    write(tmp_path / "v/VOC2007/Annotations/000001.xml", xml.replace("<pose>", f"{part}<pose>", 1))
    whole, other = objects_of(make(tmp_path, f"voc:{tmp_path / 'v'}"), "train")["000001"]
    assert whole == {"box": [0, 0, 64, 48], "class": "dog", "difficult": False, "crowd": False, "area": 64 * 48}
    assert other == {
        "box": [10, 20, 30.5, 40],
        "class": "tvmonitor",
        "difficult": True,
        "crowd": False,
        "area": 20.5 * 20,
    }


def test_years_of_voc(tmp_path):
    truth = samples.write_voc(tmp_path / "v", ("2007", "2012"))
    both = make(tmp_path, f"voc:{tmp_path / 'v'}?years=2007,2012")
    assert [info.num_images for info in both.splits.values()] == [16, 8, 6]
    assert {name: own for split in both.splits for name, own in objects_of(both, split).items()} == truth
    assert "train from the list train.txt of VOC2007 and VOC2012" in both.rule
    assert "test from the list test.txt of VOC2007;" in f"{both.rule};"
    later = make(tmp_path, f"voc:{tmp_path / 'v'}?years=2012")
    names = [name for split in later.splits for name in objects_of(later, split)]
    assert all(name.startswith("2008_") for name in names)
    assert len(names) == 12
    for years in ("2006", "2007,2007", ""):
        with pytest.raises(DataError, match=rf"years={years}: choose 2007 or 2012 or 2007,2012"):
            make(tmp_path, f"voc:{tmp_path / 'v'}?years={years}")


def test_the_folder_around_vocdevkit_is_the_same_data(tmp_path):
    samples.write_voc(tmp_path / "v" / "VOCdevkit")
    inner, outer = (make(tmp_path, f"voc:{path}") for path in (tmp_path / "v" / "VOCdevkit", tmp_path / "v"))
    assert inner.fingerprint == outer.fingerprint


def test_classes_of_voc():
    assert len(VOC_CLASSES) == len(set(VOC_CLASSES)) == 20
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)


MAIN, XML = "VOC2007/ImageSets/Main", "VOC2007/Annotations/000002.xml"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "VOC2007").rename(d / "VOC2008"), r"there is no folder VOC2007 \(found: VOC2008\)"),
        (remove(f"{MAIN}/test.txt"), r"there is no file VOC2007/ImageSets/Main/test\.txt"),
        (lambda d: (d / MAIN / "val.txt").write_text("\n"), r"VOC2007/ImageSets/Main/val\.txt lists no image"),
        (lambda d: (d / MAIN / "val.txt").write_text("000009 -1\n"), r"val\.txt: '000009 -1' is not the name of one"),
        (replace(f"{MAIN}/train.txt", "000001", "000002"), r"JPEGImages/000002\.jpg is listed twice in train\.txt"),
        (replace(f"{MAIN}/test.txt", "000013", "000002"), r"000002\.jpg is listed in train\.txt and in test\.txt"),
        (remove(XML), r"1 annotation files are missing: VOC2007/Annotations/000002\.xml"),
        (remove("VOC2007/JPEGImages/000002.jpg"), r"\n  VOC2007/JPEGImages/000002\.jpg: no such file"),
        (lambda d: (d / "VOC2007/JPEGImages").rename(d / "images"), "there is no folder VOC2007/JPEGImages"),
        (lambda d: (d / XML).write_text("<annotation><size>"), r"000002\.xml: it is not XML \(no element found"),
        (replace(XML, "<width>64</width>", ""), r"000002\.xml: <size><width> is '', not a number"),
        (replace(XML, "<width>64</width>", "<width>0</width>"), r"000002\.xml: the image's size is 0 x 48"),
        (replace(XML, "<name>", "<name>un"), r"000002\.xml: object 1 has the unknown class 'un.*'; VOC's are aero"),
        (replace(XML, "<xmax>", "<xmax>4"), r"000002\.xml: object 1 \(.*\): the box from .* is outside of the ima"),
        (replace(XML, "<xmax>", "<xmax>-"), r"000002\.xml: object 1 \(.*\): the box from .* is empty or inverted"),
        (replace(XML, "<ymin>", "<ymin>x"), r"000002\.xml: <bndbox><ymin> is 'x.*', not a number"),
        (replace(XML, "<height>48", "<height>60"), r"000002\.jpg: the image has 64 x 48 pixels, VOC2007/Ann.* 64 x 60"),
    ],
)  # fmt: skip
def test_voc_errors(tmp_path, damage: Damage, message: str):
    samples.write_voc(tmp_path / "v")
    damage(tmp_path / "v")
    with pytest.raises(DataError, match=message):
        make(tmp_path, f"voc:{tmp_path / 'v'}")


def test_the_first_malformed_files_are_listed(tmp_path):
    samples.write_voc(tmp_path / "v")
    for number in range(1, 8):
        write(tmp_path / f"v/VOC2007/Annotations/{number:06d}.xml", "nothing")
    with pytest.raises(DataError, match="7 annotation files are malformed") as caught:
        make(tmp_path, f"voc:{tmp_path / 'v'}")
    assert str(caught.value).count("it is not XML") == 5
    assert "and 2 more" in str(caught.value)
    assert "DIR/VOC2007/Annotations/000005.xml" in str(caught.value)


# ---- COCO


@pytest.fixture
def coco(tmp_path):
    return samples.write_coco(tmp_path / "c")


def edit(part: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    """Changes an annotation file."""

    def damage(folder: Path) -> None:
        path = folder / "annotations" / f"instances_{part}.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


def test_coco(tmp_path, coco):
    prepared = make(tmp_path, f"coco:{tmp_path / 'c'}")
    assert [info.num_images for info in prepared.splits.values()] == [9, 1, 6]
    assert prepared.split("test").class_names == ("image",)
    for part, splits in (("train2017", ("train", "val")), ("val2017", ("test",))):
        found: dict[str, Any] = {}
        for split in splits:
            found |= objects_of(prepared, split)
        content = coco[part]
        assert sorted(found) == sorted(Path(image["file_name"]).stem for image in content["images"])
        for image in content["images"]:
            check_objects(found[Path(image["file_name"]).stem], image, content)
    assert [] in objects_of(prepared, "test").values()


def check_objects(found: list[dict[str, Any]], image: dict[str, Any], content: dict[str, Any]) -> None:
    expected = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
    for own, entry in zip(found, expected, strict=True):
        x, y, width, height = entry["bbox"]
        assert own["box"] == [x, y, x + width, y + height]
        assert (own["id"], own["class"]) == (entry["category_id"], samples.COCO_CATEGORIES[entry["category_id"]])
        assert (own["crowd"], own["area"], own["difficult"]) == (bool(entry["iscrowd"]), entry["area"], False)
        if not entry["iscrowd"]:
            assert own["mask"] == entry["segmentation"]
            continue
        runs: Any = entry["segmentation"]
        reference = coco_mask.decode(coco_mask.frPyObjects(runs, *runs["size"]))
        assert isinstance(own["mask"]["counts"], str)
        np.testing.assert_array_equal(coco_mask.decode(own["mask"]), reference)
        assert reference.sum() == entry["area"]


@pytest.mark.parametrize("seed", range(6))
def test_run_lengths_as_text_are_those_of_pycocotools(seed):
    rng = np.random.default_rng(seed)
    mask = np.kron(rng.random((9, 7)) < rng.random(), np.ones((1 + 37 * (seed % 2), 1 + 29 * seed))).astype(np.uint8)
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    expected = coco_mask.encode(np.asfortranarray(mask))["counts"]
    assert compress_counts([0, *counts] if flat[0] else counts).encode() == expected


def test_empty_boxes_and_masks_of_coco_are_left_out_and_counted(tmp_path, coco):
    def change(content: dict[str, Any]) -> None:
        entries = [entry for entry in content["annotations"] if not entry["iscrowd"]]
        entries[0]["bbox"][3] = 0
        entries[1]["segmentation"] = [[1, 2, 3, 4]]
        entries[2]["segmentation"].append([1, 2, 3, 4])
        entries[3]["bbox"] = [-0.5, 0, 64.75, 48]

    edit("val2017", change)(tmp_path / "c")
    prepared = make(tmp_path, f"coco:{tmp_path / 'c'}")
    found = [own for entries in objects_of(prepared, "test").values() for own in entries]
    assert len(found) == len(coco["val2017"]["annotations"]) - 2
    assert sum(own["box"] == [0, 0, 64, 48] for own in found) == 1
    assert all(len(polygon) >= 6 for own in found if not own["crowd"] for polygon in own["mask"])
    assert "without 1 objects of an empty box, without 1 objects of a mask of less than three points" in prepared.rule


def test_other_data_in_cocos_format(tmp_path, coco):
    root = tmp_path / "c"
    content = coco["train2017"]
    for entry in content["annotations"]:
        del entry["segmentation"], entry["area"], entry["iscrowd"]
    write(root / "labels.json", json.dumps(content))
    (root / "train2017").rename(root / "pictures")
    prepared = make(tmp_path, f"coco:{root}?train=labels.json,pictures&test=none", image_split=(0.6, 0.2, 0.2))
    assert [info.num_images for info in prepared.splits.values()] == [6, 2, 2]
    own = next(entries[0] for entries in objects_of(prepared, "train").values() if entries)
    x0, y0, x1, y1 = own["box"]
    assert own["area"] == (x1 - x0) * (y1 - y0)
    assert "mask" not in own
    given = make(tmp_path, f"coco:{root}?train=labels.json,pictures&val=val2017&test=none", image_split=(1, 0, 0))
    assert [info.num_images for info in given.splits.values()] == [10, 6]
    with pytest.raises(
        DataError, match=r"train=labels\.json,: give a part's name, such as train2017, or an annotation file"
    ):
        make(tmp_path, f"coco:{root}?train=labels.json,")
    write(root / "more.json", json.dumps(content | {"images": content["images"][:3], "annotations": []}))
    with pytest.raises(DataError, match=r"more\.json: 3 of its images are in another split's file too: pictures/0"):
        make(tmp_path, f"coco:{root}?train=labels.json,pictures&test=more.json,pictures")


def first(key: str, **changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content[key][0].update(changes)


def repeat(key: str, **changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content[key].append(content[key][0] | changes)


JSON = "annotations/instances_train2017.json"
RUNS = {"size": [48, 64], "counts": [48 * 64]}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove(JSON), rf"there is no file {JSON} \(found: annotations"),
        (lambda d: (d / JSON).write_text('{"images": ['), rf"{JSON}: it is not JSON"),
        (lambda d: (d / JSON).write_text("[]"), rf"{JSON}: it has no list 'images'"),
        (edit("train2017", lambda c: c.pop("annotations")), "it has no list 'annotations'"),
        (edit("train2017", lambda c: c["images"].clear()), rf"{JSON}: it lists no image"),
        (edit("train2017", first("images", file_name="x.jpg")), r"\n  train2017/x\.jpg: no such file"),
        (edit("train2017", repeat("images", id=1)), r"the image 000000001000\.jpg or its number 1 is listed twice"),
        (edit("train2017", repeat("images", file_name="x.jpg")), r"x\.jpg or its number 1000 is listed twice"),
        (edit("train2017", first("images", id=None)), "needs a number 'id' and a text 'file_name'"),
        (edit("train2017", first("images", width=0)), r"000000001000\.jpg has the size 0 x 48"),
        (edit("train2017", lambda c: c["images"][1].update(width=70)), rf"7\.jpg: the image has 64 x .*{JSON} says 70"),
        (edit("train2017", first("categories", name="kite")), "its categories need an 'id' and a 'name' each, no two"),
        (edit("train2017", first("annotations", category_id=5)), r"1000\.jpg: category_id 5 is not among the categ"),
        (edit("train2017", first("annotations", image_id=5)), "of no image: there is no image with the id 5"),
        (edit("train2017", repeat("annotations")), "annotation 10000 of .*: there are two annotations with this id"),
        (edit("train2017", first("annotations", bbox=[1, 2, 3])), r"bbox is \[1, 2, 3\], not four numbers"),
        (edit("train2017", first("annotations", bbox=[1, 2, -3, 4])), "is empty or inverted"),
        (edit("train2017", first("annotations", bbox=[1, 2, 70, 4])), r"1000\.jpg: the box from \(1, 2\) to \(71"),
        (edit("train2017", first("annotations", segmentation=[["a"]])), "segmentation is not a list of polygons"),
        (edit("train2017", first("annotations", segmentation="a")), "segmentation is neither a list of polygons nor"),
        (edit("train2017", first("annotations", segmentation=RUNS | {"size": [64, 48]})), r"has the size \[64, 48\]"),
        (edit("train2017", first("annotations", segmentation=RUNS | {"counts": [4]})), "do not add up to 64 x 48 pix"),
        (lambda d: (d / "val2017").rename(d / "val"), "there is no folder val2017"),
        (lambda d: [p.unlink() for p in (d / "val2017").iterdir()], "none of the 6 images of annotations/ins"),
    ],
)  # fmt: skip
def test_coco_errors(tmp_path, coco, damage: Damage, message: str):
    damage(tmp_path / "c")
    with pytest.raises(DataError, match=message):
        make(tmp_path, f"coco:{tmp_path / 'c'}")


# ---- both


@pytest.mark.parametrize(
    ("scheme", "path", "old", "new"),
    [("voc", XML, "<difficult>0", "<difficult>1"), ("coco", JSON, '"iscrowd": 0', '"iscrowd": 1')],
)
def test_other_annotations_make_other_data(tmp_path, scheme, path, old, new):
    {"voc": samples.write_voc, "coco": samples.write_coco}[scheme](tmp_path / "d")
    before = make(tmp_path, f"{scheme}:{tmp_path / 'd'}")
    assert make(tmp_path, f"{scheme}:{tmp_path / 'd'}").fingerprint == before.fingerprint
    replace(path, old, new)(tmp_path / "d")
    after = make(tmp_path, f"{scheme}:{tmp_path / 'd'}")
    assert after.fingerprint != before.fingerprint
    assert after.content != before.content
    assert [row["image"] for row in rows(after, "train")] == [row["image"] for row in rows(before, "train")]


@pytest.mark.parametrize("scheme", ["voc", "coco"])
def test_remote_annotations(tmp_path, scheme):
    {"voc": samples.write_voc, "coco": samples.write_coco}[scheme](tmp_path / "d")
    base = f"memory://{tmp_path.name}"
    fsspec.filesystem("memory").put(f"{tmp_path / 'd'}/", f"{base}/", recursive=True)
    local, remote = (make(tmp_path, f"{scheme}:{path}") for path in (tmp_path / "d", base))
    assert remote.content == local.content
    assert remote.rule == local.rule


@pytest.mark.parametrize("scheme", ["voc", "coco"])
def test_prepared_data_is_found_without_reading_annotations(tmp_path, scheme):
    {"voc": samples.write_voc, "coco": samples.write_coco}[scheme](tmp_path / "d")
    source = open_layout(parse_uri(f"{scheme}:{tmp_path / 'd'}"), "")["train"]
    lines = source.listing()
    assert str(tmp_path) not in "".join(lines)
    for path in tmp_path.rglob("*.xml" if scheme == "voc" else "*.json"):
        path.write_text("")
    assert source.listing() == lines
    with pytest.raises(DataError, match="it is not"):
        source.index()


def test_data_without_further_targets_keeps_its_content(tmp_path):
    data = write_folder(tmp_path / "f", table({"ship": 5, "cat": 4}))
    prepared = make(tmp_path, f"train={data}", image_split=(1, 0, 0))
    group = hashlib.sha256()
    for row in rows(prepared, "train"):
        group.update(f"{row['name']}\0{row['label']}\0{len(row['image'])}\0".encode() + row["image"])
    content = hashlib.sha256(group.digest()).hexdigest()
    assert prepared.content == hashlib.sha256(f"train {content}".encode()).hexdigest()[:16]


def test_an_unreadable_image_is_left_to_the_decoder(tmp_path):
    samples.write_voc(tmp_path / "v")
    image = tmp_path / "v/VOC2007/JPEGImages/000003.jpg"
    image.write_bytes(encode(np.zeros((48, 64, 3), np.uint8), "JPEG")[:200])
    with pytest.raises(DataError, match=r"1 unreadable images.*\n  VOC2007/JPEGImages/000003\.jpg: "):
        make(tmp_path, f"voc:{tmp_path / 'v'}")
    prepared = make(tmp_path, f"voc:{tmp_path / 'v'}", max_unreadable=1)
    assert prepared.split("train").num_images == 7
