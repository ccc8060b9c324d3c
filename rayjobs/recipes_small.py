"""Recipes for small images, 32 to 84 px, one function per method: CIFAR-10 and miniImageNet as the papers use them.

``python rayjobs/pretrain.py --recipe exemplar_v2_small`` runs one (``--output FOLDER`` says where to); other
flags change single settings, and ``--recipe NAME --help`` shows all of them. What a recipe does not name is the
method's preset in ``METHODS``.

At 32 px the ResNets and ResNet-9 have the small stem. Times are estimates as in ``recipes_imagenet.py``, for 38,400
(miniImageNet's base classes) or 50,000 images (CIFAR-10).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rayjobs.configs import PretrainConfig, TrainConfig, preset, with_parameters

__all__ = ["SMALL"]


def _small(
    method: str, *, backbone: str, image_size: int, epochs: int, batch_size: int, **changes: Any
) -> PretrainConfig:
    train = TrainConfig(
        backbone=backbone,
        image_size=image_size,
        batch_size=batch_size,
        epochs=epochs,
        use_gpu=True,
        cpus_per_worker=8.0,
    )
    return with_parameters(preset(method, train), changes)


def supervised_small() -> PretrainConfig:
    """supervised on small images, resnet50, 84 px, 100 epochs of batch 64.

    Command: python rayjobs/pretrain.py --recipe supervised_small --data csv:MINIIMAGENET
    Hardware: 1 GPU (V100). Time: about 0.7 h (estimate).
    Published: miniImageNet 5-way 55.31 / 73.73 % (1 / 5 shot; Sun et al., AAAI 2022, Table 3).
    """
    return _small(
        "supervised",
        epochs=100,
        batch_size=64,
        backbone="resnet50",
        image_size=84,
        views=("rfs_a",),
        learning_rate=0.05 * 256 / 64,
        weight_decay=5e-4,
        schedule="step",
        milestones=(0.6, 0.8),
    )


def sl_mlp_small() -> PretrainConfig:
    """sl_mlp on small images, resnet50, 84 px, 100 epochs of batch 64.

    Command: python rayjobs/pretrain.py --recipe sl_mlp_small --data csv:MINIIMAGENET
    Hardware: 1 GPU (V100). Time: about 0.7 h (estimate).
    Published: none in a text at hand; settings as supervised.
    """
    return _small(
        "sl_mlp",
        epochs=100,
        batch_size=64,
        backbone="resnet50",
        image_size=84,
        views=("rfs_a",),
        learning_rate=0.05 * 256 / 64,
        weight_decay=5e-4,
        schedule="step",
        milestones=(0.6, 0.8),
    )


def supcon_small() -> PretrainConfig:
    """supcon on small images, resnet50, 32 px, 1,000 epochs of batch 1,024.

    Command: python rayjobs/pretrain.py --recipe supcon_small --data folder:CIFAR10
    Hardware: 1 GPU (V100). Time: about 40 h (estimate).
    Published: CIFAR-10 96.0 %, CIFAR-100 76.5 % linear (HobbitLong/SupContrast README).
    """
    return _small("supcon", epochs=1000, batch_size=1024, backbone="resnet50", image_size=32)


def instdisc_small() -> PretrainConfig:
    """instdisc on small images, resnet18, 32 px, 200 epochs of batch 128.

    Command: python rayjobs/pretrain.py --recipe instdisc_small --data folder:CIFAR10
    Hardware: 1 GPU (V100). Time: about 1.8 h (estimate).
    Published: none for CIFAR-10 in a text at hand (zhirongw/lemniscate.pytorch trains this setting).
    """
    return _small("instdisc", epochs=200, batch_size=128, backbone="resnet18", image_size=32, temperature=0.1)


def moco_v1_small() -> PretrainConfig:
    """moco_v1 on small images, resnet18, 84 px, 2,000 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe moco_v1_small --data csv:MINIIMAGENET
    Hardware: 1 GPU (V100). Time: about 7.9 h (estimate).
    Published: none for v1 at 84 px in a text at hand.
    """
    return _small("moco_v1", epochs=2000, batch_size=256, backbone="resnet18", image_size=84, queue_size=2048)


def moco_v2_small() -> PretrainConfig:
    """moco_v2 on small images, resnet18, 84 px, 2,000 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe moco_v2_small --data csv:MINIIMAGENET
    Hardware: 1 GPU (V100). Time: about 7.9 h (estimate).
    Published: miniImageNet 5-way 52.14 / 73.30 % (1 / 5 shot; Zhao et al., ICLR 2021, Table 4; K 2,048 from Sun et
    al.).
    """
    return _small("moco_v2", epochs=2000, batch_size=256, backbone="resnet18", image_size=84, queue_size=2048)


def exemplar_v1_small() -> PretrainConfig:
    """exemplar_v1 on small images, resnet18, 84 px, 2,000 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe exemplar_v1_small --data csv:MINIIMAGENET
    Hardware: 1 GPU (V100). Time: about 7.9 h (estimate).
    Published: none for v1 at 84 px in a text at hand.
    """
    return _small("exemplar_v1", epochs=2000, batch_size=256, backbone="resnet18", image_size=84, queue_size=2048)


def exemplar_v2_small() -> PretrainConfig:
    """exemplar_v2 on small images, resnet18, 84 px, 2,000 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe exemplar_v2_small --data csv:MINIIMAGENET
    Hardware: 1 GPU (V100). Time: about 7.9 h (estimate).
    Published: miniImageNet 5-way 55.33 / 77.18 % (1 / 5 shot; Zhao et al., ICLR 2021, Table 4).
    """
    return _small("exemplar_v2", epochs=2000, batch_size=256, backbone="resnet18", image_size=84, queue_size=2048)


def simclr_small() -> PretrainConfig:
    """simclr on small images, resnet18, 32 px, 1,000 epochs of batch 512.

    Command: python rayjobs/pretrain.py --recipe simclr_small --data folder:CIFAR10
    Hardware: 1 GPU (V100). Time: about 18 h (estimate).
    Published: CIFAR-10 about 91 % linear (google-research/simclr README).
    """
    return _small(
        "simclr",
        epochs=1000,
        batch_size=512,
        backbone="resnet18",
        image_size=32,
        views=(
            "simclr_small",
            "simclr_small",
        ),
        temperature=0.5,
        learning_rate=0.5,
    )


def byol_small() -> PretrainConfig:
    """byol on small images, resnet50, 84 px, 1,000 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe byol_small --data csv:MINIIMAGENET
    Hardware: 1 GPU (V100). Time: about 18 h (estimate).
    Published: miniImageNet 5-way 45.01 / 61.42 % (1 / 5 shot; Sun et al., AAAI 2022, Table 3).
    """
    return _small("byol", epochs=1000, batch_size=256, backbone="resnet50", image_size=84)


def simsiam_small() -> PretrainConfig:
    """simsiam on small images, resnet50, 84 px, 1,000 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe simsiam_small --data csv:MINIIMAGENET
    Hardware: 1 GPU (V100). Time: about 13 h (estimate).
    Published: miniImageNet 5-way 48.81 / 69.27 % (1 / 5 shot; Sun et al., AAAI 2022, Table 3).
    """
    return _small("simsiam", epochs=1000, batch_size=256, backbone="resnet50", image_size=84, learning_rate=0.03)


def swav_small() -> PretrainConfig:
    """swav on small images, resnet18, 84 px, 500 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe swav_small --data csv:MINIIMAGENET
    Hardware: 1 GPU (V100). Time: about 4.6 h (estimate).
    Published: none at 84 px in a text at hand.
    """
    return _small("swav", epochs=500, batch_size=256, backbone="resnet18", image_size=84, num_prototypes=1000)


def camtrast_moco_small() -> PretrainConfig:
    """camtrast_moco on small images, resnet50, 84 px, 1,000 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe camtrast_moco_small --data csv:MINIIMAGENET
    Hardware: 1 GPU (V100). Time: about 16 h (estimate).
    Published: miniImageNet 5-way 54.14 / 74.02 % (1 / 5 shot; Sun et al., AAAI 2022, Table 3).
    """
    return _small(
        "camtrast_moco", epochs=1000, batch_size=256, backbone="resnet50", image_size=84, cam_warmup_epochs=30
    )


def camtrast_simsiam_small() -> PretrainConfig:
    """camtrast_simsiam on small images, resnet50, 84 px, 1,000 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe camtrast_simsiam_small --data csv:MINIIMAGENET
    Hardware: 1 GPU (V100). Time: about 13 h (estimate).
    Published: miniImageNet 5-way 58.42 / 74.68 % (1 / 5 shot; Sun et al., AAAI 2022, Table 3).
    """
    return _small(
        "camtrast_simsiam", epochs=1000, batch_size=256, backbone="resnet50", image_size=84, cam_warmup_epochs=30
    )


def camtrast_cam_only_small() -> PretrainConfig:
    """camtrast_cam_only on small images, resnet50, 84 px, 1,000 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe camtrast_cam_only_small --data csv:MINIIMAGENET
    Hardware: 1 GPU (V100). Time: about 13 h (estimate).
    Published: 34.39 / 47.85 % with 16 classes and 4,800 images (Sun et al., AAAI 2022, Table 5).
    """
    return _small(
        "camtrast_cam_only", epochs=1000, batch_size=256, backbone="resnet50", image_size=84, cam_warmup_epochs=30
    )


def camtrast_contrast_only_moco_small() -> PretrainConfig:
    """camtrast_contrast_only_moco on small images, resnet50, 84 px, 1,000 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe camtrast_contrast_only_moco_small --data csv:MINIIMAGENET
    Hardware: 1 GPU (V100). Time: about 11 h (estimate).
    Published: 35.38 / 48.68 % with 16 classes and 4,800 images (Sun et al., AAAI 2022, Table 5).
    """
    return _small(
        "camtrast_contrast_only_moco",
        epochs=1000,
        batch_size=256,
        backbone="resnet50",
        image_size=84,
        cam_warmup_epochs=30,
    )


def camtrast_contrast_only_simsiam_small() -> PretrainConfig:
    """camtrast_contrast_only_simsiam on small images, resnet50, 84 px, 1,000 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe camtrast_contrast_only_simsiam_small --data csv:MINIIMAGENET
    Hardware: 1 GPU (V100). Time: about 13 h (estimate).
    Published: 36.24 / 49.99 % with 16 classes and 4,800 images (Sun et al., AAAI 2022, Table 5).
    """
    return _small(
        "camtrast_contrast_only_simsiam",
        epochs=1000,
        batch_size=256,
        backbone="resnet50",
        image_size=84,
        cam_warmup_epochs=30,
    )


def camtrast_code_small() -> PretrainConfig:
    """camtrast_code on small images, resnet50, 84 px, 100 epochs of batch 256.

    Command: python rayjobs/pretrain.py --recipe camtrast_code_small --data csv:MINIIMAGENET
    Hardware: 1 GPU (V100). Time: about 1.3 h (estimate).
    Published: none of its own (jinghanSunn/CAMtrast README gives the command).
    """
    return _small("camtrast_code", epochs=100, batch_size=256, backbone="resnet50", image_size=84, cam_warmup_epochs=30)


def rotation_small() -> PretrainConfig:
    """rotation on small images, resnet18, 32 px, 200 epochs of batch 128.

    Command: python rayjobs/pretrain.py --recipe rotation_small --data folder:CIFAR10
    Hardware: 1 GPU (V100). Time: about 7.2 h (estimate).
    Published: none for a ResNet in a text at hand (gidariss/FeatureLearningRotNet: CIFAR-10 with NIN).
    """
    return _small("rotation", epochs=200, batch_size=128, backbone="resnet18", image_size=32)


def vae_small() -> PretrainConfig:
    """vae on small images, resnet9, 32 px, 400 epochs of batch 512.

    Command: python rayjobs/pretrain.py --recipe vae_small --data folder:CIFAR10
    Hardware: 1 GPU (V100). Time: about 2.7 h (estimate).
    Published: curves only (Newell & Deng, CVPR 2020; CIFAR-10 settings of princeton-vl/selfstudy).
    """
    return _small("vae", epochs=400, batch_size=512, backbone="resnet9", image_size=32, final_learning_rate=5e-6)


def cmc_small() -> PretrainConfig:
    """cmc on small images, resnet9, 32 px, 400 epochs of batch 512.

    Command: python rayjobs/pretrain.py --recipe cmc_small --data folder:CIFAR10
    Hardware: 1 GPU (V100). Time: about 1.1 h (estimate).
    Published: curves only (Newell & Deng, CVPR 2020; CIFAR-10 settings of princeton-vl/selfstudy).
    """
    return _small(
        "cmc",
        epochs=400,
        batch_size=512,
        backbone="resnet9",
        image_size=32,
        temperature=0.1,
        bank_momentum=0.4,
        num_negatives=4096,
        optimizer="adam",
        learning_rate=5e-4,
        final_learning_rate=5e-7,
        weight_decay=1e-5,
        schedule="linear",
        schedule_every="step",
        warmup_epochs=5,
        adam_beta1=0.8,
    )


def amdim_small() -> PretrainConfig:
    """amdim on small images, resnet9, 32 px, 400 epochs of batch 384.

    Command: python rayjobs/pretrain.py --recipe amdim_small --data folder:CIFAR10
    Hardware: 1 GPU (V100). Time: about 4.6 h (estimate).
    Published: curves only (Newell & Deng, CVPR 2020; CIFAR-10 settings of princeton-vl/selfstudy).
    """
    return _small("amdim", epochs=400, batch_size=384, backbone="resnet9", image_size=32)


SMALL: dict[str, Callable[[], PretrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        supervised_small,
        sl_mlp_small,
        supcon_small,
        instdisc_small,
        moco_v1_small,
        moco_v2_small,
        exemplar_v1_small,
        exemplar_v2_small,
        simclr_small,
        byol_small,
        simsiam_small,
        swav_small,
        camtrast_moco_small,
        camtrast_simsiam_small,
        camtrast_cam_only_small,
        camtrast_contrast_only_moco_small,
        camtrast_contrast_only_simsiam_small,
        camtrast_code_small,
        rotation_small,
        vae_small,
        cmc_small,
        amdim_small,
    )
}
