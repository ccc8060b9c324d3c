"""Those of the twelve domains that are folders of classes: EuroSAT, CropDisease, Omniglot, Resisc45, Sketch."""

from __future__ import annotations

import posixpath

from image_data.layouts.domains_common import find_folder, folder_source, option
from image_data.layouts.layout import Layout
from image_data.sources import RowSource
from image_data.uri import DataUri, Files

__all__ = ["FOLDER_LAYOUTS"]

_OMNIGLOT_PARTS = {
    "evaluation": ("images_evaluation",),
    "background": ("images_background",),
    "all": ("images_background", "images_evaluation"),
}


def _open_eurosat(uri: DataUri, files: Files) -> dict[str, RowSource]:
    folder = find_folder(_EUROSAT, uri, files, ("2750", "eurosat/2750"), inside="AnnualCrop")
    return {"train": folder_source(_EUROSAT, uri, files, (folder,))}


def _open_resisc45(uri: DataUri, files: Files) -> dict[str, RowSource]:
    folder = find_folder(_RESISC45, uri, files, ("NWPU-RESISC45",), inside="airplane")
    return {"train": folder_source(_RESISC45, uri, files, (folder,))}


def _open_sketch(uri: DataUri, files: Files) -> dict[str, RowSource]:
    folder = find_folder(_SKETCH, uri, files, ("sketch",), inside="n01440764")
    return {"train": folder_source(_SKETCH, uri, files, (folder,))}


def _open_crop_disease(uri: DataUri, files: Files) -> dict[str, RowSource]:
    root = "dataset" if files.is_dir(posixpath.join(files.root, "dataset")) else ""
    return {
        split: folder_source(
            _CROP_DISEASE,
            uri,
            files,
            (posixpath.join(root, split),),
            origin=f"from the folder {posixpath.join(root, split)}",
        )
        for split in ("train", "test")
    }


def _open_omniglot(uri: DataUri, files: Files) -> dict[str, RowSource]:
    parts = _OMNIGLOT_PARTS[option(uri, "part", tuple(_OMNIGLOT_PARTS))]
    root = "omniglot-py" if files.is_dir(posixpath.join(files.root, "omniglot-py")) else ""
    folders = [posixpath.join(root, part) for part in parts]
    return {"train": folder_source(_OMNIGLOT, uri, files, folders, depth=2)}


_EUROSAT = Layout(
    name="eurosat",
    summary="EuroSAT, RGB: 27,000 satellite images of 10 kinds of land use; no split of its own",
    tree="""
DIR/2750/AnnualCrop/AnnualCrop_1.jpg     (or DIR/eurosat/2750, or DIR is the folder 2750 itself)
""",
    source="EuroSAT.zip of madm.dfki.de/files/sentinel; torchvision's EuroSAT",
    open=_open_eurosat,
)
_CROP_DISEASE = Layout(
    name="cropdisease",
    summary="CropDisease (PlantVillage): 54,305 leaves, 38 classes; its test folder is test",
    tree="""
DIR/dataset/train/Apple___Apple_scab/*.JPG     (or DIR/train)
DIR/dataset/test/Apple___Apple_scab/*.JPG      (or DIR/test)
""",
    source="kaggle.com/saroz014/plant-disease, IBM/cdfsl-benchmark: datasets/CropDisease_few_shot.py",
    open=_open_crop_disease,
)
_OMNIGLOT = Layout(
    name="omniglot",
    summary="Omniglot: 659 characters of 20 alphabets, 20 images each (964 of 30 with part=background); no split of "
    "its own",
    tree="""
DIR/images_evaluation/Angelic/character01/0965_01.png     (or DIR/omniglot-py/images_evaluation)
DIR/images_background/Greek/character01/0394_01.png       with part=background or part=all
""",
    source="brendenlake/omniglot: python/; asrafulashiq/transfer_broad: data_loader/additional_data.py",
    open=_open_omniglot,
    options={"part": "evaluation: images_evaluation, as in the 12-domain protocol; or background; or all"},
)
_RESISC45 = Layout(
    name="resisc45",
    summary="NWPU-RESISC45: 31,500 aerial images of 45 kinds of scenes; no split of its own",
    tree="""
DIR/NWPU-RESISC45/airplane/airplane_001.jpg     (or DIR is this folder itself)
""",
    source="NWPU-RESISC45.rar of Cheng, Han and Lu, Proceedings of the IEEE 2017",
    open=_open_resisc45,
)
_SKETCH = Layout(
    name="sketch",
    summary="ImageNet-Sketch: 50,889 drawings of ImageNet's 1000 classes; no split of its own",
    tree="""
DIR/sketch/n01440764/sketch_0.JPEG     (or DIR is this folder itself)
""",
    source="HaohanWang/ImageNet-Sketch",
    open=_open_sketch,
)
FOLDER_LAYOUTS = {layout.name: layout for layout in (_EUROSAT, _CROP_DISEASE, _OMNIGLOT, _RESISC45, _SKETCH)}
