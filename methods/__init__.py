"""Pretraining methods: ``METHODS`` is the table of all of them, one row per preset.

Each row names the config with the paper's defaults, the class, the view recipes, the optimiser and one line of summary;
what they mean stands in the method's own file.
"""

from __future__ import annotations

import difflib

from methods import (
    amdim,
    byol,
    camtrast,
    camtrast_ablations,
    camtrast_code,
    cmc,
    exemplar,
    instdisc,
    moco,
    rotation,
    simclr,
    simsiam,
    sl_mlp,
    supcon,
    supervised,
    swav,
    vae,
)
from methods.contracts import Batch, Method, MethodContext, MethodSpec, Progress, StepOutput

__all__ = [
    "METHODS",
    "Batch",
    "Method",
    "MethodContext",
    "MethodSpec",
    "Progress",
    "StepOutput",
    "describe",
    "method_spec",
]

METHODS: dict[str, MethodSpec] = {
    "supervised": MethodSpec(
        config=supervised.SupervisedConfig(),
        method=supervised.Supervised,
        views=supervised.VIEWS,
        optimizer=supervised.OPTIMIZER,
        summary="Cross entropy on the labels.",
        uses_labels=True,
    ),
    "sl_mlp": MethodSpec(
        config=sl_mlp.SLMLPConfig(),
        method=sl_mlp.SLMLP,
        views=sl_mlp.VIEWS,
        optimizer=sl_mlp.OPTIMIZER,
        summary="Cross entropy through an MLP projector that is thrown away (Wang et al. 2022).",
        uses_labels=True,
    ),
    "supcon": MethodSpec(
        config=supcon.SupConConfig(),
        method=supcon.SupCon,
        views=supcon.VIEWS,
        optimizer=supcon.OPTIMIZER,
        summary="Views of one class attract each other, all others repel (Khosla et al. 2020).",
        uses_labels=True,
    ),
    "instdisc": MethodSpec(
        config=instdisc.InstDiscConfig(),
        method=instdisc.InstDisc,
        views=instdisc.VIEWS,
        optimizer=instdisc.OPTIMIZER,
        summary="Every image is a class of its own, remembered in a memory bank (Wu et al. 2018).",
    ),
    "moco_v1": MethodSpec(
        config=moco.MoCoConfig(temperature=0.07, projector_depth=1),
        method=moco.MoCo,
        views=moco.VIEWS_V1,
        optimizer=moco.OPTIMIZER_V1,
        summary="Instance discrimination against a queue of momentum keys, linear head (He et al. 2020).",
    ),
    "moco_v2": MethodSpec(
        config=moco.MoCoConfig(),
        method=moco.MoCo,
        views=moco.VIEWS_V2,
        optimizer=moco.OPTIMIZER_V2,
        summary="MoCo with an MLP head, blur and a cosine schedule (Chen et al. 2020).",
    ),
    "exemplar_v1": MethodSpec(
        config=exemplar.ExemplarConfig(temperature=0.07, projector_depth=1),
        method=exemplar.Exemplar,
        views=moco.VIEWS_V1,
        optimizer=moco.OPTIMIZER_V1,
        summary="MoCo v1 without negatives of the query's own class (Zhao et al. 2021).",
        uses_labels=True,
    ),
    "exemplar_v2": MethodSpec(
        config=exemplar.ExemplarConfig(),
        method=exemplar.Exemplar,
        views=moco.VIEWS_V2,
        optimizer=moco.OPTIMIZER_V2,
        summary="MoCo v2 without negatives of the query's own class (Zhao et al. 2021).",
        uses_labels=True,
    ),
    "simclr": MethodSpec(
        config=simclr.SimCLRConfig(),
        method=simclr.SimCLR,
        views=simclr.VIEWS,
        optimizer=simclr.OPTIMIZER,
        summary="Two views attract each other, all other images of the global batch repel (Chen et al. 2020).",
    ),
    "byol": MethodSpec(
        config=byol.ByolConfig(),
        method=byol.Byol,
        views=byol.VIEWS,
        optimizer=byol.OPTIMIZER,
        summary="Predicts what a slow copy of the network makes of another view, no negatives (Grill et al. 2020).",
    ),
    "simsiam": MethodSpec(
        config=simsiam.SimSiamConfig(),
        method=simsiam.SimSiam,
        views=simsiam.VIEWS,
        optimizer=simsiam.OPTIMIZER,
        summary="Two views predict each other behind a stop-gradient, no negatives (Chen & He 2021).",
        zero_init_residual=True,
    ),
    "swav": MethodSpec(
        config=swav.SwavConfig(),
        method=swav.Swav,
        views=swav.VIEWS,
        optimizer=swav.OPTIMIZER,
        summary="Crops of many sizes predict each other's cluster codes (Caron et al. 2020).",
    ),
    "camtrast_moco": MethodSpec(
        config=camtrast.CamtrastMoCoConfig(),
        method=camtrast.CamtrastMoCo,
        views=camtrast.VIEWS,
        optimizer=camtrast.OPTIMIZER,
        summary="Labels, plus MoCo v2 between an image and itself with the class activation hidden (Sun et al. 2022).",
        uses_labels=True,
    ),
    "camtrast_simsiam": MethodSpec(
        config=camtrast.CamtrastSimSiamConfig(),
        method=camtrast.CamtrastSimSiam,
        views=camtrast.VIEWS,
        optimizer=camtrast.OPTIMIZER,
        summary="Labels, plus SimSiam between an image and itself with the class activation hidden (Sun et al. 2022).",
        zero_init_residual=True,
        uses_labels=True,
    ),
    "camtrast_cam_only": MethodSpec(
        config=camtrast_ablations.CamtrastCAMOnlyConfig(),
        method=camtrast_ablations.CamtrastCAMOnly,
        views=camtrast.VIEWS,
        optimizer=camtrast.OPTIMIZER,
        summary="CAMtrast without contrast: labels, with and without the class activation (Sun et al. 2022, Table 5).",
        uses_labels=True,
    ),
    "camtrast_contrast_only_moco": MethodSpec(
        config=camtrast_ablations.CamtrastContrastOnlyMoCoConfig(),
        method=camtrast_ablations.CamtrastContrastOnlyMoCo,
        views=camtrast.VIEWS,
        optimizer=camtrast.OPTIMIZER,
        summary="CAMtrast with MoCo v2 whose hidden image is contrasted but not classified (Sun et al. 2022, Table 5).",
        uses_labels=True,
    ),
    "camtrast_contrast_only_simsiam": MethodSpec(
        config=camtrast_ablations.CamtrastContrastOnlySimSiamConfig(),
        method=camtrast_ablations.CamtrastContrastOnlySimSiam,
        views=camtrast.VIEWS,
        optimizer=camtrast.OPTIMIZER,
        summary="CAMtrast with SimSiam whose hidden image is contrasted but not classified (Sun et al. 2022, Table 5).",
        zero_init_residual=True,
        uses_labels=True,
    ),
    "camtrast_code": MethodSpec(
        config=camtrast.CamtrastSimSiamConfig(
            variant="code", fixed_predictor_learning_rate=False, sync_batchnorm=False
        ),
        method=camtrast.CamtrastSimSiam,
        views=camtrast_code.VIEWS_CODE,
        optimizer=camtrast_code.OPTIMIZER_CODE,
        summary="CAMtrast with SimSiam as its released code trains it: two optimiser steps per batch.",
        zero_init_residual=True,
        uses_labels=True,
    ),
    "rotation": MethodSpec(
        config=rotation.RotationConfig(),
        method=rotation.Rotation,
        views=rotation.VIEWS,
        optimizer=rotation.OPTIMIZER,
        summary="Which way up is the image? Four rotations are told apart (Gidaris et al. 2018).",
    ),
    "vae": MethodSpec(
        config=vae.VAEConfig(),
        method=vae.VAE,
        views=vae.VIEWS,
        optimizer=vae.OPTIMIZER,
        summary="Variational autoencoder: the image is drawn again from a noisy code (Newell & Deng 2020).",
    ),
    "cmc": MethodSpec(
        config=cmc.CMCConfig(),
        method=cmc.Cmc,
        views=cmc.VIEWS,
        optimizer=cmc.OPTIMIZER,
        summary="Lightness and colour of an image find each other, two half-width encoders (Tian et al. 2020).",
        color_space="lab",
    ),
    "amdim": MethodSpec(
        config=amdim.AMDIMConfig(),
        method=amdim.AMDIM,
        views=amdim.VIEWS,
        optimizer=amdim.OPTIMIZER,
        summary="Global and local features of one view find those of the other (Bachman et al. 2019).",
    ),
}


def method_spec(name: str) -> MethodSpec:
    """The row of ``METHODS`` of this name.

    Raises:
        ValueError: unknown name; the message lists the names and the closest ones.
    """
    if name in METHODS:
        return METHODS[name]
    close = difflib.get_close_matches(name, METHODS, n=2)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(f"Unknown method {name!r}.{hint} The methods are: {', '.join(METHODS)}.")


def describe() -> str:
    """One line per method: name and summary, aligned; for help texts."""
    width = max(map(len, METHODS))
    return "\n".join(f"{name:<{width}}  {spec.summary}" for name, spec in METHODS.items())
