"""CIFAR-FS, CIFAR-10 and CIFAR-100, from tiny files in exactly their layout."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from image_data.contracts import SPLITS, DataError
from image_data.layouts.cifar import read_pickle
from tests.image_data import layout_samples as samples
from tests.image_data.prepared_layouts import classes, make, rows

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
