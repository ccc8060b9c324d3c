"""The data sets with a layout of their own, from tiny files in exactly that layout."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from image_data.contracts import SPLITS, DataError
from image_data.layouts import LAYOUTS, Arrays, ArraySource, ListedSource, open_layout
from image_data.layouts.cifar import read_pickle
from image_data.prepare import DataConfig, PreparedData, prepare
from image_data.subset import SubsetConfig
from image_data.uri import SCHEMES, Files, parse_uri
from tests.image_data import layout_samples as samples
from tests.image_data.samples import picture, table, write_folder


def make(tmp_path: Path, *data: str, **options) -> PreparedData:
    return prepare(DataConfig(data=data, cache=str(tmp_path / "cache"), **options), lambda _: None, threads=1)


def rows(prepared: PreparedData, split: str) -> list[dict]:
    return [row for file in prepared.split(split).files for row in pq.read_table(file).to_pylist()]


def classes(prepared: PreparedData) -> dict[str, set[str]]:
    return {name: set(info.class_names) for name, info in prepared.splits.items()}


def labels(prepared: PreparedData, split: str) -> dict[str, str]:
    """Name of the image, without the split's -> name of its class."""
    names = prepared.split(split).class_names
    return {row["name"].split("/", 1)[-1]: names[row["label"]] for row in rows(prepared, split)}


# ---- the table


def test_layouts_are_described():
    for name, layout in LAYOUTS.items():
        assert layout.name == name
        assert "DIR/" in layout.tree or "DIR" in layout.tree
        assert layout.source
        assert f"{name}:DIR" in layout.example


def test_the_page_of_the_docs_has_every_scheme_and_option():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    schemes = SCHEMES | LAYOUTS
    assert [name for name in schemes if f"`{name}:" not in page] == []
    missing = [f"{name} {key}" for name, layout in LAYOUTS.items() for key in layout.options if f"{key}=" not in page]
    assert missing == []


