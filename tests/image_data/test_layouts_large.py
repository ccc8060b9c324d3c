"""ImageNet, Places and CelebA, from tiny files in exactly their layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from image_data.contracts import DataError
from image_data.layouts import open_layout
from image_data.subset import SubsetConfig
from image_data.uri import parse_uri
from tests.image_data import layout_samples as samples
from tests.image_data.prepared_layouts import classes, labels, make, rows
from tests.image_data.samples import picture

# ---- ImageNet


def test_imagenet(tmp_path):
    names = samples.write_imagenet(tmp_path / "i")
    prepared = make(tmp_path, f"imagenet:{tmp_path / 'i'}")
    assert [(name, info.num_images) for name, info in prepared.splits.items()] == [
        ("train", 54),
        ("val", 6),
        ("test", 6),
    ]
    assert prepared.split("test").class_names == tuple(names)
    assert all(name.split("/")[0] == label for name, label in labels(prepared, "test").items())


def test_imagenet_lists_without_reading_images(tmp_path, monkeypatch):
    samples.write_imagenet(tmp_path / "i")
    monkeypatch.setattr("image_data.uri.Files.open", None)
    sources = open_layout(parse_uri(f"imagenet:{tmp_path / 'i'}"), "")
    assert {name: len(source.index().names) for name, source in sources.items()} == {"train": 60, "test": 6}


def test_tenth_of_imagenet(tmp_path):
    samples.write_imagenet(tmp_path / "i", train=25)
    uri = f"imagenet:{tmp_path / 'i'}?part=10percent"
    indices = {seed: open_layout(parse_uri(f"{uri}&seed={seed}"), "train")["train"].index() for seed in (0, 1)}
    assert np.bincount(indices[0].labels).tolist() == [3, 3, 3]
    assert indices[0].names != indices[1].names
    assert indices[0].names == open_layout(parse_uri(uri), "train")["train"].index().names
    for extra in range(25, 250):
        samples.write(tmp_path / "i" / "train" / "n10000000" / f"n10000000_{extra}.JPEG", b"")
    larger = open_layout(parse_uri(uri), "train")["train"].index()
    assert np.bincount(larger.labels).tolist() == [25, 3, 3]
    prepared = make(tmp_path, f"test={uri}")
    assert prepared.split("test").num_images == 6  # the validation images stay whole


def test_hundred_classes_of_imagenet(tmp_path):
    names = samples.write_imagenet(tmp_path / "i", num_classes=101, train=2, val=1)
    uri = f"imagenet:{tmp_path / 'i'}?part=100"
    prepared = make(tmp_path, uri, image_split=(1, 0, 0))
    train, test = prepared.split("train"), prepared.split("test")
    assert len(train.class_names) == 100
    assert train.class_names == test.class_names
    assert (train.num_images, test.num_images) == (200, 100)
    assert "100 classes (seed 0)" in prepared.rule
    whole = make(tmp_path, f"imagenet:{tmp_path / 'i'}", image_split=(1, 0, 0), subset=SubsetConfig(num_classes=100))
    assert whole.split("train").class_names == train.class_names  # the same draw as of the general option
    chosen = samples.write(tmp_path / "list.txt", "\n".join(f"{name} a word" for name in names[1:101]) + "\n")
    listed = make(tmp_path, f"{uri}&classes={chosen}", image_split=(1, 0, 0))
    assert listed.split("train").class_names == tuple(names[1:101])


def test_listed_classes_of_imagenet(tmp_path):
    names = samples.write_imagenet(tmp_path / "i", num_classes=4)
    chosen = samples.write(tmp_path / "list.txt", f"{names[3]}\n{names[1]}\n")
    uri = f"imagenet:{tmp_path / 'i'}?classes={chosen}"
    prepared = make(tmp_path, uri)
    assert classes(prepared) == {name: {names[1], names[3]} for name in ("train", "val", "test")}
    with pytest.raises(DataError, match=r"part=100 needs 100 classes, .*list\.txt has 2\. Leave part= out"):
        make(tmp_path, f"{uri}&part=100")
    with pytest.raises(DataError, match="seed=3 has no effect: nothing is drawn"):
        make(tmp_path, f"{uri}&seed=3")
    chosen.write_text("n99999999\n")
    with pytest.raises(DataError, match="lists n99999999, which train has no folder for"):
        make(tmp_path, uri)
    chosen.write_text("\n")
    with pytest.raises(DataError, match="lists no class; give one"):
        make(tmp_path, uri)
    chosen.unlink()
    with pytest.raises(DataError, match="there is no such file; give one class"):
        make(tmp_path, uri)


def flatten_val(root: Path, names: list[str]) -> list[str]:
    """Takes the validation images out of their folders; returns their classes in order of their numbers."""
    truth = {}
    for label in names:
        for path in (root / "val" / label).iterdir():
            truth[path.name] = label
            path.rename(root / "val" / path.name)
        (root / "val" / label).rmdir()
    return [truth[name] for name in sorted(truth)]


def test_imagenet_with_a_flat_val(tmp_path):
    names = samples.write_imagenet(tmp_path / "i")
    expected = labels(make(tmp_path, f"imagenet:{tmp_path / 'i'}"), "test")
    truth = flatten_val(tmp_path / "i", names)
    with pytest.raises(DataError, match=r"6 images without folders of classes\. Name the unpacked devkit"):
        make(tmp_path, f"imagenet:{tmp_path / 'i'}")
    samples.write_devkit(tmp_path / "devkit", names, truth)
    uri = f"imagenet:{tmp_path / 'i'}?devkit={tmp_path / 'devkit'}"
    assert labels(make(tmp_path, uri), "test") == expected
    chosen = samples.write(tmp_path / "list.txt", f"{names[1]}\n")
    assert set(labels(make(tmp_path, f"{uri}&classes={chosen}"), "test").values()) == {names[1]}
    (tmp_path / "devkit/data/ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n")
    with pytest.raises(DataError, match=r"val has image 6, but .* has 2 lines"):
        make(tmp_path, uri)
    (tmp_path / "devkit/data/ILSVRC2012_validation_ground_truth.txt").write_text("77\n" * 6)
    with pytest.raises(DataError, match=r"has the classes 77, which meta\.mat has not"):
        make(tmp_path, uri)
    (tmp_path / "devkit/data/meta.mat").unlink()
    with pytest.raises(DataError, match=r"has no file data/meta\.mat"):
        make(tmp_path, uri)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?part=1percent", "part=1percent: choose 10percent or 100"),
        ("?part=100&seed=x", "seed=x: give a whole number"),
        ("?part=100", "part=100 needs 100 classes, train has 3"),
        ("?seed=1", "seed=1 has no effect"),
    ],
)
def test_imagenet_options(tmp_path, query, message):
    samples.write_imagenet(tmp_path / "i", train=1)
    with pytest.raises(DataError, match=message):
        make(tmp_path, f"imagenet:{tmp_path / 'i'}{query}")


def test_imagenet_errors(tmp_path):
    names = samples.write_imagenet(tmp_path / "i", train=1)
    (tmp_path / "i" / "val" / names[2]).rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=f"val has no folder {names[2]}"):
        make(tmp_path, f"imagenet:{tmp_path / 'i'}")
    (tmp_path / "i" / "val").rename(tmp_path / "i" / "validation")
    with pytest.raises(DataError, match=r"there is no folder val \(found: train, validation\)"):
        make(tmp_path, f"imagenet:{tmp_path / 'i'}")


# ---- Places


def test_places_by_folders_and_by_lists_agree(tmp_path):
    names = samples.write_places_lists(tmp_path / "lists")
    listed = make(tmp_path, f"places:{tmp_path / 'lists'}")
    assert [info.num_images for info in listed.splits.values()] == [27, 3, 6]
    assert listed.split("train").class_names == tuple(names)
    for name in labels(listed, "train"):
        assert labels(listed, "train")[name] == "-".join(name.split("/")[1:-1])
    for name, label in labels(listed, "test").items():
        assert names.index(label) == int(name.split("_")[-1].removesuffix(".jpg")) % 3
        folder = tmp_path / "easy" / "val" / label
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((tmp_path / "lists" / "val_256" / name).read_bytes())
    for label in names:
        (tmp_path / "easy" / "train" / label).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "easy" / "train" / label / f"{i:08d}.jpg").write_bytes(picture(i))
    easy = make(tmp_path, f"places:{tmp_path / 'easy'}")
    assert {name.split("/")[-1]: label for name, label in labels(easy, "test").items()} == labels(listed, "test")
    assert classes(easy) == classes(listed)
    (tmp_path / "easy" / "val" / "airfield").rename(tmp_path / "easy" / "val" / "aisle")
    with pytest.raises(DataError, match="not in both of train and val: the classes airfield, aisle"):
        make(tmp_path, f"places:{tmp_path / 'easy'}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "places365_val.txt").unlink(), r"there is no file places365_val\.txt"),
        (lambda d: (d / "places365_val.txt").write_text("a.jpg\n"), "must be a name and a number; it is 'a.jpg'"),
        (lambda d: (d / "places365_val.txt").write_text("\n"), "places365_val.txt is empty"),
        (lambda d: (d / "places365_val.txt").write_text("a.jpg 0\n"), r"none of the images .* e\.g\. a\.jpg"),
        (lambda d: (d / "val_256").rename(d / "val"), "none of the folders val_256, val_large"),
        (lambda d: (d / "categories_places365.txt").write_text("/a/airfield 1\n"), "does not number its classes"),
        (lambda d: (d / "categories_places365.txt").write_text("/a/airfield 0\n"), "there are names for 0 to 0"),
        (lambda d: (d / "categories_places365.txt").unlink(), r"neither categories_places365\.txt nor the folders"),
    ],
)
def test_places_errors(tmp_path, damage, message):
    samples.write_places_lists(tmp_path / "p")
    damage(tmp_path / "p")
    with pytest.raises(DataError, match=message):
        make(tmp_path, f"places:{tmp_path / 'p'}")


# ---- CelebA


@pytest.mark.parametrize("folders", [("", "", "img_align_celeba"), ("Anno", "Eval", "Img/img_align_celeba")])
def test_celeba_by_identity(tmp_path, folders):
    identity = samples.write_celeba(tmp_path / "a", *folders)
    prepared = make(tmp_path, f"celeba:{tmp_path / 'a'}")
    assert list(classes(prepared).values()) == [{"1", "2"}] * 3 + [{"3"}, {"4"}]
    names = list(identity)
    for split in prepared.splits:
        assert all(str(identity[name]) == label for name, label in labels(prepared, split).items())
        for row in rows(prepared, split):
            i = names.index(row["name"].split("/")[-1])
            points = 10 * i + np.arange(10).reshape(5, 2)
            np.testing.assert_array_equal(np.array(row["landmarks"]), np.column_stack([points, np.ones(5)]))
            assert row["image"] == samples.jpeg(i)


def test_celeba_without_labels_keeps_its_partitions(tmp_path):
    samples.write_celeba(tmp_path / "a")
    prepared = make(tmp_path, f"celeba:{tmp_path / 'a'}?labels=none")
    assert [(name, info.num_images) for name, info in prepared.splits.items()] == [
        ("train", 24),
        ("val", 8),
        ("test", 8),
    ]
    assert prepared.split("train").class_names == ("face",)
    assert "train partition 0 of list_eval_partition.txt" in prepared.rule


def test_celeba_without_the_images_of_a_landmark_test(tmp_path):
    samples.write_celeba(tmp_path / "a")
    listed = samples.write(tmp_path / "testing.txt", "000001.jpg\n000040.jpg\n")
    uri = f"celeba:{tmp_path / 'a'}?labels=none&exclude={listed}"
    prepared = make(tmp_path, uri)
    assert [info.num_images for info in prepared.splits.values()] == [23, 8, 7]
    kept = {row["name"].split("/")[-1] for split in prepared.splits for row in rows(prepared, split)}
    assert not kept & {"000001.jpg", "000040.jpg"}
    listed.write_text("1.jpg\n")
    with pytest.raises(DataError, match=r"lists 1\.jpg, which is not in list_eval_partition\.txt"):
        make(tmp_path, uri)
    listed.write_text("\n")
    with pytest.raises(DataError, match="lists no image; give one"):
        make(tmp_path, uri)
    listed.unlink()
    with pytest.raises(DataError, match=r"there is no such file; give one image"):
        make(tmp_path, uri)


def replace(name: str, old: str, new: str):
    return lambda d: (d / name).write_text((d / name).read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "identity_CelebA.txt").unlink(), r"there is no file identity_CelebA\.txt"),
        (lambda d: (d / "img_align_celeba").rename(d / "img_celeba"), "there is no folder img_align_celeba"),
        (lambda d: [p.unlink() for p in (d / "img_align_celeba").iterdir()], r"none of the 24 listed images"),
        (replace("list_eval_partition.txt", "000001.jpg 0", "000001.jpg 7"), r"has the partitions \[7\]"),
        (replace("list_eval_partition.txt", "000001.jpg 0", "000001.jpg 2"), "identity 1 is in the partitions 2 and 0"),
        (replace("list_eval_partition.txt", "000001.jpg 0", "000001.jpg"), "'000001.jpg' is not an image and 1 whole"),
        (replace("list_eval_partition.txt", "000001.jpg 0", "000002.jpg 0"), "lists 000002.jpg twice"),
        (lambda d: (d / "list_eval_partition.txt").write_text(""), "lists no image"),
        (replace("identity_CelebA.txt", "000001.jpg 1\n", ""), r"identity_CelebA\.txt lacks 1 images: 000001\.jpg"),
        (replace("list_landmarks_align_celeba.txt", "lefteye_x", "eye_x"), "the second line of .* must be lefteye_x"),
        (replace("list_landmarks_align_celeba.txt", "000001.jpg    0", "000001.jpg"), "is not an image and 10 whole"),
    ],
)  # fmt: skip
def test_celeba_errors(tmp_path, damage, message):
    samples.write_celeba(tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(DataError, match=message):
        make(tmp_path, f"celeba:{tmp_path / 'a'}")
    with pytest.raises(DataError, match="labels=attributes: choose identity or none"):
        make(tmp_path, f"celeba:{tmp_path / 'a'}?labels=attributes")
