"""The table of layouts, miniImageNet and tieredImageNet, from tiny files in exactly their layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import fsspec
import numpy as np
import pytest

from image_data.contracts import SPLITS, DataError
from image_data.layouts import LAYOUTS, Arrays, ArraySource, ListedSource, open_layout
from image_data.subset import SubsetConfig
from image_data.uri import SCHEMES, Files, parse_uri
from tests.image_data import layout_samples as samples
from tests.image_data.prepared_layouts import classes, labels, make, rows
from tests.image_data.samples import picture, table, write_folder

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