@pytest.mark.parametrize("scheme", LAYOUTS)
def test_a_folder_that_is_not_there_or_empty_shows_the_tree(scheme, tmp_path):
    for uri, message in (
        (f"{scheme}:{tmp_path}/missing", "does not exist"),
        (f"{scheme}:{tmp_path}", "found: nothing"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            open_layout(parse_uri(uri), "")
        assert all(line.strip() in str(caught.value) for line in LAYOUTS[scheme].tree.strip().splitlines())
        assert LAYOUTS[scheme].source in str(caught.value)


@pytest.mark.parametrize("scheme", LAYOUTS)
def test_unknown_options_are_refused(scheme, tmp_path):
    with pytest.raises(DataError, match=f"unknown option size; {scheme}: has"):
        open_layout(parse_uri(f"{scheme}:{tmp_path}?size=3"), "")


def test_a_split_without_some_of_the_named_classes_keeps_their_numbers(tmp_path):
    uri = parse_uri(f"places:{tmp_path}")
    infos = [
        Files(str(samples.write(tmp_path / f"{i}.png", picture(i)))).info(str(tmp_path / f"{i}.png")) for i in range(3)
    ]
    names = ["0.png", "1.png", "2.png"]
    points = np.arange(6).reshape(3, 2)
    source = ListedSource(
        uri, Files(str(tmp_path)), infos, names, [3, 1, 3], class_names="dcba", extra={"point": points}
    )
    arrays = Arrays(np.zeros((3, 4, 4, 3), np.uint8), names, [3, 1, 3], "dcba", extra={"point": points})
    for own in (source, ArraySource(uri, infos, lambda: arrays)):
        index = own.index()
        assert index.labels.tolist() == [3, 1, 3]
        assert index.class_names == ("d", "c", "b", "a")
        rows = list(own.read(np.array([False, True, True])))
        assert [row.position for row in rows] == [1, 2]
        assert [row.extra["point"].tolist() for row in rows] == [[2, 3], [4, 5]]


def test_listing_follows_labels_and_further_targets(tmp_path):
    path = samples.write(tmp_path / "a.png", picture(0))
    uri, files = parse_uri(f"places:{tmp_path}"), Files(str(tmp_path))

    def listing(label: str, point: float) -> list[str]:
        extra = {"point": np.array([[point, 0.0]])}
        return ListedSource(uri, files, [files.info(str(path))], ["a.png"], [label], extra=extra).listing()

    assert listing("x", 1.0) == listing("x", 1.0)
    assert len({"\n".join(listing(*values)) for values in (("x", 1.0), ("y", 1.0), ("x", 2.0))}) == 3
    assert str(tmp_path) not in "".join(listing("x", 1.0))


# ---- miniImageNet

MINI = {"train": {"n01": 10, "n02": 10, "n03": 10}, "val": {"n04": 4, "n05": 3}, "test": {"n06": 5}}


@pytest.fixture
def mini(tmp_path):
    samples.write_miniimagenet(tmp_path / "mini", MINI)
    return f"miniimagenet:{tmp_path / 'mini'}"


def test_miniimagenet(tmp_path):
    images = samples.write_miniimagenet(tmp_path / "mini", MINI)
    prepared = make(tmp_path, f"miniimagenet:{tmp_path / 'mini'}")
    assert tuple(prepared.splits) == SPLITS
    base = {"n01", "n02", "n03"}
    assert list(classes(prepared).values()) == [base] * 3 + [{"n04", "n05"}, {"n06"}]
    assert [prepared.split(name).num_images for name in SPLITS] == [24, 3, 3, 7, 5]
    found = {row["name"].split("/", 1)[-1]: row["image"] for name in SPLITS for row in rows(prepared, name)}
    assert found == images
    assert all(label == name[:3] for split in SPLITS for name, label in labels(prepared, split).items())
    assert "train from the list train.csv; val_classes from the list val.csv" in prepared.rule


def test_named_splits_bring_what_they_name(tmp_path, mini):
    assert set(make(tmp_path, f"train={mini}").splits) == {"train", "val", "test"}
    assert classes(make(tmp_path, f"novel_classes={mini}")) == {"novel_classes": {"n06"}}
    both = make(tmp_path, f"val_classes={mini}", f"novel_classes={mini}")
    assert classes(both) == {"val_classes": {"n04", "n05"}, "novel_classes": {"n06"}}
    with pytest.raises(DataError, match="has no split 'train'; it has val_classes, novel_classes"):
        both.split("train")
    with pytest.raises(DataError, match="miniimagenet has no split 'test'; it has train, val_classes, novel_classes"):
        make(tmp_path, f"test={mini}")


def test_a_given_split_replaces_the_data_sets_own(tmp_path, mini):
    pixels = samples.write_cifar10(tmp_path / "cifar")
    other = write_folder(tmp_path / "other", table({"ship": 4}))
    prepared = make(tmp_path, f"test={other}", f"train=cifar10:{tmp_path / 'cifar'}", f"novel_classes={mini}")
    assert prepared.split("test").num_images == 4
    assert prepared.split("train").num_images + prepared.split("val").num_images == 5 * len(pixels["data_batch_1"])
    assert classes(prepared)["novel_classes"] == {"n06"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "val.csv").unlink(), r"there is no file val\.csv \(found: images, test\.csv, train\.csv\)"),
        (lambda d: (d / "images").rename(d / "pictures"), r"there is no folder images \(found: pictures"),
        (lambda d: (d / "val.csv").write_text("filename,class\na.jpg,n01\n"), "must be filename,label; it is"),
        (lambda d: (d / "val.csv").write_text(""), "it is empty"),
        (lambda d: (d / "val.csv").write_text("filename,label\n"), r"val\.csv lists no image"),
        (lambda d: (d / "val.csv").write_bytes(b"filename,label\n\xff"), "is not UTF-8"),
        (lambda d: (d / "val.csv").write_text("filename,label\nn0100000001.jpg,n09\n"), r"1 image\(s\) of train are"),
        (lambda d: (d / "val.csv").write_text("filename,label\nx.jpg,n06\n"), r"1 class\(s\) of val are in test"),
        (lambda d: (d / "val.csv").write_text("filename,label\nx.jpg,n07\nx.jpg,n07\n"), r"more than once: x\.jpg"),
        (lambda d: (d / "val.csv").write_text("filename,label\nx.jpg,n07\n"), r"none of the 1 images .* e\.g\. x\.jpg"),
    ],
)  # fmt: skip
def test_miniimagenet_errors(tmp_path, mini, damage, message):
    damage(tmp_path / "mini")
    with pytest.raises(DataError, match=message) as caught:
        make(tmp_path, mini)
    assert "DIR/images/n0153282900000005.jpg" in str(caught.value)


