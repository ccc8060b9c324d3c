"""Those of the twelve domains that come with lists of images: ChestX, ISIC, DTD, DeepWeeds, Kaokore."""

from __future__ import annotations

import posixpath

from image_data.layouts.domains_common import VAL_OPTION, Rows, find_folder, listed_sources, option, read_table
from image_data.layouts.layout import Layout, layout_error, read_text
from image_data.sources import RowSource
from image_data.uri import DataUri, Files, some

__all__ = ["LIST_LAYOUTS"]

# The seven findings that the cross-domain benchmark keeps; images with several findings, or others, are left out.
_FINDINGS = ("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumothorax")
_CHESTX_LISTS = ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv")
_CHESTX_FOLDERS = ("images", "images_resized", "images-224", *(f"images_{i:03d}/images" for i in range(1, 13)))

_LESIONS = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
_ISIC_LIST = "ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv"
_ISIC_IMAGES = "ISIC2018_Task3_Training_Input"

# The lists give numbers; the names are those of labels.csv.
_WEEDS = (
    "Chinee apple",
    "Lantana",
    "Parkinsonia",
    "Parthenium",
    "Prickly acacia",
    "Rubber vine",
    "Siam weed",
    "Snake weed",
    "Negative",
)

# labels.metadata.en.txt
_GENDERS = ("male", "female")
_STATUSES = ("noble", "warrior", "incarnation", "commoner")
_KAOKORE_SETS = {"train": "train", "dev": "val", "test": "test"}


def _open_chestx(uri: DataUri, files: Files) -> dict[str, RowSource]:
    by_patient = option(uri, "groups", ("none", "patient")) == "patient"
    present = set(files.names())
    name = next((name for name in _CHESTX_LISTS if name in present), _CHESTX_LISTS[0])
    table = read_table(_CHESTX, uri, files, name, ("Image Index", "Finding Labels", "Patient ID"))
    kept = [row for row in table if row["Finding Labels"] in _FINDINGS]
    rows: Rows = {"train": [(row["Image Index"], row["Finding Labels"]) for row in kept]}
    folders = [folder for folder in _CHESTX_FOLDERS if files.is_dir(posixpath.join(files.root, folder))]
    if not folders:
        raise layout_error(_CHESTX, uri, f"there is no folder images (found: {some(sorted(present), 10)}).")
    places = {
        image: folder for folder in reversed(folders) for image in files.names(posixpath.join(files.root, folder))
    }
    groups = {row["Image Index"]: row["Patient ID"] for row in kept} if by_patient else None
    origin = f"images with one of 7 findings and no other, from {name}"
    return listed_sources(_CHESTX, uri, files, folders[0], rows, origin, places=places, groups=groups)


def _open_isic(uri: DataUri, files: Files) -> dict[str, RowSource]:
    rows: Rows = {"train": []}
    for row in read_table(_ISIC, uri, files, _ISIC_LIST, ("image", *_LESIONS)):
        marked = [lesion for lesion in _LESIONS if row[lesion] in ("1", "1.0")]
        if len(marked) != 1 or any(row[lesion] not in ("0", "0.0", "1", "1.0") for lesion in _LESIONS):
            raise layout_error(
                _ISIC, uri, f"{row['image']} in {_ISIC_LIST} must have a 1 for one lesion and 0 for the others."
            )
        rows["train"].append((f"{row['image']}.jpg", marked[0]))
    folder = find_folder(_ISIC, uri, files, (_ISIC_IMAGES,))
    return listed_sources(_ISIC, uri, files, folder, rows, f"from the list {posixpath.basename(_ISIC_LIST)}")


def _open_dtd(uri: DataUri, files: Files) -> dict[str, RowSource]:
    partition = option(uri, "partition", tuple(str(i) for i in range(1, 11)))
    root = find_folder(_DTD, uri, files, ("dtd/dtd", "dtd"), inside="labels")
    rows: Rows = {}
    for split in ("train", "val", "test"):
        name = posixpath.join(root, "labels", f"{split}{partition}.txt")
        lines = [line.strip() for line in read_text(_DTD, uri, files, name).splitlines() if line.strip()]
        wrong = [line for line in lines if line.count("/") != 1]
        if wrong:
            raise layout_error(_DTD, uri, f"{name}: {wrong[0]!r} is not <class>/<image>.")
        rows[split] = [(line, line.split("/")[0]) for line in lines]
    origin = f"partition {partition} of its authors"
    return listed_sources(_DTD, uri, files, posixpath.join(root, "images"), rows, origin)


def _open_deepweeds(uri: DataUri, files: Files) -> dict[str, RowSource]:
    fold = option(uri, "fold", ("0", "1", "2", "3", "4", "none"))
    if fold == "none":
        lists = {"train": "labels.csv" if "labels.csv" in files.names() else "labels/labels.csv"}
        origin = "all images of labels.csv"
    else:
        lists = {split: f"labels/{split}_subset{fold}.csv" for split in ("train", "val", "test")}
        origin = f"fold {fold} of its authors"
    rows: Rows = {}
    for split, name in lists.items():
        table = read_table(_DEEPWEEDS, uri, files, name, ("Filename", "Label"))
        wrong = [row["Label"] for row in table if row["Label"] not in map(str, range(len(_WEEDS)))]
        if wrong:
            raise layout_error(_DEEPWEEDS, uri, f"{name} has the label {wrong[0]!r}; there are 0 to {len(_WEEDS) - 1}.")
        rows[split] = [(row["Filename"], row["Label"]) for row in table]
    folder = find_folder(_DEEPWEEDS, uri, files, ("images",))
    return listed_sources(_DEEPWEEDS, uri, files, folder, rows, origin, class_names=_WEEDS)


