"""MAFL: landmarks of a part of CelebA, and pretraining on CelebA without its test images."""

from __future__ import annotations

from pathlib import Path

import fsspec
import numpy as np
import pytest

from image_data.contracts import DataError
from image_data.prepare import PreparedData
from tests.image_data import annotated_samples as samples
from tests.image_data.prepared_layouts import make, rows


def images(prepared: PreparedData, split: str) -> list[str]:
    return sorted(row["name"].split("/")[-1] for row in rows(prepared, split))


@pytest.fixture
def faces(tmp_path):
    return samples.write_celeba_mafl(tmp_path / "f", training=20, testing=6, others=14)


def test_mafl(tmp_path, faces):
    prepared = make(tmp_path, f"mafl:{tmp_path / 'f'}")
    names = list(faces)
    assert (
        {split: images(prepared, split) for split in prepared.splits}
        == {
            "train": names[:18],
            "val": names[18:20],  # the last tenth
            "test": names[20:26],
        }
    )
    assert prepared.split("train").class_names == ("face",)
    for split in prepared.splits:
        for row in rows(prepared, split):
            points = faces[row["name"].split("/")[-1]]
            np.testing.assert_array_equal(np.array(row["landmarks"]), np.column_stack([points, np.ones(5)]))
    assert "train from the list training.txt of MAFL; val the last 2 of training.txt; test from the" in prepared.rule


def test_validation_images_are_the_last_of_celeba_whatever_the_order_of_the_list(tmp_path, faces):
    path = tmp_path / "f" / "MAFL" / "training.txt"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert images(make(tmp_path, f"mafl:{tmp_path / 'f'}"), "val") == list(faces)[18:20]


def test_share_of_validation_images(tmp_path, faces):
    prepared = make(tmp_path, f"mafl:{tmp_path / 'f'}?val=0.3")
    assert [info.num_images for info in prepared.splits.values()] == [14, 6, 6]
    whole = make(tmp_path, f"mafl:{tmp_path / 'f'}?val=0", image_split=(1, 0, 0))
    assert [(name, info.num_images) for name, info in whole.splits.items()] == [("train", 20), ("test", 6)]
    for share in ("1", "-0.1", "some", "nan"):
        with pytest.raises(DataError, match=f"val={share}: give a share from 0 to less than 1"):
            make(tmp_path, f"mafl:{tmp_path / 'f'}?val={share}")
    with pytest.raises(DataError, match=r"val=0.99 leaves none of the 20 images"):
        make(tmp_path, f"mafl:{tmp_path / 'f'}?val=0.99")


def test_lists_beside_the_images_and_the_authors_folders(tmp_path, faces):
    before = make(tmp_path, f"mafl:{tmp_path / 'f'}")
    root = tmp_path / "f"
    for name in ("training.txt", "testing.txt"):
        (root / "MAFL" / name).rename(root / name)
    (root / "Anno").mkdir()
    (root / "list_landmarks_align_celeba.txt").rename(root / "Anno" / "list_landmarks_align_celeba.txt")
    (root / "Img").mkdir()
    (root / "img_align_celeba").rename(root / "Img" / "img_align_celeba")
    for name in ("list_eval_partition.txt", "identity_CelebA.txt"):  # MAFL alone does not need them
        (root / name).unlink()
    after = make(tmp_path, f"mafl:{root}")
    assert after.content == before.content


def test_pretraining_without_the_test_images(tmp_path, faces):
    test = set(images(make(tmp_path, f"mafl:{tmp_path / 'f'}"), "test"))
    for labels in ("identity", "none"):
        uri = f"celeba:{tmp_path / 'f'}?labels={labels}"
        everything = make(tmp_path, uri)
        seen = {name for split in everything.splits for name in images(everything, split)}
        assert seen == set(faces)
        assert test & set(images(everything, "train"))  # else there is nothing to leave out
        reduced = make(tmp_path, f"{uri}&exclude={tmp_path / 'f' / 'MAFL' / 'testing.txt'}")
        left = {name for split in reduced.splits for name in images(reduced, split)}
        assert left == set(faces) - test


def write_list(name: str, *lines: str):
    return lambda folder: (folder / "MAFL" / name).write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "MAFL/testing.txt").unlink(), r"there is no file MAFL/testing\.txt \(found: MAFL, identity_Ce"),
        (write_list("testing.txt"), r"MAFL/testing\.txt lists no image"),
        (write_list("testing.txt", "1.jpg", "000021.jpg"), r"MAFL/testing\.txt lists 1 images that list_la.*: 1\.jpg"),
        (write_list("training.txt", "000001.jpg", "000001.jpg"), r"MAFL/training\.txt lists twice: 000001\.jpg"),
        (write_list("testing.txt", "000001.jpg"), r"1 images are in training\.txt and in testing\.txt: 000001\.jpg"),
        (lambda d: (d / "list_landmarks_align_celeba.txt").unlink(), r"there is no file list_landmarks_align_celeba"),
        (lambda d: (d / "img_align_celeba").rename(d / "images"), "there is no folder img_align_celeba"),
        (lambda d: [p.unlink() for p in (d / "img_align_celeba").iterdir()], "none of the 18 listed images is in img_"),
        (lambda d: (d / "img_align_celeba/000003.jpg").unlink(), r"\n  000003\.jpg: no such file"),
    ],
)  # fmt: skip
def test_mafl_errors(tmp_path, faces, damage, message):
    damage(tmp_path / "f")
    with pytest.raises(DataError, match=message):
        make(tmp_path, f"mafl:{tmp_path / 'f'}")


def test_other_landmarks_make_other_data(tmp_path, faces):
    before = make(tmp_path, f"mafl:{tmp_path / 'f'}")
    path: Path = tmp_path / "f" / "list_landmarks_align_celeba.txt"
    x = faces["000001.jpg"][0, 0]
    path.write_text(path.read_text().replace(f"000001.jpg {x} ", f"000001.jpg {x + 1} "))
    after = make(tmp_path, f"mafl:{tmp_path / 'f'}")
    assert (before.fingerprint != after.fingerprint, before.content != after.content) == (True, True)


def test_remote_mafl(tmp_path, faces):
    base = f"memory://{tmp_path.name}"
    fsspec.filesystem("memory").put(f"{tmp_path / 'f'}/", f"{base}/", recursive=True)
    local, remote = (make(tmp_path, f"mafl:{path}") for path in (tmp_path / "f", base))
    assert remote.content == local.content