def test_listed_images_that_are_missing_count_as_unreadable(tmp_path, mini):
    (tmp_path / "mini" / "images" / "n0600000000.jpg").unlink()
    with pytest.raises(DataError, match=r"1 unreadable images.*\n  n0600000000\.jpg: no such file"):
        make(tmp_path, mini)
    prepared = make(tmp_path, mini, max_unreadable=1)
    assert prepared.skipped == (("n0600000000.jpg", "no such file"),)
    assert prepared.split("novel_classes").num_images == 4


def test_remote_layout(tmp_path, mini):
    base = f"memory://{tmp_path.name}"
    fsspec.filesystem("memory").put(f"{tmp_path / 'mini'}/", f"{base}/", recursive=True)
    local, remote = (open_layout(parse_uri(uri), "") for uri in (mini, f"miniimagenet:{base}"))
    for split, source in local.items():
        other = remote[split]
        assert list(other.index().names) == list(source.index().names)
        everything = np.ones(len(source.index().names), bool)
        assert [row.data for row in other.read(everything)] == [row.data for row in source.read(everything)]


def test_division_without_effect_is_refused(tmp_path, mini):
    for value in ((0.5, 0.25, 0.25), None):
        with pytest.raises(DataError, match=r"class_split=.* has no effect on miniimagenet.*Leave it at auto"):
            make(tmp_path, mini, class_split=value)
    assert make(tmp_path, mini, image_split=(0.5, 0.3, 0.2)).split("train").num_images == 15
    with pytest.raises(DataError, match="no effect: there is no train split"):
        make(tmp_path, f"novel_classes={mini}", class_split=(0.5, 0.25, 0.25))
    samples.write_celeba(tmp_path / "faces")
    with pytest.raises(DataError, match=r"image_split=.* has no effect on celeba"):
        make(tmp_path, f"celeba:{tmp_path / 'faces'}?labels=none", image_split=(0.5, 0.3, 0.2))


def test_a_data_set_without_novel_classes_may_be_divided_by_class(tmp_path):
    samples.write_cifar100(tmp_path / "c")
    prepared = make(tmp_path, f"cifar100:{tmp_path / 'c'}", class_split=(0.5, 0.25, 0.25))
    assert [len(info.class_names) for info in prepared.splits.values()] == [2, 2, 2, 1, 1]


def test_evaluation_only_data_and_a_subset_of_the_missing_train(tmp_path, mini):
    with pytest.raises(DataError, match="no train split; give train=URI"):
        make(tmp_path, f"novel_classes={mini}", subset=SubsetConfig(fraction=0.5))


# ---- tieredImageNet

TIERED = {
    "train": {f"n1{g}{i}": f"g{g}" for g in range(4) for i in range(3 + g)},
    "val": {"n201": "g5", "n202": "g5"},
    "test": {"n301": "g6", "n302": "g7"},
}


@pytest.fixture
def tiered(tmp_path):
    samples.write_tieredimagenet(tmp_path / "tiered", TIERED, each=10)
    return f"tieredimagenet:{tmp_path / 'tiered'}"


def test_tieredimagenet(tmp_path, tiered):
    prepared = make(tmp_path, tiered)
    assert tuple(prepared.splits) == SPLITS
    assert classes(prepared)["train"] == set(TIERED["train"])
    assert classes(prepared)["val_classes"] == {"n201", "n202"}
    assert classes(prepared)["novel_classes"] == {"n301", "n302"}
    category = {label: own for part in TIERED.values() for label, own in part.items()}
    for split, info in prepared.splits.items():
        for row in rows(prepared, split):
            label = info.class_names[row["label"]]
            assert info.coarse_names[row["coarse"]] == category[label]
            assert row["name"].split("/")[-2] == label