def _open_kaokore(uri: DataUri, files: Files) -> dict[str, RowSource]:
    labels_by = option(uri, "labels", ("both", "gender", "status"))
    rows: Rows = {split: [] for split in _KAOKORE_SETS.values()}
    for row in read_table(_KAOKORE, uri, files, "labels.csv", ("image", "gender", "status", "set")):
        gender, status, part = row["gender"], row["status"], row["set"]
        if gender not in ("0", "1") or status not in ("0", "1", "2", "3") or part not in _KAOKORE_SETS:
            raise layout_error(
                _KAOKORE,
                uri,
                f"{row['image']} in labels.csv has gender {gender!r}, status {status!r}, set {part!r}; allowed: 0 or "
                f"1, 0 to 3, {' or '.join(_KAOKORE_SETS)}.",
            )
        number = {"both": 4 * int(gender) + int(status), "gender": int(gender), "status": int(status)}[labels_by]
        rows[_KAOKORE_SETS[part]].append((row["image"], str(number)))
    both = tuple(f"{gender} {status}" for gender in _GENDERS for status in _STATUSES)
    names = {"both": both, "gender": _GENDERS, "status": _STATUSES}[labels_by]
    folder = find_folder(_KAOKORE, uri, files, ("images_256",))
    return listed_sources(_KAOKORE, uri, files, folder, rows, "the sets of labels.csv", class_names=names)


_CHESTX = Layout(
    name="chestx",
    summary="ChestX: the 25,848 X-rays with one of 7 findings and no other; no split of its own",
    tree="""
DIR/Data_Entry_2017.csv        (or Data_Entry_2017_v2020.csv)
    header Image Index,Finding Labels,Follow-up #,Patient ID,...; 00000001_000.png,Cardiomegaly,0,1,...
DIR/images/00000001_000.png    (or images_resized, images-224, or images_001/images to images_012/images)
""",
    source="kaggle.com/nih-chest-xrays/data, IBM/cdfsl-benchmark: datasets/Chest_few_shot.py",
    open=_open_chestx,
    options={"groups": "none: images are divided one by one, as published; or patient: a patient's stay in one split"},
)
_ISIC = Layout(
    name="isic",
    summary="ISIC 2018, task 3: 10,015 skin lesions of 7 kinds; no split of its own",
    tree=f"""
DIR/{_ISIC_IMAGES}/ISIC_0024306.jpg
DIR/{_ISIC_LIST}
    header image,{",".join(_LESIONS)}; ISIC_0024306,0.0,1.0,0.0,0.0,0.0,0.0,0.0
""",
    source="challenge.isic-archive.com/data#2018, IBM/cdfsl-benchmark: datasets/ISIC_few_shot.py",
    open=_open_isic,
)
_DTD = Layout(
    name="dtd",
    summary="Describable Textures: 47 textures, 1,880 images each in train, val and test",
    tree="""
DIR/images/banded/banded_0002.jpg     (or DIR/dtd/images, or DIR/dtd/dtd/images as torchvision unpacks it)
DIR/labels/train1.txt                 lines banded/banded_0002.jpg; also val1.txt, test1.txt
""",
    source="dtd-r1.0.1.tar.gz of robots.ox.ac.uk/~vgg/data/dtd",
    open=_open_dtd,
    options={"partition": "1: which of the authors' ten, 1 to 10", **VAL_OPTION},
)
_DEEPWEEDS = Layout(
    name="deepweeds",
    summary="DeepWeeds: 17,509 photographs of 8 weeds and of none; five folds of 60, 20 and 20 %",
    tree="""
DIR/images/20160928-140314-0.jpg
DIR/labels/train_subset0.csv       header Filename,Label; also val_subset0.csv, test_subset0.csv
DIR/labels/labels.csv              (or DIR/labels.csv) with fold=none: header Filename,Label,Species
""",
    source="AlexOlsen/DeepWeeds: labels/, deepweeds.py; asrafulashiq/transfer_broad uses labels.csv and its own split",
    open=_open_deepweeds,
    options={
        "fold": "0: which of the authors' five, 0 to 4; or none: no split, as in the 12-domain protocol",
        **VAL_OPTION,
    },
)
_KAOKORE = Layout(
    name="kaokore",
    summary="KaoKore: faces of Japanese paintings, gender and status; its set dev is val",
    tree="""
DIR/labels.csv                header image,gender,status,set; 00000017.jpg,1,3,train
DIR/images_256/00000017.jpg
""",
    source="rois-codh/kaokore: download.py, code/dataloader_pytorch.py",
    open=_open_kaokore,
    options={
        "labels": "both: 8 classes of gender and status, as in the 12-domain protocol; or gender; or status",
        **VAL_OPTION,
    },
)
LIST_LAYOUTS = {layout.name: layout for layout in (_CHESTX, _ISIC, _DTD, _DEEPWEEDS, _KAOKORE)}
