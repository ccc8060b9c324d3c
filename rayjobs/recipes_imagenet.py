"""Recipes at the papers' ImageNet scale: ResNet-50, 224 px, one function per method.

``python rayjobs/pretrain.py --recipe moco_v2_imagenet`` runs one (``--output FOLDER`` says where to); other
flags change single settings, and ``--recipe NAME --help`` shows all of them. What a recipe does not name is the
method's preset in ``METHODS``.

Times: MoCo v2 takes 53 hours for 200 epochs on 8 V100 (facebookresearch/moco README): 168 images/s per GPU. The
others are estimates from it, not measurements: in proportion to the passes over the backbone that a training image
costs (a forward pass 1, forward and backward 3; MoCo 4), to the multiplications of the backbone at the image size, to
images, epochs and GPUs. ``tests/rayjobs/test_recipes.py`` computes them again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rayjobs.configs import PretrainConfig, TrainConfig, preset, with_parameters

__all__ = ["IMAGENET"]


def _imagenet(method: str, *, epochs: int, batch_size: int, num_workers: int = 8, **changes: Any) -> PretrainConfig:
    train = TrainConfig(
        backbone="resnet50",
        stem="imagenet",
        image_size=224,
        batch_size=batch_size,
        epochs=epochs,
        num_workers=num_workers,
        use_gpu=True,
        cpus_per_worker=8.0,
        memory_limit_gb=0.0,
    )
    return with_parameters(preset(method, train), changes)


def supervised_imagenet() -> PretrainConfig:
    """supervised on ImageNet, resnet50, 224 px, 200 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe supervised_imagenet --data folder:IMAGENET
    Hardware: 8 GPUs (V100). Time: about 40 h (estimate).
    Published: none for 200 epochs in a text at hand (Zhao et al., ICLR 2021, compare by transfer).
    """
    return _imagenet("supervised", epochs=200, batch_size=256)


def sl_mlp_imagenet() -> PretrainConfig:
    """sl_mlp on ImageNet, resnet50, 224 px, 200 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe sl_mlp_imagenet --data folder:IMAGENET
    Hardware: 8 GPUs (V100). Time: about 40 h (estimate).
    Published: none in a text at hand (Wang et al., CVPR 2022); settings as supervised, so that the projector is the
    only difference.
    """
    return _imagenet("sl_mlp", epochs=200, batch_size=256)


def supcon_imagenet() -> PretrainConfig:
    """supcon on ImageNet, resnet50, 224 px, 200 epochs of batch 1,024.

    Command: python rayjobs/pretrain.py --recipe supcon_imagenet --data folder:IMAGENET
    Hardware: 8 GPUs (V100). Time: about 79 h (estimate).
    Published: 79.1 % with a momentum queue, which this recipe does not have (HobbitLong/SupContrast README).
    """
    return _imagenet("supcon", epochs=200, batch_size=1024)


def instdisc_imagenet() -> PretrainConfig:
    """instdisc on ImageNet, resnet50, 224 px, 200 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe instdisc_imagenet --data folder:IMAGENET
    Hardware: 8 GPUs (V100). Time: about 40 h (estimate).
    Published: 56.5 % linear (HobbitLong/CMC README, NCE with 4,096 samples).
    """
    return _imagenet("instdisc", epochs=200, batch_size=256)


def moco_v1_imagenet() -> PretrainConfig:
    """moco_v1 on ImageNet, resnet50, 224 px, 200 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe moco_v1_imagenet --data folder:IMAGENET
    Hardware: 8 GPUs (V100). Time: about 53 h (estimate).
    Published: 60.8 +- 0.2 % linear (facebookresearch/moco README).
    """
    return _imagenet("moco_v1", epochs=200, batch_size=256)


def moco_v2_imagenet() -> PretrainConfig:
    """moco_v2 on ImageNet, resnet50, 224 px, 200 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe moco_v2_imagenet --data folder:IMAGENET
    Hardware: 8 GPUs (V100). Time: about 53 h (published).
    Published: 67.5 +- 0.1 % linear; VOC07+12 AP 57.0 (facebookresearch/moco README).
    """
    return _imagenet("moco_v2", epochs=200, batch_size=256)


def exemplar_v1_imagenet() -> PretrainConfig:
    """exemplar_v1 on ImageNet, resnet50, 224 px, 200 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe exemplar_v1_imagenet --data folder:IMAGENET
    Hardware: 8 GPUs (V100). Time: about 53 h (estimate).
    Published: 64.6 % linear (Zhao et al., ICLR 2021, Table 10, K = 1M).
    """
    return _imagenet("exemplar_v1", epochs=200, batch_size=256, queue_size=2**20)


def exemplar_v2_imagenet() -> PretrainConfig:
    """exemplar_v2 on ImageNet, resnet50, 224 px, 200 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe exemplar_v2_imagenet --data folder:IMAGENET
    Hardware: 8 GPUs (V100). Time: about 53 h (estimate).
    Published: 68.9 % linear (Zhao et al., ICLR 2021, Table 10, K = 1M).
    """
    return _imagenet("exemplar_v2", epochs=200, batch_size=256, queue_size=2**20)


def simclr_imagenet() -> PretrainConfig:
    """simclr on ImageNet, resnet50, 224 px, 100 epochs of batch 4,096.

    Command: python rayjobs/pretrain.py --recipe simclr_imagenet --data folder:IMAGENET
    Hardware: 32 GPUs (V100). Time: about 10 h (estimate).
    Published: 64.5 % linear (google-research/simclr README, 100 epochs).
    """
    return _imagenet("simclr", epochs=100, batch_size=4096, num_workers=32)


def byol_imagenet() -> PretrainConfig:
    """byol on ImageNet, resnet50, 224 px, 1000 epochs of batch 4,096.

    Command: python rayjobs/pretrain.py --recipe byol_imagenet --data folder:IMAGENET
    Hardware: 32 GPUs (V100). Time: about 132 h (estimate).
    Published: 74.0 to 74.5 % linear (deepmind-research byol README).
    """
    return _imagenet("byol", epochs=1000, batch_size=4096, num_workers=32)


def simsiam_imagenet() -> PretrainConfig:
    """simsiam on ImageNet, resnet50, 224 px, 100 epochs of batch 512.

    Command: python rayjobs/pretrain.py --recipe simsiam_imagenet --data folder:IMAGENET
    Hardware: 8 GPUs (V100). Time: about 40 h (estimate).
    Published: 68.1 % linear (facebookresearch/simsiam README).
    """
    return _imagenet("simsiam", epochs=100, batch_size=512)


def swav_imagenet() -> PretrainConfig:
    """swav on ImageNet, resnet50, 224 px, 200 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe swav_imagenet --data folder:IMAGENET
    Hardware: 4 GPUs (V100). Time: about 246 h (estimate).
    Published: 72.7 % linear (facebookresearch/swav README, batch 256, queue from epoch 15).
    """
    return _imagenet("swav", epochs=200, batch_size=256, num_workers=4)


def camtrast_moco_imagenet() -> PretrainConfig:
    """camtrast_moco on ImageNet, resnet50, 224 px, 200 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe camtrast_moco_imagenet --data folder:IMAGENET
    Hardware: 8 GPUs (V100). Time: about 93 h (estimate).
    Published: none for ImageNet in a text at hand (Sun et al., AAAI 2022, train at 84 px: recipe camtrast_moco_small).
    """
    return _imagenet("camtrast_moco", epochs=200, batch_size=256, queue_size=65536)


def camtrast_simsiam_imagenet() -> PretrainConfig:
    """camtrast_simsiam on ImageNet, resnet50, 224 px, 200 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe camtrast_simsiam_imagenet --data folder:IMAGENET
    Hardware: 8 GPUs (V100). Time: about 79 h (estimate).
    Published: none for ImageNet in a text at hand (Sun et al., AAAI 2022).
    """
    return _imagenet("camtrast_simsiam", epochs=200, batch_size=256)


def camtrast_cam_only_imagenet() -> PretrainConfig:
    """camtrast_cam_only on ImageNet, resnet50, 224 px, 200 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe camtrast_cam_only_imagenet --data folder:IMAGENET
    Hardware: 8 GPUs (V100). Time: about 79 h (estimate).
    Published: none for ImageNet (ablation of Sun et al., AAAI 2022).
    """
    return _imagenet("camtrast_cam_only", epochs=200, batch_size=256)


def camtrast_contrast_only_moco_imagenet() -> PretrainConfig:
    """camtrast_contrast_only_moco on ImageNet, resnet50, 224 px, 200 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe camtrast_contrast_only_moco_imagenet --data folder:IMAGENET
    Hardware: 8 GPUs (V100). Time: about 66 h (estimate).
    Published: none for ImageNet (ablation of Sun et al., AAAI 2022).
    """
    return _imagenet("camtrast_contrast_only_moco", epochs=200, batch_size=256, queue_size=65536)


def camtrast_contrast_only_simsiam_imagenet() -> PretrainConfig:
    """camtrast_contrast_only_simsiam on ImageNet, resnet50, 224 px, 200 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe camtrast_contrast_only_simsiam_imagenet --data folder:IMAGENET
    Hardware: 8 GPUs (V100). Time: about 79 h (estimate).
    Published: none for ImageNet (ablation of Sun et al., AAAI 2022).
    """
    return _imagenet("camtrast_contrast_only_simsiam", epochs=200, batch_size=256)


def camtrast_code_imagenet() -> PretrainConfig:
    """camtrast_code on ImageNet, resnet50, 224 px, 100 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe camtrast_code_imagenet --data folder:IMAGENET
    Hardware: 8 GPUs (V100). Time: about 40 h (estimate).
    Published: none for ImageNet (jinghanSunn/CAMtrast trains at 84 px).
    """
    return _imagenet("camtrast_code", epochs=100, batch_size=256)


def rotation_imagenet() -> PretrainConfig:
    """rotation on ImageNet, resnet50, 224 px, 50 epochs of batch 192.

    Command: python rayjobs/pretrain.py --recipe rotation_imagenet --data folder:IMAGENET
    Hardware: 8 GPUs (V100). Time: about 40 h (estimate).
    Published: none for a ResNet-50 in a text at hand (Gidaris et al., ICLR 2018, use AlexNet: 50 epochs, drops at 15,
    30, 45).
    """
    return _imagenet("rotation", epochs=50, batch_size=192, milestones=(0.3, 0.6, 0.9), decay=0.1)


def vae_imagenet() -> PretrainConfig:
    """vae on ImageNet, resnet50, 224 px, 200 epochs of batch 384.

    Command: python rayjobs/pretrain.py --recipe vae_imagenet --data folder:IMAGENET
    Hardware: 8 GPUs (V100). Time: about 46 h (estimate).
    Published: none for ImageNet (Newell & Deng, CVPR 2020, train on synthetic images).
    """
    return _imagenet("vae", epochs=200, batch_size=384)


def cmc_imagenet() -> PretrainConfig:
    """cmc on ImageNet, resnet50, 224 px, 240 epochs of batch 128.

    Command: python rayjobs/pretrain.py --recipe cmc_imagenet --data folder:IMAGENET
    Hardware: 8 GPUs (V100). Time: about 24 h (estimate).
    Published: none for the half-width ResNet-50 in a text at hand (Tian et al., ECCV 2020).
    """
    return _imagenet("cmc", epochs=240, batch_size=128)


def amdim_imagenet() -> PretrainConfig:
    """amdim on ImageNet, resnet50, 128 px, 100 epochs of batch 384.

    Command: python rayjobs/pretrain.py --recipe amdim_imagenet --data folder:IMAGENET
    Hardware: 8 GPUs (V100). Time: about 13 h (estimate).
    Published: none for a ResNet-50 in a text at hand (Bachman et al., NeurIPS 2019, use an encoder of their own at 128
    px).
    """
    return _imagenet("amdim", epochs=100, batch_size=384, image_size=128)


IMAGENET: dict[str, Callable[[], PretrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        supervised_imagenet,
        sl_mlp_imagenet,
        supcon_imagenet,
        instdisc_imagenet,
        moco_v1_imagenet,
        moco_v2_imagenet,
        exemplar_v1_imagenet,
        exemplar_v2_imagenet,
        simclr_imagenet,
        byol_imagenet,
        simsiam_imagenet,
        swav_imagenet,
        camtrast_moco_imagenet,
        camtrast_simsiam_imagenet,
        camtrast_cam_only_imagenet,
        camtrast_contrast_only_moco_imagenet,
        camtrast_contrast_only_simsiam_imagenet,
        camtrast_code_imagenet,
        rotation_imagenet,
        vae_imagenet,
        cmc_imagenet,
        amdim_imagenet,
    )
}