def test_cross_domain_few_shot(tmp_path, tiered):
    samples.write_cifar_fs(tmp_path / "fs", {"train": ["apple"], "val": ["bear"], "test": ["maple", "rose"]})
    prepared = make(tmp_path, f"train={tiered}", f"novel_classes=cifar_fs:{tmp_path / 'fs'}")
    assert tuple(prepared.splits) == ("train", "val", "test", "novel_classes")
    assert classes(prepared)["novel_classes"] == {"maple", "rose"}


def test_cross_domain_data_sets_that_share_classes_are_refused(tmp_path, tiered):
    samples.write_miniimagenet(tmp_path / "m", {"train": {"n1": 3}, "val": {"n2": 1}, "test": {"n100": 3, "n9": 2}})
    with pytest.raises(DataError, match=r"novel_classes has classes that train has too: n100\."):
        make(tmp_path, f"train={tiered}", f"novel_classes=miniimagenet:{tmp_path / 'm'}")


def test_tieredimagenet_from_imagenets_own_folder(tmp_path, tiered):
    root = tmp_path / "tiered"
    imagenet = tmp_path / "imagenet"
    for part in TIERED:
        for folder in (root / part).iterdir():
            (imagenet / folder.name).parent.mkdir(exist_ok=True)
            folder.rename(imagenet / folder.name)
        (root / part).rmdir()
    (imagenet / "n999").mkdir()  # a class of ImageNet that tieredImageNet leaves out
    with pytest.raises(DataError, match=r"there is no folder train"):
        make(tmp_path, tiered)
    prepared = make(tmp_path, f"{tiered}?images={imagenet}")
    assert classes(prepared)["novel_classes"] == {"n301", "n302"}
    with pytest.raises(DataError, match=r"images=/nowhere: there is no such folder"):
        make(tmp_path, f"{tiered}?images=/nowhere")
    (imagenet / "n301").rename(imagenet / "n000")
    with pytest.raises(DataError, match="has no folder n301"):
        make(tmp_path, f"{tiered}?images={imagenet}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "test.csv").unlink(), r"there is no file test\.csv"),
        (lambda d: (d / "test.csv").write_text("n301,g0\nn302,g7\n"), r"1 category\(s\) of train are in test too: g0"),
        (lambda d: (d / "test.csv").write_text("n201,g8\n"), r"1 class\(s\) of val are in test too: n201"),
        (lambda d: (d / "test.csv").write_text("n301\n"), "line 1 of test.csv must be class,category; it is 'n301'"),
        (lambda d: (d / "test.csv").write_text("n301,g6\nn301,g7\n"), "puts n301 into g6 and into g7"),
        (lambda d: (d / "test.csv").write_text("\n"), r"test\.csv lists no class"),
        (lambda d: (d / "test.csv").write_text("n301,g6\n"), r"test/ holds n302, which test\.csv does not list"),
        (lambda d: (d / "test.csv").write_text("n301,g6\nn302,g7\nn303,g7\n"), "test has no images of n303"),
        (lambda d: (d / "test_images_png.pkl").write_text(""), "test_images_png.pkl: pickles are not read"),
    ],
)
def test_tieredimagenet_errors(tmp_path, tiered, damage, message):
    damage(tmp_path / "tiered")
    with pytest.raises(DataError, match=message) as caught:
        make(tmp_path, tiered)
    assert "DIR/train/n02099267/*.jpg" in str(caught.value)


def test_coarse_labels_of_tieredimagenet(tmp_path, tiered):
    prepared = make(tmp_path, tiered, subset=SubsetConfig(labels="coarse"))
    assert prepared.split("train").class_names == ("g0", "g1", "g2", "g3")
    assert prepared.split("novel_classes").class_names == ("g6", "g7")


