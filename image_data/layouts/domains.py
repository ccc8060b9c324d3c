"""The twelve data sets of the linear evaluation across domains, in the order of the study that introduced the list.

Islam et al., ICCV 2021 (``asrafulashiq/transfer_broad: scripts/run_linear_bn.sh, data_loader/``). What has no split of
its own is given as "train", of which the seeded rule then takes test images: 30 % of each class in that study.
"""

from __future__ import annotations

from image_data.layouts.domains_folders import FOLDER_LAYOUTS
from image_data.layouts.domains_lists import LIST_LAYOUTS
from image_data.layouts.domains_mat import MAT_LAYOUTS
from image_data.layouts.layout import Layout

__all__ = ["DOMAIN_LAYOUTS"]

_ALL = {**FOLDER_LAYOUTS, **LIST_LAYOUTS, **MAT_LAYOUTS}
_ORDER = (
    "eurosat",
    "cropdisease",
    "chestx",
    "isic",
    "dtd",
    "omniglot",
    "resisc45",
    "svhn",
    "deepweeds",
    "kaokore",
    "sketch",
    "flowers102",
)
DOMAIN_LAYOUTS: dict[str, Layout] = {name: _ALL[name] for name in _ORDER}
