"""The twelve domains, from tiny files in exactly the layouts in which they are published."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from image_data.contracts import DataError
from image_data.layouts import LAYOUTS, open_layout
from image_data.layouts.domains import DOMAIN_LAYOUTS
from image_data.prepare import DataConfig, prepare
from image_data.uri import parse_uri
from tests.image_data.samples import encode, picture

FLOWERS = 24


@pytest.fixture(autouse=True)
def _listed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, layout in DOMAIN_LAYOUTS.items():
        monkeypatch.setitem(LAYOUTS, name, layout)


def write(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def write_classes(root: Path, classes: Mapping[str, int], suffix: str = ".jpg") -> None:
    """<class>/<last part of class>_<i><suffix>."""
    for label, count in classes.items():
        for i in range(1, count + 1):
            write(root / label / f"{label.split('/')[-1]}_{i}{suffix}", picture(i))


def write_csv(path: Path, header: str, rows: Sequence[str]) -> None:
    write(path, "\n".join([header, *rows]) + "\n")


def mat(**variables: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, variables, do_compression=True)
    return buffer.getvalue()


def split_names(uri: str) -> dict[str, list[str]]:
    """Names of each split."""
    return {split: list(source.index().names) for split, source in open_layout(parse_uri(uri), "").items()}


def split_labels(uri: str) -> dict[str, dict[str, str]]:
    """Split -> image -> name of its class."""
    found = {}
    for split, source in open_layout(parse_uri(uri), "").items():
        index = source.index()
        found[split] = {name: index.class_names[label] for name, label in zip(index.names, index.labels, strict=True)}
    return found


# ---- one writer for each data set: its published files, small


def write_chestx(root: Path, folders: Sequence[str] = ("images",)) -> None:
    header = (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
    )
    findings = ["Mass", "Nodule", "Mass|Nodule", "No Finding", "Pneumonia", "Effusion", "Hernia"] * 2
    rows = [f"{i:08d}_000.png,{name},0,{i // 2},58,M,PA,2682,2749,0.143,0.143," for i, name in enumerate(findings)]
    write_csv(root / "Data_Entry_2017.csv", header, rows)
    for i in range(len(findings)):
        write(root / folders[i % len(folders)] / f"{i:08d}_000.png", encode(Image.new("L", (9, 8), i)))


def write_isic(
    root: Path, rows: Sequence[str] = ("0.0,1.0,0.0,0.0,0.0,0.0,0.0", "1.0,0.0,0.0,0.0,0.0,0.0,0.0")
) -> None:
    names = [f"ISIC_{24306 + i:07d}" for i in range(len(rows))]
    folder = root / "ISIC2018_Task3_Training_GroundTruth"
    write_csv(
        folder / f"{folder.name}.csv",
        "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC",
        [f"{name},{row}" for name, row in zip(names, rows, strict=True)],
    )
    for i, name in enumerate(names):
        write(root / "ISIC2018_Task3_Training_Input" / f"{name}.jpg", picture(i))


def write_dtd(root: Path) -> None:
    for label in ("banded", "zigzagged"):
        write_classes(root / "images", {label: 6})
    for partition in ("1", "2"):
        order = [1, 2, 3, 4, 5, 6] if partition == "1" else [6, 5, 4, 3, 2, 1]
        for part, split in enumerate(("train", "val", "test")):
            images = [
                f"{label}/{label}_{i}.jpg" for label in ("banded", "zigzagged") for i in order[2 * part : 2 * part + 2]
            ]
            write(root / "labels" / f"{split}{partition}.txt", "\n".join(images) + "\n")


def write_deepweeds(root: Path) -> None:
    names = [f"20160928-1403{i:02d}-0.jpg" for i in range(18)]
    species = ["Chinee apple", *["?"] * 6, "Snake weed", "Negative"]
    write_csv(
        root / "labels" / "labels.csv",
        "Filename,Label,Species",
        [f"{name},{i % 9},{species[i % 9]}" for i, name in enumerate(names)],
    )
    for part, split in enumerate(("train", "val", "test")):
        rows = [f"{names[i]},{i % 9}" for i in range(6 * part, 6 * part + 6)]
        write_csv(root / "labels" / f"{split}_subset0.csv", "Filename,Label", rows)
    for i, name in enumerate(names):
        write(root / "images" / name, picture(i))


def write_kaokore(root: Path) -> None:
    sets = ["train", "train", "dev", "test"] * 4
    rows = [f"{i:08d}.jpg,{i % 2},{i // 4},{part}" for i, part in enumerate(sets)]
    write_csv(root / "labels.csv", "image,gender,status,set", rows)
    for i in range(len(sets)):
        write(root / "images_256" / f"{i:08d}.jpg", picture(i))


def write_flowers102(root: Path) -> None:
    for i in range(1, FLOWERS + 1):
        write(root / "jpg" / f"image_{i:05d}.jpg", picture(i))
    ids = np.random.default_rng(0).permutation(np.arange(1, FLOWERS + 1, dtype=np.uint16))
    write(root / "imagelabels.mat", mat(labels=np.arange(FLOWERS, dtype=np.uint8)[None] % 12 + 1))
    write(root / "setid.mat", mat(trnid=ids[None, :6], valid=ids[None, 6:12], tstid=ids[None, 12:]))


def write_svhn(root: Path) -> dict[str, np.ndarray]:
    """Returns the pixels of each part, (N, 32, 32, 3)."""
    pixels = {
        part: np.random.default_rng(i).integers(0, 256, (12, 32, 32, 3), np.uint8)
        for i, part in enumerate(("train", "test"))
    }
    for part, own in pixels.items():
        labels = (np.arange(12, dtype=np.uint8) % 10 + 1)[:, None]
        write(root / f"{part}_32x32.mat", mat(X=own.transpose(1, 2, 3, 0), y=labels))
    return pixels


def write_crop_disease(root: Path) -> None:
    for part, count in (("train", 4), ("test", 2)):
        write_classes(root / "dataset" / part, {"Apple___Apple_scab": count, "Tomato___healthy": count}, ".JPG")


def write_omniglot(root: Path) -> None:
    for part, alphabets in (("background", ("Greek", "Latin")), ("evaluation", ("Angelic",))):
        for alphabet in alphabets:
            write_classes(root / f"images_{part}" / alphabet, {"character01": 3, "character02": 3}, ".png")


WRITERS = {
    "eurosat": lambda root: write_classes(root / "2750", {"AnnualCrop": 5, "SeaLake": 5}),
    "cropdisease": write_crop_disease,
    "chestx": write_chestx,
    "isic": write_isic,
    "dtd": write_dtd,
    "omniglot": write_omniglot,
    "resisc45": lambda root: write_classes(root / "NWPU-RESISC45", {"airplane": 5, "wetland": 5}),
    "svhn": write_svhn,
    "deepweeds": write_deepweeds,
    "kaokore": write_kaokore,
    "sketch": lambda root: write_classes(root / "sketch", {"n01440764": 5, "n15075141": 5}, ".JPEG"),
    "flowers102": write_flowers102,
}
SPLITS = {
    "train": {"eurosat", "chestx", "isic", "omniglot", "resisc45", "sketch"},
    "train test": {"cropdisease", "svhn"},
    "train val test": {"dtd", "deepweeds", "kaokore", "flowers102"},
}


def test_the_list_is_that_of_the_study() -> None:
    assert set(DOMAIN_LAYOUTS) == set(WRITERS)
    assert len(DOMAIN_LAYOUTS) == 12


@pytest.mark.parametrize("name", DOMAIN_LAYOUTS)
def test_own_splits_and_no_others(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    expected = next(splits for splits, names in SPLITS.items() if name in names)
    found = split_names(f"{name}:{tmp_path}")
    assert " ".join(found) == expected
    assert all(found.values())


@pytest.mark.parametrize("name", DOMAIN_LAYOUTS)
def test_a_folder_without_the_files_shows_the_tree(name: str, tmp_path: Path) -> None:
    write(tmp_path / "readme.md", "nothing")
    with pytest.raises(DataError, match=r"found: readme\.md") as caught:
        open_layout(parse_uri(f"{name}:{tmp_path}"), "")
    layout = DOMAIN_LAYOUTS[name]
    assert all(line.strip() in str(caught.value) for line in layout.tree.strip().splitlines())
    assert layout.source in str(caught.value)


@pytest.mark.parametrize(("name", "query"), [("chestx", ""), ("svhn", ""), ("dtd", "?val=train"), ("sketch", "")])
def test_prepared_as_the_study_divides_them(name: str, query: str, tmp_path: Path) -> None:
    """Train and test only: 70 and 30 % where the data set has no split of its own."""
    WRITERS[name](tmp_path / "data")
    data = (f"train={name}:{tmp_path / 'data'}{query}",)
    config = DataConfig(data, cache=str(tmp_path / "cache"), image_split=(0.7, 0.0, 0.3))
    prepared = prepare(config, lambda _: None, threads=1)
    own = split_names(f"{name}:{tmp_path / 'data'}{query}")
    assert set(prepared.splits) == {"train", "test"}
    assert sum(info.num_images for info in prepared.splits.values()) == sum(map(len, own.values()))


def test_classes_are_folders(tmp_path: Path) -> None:
    WRITERS["eurosat"](tmp_path)
    labels = split_labels(f"eurosat:{tmp_path}")["train"]
    assert labels["AnnualCrop/AnnualCrop_1.jpg"] == "AnnualCrop"
    assert len(labels) == 10
    assert split_labels(f"eurosat:{tmp_path}/2750")["train"] == labels  # as the 12-domain code is given it
    (tmp_path / "tv").mkdir()
    (tmp_path / "2750").rename(tmp_path / "tv" / "2750")
    (tmp_path / "tv").rename(tmp_path / "eurosat")
    assert split_labels(f"eurosat:{tmp_path}")["train"] == labels  # as torchvision unpacks it
    write(tmp_path / "eurosat" / "2750" / "stray.jpg", picture(0))
    with pytest.raises(DataError, match=r"stray\.jpg lies outside of the class folders"):
        split_names(f"eurosat:{tmp_path}")


def test_crop_disease_needs_both_folders(tmp_path: Path) -> None:
    write_crop_disease(tmp_path)
    found = split_labels(f"cropdisease:{tmp_path}")
    assert {split: len(own) for split, own in found.items()} == {"train": 8, "test": 4}
    assert split_names(f"cropdisease:{tmp_path}/dataset") == split_names(f"cropdisease:{tmp_path}")
    (tmp_path / "dataset" / "test").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="there is no folder dataset/test"):
        split_names(f"cropdisease:{tmp_path}")


@pytest.mark.parametrize(
    ("part", "alphabets"),
    [("", {"Angelic"}), ("background", {"Greek", "Latin"}), ("all", {"Angelic", "Greek", "Latin"})],
)
def test_omniglot_classes_are_characters_of_an_alphabet(part: str, alphabets: set[str], tmp_path: Path) -> None:
    write_omniglot(tmp_path)
    labels = split_labels(f"omniglot:{tmp_path}" + (f"?part={part}" if part else ""))["train"]
    assert {label.split("/")[0] for label in labels.values()} == alphabets
    assert len(set(labels.values())) == 2 * len(alphabets)


def test_chestx_keeps_images_with_one_of_seven_findings(tmp_path: Path) -> None:
    write_chestx(tmp_path, [f"images_{i:03d}/images" for i in (1, 2, 12)])
    source = open_layout(parse_uri(f"chestx:{tmp_path}"), "")["train"]
    index = source.index()
    kept = {0: "Mass", 1: "Nodule", 5: "Effusion", 7: "Mass", 8: "Nodule", 12: "Effusion"}
    assert split_labels(f"chestx:{tmp_path}")["train"] == {f"{i:08d}_000.png": label for i, label in kept.items()}
    rows = list(source.read(np.ones(len(index.names), bool)))
    assert not any(row.error for row in rows)  # found in whichever of the archives' folders they are
    grey = [np.array(Image.open(io.BytesIO(row.data)))[0, 0] for row in sorted(rows, key=lambda row: row.position)]
    assert grey == list(kept)
    assert index.groups is None
    grouped = open_layout(parse_uri(f"chestx:{tmp_path}?groups=patient"), "")["train"].index()
    assert list(grouped.groups or ()) == ["0", "0", "2", "3", "4", "6"]


def test_isic_needs_exactly_one_lesion_per_image(tmp_path: Path) -> None:
    write_isic(tmp_path)
    assert split_labels(f"isic:{tmp_path}")["train"] == {"ISIC_0024306.jpg": "NV", "ISIC_0024307.jpg": "MEL"}
    for row in ("0.0,1.0,1.0,0.0,0.0,0.0,0.0", "0.0,0.0,0.0,0.0,0.0,0.0,0.0", "0.0,0.9,0.0,0.0,0.0,0.0,0.0"):
        write_isic(tmp_path, ["1.0,0.0,0.0,0.0,0.0,0.0,0.0", row])
        with pytest.raises(DataError, match=r"ISIC_0024307 in .* must have a 1 for one lesion"):
            split_names(f"isic:{tmp_path}")


def test_dtd_follows_the_lists_of_its_partitions(tmp_path: Path) -> None:
    write_dtd(tmp_path / "dtd" / "dtd")
    first, second = (split_names(f"dtd:{tmp_path}?partition={i}") for i in (1, 2))
    assert first["train"] == [f"{label}/{label}_{i}.jpg" for label in ("banded", "zigzagged") for i in (1, 2)]
    assert set(first["train"]) == set(second["test"])
    assert split_names(f"dtd:{tmp_path}/dtd") == split_names(f"dtd:{tmp_path}/dtd/dtd") == first
    assert set(split_labels(f"dtd:{tmp_path}")["val"].values()) == {"banded", "zigzagged"}
    with pytest.raises(DataError, match="partition=11: choose 1 or 2"):
        split_names(f"dtd:{tmp_path}?partition=11")
    with pytest.raises(DataError, match=r"no file dtd/dtd/labels/train3\.txt"):
        split_names(f"dtd:{tmp_path}?partition=3")


@pytest.mark.parametrize("name", sorted(SPLITS["train val test"]))
def test_validation_images_join_train_when_asked(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    own, joined = split_names(f"{name}:{tmp_path}"), split_names(f"{name}:{tmp_path}?val=train")
    assert joined == {"train": own["train"] + own["val"], "test": own["test"]}
    with pytest.raises(DataError, match="val=all: choose own or train"):
        split_names(f"{name}:{tmp_path}?val=all")


def test_deepweeds_has_folds_and_names(tmp_path: Path) -> None:
    write_deepweeds(tmp_path)
    assert split_labels(f"deepweeds:{tmp_path}")["val"]["20160928-140308-0.jpg"] == "Negative"
    everything = split_labels(f"deepweeds:{tmp_path}?fold=none")
    assert list(everything) == ["train"]
    assert len(everything["train"]) == 18
    assert everything["train"]["20160928-140307-0.jpg"] == "Snake weed"
    (tmp_path / "labels" / "labels.csv").rename(tmp_path / "labels.csv")  # where the 12-domain code puts it
    assert split_labels(f"deepweeds:{tmp_path}?fold=none") == everything
    write_csv(tmp_path / "labels" / "val_subset0.csv", "Filename,Label", ["20160928-140308-0.jpg,9"])
    with pytest.raises(DataError, match="has the label '9'; there are 0 to 8"):
        split_names(f"deepweeds:{tmp_path}")


def test_kaokore_labels(tmp_path: Path) -> None:
    write_kaokore(tmp_path)
    found = split_labels(f"kaokore:{tmp_path}")
    assert {split: len(own) for split, own in found.items()} == {"train": 8, "val": 4, "test": 4}
    assert found["train"]["00000005.jpg"] == "female warrior"
    index = open_layout(parse_uri(f"kaokore:{tmp_path}"), "")["train"].index()
    assert index.labels[list(index.names).index("00000005.jpg")] == 4 * 1 + 1  # the number of the 12-domain code
    assert split_labels(f"kaokore:{tmp_path}?labels=gender")["test"]["00000003.jpg"] == "female"
    assert split_labels(f"kaokore:{tmp_path}?labels=status")["val"]["00000014.jpg"] == "commoner"
    write_csv(tmp_path / "labels.csv", "image,gender,status,set", ["00000001.jpg,1,4,train"])
    with pytest.raises(DataError, match="status '4'"):
        split_names(f"kaokore:{tmp_path}")


def test_flowers102_follows_setid(tmp_path: Path) -> None:
    write_flowers102(tmp_path / "flowers-102")
    found = split_labels(f"flowers102:{tmp_path}")
    assert {split: len(own) for split, own in found.items()} == {"train": 6, "val": 6, "test": 12}
    together = found["train"] | found["val"] | found["test"]
    assert together == {f"image_{i:05d}.jpg": str((i - 1) % 12 + 1) for i in range(1, FLOWERS + 1)}
    classes = open_layout(parse_uri(f"flowers102:{tmp_path}"), "")["test"].index().class_names
    assert list(classes) == sorted(classes, key=int)
    write(
        tmp_path / "flowers-102" / "setid.mat",
        mat(trnid=np.array([[FLOWERS + 1]]), valid=np.ones((1, 1)), tstid=np.ones((1, 1))),
    )
    with pytest.raises(DataError, match=r"trnid of setid\.mat names the images 25 to 25"):
        split_names(f"flowers102:{tmp_path}")
    write(tmp_path / "flowers-102" / "setid.mat", mat(other=np.ones((1, 1))))
    with pytest.raises(DataError, match="no numbers 'trnid'; it has other"):
        split_names(f"flowers102:{tmp_path}")


def test_svhn_pixels_and_digits(tmp_path: Path) -> None:
    pixels = write_svhn(tmp_path)
    source = open_layout(parse_uri(f"svhn:{tmp_path}"), "")["test"]
    index = source.index()
    assert index.class_names == tuple(map(str, range(10)))
    assert index.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]  # 10 is the digit 0
    rows = list(source.read(np.arange(12) == 7))
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(rows[0].data))), pixels["test"][7])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no matlab file at all", "not a readable MATLAB 5 file"),
        (b"", "not a readable MATLAB 5 file"),
        (mat(X=np.arange(9999))[:200], "not a readable MATLAB 5 file"),
        (mat(X=np.zeros((32, 32, 3, 2), np.float64), y=np.ones((2, 1))), "must hold X, uint8 32 x 32 x 3 x N"),
        (mat(X=np.zeros((32, 32, 3, 2), np.uint8), y=np.ones((3, 1))), "3 labels"),
    ],
)
def test_a_damaged_matlab_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    write_svhn(tmp_path)
    write(tmp_path / "train_32x32.mat", content)
    with pytest.raises(DataError, match=message):
        split_names(f"svhn:{tmp_path}")


def test_lists_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_dtd(tmp_path)
    train = (tmp_path / "labels" / "train1.txt").read_text()
    write(tmp_path / "labels" / "val1.txt", train)
    with pytest.raises(DataError, match=r"banded_1\.jpg is listed for train and for val"):
        split_names(f"dtd:{tmp_path}")
    write(tmp_path / "labels" / "val1.txt", "")
    with pytest.raises(DataError, match="no image is listed for val"):
        split_names(f"dtd:{tmp_path}")
    write(tmp_path / "labels" / "val1.txt", "banded_3.jpg\n")
    with pytest.raises(DataError, match="is not <class>/<image>"):
        split_names(f"dtd:{tmp_path}")
    write_kaokore(tmp_path / "k")
    (tmp_path / "k" / "images_256").rename(tmp_path / "k" / "else")
    (tmp_path / "k" / "images_256").mkdir()
    with pytest.raises(DataError, match="none of the 8 images listed for train is there"):
        split_names(f"kaokore:{tmp_path}/k")
    write_csv(tmp_path / "k" / "labels.csv", "image,gender,set", ["a.jpg,0,train"])
    with pytest.raises(DataError, match="has no column status"):
        split_names(f"kaokore:{tmp_path}/k")
    write_csv(tmp_path / "k" / "labels.csv", "image,gender,status,set", ["a.jpg,0"])
    with pytest.raises(DataError, match=r"line 2 of labels\.csv has too few values"):
        split_names(f"kaokore:{tmp_path}/k")


def test_an_image_that_is_listed_but_not_there_is_unreadable(tmp_path: Path) -> None:
    write_kaokore(tmp_path)
    (tmp_path / "images_256" / "00000000.jpg").unlink()
    source = open_layout(parse_uri(f"kaokore:{tmp_path}"), "")["train"]
    errors = [bool(row.error) for row in source.read(np.ones(8, bool))]
    assert errors == [True] + [False] * 7