def test_classes_from_few_or_many_categories(tmp_path, tiered):
    category = TIERED["train"]
    for wanted, counts in ((2, [3, 3]), (3, [2, 2, 2]), (4, [1, 1, 2, 2])):
        subset = SubsetConfig(num_classes=6, num_categories=wanted, num_images=24)
        prepared = make(tmp_path, tiered, subset=subset)
        train = prepared.split("train")
        assert train.class_counts == (4,) * 6
        found = [category[name] for name in train.class_names]
        assert sorted(found.count(name) for name in set(found)) == counts
        assert prepared.split("val").class_names == train.class_names
        assert {name.split("/")[0] for name in labels(prepared, "val")} == set(train.class_names)
        assert f"train cut to 6 classes of {wanted} categories, equally many of each" in prepared.rule


def test_coarse_and_fine_labels_of_the_same_images(tmp_path, tiered):
    subset = SubsetConfig(num_classes=6, num_categories=2, num_images=24)
    fine = make(tmp_path, tiered, subset=subset)
    coarse = make(tmp_path, tiered, subset=dataclasses.replace(subset, labels="coarse"))
    for split in ("train", "val", "test"):
        own = labels(fine, split)
        assert own.keys() == labels(coarse, split).keys()
        assert labels(coarse, split) == {name: TIERED["train"][label] for name, label in own.items()}
    assert len(fine.split("train").class_names) == 6
    assert len(coarse.split("train").class_names) == 2
    whole = make(tmp_path, tiered, subset=SubsetConfig(num_categories=2))
    assert {TIERED["train"][name] for name in whole.split("train").class_names} == set(
        coarse.split("train").class_names
    )


def test_impossible_draws_of_categories_are_refused(tmp_path, tiered, mini):
    with pytest.raises(DataError, match="only 3 of 7 categories have at least 4 training classes"):
        make(tmp_path, tiered, subset=SubsetConfig(num_classes=16, num_categories=4))
    with pytest.raises(DataError, match=r"num_categories=2, but there are no coarse labels in train"):
        make(tmp_path, mini, subset=SubsetConfig(num_categories=2))


# ---- CIFAR-FS

FS = {"train": ["apple", "bee", "can"], "val": ["bear"], "test": ["maple_tree", "rose"]}


def test_cifar_fs(tmp_path):
    samples.write_cifar_fs(tmp_path / "fs", FS, each=10)
    prepared = make(tmp_path, f"cifar_fs:{tmp_path / 'fs'}")
    assert [prepared.split(name).num_images for name in SPLITS] == [24, 3, 3, 10, 20]
    assert classes(prepared)["train"] == set(FS["train"])
    assert classes(prepared)["val_classes"] == {"bear"}
    assert classes(prepared)["novel_classes"] == {"maple_tree", "rose"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "splits/bertinetto/val.txt").unlink(), r"there is no file splits/bertinetto/val\.txt"),
        (lambda d: (d / "splits/bertinetto/val.txt").write_text("\n"), r"val\.txt lists no class"),
        (
            lambda d: (d / "splits/bertinetto/val.txt").write_text("rose\n"),
            r"1 class\(s\) of val are in test too: rose",
        ),
        (lambda d: (d / "splits/bertinetto/val.txt").write_text("fox\n"), "data has no folder fox"),
        (lambda d: (d / "data").rename(d / "images"), r"there is no folder data \(found: images, splits\)"),
        (lambda d: [path.unlink() for path in (d / "data/bear").iterdir()], "no image in data/bear"),
    ],
)
def test_cifar_fs_errors(tmp_path, damage, message):
    samples.write_cifar_fs(tmp_path / "fs", FS)
    damage(tmp_path / "fs")
    with pytest.raises(DataError, match=message) as caught:
        make(tmp_path, f"cifar_fs:{tmp_path / 'fs'}")
    assert "DIR/data/apple/*.png" in str(caught.value)


# ---- CIFAR-10 and CIFAR-100


