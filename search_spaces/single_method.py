"""One space per method, named like the method: its own hyperparameters only, those of the method alone included.

Command: ``python rayjobs/sweep.py --space moco_v2 --num-trials 20``. The ranges are those of
``search_spaces/parameters.py``. ``PUBLISHED`` holds the papers' numbers for a user who repeats a setting at full scale:
percent, ImageNet linear top-1 of a ResNet-50 unless a name says otherwise. Sources:

- moco_v1, moco_v2, exemplar: Zhao et al., ICLR 2021, Table 10 (200 epochs).
- simsiam: facebookresearch/simsiam README. simclr: google-research/simclr README (100 epochs of batch 4096; released
  model). byol: deepmind-research byol README. swav: facebookresearch/swav README.
- instdisc: HobbitLong/CMC README (200 epochs). supcon: HobbitLong/SupContrast README.
- camtrast: Sun et al., AAAI 2022, Table 3 (miniImageNet, ResNet-50, 84 px) and Table 5 (16 classes, 4,800 images).
- few-shot of supervised, moco_v2, exemplar_v2 with ResNet-18: Zhao et al., Table 4 (miniImageNet, 84 px).

Newell & Deng (rotation, vae, cmc, amdim) and SL-MLP publish curves or numbers that no text at hand states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from methods import METHODS
from search_spaces.parameters import (
    fitted_constants,
    own_preset,
    suggest_own_parameters,
    suggest_parameters,
    suggested_preset,
)
from search_spaces.space import SearchSpace, SpaceContext

__all__ = ["PUBLISHED", "SINGLE_METHOD_SPACES"]

PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "supervised": {
        "mini 1-shot R18": 54.60,
        "mini 5-shot R18": 74.50,
        "mini 1-shot R50": 55.31,
        "mini 5-shot R50": 73.73,
    },
    "moco_v1": {"K=65536 tau=0.07": 60.8, "K=1M tau=0.07": 60.9},
    "moco_v2": {
        "K=65536 tau=0.2": 67.5,
        "K=1M tau=0.1": 66.9,
        "K=1M tau=0.2": 67.8,
        "mini 1-shot R18": 52.14,
        "mini 5-shot R18": 73.30,
    },
    "exemplar_v1": {"K=1M tau=0.07": 64.6, "K=1M tau=0.1": 63.9},
    "exemplar_v2": {
        "K=1M tau=0.07": 68.1,
        "K=1M tau=0.1": 68.9,
        "K=1M tau=0.2": 67.9,
        "mini 1-shot R18": 55.33,
        "mini 5-shot R18": 77.18,
    },
    "instdisc": {"nce, 4096 negatives": 56.5, "softmax, 4096 negatives": 57.1, "softmax, 16384 negatives": 58.5},
    "simclr": {"100 epochs": 64.5, "released v1": 69.1, "CIFAR-10 R18, 1000 epochs (about)": 91.0},
    "supcon": {"CIFAR-10": 96.0, "CIFAR-100": 76.5, "ImageNet, momentum queue": 79.1},
    "byol": {"1000 epochs": 74.0, "mini 1-shot R50": 45.01, "mini 5-shot R50": 61.42},
    "simsiam": {
        "100 epochs, batch 512": 68.1,
        "100 epochs, batch 256": 68.3,
        "mini 1-shot R50": 48.81,
        "mini 5-shot R50": 69.27,
    },
    "swav": {
        "800 epochs": 75.3,
        "400 epochs": 74.6,
        "200 epochs": 73.9,
        "100 epochs": 72.1,
        "batch 256, 200 epochs": 72.7,
        "batch 256, 400 epochs": 74.3,
        "no multi-crop, 400 epochs": 70.1,
    },
    "camtrast_moco": {"mini 1-shot R50": 54.14, "mini 5-shot R50": 74.02},
    "camtrast_simsiam": {
        "mini 1-shot R50": 58.42,
        "mini 5-shot R50": 74.68,
        "16 classes, 1-shot": 39.39,
        "16 classes, 5-shot": 54.22,
    },
    "camtrast_cam_only": {"16 classes, 1-shot": 34.39, "16 classes, 5-shot": 47.85},
    "camtrast_contrast_only_moco": {"16 classes, 1-shot": 35.38, "16 classes, 5-shot": 48.68},
    "camtrast_contrast_only_simsiam": {"16 classes, 1-shot": 36.24, "16 classes, 5-shot": 49.99},
}


def _sample(trial: Any, context: SpaceContext) -> dict[str, Any]:
    """Everything that the method has."""
    (method,) = context.methods
    suggest_parameters(trial, method, context)
    suggest_own_parameters(trial, method, context)
    own = own_preset(method, context)
    constants = {name: value for name, value in fitted_constants(method, context).items() if name not in own}
    return {"method": method, **constants}


def _presets(context: SpaceContext) -> list[dict[str, Any]]:
    """The published setting."""
    (method,) = context.methods
    return [suggested_preset(method, context) | own_preset(method, context)]


SINGLE_METHOD_SPACES = tuple(
    SearchSpace(
        name=name,
        methods=(name,),
        sample=_sample,
        presets=_presets,
        published=PUBLISHED.get(name, {}),
        summary=f"the hyperparameters of {name}: {spec.summary}",
    )
    for name, spec in METHODS.items()
)