@pytest.mark.parametrize("inner", [True, False])
def test_cifar10_pixels_come_back(tmp_path, inner):
    pixels = samples.write_cifar10(tmp_path / "c")
    uri = f"cifar10:{tmp_path / 'c'}" + ("/cifar-10-batches-py" if inner else "")
    prepared = make(tmp_path, uri)
    assert [prepared.split(name).num_images for name in ("train", "val", "test")] == [44, 6, 10]
    assert prepared.split("train").class_names == ("ship", "cat")  # the archive's order
    for split in ("train", "val", "test"):
        for row in rows(prepared, split):
            batch, number = row["name"].split("/")[-2:]
            assert row["label"] == int(number) % 2
            with Image.open(io.BytesIO(row["image"])) as image:
                assert image.format == "PNG"
                np.testing.assert_array_equal(np.asarray(image), pixels[batch][int(number)])


def test_cifar100_has_fine_and_coarse_labels(tmp_path):
    pixels = samples.write_cifar100(tmp_path / "c")
    prepared = make(tmp_path, f"cifar100:{tmp_path / 'c'}", image_split=(0.9, 0.1, 0))
    info = prepared.split("test")
    assert info.class_names == ("trout", "apple", "bear", "bee")
    for row in rows(prepared, "test"):
        number = int(row["name"].split("/")[-1])
        assert row["label"] == number % 4
        assert info.coarse_names[row["coarse"]] == ["fish and fruit", "animals"][number % 4 // 2]
        with Image.open(io.BytesIO(row["image"])) as image:
            np.testing.assert_array_equal(np.asarray(image), pixels["test"][number])


class Exploit:
    """Writes a file when a pickle of it is loaded by ordinary means."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickles_code_is_not_run(tmp_path):
    samples.write_cifar10(tmp_path / "c")
    trap = tmp_path / "trap"
    content = {b"data": samples.cifar_rows(samples.cifar_pixels(0, 2)), b"labels": [0, 1], b"x": Exploit(trap)}
    batch = tmp_path / "c" / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(DataError, match=r"data_batch_3 is not a CIFAR pickle: it wants posix\.mkdir"):
        make(tmp_path, f"cifar10:{tmp_path / 'c'}")
    assert not trap.exists()
    pickle.loads(batch.read_bytes())
    assert trap.exists()  # the trap works


@pytest.mark.parametrize("protocol", range(5))  # CIFAR is of protocol 2
def test_pickles_of_arrays_of_every_protocol_are_read(protocol):
    content = {"data": np.arange(12, dtype=np.uint8).reshape(3, 4), "labels": [1, 2], "names": ["a", "é"]}
    read = read_pickle(pickle.dumps(content, protocol=protocol))
    np.testing.assert_array_equal(read["data"], content["data"])
    assert (read["labels"], read["names"]) == (content["labels"], content["names"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (b"not a pickle", "test is not a CIFAR pickle"),
        (b"", "test is not a CIFAR pickle"),
        (samples.python2_pickle({"data": np.zeros((2, 3072), np.uint8)}), "test has no 'fine_labels'; it has 'data'"),
        (pickle.dumps([1]), "test holds a list, not a dict"),
        (
            samples.python2_pickle({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0], "coarse_labels": [0]}),
            "test has 2 images and 1 labels",
        ),
        (
            samples.python2_pickle(
                {"data": np.zeros((2, 30), np.uint8), "fine_labels": [0, 0], "coarse_labels": [0, 0]}
            ),
            "is not a uint8 array of N x 3072",
        ),
        (
            samples.python2_pickle({"data": np.zeros((1, 3072), np.uint8), "fine_labels": [4], "coarse_labels": [0]}),
            "there are names for 0 to 3",
        ),
    ],
)
def test_cifar_errors(tmp_path, change, message):
    samples.write_cifar100(tmp_path / "c")
    (tmp_path / "c" / "cifar-100-python" / "test").write_bytes(change)
    with pytest.raises(DataError, match=message):
        make(tmp_path, f"cifar100:{tmp_path / 'c'}")


def test_prepared_cifar_is_found_without_reading_it(tmp_path, monkeypatch):
    samples.write_cifar10(tmp_path / "c")
    first = make(tmp_path, f"cifar10:{tmp_path / 'c'}")
    monkeypatch.setattr("image_data.layouts.cifar.read_pickle", None)
    assert make(tmp_path, f"cifar10:{tmp_path / 'c'}") == first


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
